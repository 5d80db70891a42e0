"""Several passes of the decoder in a row, without the host between them.

Where all sequences of a step want cells alone, the next pass needs nothing that the host knows better: a draft's next
row is fed with the byte that was just drawn, a block with the cells that were just settled. So a whole draft is one
launch, and so are as many passes over a block as blocks have needed lately; from there on the host asks after each pass
whether a block is done. In a batch that also feeds bytes every pass is a step of its own, which all share.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from msgspec.structs import replace
from torch import Tensor

from kernels.dispatch import Kernels

from .blocks import Unmasking, block_tensors
from .choosing import cell_params, uniform
from .decoders import Call, Result
from .readback import read
from .runner import Runner, Work
from .sampling import check, draw_ids, laws_of, on_device
from .types import SamplingParams

REMEMBERED = 32
"""Blocks: the fewest passes that one of the last so many needed are run before the host asks."""
PADDING = SamplingParams(temperature=0)


class Passes:
    """Runs the steps that can go on by themselves."""

    def __init__(self, runner: Runner, kernels: Kernels) -> None:
        self._runner, self._kernels = runner, kernels
        self._needed: deque[int] = deque(maxlen=REMEMBERED)

    def run(self, batch: Sequence[Work]) -> list[Result] | None:
        """The results of all calls of the batch, or None if it cannot run on its own: then nothing has been done."""
        calls = [w.call for w in batch if w.call and not w.call.runs_clean and _is_plain(w)]
        if len(calls) < len(batch) or self._runner.cells_are_encoded:
            return None
        if all(len(call.causal) == 1 and not call.block and call.ahead for call in calls):
            return self._draft(batch, calls)
        if all(call.block and not call.causal for call in calls):
            return self._unmask(batch, calls)
        return None

    def _draft(self, batch: Sequence[Work], calls: Sequence[Call]) -> list[Result]:
        runner = self._runner
        passes = range(1 + min(call.ahead for call in calls))
        pairs = list(zip(batch, calls, strict=True))
        plans = [
            runner.plan_decoder([replace(w, call=replace(call, start=call.start + n)) for w, call in pairs])
            for n in passes
        ]
        padding = plans[0].padded - len(batch)
        uniforms = [[uniform(w.sequence, call.start + 1 + n) for w, call in pairs] + [0.0] * padding for n in passes]
        tensors = {
            "ids": torch.tensor([call.causal[0] for call in calls] + [0] * padding, device=runner.device),
            "uniforms": on_device(uniforms, runner.device),
            **self._laws([w.sequence.request.sampling for w in batch], padding),
        }
        call, out = runner.decode_passes("draft", plans, 1, tensors, partial(_Drafting, self._kernels))
        for plan in plans:
            runner.charge(call, plan.works)
        runner.finish(call)
        drawn, highest = out[:, :, : len(batch)].unbind(1)
        after, best = read(drawn.T.long(), highest.flatten())
        check(best)
        return [Result(w.end, ids) for w, ids in zip(batch, after, strict=True)]

    def _unmask(self, batch: Sequence[Work], calls: Sequence[Call]) -> list[Result]:
        runner, device, mask = self._runner, self._runner.device, batch[0].sequence.mask_id
        plan = runner.plan_decoder(batch)
        padding = plan.padded - plan.num_rows
        cells = [
            (w.sequence, call.start + place)
            for w, call in zip(batch, calls, strict=True)
            for place in range(len(call.block))
        ]
        laws = self._laws([cell_params(sequence.request) for sequence, _ in cells], padding)
        laws["uniforms"] = on_device([uniform(*cell) for cell in cells] + [0.0] * padding, device)
        begin = partial(_Unmasking, self._kernels, mask_id=mask)
        rules = [call.rule for call in calls if call.rule]
        results = [Result(cells=list(call.block), settled=[-1] * len(call.block), passes=0) for call in calls]
        while all(mask in result.cells for result in results):
            before = results[0].passes
            times = max(min(self._needed, default=1) - before, 1)
            blocks = [(r.cells, rule) for r, rule in zip(results, rules, strict=True)]
            tensors = laws | block_tensors(blocks, runner.executor.rows(len(batch)), plan.padded, device)
            call, out = runner.decode_passes("unmask", [plan], times, tensors, begin)
            states = zip(results, *out.tolist(), strict=False)
            results = [_after(r, ids, when, bad, times, mask) for r, ids, when, bad in states]
            # Passes over blocks that were done are padding, and nobody's.
            call.passes = max(r.passes for r in results) - before
            for n in range(before, before + call.passes):
                runner.charge(call, [rows for rows, r in zip(plan.works, results, strict=True) if r.passes > n])
            runner.finish(call)
        self._needed += [r.passes for r in results if mask not in r.cells]
        return results

    def _laws(self, params: list[SamplingParams], padding: int) -> dict[str, Tensor]:
        padded = params + [PADDING] * padding
        runner = self._runner
        return laws_of(padded, [{}] * len(padded), runner.vocab_size, runner.device)


def _is_plain(w: Work) -> bool:
    """Penalties depend on every byte before, and scores are only kept of single passes."""
    sampling = w.sequence.request.sampling
    return not (sampling.presence_penalty or sampling.frequency_penalty or w.sequence.request.logprobs is not None)


class _Drafting:
    """Passes each of which is fed with what was drawn from the one before; see `engine.runner.PassState`."""

    def __init__(self, kernels: Kernels, tensors: Mapping[str, Tensor]) -> None:
        self._kernels, self._tensors = kernels, tensors
        self.cells = tensors["ids"]
        self._drawn: list[Tensor] = []

    def take(self, logits: Tensor) -> None:
        uniforms = self._tensors["uniforms"][len(self._drawn)]
        self.cells, highest = draw_ids(logits, self._tensors, uniforms, self._kernels)
        self._drawn.append(torch.stack((self.cells.double(), highest.double())))

    def out(self) -> Tensor:
        """(passes, 2, R) float64: the ids that were drawn, and the largest logits."""
        return torch.stack(self._drawn)


class _Unmasking(Unmasking):
    """Passes over blocks."""

    def take(self, logits: Tensor) -> None:
        law = self.law(logits)
        drawn, highest = draw_ids(law, self._tensors, self._tensors["uniforms"], self._kernels)
        self.settle(law, drawn, highest)

    def out(self) -> Tensor:
        """(3, S, B) int64: the cells, when they were settled, whether their logits were bad."""
        return torch.stack((self.ids, self.when, self.bad.long()))


def _after(block: Result, ids: list[int], when: list[int], bad: list[int], times: int, mask: int) -> Result:
    """A block after `times` more passes. Raises FloatingPointError if one gave it no distribution."""
    size = len(block.cells)
    if any(bad):
        raise FloatingPointError("the logits of a block are no distribution: NaN, +inf or all -inf")
    settled = [now + block.passes if now >= 0 else then for now, then in zip(when, block.settled, strict=False)]
    passes = block.passes + times if mask in ids[:size] else 1 + max(settled)
    return Result(cells=ids[:size], settled=settled[:size], passes=passes)
