"""A process that measures cases, one after another. It is replaced if it hangs or leaves the device in an error."""

import traceback
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from .question import Case, NotHere
from .scale import Scale


class CaseFailed(Exception):
    """A case could not be measured, or its result is wrong."""


class Lost(Exception):
    """The process, or its device, is lost."""


class Worker:
    def __init__(self) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def measure(self, module: str, scale: Scale, case: Case, limit_s: float) -> Case:
        """The case's figures, by the question in `module`. Raises NotHere as that does, CaseFailed if it failed and the
        device is sound, and Lost if it exceeded `limit_s` or broke the process or the device: then this worker is
        unusable."""
        try:
            self._pipe.send((module, scale, case))
            if not self._pipe.poll(limit_s):
                raise Lost(f"no answer within {limit_s:.0f} s")
            kind, told = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise Lost(f"its process ended with {self._process.exitcode}") from None
        if kind == "figures":
            figures: Case = told
            return figures
        raise {"not here": NotHere, "failed": CaseFailed, "lost": Lost}[kind](told)

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: "Connection[Any, Any]") -> None:
    while True:
        try:
            module, scale, case = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("figures", import_module(module).measure(scale, case)))
        except NotHere as why:
            pipe.send(("not here", str(why)))
        except Exception as error:  # any error goes to the report
            traceback.print_exc()
            pipe.send(("failed" if _is_sound(scale) else "lost", f"{type(error).__name__}: {error}"))


def _is_sound(scale: Scale) -> bool:
    """Whether the device still works: after some errors every call fails."""
    try:
        if scale.on_gpu:
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
