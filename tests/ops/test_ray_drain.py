"""Replicas on Ray Serve go without harm: when there are more than the load needs, and when all is to end."""

from pathlib import Path

from tests.ops.ray_cluster import LONG, NANO, Stream, alive, running_application, running_cluster, until


def test_a_replica_that_is_taken_away_finishes_what_it_runs_and_so_does_a_shutdown(tmp_path: Path) -> None:
    log = tmp_path / "application.log"
    flags = "--max-replicas 2 --target-requests 2 --upscale-delay 0 --downscale-delay 1 --drain-seconds 60"
    with running_cluster() as cluster, running_application(cluster, NANO, log, *flags.split()) as application:
        load = [Stream(application, prompt=f"{number} ", **LONG) for number in range(8)]
        both = application.ready(2)
        slow = {"temperature": 0, "ignore_eos": True, "max_tokens": 600}
        streams = [Stream(application, prompt=application.prompts_for(r, 1)[0], **slow) for r in both]
        for stream in load:
            stream.join()
        (left,) = application.ready(1)
        assert not all(stream.done for stream in streams)
        assert [stream.join().finish_reason for stream in streams] == ["length"] * 2
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
    assert not alive(left.pid) and not alive(left.engine_pid)
