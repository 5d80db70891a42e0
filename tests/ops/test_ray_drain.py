"""Replicas on Ray Serve go without harm: when there are more than the load needs, and when all is to end."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ops.ray_cluster import (
    LONG,
    NANO,
    PROMPTS,
    SECONDS,
    Cluster,
    Stream,
    alive,
    clean_environment,
    load,
    running_application,
    running_cluster,
    until,
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as running:
        yield running


def test_a_model_that_cannot_be_loaded_ends_the_command_with_the_reason(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "application.log"
    with pytest.raises(AssertionError), running_application(cluster, tmp_path / "none", log):
        pass
    (line,) = [line for line in log.read_text().splitlines() if "CRITICAL" in line]
    assert f"{tmp_path}/none: no such directory" in line and "Traceback" not in line


def test_downscaling_and_shutdown_let_replicas_finish_their_requests(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "application.log"
    flags = "--max-replicas 2 --target-requests 2 --upscale-delay 0 --downscale-delay 1 --drain-seconds 60"
    with running_application(cluster, NANO, log, *flags.split()) as application:
        slow = {"n": 3, "ignore_eos": True, "max_tokens": 20000}
        with load(application, 6):
            both = application.ready(2)
            # Once two of them have ended, one replica is enough for the others. It takes Ray half a minute to see that.
            timeouts = zip(PROMPTS, (20, 20, 100, 100), strict=False)
            streams = [Stream(application, prompt=prompt, timeout=timeout, **slow) for prompt, timeout in timeouts]
            for stream in streams:
                stream.begun()
        (left,) = application.ready(1)
        assert not all(stream.done for stream in streams)
        assert {stream.join().finish_reason for stream in streams} <= {"timeout", "length"}
        (gone,) = set(both) - {left}
        until(lambda: not alive(gone.pid) and not alive(gone.engine_pid), "the end of its processes")

        stream = Stream(application, prompt="x", **LONG)
        stream.begun()
        application.process.terminate()
        refused = until(lambda: application.not_ready(), "a drain")
        for answer in (refused, application.complete(prompt="x", max_tokens=1)):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
        assert not stream.done and application.get("/health/live").is_success
        assert stream.join().finish_reason == "length"
        assert application.process.wait(SECONDS) == 0
    assert not alive(left.pid) and not alive(left.engine_pid)


def test_a_second_signal_cuts_the_drain_short(cluster: Cluster, tmp_path: Path) -> None:
    with running_application(cluster, NANO, tmp_path / "log", "--drain-seconds", "600") as application:
        stream = Stream(application, prompt="x", n=3, max_tokens=20000, ignore_eos=True)
        stream.begun()
        application.process.terminate()
        until(lambda: application.not_ready(), "a drain")
        assert not stream.done
        application.process.terminate()
        assert stream.join().events[-1]["error"]["code"] == "draining"
        assert application.process.wait(SECONDS) == 0


def test_few_requests_whose_bytes_wait_start_a_second_replica(cluster: Cluster, tmp_path: Path) -> None:
    flags = "--max-replicas 2 --target-requests 100 --target-queued-bytes 3000 --upscale-delay 0 --max-sequences 1"
    with running_application(cluster, NANO, tmp_path / "log", *flags.split()) as application:
        long = {"max_tokens": 20000, "ignore_eos": True}
        streams = [Stream(application, prompt=prompt, **long) for prompt in PROMPTS[:4]]
        application.ready(2)
        assert not all(stream.done for stream in streams), "there was time"
        for stream in streams:
            # One replica may have to write all of them, one after the other.
            assert stream.join(len(streams) * SECONDS).finish_reason == "length"


def test_closing_the_terminal_drains_the_commands_own_cluster(tmp_path: Path) -> None:
    """The terminal sends SIGHUP to the cluster's processes, too, and twice to the command."""
    log = tmp_path / "application.log"
    own = Cluster("local", clean_environment(tmp_path))
    with running_application(own, NANO, log, "--drain-seconds", "60") as application:
        stream = Stream(application, prompt="x", **LONG)
        stream.begun()
        os.killpg(application.process.pid, signal.SIGHUP)
        refused = until(lambda: application.not_ready(), "a drain")
        assert refused.json()["error"]["code"] == "draining" and not stream.done
        os.killpg(application.process.pid, signal.SIGHUP)
        assert stream.join().finish_reason == "length"
        assert application.process.wait(SECONDS) == 0


def test_the_command_under_nohup_ignores_sighup(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "application.log"
    with running_application(cluster, NANO, log, through=["nohup"]) as application:
        application.process.send_signal(signal.SIGHUP)
        assert application.complete(prompt="x", max_tokens=20).is_success and not application.not_ready()
