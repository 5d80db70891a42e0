"""What crosses the border of the engine: requests in, events out. Plain data, no tensors.

Every admitted request ends in exactly one `Finished` or `Failed`. Events of one request arrive in order.
"""

from typing import Literal

import msgspec

MAX_DRAFT = 32

DecoderName = str
"""A row of `engine.decoders.table`."""
FinishReason = Literal["stop", "length", "abort", "timeout"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose a byte from its logits. temperature 0 is greedy and ignores the filters and the seed.

    Order: logit_bias, penalties (over the ids generated so far), temperature, then top_k, top_p, min_p, each on
    what the one before left. `logit_bias` maps ids to an additive bias in [-100, 100].
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    """64 bits. With `Request.sample_index` and the position in the output it fixes every draw."""


class UnmaskRule(msgspec.Struct, frozen=True, kw_only=True):
    """Which cells of a block become bytes after a pass (Fast BLT 3.1.2); see `engine.decoders.unmasking`."""

    rule: Literal["confidence", "entropy", "one_step"]
    alpha: float = 0.7
    """confidence: cells whose likeliest byte is likelier than this."""
    gamma: float = 0.8
    """entropy: most nats that the cells of one pass may have together."""
    minus_max: bool = False
    """entropy: do not count the largest of them."""
    top_p: float | None = None
    """Draws cells with this instead of the request's top_p, where temperature is above 0."""


class Request(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One sequence to continue. An HTTP request with n, best_of or several prompts becomes several of these."""

    id: str
    prompt_ids: list[int]
    """Token ids, BOS included if it is wanted; never empty."""
    max_tokens: int
    """Ids to generate; 0 only runs the prompt, for `prompt_logprobs` or `patches_from`."""
    sampling: SamplingParams = SamplingParams()
    sample_index: int = 0
    stop: list[bytes] = []
    ignore_eos: bool = False
    logprobs: int | None = None
    """How many alternatives to report per generated id; None reports nothing, 0 only the chosen one."""
    prompt_logprobs: bool = False
    """Also report `logprobs` for the prompt (the first id has none)."""
    priority: int = 0
    """Lower runs first."""
    timeout: float | None = None
    """Seconds after admission at which the request ends with reason "timeout"."""
    decoder: DecoderName = "blt"
    draft_length: int = 8
    """Most bytes to draft per round, 1 to `MAX_DRAFT`. It, the next three and `exact` are options of the decoders whose
    rows of the table name them."""
    block_size: int | None = None
    """Bytes per block; None takes the length that the model was trained with."""
    unmask: UnmaskRule | None = None
    """None takes the rule of the decoder's row."""
    finish_patch: bool = False
    """Begin blocks only where a patch begins."""
    trace: bool = False
    """Report how every round came to its bytes."""
    patches_from: int | None = None
    """Report entropies and patch starts from this id on; 0 is the prompt's first. None reports nothing."""
    exact: bool = True
    """False also allows decoders whose text is their own."""
    output_ids: list[int] = []
    """Ids that this request has generated already, in an engine that died: it goes on behind them."""
    log_fields: dict[str, str] = {}
    """What log lines about it also say, as the id of the HTTP request that it is part of."""


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Stop a request; unknown or finished ids are ignored. Answered by a `Finished` with reason "abort" if live."""

    id: str


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Leave the loop at once."""


Command = Request | Abort | Shutdown


class TokenLogprob(msgspec.Struct, frozen=True):
    """Log-probabilities (natural) of one position under the model's own distribution, before any filter."""

    id: int
    logprob: float | None
    """None for the first id of a prompt."""
    top: dict[int, float]


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a request cost so far. Neither its prompt's prefill is counted, nor rows that a preemption makes it compute
    again; passes of a round that a preemption cut off are."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    """Generated ids, a closing EOS not counted."""
    decoder_calls: int = 0
    """Decoder passes: the paper's decoder NFE."""
    global_calls: int = 0
    """Passes through encoder and global: the paper's encoder/global NFE."""
    rounds: int = 0
    drafted: int = 0
    """Bytes drafted, or decoded in blocks."""
    accepted: int = 0
    """Of these, bytes that became text, before any was cut off at a stop."""
    rows: dict[str, int] = {}
    """Rows per stage: patcher, encoder, global, decoder."""
    estimated_bytes: int = 0
    """Weight bytes by the paper's formula (4.2): decoder passes and encoder/global passes times their parameters."""
    bytes_read: int = 0
    """Bytes really read: weights, the patcher's too, each pass shared out among the batch by rows; keys and values;
    hash rows."""
    preemptions: int = 0
    cached_tokens: int = 0
    """Ids of the prompt that the prefix cache knew."""
    queue_seconds: float = 0.0
    """From its arrival in the engine to its first step."""


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """How one round came to its bytes, for whoever wants to watch."""

    num_ids: int
    """Committed ids of this round."""
    drafts: list[int] = []
    """What was drafted, or decoded as a block."""
    accepted: int = 0
    """How many of these, from the first on, are among the committed ids."""
    passes: list[int] = []
    """Of a block, in which pass each cell was settled, from 0 on."""
    patch_starts: list[int] = []
    """Places in the output that start patches, as far as decided now and not told before."""


class Delta(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Newly committed ids, and the text bytes that are now certain.

    `text` lags behind `ids` while a stop string may be under way; what was sent is never taken back.
    """

    id: str
    ids: list[int] = []
    text: bytes = b""
    logprobs: list[TokenLogprob] = []
    """One per entry of `ids`, if asked for."""
    traces: list[Trace] = []
    """One per round, if asked for."""
    prompt_logprobs: list[TokenLogprob] = []
    """Sent once, before the first id, complete, one per prompt id."""
    entropies: list[float] = []
    """If asked for, of the next ids of prompt and output that have been through the patcher: nats after each, float32.
    The prompt's come with the first generated id, those of the last id, or of a last block, never."""
    patch_starts: list[int] = []
    """Where these entropies let patches start: 0 is the prompt's first id. May name the place after the last id that
    has an entropy."""


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The one last event of a request. `text` flushes what was still held back (nothing of a stop string)."""

    id: str
    reason: FinishReason
    text: bytes = b""
    usage: Usage
    cumulative_logprob: float = 0.0
    """Sum over the generated ids; only computed with `Request.logprobs`."""


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The request could not be run; also a last event. Nothing else was hurt."""

    id: str
    code: Literal["too_long", "decoder_unavailable", "invalid", "internal"]
    message: str
    param: str | None = None


class PoolStats(msgspec.Struct, frozen=True):
    """Pages of one cache."""

    total: int
    used: int
    cached: int = 0
    """Kept for texts to come, and there for whoever needs a page."""


class DecoderCounts(msgspec.Struct, frozen=True, kw_only=True):
    """What all requests of one decoder have done and cost, prefill left out. Dictionaries are per stage."""

    committed: int = 0
    """Ids generated."""
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    calls: dict[str, int] = {}
    """Passes that the requests took part in, each counted for every one of them."""
    rows: dict[str, int] = {}
    read_bytes: dict[str, int] = {}
    seconds: dict[str, float] = {}
    """Their shares, by rows, of the time that passes took."""
    estimated_bytes: dict[str, int] = {}
    """Weight bytes by the paper's formula; it knows no patcher."""
    blt_estimated_bytes: int = 0
    """What that formula gives for plain BLT writing the same ids: a decoder pass each, an encoder/global pass for each
    patch that they begin."""


class Snapshot(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine's state and its counters since start, sent every so often and whenever it falls idle."""

    running: int = 0
    waiting: int = 0
    preemptions: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    """In steps, the host's work between the stages included."""
    prompt_rows: int = 0
    cached_rows: int = 0
    """Of prompts, found in the prefix cache instead."""
    calls: dict[str, int] = {}
    """Per stage: patcher, encoder, global, decoder."""
    rows: dict[str, int] = {}
    """Per stage."""
    read_bytes: dict[str, int] = {}
    """Per stage: weights, keys and values, look-ups."""
    stage_seconds: dict[str, float] = {}
    decoders: dict[str, DecoderCounts] = {}
    """Per decoder that a request asked for."""
    pools: dict[str, PoolStats] = {}
    device_memory: tuple[int, int] | None = None
    """Bytes used, by whomever, and in all; of a GPU."""
    dropped_log_lines: int = 0
    """By the engine process, since it began."""


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What stays as it is while an engine lives, for whoever watches it."""

    device: str = ""
    """Its name."""
    dtype: str = ""
    weights: str = ""
    """What the large matrices are stored in."""
    kernels: str = ""
    weight_bytes: dict[str, int] = {}
    """Per stage: what every pass of it reads of the weights."""
    page_bytes: dict[str, int] = {}
    """Per pool: the size of a page."""
    peak_bandwidth: dict[str, float] = {}
    """Bytes per second that this machine's memory gave when it was tried; see `engine.costs.bandwidth.probe`."""
    prompt_rows: int = 0
    """Most rows of prompts in a step."""


Event = Delta | Finished | Failed
