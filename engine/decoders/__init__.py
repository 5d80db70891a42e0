"""The decoders: each file is one algorithm over one sequence, written as a generator of what it needs computed.

| name   | a round                                              | commits    | text                |
|--------|------------------------------------------------------|------------|---------------------|
| blt    | one row after another through all stages             | 1 to 64    | the model's         |
| blt-s  | k decoder rows draft, one pass over them verifies    | 1 to k + 1 | blt's               |
| blt-d  | unmasking passes over a block                        | B          | the diffusion's own |
| blt-dv | unmasking passes draft a block, one pass verifies it | 1 to B + 1 | blt's               |
| auto   | blt, blt-s or blt-dv, whichever promises to be best  | as these   | blt's               |

`table` has all that the rest of the project knows about them: adding a row there adds a decoder everywhere.

A round yields an ask for one step of the engine and is resumed with its `Result`; the engine runs the asks of all
sequences as one batch. A round that is dropped half-way (preemption) leaves no trace and can begin again.
"""

from .asks import Ask, Committed, Decoder, Draft, Next, Result, Round, SequenceView, Unmask, Verify
from .auto import Latency, SharedPrior
from .constrained import Constrained
from .table import DECODERS, DecoderSpec, make_decoder, register

__all__ = [
    "DECODERS",
    "Ask",
    "Committed",
    "Constrained",
    "Decoder",
    "DecoderSpec",
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
    "register",
]
