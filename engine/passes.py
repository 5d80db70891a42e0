"""Several passes of the decoder in a row, without the host between them.

Where all sequences of a step want cells alone, the next pass needs nothing that the host knows better: a draft's next
row is fed with the byte that was just drawn, a block with the cells that were just settled. So a whole draft, and a
block until the first one is done, run as one step. In a batch that also feeds bytes every pass is a step of its own,
which all share.
"""

from collections.abc import Sequence

import torch
from msgspec.structs import replace
from torch import Tensor

from kernels.dispatch import Kernels

from .choosing import Blocks, bar_specials, cell_params, uniform
from .decoders import Call, Result
from .runner import Runner, Work
from .sampling import Chooser, check, on_device


def run_passes(runner: Runner, batch: Sequence[Work], kernels: Kernels) -> list[Result] | None:
    """The results of all calls of the batch, or None if it cannot run on its own: then nothing has been done."""
    calls = [w.call for w in batch]
    if not all(call and not call.runs_clean and _is_plain(w) for w, call in zip(batch, calls, strict=True)):
        return None
    if runner.cells_are_encoded:
        return None
    if all(call and len(call.causal) == 1 and not call.block and call.ahead for call in calls):
        return _draft(runner, batch, [call for call in calls if call], kernels)
    if all(call and call.block and not call.causal for call in calls):
        return _unmask(runner, batch, [call for call in calls if call], kernels)
    return None


def _is_plain(w: Work) -> bool:
    """Penalties depend on every byte before, and scores are only kept of single passes."""
    sampling = w.sequence.request.sampling
    return not (sampling.presence_penalty or sampling.frequency_penalty or w.sequence.request.logprobs is not None)


def _draft(runner: Runner, batch: Sequence[Work], calls: Sequence[Call], kernels: Kernels) -> list[Result]:
    device = runner.device
    passes = 1 + min(call.ahead for call in calls)
    sequences = [w.sequence for w in batch]
    params = [s.request.sampling for s in sequences]
    chooser = Chooser(params, [{}] * len(batch), runner.vocab_size, device, kernels)
    places = [[uniform(s, call.start + 1 + n) for s, call in zip(sequences, calls, strict=True)] for n in range(passes)]
    uniforms = on_device(places, device)
    ids = torch.tensor([call.causal[0] for call in calls], device=device)
    drawn: list[Tensor] = []
    highest: list[Tensor] = []
    for number in range(passes):
        at = [replace(w, call=replace(call, start=call.start + number)) for w, call in zip(batch, calls, strict=True)]
        logits = runner.decode(runner.plan_decoder(at), ids)
        highest.append(logits.amax(-1))
        ids = chooser(logits, uniforms[number])
        drawn.append(ids)
    check(torch.cat(highest))
    return [Result(w.end, after) for w, after in zip(batch, torch.stack(drawn).T.tolist(), strict=True)]


def _unmask(runner: Runner, batch: Sequence[Work], calls: Sequence[Call], kernels: Kernels) -> list[Result]:
    device = runner.device
    plan = runner.plan_decoder(batch)
    blocks = Blocks(batch, device, kernels)
    cells = [
        (w.sequence, call.start + place)
        for w, call in zip(batch, calls, strict=True)
        for place in range(len(call.block))
    ]
    params = [cell_params(sequence.request) for sequence, _ in cells]
    chooser = Chooser(params, [{}] * len(cells), runner.vocab_size, device, kernels)
    uniforms = on_device([uniform(*cell) for cell in cells], device)
    while True:
        logits = runner.decode(plan, blocks.cells)
        check(logits.amax(-1))
        logits = bar_specials(logits.clone())
        blocks.settle(logits, chooser(logits, uniforms))
        if blocks.any_done:
            return blocks.results()
