"""The size of the questions: the 1B shape's matrices on a GPU, toy ones in Triton's interpreter."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from engine.costs import bandwidth
from kernels.lang import blocks, overlap


class Stack(NamedTuple):
    """A stack of transformer layers, with as many key and value heads as heads."""

    layers: int
    dim: int
    ffn: int
    heads: int

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(out, in) of a layer's products."""
        return {
            "qkv": (3 * self.dim, self.dim),
            "o": (self.dim, self.dim),
            "gate, up": (2 * self.ffn, self.dim),
            "down": (self.dim, self.ffn),
        }


class TokenModel(NamedTuple):
    """The matrices of a Llama."""

    layers: int
    dim: int
    ffn: int
    kv_dim: int
    vocab: int


@dataclass(frozen=True, slots=True)
class Scale:
    """links: kernels, or phases of a persistent kernel, in a chain. programs: of a kernel that fills the device.
    rows: numbers of rows of a product, ascending. streamed: bytes of matrices in a chain before one repeats, more than
    a cache holds. resident: bytes that each half of the second-level cache holds."""

    device: torch.device
    links: int
    programs: int
    rows: tuple[int, ...]
    stacks: Mapping[str, Stack]
    tokens: TokenModel
    streamed: int
    resident: int

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def overlaps(self) -> bool:
        """Whether a kernel may begin before the one before it has ended (programmatic dependent launch)."""
        return self.on_gpu and overlap(torch.empty(1, device=self.device))["OVERLAP"]

    def briefly(self) -> "Scale":
        """A scale just large enough to compile every kernel."""
        return replace(self, links=2, streamed=1)

    def matrices(self, out: int, width: int, count: int | None = None) -> Tensor:
        """Random, of variance 1 / width, `count`, or more than any cache holds: (N, out, width) bfloat16."""
        count = count or max(1, min(self.links, blocks(self.streamed, 2 * out * width)))
        drawn = torch.randn(count, out, width, device=self.device, dtype=torch.bfloat16, generator=self._generator())
        return drawn.mul_(width**-0.5)

    def rows_of(self, rows: int, width: int) -> Tensor:
        """Random: (rows, width) bfloat16."""
        return torch.randn(rows, width, device=self.device, dtype=torch.bfloat16, generator=self._generator())

    def chain_us(self, links: Sequence[Callable[[], object]]) -> float:
        """Microseconds per link of a chain that is one graph, the median of five runs."""

        def work() -> None:
            for link in links:
                link()

        return self.work_us(bandwidth.recorded(work, self.device)) / len(links)

    def work_us(self, work: Callable[[], object], *, times: int = 3) -> float:
        """Microseconds of one `work()` among `times` in a row, after a warm-up, so that the device never waits for a
        launch; the median of five, or of one in the interpreter, whose times mean nothing."""
        if not self.on_gpu:
            start = time.perf_counter()
            work()
            return 1e6 * (time.perf_counter() - start)
        found: list[float] = []
        for _ in range(bandwidth.REPEATS):
            # Only this stream: others may run at the same time on purpose.
            torch.cuda.current_stream().synchronize()
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            work()
            began.record()
            for _ in range(times):
                work()
            ended.record()
            ended.synchronize()
            found.append(1000 * began.elapsed_time(ended) / times)
        return statistics.median(found)

    def _generator(self) -> torch.Generator | None:
        # Tensors without storage hold no numbers to draw.
        return None if self.device.type == "meta" else torch.Generator(self.device).manual_seed(0)


def scale_for(device: str, *, quick: bool) -> Scale:
    """The 1B shape's stacks and a Llama of 1B; or, if `quick`, sizes for seconds in the interpreter."""
    where = torch.device(device)
    if quick:
        stacks = {"patcher": Stack(2, 16, 24, 2), "decoder": Stack(1, 16, 40, 2), "global": Stack(1, 32, 40, 2)}
        return Scale(where, 1, 4, (1, 3), stacks, TokenModel(1, 32, 64, 16, 260), 1, 1 << 10)
    stacks = {
        "patcher": Stack(14, 768, 2048, 12), "decoder": Stack(9, 1024, 2816, 16), "global": Stack(25, 2048, 5632, 16)
    }  # fmt: skip
    return Scale(where, 200, 128, (1, 8, 16), stacks, TokenModel(16, 2048, 8192, 512, 128_256), 512 << 20, 16 << 20)
