"""What `/metrics` says of a real server, in one reading of both processes."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.config import EngineConfig
from engine.costs.calibration import LEAST_PROMPT_ROWS
from tests.serving import RunningServer, running_server

DECODERS = ("blt", "blt-s", "blt-d", "blt-dv", "auto")
STAGES = ("patcher", "encoder", "global", "decoder")
PROMPT, OUTPUT = "def f(x):", 24


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """After two completions by every decoder."""
    with running_server(tiny, tmp_path_factory.mktemp("log") / "log") as running:
        for decoder in DECODERS:
            body = {"model": f"tiny:{decoder}", "prompt": PROMPT, "max_tokens": OUTPUT, "n": 2, "ignore_eos": True}
            assert httpx.post(f"{running.url}/v1/completions", json=body, timeout=60).status_code == 200
        yield running


def test_every_metric_series_begins_at_zero(tiny_server: str) -> None:
    text = httpx.get(f"{tiny_server}/metrics").text
    for decoder in DECODERS:
        for reason in ("stop", "length", "timeout", "abort", "refused", "error"):
            assert f'fastblt_sequences_total{{decoder="{decoder}",finish_reason="{reason}"}}' in text
        assert f'fastblt_queue_seconds_count{{decoder="{decoder}"}}' in text
        for stage in STAGES:
            assert f'fastblt_decoder_stage_read_bytes_total{{decoder="{decoder}",stage="{stage}"}}' in text
    for process in ("server", "engine"):
        assert f'fastblt_log_lines_dropped_total{{process="{process}"}} 0.0' in text
    assert "_created" not in text


@pytest.fixture(scope="module")
def values(server: RunningServer) -> dict[tuple[str, ...], float]:
    """(name, label values in order of their names) -> value."""
    text = httpx.get(f"{server.url}/metrics").text
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_sequences_and_their_sizes(values: dict[tuple[str, ...], float]) -> None:
    for decoder in DECODERS:
        assert values["fastblt_sequences_total", decoder, "length"] == 2
        for name in ("queue_seconds", "time_to_first_byte_seconds", "time_per_byte_seconds", "end_to_end_seconds"):
            assert values[f"fastblt_{name}_count", decoder] == 2
        assert values["fastblt_queue_seconds_sum", decoder] < values["fastblt_end_to_end_seconds_sum", decoder]
        assert values["fastblt_prompt_size_bytes_sum", decoder] == 2 * (1 + len(PROMPT))
        assert values["fastblt_output_size_bytes_sum", decoder] == 2 * OUTPUT
        assert values["fastblt_committed_bytes_total", decoder] == 2 * OUTPUT
    assert values["fastblt_http_requests_in_progress",] == 1, "the scrape itself"
    assert values["fastblt_queue_capacity_sequences",] == 256
    assert LEAST_PROMPT_ROWS <= values["fastblt_step_prompt_rows",] <= EngineConfig("").max_step_rows


def test_stage_costs_of_decoders_add_up_to_at_most_the_stage_totals(values: dict[tuple[str, ...], float]) -> None:
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


def test_metrics_cover_both_processes_and_the_machine(values: dict[tuple[str, ...], float]) -> None:
    for name in ("process", "fastblt_engine_process"):
        assert values[f"{name}_resident_memory_bytes",] > 10e6
        assert values[f"{name}_cpu_seconds_total",] > 0
    # Whatever loads a model's weights holds more than the process that only talks.
    assert values["fastblt_engine_process_resident_memory_bytes",] > values["process_resident_memory_bytes",]
    for operation in ("copy", "gemv"):
        assert 1e8 < values["fastblt_peak_bandwidth_bytes_per_second", operation] < 1e13
    info = [labels for name, *labels in values if name == "fastblt_build_info"]
    assert [labels[:4] + labels[5:] for labels in info] == [["cpu", "float32", "native", "tiny", "float32"]]
