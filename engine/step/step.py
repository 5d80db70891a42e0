"""A step: runs the rows of all scheduled sequences through the stages, and returns the result of each ask."""

from collections.abc import Sequence as Seq

import torch

from kernels.dispatch import Kernels

from ..config import Policy
from ..costs.ledger import Ledger
from ..decoders import Result
from ..memory.memory import Memory
from ..rows import Rows
from .ahead import Ahead
from .graphs import Eager
from .one_call import OneCall
from .results import results_of, score_prompts
from .stages import Stages


class Stepper:
    """Runs the steps of an engine."""

    def __init__(
        self,
        stages: Stages,
        memory: Memory,
        ledger: Ledger,
        kernels: Kernels,
        policy: Policy,
        one_call: OneCall | None = None,
    ) -> None:
        """one_call: runs the steps instead of the stages."""
        self.stages, self._text_slots, self._kernels = stages, memory.slots, kernels
        self.ahead, self.one_call = Ahead(stages, memory, ledger, kernels, policy), one_call

    @property
    def executor(self) -> Eager:
        return self.stages.launcher.executor

    @property
    def device(self) -> torch.device:
        return self.stages.launcher.device

    def run(self, batch: Seq[Rows]) -> Seq[Result | None]:
        """The result of each sequence's ask, None for rows without one."""
        if any([self._write(rows) for rows in batch]):
            self.stages.discard()
        if self.one_call:
            return self.one_call.run(batch, self.ahead.policy)
        return self._run_stages(batch)

    def _write(self, rows: Rows) -> bool:
        """Writes the ids of the rows into the text, unless the device has them all. Returns whether it wrote."""
        sequence, slots = rows.sequence, self._text_slots
        slots.take(sequence)
        end = len(sequence.ids) if rows.ask else rows.end
        # Also those before that the encoder's n-grams reach: a verification has drawn over drafts that were committed.
        begin = max(rows.start - self.stages.encoder.reach, 0)
        changed = slots.write(sequence, begin, sequence.ids[begin:end])
        return slots.write(sequence, end, rows.given) or changed

    @torch.inference_mode()
    def _run_stages(self, batch: Seq[Rows]) -> Seq[Result | None]:
        if results := self.ahead.run(batch):
            return results
        logits = self.stages.run(batch)
        score_prompts(batch, logits)
        return results_of(batch, logits, self._text_slots, self._kernels)
