"""The decoder stage: rows of the text, drafts and blocks, against latents -> logits."""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Protocol

import msgspec
import torch
from torch import Tensor

from kernels.planning import Spans

from ..costs.ledger import Launch, Share
from ..decoders import Verify
from ..memory.caches import Caches
from ..model import Model
from ..rows import Rows
from .launch import NOTHING, Launcher, padded_tensor
from .plan import Arrays, Plan, padded_array


class DecoderRows(msgspec.Struct, frozen=True):
    """Planned rows of the stage. shares: each sequence's rows; num_logits: how many rows give logits."""

    padded: int
    arrays: Arrays
    plan: Plan
    num_rows: int
    num_logits: int
    shares: list[Share]


class PassState(Protocol):
    """What one pass leaves for the next, in tensors only, so that it can be recorded."""

    @property
    def cells(self) -> Tensor:
        """The ids that the next pass is fed, (R,)."""
        ...

    def take(self, logits: Tensor) -> None:
        """The end of a pass: logits (R, V)."""
        ...

    def out(self) -> Tensor:
        """What the host needs of all passes."""
        ...


class DecoderStage:
    def __init__(self, model: Model, caches: Caches, launcher: Launcher) -> None:
        self._model, self._caches, self._launcher = model, caches, launcher
        self._slots, self._page_size = model.config.slots, caches.specs["latent"].page_size
        self._reads_states = model.config.decoder_input == "encoder"
        self.vocab_size = model.config.vocab_size

    def plan(self, batch: Seq[Rows]) -> DecoderRows:
        """Plans all but the latents that the rows read, which may not be known yet."""
        ids: list[int] = []
        state_rows: list[int] = []
        logit_rows: list[int] = []
        shares: list[Share] = []
        spans, encoded = Spans(), 0
        for rows in batch:
            begin = rows.decode_from
            count = rows.end - begin + len(rows.cells)
            encoded += rows.num_text or len(rows.cells)
            state_rows += range(encoded - count, encoded)
            if not count:
                continue
            logit_rows += range(len(ids) + rows.logits_from - begin, len(ids) + count)
            ids += rows.sequence.ids[begin : rows.end]
            ids += rows.cells
            start = begin if begin < rows.end else rows.cells_start
            # Causal rows see what is before them; a block's cells see the whole block too.
            shares.append(self._launcher.share(spans, "decoder", rows, start, start + count, rows.num_block))
        executor = self._launcher.executor
        padded = executor.rows(len(ids)) if ids else 0
        padded_wanted = executor.parts(executor.rows(len(logit_rows)), padded) if logit_rows else 0
        plan = self._launcher.plan("decoder", spans, spans, padded)
        arrays = {
            "rows": padded_array(state_rows if self._reads_states else ids, padded),
            "logit_rows": padded_array(logit_rows, padded_wanted),
            "plan": plan.data,
        }
        return DecoderRows(padded, arrays, plan, len(ids), len(logit_rows), shares)

    def add_latents(self, planned: DecoderRows) -> DecoderRows:
        """Says which latent each row reads.

        Byte j, which predicts byte j + 1, reads the latent of the patch before the one that holds byte j + 1. Cells
        read the newest latent there is, or that of the open patch if it was closed for them.
        """
        size, slots = self._page_size, self._slots
        page: list[int] = []
        offset: list[int] = []
        for rows, count, _, _ in planned.shares:
            sequence, table = rows.sequence, rows.sequence.tables["latent"]
            patches = [sequence.patch_of(byte + 1) - 1 for byte in range(rows.end - count + len(rows.cells), rows.end)]
            if rows.cells:
                newest = sequence.patch_of(rows.end) - 1
                if rows.closes_patch and sequence.patching.starts[-1] < rows.end:
                    newest += 1
                patches += [newest] * len(rows.cells)
            page += [table.pages[patch // size - table.first] for patch in patches]
            offset += [patch % size * slots for patch in patches]
        planned.arrays["page"] = padded_array(page, planned.padded)
        planned.arrays["offset"] = padded_array(offset, planned.padded)
        return planned

    def launch(
        self, planned: DecoderRows, *, ids: Tensor | None = None, states: Tensor | None = None
    ) -> tuple[Launch, Tensor]:
        """Also returns the wanted logits, (rows, V) float32. ids (rows,): instead of those that the plan was made with.
        states: the encoder's, where the decoder reads them."""
        launch = self._launcher.begin("decoder")
        launch.shares, launch.num_rows = planned.shares, planned.num_rows
        decoder, reads_states, plan = self._model.decoder, self._reads_states, planned.plan

        def stage(t: Mapping[str, Tensor]) -> Tensor:
            x = t["states"].index_select(0, t["rows"]) if reads_states else t["ids"] if "ids" in t else t["rows"]
            latents, cache = self._caches.latent, self._caches.decoder
            return decoder(x, latents, t["page"], t["offset"], cache, plan.on_device(t, "plan"), t["logit_rows"])

        tensors = NOTHING
        if reads_states:
            assert states is not None
            tensors = {"states": states}
        elif ids is not None:
            tensors = {"ids": padded_tensor(ids, planned.padded)}
        out = self._launcher.run(launch, stage, planned.padded, planned.arrays, plan, tensors=tensors)
        return launch, out[: planned.num_logits] if planned.num_logits else self.no_logits()

    def no_logits(self) -> Tensor:
        return torch.empty((0, self.vocab_size), device=self._launcher.device)

    def launch_passes(
        self,
        name: str,
        plans: Seq[DecoderRows],
        times: int,
        tensors: Mapping[str, Tensor],
        begin: Callable[[Mapping[str, Tensor]], PassState],
    ) -> tuple[Launch, Tensor]:
        """Passes over cells, `times` with each plan, in one launch; also returns the last state's `out`.

        Plans differ in positions alone. begin: makes the state from the stage's inputs, which hold `tensors`; name:
        that of its kind.
        """
        launch = self._launcher.begin("decoder")
        launch.num_rows, launch.passes = plans[0].num_rows, len(plans) * times
        decoder, latents, cache = self._model.decoder, self._caches.latent, self._caches.decoder

        def stage(t: Mapping[str, Tensor]) -> Tensor:
            state = begin(t)
            for number, planned in enumerate(plans):
                plan = planned.plan.on_device(t, f"plan{number}")
                for _ in range(times):
                    state.take(decoder(state.cells, latents, t["page"], t["offset"], cache, plan, t["logit_rows"]))
            return state.out()

        arrays = {key: plans[0].arrays[key] for key in ("page", "offset", "logit_rows")}
        arrays |= {f"plan{number}": planned.plan.data for number, planned in enumerate(plans)}
        each = [planned.plan for planned in plans]
        padded = plans[0].padded
        return launch, self._launcher.run(launch, stage, padded, arrays, *each, tensors=tensors, name=name, times=times)

    def may_skip(self, rows: Rows) -> bool:
        """Whether it depends on where patches close which rows run: only if they begin with rows that drafted, and
        not for scores, which must come from one pass of the whole model."""
        ask = rows.ask
        if not isinstance(ask, Verify) or not ask.exact or rows.sequence.request.logprobs is not None:
            return False
        return rows.start == rows.end - len(ask.drafts) - 1

    def skip_exact(self, rows: Rows) -> None:
        """Lets the decoder skip rows that were exact when they drafted: up to the first that closes a patch, which read
        a latent that was not there."""
        if not isinstance(rows.ask, Verify) or not self.may_skip(rows):
            return
        starts = rows.sequence.patching.starts
        closing = bisect_right(starts, rows.start)
        first = starts[closing] - 1 if closing < len(starts) else rows.end
        rows.decode_from = min(first, rows.start + rows.ask.exact)
        rows.logits_from = max(rows.logits_from, rows.decode_from)
        rows.drawn_from = max(rows.drawn_from, rows.decode_from)
