"""How long something takes on a device, and how fast the device's memory is.

A step that is bound by reading weights is at best as fast as the device's memory. What the engine reads per second is
reported as a share of that.
"""

import statistics
import time
from collections.abc import Callable

import torch

from kernels.dispatch import Kernels
from kernels.linear import Matrix

REPEATS = 5
PROBED_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
"""More than caches hold, and small enough to be read a few times while an engine starts. A GPU would read less in a
shorter time than a launch takes."""
PROBED_TIMES = {"cpu": 1, "cuda": 5}
PROBED_WIDTH = 1024


def probe(kernels: Kernels, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Bytes per second. "copy": of a plain copy, reads plus writes. "gemv": of the matrix in one row times a matrix in
    `dtype` by these kernels. Takes a few tenths of a second and `2 * PROBED_BYTES` of memory, on a GPU at most half of
    what is free."""
    size, times = PROBED_BYTES[device.type], PROBED_TIMES[device.type]
    if device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(device)[0] // 4 // PROBED_WIDTH * PROBED_WIDTH)
    copied = copy_rate(device, size, times=times)
    height = size // PROBED_WIDTH // dtype.itemsize
    matrix = kernels.matrix(Matrix(torch.zeros(height, PROBED_WIDTH, dtype=dtype, device=device)))
    x = torch.ones(1, PROBED_WIDTH, dtype=dtype, device=device)
    found = {"copy": copied, "gemv": stream_rate(lambda m: kernels.linear(x, m), [matrix], device, times=times)}
    if device.type == "cuda":
        # Otherwise torch keeps this memory.
        del matrix
        torch.cuda.empty_cache()
    return found


def seconds(work: Callable[[], object], device: torch.device, *, times: int = 1) -> float:
    """Seconds of one `work()`: the median of a few repeats of `times` calls each, after a call that is not counted."""
    work()
    found: list[float] = []
    for _ in range(REPEATS):
        if device.type == "cuda":
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            began.record()
            for _ in range(times):
                work()
            ended.record()
            torch.cuda.synchronize()
            found.append(began.elapsed_time(ended) / 1000 / times)
        else:
            start = time.perf_counter()
            for _ in range(times):
                work()
            found.append((time.perf_counter() - start) / times)
    return statistics.median(found)


def recorded(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`work` as one CUDA graph, so that the host's launches do not count; unchanged on other devices."""
    if device.type != "cuda":
        return work
    # Kernels that are compiled at their first use must not be compiled while recording.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay


def copy_rate(device: torch.device, size: int, times: int = 3) -> float:
    """Bytes per second of a plain copy of `size` bytes, reads plus writes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device, times=times)


def stream_rate(
    multiply: Callable[[Matrix], object], matrices: list[Matrix], device: torch.device, times: int = 3
) -> float:
    """Bytes of matrices read per second by products with each of them in turn."""

    def work() -> None:
        for matrix in matrices:
            multiply(matrix)

    size = sum(matrix.data.numel() * matrix.data.element_size() for matrix in matrices)
    return size / seconds(recorded(work, device), device, times=times)
