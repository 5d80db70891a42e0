"""The decoders' promises: exact ones give blt's bytes, block diffusion gives algorithm 1's, nothing rejected stays."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.checkpoint import load
from engine.config import EOS_ID, HashConfig, PatchingRule, Policy
from engine.decoders import Decoder, Round, SequenceView
from engine.decoders.phrases import verify
from engine.engine import Engine
from engine.sequence import Sequence
from engine.types import MAX_DRAFT, Finished, Request, SamplingParams, UnmaskRule
from tests import reference
from tests.engines import Output, crowded_engine, make_engine, request, run, save_ours, usage
from tests.models import HF_MODELS, our_config, our_model, text

NEAR_TIE = 1e-5
"""Nats, or probability."""
NANO = Path(__file__).parents[1] / "models" / "nano"

RULES = {
    "one-step": UnmaskRule(rule="one_step"),
    "confidence-0.3": UnmaskRule(rule="confidence", alpha=0.3),
    "confidence-0.7": UnmaskRule(rule="confidence", alpha=0.7),
    "entropy-1.5": UnmaskRule(rule="entropy", gamma=1.5),
    "entropy-0.8-minus-max": UnmaskRule(rule="entropy", gamma=0.8, minus_max=True),
}
DRAFTS = [{"decoder": "blt-s", "draft_length": k} for k in (1, 4, 8, 16)]
BLOCKS = [{"decoder": "blt-dv", "block_size": size, "unmask": rule} for size in (4, 8) for rule in RULES.values()]
AUTO = [{"decoder": "auto"}]
EXACT: list[dict[str, Any]] = [*DRAFTS, *BLOCKS, *AUTO]

DIFFUSION_MODELS = ["fast-blt", "isolated-without-windows", "nano"]
MODELS = [*DIFFUSION_MODELS, "released-form"]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    fast = {"decoder_input": "embedding", "mask_id": 260, "block_size": 8}
    match request.param:
        case "nano":
            return NANO
        case "released-form":
            HF_MODELS["windows-16-12"]().save_pretrained(folder)
            return folder
        case "fast-blt":
            return save_ours(folder, our_model(our_config(patching=PatchingRule(max_patch_length=6), **fast), 41))
        case _:
            rule = PatchingRule(monotonic=True, max_patch_length=9)
            form = our_config(
                patching=rule, window=None, patcher_window=None, kv_heads=2, isolate_documents=True, slots=4, **fast
            )
            return save_ours(folder, our_model(form, 42))


def settings_of(engine: Engine) -> list[dict[str, Any]]:
    return EXACT if engine.model_config.mask_id is not None else [*DRAFTS, *AUTO]


def prompts(count: int, model: Path) -> list[list[int]]:
    """Random ids of many lengths, and for the trained model beginnings of this file."""
    if model != NANO:
        return [text(1 + i * 7 % 40, 500 + i) for i in range(count)]
    source, draw = Path(__file__).read_bytes(), random.Random(1)
    starts = [draw.randrange(len(source) - 60) for _ in range(count)]
    return [[1, *(byte + 4 for byte in source[s : s + 10 + i % 50])] for i, s in enumerate(starts)]


def options(i: int, count: int) -> dict[str, Any]:
    """Of the i-th prompt: half greedy, some with penalties, some that stop at an end-of-sequence id made likely."""
    sampling = SamplingParams(
        temperature=(0, 0, 0.7, 1.0)[i % 4],
        top_p=0.95 if i % 8 == 3 else 1.0,
        frequency_penalty=0.5 if i % 5 == 0 else 0.0,
        logit_bias={EOS_ID: 4.0} if i % 3 == 0 else {},
        seed=i,
    )
    return {"sampling": sampling, "ignore_eos": i % 6 == 0, "max_tokens": count}


def requests(ps: list[list[int]], tag: str, count: int, stops: dict[int, bytes], **how: Any) -> list[Request]:
    return [
        Request(id=f"{tag}{i}", prompt_ids=p, stop=[stops[i]] if i in stops else [], **options(i, count), **how)
        for i, p in enumerate(ps)
    ]


def assert_same(found: Output, wanted: Output) -> None:
    assert isinstance(found.end, Finished) and isinstance(wanted.end, Finished)
    assert (found.ids, found.text, found.end.reason) == (wanted.ids, wanted.text, wanted.end.reason)


def some_stops(outputs: dict[str, Output]) -> dict[int, bytes]:
    """Two bytes that a text says late, for a quarter of the texts."""
    return {i: out.text[-4:-2] for i, out in enumerate(outputs.values()) if i % 4 == 1 and len(out.text) > 6}


COUNT = 24


@pytest.fixture(scope="module")
def blts(model: Path) -> Callable[[int], tuple[dict[int, bytes], dict[str, Output]]]:
    """The stop strings of that many prompts, and what blt says to them: the same however an engine cuts its steps."""

    @cache
    def said(num_prompts: int) -> tuple[dict[int, bytes], dict[str, Output]]:
        engine, ps = make_engine(model, max_sequences=48), prompts(num_prompts, model)
        stops = some_stops(run(engine, requests(ps, "", COUNT, {})))
        return stops, run(engine, requests(ps, "", COUNT, stops))

    return said


@pytest.mark.parametrize("num_prompts", [16, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("choices", [{}, {"max_step_rows": 23}], ids=["wide", "narrow"])
def test_exact_decoders_equal_blt_in_mixed_batches(
    model: Path, choices: dict[str, Any], num_prompts: int, blts: Callable[[int], Any]
) -> None:
    ps = prompts(num_prompts, model)
    stops, wanted = blts(num_prompts)
    engine = make_engine(model, max_sequences=48, **choices)
    reasons = [out.end.reason for out in wanted.values() if isinstance(out.end, Finished)]
    assert min(reasons.count("stop"), reasons.count("length")) >= num_prompts // 8
    batch = [r for n, how in enumerate(settings_of(engine)) for r in requests(ps, f"{n}-", COUNT, stops, **how)]
    batch += requests(ps[:40], "blt-", COUNT, stops)
    if engine.model_config.mask_id is not None:
        batch += requests(ps[:40], "d-", COUNT, stops, decoder="blt-d")
    random.Random(0).shuffle(batch)
    if choices and num_prompts == 16:
        # Steps of few rows are many: of these pairs of prompt and setting, which the wide run has all, a third.
        batch = batch[: len(batch) // 3]
        assert {r.id.split("-")[0] for r in batch} >= {str(n) for n in range(len(settings_of(engine)))} | {"blt"}
    for name, out in run(engine, batch).items():
        if not name.startswith("d-"):
            assert_same(out, wanted[name.split("-")[1]])


def test_exact_decoders_equal_blt_when_pages_run_out(model: Path) -> None:
    count = 40
    ps = prompts(20, model)
    wanted = run(make_engine(model), requests(ps, "", count, {}))
    engine = crowded_engine(model, max_sequences=12, max_step_rows=64, max_length=160)
    how = settings_of(engine)
    batch = [Request(id=str(i), prompt_ids=p, **options(i, count), **how[i % len(how)]) for i, p in enumerate(ps)]
    found = run(engine, batch)
    assert engine.snapshot().preemptions > 0
    for name, out in found.items():
        assert_same(out, wanted[name])


def test_scores_of_exact_decoders_equal_blts(model: Path) -> None:
    ps = prompts(6, model)
    engine = make_engine(model)
    wanted = run(engine, requests(ps, "", 30, {}, logprobs=2))
    hows = enumerate(settings_of(engine))
    batch = [r for n, how in hows for r in requests(ps, f"{n}-", 30, {}, logprobs=2, **how)]
    for name, out in run(engine, batch).items():
        assert_same(out, wanted[name.split("-")[1]])
        assert out.logprobs == wanted[name.split("-")[1]].logprobs


class Foretold(Decoder):
    """Lets the model verify a given text, from the first round on: rows of the prompt run with the drafts."""

    def __init__(self, text: list[int]) -> None:
        self._text = text

    def round(self, sequence: SequenceView, room: int) -> Round:
        begin = sequence.request.max_tokens - sequence.tokens_left
        drafts = self._text[begin : begin + min(4, sequence.tokens_left - 1)]
        return (yield from verify(drafts, exact=0))


@pytest.mark.parametrize("budget", [512, 17])
def test_drafts_verified_with_the_end_of_a_prompt_see_all_of_it(tmp_path: Path, budget: int) -> None:
    """Its rows have not run as drafts do, so the decoder skips none of them, however long the open patch is."""
    config, tensors = our_model(our_config(), 5)
    folder = save_ours(tmp_path / "model", (replace(config, patching=PatchingRule(threshold=99.0)), tensors))
    asked = request("a", text(40, 2), 12)
    wanted = run(make_engine(folder), [asked])["a"].ids
    engine = make_engine(folder, max_step_rows=budget)
    engine.add(asked, Foretold(wanted))
    output = Output()
    while engine.has_work:
        for event in engine.step():
            output.take(event)
    assert output.ids == wanted
    assert usage(output).accepted == usage(output).drafted > 0


def test_a_step_of_any_batch_calls_every_stage_at_most_once(model: Path) -> None:
    engine = make_engine(model, cache_bytes=128 << 20, run_ahead="never")
    how = [*settings_of(engine), {"decoder": "blt"}, *([{"decoder": "blt-d"}] if engine.model_config.mask_id else [])]
    for i, p in enumerate(prompts(2 * len(how), model)):
        engine.add(request(str(i), p, 30, **how[i % len(how)]))
    before = dict.fromkeys(engine.ledger.total.calls, 0)
    most = 0
    while engine.has_work:
        engine.step()
        calls = dict(engine.ledger.total.calls)
        new = {stage: calls[stage] - before[stage] for stage in calls}
        decoder = new.pop("decoder")
        assert all(count <= 1 for count in new.values())
        # Only where all that run draft, or unmask, may passes follow each other within a step.
        assert decoder <= 1 or not any(new.values())
        before = calls
        most = max(most, len(engine.running))
    assert most == 2 * len(how)


def test_a_round_reads_the_global_weights_at_most_once(model: Path) -> None:
    engine = make_engine(model)
    for how in [
        {"decoder": "blt-s", "draft_length": 8},
        *([{"decoder": "blt-dv"}] if engine.model_config.mask_id else []),
    ]:
        out = run(engine, [request("a", prompts(3, model)[2], 120, **how)])["a"]
        assert isinstance(out.end, Finished)
        usage = out.end.usage
        assert usage.global_calls <= usage.rounds
        assert usage.rounds < 120
        assert usage.accepted + usage.rounds >= usage.completion_tokens


# Block diffusion against algorithm 1.


def confident(alpha: float) -> Any:
    def settle(p: Tensor) -> list[int]:
        best = p.amax(-1)
        return [i for i in range(len(p)) if best[i] > alpha] or [int(best.argmax())]

    return settle


def bounded(gamma: float, minus_max: bool) -> Any:
    def settle(p: Tensor) -> list[int]:
        h = -(p * p.clamp_min(1e-30).log()).sum(-1)
        order = h.argsort(stable=True)
        sums = h[order].cumsum(0) - (h[order] if minus_max else 0)
        return order[: max(1, int((sums <= gamma).sum()))].tolist()

    return settle


SETTLES = {
    "one-step": lambda p: list(range(len(p))),
    "confidence-0.3": confident(0.3),
    "confidence-0.7": confident(0.7),
    "entropy-1.5": bounded(1.5, False),
    "entropy-0.8-minus-max": bounded(0.8, True),
}


class Clear:
    """A rule of `SETTLES`, and whether all its choices so far were clear: none so near a tie that another order of
    summation, as other processors have it, may choose otherwise."""

    def __init__(self, settle: Callable[[Tensor], list[int]], rule: UnmaskRule) -> None:
        self._settle = settle
        self._rule = rule
        self.so_far = True

    def __call__(self, p: Tensor) -> list[int]:
        settled = self._settle(p)
        best = p.topk(2, -1).values
        margins = (best[settled, 0] / best[settled, 1]).log().tolist()
        if self._rule.rule == "confidence":
            margins += (best[:, 0] - self._rule.alpha).abs().tolist()
            measure = -best[:, 0]
        else:
            measure = -(p * p.clamp_min(1e-30).log()).sum(-1)
            if self._rule.rule == "entropy":
                ordered = measure.sort().values
                sums = ordered.cumsum(0) - (ordered if self._rule.minus_max else 0)
                margins += (sums - self._rule.gamma).abs().tolist()
        if left := [i for i in range(len(p)) if i not in settled]:
            margins.append(float(measure[left].min() - measure[settled].max()))
        self.so_far &= min(margins) > NEAR_TIE
        return settled


@pytest.mark.parametrize("model", DIFFUSION_MODELS, indirect=True)
def test_block_diffusion_equals_algorithm_1(model: Path) -> None:
    checkpoint, count = load(model), 16
    cases = {
        f"{rule} {size} {i}": (rule, size, p)
        for rule in RULES
        for size in (3, 8)
        for i, p in enumerate(prompts(3, model))
    }
    found = run(
        make_engine(model),
        [
            request(name, p, count, decoder="blt-d", block_size=size, unmask=RULES[rule])
            for name, (rule, size, p) in cases.items()
        ],
    )
    compared = 0
    for name, (rule, size, p) in cases.items():
        clear = Clear(SETTLES[rule], RULES[rule])
        wanted = reference.block_diffusion(checkpoint.config, checkpoint.tensors, p, count, size, clear)
        if clear.so_far:
            compared += 1
            assert found[name].ids == wanted[:count], name
    assert compared > 0.9 * len(cases)


@pytest.mark.parametrize("model", ["released-form"], indirect=True)
def test_block_diffusion_is_refused_by_a_model_without_mask_id(model: Path) -> None:
    out = run(make_engine(model), [request("a", [1], 8, decoder="blt-d")])["a"]
    assert not isinstance(out.end, Finished) and "not trained with block diffusion" in str(out.end)


def test_more_output_ids_than_max_tokens_are_refused(model: Path) -> None:
    """A restarted engine gets what its forerunner wrote, never more than the request allows."""
    out = run(make_engine(model), [request("a", [1, 60], 3, output_ids=[70, 71, 72, 73])])["a"]
    assert not isinstance(out.end, Finished) and "must have at most max_tokens ids (3), not 4" in str(out.end)


@pytest.mark.parametrize("model", DIFFUSION_MODELS, indirect=True)
def test_block_diffusion_does_not_depend_on_other_requests_or_preemption(model: Path) -> None:
    engine = crowded_engine(model, max_sequences=12, max_step_rows=31, max_length=160)
    ps = prompts(16, model)
    how = [
        {"decoder": "blt-d", "unmask": rule, "finish_patch": finish}
        for rule in RULES.values()
        for finish in (False, True)
    ]
    batch = [Request(id=str(i), prompt_ids=p, **options(i, 40), **how[i % len(how)]) for i, p in enumerate(ps)]
    found = run(engine, batch)
    assert engine.snapshot().preemptions > 0
    alone = make_engine(model)
    for r in batch:
        assert_same(found[r.id], run(alone, [r])[r.id])


@pytest.mark.parametrize("model", DIFFUSION_MODELS, indirect=True)
def test_with_finish_patch_blocks_begin_where_patches_begin(model: Path) -> None:
    engine = make_engine(model)
    engine.add(request("a", prompts(3, model)[2], 60, decoder="blt-d", finish_patch=True))
    starts = 0
    while engine.has_work:
        before = {s.arrival: len(s.ids) for s in engine.running}
        engine.step()
        for s in engine.running:
            if len(s.ids) - before.get(s.arrival, len(s.ids)) > 1:
                assert before[s.arrival] in s.patching.starts
                starts += 1
    assert starts > 2


# What a rejected draft leaves behind: nothing.


def state(engine: Engine, sequence: Sequence) -> dict[str, Any]:
    """All that later rows can read of a sequence, and what it holds."""
    caches, n = engine.memory.caches, sequence.num_computed
    patch = sequence.patch_of(n)

    def place(name: str, row: int) -> tuple[int, int]:
        """Its page and its offset there."""
        table, (block, offset) = sequence.tables[name], divmod(row, caches.specs[name].page_size)
        return table.pages[block - table.first], offset

    def rows(tensors: list[tuple[Tensor, Tensor]], name: str, live: range, by_page: bool) -> list[Tensor]:
        slots = [place(name, row) for row in live]
        return [
            t[page, offset].clone() if by_page else t[page, :, offset].clone()
            for kv in tensors
            for t in kv
            for page, offset in slots
        ]

    def bytes_of(name: str) -> range:
        window = caches.specs[name].window
        return range(0 if window is None else max(n - window + 1, 0), n)

    # Where patches see other documents, a step that runs ahead leaves this for later.
    sequence.note_patch_documents(patch)
    opened = range(sequence.patching.starts[patch], n)
    slots = engine.model_config.slots
    return {
        "ids": list(sequence.ids),
        "computed": n,
        "starts": list(sequence.patching.starts),
        "documents": list(sequence.documents),
        "patch_documents": list(sequence.patch_documents),
        "id_counts": dict(sequence.id_counts),
        "pages": {name: (table.first, len(table.pages)) for name, table in sequence.tables.items()},
        "patcher": rows(caches.patcher, "patcher", bytes_of("patcher"), False),
        "encoder": rows(caches.encoder, "encoder", bytes_of("encoder"), False),
        "decoder": rows(caches.decoder, "decoder", bytes_of("decoder"), False),
        "open": rows(caches.open_kv, "open", opened, False) + rows([(caches.open_states,) * 2], "open", opened, True),
        "global": rows(caches.global_, "global", range(patch), False),
        "latent": [
            t[page, :, offset * slots : (offset + 1) * slots].clone()
            for kv in caches.latent
            for t in kv
            for page, offset in [place("latent", patch - 1)]
        ],
    }  # fmt: skip


def states(
    model: Path, prompt: list[int], count: int, *, run_ahead: Policy = "never", **how: Any
) -> dict[int, dict[str, Any]]:
    """The state after every step that committed ids, by the number of ids."""
    engine = make_engine(model, run_ahead=run_ahead)
    engine.add(request("a", prompt, count, sampling=SamplingParams(temperature=0.9, logit_bias={EOS_ID: 2.0}), **how))
    found = {}
    length = 0
    while engine.has_work:
        engine.step()
        # What the device does ahead of the host keeps its pages.
        engine.stepper.stages.discard()
        for s in engine.running:
            engine.memory.trim(s)
            if len(s.ids) != length and s.num_output:
                length = len(s.ids)
                found[length] = state(engine, s)
    return found


def test_a_rejected_draft_leaves_the_state_of_plain_blt(model: Path) -> None:
    prompt = prompts(9, model)[8]
    engine = make_engine(model)
    wanted = states(model, prompt, 60)
    for how in [{"decoder": "blt-s", "draft_length": 6}, {"decoder": "blt-s", "draft_length": 16}, *BLOCKS[5:7]]:
        if how["decoder"] == "blt-dv" and engine.model_config.mask_id is None:
            continue
        found = states(model, prompt, 60, **how)
        assert 3 < len(found) < 60
        for length, after in found.items():
            assert_same_state(after, wanted[length])


def test_work_launched_ahead_leaves_the_state_of_plain_blt(model: Path) -> None:
    prompt = prompts(9, model)[8]
    wanted, found = states(model, prompt, 60), states(model, prompt, 60, run_ahead="always")
    assert len(found) < len(wanted)
    for length, after in found.items():
        assert_same_state(after, wanted[length])


def assert_same_state(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key, value in wanted.items():
        if value and isinstance(value, list) and isinstance(value[0], Tensor):
            assert len(found[key]) == len(value)
            assert all(torch.equal(a, b) for a, b in zip(found[key], value, strict=True)), key
        else:
            assert found[key] == value, key


# The law.


@pytest.mark.parametrize("count", [1500, pytest.param(50_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "how", [{"decoder": "blt"}, {"decoder": "blt-s", "draft_length": 4}, {"decoder": "blt-dv"}], ids=str
)
def test_sampled_continuations_follow_the_models_distribution(how: dict[str, Any], count: int, tmp_path: Path) -> None:
    config = our_config(
        dim=16, global_dim=32, hashes=HashConfig((2, 3), 1, 31), patching=PatchingRule(max_patch_length=3),
        decoder_input="embedding", mask_id=260, block_size=4,
    )  # fmt: skip
    config, tensors = our_model(config, 50)
    save_ours(tmp_path / "model", (config, tensors))
    kept, prompt, temperature = [70, 105, 110], text(9, 60, specials=False), 1.3
    bias = {i: -100.0 for i in range(260) if i not in kept}
    engine = make_engine(tmp_path / "model", max_sequences=256, max_step_rows=2048)
    seen: dict[tuple[int, ...], int] = {}
    for first in range(0, count, 500):
        sampling = [SamplingParams(temperature=temperature, logit_bias=bias, seed=s) for s in range(first, first + 500)]
        outs = run(engine, [request(str(p.seed), prompt, 3, sampling=p, **how) for p in sampling])
        for out in outs.values():
            seen[tuple(out.ids)] = seen.get(tuple(out.ids), 0) + 1
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        grown = {}
        for ids, p in expected.items():
            law = (reference.forward(config, tensors, [*prompt, *ids])[-1, kept] / temperature).softmax(-1).tolist()
            grown |= {(*ids, token): p * q for token, q in zip(kept, law, strict=True)}
        expected = grown
    assert set(seen) <= set(expected)
    total = sum(seen.values())
    chi_square = sum((seen.get(ids, 0) - total * p) ** 2 / (total * p) for ids, p in expected.items())
    # 26 degrees of freedom: above 54.1 by chance once in a thousand.
    assert chi_square < 54.1


def test_a_block_longer_than_trained_is_refused_with_the_reason(tmp_path: Path) -> None:
    config, tensors = our_model(our_config(decoder_input="embedding", mask_id=260, block_size=4), 51)
    engine = make_engine(save_ours(tmp_path / "model", (replace(config, name="x"), tensors)))
    for fields, message in (
        ({"decoder": "blt-d", "block_size": 5}, "trained with blocks of up to 4"),
        ({"decoder": "blt-s", "draft_length": 33}, "draft_length: must be at most 32, not 33"),
        ({"decoder": "blt-s", "draft_length": 0}, "draft_length: must be at least 1, not 0"),
    ):
        assert message in str(run(engine, [request("a", [1, 70], 8, **fields)])["a"].end)


# Edges.


def test_every_decoder_fills_a_sequence_to_the_models_maximum_length(tmp_path: Path) -> None:
    fast = {"decoder_input": "embedding", "mask_id": 260, "block_size": 8}
    folder = save_ours(tmp_path / "model", our_model(our_config(max_positions=64, **fast), 52))
    engine = make_engine(folder)
    prompt = text(60, 70)
    wanted = run(engine, [request("a", prompt, 4)])["a"].ids
    for how in [*DRAFTS, *BLOCKS[:2], *AUTO]:
        assert run(engine, [request("a", prompt, 4, **how)])["a"].ids == wanted
    for how in ({"decoder": "blt-d"}, {"decoder": "auto", "exact": False}):
        assert "last block may reach 7 ids past" in str(run(engine, [request("a", prompt, 4, **how)])["a"].end)
        assert isinstance(
            run(engine, [request("a", prompt, 0, prompt_logprobs=True, logprobs=0, **how)])["a"].end, Finished
        )
        assert len(run(engine, [request("a", prompt[:40], 17, **how)])["a"].ids) == 17


def test_a_text_with_too_many_patches_ends_with_finish_reason_length(tmp_path: Path) -> None:
    fast = {"decoder_input": "embedding", "mask_id": 260, "block_size": 8}
    config, tensors = our_model(our_config(patching=PatchingRule(max_patch_length=2), **fast), 53)
    config = replace(config, global_=replace(config.global_, max_positions=12))
    engine = make_engine(save_ours(tmp_path / "model", (config, tensors)))
    for how in [{"decoder": "blt"}, *EXACT, {"decoder": "blt-d"}, {"decoder": "blt-d", "finish_patch": True}]:
        out = run(engine, [request("a", text(6, 71), 200, **how)])["a"]
        assert isinstance(out.end, Finished) and out.end.reason == "length"
        assert 1 <= len(out.ids) < 40


def test_blocks_longer_than_any_draft_fit_into_the_smallest_caches(tmp_path: Path) -> None:
    fast = {"decoder_input": "embedding", "mask_id": 260, "block_size": 96}
    folder = save_ours(tmp_path / "model", our_model(our_config(**fast), 54))
    engine = crowded_engine(folder, max_sequences=2, max_step_rows=16, max_length=400)
    wanted = run(engine, [request("a", text(30, 72), 150)])["a"].ids
    for decoder in ("blt-d", "blt-dv"):
        found = run(engine, [request("a", text(30, 72), 150, decoder=decoder)])["a"].ids
        assert len(found) == 150 and (decoder == "blt-d" or found == wanted)
    assert engine.snapshot().preemptions == 0


def test_blocks_longer_than_any_draft_are_not_taken_for_prompts(tmp_path: Path) -> None:
    size = 2 * MAX_DRAFT
    fast = {"decoder_input": "embedding", "mask_id": 260, "block_size": size}
    engine = make_engine(save_ours(tmp_path / "model", our_model(our_config(**fast), 55)))
    engine.prompt_rows = 16
    engine.reset()
    how = {"decoder": "blt-d", "unmask": UnmaskRule(rule="one_step")}
    run(engine, [request(str(i), text(4, 73), 5 * size, **how) for i in range(4)])
    # One prefills the prompts; in each of the others all four have a block.
    assert engine.snapshot().steps == 1 + 5


def test_the_longest_drafts_write_the_text_of_blt(model: Path) -> None:
    engine = make_engine(model, prefix_cache=False)
    for i, prompt in enumerate(prompts(4, model)):
        law = SamplingParams(temperature=(0, 0.8)[i % 2], seed=i)
        one, other = (
            run(engine, [request("a", prompt, 100, sampling=law, **how)])["a"]
            for how in ({}, {"decoder": "blt-s", "draft_length": MAX_DRAFT})
        )
        assert other.ids == one.ids and usage(other).drafted >= MAX_DRAFT


@pytest.mark.parametrize("model", DIFFUSION_MODELS, indirect=True)
def test_usage_does_not_depend_on_chunks_or_preemption(model: Path) -> None:
    def usages(engine: Engine) -> dict[str, Any]:
        how = [{"decoder": "blt"}, {"decoder": "blt-d"}]
        batch = [request(str(i), p, 40, **how[i % 2]) for i, p in enumerate(prompts(12, model))]
        ends = {name: out.end for name, out in run(engine, batch).items()}
        return {n: (e.usage.rows, e.usage.rounds, e.usage.drafted) for n, e in ends.items() if isinstance(e, Finished)}

    wanted = usages(make_engine(model))
    crowded = crowded_engine(model, max_sequences=12, max_step_rows=12, max_length=160)
    found = usages(crowded)
    assert crowded.snapshot().preemptions > 0
    for name, (rows, rounds, drafted) in wanted.items():
        assert (found[name][1], found[name][2]) == (rounds, drafted)
        assert found[name][0]["patcher"] == rows["patcher"]
        assert found[name][0]["encoder"] == rows["encoder"]
