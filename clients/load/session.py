"""The command `fastblt load`: runs one after another, and what is known of them in the end."""

import asyncio
import datetime
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import uvloop

from ..address import base_url
from ..fastblt_client import Client, first_model
from ..progress import Progress
from .http import Pool
from .record import Limits, Plan, Record, Run
from .run import measure
from .stats import summary
from .workload import Range, Texts, Workload

PATH = "/v1/completions"


class Settings(NamedTuple):
    """files: of prompts. fields: of every body. records: a file that gets one JSON object a request. ca_file:
    certificates to trust instead of the system's."""

    url: str
    api_key: str | None
    model: str | None
    plans: Sequence[Plan]
    files: Sequence[Path]
    prompt_bytes: Range | None
    max_tokens: Range
    decoders: dict[str, float]
    fields: dict[str, Any]
    seed: int
    timeout: float
    limits: Limits
    records: Path | None = None
    ca_file: Path | None = None


class Result(NamedTuple):
    """content: as JSON has it."""

    content: dict[str, Any]
    runs: list[Run]

    @property
    def failed(self) -> int:
        return sum(run["outcomes"]["failed"] for run in self.content["runs"])

    @property
    def interrupted(self) -> bool:
        return any(run.interrupted for run in self.runs)


def load(settings: Settings) -> Result:
    """Does all runs; Ctrl-C ends the one that runs, and no other begins.

    Raises FastBltError if the server cannot be asked for its models, ValueError for wrong settings, OSError."""
    address = base_url(settings.url)
    texts = Texts(settings.files, settings.prompt_bytes)
    model = settings.model
    if model is None:
        with Client(address, api_key=settings.api_key, retries=0, ca_file=settings.ca_file) as client:
            model = first_model(client.models())
    fields = {"model": model, **settings.fields}
    workload = Workload(texts, settings.max_tokens, settings.decoders, fields, settings.seed)
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with ExitStack() as stack, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        file = stack.enter_context(settings.records.open("wb")) if settings.records else None
        runs = runner.run(_all(settings, address, workload, file))
    content = {
        "url": address,
        "started": started,
        "workload": {
            "files": [path.name for path in settings.files],
            "prompt_bytes": str(settings.prompt_bytes or ""),
            "max_tokens": str(settings.max_tokens),
            "decoders": settings.decoders,
            "fields": fields,
            "seed": settings.seed,
        },
        "limits_seconds": settings.limits._asdict(),
        "runs": [summary(run, settings.limits) for run in runs],
    }
    return Result(content, runs)


async def _all(settings: Settings, address: str, workload: Workload, file: BinaryIO | None) -> list[Run]:
    pool = Pool(address, PATH, settings.api_key, settings.timeout, settings.ca_file)
    runs: list[Run] = []
    try:
        for plan in settings.plans:
            with Progress(plan.name, plan.requests or plan.duration) as progress:
                runs.append(await measure(plan, pool, workload, _Teller(progress, file).tell))
            if runs[-1].interrupted:
                break
    finally:
        pool.close()
    return runs


class _Teller:
    """Tells how far a run is."""

    def __init__(self, progress: Progress, file: BinaryIO | None) -> None:
        self._progress, self._file = progress, file
        self._ended = self._not_done = 0

    def tell(self, run: Run, record: Record) -> None:
        self._ended += 1
        self._not_done += record.outcome != "done"
        note = (
            f"{self._ended:,} requests, {len(run.records) - self._ended:,} open, {self._not_done:,} refused or failed"
        )
        self._progress.update(self._ended if run.plan.requests else record.ended, note)
        if self._file:
            self._file.write(json.dumps({"run": run.plan.name, **asdict(record)}).encode() + b"\n")
