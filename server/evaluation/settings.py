"""The decoders and options that the paper compares (tables 3 to 10), as fields of a request."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from engine.types import DecoderName, UnmaskRule

LENGTHS = (4, 8, 16)
"""Of drafts and blocks."""


@dataclass(frozen=True, slots=True)
class Setting:
    """options: fields of a `Request` beside its decoder."""

    name: str
    decoder: DecoderName
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """The same as fields of `POST /v1/completions`."""
        return {"decoder": self.decoder} | {
            name: _rule_body(value) if isinstance(value, UnmaskRule) else value for name, value in self.options.items()
        }

    @property
    def drafts(self) -> bool:
        """Whether what it drafts is checked, so that there is an acceptance."""
        return self.decoder in ("blt-s", "blt-dv")


def _confidence(alpha: float) -> tuple[str, UnmaskRule]:
    return f"conf {alpha:.1f}", UnmaskRule(rule="confidence", alpha=alpha)


def _entropy(gamma: float) -> tuple[str, UnmaskRule]:
    return f"EB {gamma:.1f}", UnmaskRule(rule="entropy", gamma=gamma)


UNCHECKED = (_confidence(0.5), _confidence(0.7), _entropy(0.8), _entropy(1.0))
CHECKED = (_confidence(0.3), _entropy(1.5), _entropy(2.0), ("one step", UnmaskRule(rule="one_step")))


def paper_settings(decoders: Collection[DecoderName], block_size: int | None) -> list[Setting]:
    """Those of the paper that a model can run, BLT first. block_size: the longest block that it was trained with; a
    model does not know longer ones (paper 3.2)."""
    found = [Setting("BLT", "blt"), *(Setting(f"BLT-S k={k}", "blt-s", {"draft_length": k}) for k in LENGTHS)]
    for size in LENGTHS:
        if size <= (block_size or 0):
            for decoder, rules in (("blt-d", UNCHECKED), ("blt-dv", CHECKED)):
                name = f"{decoder.upper()}-{size}"
                found += [Setting(f"{name} {rule}", decoder, {"block_size": size, "unmask": of}) for rule, of in rules]
    return [setting for setting in found if setting.decoder in decoders]


def _rule_body(rule: UnmaskRule) -> dict[str, Any]:
    options = {"confidence": {"alpha": rule.alpha}, "entropy": {"gamma": rule.gamma}, "one_step": {}}
    return {"rule": rule.rule, **options[rule.rule]}
