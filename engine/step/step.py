"""A step: runs the rows of all scheduled sequences through the stages, and returns the result of each ask."""

from collections.abc import Sequence as Seq

import torch

from kernels.dispatch import Kernels

from ..costs.ledger import Ledger
from ..decoders import Result, Verify
from ..memory.memory import Memory
from ..rows import Rows
from .ahead import Ahead
from .ahead.policy import RunAhead
from .graphs import Eager
from .results import results_of, score_prompts
from .stages import Stages


class Stepper:
    """Runs the steps of an engine."""

    def __init__(self, stages: Stages, memory: Memory, ledger: Ledger, kernels: Kernels, policy: RunAhead) -> None:
        self.stages, self._kernels = stages, kernels
        self.ahead = Ahead(stages, memory, ledger, kernels, policy)

    @property
    def executor(self) -> Eager:
        return self.stages.launcher.executor

    @property
    def device(self) -> torch.device:
        return self.stages.launcher.device

    @torch.inference_mode()
    def run(self, batch: Seq[Rows]) -> Seq[Result | None]:
        """The result of each sequence's ask, None for rows without one. Raises FloatingPointError if the model gives no
        distribution."""
        for rows in batch:
            if isinstance(rows.ask, Verify):
                rows.sequence.extend(rows.ask.drafts)
        results = self.ahead.run(batch) or self._run_once(batch)
        for rows in batch:
            if isinstance(rows.ask, Verify):
                rows.sequence.retract(rows.end - len(rows.ask.drafts))
        return results

    def _run_once(self, batch: Seq[Rows]) -> list[Result | None]:
        logits = self.stages.run(batch)
        score_prompts(batch, logits)
        return results_of(batch, logits, self._kernels)
