"""A request's bytes and scores, to the last bit, do not depend on company, chunking, preemption or page size."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.config import PatchingRule
from engine.types import Request, SamplingParams
from tests.engines import Output, crowded_engine, make_engine, request, run, save_ours, threads, usage
from tests.models import HF_MODELS, OUR_MODELS, our_config, our_model, text

NANO = Path(__file__).parents[1] / "models" / "nano"
OUTPUT = 40


@pytest.fixture(
    scope="module", params=["k2", "windows-16-12", "fast-blt", "gqa-isolated", "bytes-long-patches", "nano"]
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    name = request.param
    folder = tmp_path_factory.mktemp(name) / "model"
    if name == "nano":
        # Large enough that threads share a product's rows.
        with threads(2):
            yield NANO
        return
    if name in HF_MODELS:
        HF_MODELS[name]().save_pretrained(folder)
    elif name in OUR_MODELS:
        save_ours(folder, OUR_MODELS[name]())
    else:
        # A threshold that is never reached: patches end with the longest length alone.
        config, tensors = our_model(our_config(), 30)
        save_ours(folder, (replace(config, patching=PatchingRule(threshold=9.0, max_patch_length=50)), tensors))
    yield folder


def the_request() -> Request:
    sampling = SamplingParams(temperature=0.8, top_p=0.95, seed=8)
    return request("it", text(90, 3), OUTPUT, sampling=sampling, logprobs=2, prompt_logprobs=True)


def others() -> list[Request]:
    """17 of many lengths, greedy and sampled; with ids that sort before and behind."""
    return [
        request(
            f"{'a' if i % 2 else 'z'}{i}",
            text(3 + 11 * i, 100 + i),
            5 + 4 * i,
            sampling=SamplingParams(temperature=i % 3, seed=i),
            priority=i % 2,
        )
        for i in range(17)
    ]


def alone(model: Path, **choices: Any) -> Output:
    return run(make_engine(model, **choices), [the_request()])["it"]


def assert_same(found: Output, wanted: Output) -> None:
    assert found.ids == wanted.ids
    assert found.text == wanted.text
    assert found.logprobs == wanted.logprobs
    assert found.prompt_logprobs == wanted.prompt_logprobs


@pytest.fixture(scope="module")
def wanted(model: Path) -> Output:
    output = alone(model)
    assert len(set(output.ids)) > 5
    return output


@pytest.mark.parametrize("threads_of_torch", [1, 2])
def test_torch_kernels_give_the_same_bits_alone_batched_and_chunked(model: Path, threads_of_torch: int) -> None:
    """They pad to what this machine's library needs; everywhere else here our own compute."""
    with threads(threads_of_torch):
        it = alone(model, kernels="torch")
        assert_same(run(make_engine(model, kernels="torch"), [*others()[:5], the_request()])["it"], it)
        assert_same(alone(model, kernels="torch", max_step_rows=7), it)


def test_other_requests_change_no_bit_in_bfloat16(model: Path) -> None:
    it = alone(model, dtype="bfloat16")
    assert_same(run(make_engine(model, dtype="bfloat16"), [*others()[:9], the_request()])["it"], it)
    assert_same(alone(model, dtype="bfloat16", max_step_rows=7), it)


def test_other_requests_in_the_batch_change_no_bit(model: Path, wanted: Output) -> None:
    crowd = others()
    together = [*crowd[:9], the_request(), *crowd[9:]]
    assert_same(run(make_engine(model), together)["it"], wanted)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_chunked_prefill_changes_no_bit(model: Path, wanted: Output, rows: int) -> None:
    assert_same(alone(model, max_step_rows=rows), wanted)


def test_chunked_prefill_beside_other_requests_changes_no_bit(model: Path, wanted: Output) -> None:
    assert_same(run(make_engine(model, max_step_rows=13), [the_request(), *others()])["it"], wanted)


def test_preemption_changes_no_bit(model: Path, wanted: Output) -> None:
    engine = crowded_engine(model, max_sequences=6, max_step_rows=32, max_length=200)
    # Company that comes once a part of the prompt is scored, and takes its pages.
    early = [request(f"e{i}", text(120, 40 + i), 50, priority=-1) for i in range(5)]
    outputs = {r.id: Output() for r in (the_request(), *early)}
    engine.add(the_request())
    assert not [*engine.step(), *engine.step()]
    for r in early:
        engine.add(r)
    while engine.has_work:
        for event in engine.step():
            outputs[event.id].take(event)
    assert usage(outputs["it"]).preemptions
    assert_same(outputs["it"], wanted)
    undisturbed = run(make_engine(model), early) | run(engine, early[-1:])
    for r in early:
        assert_same(outputs[r.id], undisturbed[r.id])


@pytest.mark.parametrize("page_size", [4, 64])
def test_the_page_size_changes_no_byte(model: Path, wanted: Output, page_size: int) -> None:
    assert alone(model, page_size=page_size).ids == wanted.ids
