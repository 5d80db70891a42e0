"""Which requests a loaded model can run.

The engine checks before it takes a request, and the server before it sends one, so both refuse with the same text. The
text names the field, what would be right, and what was given.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Literal, NamedTuple

from .config import BYTE_OFFSET, EOS_ID, ModelLimits, is_byte
from .decoders.table import DECODERS
from .types import MAX_DRAFT, Failed, Request

FIELDS = {
    "prompt_ids": "prompt",
    "sampling.logit_bias": "logit_bias",
    "sampling.allowed_ids": "allowed_token_ids",
    "stop_ids": "stop_token_ids",
}
"""Fields of a `Request` that have another name in the API, which texts and `Failed.param` use."""


class Fault(NamedTuple):
    """Why a request cannot be run. field: of `Request`. rule: what would be right and what was given."""

    code: Literal["too_long", "decoder_unavailable", "invalid"]
    field: str
    rule: str

    @property
    def param(self) -> str:
        return FIELDS.get(self.field, self.field)

    @property
    def message(self) -> str:
        return f"{self.param}: {self.rule}"


Rule = Callable[[Request, ModelLimits], Fault | None]


def check(request: Request, limits: ModelLimits) -> Failed | None:
    """Why a model with these limits cannot run the request: the first fault; None if there is none."""
    for rule in RULES:
        if fault := rule(request, limits):
            return Failed(id=request.id, code=fault.code, message=fault.message, param=fault.param)
    return None


# The rules. Each holds only where none before it has found a fault.


def _decoder(request: Request, limits: ModelLimits) -> Fault | None:
    decoder = request.decoder
    if decoder not in DECODERS:
        return Fault("decoder_unavailable", "decoder", f"must be {_any_of(DECODERS)}, not {decoder!r}")
    if decoder in limits.decoders:
        return None
    why = "this checkpoint was not trained with block diffusion and has no [MASK]"
    return Fault("decoder_unavailable", "decoder", f"must be {_any_of(limits.decoders)}, not {decoder!r}: {why}")


def _draft_length(request: Request, limits: ModelLimits) -> Fault | None:
    return _out_of_range("draft_length", request.draft_length, 1, MAX_DRAFT)


def _block_size(request: Request, limits: ModelLimits) -> Fault | None:
    if request.block_size is None:
        return None
    trained = limits.block_size
    why = f": this model was trained with blocks of up to {trained} bytes" if trained else ""
    return _out_of_range("block_size", request.block_size, 1, trained or MAX_DRAFT, why)


def _max_tokens(request: Request, limits: ModelLimits) -> Fault | None:
    return _out_of_range("max_tokens", request.max_tokens, 0, None)


def _prompt(request: Request, limits: ModelLimits) -> Fault | None:
    if not request.prompt_ids:
        return Fault("invalid", "prompt_ids", "must not be empty; a begin-of-sequence id is enough")
    if len(request.prompt_ids) > limits.max_length:
        return prompt_too_long(len(request.prompt_ids), limits.max_length)
    return unknown_id("prompt_ids", request.prompt_ids, limits)


def _output_ids(request: Request, limits: ModelLimits) -> Fault | None:
    count, most = len(request.output_ids), request.max_tokens
    if count > most:
        return Fault("invalid", "output_ids", f"must have at most max_tokens ids ({most}), not {count}")
    return unknown_id("output_ids", request.output_ids, limits)


def _sample_index(request: Request, limits: ModelLimits) -> Fault | None:
    return _out_of_range("sample_index", request.sample_index, 0, None)


def _logit_bias(request: Request, limits: ModelLimits) -> Fault | None:
    return unknown_id("sampling.logit_bias", request.sampling.logit_bias, limits)


def _stop_ids(request: Request, limits: ModelLimits) -> Fault | None:
    return unknown_id("stop_ids", request.stop_ids, limits)


def _allowed_ids(request: Request, limits: ModelLimits) -> Fault | None:
    allowed = request.sampling.allowed_ids
    if not allowed:
        return None
    if request.grammar:
        rule = "must be left out where the text must match a grammar, which says itself what is allowed"
        return Fault("invalid", "sampling.allowed_ids", rule)
    if not any(map(_is_text_or_end, allowed)):
        some = f"at least one byte ({BYTE_OFFSET} to {BYTE_OFFSET + 255}) or the end of sequence ({EOS_ID})"
        rule = f"must have {some}, not only others"
        return Fault("invalid", "sampling.allowed_ids", rule)
    return unknown_id("sampling.allowed_ids", allowed, limits)


def _min_tokens(request: Request, limits: ModelLimits) -> Fault | None:
    if not request.min_tokens:
        return None
    allowed = request.sampling.allowed_ids or range(limits.vocab_size)
    ends = {*request.stop_ids, *([] if request.ignore_eos else [EOS_ID])}
    if not any(_is_text_or_end(token) and token not in ends for token in allowed):
        rule = f"must be 0, not {request.min_tokens}: every id that may be chosen ends the text"
        return Fault("invalid", "min_tokens", rule)
    why = f": max_tokens is {request.max_tokens}"
    return _out_of_range("min_tokens", request.min_tokens, 0, request.max_tokens, why)


def _is_text_or_end(token: int) -> bool:
    """Whether blocks may choose it."""
    return is_byte(token) or token == EOS_ID


def _grammar(request: Request, limits: ModelLimits) -> Fault | None:
    if not request.grammar or DECODERS[request.decoder].is_exact(request):
        return None
    if DECODERS[request.decoder].exact:
        rule = f"needs exact to be true, not false: {request.decoder!r} may then choose blocks, which are not checked"
    else:
        exact = _any_of(name for name in limits.decoders if DECODERS[name].exact)
        rule = f"needs the decoder {exact}, not {request.decoder!r}, whose blocks are not checked"
    return Fault("decoder_unavailable", "grammar", rule)


def _length(request: Request, limits: ModelLimits) -> Fault | None:
    prompt, count, spare = len(request.prompt_ids), request.max_tokens, _spare(request, limits)
    most = max(limits.max_length - prompt - spare, 0)
    if count <= most:
        return None
    block = f", and the last block may reach {spare} ids past max_tokens" if spare else ""
    why = f"this model and its caches hold {limits.max_length} ids{block}"
    return Fault("too_long", "max_tokens", f"must be at most {most} after a prompt of {prompt} ids, not {count}: {why}")


RULES: tuple[Rule, ...] = (
    _decoder,
    _draft_length,
    _block_size,
    _max_tokens,
    _prompt,
    _output_ids,
    _sample_index,
    _logit_bias,
    _stop_ids,
    _allowed_ids,
    _min_tokens,
    _grammar,
    _length,
)


def longest_prompt(request: Request, limits: ModelLimits) -> int:
    """Most ids of a prompt beside this request's `max_tokens`; below 1 if those leave no room for one."""
    return limits.max_length - request.max_tokens - _spare(request, limits)


def _spare(request: Request, limits: ModelLimits) -> int:
    """Ids past `max_tokens` for which there must be room: blocks that are not verified run to their end."""
    if not request.max_tokens or DECODERS[request.decoder].is_exact(request):
        return 0
    return (request.block_size or limits.block_size or 1) - 1


def prompt_too_long(num_ids: int, max_length: int) -> Fault:
    """The fault of a prompt that is too long whatever `max_tokens` is. The server finds it before it makes ids."""
    rule = f"must have at most {max_length} ids, begin-of-sequence included, not {num_ids}"
    return Fault("too_long", "prompt_ids", f"{rule}: this model and its caches hold no more")


def _out_of_range(field: str, value: int, least: int, most: int | None, why_most: str = "") -> Fault | None:
    if value < least:
        return Fault("invalid", field, f"must be at least {least}, not {value}")
    if most is not None and value > most:
        return Fault("invalid", field, f"must be at most {most}, not {value}{why_most}")
    return None


def unknown_id(field: str, ids: Collection[int], limits: ModelLimits) -> Fault | None:
    """The fault of ids that the model does not have, if there are any."""
    known = range(limits.vocab_size)
    # A prompt may have many thousands.
    if not ids or frozenset(known).issuperset(ids):
        return None
    unknown = next(token for token in ids if token not in known)
    return Fault("invalid", field, f"token ids must be from 0 to {limits.vocab_size - 1}, not {unknown}")


def _any_of(names: Iterable[str]) -> str:
    *others, last = map(repr, names)
    return f"{', '.join(others)} or {last}" if others else last
