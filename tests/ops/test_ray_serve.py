"""Replicas on Ray Serve: a real cluster on this machine, its processes killed under load.

The tests of one application follow each other: it begins with a replica, gets a second one, and loses both at the end.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deploy.ray_settings import RaySettings
from tests.ops.prometheus import running_prometheus
from tests.ops.ray_cluster import (
    LONG,
    NANO,
    PROMPTS,
    Application,
    Cluster,
    Stream,
    alive,
    load,
    running_application,
    running_cluster,
    until,
)
from tests.serving import ROOT, RunningServer, running_server

with warnings.catch_warnings():
    # Ray's own, of which there are some.
    warnings.simplefilter("ignore")
    from ray.serve.schema import ServeDeploySchema

    from deploy.ray_serve import build

DOC = (ROOT / "docs" / "ray.md").read_text()


# What is shipped.


def test_documented_ray_flags_and_defaults_are_the_settings() -> None:
    rows = dict(re.findall(r"^\| `--([\w-]+)` \| (.*) \|$", DOC, re.M))
    assert [name.replace("-", "_") for name in rows] == list(RaySettings.model_fields)
    for name, row in rows.items():
        default = RaySettings.model_fields[name.replace("-", "_")].default
        assert f"`FASTBLT_{name.replace('-', '_').upper()}`" in row
        assert default is None or f"default `{default:g}`" in row


def test_the_committed_configuration_is_valid_for_ray_serve_and_builds() -> None:
    config = yaml.safe_load((ROOT / "deploy" / "ray_serve.yaml").read_text())
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    assert application["import_path"] == f"{build.__module__}:{build.__name__}"
    assert build(application["args"])
    with pytest.raises(ValueError, match="replica_count"):
        build({"model": "x", "replica_count": 2})


def test_what_replicas_do_not_offer_is_refused_wherever_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--admin-key-file is not offered here"):
        build({"model": str(NANO), "admin_key_file": "keys"})
    monkeypatch.setenv("FASTBLT_SSL_CERTFILE", "cert.pem")
    monkeypatch.setenv("FASTBLT_SSL_KEYFILE", "key.pem")
    with pytest.raises(ValueError, match="--ssl-certfile is not offered here"):
        build({"model": str(NANO)})
    command = [sys.executable, "-m", "deploy.ray_serve", "--model", str(NANO)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "--ssl-certfile is not offered here" in done.stderr


# With a cluster.


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as running:
        yield running


@pytest.fixture(scope="module")
def application(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    flags = "--replicas 1 --max-replicas 2 --target-requests 2 --upscale-delay 1 --replica-wait 3 --max-queue 8"
    log = tmp_path_factory.mktemp("ray") / "application.log"
    with running_application(cluster, NANO, log, *flags.split(), "--max-choices", "8") as running:
        yield running


@pytest.fixture(scope="module")
def pair(application: Application) -> Application:
    """Scaled up by load, for good."""
    with load(application, 6):
        application.ready(2)
    return application


SAME: list[dict[str, Any]] = [
    {"prompt": "def add(a, b):\n", "max_tokens": 24, "temperature": 0},
    {"prompt": "import os\n", "max_tokens": 24, "temperature": 0.9, "seed": 7, "n": 2, "logprobs": 2},
    {"prompt": "for i in ", "max_tokens": 24, "seed": 3, "decoder": "blt-s", "stop": ["\n\n"], "echo": True},
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What `fastblt serve` says to SAME, and what models it offers."""

    def say(server: RunningServer) -> list[Any]:
        with server.client() as http:
            answers = [said(http.post("/v1/completions", json={"model": "nano", **fields})) for fields in SAME]
            return [*answers, [model["id"] for model in http.get("/v1/models").json()["data"]]]

    with running_server(NANO, tmp_path_factory.mktemp("plain") / "server.log") as server:
        return say(server)


def said(answer: httpx.Response) -> Any:
    """All but what differs from time to time: names, and what sequences shared with others."""
    body = answer.json()
    del body["id"], body["created"], body["usage"]["fastblt"]
    return body


def test_responses_equal_those_of_a_single_server(plain: list[Any], application: Application) -> None:
    answers = [said(application.complete(**fields)) for fields in SAME]
    assert answers == plain[:-1]
    assert [model["id"] for model in application.get("/v1/models").json()["data"]] == plain[-1]


def test_a_stream_arrives_while_it_is_generated(application: Application) -> None:
    whole = application.complete(prompt="class ", **LONG).json()["choices"][0]["text"]
    stream = Stream(application, prompt="class ", **LONG, stream_options={"include_usage": True}).join()
    assert stream.text == whole
    assert stream.events[-1]["usage"]["completion_tokens"] == LONG["max_tokens"]
    assert len(set(stream.arrivals)) > 5 and stream.arrivals[0] < stream.arrivals[-1] / 2


def test_health_and_version_routes_answer(application: Application) -> None:
    live, ready = application.get("/health/live"), application.get("/health/ready")
    assert (live.status_code, live.json()) == (200, {"status": "live"})
    assert (ready.status_code, ready.json()) == (200, {"status": "ready"})
    assert application.get("/version").json()["model"] == "nano"
    assert application.get("/").headers["content-type"].startswith("text/html")


@pytest.mark.parametrize(
    ("status", "code", "path", "body"),
    [
        (400, "invalid_json", "/v1/completions", b"{"),
        (400, "invalid_value", "/v1/completions", b'{"model": "nano", "prompt": "x", "n": 0}'),
        (404, "model_not_found", "/v1/completions", b'{"model": "none", "prompt": "x"}'),
        (404, "unknown_url", "/v2", b""),
        (405, "method_not_allowed", "/health/live", b""),
        (413, "body_too_large", "/v1/completions", b" " * (5 << 20)),
    ],
)
def test_errors_equal_those_of_a_single_server(
    application: Application, status: int, code: str, path: str, body: bytes
) -> None:
    with application.http() as http:
        answer = http.post(path, content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_all_routes_but_health_and_replicas_require_an_api_key(application: Application) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}):
        answer = httpx.get(f"{application.url}/v1/models", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    for path in ("/health/live", "/health/ready", "/health", "/ping/", "/replicas"):
        assert httpx.get(f"{application.url}{path}").is_success


def test_the_request_id_is_kept_and_logged(application: Application) -> None:
    with application.http() as http:
        given = http.get("/v1/models", headers={"x-request-id": "try-1"})
        made = http.get("/v1/models")
    assert given.headers.get_list("x-request-id") == ["try-1"]
    (request_id,) = made.headers.get_list("x-request-id")
    until(lambda: all(name in application.log.read_text() for name in ("try-1", request_id)), "the log")


def test_a_full_queue_refuses_requests(application: Application) -> None:
    answers: list[httpx.Response] = []

    def burst() -> None:
        threads = [
            threading.Thread(target=lambda: answers.append(application.complete(prompt="x" * 1000, n=8, max_tokens=1)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def refused() -> list[httpx.Response]:
        burst()
        return [answer for answer in answers if answer.status_code == 429]

    answer = until(refused, "429")[0]
    assert answer.json()["error"]["code"] == "queue_full" and answer.headers["retry-after"] == "1"
    assert {answer.status_code for answer in answers} == {200, 429}


def test_a_client_that_disconnects_aborts_its_request(application: Application) -> None:
    def running() -> float:
        return sum(application.metric(r.id, "fastblt_running_sequences") for r in application.replicas())

    body = {"model": "nano", "prompt": "x", "max_tokens": 3000, "stream": True, "ignore_eos": True}
    with application.http() as http, http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert until(running) == 1
    until(lambda: not running(), "no running sequence")


def test_waiting_requests_start_a_second_replica(pair: Application) -> None:
    assert len(pair.ready(2)) == 2


def test_requests_with_one_prefix_go_to_the_replica_that_cached_it(pair: Application) -> None:
    served = {replica.id: pair.metric(replica.id, "fastblt_sequences_total") for replica in pair.ready(2)}
    for number in range(6):
        answer = pair.complete(prompt="y" * 256 + f"{number}", max_tokens=1).json()
        assert (answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 192) == (number > 0)
    grown = {replica: pair.metric(replica, "fastblt_sequences_total") - before for replica, before in served.items()}
    assert sorted(grown.values()) == [0, 6]


def test_requests_for_a_busy_replica_go_to_another(pair: Application) -> None:
    served = {replica.id: pair.metric(replica.id, "fastblt_sequences_total") for replica in pair.ready(2)}
    asked = {"prompt": PROMPTS[0], **LONG, "max_tokens": 3000}
    streams = [Stream(pair, **asked) for _ in range(8)]
    for stream in streams:
        stream.begun()
    # A replica that was slow when it started counts as up to twice as slow, which eight do not outweigh.
    streams += [Stream(pair, **asked) for _ in range(8)]
    assert len({stream.join().text for stream in streams}) == 1
    grown = [pair.metric(replica, "fastblt_sequences_total") - before for replica, before in served.items()]
    assert sum(grown) == 16 and min(grown) >= 1


def test_prometheus_discovers_every_replica(pair: Application, tmp_path: Path) -> None:
    block = re.search(r"^```yaml\n(scrape_configs:\n.*?)^```$", DOC, re.M | re.S)
    assert block
    (scrape,) = yaml.safe_load(block[1].replace("http://127.0.0.1:8000", pair.url))["scrape_configs"]
    for discovery in scrape["http_sd_configs"]:
        discovery["refresh_interval"] = "1s"
    ids = {replica.id for replica in pair.ready(2)}
    with running_prometheus(tmp_path, scrape) as prometheus:

        def instances() -> set[str]:
            series = prometheus.query('fastblt_engine_up{job="fastblt"} == 1')
            return {one["metric"]["instance"] for one in series}

        until(lambda: instances() == ids, "a scrape of both")
    assert pair.get("/metrics").status_code == 404
    assert pair.get("/replicas/none/metrics").status_code == 404


def test_a_killed_engine_is_restarted_and_its_requests_continue(pair: Application) -> None:
    first, second = pair.ready(2)
    streams = [Stream(pair, prompt=prompt, **LONG) for prompt in PROMPTS[:4]]
    for stream in streams:
        stream.begun()
    assert pair.in_progress(first) and pair.in_progress(second)
    os.kill(first.engine_pid, signal.SIGKILL)
    assert [stream.join().finish_reason for stream in streams] == ["length"] * 4
    after = pair.ready(2)
    assert [r.id for r in after] == [first.id, second.id] and after[0].engine_pid != first.engine_pid
    again = [Stream(pair, **stream.fields) for stream in streams]
    assert [stream.join().text for stream in again] == [stream.text for stream in streams]


MIXED: list[dict[str, Any]] = [
    LONG,
    {"max_tokens": 600, "temperature": 0.9, "ignore_eos": True},
    {"max_tokens": 300, "temperature": 0.8, "seed": 3, "n": 2, "logprobs": 2, "ignore_eos": True},
    {"max_tokens": 600, "temperature": 0.9, "seed": 4, "decoder": "blt-s", "ignore_eos": True},
]
"""Streams of every kind, of which each has several seconds to go when its replica dies."""


def test_streams_of_a_killed_replica_go_on_in_another_with_the_same_bytes(pair: Application) -> None:
    first, second = pair.ready(2)
    prompts = [*zip(PROMPTS[:12], MIXED * 3, strict=True)]
    streams = [Stream(pair, prompt=prompt, **fields) for prompt, fields in prompts]
    whole: list[httpx.Response] = []
    asked = {"prompt": PROMPTS[12], **LONG}
    waiting = threading.Thread(target=lambda: whole.append(pair.complete(**asked)))
    waiting.start()
    for stream in streams:
        stream.begun()
    assert pair.in_progress(first) and pair.in_progress(second)
    os.kill(first.pid, signal.SIGKILL)
    reasons = [stream.join().finish_reason for stream in streams]
    waiting.join()
    assert reasons == ["length"] * 12
    assert whole[0].status_code == 200
    until(lambda: not alive(first.engine_pid), "the end of the engine")
    assert {first.id, second.id} & {r.id for r in pair.ready(2)} == {second.id}
    # None but the second has no seed of its own.
    again = [Stream(pair, **stream.fields) for stream in streams]
    for one, other in zip(streams, again, strict=True):
        assert other.join().finish_reason == "length"
        if one.fields["temperature"] == 0 or "seed" in one.fields:
            assert one.choices == other.choices
    assert pair.complete(**asked).json()["choices"] == whole[0].json()["choices"]


def test_a_replica_whose_engine_does_not_restart_is_replaced(pair: Application) -> None:
    first, second = pair.ready(2)

    def gone() -> bool:
        found = [replica for replica in pair.replicas() if replica.id == first.id]
        if found and found[0].engine_pid and alive(found[0].engine_pid):
            os.kill(found[0].engine_pid, signal.SIGKILL)
        assert pair.get("/health/ready").is_success
        return not found

    until(gone, "the end of the replica")
    assert second in pair.ready(2)
    until(lambda: not alive(first.pid), "the end of its process")


def test_without_any_replica_requests_are_refused(pair: Application) -> None:
    for replica in pair.ready(2):
        os.kill(replica.pid, signal.SIGKILL)
    for answer in (pair.complete(prompt="x", max_tokens=1), until(lambda: pair.not_ready(), "not ready")):
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_replica")
        assert answer.headers["retry-after"] == "1"
    assert pair.get("/health/live").is_success
