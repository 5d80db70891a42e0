"""What an engine counts for monitoring, against its traces and a plain forward without caches."""

from bisect import bisect_left
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from engine.counts import PATCH_SIZES
from engine.types import MAX_DRAFT, Delta, Finished, SamplingParams, Trace
from tests import reference
from tests.engines import make_engine, request, run, save_ours
from tests.models import OUR_MODELS, text

DRAFTING: dict[str, dict[str, Any]] = {
    "blt-s": {"draft_length": 5},
    "blt-dv": {},
    "blt-d": {},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ours(tmp_path_factory.mktemp("model") / "model", OUR_MODELS["fast-blt"]())


def test_accepted_runs_equal_those_in_the_traces(model: Path) -> None:
    engine = make_engine(model)
    warm = SamplingParams(temperature=0.9, seed=3)
    requests = [
        request(f"{decoder} {n}", text(9, n), 40, trace=True, decoder=decoder, sampling=warm, **fields)
        for decoder, fields in {"blt": {}, **DRAFTING}.items()
        for n in range(3)
    ]
    for r in requests:
        engine.add(r)
    traces: dict[str, list[Trace]] = {r.decoder: [] for r in requests}
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, Delta):
                traces[event.id.split()[0]] += event.traces
    for decoder, counts in engine.snapshot().decoders.items():
        found = Counter(trace.accepted for trace in traces.get(decoder, []) if trace.drafts)
        assert counts.accepted_runs == [found[length] for length in range(MAX_DRAFT + 1)]
        assert sum(length * rounds for length, rounds in enumerate(counts.accepted_runs)) == counts.accepted
        assert any(counts.accepted_runs) == (decoder in DRAFTING)


@pytest.mark.parametrize("decoder", ["blt", *DRAFTING])
def test_patch_sizes_equal_those_of_the_reference(model: Path, decoder: str) -> None:
    """Those that end where a generated id begins the next."""
    config, tensors = OUR_MODELS["fast-blt"]()
    engine = make_engine(model)
    prompts = [text(n, n) for n in (1, 11, 40)]
    outputs = run(engine, [request(str(i), p, 50, decoder=decoder, patches_from=0) for i, p in enumerate(prompts)])
    sizes = Counter[int]()
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        known = [*prompt, *output.ids][: len(output.entropies)]
        starts = reference.patch_starts(config.patching, reference.entropies(config, tensors, known))
        first = bisect_left(starts, len(prompt))
        sizes.update(after - start for start, after in pairwise(starts[first - 1 :]))
    snapshot = engine.snapshot()
    classes = Counter[int]()
    for size, count in sizes.items():
        classes[bisect_left(PATCH_SIZES, size)] += count
    assert snapshot.patch_sizes == [classes[place] for place in range(len(PATCH_SIZES) + 1)]
    assert snapshot.patch_bytes == sum(size * count for size, count in sizes.items())
    assert len(sizes) > 2


def test_queue_prefill_and_decode_seconds_fill_the_time_of_a_request(model: Path) -> None:
    engine = make_engine(model, max_sequences=1)
    engine.add(request("before", text(9, 1), 30))
    engine.add(request("waits", text(60, 2), 20))
    engine.add(request("scores", text(9, 3), 0))
    usages = {}
    while engine.has_work:
        usages |= {event.id: event.usage for event in engine.step() if isinstance(event, Finished)}
    before, waits, scores = (usages[name] for name in ("before", "waits", "scores"))
    assert waits.queue_seconds >= before.prefill_seconds + before.decode_seconds > before.prefill_seconds > 0
    assert waits.prefill_seconds > 0 and waits.decode_seconds > 0
    assert scores.prefill_seconds > 0 and scores.decode_seconds == 0
