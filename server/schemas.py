"""What `POST /v1/completions` takes and gives: OpenAI's legacy completions and our extensions.

Every field that is accepted is honoured, or asks for nothing (`server.neutral`); any other is refused with 400. A token
is a byte.
"""

from typing import Annotated, Any, Literal, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    FiniteFloat,
    PlainSerializer,
    PlainValidator,
    field_validator,
    model_validator,
)
from typing_extensions import TypedDict

from engine.types import MAX_DRAFT, TokenLogprob

from .base64_bytes import Base64Bytes, from_base64, is_base64
from .errors import ApiError, ShowsValue, shown
from .neutral import NEUTRAL, Neutral
from .options import OPTIONS, RULES, KnownDecoder, show_unmask
from .token_names import token_name

MAX_STOPS = 64
"""Every byte of a text is compared with each."""
MAX_STOP_BYTES = 1024
"""A longer stop string would make every step search further back."""
MAX_LOGPROBS = 260
"""All bytes and the special ids: the whole distribution."""
MAX_IDS = 260
"""In a list of ids: all bytes and the special ids."""
MAX_SALT = 256
"""Characters: enough for any random token."""

OF = {option: f"Extension, {' and '.join(decoders)}" for option, decoders in OPTIONS.items()}
"""How the description of a decoder's option begins."""

PROMPT_RULE = (
    'must be a string, bytes as {"base64": "..."}, or a non-empty array of strings, of such bytes, of token ids or of '
    "arrays of token ids"
)
Prompt = str | bytes | list[str] | list[bytes] | list[int] | list[list[int]]
PromptSchema = str | Base64Bytes | list[str] | list[Base64Bytes] | list[int] | list[list[int]]


def _check_prompt(value: Any) -> Prompt:
    def is_ids(part: object) -> bool:
        return isinstance(part, list) and bool(part) and all(type(token) is int for token in part)

    if isinstance(value, str) or is_ids(value):
        return cast(Prompt, value)
    if is_base64(value):
        return from_base64(value)
    if isinstance(value, list) and value:
        if all(isinstance(part, str) for part in value) or all(map(is_ids, value)):
            return value
        if all(map(is_base64, value)):
            return [from_base64(part) for part in value]
    raise ValueError(PROMPT_RULE)


def _check_stop(value: object) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError(f"must be a string or an array of at most {MAX_STOPS} strings")
    if len(stops) > MAX_STOPS:
        raise ShowsValue(f"must have at most {MAX_STOPS} strings, not {len(stops)}")
    if not all(0 < len(stop.encode()) <= MAX_STOP_BYTES for stop in stops):
        raise ValueError(f"a stop string must have 1 to {MAX_STOP_BYTES} bytes")
    return stops


def _check_ids(value: object) -> list[int]:
    if isinstance(value, list) and len(value) <= MAX_IDS and all(type(token) is int for token in value):
        return value
    raise ValueError(f"must be an array of at most {MAX_IDS} token ids")


def _check_allowed(value: object) -> list[int]:
    if ids := _check_ids(value):
        return ids
    raise ValueError("must have at least one id (leave it out to allow all)")


def _check_salt(value: object) -> str:
    if isinstance(value, str) and 0 < len(value) <= MAX_SALT:
        return value
    raise ValueError(f"must be a string of 1 to {MAX_SALT} characters")


_SALT_SCHEMA = Annotated[str, Field(min_length=1, max_length=MAX_SALT)]
_IDS_SCHEMA = Annotated[list[int], Field(max_length=MAX_IDS)]
Ids = Annotated[list[int], PlainValidator(_check_ids, json_schema_input_type=_IDS_SCHEMA)]
AllowedIds = Annotated[
    list[int],
    PlainValidator(_check_allowed, json_schema_input_type=Annotated[_IDS_SCHEMA, Field(min_length=1)]),
]
Salt = Annotated[str, PlainValidator(_check_salt, json_schema_input_type=_SALT_SCHEMA)]


Schema = dict[str, Any] | str


def _check_json(value: Any) -> Schema:
    if not isinstance(value, dict | str):
        raise ValueError("must be a JSON schema, as an object or as its text")
    return value


class Strict(BaseModel):
    """No coercion, no unknown fields; null means the default."""

    # A value that is wrong may be content, and an exception may be logged.
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class StreamOptions(Strict):
    """Only with `stream`."""

    include_usage: bool = Field(False, description="Send the usage in a last chunk that has no choices.")
    continuous_usage_stats: bool = Field(
        False, description="Extension: every chunk has the usage so far, without what it cost."
    )
    include_obfuscation: Literal[False] = Field(False, description="Padding of chunks is not offered.")


class UnmaskRule(Strict):
    """Which bytes of a block are settled after a pass. Each rule takes its own option, and any of them `top_p`."""

    rule: Literal["confidence", "entropy", "one_step"]
    alpha: FiniteFloat | None = Field(None, ge=0, le=1, description="confidence: settle above this. Default 0.7.")
    gamma: FiniteFloat | None = Field(
        None, ge=0, description="entropy: most nats, summed, of the cells settled in one pass. Default 0.8."
    )
    minus_max: bool | None = Field(None, description="entropy: leave the largest out of the sum.")
    top_p: FiniteFloat | None = Field(None, ge=0, le=1, description="Draws bytes of a block with this top_p.")

    @model_validator(mode="after")
    def _check_options(self) -> "UnmaskRule":
        owner = {"alpha": "confidence", "gamma": "entropy", "minus_max": "entropy"}
        for option, rule in owner.items():
            if getattr(self, option) is not None and self.rule != rule:
                raise ShowsValue(f"must not have {option} with the rule {self.rule!r}: {option} belongs to {rule!r}")
        return self


class JsonSchema(Strict):
    """As OpenAI's. What it asks for is always enforced, whatever `strict` is."""

    name: str
    schema_: dict[str, Any] = Field(alias="schema", description="The JSON schema.")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's way to ask for JSON, which comes without white space between tokens."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = Field(None, description="Of type json_schema.")

    @model_validator(mode="after")
    def _check_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("must have a json_schema if, and only if, its type is 'json_schema'")
        return self


class StructuredOutputs(Strict):
    """vLLM's way to say what each text must match: exactly one of these, except `whitespace_pattern`."""

    json_: Annotated[Schema | None, PlainValidator(_check_json, json_schema_input_type=Schema | None)] = Field(
        None, alias="json", description="A JSON schema, or its text."
    )
    regex: str | None = Field(None, description="A regular expression that the whole text matches.")
    choice: Annotated[list[str] | None, FailFast()] = Field(None, description="The text is one of these.")
    grammar: str | None = Field(None, description="A Lark grammar, in the dialect of llguidance.")
    json_object: bool = Field(False, description="Any JSON object.")
    whitespace_pattern: str | None = Field(
        None, description="json, json_object: a regular expression of what may stand between tokens. Default: nothing."
    )

    @model_validator(mode="after")
    def _check_kinds(self) -> "StructuredOutputs":
        others = [kind for kind in (self.regex, self.choice, self.grammar) if kind is not None]
        if len(others) + (self.json_ is not None) + self.json_object != 1:
            raise ValueError("must have exactly one of json, regex, choice, grammar and json_object")
        if others and self.whitespace_pattern is not None:
            raise ShowsValue("whitespace_pattern only goes with json and json_object")
        return self


def _add_neutral(schema: dict[str, Any]) -> None:
    why = "Accepted only with a value that has no effect."
    schema["properties"] |= {name: known.schema | {"description": why} for name, known in NEUTRAL.items()}


class CompletionRequest(Strict):
    """The body of `POST /v1/completions`."""

    model_config = ConfigDict(json_schema_extra=_add_neutral)

    model: str | None = Field(
        None,
        description="A name that /v1/models lists; 'NAME:DECODER' also chooses the decoder. By default the first.",
    )
    prompt: Annotated[Prompt, PlainValidator(_check_prompt, json_schema_input_type=PromptSchema)] = Field(
        "",
        description="A string becomes a begin-of-sequence id and its UTF-8 bytes; token ids are taken as they are. "
        "Extension: bytes in base64 become the ids that a string of these bytes would.",
    )
    add_special_tokens: bool = Field(
        True, description="Extension: false leaves the begin-of-sequence id of string prompts out."
    )
    truncate_prompt_tokens: int | None = Field(
        None,
        ge=-1,
        lt=2**31,
        json_schema_extra={"not": {"const": 0}},
        description="Extension: keep only this many ids of each prompt, the last ones, as vLLM does; a string prompt "
        "keeps its begin-of-sequence id, which counts. -1 keeps what fits beside max_tokens.",
    )
    max_tokens: int = Field(16, ge=0, lt=2**31, description="Most bytes to generate.")
    temperature: FiniteFloat = Field(1.0, ge=0, le=2, description="0 takes the likeliest byte.")
    top_p: FiniteFloat = Field(1.0, ge=0, le=1)
    n: int = Field(1, ge=1, lt=2**31, description="Choices per prompt.")
    best_of: int | None = Field(
        None,
        ge=1,
        lt=2**31,
        description="Generates this many per prompt and returns the n with the highest mean logprob.",
    )
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Alternatives to report per byte.")
    echo: bool = Field(False, description="Begin the text, and the logprobs, with the prompt.")
    stop: Annotated[list[str], PlainValidator(_check_stop, json_schema_input_type=str | list[str])] = Field(
        [], description="Generation ends before any of these strings."
    )
    presence_penalty: FiniteFloat = Field(0.0, ge=-2, le=2)
    frequency_penalty: FiniteFloat = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[FiniteFloat, Field(ge=-100, le=100)]] = Field(
        {}, description="Bias per token id, keys as decimal strings."
    )
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="The same seed gives the same bytes, whatever else the server does."
    )
    response_format: ResponseFormat | None = None
    user: str | None = Field(None, description="Accepted for compatibility; has no effect and is not stored.")

    decoder: KnownDecoder | None = Field(None, description="Extension: how to decode.")
    draft_length: int | None = Field(
        None, ge=1, le=MAX_DRAFT, description=f"{OF['draft_length']}: most bytes to draft per round. Default 8."
    )
    block_size: int | None = Field(
        None, ge=1, lt=2**31, description=f"{OF['block_size']}: bytes per block. Default: as trained."
    )
    unmask: UnmaskRule | None = Field(
        None,
        description=f"{OF['unmask']}. Default: "
        f"{', '.join(f'{show_unmask(rule)} for {name}'.replace(':', ' ') for name, rule in RULES.items())}.",
    )
    finish_patch: bool | None = Field(
        None, description=f"{OF['finish_patch']}: begin blocks only where a patch begins, as in training."
    )
    exact: bool | None = Field(
        None, description=f"{OF['exact']}: false also allows blt-d, whose text is not the model's own. Default true."
    )
    top_k: int = Field(0, ge=-1, lt=2**31, description="Extension: keep this many ids; 0 and -1 keep all.")
    min_p: FiniteFloat = Field(
        0.0, ge=0, le=1, description="Extension: keep ids at least this likely relative to the best."
    )
    repetition_penalty: FiniteFloat = Field(
        1.0,
        ge=0.01,
        le=100,
        description="Extension: divides logits of ids in the prompt or the text where positive, else multiplies them.",
    )
    allowed_token_ids: AllowedIds = Field([], description="Extension: choose only from these ids. Default: all.")
    min_tokens: int = Field(
        0, ge=0, lt=2**31, description="Extension: generate this many ids before one that may end the text."
    )
    stop_token_ids: Ids = Field([], description="Extension: ids that end the text.")
    include_stop_str_in_output: bool = Field(
        False, description="Extension: keep what ended the text, a stop string or the byte of a stop id, in it."
    )
    ignore_eos: bool = Field(False, description="Extension: go on after an end-of-sequence id.")
    cache_salt: Salt | None = Field(
        None,
        description="Extension: share cached prefixes only with requests of the same API key and the same cache_salt.",
    )
    priority: int = Field(0, ge=-(2**31), lt=2**31, description="Extension: lower runs first.")
    structured_outputs: StructuredOutputs | None = Field(None, description="Extension: what each text must match.")
    trace: bool = Field(False, description="Extension: return how each round produced its bytes.")
    patches: bool = Field(
        False, description="Extension: return where patches start in prompt and output, and the entropies."
    )
    prompt_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Extension: alternatives to report per id of the prompt, as vLLM does."
    )
    return_token_ids: bool = Field(False, description="Extension: return the ids of prompt and output, as vLLM does.")
    return_bytes: bool = Field(False, description="Extension: return the bytes that each text was decoded from.")
    timeout: FiniteFloat | None = Field(
        None, gt=0, description="Extension: seconds after which generation ends with finish_reason 'timeout'."
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for field, known in NEUTRAL.items():
            value = data.get(field)
            if value is not None and not known.allows(value):
                raise _not_allowed(field, known, value)
        return {name: value for name, value in data.items() if name not in NEUTRAL}

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _check_truncation(cls, keep: int) -> int:
        if keep == 0:
            raise ValueError("must be -1 or at least 1")
        return keep

    @field_validator("logit_bias")
    @classmethod
    def _check_bias_keys(cls, bias: dict[str, float]) -> dict[str, float]:
        seen: dict[int, str] = {}
        for key in bias:
            if not (key.isascii() and key.isdecimal() and len(key) <= 9):
                raise ShowsValue(f"keys must be token ids such as '36', not {key[:20]!r}")
            if (other := seen.setdefault(int(key), key)) != key:
                raise ShowsValue(f"the token id {int(key)} must not be there twice, as {other!r} and {key!r}")
        return bias


def _not_allowed(field: str, known: Neutral, value: object) -> ApiError:
    """For a value that this server cannot honour, or that has the wrong type."""
    if known.kind:
        kind = "an object" if known.kind is dict else "a string"
        return ApiError(400, f"{field}: must be {kind}, not {shown(value)}", param=field, code="invalid_value")
    values = ", ".join(map(shown, (*known.values, None)))
    message = f"{field}: must be {values} or left out, not {shown(value)}: nothing else is supported"
    return ApiError(400, message, param=field, code="unsupported_parameter")


def _by_name(entry: TokenLogprob) -> dict[str, float] | None:
    """The likeliest ids and, as in OpenAI's answers, always the chosen one; null for the prompt's first id."""
    if entry.logprob is None:
        return None
    return {token_name(token): logprob for token, logprob in entry.top.items()} | {token_name(entry.id): entry.logprob}


# Of TokenLogprobs, one at a time as the answer is written: all at once would take many times the memory of the scores.
TopLogprobs = list[Annotated[Any, PlainSerializer(_by_name)]]


class Logprobs(BaseModel):
    """One entry per byte in each list. A byte that is no text on its own is named `bytes:\\xNN`."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: TopLogprobs = []
    text_offset: list[int] = Field([], description="Where the byte's character stands in the choice's text.")
    bytes: list[int | None] = Field([], description="Extension: the byte's value; null for a special id.")


class PromptLogprob(TypedDict):
    """What vLLM tells of an id at a place of the prompt."""

    logprob: float
    rank: int | None
    decoded_token: str


def _by_id(entry: TokenLogprob) -> dict[int, PromptLogprob] | None:
    """The likeliest ids and the prompt's own; null for the prompt's first id."""
    if entry.logprob is None:
        return None
    entries: dict[int, PromptLogprob] = {
        token: {"logprob": logprob, "rank": rank, "decoded_token": token_name(token)}
        for rank, (token, logprob) in enumerate(entry.top.items(), 1)
    }
    if entry.id not in entries:
        entries[entry.id] = {"logprob": entry.logprob, "rank": entry.rank, "decoded_token": token_name(entry.id)}
    return entries


PromptLogprobs = list[Annotated[Any, PlainSerializer(_by_id)]]


class TraceRound(BaseModel):
    """One round of a decoder."""

    ids: list[int] = Field(description="Ids that it generated.")
    drafts: list[int] = Field(description="Ids that it drafted, or decoded as a block.")
    accepted: int = Field(
        description="How many drafts, from the first on, stand; a round at the end of a choice may generate fewer."
    )
    passes: list[int] = Field(description="Of a block: the pass, from 0 on, in which each draft was settled.")


class Trace(BaseModel):
    """How the text came to be. Ids are told as soon as they are generated, before it is certain that they are text."""

    rounds: list[TraceRound] = []
    patch_starts: list[int] = Field([], description="Places that start patches; 0 is the first generated id.")
    text_bytes: int = Field(0, description="Generated bytes that `text` is made of.")


class Patches(BaseModel):
    """Where patches start in prompt and output together, and why. Place 0 is the prompt's first id."""

    entropies: list[float] = Field(
        [], description="Nats: the patcher's entropy of the byte after each id, the prompt's ids first."
    )
    starts: list[int] = Field([], description="Places that start patches.")
    output_start: int = Field(description="The place of the first generated id: how many ids the prompt has.")
    threshold: float | None = Field(description="A patch starts after an id whose entropy is above this.")
    rise: float | None = Field(
        description="The entropy must also be more than this many nats above that of the id before."
    )
    max_patch_length: int | None = Field(description="A patch also starts once the last one has this many ids.")

    def add(self, later: "Patches") -> None:
        self.entropies += later.entropies
        self.starts += later.starts


class Choice(BaseModel):
    """One continuation."""

    index: int
    text: str
    bytes: str | None = Field(
        None,
        exclude_if=lambda data: data is None,
        description="Extension: in base64, the bytes that `text` was decoded from; only there if asked for.",
    )
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length", "timeout", "dead_end"] | None = Field(
        description="'timeout' (extension): the request's timeout came first. 'dead_end' (extension): "
        "the text does not match what was asked for, and no byte can follow that would let it, or to find out which "
        "can reached a limit."
    )
    stop_reason: str | int | None = Field(
        None,
        description="Extension: the stop string or the stop id that ended the choice; 'timeout' with 'length' if the "
        "server's own timeout came first; null for any other end.",
    )
    prompt_token_ids: list[int] | None = Field(
        None,
        exclude_if=lambda ids: ids is None,
        description="Extension: only there if asked for; of a stream, in a choice's first chunk alone.",
    )
    token_ids: list[int] | None = Field(
        None, exclude_if=lambda ids: ids is None, description="Extension: the generated ids; only there if asked for."
    )
    prompt_logprobs: PromptLogprobs | None = Field(
        None,
        exclude_if=lambda scores: scores is None,
        description="Extension: only there if asked for. Per id of the prompt null or an object by token id.",
    )
    trace: Trace | None = Field(
        None, exclude_if=lambda trace: trace is None, description="Extension: only there if it was asked for."
    )
    patches: Patches | None = Field(
        None, exclude_if=lambda patches: patches is None, description="Extension: only there if it was asked for."
    )


class FastBltUsage(BaseModel):
    """What the request cost, summed over its sequences, and how long it took."""

    decoder: KnownDecoder
    decoder_calls: int = Field(description="Decoder passes: the paper's decoder NFE.")
    global_calls: int = Field(description="Passes through encoder and global: the paper's encoder/global NFE.")
    rounds: int
    drafted: int = Field(description="Bytes drafted, or decoded in blocks.")
    accepted: int = Field(description="Of these, bytes that became text.")
    rows: dict[str, int] = Field(description="Rows per stage.")
    bytes_per_global_call: float | None = Field(description="null without a global call.")
    estimated_bytes: int = Field(description="Weight bytes by the paper's formula.")
    bytes_read: int = Field(
        description="Bytes read, as counted: a share of every batch's weights, keys and values, tables."
    )
    preemptions: int
    queue_seconds: float = Field(
        description="Before the first step: the wait for the turn of its key, and in the engine, there also for its "
        "grammar; the longest of any sequence."
    )
    prefill_seconds: float = Field(description="From the first step to the first id; the longest of any sequence.")
    decode_seconds: float = Field(description="From the first id to the end; the longest of any sequence.")
    first_byte_seconds: float | None = Field(
        None, description="From the request's arrival to the first generated id of any sequence; null if none came."
    )


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Of the prompts, what the prefix cache knew under the request's salt.")


class CompletionUsage(BaseModel):
    """Counts bytes, and the begin-of-sequence id of a string prompt, but not a closing end-of-sequence id. Usage so
    far, in the midst of a stream, has the numbers of tokens alone."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = Field(None, exclude_if=lambda details: details is None)
    fastblt: FastBltUsage | None = Field(None, exclude_if=lambda cost: cost is None)


class Completion(BaseModel):
    """A response, or one chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: CompletionUsage | None = None


class ModelCard(BaseModel):
    """A name under which the model is offered."""

    id: str
    root: str = Field(description="The checkpoint's own name, whatever it is offered as.")
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["fastblt"] = "fastblt"
    max_model_len: int = Field(description="Most ids of a sequence, prompt and output together.")
    decoders: list[KnownDecoder] = Field(description="What a request under this name may be decoded with.")


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """Of a server that is well."""

    status: Literal["live", "ready"]


class Version(BaseModel):
    """What is served, and by what."""

    version: str
    commit: str | None = Field(
        description="Its first 12 digits, with '-dirty' after them if files were changed since; null if unknown."
    )
    torch: str | None = Field(description="Version of PyTorch.")
    triton: str | None = Field(description="Version of Triton; null if it is not installed.")
    kernels: str = Field(description="Kernel backend: native, triton or torch.")
    instruction_set: str | None = Field(
        description="What the native kernels in use were compiled for, such as x86-64-v3; null with others."
    )
    model: str
    parameters: int
    max_length: int = Field(description="Most ids of a sequence.")
    block_size: int | None = Field(
        description=f"Longest block of {' and '.join(OPTIONS['block_size'])}; null without block diffusion."
    )
    decoders: list[KnownDecoder]
