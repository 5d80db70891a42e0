"""Line charts and scatter plots as SVG, which a page can hold: matplotlib would be a large dependency for this."""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 34, 44
COLOURS = 6
"""Classes c0, c1, ... that a page gives colours."""
MOST_POINTS = 2000
"""Of a series; more could not be told apart, and would make the page large."""
STEPS = (1, 2, 5, 10)


class Series(NamedTuple):
    """is_line: joined by a line; otherwise dots. colour: 0..COLOURS-1."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    is_line: bool = True


def chart(title: str, x_label: str, y_label: str, series: Sequence[Series], *, log_x: bool = False) -> str:
    """Both axes begin at 0, or x at its least value if it is logarithmic (values that are not positive are then left
    out). Empty without points."""
    shown = [_thinned(line, log_x) for line in series]
    points = [point for line in shown for point in line.points]
    if not points:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_ticks = _log_ticks(min(xs), max(xs)) if log_x else _ticks(max(xs))
    y_ticks = _ticks(max(ys))
    place_x = _scale(x_ticks[0], x_ticks[-1], LEFT, WIDTH - RIGHT, log_x)
    place_y = _scale(0, y_ticks[-1], HEIGHT - BOTTOM, TOP, False)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{escape(title)}</title>']
    parts.append(f'<text class="title" x="{LEFT}" y="12">{escape(title)}</text>')
    for tick in y_ticks:
        y = place_y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        x = place_x(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>'
    )
    parts.append(f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    for line in shown:
        places = [(place_x(x), place_y(y)) for x, y in line.points]
        if line.is_line:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline class="c{line.colour}" points="{path}"/>')
        if not line.is_line or len(places) <= COLOURS * 2:
            parts += [f'<circle class="c{line.colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in places]
    parts += _legend(shown)
    return "".join([*parts, "</svg>"])


def _legend(series: Sequence[Series]) -> list[str]:
    parts, x = [], float(LEFT)
    for line in series:
        parts.append(f'<rect class="c{line.colour}" x="{x:.0f}" y="19" width="10" height="10"/>')
        parts.append(f'<text x="{x + 14:.0f}" y="28">{escape(line.name)}</text>')
        x += 30 + 6.5 * len(line.name)
    return parts


def _thinned(line: Series, log_x: bool) -> Series:
    """Evenly spread ones of the points, with the first and the last."""
    points = [(x, y) for x, y in line.points if x > 0] if log_x else line.points
    if len(points) > MOST_POINTS:
        step = (len(points) - 1) / (MOST_POINTS - 1)
        points = [points[round(i * step)] for i in range(MOST_POINTS)]
    return line._replace(points=points)


def _scale(low: float, high: float, first: float, last: float, log: bool) -> Callable[[float], float]:
    """From values to places."""
    of: Callable[[float], float] = math.log if log else float
    start, width = of(low), of(high) - of(low)
    return lambda value: first + (last - first) * (of(value) - start) / width


def _ticks(most: float) -> list[float]:
    """About five round numbers from 0 on; the last is not below `most`."""
    if most <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(most / 5))
    step = next(step * power for step in STEPS if step * power * 5 >= most * (1 - 1e-9))
    return [i * step for i in range(math.ceil(most / step - 1e-9) + 1)]


def _log_ticks(least: float, most: float) -> list[float]:
    """1, 2 and 5 times powers of ten, or over many powers these alone: from at most `least` to above `most`."""
    low, high = math.floor(math.log10(least) - 1e-9), math.ceil(math.log10(most)) + 1
    steps = STEPS[:-1] if high - low < 5 else STEPS[:1]
    ticks = [step * 10.0**power for power in range(low, high + 1) for step in steps]
    first = max(i for i, tick in enumerate(ticks) if tick <= least or i == 0)
    last = min(i for i, tick in enumerate(ticks) if tick > most)
    return ticks[first : last + 1]
