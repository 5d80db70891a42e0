"""Which texts end in a loop, and how many of a model's do."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.config import BOS_ID, BYTE_OFFSET, EngineConfig
from engine.engine import Engine
from tests.engines import make_engine, request, run
from training import evaluate
from training.corpus import Corpus
from training.loops import LEAST_BYTES, PROMPT_BYTES, ends_in_a_loop, generate, looping, prompts

NANO = Path(__file__).parents[1] / "models" / "nano"


@given(st.binary(max_size=40), st.binary(min_size=1, max_size=30), st.integers(3, 5), st.data())
def test_a_text_that_ends_with_the_same_three_times_ends_in_a_loop(
    start: bytes, unit: bytes, times: int, data: st.DataObject
) -> None:
    times = max(times, -(-LEAST_BYTES // len(unit)))
    cut = data.draw(st.integers(0, len(unit) - 1))
    assert ends_in_a_loop(start + unit * times + unit[:cut])


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"=" * (LEAST_BYTES - 1),
        b"for name in names:\n    print(name)\n" * 2,
        b"else else else else else else else else else else else\n",
        bytes(range(200)),
    ],
)
def test_other_texts_do_not(text: bytes) -> None:
    assert not ends_in_a_loop(text)


def test_prompts_are_slices_of_documents_that_are_long_enough() -> None:
    texts = (b"short", bytes(range(256)) * 3, b"x = 1\n" * 100)
    found = prompts(Corpus(("a", "b", "c"), texts))
    assert found == prompts(Corpus(("a", "b", "c"), texts)) and len(set(found)) > 10
    assert all(len(prompt) == PROMPT_BYTES and any(prompt in text for text in texts[1:]) for prompt in found)
    assert set(prompts(Corpus(("a",), (b"short",)))) == {b"short"}


def test_texts_are_the_engines_and_the_share_counts_those_that_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [b"import os\n", b"=====", b"class A:\n    def "]
    texts = generate(NANO, asked, 24, temperature=0)
    engine = make_engine(NANO)
    for prompt, text in zip(asked, texts, strict=True):
        ids = [BOS_ID, *(byte + BYTE_OFFSET for byte in prompt)]
        assert run(engine, [request("a", ids, 24)])["a"].text == text
    found = [b"x" * 200, bytes(range(200)), b"ab" * 100, b"#"]
    monkeypatch.setattr("training.loops.generate", lambda *arguments: found)
    assert looping(NANO, Corpus(("a",), (b"a" * 300,))) == 0.5


def test_loops_are_counted_with_the_weights_that_are_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[EngineConfig] = []

    class Watched(Engine):
        def __init__(self, config: EngineConfig) -> None:
            configs.append(config)
            super().__init__(config)

    monkeypatch.setattr("training.loops.Engine", Watched)
    monkeypatch.setattr("training.loops.prompts", lambda corpus: [b"import "] * 2)
    monkeypatch.setattr("training.loops.TEXT_BYTES", 3)
    text = Corpus(("a",), (bytes(range(32, 127)) * 9,))
    monkeypatch.setattr(evaluate, "corpora", lambda path: (text, text))
    for more in ([], ["--float8"]):
        assert evaluate.main([str(NANO), "--context", "128", *more]) == 0
    assert [config.weights for config in configs] == [None, "float8"]
    found: list[object] = []
    monkeypatch.setattr(evaluate, "chosen_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(evaluate, "looping", lambda *arguments: found.append(arguments[2:]))
    assert evaluate.main([str(NANO), "--context", "128", "--device", "cuda"]) == 0
    assert found == [(None, "cuda")]
