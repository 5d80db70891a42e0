"""Draws the dashboard without Grafana: `python -m deploy.preview http://127.0.0.1:9090 OUT.png [SECONDS]`.

Runs the panels' queries over the last SECONDS (600) against Prometheus and draws the results with matplotlib, in the
places and colours of the dashboard. It shows the panels' content, not Grafana's looks.
"""

import json
import math
import re
import sys
import time
from typing import Any

import httpx
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from .dashboards import PATH

COLUMN, ROW = 0.75, 0.38
"""Inches of a cell of Grafana's grid."""
LINES = {"solid": "-", "dash": "--", "dot": ":"}
UNITS = {"s": "s", "Bps": "B/s", "decbytes": "B", "bytes": "B", "reqps": "/s", "ops": "/s", "cpm": "/min"}
Json = dict[str, Any]


def fill(expr: str, seconds: int, *, instance: str = ".*", decoder: str = ".*") -> str:
    """A query of the dashboard with its variables filled in, for a range of `seconds`."""
    values = {"job": "fastblt", "instance": instance, "decoder": decoder}
    values |= {"__rate_interval": f"{max(seconds // 20, 15)}s", "__range": f"{seconds}s"}
    return re.sub(r"\$(\w+)", lambda name: values[name[1]], expr)


def readable(value: float, unit: str | None) -> str:
    if unit == "percentunit":
        return f"{value:.1%}"
    base = 1024 if unit == "bytes" else 1000
    power = next((p for p in (3, 2, 1, 0, -1) if abs(value) >= base**p), -2 if value else 0)
    return f"{value / base**power:.3g} {'µm kMG'[power + 2].strip()}{UNITS.get(unit or '', '')}".strip()


def series_name(target: Json, labels: dict[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda label: labels[label[1]], target["legendFormat"])


class Preview:
    def __init__(self, url: str, seconds: int) -> None:
        self.url, self.seconds, self.end = url, seconds, time.time()

    def ask(self, target: Json) -> list[Json]:
        times: Json = {"time": self.end}
        if not target["instant"]:
            times = {"start": self.end - self.seconds, "end": self.end, "step": max(self.seconds // 240, 1)}
        parameters = {"query": fill(target["expr"], self.seconds), **times}
        path = "query" if target["instant"] else "query_range"
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=60).json()
        if answer["status"] != "success":
            raise SystemExit(f"Prometheus does not answer {parameters['query']}: {answer['error']}")
        return list(answer["data"]["result"])

    def curves(self, panel: Json) -> list[tuple[str, str, list[float], list[float]]]:
        """(letter of the query, name, seconds before the end, values) of every series."""
        return [
            (
                target["refId"],
                series_name(target, series["metric"]),
                [moment - self.end for moment, _ in series["values"]],
                [float(value) for _, value in series["values"]],
            )
            for target in panel["targets"]
            for series in self.ask(target)
        ]

    def draw(self, panel: Json, axes: Axes) -> None:
        draw = {"stat": self.stat, "timeseries": self.timeseries, "heatmap": self.heatmap, "table": self.table}
        axes.set_title(panel["title"], loc="left", fontsize=10, fontweight="bold")
        axes.tick_params(labelsize=7)
        draw[panel["type"]](panel, axes)

    def stat(self, panel: Json, axes: Axes) -> None:
        defaults, text, colour = panel["fieldConfig"]["defaults"], "no data", "grey"
        for *_, values in self.curves(panel):
            steps = defaults["thresholds"]["steps"]
            text = "idle" if math.isnan(values[-1]) else readable(values[-1], defaults["unit"])
            colour = [s["color"] for s in steps if s["value"] is None or values[-1] >= s["value"]][-1]
        axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=24, color=colour)
        axes.axis("off")

    def timeseries(self, panel: Json, axes: Axes) -> None:
        custom, unit = panel["fieldConfig"]["defaults"]["custom"], panel["fieldConfig"]["defaults"]["unit"]
        looks: dict[str, Json] = {"byFrameRefID": {}, "byRegexp": {}}
        for override in panel["fieldConfig"]["overrides"]:
            properties = {p["id"]: p["value"] for p in override["properties"]}
            looks[override["matcher"]["id"]][override["matcher"]["options"].strip("/")] = properties
        stack: list[tuple[str, list[float], list[float], str | None]] = []
        for letter, name, times, values in self.curves(panel):
            colour = next((p["color"]["fixedColor"] for r, p in looks["byRegexp"].items() if re.match(r, name)), None)
            own = looks["byFrameRefID"].get(letter)
            if custom.get("stacking", {}).get("mode") == "normal" and not own:
                stack.append((name, times, values, colour))
            else:
                style = LINES[own["custom.lineStyle"]["fill"]] if own else "-"
                axes.plot(times, values, style, label=name, color=colour, lw=1.2)
        if stack:
            longest = max((times for _, times, _, _ in stack), key=len)
            layers = [[dict(zip(t, v, strict=True)).get(at, 0) for at in longest] for _, t, v, _ in stack]
            colours = [colour or f"C{i}" for i, (*_, colour) in enumerate(stack)]
            axes.stackplot(longest, layers, labels=[name for name, *_ in stack], colors=colours, alpha=0.7)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: readable(value, unit)))
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=6, ncols=5, loc="upper left", bbox_to_anchor=(-0.06, -0.1), frameon=False)

    def heatmap(self, panel: Json, axes: Axes) -> None:
        buckets = sorted(self.curves(panel), key=lambda curve: float(curve[1].replace("+", "")))
        if buckets:
            times, counts = buckets[0][2], [values for *_, values in buckets]
            below = [[0.0] * len(times), *counts]
            cells = [[n - m for n, m in zip(*rows, strict=True)] for rows in zip(counts, below, strict=False)]
            axes.pcolormesh(times, range(len(cells)), cells, cmap="Oranges", shading="nearest")
            axes.set_yticks(range(len(cells)), [f"≤ {name} s" for _, name, *_ in buckets])

    def table(self, panel: Json, axes: Axes) -> None:
        series = self.ask(panel["targets"][0])
        options = panel["transformations"][0]["options"]
        if "rowField" in options:
            row, column = options["rowField"], options["columnField"]
            unit = panel["fieldConfig"]["defaults"]["unit"]
            cells = {(s["metric"][row], s["metric"][column]): readable(float(s["value"][1]), unit) for s in series}
            names, columns = (sorted({key[i] for key in cells}) for i in (0, 1))
            text, columns = [[name, *(cells.get((name, c), "") for c in columns)] for name in names], [row, *columns]
        else:
            columns = sorted({label for s in series for label in s["metric"]} - options["excludeByName"].keys())
            text = [[s["metric"].get(label, "") for label in columns] for s in series]
        axes.axis("off")
        if text:
            axes.table(text, colLabels=columns, loc="upper center").set_fontsize(9)

    def picture(self, board: Json, out: str) -> None:
        height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
        figure = plt.figure(figsize=(24 * COLUMN, height * ROW))
        for panel in board["panels"]:
            x, y, w, h = (panel["gridPos"][key] for key in "xywh")
            if panel["type"] == "row":
                figure.text(x / 24 + 0.005, 1 - (y + h) / height, panel["title"], fontsize=14, fontweight="bold")
            else:
                box = ((x + 0.9) / 24, 1 - (y + h - 1.8) / height, (w - 1.2) / 24, (h - 2.8) / height)
                self.draw(panel, figure.add_axes(box))
        figure.savefig(out, dpi=72)
        plt.close(figure)


if __name__ == "__main__":
    match sys.argv[1:]:
        case [url, out]:
            Preview(url, 600).picture(json.loads(PATH.read_text()), out)
        case [url, out, seconds] if seconds.isdigit():
            Preview(url, int(seconds)).picture(json.loads(PATH.read_text()), out)
        case _:
            raise SystemExit(__doc__)
