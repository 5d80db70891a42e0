"""A tokenizer with the server's ids, for programs that count tokens themselves."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from engine.config import BOS_ID, BYTE_OFFSET, EOS_ID, PAD_ID, SPECIAL_NAMES

BEGIN = SPECIAL_NAMES[BOS_ID]


def save_tokenizer(folder: Path) -> Path:
    """Writes it for `AutoTokenizer`. Begin-of-sequence comes first where special tokens are asked for."""
    ids = {name: number for number, name in SPECIAL_NAMES.items()}
    ids |= {name: byte + BYTE_OFFSET for byte, name in enumerate(_byte_names())}
    bytewise = Tokenizer(models.BPE(vocab=ids, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, BOS_ID)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=bytewise,
        bos_token=BEGIN,
        eos_token=SPECIAL_NAMES[EOS_ID],
        pad_token=SPECIAL_NAMES[PAD_ID],
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
    return folder


def _byte_names() -> list[str]:
    """The character that stands for each byte: its own where that is visible, else the next one from 256 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unseen = iter(range(256, 512))
    return [chr(byte if byte in visible else next(unseen)) for byte in range(256)]
