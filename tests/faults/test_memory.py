"""Memory is short, and memory stays what it is."""

import asyncio
import os
import resource
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.faults.asking import (
    DECODERS,
    LATE,
    PROMPTS,
    SCHEMA,
    Fields,
    Record,
    ask,
    ask_all,
    check,
    engine_of,
    killed,
    mixed,
    plain,
    private_bytes,
    serving,
    talking,
    undisturbed,
)

POOL = 512 << 20
REQUESTS = int(os.environ.get("FAULTS_REQUESTS", "10000"))
AT_ONCE = 32
MOST_GROWTH = 8 << 20
"""Bytes, for what allocators keep."""


@pytest.mark.faults
async def test_all_complete_with_the_same_bytes_in_a_tenth_of_the_pools(
    tmp_path: Path, record_property: Record
) -> None:
    requests = mixed(24, seed=41)
    small = tmp_path / "small"
    small.mkdir()
    with serving(tmp_path, "--cache-bytes", str(POOL)) as server:
        async with talking(server) as http:
            expected = await undisturbed(http, requests)
    with serving(small, "--cache-bytes", str(POOL // 10)) as server:
        async with talking(server) as http:
            check(requests, await ask_all(http, requests), expected)
            preempted = sum(server.metrics("fastblt_preemptions_total").values())
            assert preempted
            began = time.monotonic()
            too_long = await ask(http, plain(1, 8, prompt="x" * 30_000))
            assert time.monotonic() - began < LATE
            # How many patches these make, only the engine can tell.
            letters = "".join(map(chr, Random(43).choices(range(33, 127), k=8_000)))
            too_many = await ask(http, plain(1, 8, prompt=letters))
    for refused in (too_long, too_many):
        assert refused.error["code"] == "context_length_exceeded", refused.error
    record_property("figure", f"pools at a tenth: all right, {preempted:.0f} preemptions")


@pytest.mark.faults
async def test_streams_go_on_though_the_engine_finds_no_memory(tmp_path: Path, record_property: Record) -> None:
    """It may take no more while mixed streams and long prompts begin: with and without the thread that compiles
    grammars, which it starts when it first needs it."""
    long = "".join(f"def f{number}(x):\n    return x + {number}\n" for number in range(200))
    requests = [*mixed(18, seed=44, most=200), *(plain(number, 40, prompt=long[number:5000]) for number in range(4))]
    ends = 0
    with serving(tmp_path) as server:
        async with talking(server) as http:
            expected = await undisturbed(http, requests)
            for asked in (requests[:4], requests[:6]):
                await killed(server, http)
                await ask_all(http, asked)
                engine = engine_of(server)
                assert engine
                resource.prlimit(engine, resource.RLIMIT_AS, (addresses(engine), resource.RLIM_INFINITY))
                answers = asyncio.gather(*(ask(http, fields) for fields in requests))
                check(requests, await answers, expected)
                if engine_of(server) == engine:
                    resource.prlimit(engine, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                else:
                    ends += 1
                check(requests[:9], await ask_all(http, requests[:9]), expected[:9])
    assert ends
    record_property("figure", f"no memory left for two engines, {ends} ended: all right")


def addresses(pid: int) -> int:
    """Bytes of address space."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()


@pytest.mark.faults
async def test_private_memory_stays_flat(tmp_path: Path, record_property: Record) -> None:
    """FAULTS_REQUESTS requests (10,000) with every field varied; FAULTS_REQUESTS=50000 takes 20 minutes."""
    random, statuses = Random(42), Counter[int]()
    with serving(tmp_path, "--max-queue", "1024") as server:
        engine = engine_of(server)
        assert engine
        async with talking(server) as http:
            marks: list[tuple[int, int]] = []
            for _ in range(10):
                left = REQUESTS // 10

                async def client() -> None:
                    nonlocal left
                    while left > 0:
                        left -= 1
                        statuses[(await ask(http, varied(random))).status] += 1

                await asyncio.gather(*(client() for _ in range(AT_ONCE)))
                marks.append((private_bytes(server.process.pid), private_bytes(engine)))
        assert set(statuses) <= {200, 400} and statuses[200] > statuses[400], statuses
        assert engine_of(server) == engine
    shown = [" ".join(f"{mark[which] >> 20}" for mark in marks) for which in (0, 1)]
    record_property("figure", f"{REQUESTS} requests, {dict(statuses)}: MiB of server {shown[0]}, of engine {shown[1]}")
    for which in (0, 1):
        # The smallest of several: what is in flight, and when it was freed, differs.
        early, late = (min(mark[which] for mark in part) for part in (marks[1:5], marks[7:]))
        assert late - early < MOST_GROWTH, shown


def varied(random: Random) -> Fields:
    """Any fields of a completion, most of them valid."""

    def some(**choices: list[Any]) -> Fields:
        return {name: random.choice(values) for name, values in choices.items() if random.random() < 0.08}

    text = "".join(chr(random.choice([*range(32, 127), 233, 0x4E2D, 0x1F600])) for _ in range(random.randrange(1, 80)))
    prompts: list[Any] = [text, random.choice(PROMPTS), [text, "def "], [random.randrange(260) for _ in text]]
    fields: Fields = {"model": f"nano:{random.choice(DECODERS)}", "prompt": random.choice(prompts)}
    fields |= {"max_tokens": random.randrange(12), "seed": random.randrange(2**31)}
    return fields | some(
        add_special_tokens=[True, False],
        truncate_prompt_tokens=[1, 20, -1],
        temperature=[0, 0.3, 2],
        top_p=[0.1, 0.9],
        n=[1, 2, 4],
        best_of=[1, 3],
        stream=[True],
        logprobs=[0, 1, 5],
        echo=[True],
        stop=["e", ["\n", text[:3]], text],
        presence_penalty=[-1, 2],
        frequency_penalty=[-1, 2],
        logit_bias=[{str(random.randrange(260)): random.uniform(-100, 100)}],
        response_format=[{"type": "json_object"}, {"type": "text"}],
        user=[text],
        draft_length=[1, 4],
        block_size=[4],
        finish_patch=[True],
        exact=[True, False],
        top_k=[-1, 5],
        min_p=[0.1],
        repetition_penalty=[1.2],
        allowed_token_ids=[[random.randrange(4, 260), 36]],
        min_tokens=[1, 3],
        stop_token_ids=[[random.randrange(260)]],
        include_stop_str_in_output=[True],
        ignore_eos=[True],
        cache_salt=[text],
        priority=[-5, 5],
        structured_outputs=[
            {"json": SCHEMA},
            {"regex": f"[a-f{random.randrange(10)}]{{1,9}}"},
            {"choice": [text, "yes"]},
        ],
        trace=[True],
        patches=[True],
        prompt_logprobs=[0, 3],
        return_token_ids=[True],
        return_bytes=[True],
        timeout=[0.001, 5],
    )
