"""The table of decoders: all code that needs their names, or what one can do, reads it here. Needs no torch."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ..types import Request, UnmaskRule
from . import blt_d, blt_dv
from .asks import Decoder
from .auto import Auto, Latency, SharedPrior
from .blt import Autoregressive
from .blt_s import SelfSpeculation


class Setting(NamedTuple):
    """What a decoder is made with besides its request."""

    block_size: int
    """Bytes per block: the request's, but at most those that the model was trained with; 0 without [MASK]."""
    rule: UnmaskRule
    """How blocks are unmasked: the request's rule, else that of the decoder's row."""
    latency: Latency
    prior: SharedPrior


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderSpec:
    """One row. A request asks for it by its name, which is also a label of metrics and part of a model's alias."""

    name: str
    about: str
    """One sentence for people."""
    make: Callable[[Request, Setting], Decoder]
    exact: bool = True
    """Whether its text is blt's, byte for byte, whatever the seed and the temperature: the model checks all drafts."""
    needs_mask: bool = False
    """Whether the model must have been trained with block diffusion, and so have [MASK]."""
    options: tuple[str, ...] = ()
    """Fields of a `Request` that it uses, and that other decoders do not."""
    rule: UnmaskRule | None = None
    """How blocks are unmasked if a request has no rule; None for decoders without that option."""

    def is_exact(self, request: Request) -> bool:
        """Whether the text of this request is blt's."""
        return self.exact and (request.exact or "exact" not in self.options)


ROWS = (
    DecoderSpec(
        name="blt",
        about="One byte after another, each through the model.",
        make=lambda request, setting: Autoregressive(),
    ),
    DecoderSpec(
        name="blt-s",
        about="Drafts with the small decoder, verified by the model.",
        options=("draft_length",),
        make=lambda request, setting: SelfSpeculation(request.draft_length),
    ),
    DecoderSpec(
        name="blt-d",
        about="Masked blocks, unmasked in passes and not checked.",
        exact=False,
        needs_mask=True,
        options=("block_size", "unmask", "finish_patch"),
        rule=blt_d.DEFAULT_RULE,
        make=lambda request, setting: blt_d.BlockDiffusion(setting.block_size, setting.rule, request.finish_patch),
    ),
    DecoderSpec(
        name="blt-dv",
        about="Blocks as drafts, verified by the model.",
        needs_mask=True,
        options=("block_size", "unmask"),
        rule=blt_dv.DEFAULT_RULE,
        make=lambda request, setting: blt_dv.VerifiedDiffusion(setting.block_size, setting.rule),
    ),
    DecoderSpec(
        name="auto",
        about="Whichever of blt, blt-s and blt-dv promises to be fastest.",
        options=("exact",),
        make=lambda request, setting: Auto(setting.block_size, setting.latency, setting.prior, request.exact),
    ),
)
DECODERS = {spec.name: spec for spec in ROWS}
"""By name, in the order in which they are listed."""


def register(spec: DecoderSpec) -> None:
    """Adds a row, in this process. It must come before the server's modules are imported: schemas and help list the
    names.

    Raises ValueError for a name that is taken or would not do as a label, and for options that no request has.
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", spec.name):
        raise ValueError(f"decoder {spec.name!r}: a name is made of lower-case letters and digits, joined by hyphens")
    if spec.name in DECODERS:
        raise ValueError(f"decoder {spec.name!r} is in the table already")
    if unknown := [option for option in spec.options if option not in Request.__struct_fields__]:
        raise ValueError(f"decoder {spec.name!r}: a Request has no field {unknown[0]!r}, which is among its options")
    DECODERS[spec.name] = spec


def available(*, mask: bool) -> tuple[str, ...]:
    """The decoders that a model can be run with. mask: whether it has [MASK]."""
    return tuple(name for name, spec in DECODERS.items() if mask or not spec.needs_mask)


def make_decoder(request: Request, block_size: int | None, latency: Latency, prior: SharedPrior) -> Decoder:
    """The decoder for `request`. block_size: the longest block that the model was trained with, None without [MASK]."""
    if not request.max_tokens:
        # Only the prompt runs.
        return Autoregressive()
    block = min(request.block_size or 1 << 30, block_size or 0)
    spec = DECODERS[request.decoder]
    rule = request.unmask or spec.rule or blt_d.DEFAULT_RULE
    return spec.make(request, Setting(block, rule, latency, prior))
