"""Entropies and patch starts of prompt and output: the oracle's, whatever decoder, step and cache they come from."""

from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import BltForCausalLM

from engine.config import EOS_ID, ModelConfig, PatchingRule
from engine.engine import Engine
from engine.memory.prefix import BLOCK
from engine.patching import Patching
from engine.types import Delta, Finished, Request, SamplingParams, UnmaskRule
from tests import reference
from tests.engines import Output, crowded_engine, make_engine, request, run, save_ours
from tests.models import HF_MODELS, OUR_MODELS, text

WAYS: dict[str, dict[str, Any]] = {
    "blt": {},
    "blt-s": {"decoder": "blt-s", "draft_length": 5},
    "blt-d": {"decoder": "blt-d", "unmask": UnmaskRule(rule="confidence", alpha=0.3)},
    "blt-dv": {"decoder": "blt-dv"},
    "auto": {"decoder": "auto"},
}
TOLERANCE = 1e-4

Oracle = Callable[[list[int]], tuple[list[float], list[int]]]
"""Entropies after all ids, and all patch starts that follow from them."""


def of_reference(config: ModelConfig, tensors: dict[str, Tensor]) -> Oracle:
    def oracle(ids: list[int]) -> tuple[list[float], list[int]]:
        entropies = reference.entropies(config, tensors, ids)
        return entropies.tolist(), reference.patch_starts(config.patching, entropies)

    return oracle


def of_transformers(model: BltForCausalLM) -> Oracle:
    def oracle(ids: list[int]) -> tuple[list[float], list[int]]:
        with torch.no_grad():
            entropies, lengths, _ = model.model.patcher(
                torch.tensor([ids]), patch_size=4, threshold=model.config.patching_threshold
            )
        return entropies[0].tolist(), [0, *lengths[0].cumsum(0)[:-1].tolist()]

    return oracle


@pytest.fixture(scope="module", params=["k2", "threshold-add", "gqa-isolated", "fast-blt"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    if request.param in HF_MODELS:
        made = HF_MODELS[request.param]()
        made.save_pretrained(folder)
        return folder, of_transformers(made)
    ours = OUR_MODELS[request.param]()
    return save_ours(folder, ours), of_reference(*ours)


@pytest.fixture(scope="module")
def fast_blt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ours(tmp_path_factory.mktemp("model") / "model", OUR_MODELS["fast-blt"]())


def asking(name: str, prompt: list[int], count: int, **fields: Any) -> Request:
    return request(name, prompt, count, patches_from=0, **fields)


def assert_told(oracle: Oracle, asked: Request, output: Output) -> None:
    """All that can be known: of every id whose row has run."""
    ids, known = [*asked.prompt_ids, *output.ids], len(output.entropies)
    if asked.decoder == "blt-d":
        assert len(asked.prompt_ids) <= known < len(ids)
    else:
        assert known == max(len(ids) - 1, len(asked.prompt_ids))
    entropies, starts = oracle(ids[:known])
    assert output.entropies == pytest.approx(entropies, abs=TOLERANCE)
    assert output.starts == starts


@pytest.mark.parametrize("rows", [5, 512])
def test_entropies_and_patch_starts_equal_the_oracles(model: tuple[Path, Oracle], rows: int) -> None:
    """For all decoders side by side, at every way to cut prompts into steps, the prompt unknown and known."""
    folder, oracle = model
    engine = make_engine(folder, max_step_rows=rows)
    prompt = [*text(BLOCK, 3), EOS_ID, *text(12, 4)]
    for part in (prompt, prompt[: BLOCK + 5]):
        requests = [
            asking(f"{way} {t}", part, 21, sampling=SamplingParams(temperature=t, seed=5), **fields)
            for way, fields in WAYS.items()
            for t in (0.0, 0.9)
            if way in engine.limits.decoders
        ]
        requests += [asking("alone", part, 0), request("unasked", part, 9)]
        found = run(engine, requests)
        for asked in requests[:-1]:
            assert_told(oracle, asked, found[asked.id])
        assert found["unasked"].entropies == found["unasked"].starts == []
    assert all(output.end.usage.cached_tokens == BLOCK for output in found.values() if isinstance(output.end, Finished))


def test_a_cached_prompt_reports_the_same_patches_as_an_uncached_one(fast_blt: Path) -> None:
    engine, plain = make_engine(fast_blt), make_engine(fast_blt, prefix_cache=False)
    shared = text(3 * BLOCK, 6)
    run(engine, [request("first", shared, 30)])
    for end in (20, 5):
        asked = asking("it", [*shared, *text(end, 7)], 40)
        found, wanted = run(engine, [asked])["it"], run(plain, [asked])["it"]
        assert isinstance(found.end, Finished) and found.end.usage.cached_tokens == 3 * BLOCK
        assert (found.ids, found.entropies, found.starts) == (wanted.ids, wanted.entropies, wanted.starts)


def test_a_preempted_request_reports_every_patch_once(fast_blt: Path) -> None:
    choices = {"max_sequences": 5, "max_step_rows": 48, "max_length": 300}
    engine, plain = crowded_engine(fast_blt, **choices), make_engine(fast_blt, prefix_cache=False)
    shared = text(2 * BLOCK, 8)
    requests = [
        asking(f"{way} {i}", [*shared[: BLOCK * i], *text(30, 40 + i)], 60, sample_index=i, **fields)
        for i in range(3)
        for way, fields in WAYS.items()
    ]
    found, wanted = run(engine, requests), run(plain, requests)
    for name, output in found.items():
        assert output.entropies == wanted[name].entropies and output.starts == wanted[name].starts
    assert engine.snapshot().preemptions


@pytest.mark.parametrize("end", ["length", "eos", "stop"])
def test_exact_decoders_report_the_patches_of_blt_wherever_a_round_is_cut(fast_blt: Path, end: str) -> None:
    engine, ahead = make_engine(fast_blt), make_engine(fast_blt, run_ahead="always")

    def ended(by: Engine, seed: int, stop: bytes = b"", **fields: Any) -> Output:
        sampling = SamplingParams(temperature=0.9, seed=seed, logit_bias={EOS_ID: 1.5 if end == "eos" else -100.0})
        asked = asking("it", text(40, 9), 60, sampling=sampling, ignore_eos=False, stop=[stop], **fields)
        return run(by, [asked])["it"]

    seed = next(seed for seed in range(99) if 15 < len(ended(engine, seed).ids) < 60 or end != "eos")
    stop = ended(engine, seed).text[40:42] if end == "stop" else b""
    wanted = ended(engine, seed, stop)
    assert isinstance(wanted.end, Finished) and wanted.end.reason == ("length" if end == "length" else "stop")
    for way in ("blt", "blt-s", "blt-dv", "auto"):
        for by in (engine, ahead):
            output = ended(by, seed, stop, **WAYS[way])
            assert (output.ids, output.entropies, output.starts) == (wanted.ids, wanted.entropies, wanted.starts)


@pytest.mark.parametrize("way", ["blt", "blt-s", "blt-d", "blt-dv"])
def test_a_resumed_request_continues_the_patches_that_the_first_engine_reported(fast_blt: Path, way: str) -> None:
    engine, asked = make_engine(fast_blt), asking("it", text(70, 10), 150, **WAYS[way])
    wanted = run(engine, [asked])["it"]
    heard = Output()
    engine.add(asked)
    while len(heard.ids) < 30:
        for event in engine.step():
            heard.take(event)
    engine.abort("it")
    resumed = asking("it", asked.prompt_ids, 150, output_ids=list(heard.ids), **WAYS[way])
    engine = make_engine(fast_blt)
    engine.add(
        Request(**{f: getattr(resumed, f) for f in resumed.__struct_fields__} | {"patches_from": len(heard.entropies)})
    )
    while engine.has_work:
        for event in engine.step():
            heard.take(event)
    assert (heard.ids, heard.entropies, heard.starts) == (wanted.ids, wanted.entropies, wanted.starts)


def test_patches_of_the_prompt_come_with_the_first_id_and_others_as_they_are_decided(fast_blt: Path) -> None:
    engine, asked = make_engine(fast_blt, max_step_rows=16), asking("it", text(100, 11), 40)
    engine.add(asked)
    known = ids = 0
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, Delta):
                known, ids = known + len(event.entropies), ids + len(event.ids)
                assert known == 100 + ids - 1


rules = st.builds(
    PatchingRule,
    threshold=st.sampled_from([0.5, 1.0]),
    threshold_add=st.none() | st.just(0.25),
    max_patch_length=st.none() | st.integers(1, 6),
)


@given(rules, st.lists(st.integers(0, 8).map(lambda n: n / 4), min_size=1, max_size=30), st.data())
def test_patch_decisions_read_in_any_pieces_add_up_to_the_whole(
    rule: PatchingRule, entropies: list[float], data: st.DataObject
) -> None:
    patching, starts = Patching(), reference.patch_starts(rule, entropies)
    patching.take(entropies, [byte + 1 in starts for byte in range(len(entropies))])
    told: tuple[list[float], list[int]] = [], []
    while len(told[0]) < len(entropies):
        begin = len(told[0])
        some, places = patching.decisions(begin, data.draw(st.integers(begin + 1, len(entropies))))
        told[0].extend(some)
        told[1].extend(places)
        assert told[1] == starts[: bisect_right(starts, len(told[0]))]
    assert told == (entropies, starts)
