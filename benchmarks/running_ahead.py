"""The gain of running ahead: each kind of work always, and as the engine decides, in turns with never.

Several bytes of blt in a step, all passes of a draft in one launch, passes over a block (`engine.step.ahead`). The text
must be the same.
"""

from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.config import Policy

from . import plot, report
from .generate import Reading, as_served, generate, prompts, running_ahead
from .paired import in_turn, shown, spread
from .program import Content, Subject, Verdict, finish, parser, subject
from .variants import ways_of

PROMPT_BYTES = 100
LEAST = 0.97
"""Where nothing is gained the ratio is 1, and the median of a few turns this much off."""
KINDS: dict[str, tuple[str, Policy]] = {
    "bytes": ("blt", "always"),
    "blt, as measured": ("blt", "measured"),
    "drafts": ("blt-s k=8", "always"),
    "drafts, as measured": ("blt-s k=8", "measured"),
    "blocks": ("blt-d B=8", "always"),
    "blocks, as measured": ("blt-d B=8", "measured"),
}
"""The decoder that shows each kind, and the policy."""


def main(arguments: Sequence[str] | None = None) -> None:
    program = parser("running_ahead", __doc__, replays=True)
    program.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16], help="requests at a time")
    program.add_argument("--bytes", type=int, default=128, help="generated per request and turn (%(default)s)")
    program.add_argument("--kinds", nargs="+", choices=KINDS, help="all by default")
    options = program.parse_args(arguments)
    with subject(options) as model:
        rows = measure(model, options.kinds or list(KINDS), options.concurrency, options.bytes, options.turns)
    finish("running_ahead", model, {"rows": rows}, options, arguments)


def measure(
    model: Subject, kinds: Sequence[str], concurrency: Sequence[int], count: int, turns: int
) -> list[dict[str, Any]]:
    engine = model.engine(max_sequences=max(concurrency))
    wrap, ways = model.wrap(engine), ways_of(engine, drawn=model.drawn)
    rows = []

    def run(texts: list[list[int]], how: dict[str, Any], policy: Policy) -> Reading:
        with running_ahead(engine, policy):
            return generate(engine, texts, count, how, wrap)

    with as_served(engine):
        for number, kind in tqdm([*product(concurrency, kinds)], disable=None):
            way, policy = KINDS[kind]
            if way not in ways:
                continue
            once = partial(run, prompts(number, PROMPT_BYTES), ways[way])
            once(policy)
            pairs = in_turn(partial(once, "never"), partial(once, policy), turns)
            rows.append(
                {
                    "kind": kind,
                    "decoder": way,
                    "at_a_time": number,
                    "over_never": spread(a.bytes_per_second / n.bytes_per_second for n, a in pairs),
                    "bytes_per_second": spread(a.bytes_per_second for _, a in pairs),
                    "same_text": all(a.texts == n.texts for n, a in pairs),
                }
            )
    return rows


def render(content: Content) -> str:
    return report.table(
        ["ahead", "decoder", "at a time", "times never", "bytes per second", "same text"],
        [
            [row["kind"], row["decoder"], str(row["at_a_time"]), shown(row["over_never"])]
            + [shown(row["bytes_per_second"], ",.0f"), "yes" if row["same_text"] else "**no**"]
            for row in content["rows"]
        ],
    )


def judge(content: Content) -> list[Verdict]:
    rows = content["rows"]
    chosen = [row for row in rows if "measured" in row["kind"]]
    verdicts = [Verdict("text, whatever runs ahead", "the same", "", all(row["same_text"] for row in rows))]
    if chosen:
        worst = min(chosen, key=lambda row: row["over_never"]["median"])
        found = f"{shown(worst['over_never'])} for {worst['kind']} with {worst['at_a_time']}, the least"
        met = worst["over_never"]["median"] >= LEAST
        verdicts.append(Verdict("running ahead as measured", f"at least {LEAST} of never's bytes/s", found, met))
    return verdicts


def draw(content: Content, path: Path) -> None:
    rows = content["rows"]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    numbers = sorted({row["at_a_time"] for row in rows})
    with plot.axes(path, "requests at a time", "bytes per second, those of never = 1", ticks=numbers) as on:
        for kind in kinds:
            of = [row for row in rows if row["kind"] == kind]
            places = [row["at_a_time"] for row in of]
            ratios = [row["over_never"] for row in of]
            around = [[r["median"] - r["least"] for r in ratios], [r["most"] - r["median"] for r in ratios]]
            on.errorbar(places, [r["median"] for r in ratios], yerr=around, fmt="o-", capsize=3, label=kind)
        on.axhline(1, color=plot.INK, linestyle="--", marker="")


if __name__ == "__main__":
    main()
