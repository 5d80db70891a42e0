"""Whether a change moved any answer: the same recorded requests through the engines of two checkouts, event by event.

Both run with this Python and its packages, on the same models, without running ahead, and must give the same events at
the same steps and count the same; only times are left out. Where measured times decide how bytes are made (`auto`, and
running ahead always) ids, text and the end of each request must be the same. The message of a refusal may differ: that
is noted, and is no difference.

Exit codes: 0 all the same, 1 a difference, or something that these requests are for and that did not happen.
"""

import argparse
import json
import os
import subprocess
import sys
from base64 import b64decode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, zip_longest
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from engine.checkpoint import calibrated, random_tensors, save
from engine.config import ModelConfig

from . import report
from .models import shaped
from .program import Verdict
from .recorded import Run, runs
from .report import ROOT
from .servers import commit_of

WORKER = Path(__file__).with_name("same_answers_worker.py")
LIMIT_SECONDS = 900
FIRST = ("step", "id", "type")
"""Fields in which events are compared first: they say which event it is."""
SHOWN = 300
"""Characters of a value."""

Line = dict[str, Any]
"""What a worker says: an event with its run and step, or what a run counted."""
NOTHING: Line = {}
"""In place of a line that one of the two lacks."""


class Difference(NamedTuple):
    """Where the events of a run part: at that step and request of the other engine. step is None where whole answers
    are compared; what the engine counted has no request either."""

    run: str
    step: int | None
    request: str | None
    field: str
    other: Any
    this: Any

    def __str__(self) -> str:
        where = [self.run, *([] if self.step is None else [f"step {self.step}"])]
        where += [] if self.request is None else [f"request {self.request!r}"]
        return f"{', '.join([*where, self.field])}:\n  other  {shown(self.other)}\n  this   {shown(self.this)}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.same_answers", description=__doc__)
    parser.add_argument("--against", type=Path, required=True, help="folder of the other checkout")
    parser.add_argument(
        "--model", type=Path, nargs="+", default=[], help="folders of checkpoints to run beside those that it takes"
    )
    parser.add_argument("--kernels", choices=("native", "torch"), help="of most runs; default: the engine's choice")
    parser.add_argument("--num-threads", type=int, default=1, help="of each of the two engines (%(default)s)")
    parser.add_argument("--tokens", type=int, default=80, help="that most requests generate (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder to keep the events in")
    options = parser.parse_args(arguments)
    if not (options.against / "engine").is_dir():
        parser.error(f"--against: {options.against} is no checkout, it has no folder engine")
    roots = {"other": options.against.resolve(), "this": ROOT}
    played = runs(options.tokens, kernels=options.kernels, threads=options.num_threads)
    rows: list[list[str]] = []
    verdicts: list[Verdict] = []
    seen: set[str] = set()
    sums = [0] * len(FIGURES)
    with TemporaryDirectory(prefix="benchmarks-") as temporary:
        work, out = Path(temporary), options.out or Path(temporary)
        for model, path in {**models(work), **{path.resolve().name: path for path in options.model}}.items():
            files = play(path, played, roots, out / "events" / model)
            for run, other, this in pairs(played, files["other"], files["this"]):
                difference, counts = first_difference(run, other, this), figures(this)
                sums = [a + b for a, b in zip(sums, counts, strict=True)]
                notes = ["ids and text alone"] if run.timed else []
                notes += [f"texts differ: {texts}"] if (texts := texts_differ(other, this)) else []
                said = "differs" if difference else "the same"
                rows.append([model, run.name, *(f"{count:,}" for count in counts), said, ", ".join(notes)])
                verdicts += verdicts_of(model, run, this, difference)
                seen |= happened(run, this)
                if difference:
                    print(f"{model}, {difference}\n", flush=True)
    verdicts += [Verdict(what, "at least once", "never", False) for what in sorted(AIMS - seen)]
    print(render(rows, sums))
    for verdict in verdicts:
        if not verdict.met:
            print(f"missed: {verdict.figure}: {verdict.found} (aim: {verdict.aim})")
    same = all(verdict.met for verdict in verdicts)
    print(f"{'The same' if same else 'NOT the same'} as {commit_of(options.against)} in {options.against}")
    return 0 if same else 1


# Models and workers.


def models(work: Path) -> dict[str, Path]:
    """Folders by name: models/nano, and two with random weights that are written to `work`."""
    tiny = shaped("tiny", "fast")
    patching = replace(tiny.patching, monotonic=True, max_patch_length=5)
    isolated = replace(tiny, isolate_documents=True, patching=patching)
    return {
        "nano": report.NANO,
        "encoder": _drawn(work / "encoder", shaped("tiny", "released")),
        "isolated": _drawn(work / "isolated", isolated),
    }


def _drawn(folder: Path, config: ModelConfig) -> Path:
    tensors = random_tensors(config, 0)
    save(folder, calibrated(config, tensors), tensors, torch.float32)
    return folder


def play(model: Path, played: Sequence[Run], roots: Mapping[str, Path], out: Path) -> dict[str, Path]:
    """Files with the lines of a worker in each checkout, both at the same time. Raises RuntimeError if one breaks."""
    out.mkdir(parents=True, exist_ok=True)
    asked = json.dumps([{**run._asdict(), "config": {**run.config, "model": str(model.resolve())}} for run in played])
    (out / "runs.json").write_text(asked)
    files = {name: out / f"{name}.jsonl" for name in roots}
    workers: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, root in roots.items():
            # So that threads that wait do not take the cores from those that work, as in the server.
            environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": str(root)}
            with (out / "runs.json").open() as given, files[name].open("w") as said, _log(out, name).open("w") as log:
                workers[name] = subprocess.Popen(
                    [sys.executable, "-P", str(WORKER)], cwd=root, env=environment, stdin=given, stdout=said, stderr=log
                )
        for name, worker in workers.items():
            if code := worker.wait(LIMIT_SECONDS):
                raise RuntimeError(f"the engine in {roots[name]} ended with {code}:\n{_log(out, name).read_text()}")
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    return files


def _log(out: Path, name: str) -> Path:
    return out / f"{name}.log"


def pairs(played: Sequence[Run], other: Path, this: Path) -> Iterator[tuple[Run, list[Line], list[Line]]]:
    """Each run with the lines that both have of it."""
    others, ours = _by_run(other), _by_run(this)
    for run in played:
        yield run, in_order(others[run.name]), in_order(ours[run.name])


def in_order(lines: Sequence[Line]) -> list[Line]:
    """By step and request: events of one request come in order, those of a step's requests in any. What was counted
    comes last."""
    return sorted(lines, key=lambda line: ("counted" in line, line.get("step", 0), line.get("event", {}).get("id", "")))


def _by_run(path: Path) -> dict[str, list[Line]]:
    with path.open() as file:
        return {name: list(lines) for name, lines in groupby(map(json.loads, file), itemgetter("run"))}


# Comparison.


def first_difference(run: Run, other: Sequence[Line], this: Sequence[Line]) -> Difference | None:
    reduced = answers if run.timed else without_texts
    for a, b in zip_longest(reduced(other), reduced(this), fillvalue=NOTHING):
        if a != b:
            line = a or b
            return Difference(run.name, line.get("step"), line.get("event", {}).get("id"), *_where(a, b))
    return None


def without_texts(lines: Iterable[Line]) -> Iterator[Line]:
    """Without what refusals say."""
    for line in lines:
        if line.get("event", {}).get("type") == "Failed":
            yield {**line, "event": {key: value for key, value in line["event"].items() if key != "message"}}
        else:
            yield line


def answers(lines: Iterable[Line]) -> Iterator[Line]:
    """An event for each request, with all its ids and text and with how it ended."""
    found: dict[str, Line] = {}
    for line in lines:
        if event := line.get("event"):
            answer = found.setdefault(event["id"], {"id": event["id"], "ids": [], "text": "", "ends": []})
            answer["ids"] += event.get("ids", [])
            # msgspec gives bytes as base64; in Latin-1 each of them is a character, wherever events cut the text.
            answer["text"] += b64decode(event.get("text", "")).decode("latin-1")
            if event["type"] != "Delta":
                answer["ends"].append(event.get("reason") or event["code"])
    for _, answer in sorted(found.items()):
        yield {"event": answer}


def texts_differ(other: Sequence[Line], this: Sequence[Line]) -> int:
    """How many refusals say something else."""
    texts = [
        {line["event"]["id"]: line["event"]["message"] for line in lines if line.get("event", {}).get("message")}
        for lines in (other, this)
    ]
    return sum(texts[0][name] != text for name, text in texts[1].items() if name in texts[0])


def _where(other: Any, this: Any, path: str = "") -> tuple[str, Any, Any]:
    """The first field that differs, and both values."""
    nothing = "nothing"
    if isinstance(other, dict) and isinstance(this, dict):
        for key in sorted({*other, *this}, key=lambda key: (key not in FIRST, key)):
            if other.get(key, nothing) != this.get(key, nothing):
                return _where(other.get(key, nothing), this.get(key, nothing), f"{path}.{key}" if path else key)
    if isinstance(other, list) and isinstance(this, list):
        for place, (a, b) in enumerate(zip_longest(other, this, fillvalue=nothing)):
            if a != b:
                return _where(a, b, f"{path}[{place}]")
    return path, other, this


def shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text)} characters)"


# What was found.

AIMS = {
    *(f"a request ends with {reason}" for reason in ("stop", "length", "abort", "timeout")),
    *(f"a request fails with {code}" for code in ("invalid", "too_long", "decoder_unavailable")),
    *(f"drafts of {decoder} stand" for decoder in ("blt-s", "blt-d", "blt-dv")),
    *(f"events have {report}" for report in ("logprobs", "prompt_logprobs", "traces", "entropies", "patch_starts")),
}
"""What must happen in some run: two engines that do nothing are the same, too."""


def happened(run: Run, lines: Sequence[Line]) -> set[str]:
    """Which of the aims a run has met."""
    if run.timed:
        return set()
    found = {
        f"drafts of {name} stand" for name, counts in lines[-1]["counted"]["decoders"].items() if counts["accepted"]
    }
    for event in (line["event"] for line in lines[:-1]):
        found |= {f"events have {report}" for report in event if event[report]}
        found |= {f"a request ends with {event.get('reason')}", f"a request fails with {event.get('code')}"}
    return found & AIMS


def verdicts_of(model: str, run: Run, lines: Sequence[Line], found: Difference | None) -> list[Verdict]:
    what = f"{model}, {run.name}"
    verdicts = [Verdict(what, "no difference", f"{found.field} differs" if found else "the same", not found)]
    if run.name == "crowded":
        figures = {name: lines[-1]["counted"][name] for name in ("preemptions", "cached_rows")}
        verdicts += [Verdict(f"{what}, {name}", "more than 0", str(n), n > 0) for name, n in figures.items()]
    return verdicts


FIGURES = ("requests", "events", "bytes", "steps", "preemptions", "rows from the cache")


def figures(lines: Sequence[Line]) -> list[int]:
    counted, events = lines[-1]["counted"], [line["event"] for line in lines[:-1]]
    size = sum(len(event.get("ids", [])) for event in events)
    counts = [counted[name] for name in ("steps", "preemptions", "cached_rows")]
    return [len({event["id"] for event in events}), len(events), size, *counts]


def render(rows: Sequence[Sequence[str]], sums: Sequence[int]) -> str:
    header = ["model", "run", *FIGURES, "", ""]
    total = ["all", f"{len(rows)} of each", *(f"{figure:,}" for figure in sums), "", ""]
    return report.table(header, [*map(list, rows), total])


if __name__ == "__main__":
    sys.exit(main())
