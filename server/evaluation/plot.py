"""Score against gigabytes saved: what a setting gives up for what it spares, beside the paper's."""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .report import Report, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#7f8790"
"""Legible on a light and on a dark page."""
COLOURS = {"blt": "#2f81f7", "blt-s": "#e8590c", "blt-d": "#2da44e", "blt-dv": "#a371f7"}


class Point(NamedTuple):
    """saved: percent of BLT's gigabytes."""

    saved: float
    score: float
    decoder: str


def can_draw() -> bool:
    return find_spec("matplotlib") is not None


def front(points: Iterable[Point]) -> list[Point]:
    """Those that no other beats in one of the two without losing in the other, by what they save."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (-point.saved, -point.score)):
        if not best or point.score > best[-1].score:
            best.append(point)
    return best[::-1]


def points(table: Table) -> list[Point]:
    """Of the rows that have both; BLT saves nothing."""
    return [
        Point(row.saved or 0.0, row.score, row.decoder)
        for row in table.rows
        if row.score is not None and (row.saved is not None or row.decoder == "blt")
    ]


def paper_points(table: Table) -> list[Point]:
    """Of the same settings."""
    return [Point(row.paper.saved or 0.0, row.paper.score, row.decoder) for row in table.rows if row.paper]


def draw(r: Report, out: Path) -> list[Path]:
    """A picture `TASK.png` in `out` for each task that has scores; their paths. Needs matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    drawn = []
    style: dict[Any, Any] = {"font.size": 10, "legend.frameon": False}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    for table in r.tables:
        if not (own := points(table)):
            continue
        with plt.rc_context(style | {"axes.spines.top": False, "axes.spines.right": False}):
            figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
            _draw(axes, own, r.model, marker="o", line="-")
            if theirs := paper_points(table):
                _draw(axes, theirs, f"paper {(r.paper or '').upper()}", marker="D", line=":", hollow=True)
            axes.set(xlabel="% of BLT's gigabytes saved", ylabel=f"{table.task.metric}, %", title=table.task.name)
            axes.grid(color=INK, alpha=0.25)
            figure.legend(loc="outside right upper", fontsize=8)
            path = out / f"{table.task.name}.png"
            figure.savefig(path, dpi=110, transparent=True)
            plt.close(figure)
        drawn.append(path)
    return drawn


def _draw(axes: "Axes", found: Sequence[Point], of: str, *, marker: str, line: str, hollow: bool = False) -> None:
    best = front(found)
    axes.plot([p.saved for p in best], [p.score for p in best], color=INK, ls=line, lw=1, label=f"{of}: Pareto front")
    for decoder in dict.fromkeys(point.decoder for point in found):
        own = [point for point in found if point.decoder == decoder]
        colour = COLOURS[decoder]
        axes.scatter(
            [p.saved for p in own],
            [p.score for p in own],
            s=28,
            marker=marker,
            facecolors="none" if hollow else colour,
            edgecolors=colour,
            label=f"{of}: {decoder}",
        )
