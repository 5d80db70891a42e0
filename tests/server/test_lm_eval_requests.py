"""The requests of lm-eval's `local-completions` without a tokenizer, against the plain model (tests/reference.py).

They are written anew from its source; tests/ops/test_lm_eval.py runs lm-eval itself.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import httpx
import pytest

from engine.checkpoint import PRESETS, calibrated, random_tensors
from engine.config import BOS_ID, BYTE_OFFSET
from tests import reference
from tests.serving import RunningServer

CLOSE = 1e-4
BATCH = 3
PAIRS = [("def f(", "x):"), ("Question: né? ", "はい"), ("a", " b </s>"), ("", "import os")]
TEXTS = ["Once upon a time\nthere was a byte.", "naïve", "a <s> b"]
Plain = Callable[[Sequence[int], Sequence[int]], tuple[float, bool]]


def ids(text: str) -> list[int]:
    return [byte + BYTE_OFFSET for byte in text.encode()]


@pytest.fixture(scope="module")
def plain() -> Plain:
    """Scores a continuation by a full forward pass of the server's model: its log-probability, and whether each of its
    ids is the likeliest."""
    tensors = random_tensors(PRESETS["tiny"], seed=1)
    config = calibrated(PRESETS["tiny"], tensors)

    def score(context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        rows = reference.forward(config, tensors, [*context, *continuation])[len(context) - 1 : -1].log_softmax(-1)
        own = [float(row[token]) for row, token in zip(rows, continuation, strict=True)]
        return sum(own), rows.argmax(-1).tolist() == list(continuation)

    return score


class Asked(NamedTuple):
    context: list[int]
    continuation: list[int]


class Evaluator:
    """What lm-eval does with the tokens."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        told = http.get("/tokenizer_info").json()
        assert self.encode("test") and "eos_token" in told
        self.prefix, self.end = (self.encode(told[f"{kind}_token"])[0] for kind in ("bos", "eos"))

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = self.answer("/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]
        return tokens

    def pair(self, context: str, continuation: str) -> Asked:
        if not context:
            return Asked([self.prefix], self.encode(continuation))
        spaces = len(context) - len(context.rstrip())
        context, whole = context[: len(context) - spaces], context + continuation
        before = self.encode(context)
        return Asked(before, self.encode(whole)[len(before) :])

    def windows(self, text: str, most: int) -> Iterator[Asked]:
        """The pieces in which a long text is scored: the first after the prefix, the others after text of their own."""
        tokens = self.encode(text)
        yield Asked([self.prefix], tokens[:most])
        for begin in range(most, len(tokens), most):
            end = min(begin + most, len(tokens))
            yield Asked(tokens[end - most - 1 : begin], tokens[begin:end])

    def scores(self, asked: Sequence[Asked], max_tokens: int = 1) -> list[tuple[float, bool]]:
        """max_tokens: lm-eval generates one id, which it leaves out."""
        found: list[tuple[float, bool]] = []
        for at in range(0, len(asked), BATCH):
            batch = asked[at : at + BATCH]
            fields = {"temperature": 0, "max_tokens": max_tokens, "logprobs": 1, "seed": 1234, "echo": True}
            prompts = [[*part.context, *part.continuation] for part in batch]
            answer = self.answer("/v1/completions", {"model": "tiny", "prompt": prompts, **fields})
            for part, choice in zip(batch, sorted(answer["choices"], key=lambda c: c["index"]), strict=True):
                told = choice["logprobs"]
                own, tops = (
                    told[name][len(part.context) : -1 if max_tokens else None]
                    for name in ("token_logprobs", "top_logprobs")
                )
                assert len(own) == len(part.continuation)
                found.append((sum(own), all(p == max(top.values()) for p, top in zip(own, tops, strict=True))))
        return found

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self._http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        told: dict[str, Any] = answer.json()
        return told


@pytest.fixture(scope="module")
def evaluator(server: RunningServer) -> Iterator[Evaluator]:
    with server.client() as http:
        yield Evaluator(http)


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_loglikelihoods_are_those_of_the_plain_model(evaluator: Evaluator, plain: Plain, max_tokens: int) -> None:
    # The byte that the model itself would take next is greedy.
    with_greedy = [*PAIRS, ("def f(", likeliest(plain, ids("def f(")))]
    asked = [evaluator.pair(context, continuation) for context, continuation in with_greedy]
    assert [part.context + part.continuation for part in asked[:2]] == [ids("def f(x):"), ids("Question: né? はい")]
    assert asked[3] == Asked([BOS_ID], ids("import os"))
    expected = [plain(part.context, part.continuation) for part in asked]
    found = evaluator.scores(asked, max_tokens)
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=CLOSE)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected] == [False] * 4 + [True]


def likeliest(plain: Plain, context: list[int]) -> str:
    """The one ASCII byte that the model may take next, which the server's model here does."""
    return next(chr(byte) for byte in range(128) if plain(context, [byte + BYTE_OFFSET])[1])


@pytest.mark.parametrize("most", [2046, 7])
def test_rolling_loglikelihoods_are_those_of_the_plain_model(evaluator: Evaluator, plain: Plain, most: int) -> None:
    for text in TEXTS:
        windows = list(evaluator.windows(text, most))
        assert [token for part in windows for token in part.continuation] == ids(text)
        total = sum(score for score, _ in evaluator.scores(windows))
        assert total == pytest.approx(sum(plain(*part)[0] for part in windows), abs=CLOSE)
        if most > len(ids(text)):
            assert total == pytest.approx(plain([BOS_ID], ids(text))[0], abs=CLOSE)


def test_the_stop_strings_of_humaneval_are_taken(evaluator: Evaluator) -> None:
    ends = ["\nclass", "\ndef", "\n#", "\nif", "\nprint", "</s>"]
    fields = {"max_tokens": 64, "temperature": 0, "stop": ends, "seed": 1234}
    answer = evaluator.answer("/v1/completions", {"model": "tiny", "prompt": [evaluator.encode("def f(")], **fields})
    assert not any(end in answer["choices"][0]["text"] for end in ends)


def test_the_prefix_is_begin_of_sequence(evaluator: Evaluator) -> None:
    assert (evaluator.prefix, evaluator.end) == (1, 2)
