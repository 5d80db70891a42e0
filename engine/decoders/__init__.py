"""The decoders: each file is one algorithm over one sequence, written as a generator of what it needs computed.

| name   | a round                                              | commits    | text                |
|--------|------------------------------------------------------|------------|---------------------|
| blt    | one row through all stages                           | 1          | the model's         |
| blt-s  | k decoder rows draft, one pass over them verifies    | 1 to k + 1 | blt's               |
| blt-d  | unmasking passes over a block                        | B          | the diffusion's own |
| blt-dv | unmasking passes draft a block, one pass verifies it | 1 to B + 1 | blt's               |
| auto   | blt, blt-s or blt-dv, whichever promises to be best  | as these   | blt's               |

A round yields an ask for one step of the engine and is resumed with its `Result`; the engine runs the asks of all
sequences as one batch. A round that is dropped half-way (preemption) leaves nothing behind and can be begun again.
"""

from ..types import DecoderName, Request
from . import blt, blt_d, blt_dv, blt_s
from .asks import Ask, Committed, Decoder, Draft, Next, Result, Round, SequenceView, Unmask, Verify
from .auto import Auto, Latency, SharedPrior

__all__ = [
    "EXACT",
    "Ask",
    "Committed",
    "Decoder",
    "Draft",
    "Latency",
    "Next",
    "Result",
    "Round",
    "SequenceView",
    "SharedPrior",
    "Unmask",
    "Verify",
    "make_decoder",
]

EXACT: frozenset[DecoderName] = frozenset({"blt", "blt-s", "blt-dv", "auto"})
"""Decoders whose text is blt's, byte for byte, whatever the seed and the temperature."""


def make_decoder(request: Request, block_size: int | None, latency: Latency, prior: SharedPrior) -> Decoder:
    """The decoder for `request`. block_size: the longest block that the model was trained with, None without [MASK]."""
    if not request.max_tokens:
        # Only the prompt runs.
        return blt.Autoregressive()
    block = min(request.block_size or 1 << 30, block_size or 0)
    match request.decoder:
        case "blt-s":
            return blt_s.SelfSpeculation(request.draft_length)
        case "blt-d":
            return blt_d.BlockDiffusion(block, request.unmask or blt_d.DEFAULT_RULE, request.finish_patch)
        case "blt-dv":
            return blt_dv.VerifiedDiffusion(block, request.unmask or blt_dv.DEFAULT_RULE)
        case "auto":
            return Auto(block, latency, prior, request.exact)
        case _:
            return blt.Autoregressive()
