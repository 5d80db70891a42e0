"""Several passes in a row, without the host between them.

Where all sequences of a step do the same, what the next pass needs is on the device before the host knows it: blt and a
draft feed the byte that was just drawn, a block the cells that were just settled. Or it is the next step that begins
so. In a mixed batch every pass is a step of its own, which all share.
"""

from collections.abc import Sequence

from kernels.dispatch import Kernels

from ...decoders import Result
from ..runner import Runner, Work
from .blocks import Unmasking
from .bytes import Feeding
from .drafts import draft
from .next_step import Starting

__all__ = ["Passes"]


class Passes:
    """Runs the steps that can go on by themselves."""

    def __init__(self, runner: Runner, kernels: Kernels) -> None:
        self._runner, self._kernels = runner, kernels
        self._feeding = Feeding(runner, kernels)
        self._starting = Starting(runner, kernels)
        self._unmasking = Unmasking(runner, kernels)

    def run(self, batch: Sequence[Work]) -> list[Result] | None:
        """The results of all calls of the batch, or None if it cannot run on its own: then nothing has been done."""
        calls = [w.call for w in batch if w.call and _is_plain(w)]
        if len(calls) < len(batch):
            return None
        if all(call.runs_clean and call.wants and not call.drafts and not call.num_cells for call in calls):
            return self._feeding.run(batch, calls) or self._starting.run(batch, calls)
        if self._runner.cells_are_encoded:
            return None
        if all(call.block and not call.causal for call in calls):
            return self._unmasking.run(batch, calls)
        if self._runner.ahead.drafts == "never":
            return None
        if all(len(call.causal) == 1 and not call.block and not call.runs_clean and call.ahead for call in calls):
            return draft(self._runner, self._kernels, batch, calls)
        return None


def _is_plain(w: Work) -> bool:
    """Penalties depend on every byte before, and scores are only kept of single passes."""
    sequence, request = w.sequence, w.sequence.request
    sampling, scored = request.sampling, request.logprobs is not None
    unscored = request.prompt_logprobs and len(sequence.prompt_logprobs) < sequence.num_prompt
    return not (sampling.presence_penalty or sampling.frequency_penalty or scored or unscored)
