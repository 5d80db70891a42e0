"""Running ahead: several passes in a row, without the host between them.

If all sequences of a step ask for the same, the device has what the next pass needs before the host does: blt and a
draft feed the byte that was just drawn, a block the cells that were just settled. The next step can begin in the same
way. In a mixed batch every pass is a separate step, which all sequences share.
"""

from collections.abc import Sequence

from kernels.dispatch import Kernels

from ...costs.ledger import Ledger
from ...decoders import Draft, Next, Result, Unmask
from ...memory.memory import Memory
from ...rows import Rows
from ..stages import Stages
from .blocks import BlocksAhead
from .bytes import BytesAhead
from .drafts import DraftsAhead
from .next_step import NextStepAhead
from .policy import RunAhead

__all__ = ["Ahead", "RunAhead"]


class Ahead:
    """Runs the steps in which the host need not read every pass. policy: may be replaced at any time."""

    def __init__(self, stages: Stages, memory: Memory, ledger: Ledger, kernels: Kernels, policy: RunAhead) -> None:
        self.policy = policy
        self._cells_are_encoded = stages.encoder.takes_cells
        self._bytes = BytesAhead(stages, memory, ledger, kernels)
        self._next_step = NextStepAhead(stages, memory, ledger, kernels)
        self._drafts = DraftsAhead(stages, memory, ledger, kernels)
        self._blocks = BlocksAhead(stages, ledger, kernels)

    def run(self, batch: Sequence[Rows]) -> list[Result] | None:
        """The results of all asks of the batch, or None if the host must read every pass: then nothing has been
        done."""
        kinds = {type(rows.ask) for rows in batch}
        if len(kinds) > 1 or not all(map(_is_plain, batch)):
            return None
        (kind,) = kinds
        if kind is Next:
            return self._bytes.run(batch, self.policy.bytes) or self._next_step.run(batch, self.policy.next_step)
        if kind is Draft and not self._cells_are_encoded:
            return self._drafts.run(batch, self.policy.drafts)
        if kind is Unmask:
            return self._blocks.run(batch, self.policy.blocks)
        return None


def _is_plain(rows: Rows) -> bool:
    """Penalties depend on every byte before, and scores are only kept of single passes."""
    request = rows.sequence.request
    penalised = request.sampling.presence_penalty or request.sampling.frequency_penalty
    return not (penalised or request.logprobs is not None or rows.sequence.scores_prompt)
