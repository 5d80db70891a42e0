"""Streams that outlive what runs them, on a real Ray cluster: the replica, its machine, the other ingress."""

import os
import signal
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from clients.fastblt_client import Client
from tests.ops.ray_cluster import (
    NANO,
    PROMPTS,
    SECONDS,
    Application,
    Cluster,
    Replica,
    Stream,
    clean_environment,
    load,
    running_application,
    running_cluster,
    until,
)

with warnings.catch_warnings():
    # Ray's own, of which there are some.
    warnings.simplefilter("ignore")
    from ray.cluster_utils import Cluster as Machines

ROUNDS = 10
MIXED: list[dict[str, Any]] = [
    {"max_tokens": 500, "temperature": 0, "ignore_eos": True},
    {"max_tokens": 500, "temperature": 0.9, "seed": 1, "ignore_eos": True, "decoder": "blt-s"},
    {"max_tokens": 250, "temperature": 0.8, "seed": 2, "n": 2, "logprobs": 2, "ignore_eos": True},
    {"max_tokens": 500, "temperature": 1.2, "seed": 3, "frequency_penalty": 0.2, "ignore_eos": True},
    {"max_tokens": 500, "temperature": 0.7, "seed": 4, "echo": True, "ignore_eos": True},
    {"max_tokens": 500, "temperature": 0.9, "seed": 5, "decoder": "blt-dv", "ignore_eos": True},
]
"""Each takes seconds."""


def streams(application: Application, replicas: list[Replica]) -> list[Stream]:
    """Twelve, begun, of which each replica has some."""
    begun = [
        Stream(application, prompt=prompt, **fields)
        for prompt, fields in zip(PROMPTS[: 2 * len(MIXED)], MIXED * 2, strict=True)
    ]
    for stream in begun:
        stream.begun()
    assert all(application.in_progress(replica) for replica in replicas)
    return begun


def assert_undisturbed(application: Application, moved: list[Stream], seconds: float = SECONDS) -> None:
    """They are whole, and equal those of replicas that live."""
    for stream in moved:
        assert stream.join(seconds).finish_reason == "length"
    again = [Stream(application, **stream.fields) for stream in moved]
    for stream, other in zip(moved, again, strict=True):
        assert other.join(seconds).choices == stream.choices


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as running:
        yield running


def test_twelve_streams_survive_a_killed_replica_ten_times_in_a_row(cluster: Cluster, tmp_path: Path) -> None:
    with running_application(cluster, NANO, tmp_path / "log", "--replicas", "2") as application:
        for number in range(ROUNDS):
            pair = application.ready(2)
            moved = streams(application, pair)
            os.kill(pair[number % 2].pid, signal.SIGKILL)
            assert_undisturbed(application, moved)


def test_streams_survive_a_drain_that_is_cut_short(cluster: Cluster, tmp_path: Path) -> None:
    """Ray ends a replica that it removes after --drain-seconds and ten more, whatever runs there."""
    flags = "--max-replicas 2 --target-requests 4 --upscale-delay 0 --downscale-delay 15 --drain-seconds 0 "
    flags += f"--cache-bytes {1 << 29}"
    long = {"n": 4, "max_tokens": 8000, "temperature": 0.9, "ignore_eos": True}
    with running_application(cluster, NANO, tmp_path / "log", *flags.split()) as application:
        with load(application, 10):
            pair = application.ready(2)
        moved = []
        # One after the other, until each replica has one: on a busy machine one may be taken for twice as slow.
        for prompt in PROMPTS:
            moved.append(Stream(application, prompt=prompt, seed=1, **long))
            moved[-1].begun()
            if all(application.in_progress(replica) for replica in pair):
                break
        (left,) = application.ready(1)
        (gone,) = {*pair} - {left}
        until(lambda: f"{gone.id} was lost" in application.log.read_text(), "the end of its patience")
        # They must outlast that, so they are long, and a busy machine takes minutes for them.
        assert_undisturbed(application, moved, 5 * SECONDS)


def test_requests_of_one_ingress_are_untouched_by_the_end_of_another(cluster: Cluster, tmp_path: Path) -> None:
    flags = ["--replicas", "1", "--ingresses", "2"]
    with running_application(cluster, NANO, tmp_path / "log", *flags) as application:
        begun = streams(application, application.ready(1))
        os.kill(ingresses(cluster)[0], signal.SIGKILL)
        for stream in begun:
            stream.wait()
        kept = [stream for stream in begun if stream.done]
        assert 0 < len(kept) < len(begun)
        assert_undisturbed(application, kept)


def test_our_own_client_continues_when_one_of_two_ingresses_ends(cluster: Cluster, tmp_path: Path) -> None:
    """Its connections break, and the other gives the same streams."""
    flags = ["--replicas", "1", "--ingresses", "2"]
    fields = [{**one, "prompt": prompt} for one, prompt in zip(MIXED * 2, PROMPTS[: 2 * len(MIXED)], strict=True)]
    with (
        running_application(cluster, NANO, tmp_path / "log", *flags) as application,
        Client(application.url, api_key=application.key, retries=20) as client,
        ThreadPoolExecutor(len(fields)) as threads,
    ):
        (replica,) = application.ready(1)
        asked = [threads.submit(texts, client, one) for one in fields]
        until(lambda: application.in_progress(replica) == len(fields), "all requests")
        os.kill(ingresses(cluster)[0], signal.SIGKILL)
        found = [one.result() for one in asked]
        # Some were asked for again.
        assert application.metric(replica.id, "fastblt_sequences_total") > sum(one.get("n", 1) for one in fields)
        assert found == [texts(client, one) for one in fields]


def texts(client: Client, fields: dict[str, Any]) -> dict[int, tuple[str, str | None]]:
    """What a stream gives of each choice, and the reason of its end."""
    found: dict[int, tuple[str, str | None]] = {}
    for event in client.stream(model="nano", **fields):
        for choice in event.choices:
            text, reason = found.get(choice.index, ("", None))
            assert reason is None
            found[choice.index] = (text + choice.text, choice.finish_reason)
    return found


def ingresses(cluster: Cluster) -> list[int]:
    """Their processes."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"Ingress" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@contextmanager
def two_machines(home: Path) -> Iterator[tuple[Cluster, Machines]]:
    """A cluster whose first machine has room for one replica; the second is there once the test adds it."""
    environment = clean_environment(home)
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        machines = Machines(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False},
        )
        stack.callback(machines.shutdown)
        yield Cluster(machines.address, environment), machines


def test_streams_survive_the_end_of_a_machine(tmp_path: Path) -> None:
    flags = "--max-replicas 2 --target-requests 2 --upscale-delay 0 --replica-cpus 1"
    with (
        two_machines(tmp_path) as (cluster, machines),
        running_application(cluster, NANO, tmp_path / "log", *flags.split()) as application,
    ):
        (first,) = application.ready(1)
        second = machines.add_node(num_cpus=1, object_store_memory=100_000_000)
        with load(application, 6):
            pair = application.ready(2)
        moved = streams(application, pair)
        machines.remove_node(second, allow_graceful=False)
        assert_undisturbed(application, moved)
        until(lambda: application.replicas()[:1] == [first], "the end of its replica")
