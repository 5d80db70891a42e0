"""Runs a stage: directly, or on a CUDA device as a recorded graph of kernels.

The device computes a small stage in less time than the host needs to launch its kernels one by one. A CUDA graph
launches them all together, but always with the same shapes and addresses. So arrays are padded to one of a few lengths,
and every combination of lengths that occurs is recorded once, over its own buffers.
"""

import gc
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import inf

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..transfer import record_event, to_device
from .plan import Arrays

Stage = Callable[[Mapping[str, Tensor]], Tensor]
"""From a stage's inputs to its output; also writes caches."""

MOST_GRAPH_ROWS = 256
"""More rows than this keep the device busy without a graph."""
MOST_RECORDINGS = 512
"""Recordings hold memory; the least recently used is dropped first."""
LEAST_PAGES = 64
"""Shorter lists of pages are padded to this, to need fewer recordings."""
LEAST_TILE_PAGES = 4
"""The same for the pages of one tile, or of one sequence in a table."""


class Eager:
    """Implements `engine.step.plan.Padding`, and runs stages directly.

    floor: fewest rows that make rows independent of each other.
    """

    least_pages = 0
    records = False
    recording_seconds = 0.0
    """How long all recordings took, and the compiling that each begins with; infinite during one."""

    def __init__(self, device: torch.device, floor: int) -> None:
        self._device = device
        self._floor = floor

    def rows(self, n: int) -> int:
        return max(n, self._floor)

    def parts(self, n: int, rows: int) -> int:
        return n

    @property
    def num_recorded(self) -> int:
        return 0

    def most_pages(self, n: int) -> int:
        return n

    def run(
        self,
        name: str,
        stage: Stage,
        rows: int,
        arrays: Arrays,
        tensors: Mapping[str, Tensor],
        key: object,
        launching: Callable[[], None],
    ) -> Tensor:
        """The output of `stage` over `rows` rows. Its inputs are `arrays`, copied to the device, and `tensors`, which
        are on it.

        name, key: distinguish the stage's recordings, in addition to the inputs' shapes. launching: called once the
        inputs are on their way, right before the stage. The output is valid until the stage runs again.
        """
        if self._device.type == "cpu":
            inputs = {name: torch.from_numpy(a) for name, a in arrays.items()}
        else:
            inputs = unpack(to_device(pack(arrays), self._device), arrays)
        launching()
        return stage({**inputs, **tensors})


class Graphs(Eager):
    """Records stages as CUDA graphs and replays them. One buffer takes all arrays of a stage in a single copy.

    On other devices it runs the stage over the same padded buffers, so that tests see the same shapes and addresses.
    """

    least_pages = LEAST_PAGES
    records = True

    def __init__(self, device: torch.device, floor: int) -> None:
        super().__init__(device, floor)
        self._recordings: OrderedDict[object, _Recording] = OrderedDict()
        self._num_recorded = 0
        self._recorder = Recorder(device) if device.type == "cuda" else None

    def rows(self, n: int) -> int:
        return super().rows(n) if n > MOST_GRAPH_ROWS else padded(max(n, self._floor))

    def parts(self, n: int, rows: int) -> int:
        return n if rows > MOST_GRAPH_ROWS else rows

    def most_pages(self, n: int) -> int:
        return max(_power_of_two(n), LEAST_TILE_PAGES)

    def run(
        self,
        name: str,
        stage: Stage,
        rows: int,
        arrays: Arrays,
        tensors: Mapping[str, Tensor],
        key: object,
        launching: Callable[[], None],
    ) -> Tensor:
        if rows > MOST_GRAPH_ROWS:
            return super().run(name, stage, rows, arrays, tensors, key, launching)
        shapes = tuple(a.shape for a in arrays.values()), tuple((n, t.shape) for n, t in tensors.items())
        found = self._recordings.get((name, key, shapes))
        if found is None:
            began, before = time.monotonic(), self.recording_seconds
            self.recording_seconds = inf
            try:
                found = _Recording(stage, arrays, tensors, self._device, self._recorder)
            finally:
                self.recording_seconds = before + time.monotonic() - began
            self._recordings[name, key, shapes] = found
            self._num_recorded += 1
            if len(self._recordings) > MOST_RECORDINGS:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end((name, key, shapes))
        return found.replay(arrays, tensors, launching)

    @property
    def num_recorded(self) -> int:
        return self._num_recorded


class Recorder:
    """Makes CUDA graphs. All are recorded on one side stream and share their memory: each may overwrite what another
    has left there.

    `torch.cuda.graph` would wait for the device and empty the allocators' caches every time, which makes later
    allocations slow.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._memory = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A graph of `work`, which is also run once, and where its output is and will be, outside the shared memory."""
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            # The first run compiles kernels, which must not happen while recording.
            output = work().clone()
            with _no_collection():
                # Other threads may allocate, copy and query events meanwhile.
                graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
                try:
                    output.copy_(work())
                finally:
                    graph.capture_end()
        current.wait_stream(self._stream)
        return graph, output


@contextmanager
def _no_collection() -> Iterator[None]:
    """Stops the garbage collector: it must not free graphs and pinned memory during a recording."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class _Recording:
    """A stage over fixed buffers. recorder: None runs it directly."""

    def __init__(
        self,
        stage: Stage,
        arrays: Arrays,
        tensors: Mapping[str, Tensor],
        device: torch.device,
        recorder: Recorder | None,
    ) -> None:
        self._stage = stage
        self._packed = torch.empty(sum(a.size for a in arrays.values()), dtype=torch.int64, device=device)
        on_host = torch.empty(self._packed.shape, dtype=torch.int64)
        self._on_host = on_host.pin_memory() if device.type == "cuda" else on_host
        self._numbers = self._on_host.numpy()
        self._tensors = {name: torch.empty_like(t) for name, t in tensors.items()}
        self._inputs = {**unpack(self._packed, arrays), **self._tensors}
        self._graph: torch.cuda.CUDAGraph | None = None
        self._has_run = False
        self._copied: torch.cuda.Event | None = None
        if recorder:
            self._fill(arrays, tensors)
            self._graph, self._output = recorder.record(lambda: stage(self._inputs))
            self._has_run = True

    def replay(self, arrays: Arrays, tensors: Mapping[str, Tensor], launching: Callable[[], None]) -> Tensor:
        """Runs the stage; once after it was recorded, that has run it: a pass over a block must not run twice."""
        if self._has_run:
            self._has_run = False
            launching()
            return self._output
        self._fill(arrays, tensors)
        launching()
        if self._graph is None:
            self._output = self._stage(self._inputs)
        else:
            self._graph.replay()
        return self._output

    def _fill(self, arrays: Arrays, tensors: Mapping[str, Tensor]) -> None:
        if self._copied is not None:
            # The copy of the last step's buffer may not have finished.
            self._copied.synchronize()
        pack(arrays, self._numbers)
        self._packed.copy_(self._on_host, non_blocking=True)
        if self._packed.is_cuda:
            self._copied = record_event(self._packed.device)
        for name, tensor in tensors.items():
            self._tensors[name].copy_(tensor)


def padded(n: int) -> int:
    """`n` rounded up to one of 1, 2, 3, 4, 6, 8, 12, 16, ...: at most half as much again."""
    power = _power_of_two(n)
    return power * 3 // 4 if n <= power * 3 // 4 and power > 2 else power


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def pack(arrays: Arrays, out: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """All arrays in one, end to end."""
    return np.concatenate([a.ravel() for a in arrays.values()], out=out)


def unpack(packed: Tensor, arrays: Arrays) -> dict[str, Tensor]:
    """Views of the parts of `packed`, in the arrays' shapes."""
    parts = packed.split([a.size for a in arrays.values()])
    return {name: part.view(a.shape) for (name, a), part in zip(arrays.items(), parts, strict=True)}
