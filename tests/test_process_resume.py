"""The real engine, killed midway: its readers get what an undisturbed run gives, sampling and scores included."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from engine.checkpoint import PRESETS, calibrated, random_tensors, save
from engine.config import BOS_ID, BYTE_OFFSET, EngineConfig
from engine.process.client import EngineClient
from engine.types import Request, SamplingParams
from tests.streams import killer, read

pytestmark = pytest.mark.asyncio

OUTPUT = 96


def ids(text: str) -> list[int]:
    return [BOS_ID, *(byte + BYTE_OFFSET for byte in text.encode())]


def requests(stop: bytes) -> list[Request]:
    sampling = SamplingParams(temperature=0.9, top_p=0.95, frequency_penalty=0.2, seed=11)
    greedy = SamplingParams(temperature=0)
    return [
        Request(id="greedy", prompt_ids=ids("def f(x):"), max_tokens=OUTPUT, sampling=greedy, ignore_eos=True),
        Request(
            id="sampled",
            prompt_ids=ids("import os"),
            max_tokens=OUTPUT,
            sampling=sampling,
            sample_index=1,
            logprobs=3,
            prompt_logprobs=True,
            patches_from=0,
            ignore_eos=True,
        ),
        Request(
            id="stopped",
            prompt_ids=ids("class A"),
            max_tokens=OUTPUT,
            sampling=msgspec.structs.replace(sampling, seed=12),
            stop=[stop],
            ignore_eos=True,
        ),
        Request(id="long", prompt_ids=ids("a long prompt " * 40), max_tokens=OUTPUT, sampling=greedy, ignore_eos=True),
    ]


async def test_streams_of_a_killed_engine_equal_an_undisturbed_run(tmp_path: Path) -> None:
    model = PRESETS["tiny"]
    tensors = random_tensors(model, 0)
    save(tmp_path, calibrated(model, tensors), tensors)
    # Byte by byte: every request makes progress between two crashes.
    config = EngineConfig(model=str(tmp_path), cache_bytes=32 << 20, max_step_rows=64, num_threads=1, run_ahead="never")
    client = EngineClient(config)
    await client.start()
    try:
        free = await read(client, requests(b"\xff\xff\xff")[2])
        # Six bytes that the third request will say late: held back again and again, cut at the end.
        stop = free.text[OUTPUT - 10 : OUTPUT - 4]
        undisturbed = await asyncio.gather(*(read(client, request) for request in requests(stop)))
        assert client.restarts == 0

        # The first dies early. The second dies once the last to be resumed, the longest, has gone on as well.
        first, *others, last = requests(stop)
        killed = await asyncio.gather(
            read(client, first, killer(client, 7)),
            *(read(client, request) for request in others),
            read(client, last, killer(client, 0, spared=1)),
        )
        assert client.restarts == 2
        for before, after in zip(undisturbed, killed, strict=True):
            assert after.ids == before.ids
            assert after.text == before.text
            assert after.finished.reason == before.finished.reason
            assert after.finished.usage.completion_tokens == before.finished.usage.completion_tokens
            assert after.logprobs == before.logprobs
            assert after.prompt_logprobs == before.prompt_logprobs
            assert (after.entropies, after.patch_starts) == (before.entropies, before.patch_starts)
            assert after.finished.cumulative_logprob == before.finished.cumulative_logprob
        assert killed[2].finished.reason == "stop"
        assert len(killed[1].prompt_logprobs) == len(ids("import os"))
        assert len(killed[1].entropies) == len(ids("import os")) + OUTPUT - 1
    finally:
        await client.stop()
