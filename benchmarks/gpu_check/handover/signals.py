"""T2: how long programs of one kernel take to pass data to each other: by a barrier, or by tagged words.

Every phase takes the largest value of the last one and adds 1, so that a wait that does not wait gives a wrong sum.
"""

import torch
from torch import Tensor

from kernels.lang import IN_INTERPRETER, blocks, jit, tl

from .question import UNDECIDED, Case, find
from .reads import read_kernel
from .scale import Scale
from .tile import MOST_POLLS, WARPS, arrive, await_words, together, wait

TITLE = "a hand-over within a kernel"
WORDS = 1024
"""Activations passed by words: a row of the local stages."""
PHASES_PER_LINK = 10
LOADING_ROUNDS = 100_000
"""Blocks of 16 KB for each program that streams during the chain: longer than a dozen chains take."""
NEEDED_US, TOO_SLOW_US = 0.77, 1.0
"""Microseconds that 0.7 of the bandwidth needs for blt on the 1B shape, and those that put it out of reach."""


@jit
def barrier_kernel(x_ptr, counter_ptr, first, last, PROGRAMS: tl.constexpr, MOST: tl.constexpr):
    """x (2, PROGRAMS) int32: phase p reads buffer p % 2 and writes the other."""
    program, i = tl.program_id(0), tl.arange(0, PROGRAMS)
    for phase in range(first, last):
        if phase > first:
            wait(counter_ptr, (phase - first) * PROGRAMS, MOST)
        top = tl.max(tl.load(x_ptr + phase % 2 * PROGRAMS + i, cache_modifier=".cg"), 0)
        tl.store(x_ptr + (phase + 1) % 2 * PROGRAMS + program, top + 1)
        arrive(counter_ptr)


@jit
def words_kernel(word_ptr, first, last, WORDS: tl.constexpr, OWN: tl.constexpr, MOST: tl.constexpr):
    """words (2, WORDS) int32, a value above and the phase that reads it below: phase p reads buffer p % 2."""
    own = tl.program_id(0) * OWN + tl.arange(0, OWN)
    for phase in range(first, last):
        values = await_words(word_ptr + phase % 2 * WORDS + tl.arange(0, WORDS), phase & 0xFFFF, MOST)
        word = ((tl.max(values, 0) + 1) << 16) | ((phase + 1) & 0xFFFF)
        tl.store(word_ptr + (phase + 1) % 2 * WORDS + own, tl.zeros((OWN,), tl.int32) + word)


def cases(scale: Scale) -> list[Case]:
    return [{"by": by, "memory": memory} for memory in ("idle", "busy") for by in ("barrier", "words")]


def measure(scale: Scale, case: Case) -> Case:
    phases = scale.links * PHASES_PER_LINK
    programs = scale.programs
    words = max(WORDS // programs, 1) * programs if scale.on_gpu else 4 * programs
    counter = torch.zeros(1, dtype=torch.int32, device=scale.device)
    buffer = torch.zeros(2, programs if case["by"] == "barrier" else words, dtype=torch.int32, device=scale.device)

    def launch(first: int, last: int) -> None:
        if case["by"] == "barrier":
            barrier_kernel[(programs,)](
                buffer, counter, first, last, PROGRAMS=programs, MOST=MOST_POLLS, num_warps=WARPS,
                **together(scale.device),
            )  # fmt: skip
        else:
            words_kernel[(programs,)](
                buffer, first, last, WORDS=words, OWN=words // programs, MOST=MOST_POLLS, num_warps=WARPS,
                **together(scale.device),
            )  # fmt: skip

    def chain() -> None:
        counter.zero_()
        buffer.zero_()
        # In the interpreter a program ends before the next one begins: there it is a launch per phase.
        for first, last in zip(range(phases), range(1, phases + 1), strict=True) if IN_INTERPRETER else [(0, phases)]:
            launch(first, last)

    chain()
    found = {"us": 0.0}
    if case["memory"] == "busy" and scale.on_gpu:
        with _Loaded(scale) as loaded:
            found["us"] = scale.work_us(chain, times=1) / phases
            found["loaded to the end"] = loaded.lasts()
    else:
        found["us"] = scale.work_us(chain, times=1) / phases
    top = buffer[phases % 2]
    values = top if case["by"] == "barrier" else top >> 16
    if not bool((values == phases).all()):
        raise RuntimeError(f"phases did not wait for each other: {values.tolist()[:4]}, not {phases}")
    return found


class _Loaded:
    """A program on every multiprocessor streams memory during the measurement."""

    def __init__(self, scale: Scale) -> None:
        self._programs = torch.cuda.get_device_properties(scale.device).multi_processor_count
        self._count = blocks(2 * scale.streamed, 2 * 8192) + self._programs
        self._x = torch.ones(self._count * 8192, device=scale.device, dtype=torch.bfloat16)
        self._out: Tensor = torch.zeros(self._programs, device=scale.device)
        self._rounds = LOADING_ROUNDS if scale.streamed > 1 else 1
        self._stream, self._done = torch.cuda.Stream(), torch.cuda.Event()

    def __enter__(self) -> "_Loaded":
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            grid = (self._programs,)
            read_kernel[grid](self._x, self._out, self._count, self._rounds, BLOCK=8192, num_warps=WARPS)
            self._done.record()
        return self

    def lasts(self) -> bool:
        """Whether they still stream."""
        return not self._done.query()

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize()


def decide(rows: list[Case]) -> str:
    # A row whose load ended early did not measure a busy memory.
    rows = [row for row in rows if row.get("loaded to the end", True)]
    words = [row["us"] for row in rows if row["by"] == "words"]
    barrier = find(rows, by="barrier", memory="idle")
    if not words or not barrier:
        return UNDECIDED
    most = max(words)
    if most <= NEEDED_US:
        verdict = "0.7 of the bandwidth is in reach for blt"
    else:
        verdict = "0.7 is out of reach for blt" if most > TOO_SLOW_US else "0.7 needs other stages beside each other"
    busy = find(rows, by="barrier", memory="busy")
    said = f"a barrier takes {barrier['us']:.2f} us" + (f" ({busy['us']:.2f} beside a stream)" if busy else "")
    return f"{said}, words {min(words):.2f} to {most:.2f} us; {NEEDED_US} are needed: {verdict}."
