"""T9: does it pay to launch before the host has read the earlier results, and is the text the same?

The 1B shape, one request at a time: never, as the engine decides by its measured costs, and always: several bytes of
blt and then the first half of the next step; a whole draft and the first half of its verification; passes over a block
without reading back between them.
"""

from functools import partial
from typing import Any

from benchmarks.generate import Reading, generate, prompts
from benchmarks.models import random_model
from benchmarks.paired import in_turn, spread
from benchmarks.replay import replayed
from benchmarks.variants import RANDOM
from engine.config import Policy

from .piece import Piece
from .profiling import profile_steps
from .setting import Setting
from .shape_1b import shape_of

AHEAD: dict[str, Policy] = {"never": "never", "as now": "measured", "always": "always"}
WAYS = {name: RANDOM["fast"][name] for name in ("blt", "blt-s k=8", "blt-d B=8", "blt-dv B=8")}
HOPED_US = 180.0
"""A byte of blt: exposed host time with everything launched ahead."""


def measure(setting: Setting, piece: Piece) -> None:
    count, turns = (60, 1) if setting.quick else (160, 5)
    shape, cache_bytes = shape_of(setting)
    model = random_model(setting.work, shape, "fast", device=setting.device)
    engine = setting.engine(model, dtype="bfloat16", max_sequences=4, cache_bytes=cache_bytes)
    prompt, wrap = prompts(1, 20 if setting.quick else 100), replayed(engine)

    def run(how: dict[str, Any], when: str) -> Reading:
        engine.stepper.ahead.policy = AHEAD[when]
        return generate(engine, prompt, count, how, wrap)

    rows: list[dict[str, Any]] = []
    for way, how in WAYS.items():
        for when in AHEAD:
            run(how, when)
            pairs = in_turn(partial(run, how, "never"), partial(run, how, when), turns)
            engine.stepper.ahead.policy = AHEAD[when]
            steps = profile_steps(engine, how, wrap, setting)
            idle = max(0.0, steps["ms_per_step"] - steps["busy_ms_per_step"])
            found = pairs[-1][1]
            same = all(ahead.texts == never.texts for never, ahead in pairs)
            row = {
                "decoder": way,
                "ahead": when,
                "over_never": spread(ahead.bytes_per_second / never.bytes_per_second for never, ahead in pairs),
                "bytes_per_second": spread(ahead.bytes_per_second for _, ahead in pairs)["median"],
                "host_us_per_byte": 1000 * idle * found.steps / found.committed,
                "same_text": same,
            }
            rows.append(row)
            piece.row("ahead", row)
            piece.put(decided={"T9, running ahead": decide(rows)})
            if not same:
                piece.fail(f"{way}, ahead {when}: another text than without running ahead")


def decide(rows: list[dict[str, Any]]) -> str:
    """The conclusion for blt."""
    found = {row["ahead"]: row for row in rows if row["decoder"] == "blt"}
    if len(found) < len(AHEAD):
        return "Not decided: figures are missing."
    best = max(found, key=lambda when: found[when]["over_never"]["median"])
    exposed = found["always"]["host_us_per_byte"]
    said = f"blt is fastest with ahead: {best} ({found[best]['over_never']['median']:.2f} times never"
    if best != "as now":
        now = found["as now"]["over_never"]["median"]
        wrong = found[best]["over_never"]["median"] > 1.03 * now
        said += f"; as now {now:.2f}{', so that the engine chooses wrongly' if wrong else ''}"
    verdict = "as hoped" if exposed <= HOPED_US else "more than was hoped"
    return f"{said}). Always, the host is exposed for {exposed:.0f} us a byte ({verdict})."
