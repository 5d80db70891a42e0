"""What a server's steps cost, measured from outside."""

import math
import re
import time
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import pytest

from engine.checkpoint import load
from engine.simulation.load import Traffic
from engine.simulation.replica import simulated_engine
from server.capacity import measure as measuring
from server.capacity.measure import MeasureError, Stream, Target, measure
from tests.serving import API_KEYS, RunningServer, StartServer

TRAFFIC = Traffic(40, 24, 0.5)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "SECONDS", 0.05)
    monkeypatch.setattr(measuring, "SWEEPS", 1)
    monkeypatch.setattr(measuring, "TIMED_PROMPTS", 3)


def test_a_server_is_measured_with_its_limits(start_server: StartServer, tiny_model: Path) -> None:
    server = start_server("--max-sequences", "6", "--page-size", "32", "--max-step-rows", "48", "--dtype", "bfloat16")
    told: list[str] = []
    found = measure(Target.of(server.url, "blt-s", None), TRAFFIC, told.append)
    assert told == ["warming up", *(f"{n} side by side" for n in (1, 2, 4, 6)), "prompts"]
    assert (found.max_sequences, found.page_size, found.decoder) == (6, 32, "blt-s")
    assert (found.dtype, found.max_step_rows) == ("bfloat16", 48)
    assert found.prompt_rows <= 48 and found.cache_bytes > 1 << 20
    assert [one.sequences for one in found.rounds] == [1, 2, 4, 6]
    assert all(one.seconds > 0 and one.num_bytes >= 1 for one in found.rounds)
    # Rounds of drafts give more than a byte.
    assert found.rounds[0].num_bytes > 1
    rows = [one.rows for one in found.prompts]
    assert rows == sorted(set(rows)) and rows[0] == 16 and all(one.seconds > 0 for one in found.prompts)
    assert 0 <= found.request_seconds < 1
    simulated, _ = simulated_engine(load(tiny_model).config, found, 4.0)
    pages = {f'fastblt_pages_capacity{{pool="{name}"}}': count for name, count in simulated.limits.pages.items()}
    assert server.metrics("fastblt_pages_capacity") == pages


def test_the_longest_prompt_that_is_timed_leaves_room_for_a_byte(server: RunningServer) -> None:
    target = Target.of(server.url, "blt", None)
    costs, _ = measuring._prompts(target, measuring.Texts(), TRAFFIC._replace(prompt_bytes=2000), 0.001)
    assert costs[-1].rows == 4094


def test_side_by_side_all_texts_have_their_turn(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    target, together, asked = Target.of(start_server().url, "blt-s", None), measuring._together, []

    async def noted(target: Target, prompts: Sequence[str], max_tokens: int) -> list[Stream]:
        asked.append((tuple(prompts), max_tokens))
        return await together(target, prompts, max_tokens)

    monkeypatch.setattr(measuring, "_together", noted)
    monkeypatch.setattr(measuring, "SECONDS", 0.05)
    texts = measuring.Texts().prompts(3, TRAFFIC)
    prompts = cycle(texts)
    for _ in range(2):
        measuring._side_by_side(target, prompts, 2, 64)
    read, ran = ([chosen for chosen, most in asked if (most == 1) == is_read] for is_read in (True, False))
    assert read == ran and {text for chosen in ran for text in chosen} == set(texts)


def test_texts_that_end_too_soon_are_measured_longer(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target.of(start_server("--max-tokens-limit", "32").url, "blt", None)
    together, asked = measuring._together, []

    async def noted(target: Target, prompts: Sequence[str], max_tokens: int) -> list[Stream]:
        asked.append(max_tokens)
        return await together(target, prompts, max_tokens)

    monkeypatch.setattr(measuring, "_together", noted)
    # On any machine every text is too short, and no turn is enough.
    monkeypatch.setattr(measuring, "SHORT", math.inf)
    monkeypatch.setattr(measuring, "SECONDS", math.inf)
    monkeypatch.setattr(measuring, "MOST_TURNS", 6)
    prompts = cycle(measuring.Texts().prompts(3, TRAFFIC))
    assert 0 < measuring._side_by_side(target, prompts, 1, 16).byte_seconds < 0.1
    # 64 are refused.
    assert asked[::2] == [1] * 6 and asked[1::2] == [16, 32, 64, 32, 32, 32]
    with pytest.raises(MeasureError, match="max_tokens: must be at most 32, not 33"):
        measuring._side_by_side(target, prompts, 1, 33)
    monkeypatch.setattr(measuring, "MOST_TURNS", 1)
    # A text of one byte comes in one event.
    with pytest.raises(MeasureError, match="the longest texts that it takes end before they can be timed"):
        measuring._side_by_side(target, prompts, 1, 1)


def test_a_busy_server_is_not_measured(start_server: StartServer) -> None:
    server = start_server()
    target = Target.of(server.url, "blt", None)
    endless = {"prompt": "x", "max_tokens": 4000, "ignore_eos": True, "stream": True, "n": 64}
    with server.client() as http, http.stream("POST", "/v1/completions", json=endless):
        while not measuring._limits(target)["fastblt_running_sequences"]:
            time.sleep(0.01)
        with pytest.raises(MeasureError, match=r"runs \d+ other sequences: it must be idle"):
            measure(target, TRAFFIC, print)


def test_a_target_is_a_server_that_has_the_decoder_and_takes_the_key(
    server: RunningServer, keyed: RunningServer
) -> None:
    with pytest.raises(MeasureError, match=re.escape(f"--decoder: {server.url} has blt, blt-s, ")):
        Target.of(server.url, "fast", None)
    with pytest.raises(MeasureError, match="/v1/models answered 401: "):
        Target.of(keyed.url, "blt", None)
    assert Target.of(keyed.url + "/v1", "blt", API_KEYS[0]).url == keyed.url


def test_no_prompt_begins_as_one_of_an_earlier_measurement() -> None:
    lengths = (16, 40, 400)
    prompts = [texts.prompt(length) for texts in (measuring.Texts(), measuring.Texts()) for length in lengths]
    assert [len(prompt) for prompt in prompts] == [*lengths, *lengths]
    assert len({prompt[:8] for prompt in prompts}) == 6


def test_a_stream_whose_only_id_has_no_text_is_whole() -> None:
    event = b'data: {"choices":[{"index":0,"text":"","finish_reason":"length"}]}\n\n'
    usage = b'data: {"choices":[],"usage":{"completion_tokens":1}}\n\ndata: [DONE]\n\n'
    found = measuring._parsed([(0.5, event), (0.75, usage)])
    assert (found.first, found.ended, found.num_bytes, found.bytes_at(1.0)) == (0.5, 0.75, 1, 0.0)


async def test_an_answer_that_is_no_whole_stream_is_an_error(server: RunningServer) -> None:
    target = Target.of(server.url, "blt", None)
    with pytest.raises(MeasureError, match="not a whole stream of text: .*max_tokens"):
        await measuring.stream(target, "x", -1, 0.0)
