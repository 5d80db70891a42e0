"""A sequence that fails, fails alone: the batch goes on with the same bytes."""

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import Policy
from engine.output import Output
from engine.types import Failed, Finished, Request, SamplingParams
from tests import reference
from tests.engines import make_engine, request, run, save_ours
from tests.models import our_config, our_model, text
from tests.test_one_call import stages_apart

CONFIG, TENSORS = our_model(our_config(decoder_input="embedding", mask_id=260, block_size=6), 5)
POISON = text(40, 3, specials=False)
WELL = [text(7, 1, specials=False), text(40, 2, specials=False), text(25, 4, specials=False)]
TABLE = 2
"""Of the longest n-grams."""


def asked(decoder: str, prompts: Seq[list[int]] = WELL, **fields: Any) -> list[Request]:
    samplings = [SamplingParams(temperature=0), SamplingParams(seed=3), SamplingParams(frequency_penalty=0.3, seed=4)]
    return [
        request(str(n), prompt, 30, decoder=decoder, sampling=samplings[n % 3], **fields)
        for n, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[int]]]:
    """The ids of each decoder, where nothing is wrong."""
    engine = make_engine(save_ours(tmp_path_factory.mktemp("sound") / "model", (CONFIG, TENSORS)))
    return {
        decoder: {name: out.ids for name, out in run(engine, asked(decoder)).items()}
        for decoder in engine.limits.decoders
    }


@pytest.fixture(scope="module")
def model(sound: dict[str, dict[str, list[int]]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A number of a hash table is NaN: in a row that the poisoned prompt reads, and none of the others' texts."""
    read = {
        row
        for outputs in sound.values()
        for name, ids in outputs.items()
        for row in reference.hash_rows(CONFIG, [*WELL[int(name)], *ids])[TABLE]
    }
    row = next(row for row in reference.hash_rows(CONFIG, POISON)[TABLE] if row not in read)
    name = f"model.encoder_hash_tok_embedding.{TABLE}.weight"
    broken = TENSORS[name].clone()
    broken[row, 0] = torch.nan
    return save_ours(tmp_path_factory.mktemp("broken") / "model", (CONFIG, TENSORS | {name: broken}))


@pytest.mark.parametrize("policy", ["always", "never"])
@pytest.mark.parametrize("way", ["one_call", "stages", "torch"])
def test_a_sequence_without_a_distribution_fails_alone(
    model: Path, sound: dict[str, dict[str, list[int]]], policy: Policy, way: str
) -> None:
    """Also where others get its pages after it, with what it left there."""
    engine = make_engine(model, kernels="torch" if way == "torch" else None)
    if way == "stages":
        stages_apart(engine)
    engine.stepper.ahead.policy = policy
    # A draft that is rejected may read that row; in torch's products it spoils those before it in its tile.
    decoders = [name for name in engine.limits.decoders if (way, name) != ("torch", "blt-s")]
    for decoder in decoders:
        for fields in ({}, {"logprobs": 1}):
            poisoned = asked(decoder, [*WELL, POISON], **fields)
            for _ in range(2):
                found = run(engine, poisoned)
                end = found.pop("3").end
                assert isinstance(end, Failed) and end.code == "internal" and "distribution" in end.message
                assert {name: out.ids for name, out in found.items()} == sound[decoder], decoder
                assert all(isinstance(out.end, Finished) for out in found.values())


def test_a_sequence_whose_own_part_of_a_step_raises_fails_alone(
    model: Path, sound: dict[str, dict[str, list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, take = make_engine(model), Output.take
    victim = request("victim", text(9, 7, specials=False), 150)

    def fail(self: Output, ids: list[int]) -> Any:
        if self._request.id == "victim" and self._num_ids > 4:
            raise ValueError("planted")
        return take(self, ids)

    monkeypatch.setattr(Output, "take", fail)
    found = run(engine, [*asked("blt-s"), victim])
    end = found.pop("victim").end
    assert isinstance(end, Failed) and (end.code, end.message) == ("internal", "the engine failed on this request")
    assert {name: out.ids for name, out in found.items()} == sound["blt-s"]


@pytest.mark.parametrize("words", ["", "DefaultCPUAllocator: can't allocate memory", "CUDA out of memory. Tried"])
def test_memory_that_a_step_lacks_is_not_the_fault_of_a_request(
    model: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    """A new engine must continue all of them."""
    engine, error = make_engine(model), RuntimeError(words) if words else MemoryError()
    for request_ in asked("blt-s"):
        engine.add(request_)

    def fail(*_: object) -> Any:
        raise error

    monkeypatch.setattr(Output, "take", fail)
    with pytest.raises(type(error), match=words or None):
        while engine.has_work:
            engine.step()


def test_memory_that_a_grammar_lacks_does_not_refuse_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(grammar: str) -> Any:
        raise MemoryError(grammar)

    monkeypatch.setattr("engine.grammars.compiled", fail)
    engine = make_engine(model)
    engine.add(request("0", WELL[0], 30, grammar='{"grammars": [{"json_schema": {}}]}'))
    with pytest.raises(MemoryError):
        while engine.has_work:
            engine.step()
