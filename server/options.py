"""Options of single decoders: which belong to which; unmasking rules and sizes as they are typed."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ByteSize, TypeAdapter, ValidationError

from engine.decoders.table import DECODERS
from engine.types import DecoderName, UnmaskRule

if TYPE_CHECKING:
    KnownDecoder = DecoderName
else:
    # For schemas and the command line, which list the names.
    KnownDecoder = Literal[tuple(DECODERS)]

OPTIONS: dict[str, tuple[DecoderName, ...]] = {
    option: tuple(name for name, spec in DECODERS.items() if option in spec.options)
    for spec in DECODERS.values()
    for option in spec.options
}
"""Fields of an engine request, and the decoders that they mean something to."""
RULES = {name: spec.rule for name, spec in DECODERS.items() if spec.rule}
"""How blocks are unmasked where a request does not say."""


class WrongOption(ValueError):
    """An option of another decoder."""

    def __init__(self, option: str, decoder: str) -> None:
        super().__init__(f"{option} is an option of {' and '.join(OPTIONS[option])}, not of {decoder}")
        self.option = option


def options_of(decoder: DecoderName, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `given` that are not None. Raises WrongOption if one belongs to other decoders."""
    kept = {option: value for option, value in given.items() if value is not None}
    for option in kept:
        if decoder not in OPTIONS[option]:
            raise WrongOption(option, decoder)
    return kept


def parse_unmask(text: str) -> UnmaskRule:
    """confidence:0.7, entropy:0.8, entropy:0.8:minus_max or one_step. Raises ValueError."""
    match text.split(":"):
        case ["one_step"]:
            return UnmaskRule(rule="one_step")
        case ["confidence", alpha]:
            return UnmaskRule(rule="confidence", alpha=_number(alpha, 1.0))
        case ["entropy", gamma]:
            return UnmaskRule(rule="entropy", gamma=_number(gamma, float("inf")))
        case ["entropy", gamma, "minus_max"]:
            return UnmaskRule(rule="entropy", gamma=_number(gamma, float("inf")), minus_max=True)
    raise ValueError(f"{text!r} is not confidence:ALPHA, entropy:GAMMA, entropy:GAMMA:minus_max or one_step")


def show_unmask(rule: UnmaskRule) -> str:
    """As it is typed."""
    match rule.rule:
        case "one_step":
            return "one_step"
        case "confidence":
            return f"confidence:{rule.alpha:g}"
        case "entropy":
            return f"entropy:{rule.gamma:g}" + ":minus_max" * rule.minus_max


def _number(text: str, most: float) -> float:
    value = float(text)
    if not 0 <= value <= most:
        raise ValueError(f"{text} is not a number from 0 to {most:g}")
    return value


def parse_bytes(text: str) -> int:
    """2048, 80GiB, 3.35TB or 3.35TB/s. Raises ValueError."""
    try:
        if re.fullmatch(r"[\d.]+ *[a-zA-Z]*", size := text.removesuffix("/s")):
            return int(TypeAdapter(ByteSize).validate_python(size))
    except ValidationError:
        pass
    raise ValueError(f"{text!r} is not a number of bytes, such as 2048, 512MiB, 80GiB or 3.35TB")
