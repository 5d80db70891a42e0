"""Requests that use all that the engine can do, the same at every call: what `benchmarks.same_answers` runs.

Plain data, as JSON has it, so that checkouts can read it whose types have other names. Every model gets the same
requests: one that has no block diffusion refuses some of them, which is an answer, too.
"""

import random
from collections.abc import Iterator
from itertools import cycle
from typing import Any, NamedTuple

from .generate import TEXT

Fields = dict[str, Any]
Schedule = list[tuple[int, str, Any]]
"""(step, "add", a request's fields) or (step, "abort", its id), in order of steps."""


class Run(NamedTuple):
    """An engine and what it is asked for. config: fields of EngineConfig, without the model. timed: whether measured
    times decide how bytes are made, so that only bytes can be compared."""

    name: str
    config: Fields
    schedule: Schedule
    timed: bool = False


WAYS: dict[str, Fields] = {
    "blt": {},
    "blt-s-1": {"decoder": "blt-s", "draft_length": 1},
    "blt-s-4": {"decoder": "blt-s", "draft_length": 4},
    "blt-s-8": {"decoder": "blt-s"},
    "blt-s-32": {"decoder": "blt-s", "draft_length": 32},
    "blt-d": {"decoder": "blt-d"},
    "blt-d-confidence": {"decoder": "blt-d", "unmask": {"rule": "confidence", "alpha": 0.3}},
    "blt-d-entropy": {"decoder": "blt-d", "unmask": {"rule": "entropy", "gamma": 2.0}},
    "blt-d-minus-max": {"decoder": "blt-d", "unmask": {"rule": "entropy", "gamma": 1.0, "minus_max": True}},
    "blt-d-one-step": {"decoder": "blt-d", "block_size": 4, "unmask": {"rule": "one_step"}},
    "blt-d-top-p": {"decoder": "blt-d", "unmask": {"rule": "confidence", "top_p": 0.5}},
    "blt-d-finish": {"decoder": "blt-d", "finish_patch": True},
    "blt-dv": {"decoder": "blt-dv"},
    "blt-dv-3": {"decoder": "blt-dv", "block_size": 3, "unmask": {"rule": "entropy", "gamma": 2.0}},
}
AUTO: dict[str, Fields] = {"auto": {"decoder": "auto"}}
"""With `exact` off measured times would decide about its text, too."""
SAMPLINGS: tuple[Fields, ...] = (
    {"temperature": 0},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 1.2, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "seed": 2},
    {"temperature": 0, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    {"temperature": 0.6, "logit_bias": {"36": 3.0, "14": -100.0}, "frequency_penalty": -0.1, "seed": 2**63 + 5},
)
REPORTS: tuple[Fields, ...] = (
    {},
    {"logprobs": 3},
    {"trace": True},
    {"patches_from": 0, "trace": True},
    {"logprobs": 0, "prompt_logprobs": True},
    {"patches_from": 90, "logprobs": 1},
    {"prompt_logprobs": True, "logprobs": 2, "trace": True, "patches_from": 0},
)
ENDS: tuple[Fields, ...] = (
    {"ignore_eos": True},
    {},
    # The stop strings "\n" and "self.", as msgspec has bytes.
    {"stop": ["Cg==", "c2VsZi4="]},
    {"ignore_eos": True, "sample_index": 3, "log_fields": {"request": "x"}},
)
PRIORITIES = (0, 0, -1, 0, 2)
PREFIX_LENGTHS = (0, 70, 150, 260)
"""Bytes that prompts share: the prefix cache keeps blocks of 64."""
LONGEST = 1024
"""Ids that sequences may hold."""
SEED = 19


def runs(tokens: int = 80, *, kernels: str | None = None, threads: int = 1) -> list[Run]:
    """tokens: how many ids most requests generate."""
    common = {"num_threads": threads, "max_length": LONGEST, "run_ahead": "never"}
    roomy = {"cache_bytes": 256 << 20, **common}
    # As little cache as holds one sequence.
    crowded = {"page_size": 16, "max_step_rows": 48, "max_sequences": 12, **common}
    every, few = schedule(WAYS, tokens, SAMPLINGS), schedule(WAYS, tokens, SAMPLINGS[:2])
    # Where measured times decide how many bytes a step makes, they decide what an abort cuts off, too.
    auto = schedule(AUTO, tokens, SAMPLINGS, aborts=False)
    ahead = schedule(WAYS, tokens, SAMPLINGS[:2], aborts=False)
    return [
        Run("roomy", {"kernels": kernels, **roomy}, every),
        Run("crowded", {"kernels": kernels, **crowded}, few),
        Run("bfloat16", {"kernels": "torch", "dtype": "bfloat16", "prefix_cache": False, **roomy}, few),
        Run("auto", {"kernels": kernels, **roomy}, auto, timed=True),
        Run("ahead", {"kernels": kernels, **roomy, "run_ahead": "always"}, ahead, timed=True),
    ]


def schedule(ways: dict[str, Fields], tokens: int, samplings: tuple[Fields, ...], *, aborts: bool = True) -> Schedule:
    """Requests of all ways with all samplings, special ones and refused ones, up to a few at a step."""
    draw, step = random.Random(SEED), 0
    found: Schedule = []
    requests = [*mixed(ways, tokens, samplings), *special(ways, tokens), *refused(ways)]
    draw.shuffle(requests)
    for request in requests:
        found.append((step, "add", request))
        if aborts and draw.random() < 0.1:
            found.append((step + draw.choice((0, 1, 5, 9)), "abort", request["id"]))
        step += draw.choice((0, 0, 0, 1, 2))
    twice = {**requests[0], "id": "twice"}
    found += [(step, "abort", "unknown"), (step, "add", twice), (step, "add", twice)]
    return sorted(found, key=lambda entry: entry[0])


def mixed(ways: dict[str, Fields], tokens: int, samplings: tuple[Fields, ...]) -> Iterator[Fields]:
    """Every way with every sampling; reports, ends and priorities take turns, so that they meet in many pairs."""
    draw, reports, ends, priorities = random.Random(SEED), cycle(REPORTS), cycle(ENDS), cycle(PRIORITIES)
    for way, how in ways.items():
        for number, sampling in enumerate(samplings):
            yield {
                "id": f"{way}/{number}",
                "prompt_ids": prompt(draw),
                "max_tokens": draw.randint(tokens // 2, tokens + tokens // 2),
                "sampling": sampling,
                "priority": next(priorities),
                **next(reports),
                **next(ends),
                **how,
            }


def special(ways: dict[str, Fields], tokens: int) -> Iterator[Fields]:
    """What is not a matter of decoding."""
    draw = random.Random(SEED + 1)
    for way, how in ways.items():
        common = {"prompt_ids": prompt(draw), "sampling": SAMPLINGS[1], **how}
        yield {"id": f"resumed/{way}", "max_tokens": tokens, "output_ids": text(draw, tokens // 2), **common}
        yield {"id": f"one/{way}", "max_tokens": 1, "trace": True, **common}
    some = {"prompt_ids": prompt(draw), "sampling": SAMPLINGS[0]}
    # The prefix cache knows more of it than its prompt.
    known = [byte + 4 for byte in TEXT.read_bytes()[: max(PREFIX_LENGTHS)]]
    yield {"id": "known", "max_tokens": 300, "output_ids": known[30:], **some, "prompt_ids": [1, *known[:30]]}
    yield {"id": "done", "max_tokens": 3, "output_ids": [104, 105, 106], **some}
    yield {"id": "scores", "max_tokens": 0, "prompt_logprobs": True, "logprobs": 2, **some}
    yield {"id": "patches", "max_tokens": 0, "patches_from": 0, **some}
    yield {"id": "nothing", "max_tokens": 0, **some}
    yield {"id": "late", "max_tokens": tokens, "timeout": 0.0, **some}
    yield {"id": "begins", "max_tokens": tokens, **some, "prompt_ids": [1]}
    yield {"id": "long", "max_tokens": 60, **some, "prompt_ids": [1, *text(draw, 900)]}


def refused(ways: dict[str, Fields]) -> Iterator[Fields]:
    some = {"prompt_ids": [1, 104], "max_tokens": 4}
    yield {"id": "beyond", **some, "prompt_ids": [1, 100_000]}
    yield {"id": "negative", **some, "prompt_ids": [1, -1]}
    yield {"id": "empty", **some, "prompt_ids": []}
    yield {"id": "too-long", **some, "max_tokens": LONGEST}
    yield {"id": "too-far", **some, "output_ids": [104] * 5}
    for decoder in sorted({how.get("decoder", "blt") for how in ways.values()}):
        yield {"id": f"draft/{decoder}", **some, "decoder": decoder, "draft_length": 33}
        yield {"id": f"block/{decoder}", **some, "decoder": decoder, "block_size": 1000}


def prompt(draw: random.Random) -> list[int]:
    """A BOS and bytes; many begin alike, some hold another document or bytes that no text has."""
    shared = TEXT.read_bytes()[: draw.choice(PREFIX_LENGTHS)]
    ids = [1, *(byte + 4 for byte in shared), *text(draw, draw.randint(1, 90))]
    kind = draw.random()
    if kind < 0.15:
        ids += [2, 1, *text(draw, 20)]
    elif kind < 0.25:
        ids += [draw.randrange(260) for _ in range(20)]
    return ids


def text(draw: random.Random, count: int) -> list[int]:
    """The ids of some bytes of code."""
    whole = TEXT.read_bytes()
    start = draw.randrange(len(whole) - count)
    return [byte + 4 for byte in whole[start : start + count]]
