"""The command `fastblt check`: shows its progress, and prints what it found."""

from dataclasses import asdict
from typing import Any

from engine.check import run
from engine.check.report import Report
from engine.checkpoint.describe import format_size
from engine.config import DtypeName, EngineConfig

from .progress import Progress
from .tables import drawn, number_table


def check(config: EngineConfig, dtypes: tuple[DtypeName, ...], seconds: float) -> Report:
    """Runs the check; its progress goes to standard error. Raises what `engine.check.run.check` raises."""
    with Progress("check", None, "steps") as progress:

        def tell(doing: str, done: int, total: int) -> None:
            progress.describe(f"check: {doing}")
            progress.reach(done, total)

        return run.check(config, dtypes, seconds, tell)


def to_json(report: Report) -> dict[str, Any]:
    """The object that `--json` prints. Speeds are in bytes a second."""
    return {"fit": report.fit, "verdict": report.verdict, **asdict(report)}


def render(report: Report) -> str:
    """For people."""
    parts = [_machine(report), _kernels(report)]
    if report.texts:
        parts.append(_texts(report))
    if report.copy:
        parts.append(_speed(report))
    if len(report.wrong) > 1:
        parts.append("\n".join(["wrong:", *(f"* {what}" for what in report.wrong)]))
    return "\n\n".join([*parts, report.verdict])


def _machine(report: Report) -> str:
    here = report.machine
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in here.versions.items())
    rows = {"device": f"{here.name}, {format_size(here.memory_bytes)} of memory"}
    if here.compute_capability:
        rows["device"] += ", compute capability {}.{}".format(*here.compute_capability)
    if here.driver:
        rows["driver"] = f"NVIDIA {here.driver}; torch was built for CUDA {here.cuda or '(none)'}"
    rows |= {"versions": versions, "kernels": here.kernels, "model": report.model}
    return "\n".join(f"{name:<9} {value}" for name, value in rows.items())


def _kernels(report: Report) -> str:
    if not report.trials:
        return "kernels beside torch's: these are torch's"
    return f"kernels beside torch's: {report.trials_done} of {report.trials} trials"


def _texts(report: Report) -> str:
    table = number_table("texts", "dtype", "texts", "bytes", "differ")
    for compared in report.texts:
        counts = f"{compared.texts}", f"{compared.compared:,}", f"{len(compared.wrong)}"
        table.add_row(compared.what, compared.dtype, *counts)
    return drawn(table)


def _speed(report: Report) -> str:
    table = number_table(f"speed in {report.speed_dtype}", "sequences", "bytes/s", "read/s", "of a copy")
    for speed in report.speeds:
        figures = f"{speed.bytes_per_second:,.0f}", _rate(speed.bytes_read_per_second), f"{speed.of_copy:.1%}"
        table.add_row(speed.decoder, f"{speed.sequences}", *figures)
    product = f"; a product with one row reads {_rate(report.product)}" if report.product else ""
    return f"{drawn(table)}\na copy moves {_rate(report.copy or 0)} a second{product}"


def _rate(count: float) -> str:
    """Bytes in a second."""
    return f"{count / 1e9:,.3g} GB"
