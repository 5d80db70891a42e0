"""The model card of a trained model: its purpose, data, quality and limits."""

from collections.abc import Sequence

from engine.config import ModelConfig

from .corpus import HELD_OUT_ONE_IN, PYTHON, Corpus
from .decoding import BEGIN, END
from .evaluate import Evaluation
from .loops import TEXT_BYTES
from .packages import licences
from .state import PATCHER, State, fraction

PROMPTS = ("def read_lines(path):\n", "import os\nimport sys\n\n\nclass ", "    def __init__(self, ")


def card(state: State, training: Corpus, result: Evaluation, looping: float, samples: Sequence[bytes]) -> str:
    """The card as Markdown. looping: share of greedy texts that end in a loop. samples: texts that continue
    `PROMPTS`."""
    sizes = {name: weight.numel() for name, weight in state.weights.items()}
    patcher_size = sum(size for name, size in sizes.items() if name.startswith(PATCHER))
    size = state.config.block_size or 0
    kept = ", ".join(f"{share:.1%}" for share in result.kept)
    places = ", ".join(f"{share:.2f}" for share in result.masked_accuracy_by_place)
    return f"""\
# {state.config.name}

A Fast-BLT model (byte-latent, with block diffusion) of {sum(sizes.values()) / 1e6:.2f} million parameters, its entropy
patcher ({patcher_size / 1e6:.2f} million) included. It continues {_text(training)}. It is here so that the server runs,
and its tests mean something, without a download; it is not a useful assistant.

| measured on held-out files | |
|---|---|
| next byte | **{result.bits_per_byte:.3f} bits per byte**, {result.byte_accuracy:.1%} right |
| `xz -9` of the same files, as one | {result.xz_bits_per_byte:.3f} bits per byte |
| masked cells, whole block masked, block at a patch start | {result.masked_accuracy:.1%} right |
| the same by place in the block | {places} |
| drafts in one step, from anywhere, that the model would have written: of the first {size // 2} bytes, of all {size} | {kept} |
| greedy texts of {TEXT_BYTES} bytes, after held-out prompts, that end in a loop | {looping:.0%} |
| mean patch | {result.mean_patch:.2f} bytes |

{result.bytes / 1e6:.2f} MB of the held-out files, read in slices of {result.context} bytes that each begin anew, EOS of every file
counted; the bfloat16 weights of this folder, float32 arithmetic. `python -m training.evaluate FOLDER{_archive(training)}` measures it again.

## Data and licence

{card_data(training)}

{training.num_bytes / 1e6:.1f} MB to learn from. One file in {HELD_OUT_ONE_IN}, by a hash of its name, is held out; of files
with the same contents only one is used. A document is BOS, the file's bytes, EOS. The weights are under this project's
licence, Apache-2.0; text that the model repeats from its data stays under its own.

## Shape

{_shape(state.config)}

## Training

{_training(state)}

![training losses over bytes seen](loss.png)

`make train` trains it anew. A run bounded by minutes sees more or less text according to the machine, so figures
differ.

## Decoders

{BEGIN}

Not measured yet: `fastblt compare --model models/nano --write`.

{END}

## Limits

* {_seen(state, training)} Names and calls look right more often than they are; greedy text may repeat itself for ever (see the table).
* {_text(training)} only. Anything else is continued badly.
* Rows were at most {state.settings.lengths[-1][1]} bytes long. More context than that works but is not what it learnt.
* Drafts of whole blocks are weaker than next bytes (see the tables), and get weaker with every cell.

## Samples

Temperature 0.6, seed 0; the mark \u2038 is where the prompt ends.

{_samples(samples)}"""


def _seen(state: State, training: Corpus) -> str:
    share = state.phases["model"].bytes / training.num_bytes
    return f"It has seen the equivalent of {share:.0%} of its training data{' in this run' * bool(state.settings.model_of)}."


def _archive(training: Corpus) -> str:
    """The flag for the text, unless it is the library of the running Python alone, which needs none."""
    return " --corpus ARCHIVE" if len(training.sources) > 1 else ""


def _text(training: Corpus) -> str:
    return "Python source" if len(training.sources) == 1 else "Python source and its English documentation"


def card_data(training: Corpus) -> str:
    """What the corpus is made of, with licences."""
    python = next(source for source in training.sources if source.startswith(PYTHON)).removeprefix(PYTHON)
    library = f"""\
The `.py` files of the standard library of CPython {python} (PSF License Agreement, version 2), as they lie next to the
interpreter, without installed packages"""
    packages = [source for source in training.sources if not source.startswith(PYTHON)]
    if not packages:
        return f"{library}."
    known = licences()
    listed = ", ".join(f"{source} ({known.get(source, 'licence unknown')})" for source in packages)
    return f"""\
{library}; and the sources and documentation, without tests, of {listed}."""


def _shape(config: ModelConfig) -> str:
    stages = {
        "patcher": config.patcher,
        "encoder": config.encoder,
        "global": config.global_,
        "decoder": config.decoder,
    }
    rows = [
        f"| {name} | {stack.num_layers} | {stack.dim} | {stack.num_heads} | {stack.ffn_dim} | {stack.window or 'all'} |"
        for name, stack in stages.items()
    ]
    table, hashes = "\n".join(rows), config.hashes
    return f"""\
| stage | layers | width | heads | feed-forward | window |
|---|---|---|---|---|---|
{table}

k = {config.slots} slots per patch, longest patch {config.patching.max_patch_length} bytes; {hashes.num_tables} hash
tables of {hashes.rows} rows for groups of {", ".join(map(str, hashes.group_sizes))} bytes; the decoder looks its bytes
up in a table of its own, with [MASK] = {config.mask_id}."""


def _training(state: State) -> str:
    settings, patcher, main = state.settings, state.phases["patcher"], state.phases["model"]
    lengths = ", ".join(f"{length} bytes from {start:.0%} on" for start, length in settings.lengths)
    machines = ", ".join(f"{machine} ({seconds / 60:.0f} minutes)" for machine, seconds in state.machines.items())
    done = fraction(state, main)
    threshold = state.config.patching.threshold
    if settings.model_of:
        began = f"""\
The run began from the finished weights of an earlier model ({settings.model_of}), and kept its patcher and
  threshold, {threshold} nats. What its training saw is not counted here."""
    else:
        began = f"""\
The patcher first: {patcher.bytes / 1e6:.1f} MB seen, {patcher.seconds / 60:.0f} minutes. Then the threshold that
  gives a mean patch of {settings.mean_patch}: {threshold} nats."""
    unfinished = f"\n* The run is not finished: {done:.0%} of it is done." if done < 1 else ""
    return f"""\
* Objective: Fast BLT (arXiv 2605.08044), section 3.2: next-byte loss plus masked blocks of {state.config.block_size}
  cells that start at patch starts, weighted 1/t, t from 0.05 to 1. Departures: the block term has weight
  {settings.mask_weight}; blocks are a sample ({settings.blocks_per_kib} per 1024 bytes) and weighted for it; every
  block has its own t, spread evenly over the batch, except for the {settings.full_share:.0%} that are masked whole. The
  block term joins after {settings.blocks_from:.0%} of the model's phase, and rises to its weight in
  {settings.block_warm_up:.0%} of it. The blocks of {settings.own_share:.0%} of the rows
  start anywhere and hold the model's own greedy continuations instead of the text.
* {began} Then the model: {main.step} steps,
  {main.bytes / 1e6:.1f} MB seen, {main.seconds / 60:.0f} minutes.
* Rows: {lengths}; {settings.batch_bytes} bytes per step. Muon {settings.matrix_rate} for matrices, AdamW
  {settings.table_rate} for tables, head and norms; {settings.warm_up} steps of warm-up, full
  rates for {settings.hold:.0%} of a phase, then cosine to 0; gradient norm clipped at 1 in the model's phase;
  {"bfloat16" if settings.bf16 else "float32"} products.
* Trained on: {machines}.{unfinished}"""


def _samples(texts: Sequence[bytes]) -> str:
    pairs = zip(PROMPTS, (text.decode(errors="replace") for text in texts), strict=True)
    return "\n".join(f"```python\n{prompt}\u2038{text.rstrip()}\n```\n" for prompt, text in pairs)
