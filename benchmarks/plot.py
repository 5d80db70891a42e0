"""Pictures that are legible on a light and on a dark page."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#7f8790"
COLOURS = ("#2f81f7", "#e8590c", "#2da44e", "#a371f7", "#d4a72c", "#db61a2")


@contextmanager
def axes(path: Path, xlabel: str, ylabel: str, *, ticks: list[int] | None = None) -> Iterator["Axes"]:
    """Axes to draw on, written to `path` as PNG on a transparent background. ticks: marks of a logarithmic x."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style: dict[Any, Any] = {"lines.marker": "o", "font.size": 10, "legend.frameon": False}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with plt.rc_context(style | {"axes.spines.top": False, "axes.spines.right": False}):
        figure, on = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
        on.set_prop_cycle(color=COLOURS)
        on.set(xlabel=xlabel, ylabel=ylabel)
        on.grid(color=INK, alpha=0.25)
        if ticks:
            on.set_xscale("log", base=2)
            on.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            on.minorticks_off()
        yield on
        if on.get_legend_handles_labels()[1]:
            on.legend()
        figure.savefig(path, dpi=110, transparent=True)
        plt.close(figure)
