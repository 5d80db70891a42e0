"""When stages began and ended, on the clock of the device that runs them."""

import time
from typing import Any, Protocol

import torch

from ..transfer import record_event

Moment = Any
"""A float on a host, an event on a CUDA device."""


class Clock(Protocol):
    """waits: whether the host runs the stages itself, so that its planning is part of their time."""

    waits: bool

    def now(self) -> Moment: ...

    def passed(self, moment: Moment) -> bool:
        """Whether the device has reached that moment, so that its time is known."""
        ...

    def seconds(self, began: Moment, ended: Moment) -> float: ...


class HostClock:
    waits = True

    def now(self) -> float:
        return time.perf_counter()

    def passed(self, moment: float) -> bool:
        return True

    def seconds(self, began: float, ended: float) -> float:
        return ended - began


class DeviceClock:
    """The host is ahead of the device: events in the device's queue record when it reached them."""

    waits = False

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> torch.cuda.Event:
        return record_event(self._device, timing=True)

    def passed(self, moment: torch.cuda.Event) -> bool:
        return bool(moment.query())

    def seconds(self, began: torch.cuda.Event, ended: torch.cuda.Event) -> float:
        return float(began.elapsed_time(ended)) / 1000


def clock_of(device: torch.device) -> Clock:
    return HostClock() if device.type == "cpu" else DeviceClock(device)
