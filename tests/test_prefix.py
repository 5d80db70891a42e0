"""The prefix cache: the same bytes and scores with it, whatever it holds, shares and forgets."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import EOS_ID, ModelConfig, PatchingRule
from engine.engine import Engine
from engine.memory import caches
from engine.memory.caches import CacheSpec, cache_specs
from engine.memory.prefix import BLOCK
from engine.sequence import Sequence
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
    assert not engine.memory.prefixes.root.children


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


@pytest.mark.parametrize("rows", [8, 16, 34])
def test_a_repeated_prompt_fits_where_one_sequence_does(tmp_path: Path, rows: int) -> None:
    """It goes on in a copy of a cached page, and holds both for a moment."""
    folder = save_ours(tmp_path / "model", OUR_MODELS["fast-blt"]())
    engine = make_engine(folder, max_sequences=1, max_step_rows=rows, max_length=200)
    for length in range(20, 180, 4):
        prompt = text(length, length, specials=False)
        first, again = (run(engine, [request(name, prompt, 2)])[name] for name in ("first", "again"))
        assert first.ids == again.ids


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


SALTS = [b"", b"one", b"two"]
TURNS = st.lists(
    st.tuples(st.sampled_from(SALTS), st.lists(st.sampled_from([70, 80]), min_size=1, max_size=4), st.integers(1, 64)),
    min_size=2,
    max_size=8,
)
"""Salt and prompt of some requests: the byte that each block repeats, and how long the last block is."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Engine]:
    """An engine, and one without a prefix cache."""
    folder = save_ours(tmp_path_factory.mktemp("salted") / "model", our_model(our_config(), 35))
    return make_engine(folder), make_engine(folder, prefix_cache=False)


@settings(max_examples=20)
@given(turns=TURNS)
def test_a_request_finds_exactly_what_its_own_salt_has_left(
    pair: tuple[Engine, Engine], turns: list[tuple[bytes, list[int], int]]
) -> None:
    engine, plain = pair
    left: dict[bytes, set[tuple[int, ...]]] = {}
    """Per salt the texts of whole blocks that were computed."""
    for salt, blocks, last in turns:
        prompt = [byte for block in blocks for byte in [block] * BLOCK][: (len(blocks) - 1) * BLOCK + last]
        asked = request("it", prompt, 2, cache_salt=salt)
        found, wanted = run(engine, [asked])["it"], run(plain, [asked])["it"]
        assert_same(found, wanted)
        known = left.setdefault(salt, set())
        assert cached(found) == max((len(k) for k in known if [*k] == prompt[: len(k)] != prompt), default=0)
        # The last id is not computed.
        computed = [*prompt, *found.ids[:-1]]
        known |= {tuple(computed[:end]) for end in range(BLOCK, len(computed) + 1, BLOCK)}
    assert_all_can_be_forgotten(engine)


def test_requests_of_two_salts_that_run_together_share_nothing(pair: tuple[Engine, Engine]) -> None:
    engine, plain = pair
    prompt = text(2 * BLOCK + 9, 40)
    asked = [request(f"{salt!r}", prompt, 20, cache_salt=salt) for salt in SALTS]
    (wanted,) = run(plain, [request("it", prompt, 20)]).values()
    for again in (False, True):
        for output in run(engine, asked).values():
            assert_same(output, wanted)
            assert cached(output) == 2 * BLOCK * again
    assert engine.memory.prefixes
    assert {salt for salt, _ in engine.memory.prefixes.root.children} == set(SALTS)
    assert_all_can_be_forgotten(engine)


def test_more_salts_than_the_caches_hold_prefixes_of_keep_no_more_nodes_than_fit(tmp_path: Path) -> None:
    folder = save_ours(tmp_path / "model", our_model(our_config(), 36))
    engine = crowded_engine(folder, max_length=300)
    prompt, most = text(BLOCK + 1, 41), engine.memory.caches.pools["global"].num_total
    for i in range(2 * most):
        run(engine, [request("it", prompt, 1, cache_salt=b"%d" % i)])
        assert engine.memory.prefixes
        assert len(engine.memory.prefixes.root.children) <= most
    assert_all_can_be_forgotten(engine)


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


class Poison:
    """From now on a page is NaN when it is taken and whenever it is free after a step; a slot that is dropped gets ids,
    patches and entropies that no text has."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self._caches, self._slots = engine.memory.caches, engine.memory.slots
        self._step, self._drop = engine.step, self._slots.drop
        self.taken = Counter[str]()
        """Pages per pool."""
        for name, pool in self._caches.pools.items():
            monkeypatch.setattr(pool, "take", self._take_from(name, pool.take))
        monkeypatch.setattr(engine, "step", self._poisoned_step)
        monkeypatch.setattr(self._slots, "drop", self._poisoned_drop)

    def _take_from(self, name: str, take: Callable[[int], list[int]]) -> Callable[[int], list[int]]:
        def poisoned_take(n: int) -> list[int]:
            pages = take(n)
            self.taken[name] += n
            self._spoil(name, pages)
            return pages

        return poisoned_take

    def _poisoned_step(self) -> list[Event]:
        events = self._step()
        for name, pool in self._caches.pools.items():
            self._spoil(name, pool._free)
        return events

    def _poisoned_drop(self, sequence: Sequence) -> None:
        if sequence.slot:
            at, text = self._slots.place(sequence, 0), self._slots.text
            whole = slice(at, at + self._slots._length)
            text.ids[whole], text.patch[whole], text.patch_start[whole], text.entropies[whole] = EOS_ID, 7, 7, 1e30
        self._drop(sequence)

    def _spoil(self, name: str, pages: list[int]) -> None:
        for tensor in self._caches._tensors[name]:
            tensor[pages] = torch.nan


@pytest.mark.parametrize("prefix_cache", [False, True], ids=["no-prefix-cache", "prefix-cache"])
def test_no_text_depends_on_what_a_page_or_slot_held_before(
    model: Path, prefix_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages have one latent each, so that those of a sequence are given back as soon as they are dead."""
    plain = make_engine(model, prefix_cache=False)

    def single(config: ModelConfig, page_size: int) -> dict[str, CacheSpec]:
        specs = cache_specs(config, page_size)
        return specs | {"latent": replace(specs["latent"], page_size=1)}

    monkeypatch.setattr(caches, "cache_specs", single)
    choices = {"max_sequences": 5, "max_step_rows": 48, "max_length": 300, "prefix_cache": prefix_cache}
    engine = crowded_engine(model, **choices)
    if prefix_cache:
        engine = make_engine(model, cache_bytes=4 * engine.config.cache_bytes, **choices)
    poison = Poison(engine, monkeypatch)
    requests = tangled(24, list(ways_of(engine)), random.Random(5))
    found, wanted = run(engine, requests), run(plain, requests)
    for r in requests:
        assert_same(found[r.id], wanted[r.id])
    assert all(count > engine.memory.caches.pools[name].num_total for name, count in poison.taken.items()), poison.taken
    assert any(cached(output) for output in found.values()) == prefix_cache


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
