"""Every length that a model can hold, at its edge, one below and one past, with another limit for every stage.

The tables that kernels look rows up in lie against memory that must not be touched: a kernel that reads past the end of
one, as compiled C would without a word, ends the test's process.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import checkpoint
from engine.checkpoint import load
from engine.config import EngineConfig, ModelConfig, PatchingRule
from engine.engine import Engine
from engine.entropies import Entropies
from engine.model import layers
from engine.types import Failed, Finished
from tests import reference
from tests.engines import GREEDY, make_engine, request, run, save_ours
from tests.guarded import guarded
from tests.models import hf_model, our_config, our_model, text

BYTES, PATCHES = 61, 13
LOOKED_UP = ("embed_tokens", "encoder_hash_tok_embedding")


def limited(encoder: int, decoder: int, patcher: int, global_: int) -> ModelConfig:
    """With so many positions for every stage."""
    config = our_config(decoder_input="embedding", mask_id=260, block_size=5)
    positions = {"encoder": encoder, "decoder": decoder, "patcher": patcher, "global_": global_}
    stages = {name: replace(getattr(config, name), max_positions=count) for name, count in positions.items()}
    return replace(config, **stages)


LIMITS = {
    "encoder": limited(BYTES, 90, 75, 70),
    "decoder": limited(90, BYTES, 75, 70),
    "patcher": limited(BYTES, 67, 16, 70),
    "global": limited(97, 90, 101, PATCHES),
}
"""By the stage that ends first; the patcher's end is none."""


@cache
def expected(stage: str, length: int, count: int) -> list[int]:
    """What the plain model writes after that many random ids."""
    config, tensors = our_model(LIMITS[stage], 31)
    return reference.greedy(config, tensors, text(length, count, specials=False), count)


@pytest.fixture(scope="module", params=LIMITS)
def limit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, save_ours(tmp_path_factory.mktemp(request.param), our_model(LIMITS[request.param], 31))


@pytest.fixture(scope="module")
def few_patches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ours(tmp_path_factory.mktemp("few"), our_model(LIMITS["global"], 31))


@pytest.fixture(scope="module")
def tables_guarded() -> Iterator[None]:
    """Engines that are made have their tables against forbidden memory."""

    def load_guarded(path: str, **options: Any) -> checkpoint.Checkpoint:
        found = load(path, **options)
        tensors = {n: guarded(t) if any(part in n for part in LOOKED_UP) else t for n, t in found.tensors.items()}
        return replace(found, tensors=tensors)

    def guarded_rope(*arguments: Any) -> Tensor:
        return guarded(table(*arguments))

    table = layers.rope_table
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "rope_table", guarded_rope)
        patch.setattr("engine.checkpoint.load", load_guarded)
        yield


@pytest.fixture(scope="module", params=["native", "torch"])
def start(request: pytest.FixtureRequest, tables_guarded: None) -> Callable[[Path], Engine]:
    return cache(lambda folder: make_engine(folder, kernels=request.param, max_step_rows=40))


@pytest.mark.parametrize("decoder", ["blt", "blt-s", "blt-dv", "auto", "blt-d"])
def test_texts_reach_exactly_the_last_position_of_the_shortest_stage(
    limit: tuple[str, Path], decoder: str, start: Callable[[Path], Engine]
) -> None:
    stage, folder = limit
    engine = start(folder)
    most = {"global": 90}.get(stage, BYTES)
    assert engine.limits.max_length == most
    spare = 4 if decoder == "blt-d" else 0
    for length in (most - 1, most, most + 1):
        for count in (1, 9):
            prompt = text(length - spare - count, count, specials=False)
            asked = request("a", prompt, count, decoder=decoder, sampling=GREEDY, ignore_eos=True)
            (output,) = run(engine, [asked]).values()
            if length > most:
                assert isinstance(output.end, Failed) and output.end.code == "too_long"
                assert str(most) in output.end.message
            elif stage != "global":
                assert isinstance(output.end, Finished) and output.end.reason == "length"
                assert len(output.ids) == count
                if decoder != "blt-d":
                    assert output.ids == expected(stage, len(prompt), count)
            engine.memory.caches.check_integrity()


def test_a_text_ends_at_the_maximum_number_of_patches(few_patches: Path, start: Callable[[Path], Engine]) -> None:
    found, engine = load(few_patches), start(few_patches)
    assert engine.memory.caches.max_patches == PATCHES
    prompt = text(20, 40, specials=False)
    wanted = expected("global", 20, 40)
    for decoder in ("blt", "blt-s", "blt-dv", "auto"):
        asked = request("a", prompt, 40, decoder=decoder, sampling=GREEDY, ignore_eos=True)
        (output,) = run(engine, [asked]).values()
        assert isinstance(output.end, Finished) and output.end.reason == "length"
        assert output.ids == wanted[: len(output.ids)] and len(output.ids) < 40
        whole = prompt + output.ids
        entropies = reference.entropies(found.config, found.tensors, whole)
        starts = [place for place in reference.patch_starts(found.config.patching, entropies) if place < len(whole)]
        assert PATCHES <= len(starts) <= PATCHES + 1, decoder


def test_a_prompt_may_have_as_many_patches_as_there_are_positions(
    few_patches: Path, start: Callable[[Path], Engine]
) -> None:
    found, engine = load(few_patches), start(few_patches)
    long = text(80, 3, specials=False)
    rule = found.config.patching
    starts = reference.patch_starts(rule, reference.entropies(found.config, found.tensors, long))
    # Where the patch begins that is the last one, the first too many, and the one after that.
    last, behind, further = starts[PATCHES - 1 : PATCHES + 2]
    for length in (last + 1, behind - 1, behind, behind + 1, further + 1):
        asked = request("a", long[:length], 0, prompt_logprobs=True, logprobs=0)
        (output,) = run(engine, [asked]).values()
        if length <= behind:
            assert isinstance(output.end, Finished), length
            logits = reference.forward(found.config, found.tensors, long[:length]).log_softmax(-1)
            wanted = [float(logits[at - 1, long[at]]) for at in range(1, length)]
            told = [entry.logprob for entry in output.prompt_logprobs[1:]]
            assert told == pytest.approx(wanted, abs=1e-4)
        elif length > behind + 1:
            assert isinstance(output.end, Failed) and output.end.code == "too_long"
            assert str(PATCHES) in output.end.message


def test_triton_kernels_reach_the_last_position_of_the_shortest_stage(tmp_path: Path, tables_guarded: None) -> None:
    """In the interpreter, which takes seconds for what a device does in milliseconds: as little as there can be."""
    config, tensors = our_model(limited(11, 13, 5, 14), 32)
    save_ours(tmp_path, (config, tensors))
    prompt = text(9, 1, specials=False)
    expected = reference.greedy(config, tensors, prompt, 2)
    asked = [request(name, prompt, 2, decoder=name) for name in ("blt", "blt-dv")]
    for output in run(make_engine(tmp_path, kernels="triton"), asked).values():
        assert isinstance(output.end, Finished) and output.end.reason == "length"
        assert output.ids == expected


def test_a_rope_table_shorter_than_the_caches_is_refused_at_once(
    few_patches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever made it too short: nothing would notice later."""
    table = layers.rope_table
    monkeypatch.setattr(layers, "rope_table", lambda dim, theta, count, device: table(dim, theta, 10, device))
    with pytest.raises(ValueError, match="patcher stage has 10 positions, and sequences may have"):
        make_engine(few_patches)


# The released lengths


def test_entropies_equal_hugging_faces_to_the_last_byte_of_the_released_lengths(tmp_path: Path) -> None:
    """8,192 positions of the patcher, 24,576 of encoder and decoder: as Hugging Face's, whose positions have no end.

    A patcher of two layers with a window of 40 sees 79 ids back. So Hugging Face's, whose attention over all ids at
    once would take gigabytes, is asked about pieces, at the places that they have in the text.
    """
    model = hf_model(12, max_positions=24576, patcher_positions=8192, patcher_window=40)
    model.save_pretrained(tmp_path)
    ids = text(24576, 5, specials=False)
    ours = Entropies(EngineConfig(str(tmp_path))).of(ids)
    assert load(tmp_path).config.max_length == len(ours) == 24576
    for place in (0, 8_192 - 100, 8_192, 16_000, 24_576 - 200):
        positions = torch.arange(place, place + 200)
        with torch.no_grad():
            entropies, _, _ = model.model.patcher(
                torch.tensor([ids[place : place + 200]]), position_ids=positions[None], patch_size=4, threshold=0.0
            )
        seen = 79 if place else 0
        torch.testing.assert_close(
            torch.from_numpy(ours[place + seen : place + 200].copy()), entropies[0, seen:], atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_a_cached_prefix_with_all_patches_that_fit_is_not_continued(
    kernels: str, tmp_path: Path, tables_guarded: None
) -> None:
    """The next row would close one more, and read past the table of their positions."""
    config, tensors = our_model(our_config(decoder_input="embedding", mask_id=260, block_size=5), 31)
    global_ = replace(config.global_, max_positions=64)
    config = replace(config, global_=global_, patching=PatchingRule(mode="bytes"))
    engine = make_engine(save_ours(tmp_path / "model", (config, tensors)), kernels=kernels)
    prompt = text(70, 3, specials=False)
    for ids in (prompt, prompt[:65], prompt):
        end = run(engine, [request("a", ids, 5)])["a"].end
        assert isinstance(end, Failed) and end.code == "too_long", len(ids)
    assert isinstance(run(engine, [request("a", prompt[:40], 5)])["a"].end, Finished)
