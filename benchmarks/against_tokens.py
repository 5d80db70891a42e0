"""Bytes per second of our decoders and of llama.cpp, the usual choice on a CPU, in turns.

llama.cpp (`llama-cpp-python`, the extra `tokens`) runs a Llama of the same class: one request at a time like ours, with
as many threads, greedily; both times leave the prompt out. A token counts as 4.4 bytes, the mean of Llama 3's tokens in
the BLT paper. Both models have random weights: this measures speed, not quality.
"""

import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm

from engine.checkpoint import count_parameters
from engine.memory.prefix import BLOCK

from . import plot, report
from .generate import Reading, generate, prompts
from .paired import shown, spread
from .program import Content, Subject, Verdict, finish, lacking, parser, subject
from .token_engine import TokenReading, token_engine
from .token_models import FORMATS, LLAMAS, Llama, token_model
from .variants import TRAINED, acceptance, ways_of

BYTES_PER_TOKEN = 4.4
PROMPT_BYTES = 2 * BLOCK
LEAST_BYTES = 34
"""Two rounds of blt-s k=16 at most; the first one is not timed."""

Pairs = Mapping[str, Mapping[str, Sequence[tuple[TokenReading, Reading]]]]
"""Turns of llama.cpp and of ours, by the format of its weights and by our decoder."""


def main(arguments: Sequence[str] | None = None) -> None:
    program = parser("against_tokens", __doc__, shape="1b", replays=True)
    program.add_argument("--bytes", type=int, default=66, help="bytes generated per turn, by either side (%(default)s)")
    program.add_argument("--ways", nargs="+", choices=list(TRAINED), help="our decoders (default: all)")
    program.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=FORMATS, help="formats of the Llama's weights (default: all)"
    )
    options = program.parse_args(arguments)
    if options.device != "cpu":
        program.error("--device must be cpu: llama.cpp runs on a CPU here")
    if options.shape not in (None, *LLAMAS):
        program.error(f"--shape must be one of {', '.join(LLAMAS)}, which have a Llama to be compared with")
    if options.bytes < LEAST_BYTES:
        program.error(f"--bytes must be at least {LEAST_BYTES}: the first round of a decoder is not timed")
    if lacks := lacking("against_tokens"):
        raise SystemExit(lacks)
    with TemporaryDirectory(prefix="benchmarks-") as temporary, subject(options) as model:
        # A checkpoint counts as one of the 1B size.
        shape = options.shape or "1b"
        paths = {form: token_model(options.work or Path(temporary), shape, form) for form in options.formats}
        found = measure(model, LLAMAS[shape], paths, options.ways or list(TRAINED), options.bytes, options.turns)
    finish("against_tokens", model, found, options, arguments)


def measure(
    model: Subject, llama: Llama, paths: Mapping[str, Path], wanted: Sequence[str], count: int, turns: int
) -> dict[str, Any]:
    """Measures `count` bytes per turn. paths: the Llama's files by format; one at a time is loaded, along with our
    model."""
    engine = model.engine(max_sequences=4, cache_bytes=1 << 30)
    # Either side has its prompt cached except for the last id, so that no turn computes it again.
    prompt, wrap, draw = prompts(1, PROMPT_BYTES), model.wrap(engine), random.Random(0)
    ids = [draw.randrange(llama.vocab_size) for _ in range(round(PROMPT_BYTES / BYTES_PER_TOKEN))]
    tokens = max(1, round(count / BYTES_PER_TOKEN))
    ways = {way: how for way, how in ways_of(engine, drawn=model.drawn).items() if way in wanted}
    for how in ways.values():
        generate(engine, prompt, min(count, 16), how, wrap)
    pairs: dict[str, dict[str, list[tuple[TokenReading, Reading]]]] = {}
    read = {}
    for form, path in paths.items():
        pairs[form] = {way: [] for way in ways}
        with token_engine(path, torch.get_num_threads(), len(ids) + 1 + tokens) as theirs:
            facts = theirs.facts
            theirs.generate(ids, 1)
            for way in tqdm(list(ways) * turns, desc=form, disable=None):
                pairs[form][way].append(
                    (theirs.generate(ids, tokens), generate(engine, prompt, count, ways[way], wrap))
                )
        # All matrices, the embedding as the head, and the keys and values that attention reads.
        read[form] = (facts.size + llama.kv_row * (len(ids) + 1 + tokens / 2)) / BYTES_PER_TOKEN
    parameters = count_parameters(engine.model_config)
    return {
        "bytes_per_token": BYTES_PER_TOKEN,
        "llama_cpp": {"version": facts.version, "system": facts.system},
        "llama": {"name": llama.name, "parameters": llama.parameters},
        "our_parameters": parameters["total"] - parameters["hash tables"],
        **figures(pairs, read, replays=model.replays),
    }


def figures(pairs: Pairs, read: Mapping[str, float], *, replays: bool) -> dict[str, Any]:
    """Figures of the turns. read: bytes that the Llama reads per byte of text, by format."""
    formats = []
    for form, of in pairs.items():
        theirs = [reading for found in of.values() for reading, _ in found]
        rates = spread(reading.tokens_per_second for reading in theirs)
        formats.append(
            {
                "format": form,
                "tokens_per_second": rates,
                "bytes_per_second": {key: rate * BYTES_PER_TOKEN for key, rate in rates.items()},
                "read_mb_per_byte": read[form] / 1e6,
                # The share of turns. If it is most of them, something else used the cores, too.
                "asleep": statistics.mean(reading.waiting == "asleep" for reading in theirs),
            }
        )
    rows = []
    for way in next(iter(pairs.values())):
        ours = [found for of in pairs.values() for _, found in of[way]]
        reads = statistics.median(found.read_per_byte for found in ours)
        rows.append(
            {
                "decoder": way,
                "acceptance": acceptance(way, replays=replays),
                "bytes_per_second": spread(found.bytes_per_second for found in ours),
                "read_mb_per_byte": reads / 1e6,
                "global_calls_per_byte": statistics.median(found.global_calls / found.committed for found in ours),
                "against": {
                    form: {"ratio": spread(map(_ratio, of[way])), "predicted": read[form] / reads}
                    for form, of in pairs.items()
                },
            }
        )
    return {"formats": formats, "rows": rows}


def _ratio(pair: tuple[TokenReading, Reading]) -> float:
    theirs, ours = pair
    return ours.bytes_per_second / (theirs.tokens_per_second * BYTES_PER_TOKEN)


def render(content: Content) -> str:
    rows, formats, llama, library = (content[key] for key in ("rows", "formats", "llama", "llama_cpp"))
    header = ["ours", "acceptance", "bytes/s", "MB read a byte", "global calls a byte"]
    for of in formats:
        header += [f"times llama.cpp's {of['format']}", "predicted by bytes read"]
    ours = [
        [row["decoder"], row["acceptance"], shown(row["bytes_per_second"], ".1f"), f"{row['read_mb_per_byte']:,.1f}"]
        + [f"{row['global_calls_per_byte']:.2f}"]
        + [cell for of in row["against"].values() for cell in (shown(of["ratio"]), f"{of['predicted']:.2f}")]
        for row in rows
    ]
    theirs = [
        [of["format"], shown(of["bytes_per_second"], ".1f"), shown(of["tokens_per_second"], ".1f")]
        + [f"{of['read_mb_per_byte']:,.1f}"]
        for of in formats
    ]
    about = (
        f"{llama['name']} has {llama['parameters'] / 1e6:,.0f} million parameters, our model "
        f"{content['our_parameters'] / 1e6:,.0f} million without its hash tables. A token counts as "
        f"{content['bytes_per_token']} bytes. llama-cpp-python {library['version']}, {library['system']}"
    )
    tables = report.table(header, ours), report.table(["llama.cpp", "bytes/s", "tokens/s", "MB read a byte"], theirs)
    return "\n\n".join([*tables, about])


def judge(content: Content) -> list[Verdict]:
    label = " (replayed acceptance)" if content["subject"]["replays"] else ""
    verdicts = []
    for form in (of["format"] for of in content["formats"]):
        ratios = {row["decoder"]: row["against"][form]["ratio"] for row in content["rows"]}
        found = ", ".join(f"{shown(ratio)} times for {way}" for way, ratio in ratios.items())
        verdicts.append(Verdict(f"against llama.cpp with {form}{label}", "", found, None))
    return verdicts


def draw(content: Content, path: Path) -> None:
    rows, formats = content["rows"][::-1], [of["format"] for of in content["formats"]]
    height = 0.8 / len(formats)
    with plot.axes(path, "bytes a second, those of llama.cpp = 1", "") as on:
        for number, form in enumerate(formats):
            ratios = [row["against"][form]["ratio"] for row in rows]
            places = [place - number * height for place in range(len(rows))]
            medians = [ratio["median"] for ratio in ratios]
            around = [[r["median"] - r["least"] for r in ratios], [r["most"] - r["median"] for r in ratios]]
            on.barh(places, medians, height, xerr=around, ecolor=plot.INK, label=f"llama.cpp's {form}")
        on.axvline(1, color=plot.INK, linestyle="--", marker="")
        on.set_yticks([place - 0.4 + height / 2 for place in range(len(rows))], [row["decoder"] for row in rows])
        on.grid(visible=False, axis="y")


if __name__ == "__main__":
    main()
