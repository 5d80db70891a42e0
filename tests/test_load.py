"""`fastblt load` against real servers over sockets."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from xml.dom import minidom

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from clients.load.arrivals import poisson
from clients.load.http import Lost, Pool
from clients.load.percentiles import PERCENTILES, Gaps, spread
from clients.load.record import Limits, Plan, Record, Run
from clients.load.run import measure
from clients.load.stats import summary
from clients.load.svg import MOST_POINTS, Series, chart
from clients.load.workload import Range, Texts, Workload, parse_numbers, parse_weights
from server.cli import app
from tests.conftest import COMMAND, ROOT
from tests.scripted_server import ScriptedClient, serving
from tests.test_batch import heed_interrupts
from tests.test_clients import answer, scripted

runner = CliRunner()
SECONDS = st.floats(1e-6, 1e4)


def load(url: str, *flags: str) -> Result:
    return runner.invoke(app, ["load", "--url", url, *flags])


@given(st.lists(SECONDS, min_size=1, max_size=200))
def test_percentiles_are_those_of_numpy(values: list[float]) -> None:
    told = spread(values)
    assert told and told["count"] == len(values) and told["max"] == max(values)
    assert told["mean"] == pytest.approx(np.mean(values))
    for percent in PERCENTILES:
        assert told[f"p{percent}"] == pytest.approx(np.percentile(values, percent))


@given(st.lists(SECONDS, min_size=1, max_size=200))
def test_percentiles_of_gaps_are_true_to_a_hundredth(values: list[float]) -> None:
    gaps = Gaps()
    for value in values:
        gaps.add(value)
    told = gaps.spread()
    assert told and told["count"] == len(values) and told["max"] == max(values)
    for percent in PERCENTILES:
        assert told[f"p{percent}"] == pytest.approx(np.percentile(values, percent, method="inverted_cdf"), rel=0.01)
    assert spread([]) is None and Gaps().spread() is None


OUTCOMES = st.sampled_from(["done", "refused", "failed", "interrupted"])
MAYBE = st.none() | st.floats(0, 2)


@given(
    st.lists(st.tuples(OUTCOMES, *[st.floats(0, 2)] * 3, st.integers(0, 9)), max_size=50),
    st.builds(Limits, MAYBE, MAYBE, MAYBE),
    st.floats(0.1, 100),
)
def test_goodput_is_the_share_of_requests_within_all_limits(
    drawn: Sequence[tuple[Any, ...]], limits: Limits, seconds: float
) -> None:
    records = [
        Record("blt", 0.0, outcome=outcome, first_byte=first, longest_gap=gap, latency=last, bytes=size)
        for outcome, first, gap, last, size in drawn
    ]
    told = summary(Run(Plan(1.0, None, 1, None, 0, 1, 0), records, seconds=seconds), limits)
    table = np.array([(first, gap, last) for _, first, gap, last, _ in drawn]).reshape(-1, 3)
    most = np.array([np.inf if limit is None else limit for limit in limits])
    done = np.array([outcome == "done" for outcome, *_ in drawn], dtype=bool)
    within = int(((table <= most).all(axis=1) & done).sum())
    counted = [record for record in records if record.outcome != "interrupted"]
    assert told["goodput"]["within"] == within and told["requests"] == len(counted)
    assert told["goodput"]["share"] == (within / len(counted) if counted else None)
    assert told["goodput"]["per_second"] == pytest.approx(within / seconds)
    assert told["bytes_per_second"] == pytest.approx(sum(record.bytes for record in counted) / seconds)


def test_arrivals_are_poisson_and_depend_on_the_seed() -> None:
    gaps = np.diff([0.0, *islice(poisson(50.0, 1), 20_000)])
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03) and gaps.std() == pytest.approx(1 / 50, rel=0.03)
    # Of an exponential distribution, and of no even one.
    assert (gaps > 1 / 50).mean() == pytest.approx(np.exp(-1), abs=0.02)
    first, again, other = ([*islice(poisson(50.0, seed), 3)] for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("text", ["", "0", "5-2", "a", "-3", "1-"])
def test_wrong_lengths_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be a length such as 100"):
        Range.parse(text)


def test_lists_of_numbers_and_weights_are_read() -> None:
    assert parse_numbers("1,2.5") == [1, 2.5] and Range.parse("7") == (7, 7) and Range.parse("7-9") == (7, 9)
    assert parse_weights("blt:2, blt-d") == {"blt": 2, "blt-d": 1}
    for numbers in ("", "0", "nan", "inf", "1,,2"):
        with pytest.raises(ValueError, match="must be a positive number"):
            parse_numbers(numbers)
    for weights in ("", "blt:0", "blt:x", "blt,blt", ":2", "blt:inf"):
        with pytest.raises(ValueError, match="must be decoders with positive weights"):
            parse_weights(weights)


def test_a_workload_is_drawn_from_its_seed(tmp_path: Path) -> None:
    text, lines = tmp_path / "text", tmp_path / "lines.jsonl"
    text.write_text("äbc\n" * 500)
    lines.write_text('{"prompt": "one"}\n\n{"prompt": [5, 6]}\n')

    def drawn(seed: int, files: list[Path], lengths: Range | None, count: int = 400) -> list[dict[str, Any]]:
        texts = Texts(files, lengths)
        workload = Workload(texts, Range(3, 5), {"blt": 3, "blt-d": 1}, {"temperature": 1}, seed)
        return [asked.body for asked in islice(workload, count)]

    bodies = drawn(1, [text], Range(10, 20))
    assert bodies == drawn(1, [text], Range(10, 20)) != drawn(2, [text], Range(10, 20))
    assert {body["max_tokens"] for body in bodies} == {3, 4, 5}
    assert {len(body["prompt"].encode()) for body in bodies} >= {*range(11, 20)}
    assert all(8 <= len(body["prompt"].encode()) <= 20 for body in bodies)
    assert 0.65 < np.mean([body["decoder"] == "blt" for body in bodies]) < 0.85
    assert len({body["seed"] for body in bodies}) == 400
    assert [body["prompt"] for body in drawn(1, [lines], None, 3)] == ["one", [5, 6], "one"]
    assert [body["prompt"] for body in drawn(1, [lines], Range(1, 1), 2)] == ["o", [5]]
    assert all(len(body["prompt"]) > 200 for body in drawn(1, [], None, 3))
    lines.write_text('{"text": "one"}\n')
    with pytest.raises(ValueError, match="line 1 must be an object with the field prompt"):
        Texts([lines], None)


def test_open_and_closed_loops_measure_every_request(tiny_server: str, tmp_path: Path) -> None:
    html, records = tmp_path / "report.html", tmp_path / "records.jsonl"
    flags = ["--requests", "12", "--max-tokens", "8", "--ignore-eos", "--decoder", "blt,blt-s"]
    flags += ["--first-byte-limit", "60", "--latency-limit", "60", "--gap-limit", "60"]
    result = load(tiny_server, *flags, "--rate", "40,80", "--json", f"--html={html}", f"--records={records}")
    assert result.exit_code == 0, result.stderr
    content = json.loads(result.stdout)
    assert content["workload"]["fields"]["model"] == "tiny"
    for run, rate in zip(content["runs"], (40, 80), strict=True):
        assert run["rate"] == rate and run["outcomes"] == {"done": 12, "refused": 0, "failed": 0}
        assert run["bytes"] == 12 * 8 and run["finish_reasons"] == {"length": 12}
        assert run["goodput"] == {"within": 12, "share": 1.0, "per_second": pytest.approx(12 / run["seconds"])}
        assert sum(part["requests"] for part in run["by_decoder"].values()) == 12
        assert run["first_byte_seconds"]["p50"] <= run["latency_seconds"]["p50"]
    told = [json.loads(line) for line in records.read_text().splitlines()]
    assert len(told) == 24 and all(record["sent"] >= record["planned"] for record in told)
    page = html.read_text()
    assert not re.search(r"(?:src|href)=|url\(|@import|<script", page)
    drawings = re.findall(r"<svg.*?</svg>", page)
    assert len(drawings) == 8 and all(minidom.parseString(drawing) for drawing in drawings)
    closed = load(tiny_server, *flags, "--concurrency", "3")
    assert closed.exit_code == 0 and "3 at a time: 12 done" in closed.stdout
    assert "100.0% of the requests done within the limits" in closed.stdout


async def test_latency_counts_from_the_planned_time_where_the_client_had_to_wait() -> None:
    """One request may be open; it does not end for half a second, while others become due."""
    client = ScriptedClient()
    plan = Plan(50.0, None, 5, None, 0, 1, 0)
    asked = Workload(Texts([], None), Range(1, 1), {}, {"prompt": "wait", "temperature": 0}, 0)
    async with serving(client) as http:
        pool = Pool(str(http.base_url).rstrip("/"), "/v1/completions", None, 20)
        asyncio.get_running_loop().call_later(0.5, client.release.set)
        run = await measure(plan, pool, asked, lambda *_: None)
        pool.close()
    assert [record.outcome for record in run.records] == ["done"] * 5
    for record in run.records:
        assert record.planned < 0.4 < record.ended
        assert record.latency == pytest.approx(record.ended - record.planned)
        assert record.first_byte is not None and record.first_byte > 0.5 - record.planned - 0.02
    assert [record.planned for record in run.records] == [*islice(poisson(50.0, 0), 5)]
    assert run.records[-1].sent > 0.45


BUSY = answer(503, b'{"error": {"message": "full", "code": "queue_full"}}', "retry-after: 0")
EVENT = b'data: {"id": "c", "model": "m", "choices": [{"index": 0, "text": "\xc3\xa4b", "finish_reason": "stop"}]}\n\n'
HALF_A_PAIR = EVENT.replace(b'"text": "', b'"text": "\\ud83d')
WHOLE = answer(200, EVENT + b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("said", "outcome", "kind"),
    [
        (WHOLE, "done", None),
        (b"HTTP/1.1 200 OK\r\n\r\n" + EVENT + b"data: [DONE]\n\n", "done", None),
        (BUSY, "refused", "503 queue_full"),
        (answer(503, b"no"), "failed", "503"),
        (answer(400, b'{"error": {"message": "wrong", "code": "invalid_value"}}'), "failed", "400 invalid_value"),
        (answer(200, EVENT), "failed", "no whole stream"),
        (answer(200, b'data: {"error": {"message": "gone", "code": "dead"}}\n\n'), "failed", "error event dead"),
        (answer(200, b"data: {}\n\n"), "failed", "no completion"),
        (answer(200, HALF_A_PAIR), "failed", "no completion"),
        (answer(200, b"data: " + b"[" * 100_000 + b"\n\n"), "failed", "no completion"),
        (WHOLE[:-9], "failed", "connection lost"),
        (b"SSH-2.0\r\n", "failed", "no HTTP"),
        (b"", "failed", "connection lost"),
    ],
)
def test_every_end_of_a_request_has_its_kind(said: bytes, outcome: str, kind: str | None) -> None:
    with scripted(said) as (url, _):
        result = load(url, "--model", "m", "--concurrency", "1", "--requests", "1", "--json")
    (run,) = json.loads(result.stdout)["runs"]
    assert run["outcomes"][outcome] == 1 and result.exit_code == (outcome == "failed")
    assert [error["kind"] for error in run["errors"]] == ([kind] if kind else [])
    assert run["bytes"] == (3 if EVENT in said else 0)


def test_an_address_that_no_connection_takes_is_refused() -> None:
    result = load("http://a..b:80", "--model", "m", "--concurrency", "1", "--requests", "1")
    assert result.exit_code == 1 and "url: must be like http://127.0.0.1:8000, not 'http://a..b:80'" in result.stderr


def test_refusals_are_sent_again_only_if_asked_for() -> None:
    flags = ["--model", "m", "--concurrency", "1", "--requests", "1", "--json"]
    with scripted(BUSY, WHOLE) as (url, seen):
        result = load(url, *flags, "--retries", "1", "--api-key", "secret")
    (run,) = json.loads(result.stdout)["runs"]
    assert result.exit_code == 0 and run["outcomes"]["done"] == 1 and run["retries"] == 1
    assert all(b"Authorization: Bearer secret" in request for request in seen)


async def test_a_silent_server_times_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pool = Pool(f"http://127.0.0.1:{listener.getsockname()[1]}", "/", None, 0.1)
        with pytest.raises(TimeoutError, match=r"no byte came for 0\.1 s"):
            await pool.post(b"{}", lambda *_: None)


@pytest.mark.parametrize("after", [0.0, 0.7])
async def test_a_request_moves_to_a_new_connection_only_where_the_idle_one_was_lost(after: float) -> None:
    """The first connection stays open after its answer, and is closed on the next request, or while that waits."""
    kept = WHOLE.replace(b"connection: close\r\n", b"")
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"{}"))
        writer.write(kept)
        if len(seen) == 1:
            seen.append(await reader.readuntil(b"{}"))
            await asyncio.sleep(after)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        pool = Pool(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "/x", None, 5)
        assert (await pool.post(b"{}", lambda *_: None)).status == 200
        if after:
            with pytest.raises(Lost):
                await pool.post(b"{}", lambda *_: None)
        else:
            assert (await pool.post(b"{}", lambda *_: None)).status == 200
        pool.close()
    assert len(seen) == (2 if after else 3) and all(request.startswith(b"POST /x HTTP/1.1\r\n") for request in seen)


def test_ctrl_c_ends_a_run_with_what_there_is(tiny_server: str, tmp_path: Path) -> None:
    records = tmp_path / "records"
    command = [
        *COMMAND,
        "load",
        "--url",
        tiny_server,
        "--rate",
        "30,1",
        "--duration",
        "100",
        "--max-tokens=4",
        "--json",
    ]
    with subprocess.Popen(
        [*command, "--records", records], cwd=ROOT, stdout=subprocess.PIPE, preexec_fn=heed_interrupts
    ) as process:
        while not records.exists():
            time.sleep(0.02)
        time.sleep(0.4)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    (run,) = json.loads(out)["runs"]
    assert run["interrupted"] and run["outcomes"]["done"] > 0 and run["seconds"] < 20


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give either --rate or --concurrency"),
        (["--rate", ""], "--rate: must be a positive number"),
        (["--concurrency", ""], "--concurrency: must be a positive number"),
        (["--rate", "x"], "--rate: must be a positive number"),
        (["--concurrency", "1.5"], "must be whole numbers, not '1.5'"),
        (["--rate", "1", "--body", "[]"], "must be a JSON object, not '[]'"),
        (["--rate", "1", "--max-tokens", "9-1"], "not '9-1'"),
    ],
)
def test_wrong_flags_are_named(flags: list[str], message: str) -> None:
    result = load("http://127.0.0.1:1", *flags)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())


def test_a_report_that_cannot_be_written_is_told_before_the_load(tmp_path: Path) -> None:
    none = tmp_path / "none"
    for html, why in ((none / "x.html", f"{none} is no directory"), (tmp_path, f"{tmp_path} is a directory")):
        flags = ["--model", "m", "--concurrency", "1", "--requests", "1", "--html", str(html)]
        result = load("http://127.0.0.1:1", *flags)
        assert (result.exit_code, result.stderr, result.stdout) == (1, f"fastblt: --html: {why}\n", "")


def test_a_server_out_of_reach_is_one_line() -> None:
    result = load("http://127.0.0.1:1", "--rate", "1")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1 and "Traceback" not in result.stderr


def test_a_closed_loop_does_not_storm_a_server_that_is_gone() -> None:
    result = load("http://127.0.0.1:1", "--model", "m", "--concurrency", "2", "--duration", "0.3", "--json")
    (run,) = json.loads(result.stdout)["runs"]
    assert result.exit_code == 1 and 2 <= run["outcomes"]["failed"] <= 10
    assert run["errors"][0]["kind"] == "no connection"


PLACES = st.just(0.0) | st.floats(1e-9, 1e6)


@given(st.lists(st.tuples(PLACES, PLACES), max_size=20), st.booleans())
@example(points=[(999999.9999999999, 0.0)], log_x=True)
def test_every_chart_is_xml_whose_points_lie_inside(points: list[tuple[float, float]], log_x: bool) -> None:
    drawing = chart("<a>", "x & y", '"', [Series("<&>", points, 1)], log_x=log_x)
    assert bool(drawing) == any(x > 0 or not log_x for x, _ in points)
    if drawing:
        tree = minidom.parseString(drawing)
        for pair in tree.getElementsByTagName("polyline")[0].getAttribute("points").split():
            x, y = map(float, pair.split(","))
            assert 60 <= x <= 640 and 30 <= y <= 260


def test_a_chart_of_many_points_stays_small() -> None:
    drawing = chart("", "", "", [Series("", [(i, i) for i in range(MOST_POINTS * 20)], 0, is_line=False)])
    assert drawing.count("<circle") == MOST_POINTS
