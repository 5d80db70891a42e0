"""Copies between host and device without waiting: an ordinary copy waits for all work launched before it."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import cache
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(numbers: NDArray[Any], device: torch.device) -> Tensor:
    """Starts to copy numbers to the device, after the work launched so far; no copy if that is the host."""
    tensor = torch.from_numpy(numbers)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def record_event(device: torch.device, *, timing: bool = False) -> torch.cuda.Event:
    """An event after the work launched so far."""
    event = torch.cuda.Event(enable_timing=timing)
    event.record(_stream(device))
    return event


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all launches, cached: looking it up takes longer than recording an event."""
    return torch.cuda.default_stream(device)


class Readback:
    """Starts to copy a tensor; `wait` is for when its values are needed."""

    def __init__(self, tensor: Tensor) -> None:
        self._values, self._copied = tensor, None
        if tensor.is_cuda:
            self._values = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)
            self._copied = record_event(tensor.device)

    def wait(self) -> Tensor:
        """The tensor on the host."""
        if self._copied:
            self._copied.synchronize()
        return self._values


def read(*tensors: Tensor) -> list[Any]:
    """Each tensor as a list, with one copy from the device for all."""
    return read_async(*tensors)()


def read_async(*tensors: Tensor) -> Callable[[], list[Any]]:
    """Begins to `read`; call the result for the lists. Later launches do not delay it."""
    if tensors[0].device.type == "cpu":
        return lambda: [tensor.tolist() for tensor in tensors]
    copy = Readback(packed(tensors))
    return lambda: unpacked(copy.wait(), tensors)


def packed(tensors: Seq[Tensor]) -> Tensor:
    """All of them end to end, as float64: it holds every float32, and every integer below 2 ** 53."""
    return torch.cat([tensor.flatten().double() for tensor in tensors])


def unpacked(values: Tensor, tensors: Seq[Tensor]) -> list[Any]:
    """The lists of `tensors`, whose values are here."""
    parts = values.split([tensor.numel() for tensor in tensors])
    return [part.to(tensor.dtype).view(tensor.shape).tolist() for part, tensor in zip(parts, tensors, strict=True)]
