"""A process that measures cases, one after another. One that hangs, or leaves the device in an error, is replaced."""

import traceback
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from .question import Case, NotHere
from .scale import Scale


class Worker:
    def __init__(self) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def measure(self, module: str, scale: Scale, case: Case, limit_s: float) -> Case:
        """The case's figures, by the question in `module`. Raises NotHere as that does, RuntimeError if it failed, came
        to no end within `limit_s` or took the process with it; the worker is of no more use then."""
        self._pipe.send((module, scale, case))
        if not self._pipe.poll(limit_s):
            raise RuntimeError(f"no answer within {limit_s:.0f} s")
        try:
            kind, told = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"its process ended with {self._process.exitcode}") from None
        if kind == "figures":
            figures: Case = told
            return figures
        raise NotHere(told) if kind == "not here" else RuntimeError(told)

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
        except Exception as error:  # whatever it is, the report has it
            traceback.print_exc()
            pipe.send(("failed", f"{type(error).__name__}: {error}"))
