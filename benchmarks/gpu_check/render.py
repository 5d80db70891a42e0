"""The report as Markdown, from the check's JSON."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.paired import shown
from benchmarks.report import table

from .handover import QUESTIONS

Figures = Mapping[str, Any]


def render(content: Figures, missing: Sequence[str]) -> str:
    """The whole report. missing: parts that have not run."""
    taken = content["taken"]
    taken = {**taken, "driver": content.get("driver")}
    where = ", ".join(f"{name} {value}" for name, value in taken.items() if value is not None)
    sections = [
        f"# GPU check: {content['device']}{' (toy sizes)' if content['quick'] else ''}",
        f"`{content['command']}`; sources {content['sources']}; {where}.",
        _summary(content, missing),
    ]
    for name, piece in content["parts"].items():
        sections.append(f"## {name}")
        sections += _trouble(piece)
        sections += [text for text in SECTIONS[name](piece["figures"]) if text] if name in SECTIONS else []
    return "\n\n".join(sections) + "\n"


def short(content: Figures) -> tuple[str, str]:
    """Tables for a README: the 1B shape in Fast-BLT's form and bfloat16; models/nano in bfloat16, stages as graphs."""
    shape = [row for row in content["parts"]["1b"]["figures"]["speed"] if row["form"] == "fast"]
    header = ["decoder", "bytes/s", "speed-up over BLT", "predicted by bytes read", "realisation", "bandwidth use"]
    rows = [
        [row["decoder"], f"{row['bytes_per_second']:,.0f}", _ratio(row), f"{row['predicted']:.2f}"]
        + [f"{row['realisation']:.2f}", f"{row['bandwidth_use']:.2f}"]
        for row in shape
        if row["weights"] == "bfloat16" and row.get("concurrency", 1) == 1
    ]
    found = {
        (row["decoder"], row["concurrency"]): row["bytes_per_second"]
        for row in content["parts"]["nano"]["figures"]["speed"]
        if row["graphs"] and row["dtype"] == "bfloat16"
    }
    decoders, numbers = (list(dict.fromkeys(keys)) for keys in zip(*found, strict=True))
    cells = [[decoder, *(f"{found[decoder, number]:,.0f}" for number in numbers)] for decoder in decoders]
    return table(header, rows), table(["bytes/s", *(f"{number} at a time" for number in numbers)], cells)


def _summary(content: Figures, missing: Sequence[str]) -> str:
    rows = []
    for name, piece in content["parts"].items():
        stale = piece["sources"] != content["sources"]
        rows.append(
            [name, piece["status"] + (" (of other sources)" if stale else ""), f"{piece['seconds']:.0f}"]
            + [str(len(piece["failures"]) or "")]
        )
    rows += [[name, "not run", "", ""] for name in missing]
    return table(["part", "", "seconds", "found wrong"], rows)


def _trouble(piece: Figures) -> list[str]:
    if piece["status"] == "passed":
        return []
    wrong = "\n".join(f"* {failure}" for failure in piece["failures"])
    last = "\n".join(f"    {line}" for line in piece["last_lines"])
    return [text for text in (wrong, f"It said last:\n\n{last}" if last else "") if text]


def _probe(figures: Figures) -> list[str]:
    known = ", ".join(f"{name} {value}" for name, value in figures.get("device", {}).items())
    rates = [("copy", "copy_gb_s"), ("fastest product with one row", "gemv_gb_s"), ("peak", "peak_gb_s")]
    said = ", ".join(f"{name} {figures[key]:,.0f} GB/s" for name, key in rates if key in figures)
    products = figures.get("products", [])
    kinds = list(dict.fromkeys(key for row in products for key in row if " " in key))
    rows = [
        [row["matrix"], f"{row['out']} x {row['in']}", str(row["rows"]), *(_number(row.get(kind)) for kind in kinds)]
        for row in products
    ]
    header = ["matrix of the 1B shape", "out x in", "rows", *(f"{kind}, GB/s" for kind in kinds)]
    return [known, said, table(header, rows) if rows else ""]


def _kernels(figures: Figures) -> list[str]:
    counts = figures.get("tests", {})
    said = ", ".join(f"{number} {outcome}" for outcome, number in counts.items())
    details = [
        f"{case['test']}: {case['outcome']}\n\n" + "\n".join(f"    {line}" for line in case["lines"])
        for case in figures.get("not_passed", [])[:8]
    ]
    return [said, *details]


def _exactness(figures: Figures) -> list[str]:
    rows = figures.get("texts", [])
    if not rows:
        return []
    variants = list(rows[0]["from blt"])
    first, *others = variants
    header = ["model", "dtype", "decoder", "prompts"]
    header += [f"not as blt: {variant}" for variant in variants] + [f"{other}: not as {first}" for other in others]
    cells = [
        [row["model"], row["dtype"], row["decoder"], str(row["prompts"])]
        + [f"{row['from blt'][variant]:.0%}" for variant in variants]
        + [f"{row['from the first'][other]:.0%}" for other in others]
        for row in rows
    ]
    return ["Share of the prompts whose text differs; blt-d has a text of its own.", table(header, cells)]


def _nano(figures: Figures) -> list[str]:
    header = [
        "dtype",
        "stages",
        "at a time",
        "decoder",
        "bytes/s",
        "over blt",
        "bytes a round",
        "ms a step",
        "warm-up s",
    ]
    rows = [
        [row["dtype"], "graphs" if row["graphs"] else "at once", str(row["concurrency"]), row["decoder"]]
        + [f"{row['bytes_per_second']:,.0f}", _ratio(row), f"{row['bytes_per_round']:.2f}"]
        + [f"{row['ms_per_step']:.2f}", f"{row['warm_up_seconds']:.1f}"]
        for row in figures.get("speed", [])
    ]
    return [table(header, rows) if rows else ""]


def _shape_1b(figures: Figures) -> list[str]:
    header = ["form", "weights", "at a time", "decoder", "acceptance", "bytes/s", "over blt", "predicted"]
    header += ["realisation", "GB/s read", "bandwidth use", "MB a byte", "bytes a round"]
    header += ["decoder calls a byte", "global calls a byte"]
    header += ["ms a step", "host gap", "host, us a byte"]
    rows = [
        [row["form"], row["weights"], str(row.get("concurrency", 1)), row["decoder"], row["acceptance"]]
        + [f"{row['bytes_per_second']:,.0f}", _ratio(row)]
        + [f"{row['predicted']:.2f}", f"{row['realisation']:.2f}", f"{row['read_gb_s']:,.1f}"]
        + [f"{row['bandwidth_use']:.0%}", f"{row['read_mb_per_byte']:,.1f}", f"{row['bytes_per_round']:.2f}"]
        + [f"{row['decoder_calls_per_byte']:.2f}"]
        + [f"{row['global_calls_per_byte']:.2f}", f"{row['ms_per_step']:.2f}"]
        + ([f"{row['host_gap']:.0%}", f"{row['host_us_per_byte']:,.0f}"] if "host_gap" in row else ["", ""])
        for row in figures.get("speed", [])
    ]
    said = (
        f"Random weights, {figures.get('shape', '')}, hash tables of {figures.get('hash_rows', 0):,} rows instead of "
        "500,002, patches of at most 8 bytes. "
        f"A copy moved {figures.get('copy_gb_s', 0):,.1f} GB/s in the same process{_of_card(figures)}. "
        "Drafts of random weights are never right: all figures but blt's are with replayed acceptance, the paper's for "
        "its 1B."
    )
    return [said, table(header, rows) if rows else "", *_against_model(figures)]


def _of_card(figures: Figures) -> str:
    """The card and its data sheet."""
    if not figures.get("card"):
        return ""
    rate = figures.get("data_sheet_gb_s")
    return f", of {rate:,} GB/s by the data sheet of {figures['card']}" if rate else f", on {figures['card']}"


def _against_model(figures: Figures) -> list[str]:
    """What was measured beside what launches and bytes predict, and beside the aims of calls."""
    predicted = {(row["concurrency"], row["decoder"]): row for row in figures.get("model", [])}
    measured = [
        row
        for row in figures.get("speed", [])
        if row["form"] == "fast" and row["weights"] == "bfloat16" and "call_us" in row
    ]
    aims: Mapping[str, float] = figures.get("aim_us", {})
    names = {"patcher + encoder": "local_us", "global call": "global_us", "decoder pass": "pass_us"}
    rows = []
    for row in measured:
        model = predicted.get((row["concurrency"], row["decoder"]), {})
        cells = [
            str(row["concurrency"]),
            row["decoder"],
            _measured(row["bytes_per_second"], model.get("bytes_per_second")),
        ]
        for call, name in names.items():
            # Aims are for one sequence.
            aim = aims.get(call) if row["concurrency"] == 1 else None
            cells.append(_measured(row["call_us"].get(call), model.get(name), aim))
        rows.append(cells)
    if not rows:
        return []
    said = (
        "Measured, and in brackets what `benchmarks.gpu_model` predicts from launches and bytes, with the exposed time "
        "of a launch and the host's share as they were on an H200 with earlier kernels. Bold: longer than the aim."
    )
    if aims:
        said += " Aims for one sequence: " + ", ".join(f"{call} {us:,.0f} us" for call, us in aims.items()) + "."
    return [said, table(["at a time", "decoder", "bytes/s", *(f"{call}, us" for call in names)], rows)]


def _measured(found: float | None, predicted: float | None, aim: float | None = None) -> str:
    if found is None:
        return ""
    shown = f"{found:,.0f}" if aim is None or found <= aim else f"**{found:,.0f}**"
    return shown if predicted is None else f"{shown} ({predicted:,.0f})"


def _profile(figures: Figures) -> list[str]:
    steps = figures.get("steps", [])
    header = ["model", "decoder", "ms a step", "device busy, ms", "host gap", "bytes a step", "launches a step"]
    rows = [
        [row["model"], row["decoder"], f"{row['ms_per_step']:.2f}", f"{row['busy_ms_per_step']:.2f}"]
        + [f"{row['host_gap']:.0%}", f"{row['bytes_per_step']:.2f}"]
        + [", ".join(f"{number:.1f} {name}" for name, number in row["launches_per_step"].items())]
        for row in steps
    ]
    tops = [
        f"{row['model']}, {row['decoder']}:\n\n"
        + table(
            ["kernel", "us a step", "calls a step"],
            [[_short(k["name"]), f"{k['us_per_step']:,.1f}", f"{k['calls_per_step']:.1f}"] for k in row["top"]],
        )
        for row in steps
    ]
    return [table(header, rows) if rows else "", *tops]


def _handover(figures: Figures) -> list[str]:
    """A conclusion per question; then all rows."""
    said = "Microseconds per link of a chain that is one graph (T2 and T5: per phase), the median of five."
    parts = [said, _decided(figures)]
    for name, rows in figures.items():
        if name not in QUESTIONS:
            continue
        header = list(dict.fromkeys(key for row in rows for key in row))
        parts += [f"{name}:", table(header, [[_cell(row.get(key, "")) for key in header] for row in rows])]
    if not_here := figures.get("not_here"):
        cases = [", ".join(str(value) for key, value in row.items() if key != "why") for row in not_here]
        parts.append("\n".join(f"* not here: {case}: {row['why']}" for case, row in zip(cases, not_here, strict=True)))
    return [*parts, figures.get("left_out", "")]


def _decided(figures: Figures) -> str:
    return "\n".join(f"* **{question}**: {decides}" for question, decides in figures.get("decided", {}).items())


def _host(figures: Figures) -> list[str]:
    header = ["at a time", "decoder", "host gap", "host, us a byte", "launches a byte", "copies a byte", "bytes a step"]
    rows = [
        [str(row["concurrency"]), row["decoder"], f"{row['host_gap']:.1%}", f"{row['host_us_per_byte']:,.1f}"]
        + [f"{row['launches_per_byte']:.2f}", f"{row['copies_per_byte']:.2f}", f"{row['bytes_per_step']:.2f}"]
        for row in sorted(figures.get("host", []), key=lambda row: -row["host_gap"])
    ]
    return [_decided(figures), table(header, rows)] if rows else []


def _ahead(figures: Figures) -> list[str]:
    header = ["decoder", "ahead", "bytes/s", "over never", "host, us a byte", "same text"]
    rows = [
        [row["decoder"], row["ahead"], f"{row['bytes_per_second']:,.0f}", shown(row["over_never"])]
        + [f"{row['host_us_per_byte']:,.0f}", "yes" if row["same_text"] else "**no**"]
        for row in figures.get("ahead", [])
    ]
    return [_decided(figures), table(header, rows)] if rows else []


SECTIONS: dict[str, Callable[[Figures], list[str]]] = {
    "handover": _handover,
    "host": _host,
    "ahead": _ahead,
    "forms": _shape_1b,
    "probe": _probe,
    "kernels": _kernels,
    "exactness": _exactness,
    "nano": _nano,
    "1b": _shape_1b,
    "profile": _profile,
}


def _ratio(row: Figures) -> str:
    return f"{row['over_blt']:.2f} ({row['range'][0]:.2f} to {row['range'][1]:.2f})"


def _cell(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _short(name: str) -> str:
    clean = name.replace("|", "/")
    return clean if len(clean) <= 80 else f"{clean[:77]}..."
