"""The engine computes what Hugging Face's full forward computes, and what the plain model computes."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BltForCausalLM

from engine.checkpoint import load
from engine.config import EOS_ID, ModelConfig, PatchingRule
from engine.engine import Engine
from tests import reference
from tests.engines import engine_logits, make_engine, request, run, save_ours
from tests.models import HF_MODELS, OUR_MODELS, hf_logits, our_config, our_model, text

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=HF_MODELS)
def theirs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[BltForCausalLM, Path]:
    model = HF_MODELS[request.param]()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("chunk", [1, 37, 300])
def test_logits_equal_hugging_faces(theirs: tuple[BltForCausalLM, Path], chunk: int) -> None:
    model, folder = theirs
    ids = text(300, 7, specials=False)
    wanted = hf_logits(model, ids)
    assert 0.3 < wanted.std() < 3
    torch.testing.assert_close(engine_logits(make_engine(folder), ids, chunk), wanted, atol=TOLERANCE, rtol=0)


def test_the_plain_model_equals_hugging_faces(theirs: tuple[BltForCausalLM, Path]) -> None:
    model, folder = theirs
    checkpoint = load(folder)
    ids = text(300, 8, specials=False)
    found = reference.forward(checkpoint.config, checkpoint.tensors, ids)
    torch.testing.assert_close(found, hf_logits(model, ids), atol=TOLERANCE, rtol=0)


def test_256_greedy_bytes_equal_hugging_faces(theirs: tuple[BltForCausalLM, Path]) -> None:
    model, folder = theirs
    prompt = text(24, 9)
    found = run(make_engine(folder), [request("a", prompt, 256)])["a"].ids
    assert len(found) == 256
    assert_greedy(partial(hf_logits, model), prompt, found)


def assert_greedy(logits_of: Callable[[list[int]], Tensor], prompt: list[int], found: list[int]) -> None:
    """Each id is the most likely one behind those before it. One pass over the whole text tells that of all places; a
    pass over the text up to there, which is what generating takes, of every seventh."""
    whole = [*prompt, *found]
    places = range(len(prompt), len(whole))
    assert found == logits_of(whole)[len(prompt) - 1 : -1].argmax(-1).tolist()
    for place in places[::7]:
        assert whole[place] == logits_of(whole[:place])[-1].argmax()


@pytest.fixture(scope="module", params=OUR_MODELS)
def ours(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ours(tmp_path_factory.mktemp(request.param) / "model", OUR_MODELS[request.param]())


@pytest.fixture(params=[False, True], ids=["open", "isolated"])
def engine(request: pytest.FixtureRequest, ours: Path) -> Iterator[Engine]:
    yield make_engine(ours, isolate_documents=request.param)


def test_every_model_form_equals_the_plain_model_with_documents_isolated_or_not(engine: Engine, ours: Path) -> None:
    checkpoint = load(ours)
    config = isolated(checkpoint.config, engine)
    ids = text(260, 10)
    assert ids.count(EOS_ID) >= 3
    wanted = reference.forward(config, checkpoint.tensors, ids)
    for chunk in (1, 41, 260):
        torch.testing.assert_close(engine_logits(engine, ids, chunk), wanted, atol=TOLERANCE, rtol=0)


def test_greedy_text_of_every_model_form_equals_the_plain_models(engine: Engine, ours: Path) -> None:
    checkpoint = load(ours)
    prompt = text(60, 11)
    assert EOS_ID in prompt
    found = run(engine, [request("a", prompt, 80)])["a"].ids
    assert len(found) == 80
    config = isolated(checkpoint.config, engine)
    assert_greedy(partial(reference.forward, config, checkpoint.tensors), prompt, found)


@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize(("slots", "longest"), [(2, 1), (4, 3)])
def test_a_patch_may_have_fewer_bytes_than_slots(slots: int, longest: int, kernels: str, tmp_path: Path) -> None:
    config, tensors = our_model(our_config(slots=slots, patching=PatchingRule(max_patch_length=longest)), 28)
    ids = text(80, 3)
    logits = engine_logits(make_engine(save_ours(tmp_path, (config, tensors)), kernels=kernels), ids, 37)
    torch.testing.assert_close(logits, reference.forward(config, tensors, ids), atol=TOLERANCE, rtol=0)


def test_isolating_documents_changes_logits(tmp_path: Path) -> None:
    folder = save_ours(tmp_path / "model", OUR_MODELS["plain"]())
    ids = text(260, 10)
    alone, together = (engine_logits(make_engine(folder, isolate_documents=on), ids, 260) for on in (True, False))
    before = ids.index(EOS_ID) + 1
    assert torch.equal(alone[:before], together[:before])
    assert (alone[before:] - together[before:]).abs().max() > 0.1


def isolated(config: ModelConfig, engine: Engine) -> ModelConfig:
    """The configuration as the engine was told to run it."""
    assert engine.config.isolate_documents is not None
    return replace(config, isolate_documents=engine.config.isolate_documents)
