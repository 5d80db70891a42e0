"""Measures what a running server's steps cost, from outside: as its clients see it, with all that HTTP takes.

The server should be idle otherwise, have the flags it will be used with, and run on a machine like those to be.
"""

import asyncio
import random
import re
import statistics
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, islice
from typing import Any
from urllib.parse import urlsplit

import httpx
import orjson
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from engine.costs.calibration import TEXT
from engine.simulation.costs import PromptCost, ReplicaCosts, RoundCost
from engine.simulation.load import Traffic

MOST_SEQUENCES = 256
"""More side by side are not measured."""
SECONDS = 1.0
"""Least of generation side by side that counts, for each number of sequences."""
SHORT = SECONDS / 8
"""After a turn with less of it, texts of the next are twice as long."""
MOST_TURNS = 64
"""So many count, however little they are, where texts cannot be longer."""
LEAST_TEXTS = 64
"""Of which the measured streams are taken in turn."""
SWEEPS = 3
"""Over all numbers of sequences: a machine may be slower for some seconds."""
LEAST_OUTPUT = 64
"""Bytes that a measured stream has at least."""
TIMED_PROMPTS = 9
"""Of each length."""
SHORT_PROMPT = 16
PROMPT_TIMES = (0.5, 1, 2, 4)
"""Of the mean length: later rows cost more."""
CONNECT_SECONDS, WHOLE_SECONDS = 10.0, 600.0
EVENT = re.compile(rb"^data: (\{.*\})\r?$", re.MULTILINE)


class MeasureError(ValueError):
    """The server cannot be reached, or does not answer as it should."""


@dataclass(frozen=True, slots=True)
class Stream:
    """A completion. times: when events came, in seconds after `began`, and how many characters there were by then.
    ended: when all was there. num_cached: bytes of its prompt that were found in the prefix cache."""

    times: list[tuple[float, int]]
    ended: float
    num_bytes: int
    num_cached: int

    @property
    def first(self) -> float:
        return self.times[0][0]

    def bytes_at(self, when: float) -> float:
        """That had come by then, if all characters have as many bytes."""
        index = bisect_right([at for at, _ in self.times], when)
        return self.times[index - 1][1] / max(self.times[-1][1], 1) * self.num_bytes if index else 0.0


@dataclass(frozen=True, slots=True)
class Target:
    """A server. url: without a path. headers: of every request."""

    url: str
    model: str
    decoder: str
    headers: Mapping[str, str]

    @classmethod
    def of(cls, url: str, decoder: str, key: str | None) -> "Target":
        """Asks the server for its model. Raises MeasureError."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        where = urlsplit(url)
        if where.scheme not in ("http", "https") or not where.hostname:
            raise MeasureError(f"--url: must be as http://127.0.0.1:8000, not {url!r}")
        base = f"{where.scheme}://{where.netloc}"
        try:
            card = _get_object(base, "/v1/models", headers)["data"][0]
            name, decoders = card["id"], list(card["decoders"])
        except (LookupError, TypeError):
            raise MeasureError(f"--url: {base} is not a fastblt server of this version") from None
        if decoder not in decoders:
            raise MeasureError(f"--decoder: {base} has {', '.join(decoders)}, not {decoder!r}")
        return cls(base, name, decoder, headers)


def measure(target: Target, traffic: Traffic, tell: Callable[[str], None]) -> ReplicaCosts:
    """Takes a minute or so. tell: what is measured now. Raises MeasureError."""
    limits = _limits(target)
    version = _get_object(target.url, "/version", target.headers)
    if busy := limits["fastblt_running_sequences"] + limits["fastblt_waiting_sequences"]:
        raise MeasureError(f"{target.url} runs {busy:.0f} other sequences: it must be idle to be measured")
    max_sequences = int(limits["fastblt_running_capacity_sequences"])
    texts = Texts()
    tell("warming up")
    asyncio.run(_together(target, texts.prompts(2, traffic), LEAST_OUTPUT))
    counts, found = _counts(min(max_sequences, MOST_SEQUENCES)), dict[int, list[RoundCost]]()
    prompts = cycle(texts.prompts(max(counts[-1], LEAST_TEXTS), traffic))
    for count in counts * SWEEPS:
        tell(f"{count} side by side")
        cost = _side_by_side(target, prompts, count, max(round(traffic.output_bytes), LEAST_OUTPUT))
        found.setdefault(count, []).append(cost)
    rounds = [_mean(costs) for costs in found.values()]
    tell("prompts")
    prompt_costs, request_seconds = _prompts(target, texts, traffic, rounds[0].byte_seconds)
    return ReplicaCosts(
        of={name: version[name] for name in ("version", "commit", "model", "kernels")} | {"url": target.url},
        decoder=target.decoder,
        rounds=rounds,
        prompts=prompt_costs,
        request_seconds=request_seconds,
        dtype=_dtype(target),
        prompt_rows=int(limits["fastblt_step_prompt_rows"]),
        max_step_rows=int(limits["fastblt_step_capacity_rows"]),
        max_sequences=max_sequences,
        cache_bytes=int(limits["cache_bytes"]),
        page_size=int(limits["page_size"]),
    )


def _mean(costs: Sequence[RoundCost]) -> RoundCost:
    num_bytes = statistics.mean(one.num_bytes for one in costs)
    byte = statistics.mean(one.byte_seconds for one in costs)
    return RoundCost(costs[0].sequences, byte * num_bytes, num_bytes)


def _counts(most: int) -> list[int]:
    """1, 2, 4 and so on, and the most."""
    return sorted({*(1 << power for power in range(most.bit_length())), most})


def _side_by_side(target: Target, prompts: Iterator[str], count: int, output_bytes: int) -> RoundCost:
    """From the moment when all have begun to the moment when the first ends. The bytes of a step are the engine's own
    figure: an event of a stream may have those of several. prompts: each turn takes the next `count`, as drafts stand
    in some texts more often than in others. output_bytes: of a text, or more on a server that has written so many
    before they can be timed."""
    seconds, num_bytes, committed, steps = 0.0, 0.0, 0.0, 0.0
    size, may_grow = output_bytes, True
    for _ in range(MOST_TURNS):
        if seconds >= SECONDS:
            break
        chosen = list(islice(prompts, count))
        # They are read before, so that all begin soon after each other.
        asyncio.run(_together(target, chosen, 1))
        before = _generated(target)
        try:
            streams = asyncio.run(_together(target, chosen, size))
        except MeasureError:
            if size == output_bytes:
                raise
            # The server takes no texts as long as that.
            size, may_grow = size // 2, False
            continue
        begin, end = max(one.first for one in streams), min(one.times[-1][0] for one in streams)
        if end <= begin:
            # The first ended before the last began: with longer outputs more of them overlap.
            begin, end = min(one.first for one in streams), max(one.times[-1][0] for one in streams)
        if may_grow and end - begin < SHORT:
            size *= 2
        seconds += end - begin
        num_bytes += statistics.mean(one.bytes_at(end) - one.bytes_at(begin) for one in streams)
        after = _generated(target)
        committed, steps = committed + after[0] - before[0], steps + after[1] - before[1]
    if not num_bytes:
        raise MeasureError(f"{target.url}: the longest texts that it takes end before they can be timed")
    each = max(committed / max(steps, 1.0) / count, 1.0)
    return RoundCost(count, seconds * each / num_bytes, each)


def _prompts(target: Target, texts: "Texts", traffic: Traffic, byte: float) -> tuple[list[PromptCost], float]:
    """Those of several lengths up to some times the mean, and the seconds of a request outside of the engine. byte:
    seconds of a step that generates one."""
    mean = max(traffic.prompt_bytes, 4 * SHORT_PROMPT)
    lengths = [SHORT_PROMPT, *(round(times * mean) for times in PROMPT_TIMES)]
    # A text begins with BOS, and one byte is generated.
    most = _longest(target) - 2
    lengths = sorted({min(length, most) for length in lengths})

    def median(length: int) -> float:
        alone = [asyncio.run(_together(target, [texts.prompt(length)], 1)) for _ in range(TIMED_PROMPTS)]
        return statistics.median(streams[0].first for streams in alone)

    # Longer ones never cost less.
    took = list(accumulate((median(length) for length in lengths), max))
    row = (took[1] - took[0]) / (lengths[1] - lengths[0])
    first = max(row * lengths[0], 1e-9)
    request = max(took[0] - first - byte, 0.0)
    return [PromptCost(n, first + at - took[0]) for n, at in zip(lengths, took, strict=True)], request


def _longest(target: Target) -> int:
    """Most bytes of a text."""
    return int(_get_object(target.url, "/version", target.headers)["max_length"])


class Texts:
    """Prompts of which none begins as another, so that no prefix is cached: not by an earlier measurement, either."""

    def __init__(self) -> None:
        self._draw = random.Random()
        self._words = TEXT.split()

    def prompt(self, length: int) -> str:
        words, size = list[str](), 0
        while size < length:
            words.append(self._draw.choice(self._words))
            size += len(words[-1]) + 1
        return f"{self._draw.randrange(10**8):08} {' '.join(words)}"[:length]

    def prompts(self, count: int, traffic: Traffic) -> list[str]:
        return [self.prompt(max(round(traffic.prompt_bytes), 1)) for _ in range(count)]


async def _together(target: Target, prompts: Sequence[str], max_tokens: int) -> list[Stream]:
    """All at the same time; the times are those of one clock."""
    began = time.perf_counter()
    try:
        return list(await asyncio.gather(*(stream(target, text, max_tokens, began) for text in prompts)))
    except OSError as error:
        raise MeasureError(f"{target.url}: {str(error) or type(error).__name__}") from error


async def stream(target: Target, prompt: str, max_tokens: int, began: float) -> Stream:
    """began: on `time.perf_counter`. Nothing is parsed before the end, as the client must not limit the figures.
    Raises MeasureError, OSError."""
    where = urlsplit(target.url)
    fields = {"model": target.model, "prompt": prompt, "max_tokens": max_tokens, "decoder": target.decoder}
    asked = {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    content = orjson.dumps(fields | asked)
    headers = {"Host": where.netloc, "Content-Type": "application/json", "Content-Length": str(len(content))}
    head = "".join(f"{name}: {value}\r\n" for name, value in (headers | dict(target.headers)).items())
    port = where.port or (443 if where.scheme == "https" else 80)
    async with asyncio.timeout(CONNECT_SECONDS):
        reader, writer = await asyncio.open_connection(where.hostname, port, ssl=where.scheme == "https" or None)
    chunks = list[tuple[float, bytes]]()
    try:
        async with asyncio.timeout(WHOLE_SECONDS):
            writer.write(f"POST /v1/completions HTTP/1.1\r\n{head}Connection: close\r\n\r\n".encode() + content)
            while chunk := await reader.read(1 << 16):
                chunks.append((time.perf_counter() - began, chunk))
    finally:
        writer.close()
    return _parsed(chunks)


def _parsed(chunks: Sequence[tuple[float, bytes]]) -> Stream:
    """chunks: of an answer, each with the time when it came."""
    times, size, usage = list[tuple[float, int]](), 0, dict[str, Any]()
    answer = b"".join(chunk for _, chunk in chunks)
    came = [(at, end) for (at, _), end in zip(chunks, accumulate(len(chunk) for _, chunk in chunks), strict=True)]
    ends = [end for _, end in came]
    for event in EVENT.finditer(answer):
        found = orjson.loads(event[1])
        usage = found.get("usage") or usage
        # An id that is no byte has no text.
        if choices := found.get("choices"):
            size += sum(len(choice["text"]) for choice in choices)
            times.append((came[bisect_left(ends, event.end())][0], size))
    if not usage or not times or b"[DONE]" not in answer[-64:]:
        told = answer.rpartition(b"\r\n\r\n")[2][-300:].decode(errors="replace")
        raise MeasureError(f"not a whole stream of text: {told}")
    cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    return Stream(times, chunks[-1][0], usage["completion_tokens"], cached)


def _generated(target: Target) -> tuple[float, float]:
    """Bytes that this decoder has generated so far, and the engine's steps."""
    found = {}
    for sample in _samples(target):
        if sample.labels.get("decoder", target.decoder) == target.decoder:
            found[sample.name] = sample.value
    return found["fastblt_committed_bytes_total"], found["fastblt_steps_total"]


def _limits(target: Target) -> dict[str, float]:
    """Of the metrics: those without labels, and what the caches hold. Raises MeasureError."""
    found = {"cache_bytes": 0.0, "page_size": 0.0}
    for sample in _samples(target):
        if not sample.labels:
            found[sample.name] = sample.value
        elif sample.name == "fastblt_cache_info":
            # With the scratch page, which is planned with the others but belongs to no sequence.
            found["cache_bytes"] += (int(sample.labels["pages"]) + 1) * int(sample.labels["page_bytes"])
            if sample.labels["pool"] == "global":
                found["page_size"] = int(sample.labels["page_rows"])
    if "fastblt_step_capacity_rows" not in found:
        raise MeasureError(f"{target.url}/metrics is not of a fastblt server of this version")
    return found


def _dtype(target: Target) -> Any:
    return next(sample.labels["dtype"] for sample in _samples(target) if sample.name == "fastblt_build_info")


def _samples(target: Target) -> Iterator[Sample]:
    """All values of `/metrics`. Raises MeasureError."""
    for family in text_string_to_metric_families(_get(target.url, "/metrics", target.headers).decode()):
        yield from family.samples


def _get_object(url: str, path: str, headers: Mapping[str, str]) -> dict[str, Any]:
    try:
        found = orjson.loads(_get(url, path, headers))
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise MeasureError(f"--url: {url}{path} is no JSON object: this is not a fastblt server")
    return found


def _get(url: str, path: str, headers: Mapping[str, str]) -> bytes:
    try:
        response = httpx.get(url + path, headers=dict(headers), timeout=CONNECT_SECONDS)
    except httpx.HTTPError as error:
        raise MeasureError(f"--url: {url}{path}: {error}") from error
    if response.status_code != 200:
        raise MeasureError(f"--url: {url}{path} answered {response.status_code}: {response.text[:200]}")
    return response.content
