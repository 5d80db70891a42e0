"""Where a GPU's time between two products goes: measurements to make before building kernels on guesses.

Ten questions, each with a conclusion from its figures. First all kernels are compiled, in parallel; the clock of
`BUDGET_S` starts then. T9 is `ahead`, as it needs the engine. Needs only torch and triton.
"""

import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from queue import Empty, SimpleQueue

import torch

from ..piece import Piece
from ..setting import Setting
from .question import Case, NotHere, Question
from .scale import Scale, scale_for
from .worker import CaseFailed, Lost, Worker

QUESTIONS = {
    "T1": f"{__name__}.empty",
    "T3": f"{__name__}.products",
    "T10": f"{__name__}.token_model",
    "T4": f"{__name__}.reads",
    "T2": f"{__name__}.signals",
    "T11": f"{__name__}.norms",
    "T8": f"{__name__}.widening",
    "T6": f"{__name__}.branches",
    "T7": f"{__name__}.conditions",
    "T5": f"{__name__}.stack",
}
"""Most valuable first; those whose programs wait for each other, and might hang, come late."""
BUDGET_S = 90.0
COMPILING_S = 120.0
COMPILING_CASE_S = 40.0
CASE_S = 15.0


def measure(
    setting: Setting, piece: Piece, *, budget_s: float = BUDGET_S, questions: Mapping[str, str] = QUESTIONS
) -> None:
    scale, worker = scale_for(setting.device, quick=setting.quick), Worker()
    if scale.on_gpu:
        piece.put(capability="sm_{}{}".format(*torch.cuda.get_device_capability()))
        began = time.monotonic()
        compile_all(scale, questions)
        piece.put(compiling_seconds=time.monotonic() - began)
    began = time.monotonic()
    limit = CASE_S if scale.on_gpu else 60.0
    rows: dict[str, list[Case]] = {name: [] for name in questions}
    try:
        for name, case in _cases(scale, questions):
            if time.monotonic() - began > budget_s:
                piece.put(left_out=f"{name} {case} and what follows: the {budget_s:.0f} s were up")
                break
            try:
                row = {**case, **worker.measure(questions[name], scale, case, limit)}
            except NotHere as why:
                piece.row("not_here", {"question": name, **case, "why": str(why)})
                continue
            except (CaseFailed, Lost) as error:
                piece.fail(f"{name} {case}: {error}")
                if isinstance(error, Lost):
                    worker.stop()
                    worker = Worker()
                continue
            rows[name].append(row)
            piece.row(name, row)
            piece.put(decided=dict(_decided(questions[name], name, of) for name, of in rows.items() if of))
    finally:
        worker.stop()
    piece.put(measuring_seconds=time.monotonic() - began)


def compile_all(scale: Scale, questions: Mapping[str, str]) -> None:
    """Runs every case at its smallest, in parallel processes: Triton caches compiled kernels on disk. A failure will
    recur when measured, and is reported then."""
    brief = replace(scale.briefly(), tokens=scale.tokens._replace(layers=1))
    queue: SimpleQueue[tuple[str, Case]] = SimpleQueue()
    for job in _cases(scale, questions):
        queue.put(job)
    ends = time.monotonic() + COMPILING_S

    def work() -> None:
        worker = Worker()
        with suppress(Empty):
            while (left := ends - time.monotonic()) > 0:
                name, case = queue.get_nowait()
                try:
                    worker.measure(questions[name], brief, case, min(left, COMPILING_CASE_S))
                except (NotHere, CaseFailed):
                    continue
                except Lost:
                    worker.stop()
                    worker = Worker()
        worker.stop()

    count = max(1, min(8, (os.cpu_count() or 1) // 2))
    with ThreadPoolExecutor(count) as threads:
        for done in [threads.submit(work) for _ in range(count)]:
            done.result()


def _cases(scale: Scale, questions: Mapping[str, str]) -> Iterator[tuple[str, Case]]:
    for name, module in questions.items():
        for case in _question(module).cases(scale):
            yield name, case


def _question(module: str) -> Question:
    found: Question = import_module(module)  # type: ignore[assignment]
    return found


def _decided(module: str, name: str, rows: list[Case]) -> tuple[str, str]:
    question = _question(module)
    return f"{name}, {question.TITLE}", question.decide(rows)
