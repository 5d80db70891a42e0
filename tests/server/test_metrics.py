"""What `/metrics` says of a real server, in one reading of both processes."""

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.config import EngineConfig
from engine.costs.calibration import LEAST_PROMPT_ROWS
from engine.types import MAX_DRAFT
from tests.scripted_server import ScriptedClient, serving
from tests.serving import ROOT, RunningServer, running_server

DECODERS = ("blt", "blt-s", "blt-d", "blt-dv", "auto")
STAGES = ("patcher", "encoder", "global", "decoder")
PROMPT, OUTPUT = "def f(x):", 24


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """After two completions by every decoder."""
    log = tmp_path_factory.mktemp("log") / "log"
    with running_server(tiny, log, "--metric-aliases", "vllm", "--served-model-name", "tiny") as running:
        for decoder in DECODERS:
            body = {"model": f"tiny:{decoder}", "prompt": PROMPT, "max_tokens": OUTPUT, "n": 2, "ignore_eos": True}
            assert httpx.post(f"{running.url}/v1/completions", json=body, timeout=60).status_code == 200
        yield running


def test_every_metric_series_begins_at_zero(tiny_server: str) -> None:
    text = httpx.get(f"{tiny_server}/metrics").text
    for decoder in DECODERS:
        for reason in ("stop", "length", "timeout", "dead_end", "abort", "refused", "error"):
            assert f'fastblt_sequences_total{{decoder="{decoder}",finish_reason="{reason}"}}' in text
        assert f'fastblt_queue_seconds_count{{decoder="{decoder}"}}' in text
        for stage in STAGES:
            assert f'fastblt_decoder_stage_read_bytes_total{{decoder="{decoder}",stage="{stage}"}}' in text
    for process in ("server", "engine"):
        assert f'fastblt_log_lines_dropped_total{{process="{process}"}} 0.0' in text
    assert "_created" not in text


async def test_many_scrapes_share_texts_that_are_newer_than_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[float]()

    def write(_: object) -> bytes:
        until = time.thread_time() + 0.02
        while time.thread_time() < until:
            pass
        made.append(time.monotonic())
        return b"%d" % len(made)

    monkeypatch.setattr("server.metrics.generate_latest", write)
    async with serving(ScriptedClient()) as http:
        assert (await http.get("/metrics")).text == "1"
        answers = await asyncio.gather(*[http.get("/metrics") for _ in range(30)])
    texts = [int(answer.text) for answer in answers]
    assert min(texts) == 2 and max(texts) <= 5, "each had its own"
    assert made[1] - made[0] > 0.3, "no pause"


def test_the_documented_number_of_series_is_right_and_histograms_cover_fast_gpus_and_slow_cores(
    tiny_server: str,
) -> None:
    samples = [line for line in httpx.get(f"{tiny_server}/metrics").text.splitlines() if not line.startswith("#")]
    documented = re.search(r"number of series is bounded: about ([\d,]+)", (ROOT / "docs" / "metrics.md").read_text())
    assert documented and abs(int(documented[1].replace(",", "")) - len(samples)) <= 50
    bounds: dict[str, list[float]] = {}
    for line in samples:
        if found := re.match(r'fastblt_(\w+)_seconds_bucket{decoder="blt",le="([\d.e-]+)"}', line):
            bounds.setdefault(found[1], []).append(float(found[2]))
    # What bytes take on an H200, as the README has it, is no lowest bucket, and an hour no highest.
    for name in ("time_per_byte", "inter_chunk"):
        assert sum(bound < 0.000417 for bound in bounds[name]) >= 2
    for name in ("queue", "prefill", "decode", "time_to_first_byte", "end_to_end"):
        assert max(bounds[name]) >= 3600


Values = dict[tuple[str, ...], float]
"""(name, label values in order of their names) -> value."""


def scrape(server: RunningServer) -> Values:
    text = httpx.get(f"{server.url}/metrics").text
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture(scope="module")
def values(server: RunningServer) -> Values:
    return scrape(server)


def test_metrics_count_sequences_and_their_sizes(values: Values) -> None:
    for decoder in DECODERS:
        assert values["fastblt_sequences_total", decoder, "length"] == 2
        parts = [values[f"fastblt_{part}_seconds_sum", decoder] for part in ("queue", "prefill", "decode")]
        assert 0 < sum(parts) < values["fastblt_end_to_end_seconds_sum", decoder]
        for name in ("queue", "prefill", "decode", "time_to_first_byte", "time_per_byte", "end_to_end"):
            assert values[f"fastblt_{name}_seconds_count", decoder] == 2
        # A step's bytes are a chunk, and those of several where the reader was slow; nothing comes before the first.
        assert values["fastblt_inter_chunk_seconds_count", decoder] <= values["fastblt_rounds_total", decoder] - 2
        assert values["fastblt_inter_chunk_seconds_sum", decoder] <= values["fastblt_decode_seconds_sum", decoder] + 1
        assert values["fastblt_prompt_size_bytes_sum", decoder] == 2 * (1 + len(PROMPT))
        assert values["fastblt_output_size_bytes_sum", decoder] == 2 * OUTPUT
        assert values["fastblt_committed_bytes_total", decoder] == 2 * OUTPUT
    assert values["fastblt_requests_total", "ok", "/v1/completions"] == len(DECODERS)
    assert values["fastblt_http_requests_in_progress",] == 1, "the scrape itself"
    assert values["fastblt_queue_capacity_sequences",] == 256
    assert values["fastblt_running_capacity_sequences",] == 64
    assert values["fastblt_step_capacity_rows",] == EngineConfig("").max_step_rows
    assert LEAST_PROMPT_ROWS <= values["fastblt_step_prompt_rows",] <= values["fastblt_step_capacity_rows",]


def test_stage_costs_of_decoders_add_up_to_at_most_the_stage_totals(values: Values) -> None:
    """What decoders are charged with is a part of what stages did: the rest is prompts."""
    for stage in STAGES:
        for name in ("rows", "read_bytes", "seconds"):
            shared = sum(values[f"fastblt_decoder_stage_{name}_total", decoder, stage] for decoder in DECODERS)
            assert 0 < shared <= values[f"fastblt_stage_{name}_total", stage]
        calls = values["fastblt_stage_calls_total", stage]
        assert values["fastblt_stage_read_bytes_total", stage] > calls * values["fastblt_stage_weight_bytes", stage] > 0
    seconds = sum(values["fastblt_stage_seconds_total", stage] for stage in STAGES)
    assert seconds < values["fastblt_step_seconds_total",]
    for decoder in DECODERS:
        for stage in ("encoder", "global", "decoder"):
            assert values["fastblt_decoder_stage_estimated_bytes_total", decoder, stage] > 0
        assert values["fastblt_blt_estimated_bytes_total", decoder] > 0


def test_metrics_cover_both_processes_and_the_machine(values: Values) -> None:
    for name in ("process", "fastblt_engine_process"):
        assert values[f"{name}_resident_memory_bytes",] > 10e6
        assert values[f"{name}_cpu_seconds_total",] > 0
    # Whatever loads a model's weights holds more than the process that only talks.
    assert values["fastblt_engine_process_resident_memory_bytes",] > values["process_resident_memory_bytes",]
    for operation in ("copy", "gemv"):
        assert 1e8 < values["fastblt_peak_bandwidth_bytes_per_second", operation] < 1e13
    info = [labels for name, *labels in values if name == "fastblt_build_info"]
    assert [labels[:4] + labels[5:] for labels in info] == [["cpu", "float32", "native", "tiny", "float32"]]


def test_accepted_drafts_by_position_add_up_to_all_of_them(values: Values) -> None:
    for decoder in ("blt-s", "blt-dv", "auto"):
        positions = [values["fastblt_position_accepted_bytes_total", decoder, str(p)] for p in range(MAX_DRAFT)]
        assert positions == sorted(positions, reverse=True)
        assert sum(positions) == values["fastblt_accepted_bytes_total", decoder]
        assert positions[0] <= values["fastblt_draft_rounds_total", decoder] <= values["fastblt_rounds_total", decoder]
    assert values["fastblt_draft_rounds_total", "blt"] == 0 < values["fastblt_draft_rounds_total", "blt-s"]
    assert values["fastblt_position_accepted_bytes_total", "blt-s", "0"] > 0


def test_patch_sizes_and_the_geometry_of_the_caches(values: Values) -> None:
    patches, num_bytes = values["fastblt_patch_size_bytes_count",], values["fastblt_patch_size_bytes_sum",]
    assert len(DECODERS) < patches <= num_bytes
    assert values["fastblt_patch_size_bytes_bucket", "+Inf"] == patches
    geometry = {labels[3]: labels[:3] for name, *labels in values if name == "fastblt_cache_info"}
    pools = {labels[0] for name, *labels in values if name == "fastblt_pages_capacity"}
    assert geometry.keys() == pools
    for pool, (page_bytes, page_rows, pages) in geometry.items():
        assert float(page_bytes) == values["fastblt_page_size_bytes", pool]
        assert float(pages) == values["fastblt_pages_capacity", pool]
        assert int(page_rows) == {"open": 8, "latent": 8}.get(pool, EngineConfig("").page_size)


HISTOGRAMS = {
    "time_to_first_token_seconds": "time_to_first_byte_seconds",
    "inter_token_latency_seconds": "inter_chunk_seconds",
    "request_time_per_output_token_seconds": "time_per_byte_seconds",
    "e2e_request_latency_seconds": "end_to_end_seconds",
    "request_queue_time_seconds": "queue_seconds",
    "request_prefill_time_seconds": "prefill_seconds",
    "request_decode_time_seconds": "decode_seconds",
    "request_prompt_tokens": "prompt_size_bytes",
    "request_generation_tokens": "output_size_bytes",
}


def test_the_series_of_vllm_equal_ours(values: Values) -> None:
    def theirs(name: str, *labels: str) -> float:
        """labels: by their names' order, as are "engine" and "model_name"."""
        return values[f"vllm:{name}", *labels]

    def ours(name: str, *labels: str) -> float:
        return sum(n for (key, *rest), n in values.items() if key == f"fastblt_{name}" and {*labels} <= {*rest})

    of = ("0", "tiny")
    for name, same in HISTOGRAMS.items():
        for part in ("count", "sum"):
            assert theirs(f"{name}_{part}", *of) == pytest.approx(ours(f"{same}_{part}"))
            assert ours(f"{same}_{part}") > 0 or same == "inter_chunk_seconds"
        buckets = {key[2]: n for key, n in values.items() if key[0] == f"vllm:{name}_bucket"}
        assert buckets["+Inf"] == theirs(f"{name}_count", *of)
        for le, count in buckets.items():
            assert count == ours(f"{same}_bucket", le)
    assert theirs("prompt_tokens_total", *of) == theirs("prefix_cache_queries_total", *of)
    assert theirs("prompt_tokens_total", *of) == ours("prompt_bytes_total") + ours("prompt_cached_bytes_total")
    assert theirs("prompt_tokens_total", *of) == 2 * len(DECODERS) * (1 + len(PROMPT))
    assert theirs("generation_tokens_total", *of) == ours("committed_bytes_total") == 2 * len(DECODERS) * OUTPUT
    assert theirs("num_preemptions_total", *of) == ours("preemptions_total")
    reasons = {key[2]: n for key, n in values.items() if key[0] == "vllm:request_success_total"}
    ends = ("stop", "length", "timeout", "dead_end", "abort", "error")
    assert reasons == {end: ours("sequences_total", end) for end in ends}
    assert reasons["length"] == 2 * len(DECODERS)
    verified = ("blt-s", "blt-dv", "auto")
    for name, same in {"drafts": "draft_rounds", "draft_tokens": "drafted_bytes"}.items():
        assert theirs(f"spec_decode_num_{name}_total", *of) == sum(ours(f"{same}_total", d) for d in verified) > 0
    accepted = theirs("spec_decode_num_accepted_tokens_total", *of)
    by_position = [theirs("spec_decode_num_accepted_tokens_per_pos_total", *of, str(p)) for p in range(MAX_DRAFT)]
    assert accepted == sum(by_position) == sum(ours("accepted_bytes_total", d) for d in verified)
    pages = str(int(values["fastblt_pages_capacity", "decoder"]))
    assert theirs("cache_config_info", "64", *of, pages) == 1


def test_the_series_of_vllm_are_off_by_default(tiny_server: str) -> None:
    assert "vllm" not in httpx.get(f"{tiny_server}/metrics").text


GAUGES = {
    "running_sequences": "num_requests_running",
    "waiting_sequences": "num_requests_waiting",
    "kv_cache_usage_ratio": "kv_cache_usage_perc",
}


def test_gauges_are_right_once_the_server_is_idle(server: RunningServer) -> None:
    """Whether requests end by themselves or their clients leave. Nothing but the scrape comes after them."""

    def gauges() -> dict[str, float]:
        found = scrape(server)
        shares = [
            n / found["fastblt_pages_capacity", key[1]] for key, n in found.items() if key[0] == "fastblt_pages_used"
        ]
        assert found["fastblt_kv_cache_usage_ratio",] == max(shares) and len(shares) == 6
        for name, theirs in GAUGES.items():
            assert found[f"fastblt_{name}",] == found[f"vllm:{theirs}", "0", "tiny"]
        return {name: found[f"fastblt_{name}",] for name in (*GAUGES, "queued_sequences")}

    def until(wanted: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        """The engine reports ten times a second while it works."""
        deadline = time.monotonic() + 20
        while not wanted(now := gauges()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return now

    idle = dict.fromkeys((*GAUGES, "queued_sequences"), 0.0)
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 60, "ignore_eos": True}
    with server.client() as http, ExitStack() as streams:
        assert http.post("/v1/completions", json=body).status_code == 200
        assert gauges() == idle
        readers: list[Iterator[str]] = []
        for _ in range(3):
            long = body | {"stream": True, "max_tokens": 3000, "n": 30}
            stream = streams.enter_context(http.stream("POST", "/v1/completions", json=long))
            # A reader that is dropped closes its stream.
            readers.append(stream.iter_lines())
            assert stream.status_code == 200 and next(readers[-1])
        busy = until(lambda now: now["running_sequences"] + now["waiting_sequences"] > 30)
        assert 0 < busy["kv_cache_usage_ratio"] <= 1
    assert until(lambda now: now == idle) == idle
    assert scrape(server)["fastblt_inter_chunk_seconds_count", "blt"] > 10, "of 90 long sequences"


def test_rejections_are_counted_by_reason_and_requests_by_outcome(server: RunningServer) -> None:
    reasons = {"invalid_json": "{", "model_not_found": '{"model": "x"}', "invalid_value": '{"model": "tiny", "n": 0}'}
    odd = '{"model": "tiny", "n": 3, "best_of": 2}'
    before = server.metrics("fastblt_re")
    with server.client(headers={"content-type": "application/json"}) as http:
        answers = [http.post("/v1/completions", content=text) for text in (*reasons.values(), odd)]
        assert all(400 <= answer.status_code < 500 for answer in answers)
        assert http.get("/nowhere").status_code == 404
        after = server.metrics("fastblt_re")
    grown = {key: n - before.get(key, 0) for key, n in after.items() if n != before.get(key, 0)}
    assert grown.pop('fastblt_requests_total{outcome="ok",route="/metrics"}') == 1
    assert grown == {
        **{f'fastblt_rejections_total{{reason="{reason}"}}': 1 for reason in (*reasons, "unknown_url", "other")},
        'fastblt_requests_total{outcome="rejected",route="/v1/completions"}': 4,
        'fastblt_requests_total{outcome="rejected",route="unmatched"}': 1,
    }
