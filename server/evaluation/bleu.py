"""BLEU over the pieces of a SentencePiece model (spBLEU; Goyal et al. 2022), by sacrebleu."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from .tasks import TaskError

WHERE = "https://dl.fbaipublicfiles.com/fairseq/models/flores/sacrebleu_tokenizer_spm.model"


class Bleu:
    """sacrebleu's own tokenizer of this kind, `flores101`, downloads its model. This one takes a file."""

    def __init__(self, model: Path | None) -> None:
        """model: FLORES-101's, for figures like those of papers. Raises TaskError."""
        for package in ("sacrebleu", "sentencepiece"):
            if find_spec(package) is None:
                raise TaskError(f"BLEU needs the package {package}: pip install {package}")
        if model is None:
            raise TaskError(f"BLEU needs a SentencePiece model: get {WHERE} and name the file with --sentencepiece")
        if not model.is_file():
            raise TaskError(f"{model}: no such file; --sentencepiece names the SentencePiece model of FLORES: {WHERE}")
        from sacrebleu.metrics import BLEU
        from sentencepiece import SentencePieceProcessor

        self._pieces = SentencePieceProcessor()
        try:
            self._pieces.Load(str(model))
        except (RuntimeError, OSError) as error:
            raise TaskError(f"{model}: this is no SentencePiece model: {error}") from None
        # Its tokens are separated by blanks already.
        self._bleu = BLEU(tokenize="none", force=True)

    def score(self, answers: Sequence[str], references: Sequence[str]) -> float:
        """In percent, of all sentences together."""
        said, right = ([self._tokens(text) for text in texts] for texts in (answers, references))
        return float(self._bleu.corpus_score(said, [right]).score)

    def _tokens(self, text: str) -> str:
        return " ".join(self._pieces.EncodeAsPieces(text.strip()))
