"""What goes into the engine and comes out: requests in, events out. Plain data, no tensors.

Every admitted request ends in exactly one `Finished` or `Failed`. Events of one request arrive in order.
"""

import math
from typing import Literal

import msgspec

from .logs import LevelName

MAX_DRAFT = 32
"""Most bytes of a draft."""

DecoderName = str
"""A row of `engine.decoders.table`."""
FinishReason = Literal["stop", "length", "dead_end", "abort", "timeout"]
"""dead_end: the request's grammar lets no byte follow a text that does not match it yet, or reached a limit there."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose a byte from its logits. temperature 0 is greedy and ignores the filters and the seed.

    Order: logit_bias, repetition_penalty, the other penalties, allowed_ids, temperature, then top_k, top_p, min_p, each
    over the ids that the one before kept. `logit_bias` maps ids to an additive bias in [-100, 100].
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    """Like the next, over the ids generated so far."""
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    """Logits of ids in the prompt or generated so far are divided by it where positive, else multiplied (Keskar et al.
    2019, CTRL)."""
    allowed_ids: list[int] = []
    """The only ids that may be chosen; empty for all."""
    logit_bias: dict[int, float] = {}
    seed: int = 0
    """64 bits. With `Request.sample_index` and the position in the output it fixes every draw."""

    @property
    def is_penalised(self) -> bool:
        """Whether a logit depends on the ids before its place."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)


class UnmaskRule(msgspec.Struct, frozen=True, kw_only=True):
    """Which cells of a block become bytes after a pass (Fast BLT 3.1.2); see `kernels.unmasking.unmask`."""

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
    stop_ids: list[int] = []
    """Ids that end the output, and stay in its ids."""
    include_stop: bool = False
    """Keep the stop string, or the byte of the stop id, in the text."""
    min_tokens: int = 0
    """Ids to generate before one that ends the output: EOS, a stop id, the last byte of a stop string. The end of a
    grammar comes before."""
    ignore_eos: bool = False
    grammar: str = ""
    """What the output must match, as `engine.grammars` takes it; empty for anything."""
    logprobs: int | None = None
    """How many alternatives to report per generated id; None reports nothing, 0 only the chosen one."""
    prompt_logprobs: bool = False
    """Also report `logprobs` for the prompt (the first id has none)."""
    prompt_top: int | None = None
    """How many alternatives to report per id of the prompt; None takes `logprobs`."""
    priority: int = 0
    """Lower runs first."""
    timeout: float | None = None
    """Seconds after `submitted` at which the request ends with reason "timeout"; negative if it was overdue then."""
    submitted: float | None = None
    """When it was submitted, by `time.monotonic`, which is one clock for all processes of a machine; None for when the
    engine takes it."""
    decoder: DecoderName = "blt"
    draft_length: int = 8
    """Most bytes to draft per round, 1 to `MAX_DRAFT`. This, the next three fields and `exact` are options of some
    decoders; their rows of the table name them."""
    block_size: int | None = None
    """Bytes per block; None takes the length that the model was trained with."""
    unmask: UnmaskRule | None = None
    """None takes the rule of the decoder's row."""
    finish_patch: bool = False
    """Begin blocks only where a patch begins."""
    trace: bool = False
    """Report how every round produced its bytes."""
    patches_from: int | None = None
    """Report entropies and patch starts from this id on; 0 is the prompt's first. None reports nothing."""
    exact: bool = True
    """False also allows decoders whose text differs from blt's."""
    cache_salt: bytes = b""
    """It finds in the prefix cache only what requests with the same salt have left there."""
    output_ids: list[int] = []
    """Ids that an engine that died has generated for this request; generation continues after them."""
    log_fields: dict[str, str] = {}
    """Fields added to log lines about it, such as the id of its HTTP request."""

    @property
    def deadline(self) -> float:
        """By `time.monotonic`: infinite without a timeout, and before it is submitted."""
        return math.inf if self.timeout is None or self.submitted is None else self.submitted + self.timeout


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Stop a request; unknown or finished ids are ignored. Answered by a `Finished` with reason "abort" if live."""

    id: str


class SetLogLevel(msgspec.Struct, frozen=True, tag=True):
    """Log lines of at least this severity from now on."""

    level: LevelName


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Leave the loop at once."""


Command = Request | Abort | SetLogLevel | Shutdown


class TokenLogprob(msgspec.Struct, frozen=True):
    """Log-probabilities (natural) of one position under the model's own distribution, before any filter."""

    id: int
    logprob: float | None
    """None for the first id of a prompt."""
    top: dict[int, float]
    """Likeliest first."""
    rank: int | None = None
    """1 for the likeliest id."""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a request cost so far. Its prompt's prefill and rows computed again after a preemption are not counted;
    passes of a round that a preemption interrupted are."""

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
    """How many of these became text, before the text was cut at a stop."""
    rows: dict[str, int] = {}
    """Rows per stage: patcher, encoder, global, decoder."""
    estimated_bytes: int = 0
    """Weight bytes by the paper's formula (4.2): decoder passes and encoder/global passes times their parameters."""
    bytes_read: int = 0
    """Bytes read, as counted: weights, the patcher's included, with each pass divided among the batch by rows; keys
    and values; hash rows."""
    preemptions: int = 0
    cached_tokens: int = 0
    """Ids of the prompt that were found in the prefix cache."""
    queue_seconds: float = 0.0
    """From its submission to its first step."""
    prefill_seconds: float = 0.0
    """From its first step to its first id."""
    decode_seconds: float = 0.0
    """From its first id to its end."""


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """How one round produced its bytes."""

    num_ids: int
    """Committed ids of this round."""
    drafts: list[int] = []
    """The bytes that were drafted, or decoded as a block."""
    accepted: int = 0
    """How many of these, from the first on, are among the committed ids."""
    passes: list[int] = []
    """For each cell of a block the pass in which it was settled, from 0 on."""
    patch_starts: list[int] = []
    """Positions in the output that start patches, if decided by now and not reported before."""


class Delta(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Newly committed ids, and the text bytes that are now certain.

    `text` is shorter than `ids` while it may end in the beginning of a stop string. Text that was sent is never taken
    back.
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
    """If asked for, the entropies after the next ids of prompt and output that the patcher has read: nats, float32. The
    prompt's come with the first generated id. The last id, or a last block, has none."""
    patch_starts: list[int] = []
    """Positions of the patches that these entropies start: 0 is the prompt's first id. The last one may be the position
    after the last id that has an entropy."""


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The last event of a request. `text` is what was still held back, without a completed stop string."""

    id: str
    reason: FinishReason
    text: bytes = b""
    stopped_by: bytes | int | None = None
    """The stop string or the stop id that ended it."""
    usage: Usage
    cumulative_logprob: float = 0.0
    """Sum over the generated ids; only computed with `Request.logprobs`."""


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The request could not be run; also a last event. Other requests are not affected."""

    id: str
    code: Literal["too_long", "decoder_unavailable", "invalid", "internal"]
    message: str
    param: str | None = None


class PoolStats(msgspec.Struct, frozen=True):
    """Pages of one cache."""

    total: int
    used: int
    cached: int = 0
    """Kept for later texts, and freed when a sequence needs pages."""


class DecoderCounts(msgspec.Struct, frozen=True, kw_only=True):
    """What all requests of one decoder have done and cost, without prefill. Dictionaries are per stage."""

    committed: int = 0
    """Ids generated."""
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_runs: list[int] = []
    """Rounds that drafted, by how many drafts were accepted: 0 to `MAX_DRAFT`, the last entry has longer runs too."""
    calls: dict[str, int] = {}
    """Passes that the requests took part in, counted once per request."""
    rows: dict[str, int] = {}
    bytes_read: dict[str, int] = {}
    seconds: dict[str, float] = {}
    """Their shares, by rows, of the time that passes took."""
    estimated_bytes: dict[str, int] = {}
    """Weight bytes by the paper's formula, which leaves the patcher out."""
    blt_estimated_bytes: int = 0
    """Weight bytes by that formula for plain BLT with the same ids: a decoder pass for each, and an encoder/global pass
    for each patch that they begin."""


class Snapshot(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine's state and its counters since it started, sent at intervals and whenever it becomes idle."""

    running: int = 0
    waiting: int = 0
    preemptions: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    """Time in steps, the host's work between the stages included."""
    prompt_rows: int = 0
    cached_rows: int = 0
    """Rows of prompts that were found in the prefix cache instead of computed."""
    calls: dict[str, int] = {}
    """Per stage: patcher, encoder, global, decoder."""
    rows: dict[str, int] = {}
    """Per stage."""
    bytes_read: dict[str, int] = {}
    """Per stage: weights, keys and values, look-ups."""
    stage_seconds: dict[str, float] = {}
    decoders: dict[str, DecoderCounts] = {}
    """Per decoder that a request asked for."""
    patch_sizes: list[int] = []
    """Patches that closed where generated ids begin the next, by the classes `engine.counts.PATCH_SIZES`."""
    patch_bytes: int = 0
    """Bytes in these patches."""
    pools: dict[str, PoolStats] = {}
    device_memory: tuple[int, int] | None = None
    """Bytes used by all processes, and in total; of a GPU."""
    dropped_log_lines: int = 0
    """By the engine process, since it started."""


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about an engine that do not change while it runs, for monitoring."""

    device: str = ""
    """The device's name."""
    dtype: str = ""
    weights: str = ""
    """Dtype of the large matrices."""
    kernels: str = ""
    weight_bytes: dict[str, int] = {}
    """Per stage: bytes of weights that every pass reads."""
    page_bytes: dict[str, int] = {}
    """Per pool: the size of a page."""
    page_rows: dict[str, int] = {}
    """Per pool: the rows of a page. A row is a byte, in the pools global and latent a patch."""
    peak_bandwidth: dict[str, float] = {}
    """Bytes per second of this machine's memory, as measured; see `engine.costs.bandwidth.probe`."""
    prompt_rows: int = 0
    """Most rows of prompts in a step."""
    step_rows: int = 0
    """Most rows of a step, prompts included."""
    shortest_step: float = 0.0
    """Seconds, as calibrated; 0 if it was not."""
    max_sequences: int = 0
    """Most that run at once."""


Event = Delta | Finished | Failed
