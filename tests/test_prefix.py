"""The prefix cache: the same bytes and scores with it, whatever it holds, shares and forgets."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EOS_ID, ModelConfig, PatchingRule
from engine.engine import Engine
from engine.memory import caches
from engine.memory.caches import CacheSpec, cache_specs
from engine.memory.prefix import BLOCK
from engine.types import Event, Finished, Request, SamplingParams, UnmaskRule
from tests import reference
from tests.engines import Output, crowded_engine, make_engine, request, run, save_ours
from tests.models import HF_MODELS, OUR_MODELS, our_config, our_model, text

WAYS: dict[str, dict[str, Any]] = {
    "blt": {},
    "blt-s": {"decoder": "blt-s", "draft_length": 5},
    "blt-d": {"decoder": "blt-d", "unmask": UnmaskRule(rule="confidence", alpha=0.3)},
    "blt-dv": {"decoder": "blt-dv", "unmask": UnmaskRule(rule="one_step")},
    "auto": {"decoder": "auto"},
}


@pytest.fixture(
    scope="module", params=["k2", "windows-16-12", "fast-blt", "gqa-isolated", "bytes-long-patches", "no-window"]
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    name = request.param
    folder = tmp_path_factory.mktemp(name) / "model"
    if name in HF_MODELS:
        HF_MODELS[name]().save_pretrained(folder)
    elif name in OUR_MODELS:
        save_ours(folder, OUR_MODELS[name]())
    elif name == "no-window":
        config, tensors = our_model(our_config(), 31)
        stacks = {s: replace(getattr(config, s), window=None) for s in ("encoder", "decoder", "patcher")}
        save_ours(folder, (replace(config, **stacks), tensors))
    else:
        config, tensors = our_model(our_config(), 30)
        save_ours(folder, (replace(config, patching=PatchingRule(threshold=9.0, max_patch_length=50)), tensors))
    yield folder


def assert_same(found: Output, wanted: Output) -> None:
    assert (found.ids, found.text, found.logprobs) == (wanted.ids, wanted.text, wanted.logprobs)


def cached(output: Output) -> int:
    assert isinstance(output.end, Finished)
    return output.end.usage.cached_tokens


def ways_of(engine: Engine) -> dict[str, dict[str, Any]]:
    return {way: fields for way, fields in WAYS.items() if way in engine.limits.decoders}


def assert_all_can_be_forgotten(engine: Engine) -> None:
    assert engine.memory.prefixes
    while engine.memory.prefixes.forget():
        engine.memory.caches.check_integrity()
    assert all(pool.num_free == pool.num_total for pool in engine.memory.caches.pools.values())


@pytest.mark.parametrize("threshold", [-1.0, 4.5, 99.0])
def test_cached_patches_follow_the_given_patching_threshold(tmp_path: Path, threshold: float) -> None:
    config, tensors = OUR_MODELS["fast-blt"]()
    save_ours(tmp_path, (config, tensors))
    config = replace(config, patching=replace(config.patching, threshold=threshold))
    engine = make_engine(tmp_path, patching_threshold=threshold)
    prompt = text(3 * BLOCK + 20, 1)
    outputs = [run(engine, [request("a", prompt, 20, trace=True)])["a"] for _ in range(2)]
    assert cached(outputs[0]) == 0 < cached(outputs[1])
    whole = prompt + reference.greedy(config, tensors, prompt, 20)
    starts = reference.patch_starts(config.patching, reference.entropies(config, tensors, whole))
    for output in outputs:
        assert output.ids == whole[len(prompt) :]
        told = [start + len(prompt) for start in output.patch_starts]
        assert told == [start for start in starts if len(prompt) <= start <= max(told, default=0)]


def test_a_cached_prefix_changes_only_the_rows_computed(model: Path) -> None:
    shared = text(3 * BLOCK + 20, 1)
    plain = make_engine(model, prefix_cache=False, max_step_rows=100)
    engine = make_engine(model, max_step_rows=100)
    run(engine, [request("first", [*shared, *text(50, 2)], 30)])
    for way, fields in ways_of(engine).items():
        for temperature in (0.0, 0.9):
            sampling = SamplingParams(temperature=temperature, seed=3)
            scored = request(way, [*shared, *text(30, 4)], 70, sampling=sampling, logprobs=1, **fields)
            rows = engine.snapshot().prompt_rows
            found, wanted = run(engine, [scored])[way], run(plain, [scored])[way]
            assert_same(found, wanted)
            assert cached(wanted) == 0
            assert cached(found) == 3 * BLOCK
            assert engine.snapshot().prompt_rows - rows == len(scored.prompt_ids) - 3 * BLOCK
    assert engine.snapshot().cached_rows == 3 * BLOCK * 2 * len(ways_of(engine))
    assert_all_can_be_forgotten(engine)


def test_generated_text_is_cached_as_a_prefix(model: Path) -> None:
    """The next turn of a conversation, whatever decoder wrote the last one."""
    engine = make_engine(model)
    for seed, (way, fields) in enumerate(ways_of(engine).items()):
        prompt = text(40, 50 + seed)
        ids = run(engine, [request("turn", prompt, 150, **fields)])["turn"].ids
        next_turn = request("next", [*prompt, *ids, *text(9, seed)], 40, logprobs=0)
        found = run(engine, [next_turn])["next"]
        assert cached(found) >= 190 - 190 % BLOCK - BLOCK * (way == "blt-d")
        assert_same(found, run(make_engine(model, prefix_cache=False), [next_turn])["next"])


def test_a_repeated_prompt_computes_at_least_one_row(model: Path) -> None:
    engine = make_engine(model)
    again = request("it", text(2 * BLOCK, 5), 20)
    first, second = run(engine, [again])["it"], run(engine, [again])["it"]
    assert_same(second, first)
    assert cached(second) == BLOCK
    longer = request("it", [*again.prompt_ids, 70], 20)
    assert cached(run(engine, [longer])["it"]) == 2 * BLOCK


@pytest.mark.parametrize(
    "rule",
    [PatchingRule(monotonic=True), PatchingRule(threshold_add=0.1, max_patch_length=6)],
    ids=["monotonic", "threshold-add"],
)
def test_a_cached_prefix_gives_the_same_ids_with_rules_by_entropy_rise(tmp_path: Path, rule: PatchingRule) -> None:
    """Meta's rules: the first decision after a prefix compares with the entropy of its last byte, whose row does not
    run again."""
    folder = save_ours(tmp_path / "model", our_model(our_config(patching=rule), 34))
    engine = make_engine(folder)
    # Each has a prefix of its own, of one block or two.
    requests = [request(f"{i}", text((1 + i % 2) * BLOCK + 1 + i % 3, 60 + i), 16) for i in range(48)]
    wanted = run(make_engine(folder, prefix_cache=False), requests)
    run(engine, requests)
    found = run(engine, requests)
    assert all(cached(output) == (1 + int(name) % 2) * BLOCK for name, output in found.items())
    assert {name: output.ids for name, output in found.items()} == {name: output.ids for name, output in wanted.items()}


def test_a_scored_prompt_is_not_read_from_the_prefix_cache(model: Path) -> None:
    engine = make_engine(model)
    plain = request("it", text(2 * BLOCK + 9, 6), 20)
    run(engine, [plain])
    scored = request("it", plain.prompt_ids, 20, prompt_logprobs=True, logprobs=1)
    found = run(engine, [scored])["it"]
    assert cached(found) == 0
    assert_same(found, run(make_engine(model, prefix_cache=False), [scored])["it"])


def tangled(count: int, decoders: list[str], draw: random.Random) -> list[Request]:
    """Requests whose prompts branch off each other at odd places, some with ends of sequence in them."""
    prompts = [text(20, 0)]
    requests = []
    for i in range(count):
        base = draw.choice(prompts)
        prompt = [*base[: draw.randrange(1, len(base) + 1)], *text(draw.randrange(1, 120), i)]
        if draw.random() < 0.3:
            prompt[draw.randrange(len(prompt))] = EOS_ID
        prompts.append(prompt := prompt[:230])
        fields = WAYS[draw.choice(decoders)]
        sampling = SamplingParams(temperature=draw.choice([0, 0.8]), seed=i)
        count = draw.randrange(1, 50)
        requests.append(request(f"{i}", prompt, count, sampling=sampling, priority=draw.randrange(2), **fields))
    return requests


@pytest.mark.parametrize("room", [1, 4])
def test_the_prefix_cache_changes_no_text_of_a_crowd_with_little_memory(model: Path, room: int) -> None:
    """Prefixes come and go while sequences share, wait, are preempted and aborted."""
    draw = random.Random(room)
    choices = {"max_sequences": 5, "max_step_rows": 48, "max_length": 300}
    least = crowded_engine(model, **choices)
    engine = make_engine(model, cache_bytes=room * least.config.cache_bytes, **choices)
    plain = make_engine(model, prefix_cache=False)
    hits = 0
    for _ in range(3):
        requests = tangled(12, list(ways_of(engine)), draw)
        found, wanted = run(engine, requests), run(plain, requests)
        for r in requests:
            assert_same(found[r.id], wanted[r.id])
            hits += cached(found[r.id])
        engine.memory.caches.check_integrity()
    assert engine.snapshot().preemptions > 0 if room == 1 else hits > 0
    for r in tangled(8, list(ways_of(engine)), draw):
        engine.add(r)
    for i in range(8):
        engine.step()
        engine.abort(str(i))
    while engine.has_work:
        engine.step()
    assert not any(pool.used for pool in engine.snapshot().pools.values())
    assert_all_can_be_forgotten(engine)


@pytest.mark.parametrize("prefix_cache", [False, True], ids=["no-prefix-cache", "prefix-cache"])
def test_no_row_reads_a_latent_that_its_sequence_has_freed(
    model: Path, prefix_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages have one latent each, and those of free pages are NaN."""
    plain = make_engine(model, prefix_cache=False)

    def single(config: ModelConfig, page_size: int) -> dict[str, CacheSpec]:
        specs = cache_specs(config, page_size)
        return specs | {"latent": replace(specs["latent"], page_size=1)}

    monkeypatch.setattr(caches, "cache_specs", single)
    choices = {"max_sequences": 5, "max_step_rows": 48, "max_length": 300, "prefix_cache": prefix_cache}
    engine = crowded_engine(model, **choices)
    step, pool = engine.step, engine.memory.caches.pools["latent"]

    def spoil() -> list[Event]:
        events = step()
        for keys_and_values in engine.memory.caches.latent:
            for tensor in keys_and_values:
                tensor[pool._free] = torch.nan
        return events

    engine.step = spoil  # type: ignore[method-assign]
    requests = tangled(24, list(ways_of(engine)), random.Random(5))
    found, wanted = run(engine, requests), run(plain, requests)
    for r in requests:
        assert_same(found[r.id], wanted[r.id])


def test_the_least_recently_used_prefix_is_evicted_first(tmp_path: Path) -> None:
    folder = save_ours(tmp_path / "model", our_model(our_config(), 32))
    engine = make_engine(folder)
    old, new = text(2 * BLOCK + 1, 7), text(2 * BLOCK + 1, 8)
    for name, prompt in (("old", old), ("new", new), ("old again", old)):
        run(engine, [request(name, prompt, 1)])
    assert engine.memory.prefixes
    # The first halves are only passed through; "new" goes whole before the end of "old" does.
    assert all(engine.memory.prefixes.forget() for _ in range(3))
    assert cached(run(engine, [request("old", old, 1)])["old"]) == 2 * BLOCK
    assert cached(run(engine, [request("new", new, 1)])["new"]) == 0


def test_the_end_of_a_long_shared_prefix_is_evicted_last(tmp_path: Path) -> None:
    """Windows that end inside a long prompt go first; its end, and all that it needs, serves on."""
    folder = save_ours(tmp_path / "model", our_model(our_config(), 33))
    engine, plain = make_engine(folder), make_engine(folder, prefix_cache=False)
    shared = text(6 * BLOCK, 9)
    for i in range(3):
        run(engine, [request("it", [*shared, *text(2 * BLOCK, 20 + i)], 1)])
    assert engine.memory.prefixes
    # Five inner nodes of the shared part, then two of each of the first two endings.
    for _ in range(5 + 4):
        assert engine.memory.prefixes.forget()
        engine.memory.caches.check_integrity()
    again = request("it", [*shared, *text(30, 30)], 20)
    found = run(engine, [again])["it"]
    assert cached(found) == 6 * BLOCK
    assert_same(found, run(plain, [again])["it"])
    # Where a text leaves the shared part inside, what it computes anew fills the hollow nodes.
    early = request("it", [*shared[: 3 * BLOCK + 5], *text(30, 31)], 20)
    assert cached(run(engine, [early])["it"]) == 0
    found = run(engine, [early])["it"]
    assert cached(found) == 3 * BLOCK
    assert_same(found, run(plain, [early])["it"])
    assert_all_can_be_forgotten(engine)
