"""The decoder stage: rows of the text, drafts and blocks, against latents -> logits."""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Protocol

import msgspec
import torch
from torch import Tensor

from kernels.embedding import Ids
from kernels.planning import Spans

from ..costs.ledger import Launch, Share
from ..memory.caches import Caches
from ..memory.text import Slots
from ..model import Model
from ..rows import Rows
from .launch import NOTHING, Launcher
from .plan import Arrays, Plan, padded_array, page_table, table_of


class DecoderRows(msgspec.Struct, frozen=True):
    """Planned rows of the stage. shares: each sequence's rows; num_logits: how many rows give logits."""

    padded: int
    arrays: Arrays
    plan: Plan
    num_rows: int
    num_logits: int
    shares: list[Share]


class Passes(Protocol):
    """What comes after each pass of a launch; in tensors only, so that it can be recorded."""

    def take(self, logits: Tensor) -> None:
        """logits: (R, V) of the next pass."""

    def out(self) -> Tensor:
        """What the host needs of all passes."""


class DecoderStage:
    def __init__(self, model: Model, caches: Caches, slots: Slots, launcher: Launcher) -> None:
        self._model, self._caches, self._text_slots, self._launcher = model, caches, slots, launcher
        self._slots_per_patch, self._page_size = model.config.slots, caches.specs["latent"].page_size
        self._reads_states = model.config.decoder_input == "encoder"
        self.vocab_size = model.config.vocab_size

    def plan(self, batch: Seq[Rows]) -> DecoderRows:
        """Plans the batch's rows. Byte j, which predicts byte j + 1, reads the latent of the patch before the one that
        holds byte j + 1. Cells read the newest latent there is, or that of the open patch if it was closed for them."""
        places: list[int] = []
        look: list[int] = []
        closed: list[int] = []
        sequences: list[int] = []
        state_rows: list[int] = []
        logit_rows: list[int] = []
        shares: list[Share] = []
        spans, encoded = Spans(), 0
        for number, rows in enumerate(batch):
            begin, cells = rows.decode_from, rows.num_cells
            text = rows.end - begin
            count = text + cells
            encoded += rows.num_text or cells
            if not count:
                continue
            state_rows += range(encoded - count, encoded)
            logit_rows += range(len(places) + rows.logits_from - begin, len(places) + count)
            at, cell = (self._text_slots.place(rows.sequence, place) for place in (begin, rows.cells_start))
            places += range(at, at + text)
            places += range(cell, cell + cells)
            look += range(at + 1, at + text + 1)
            look += [at + text] * cells
            closed += [0] * text + [rows.closes_patch] * cells
            sequences += [number] * count
            start = begin if begin < rows.end else rows.cells_start
            # Causal rows see what is before them; a block's cells see the whole block too.
            shares.append(self._launcher.share(spans, "decoder", rows, start, start + count, rows.num_block))
        executor = self._launcher.executor
        padded = executor.rows(len(places)) if places else 0
        padded_wanted = executor.parts(executor.rows(len(logit_rows)), padded) if logit_rows else 0
        plan = self._launcher.plan("decoder", spans, spans, padded)
        tables = [rows.sequence.tables["latent"] for rows in batch]
        arrays = {
            "rows": padded_array(state_rows if self._reads_states else places, padded),
            "look": padded_array(look, padded),
            "closed": padded_array(closed, padded),
            "sequence": padded_array(sequences, padded),
            "logit_rows": padded_array(logit_rows, padded_wanted),
            "plan": plan.data,
            **page_table("latent", tables, max(executor.parts(len(tables), padded), len(tables)), executor),
        }
        return DecoderRows(padded, arrays, plan, len(places), len(logit_rows), shares)

    def launch(self, planned: DecoderRows, states: Tensor | None = None) -> tuple[Launch, Tensor]:
        """Also returns the wanted logits, (rows, V) float32. states: the encoder's, where the decoder reads them."""
        launch = self._launcher.begin("decoder")
        launch.shares, launch.num_rows = planned.shares, planned.num_rows
        plan = planned.plan

        def stage(t: Mapping[str, Tensor]) -> Tensor:
            return self._pass(t, plan, "")

        tensors = NOTHING
        if self._reads_states:
            assert states is not None
            tensors = {"states": states}
        out = self._launcher.run(launch, stage, planned.padded, planned.arrays, plan, tensors=tensors)
        return launch, out[: planned.num_logits] if planned.num_logits else self.no_logits()

    def launch_passes(
        self,
        name: str,
        plans: Seq[DecoderRows],
        times: int,
        tensors: Mapping[str, Tensor],
        begin: Callable[[Mapping[str, Tensor]], Passes],
    ) -> tuple[Launch, Tensor]:
        """Passes over cells, `times` with each plan, in one launch, if the decoder has bytes of its own. Every pass
        reads what the one before wrote into the text. Also returns what the host needs of them.

        begin: is given the stage's inputs, which hold `tensors`. name: tells the kind of the passes.
        """
        launch = self._launcher.begin("decoder")
        launch.num_rows, launch.passes = plans[0].num_rows, len(plans) * times
        each = [planned.plan for planned in plans]

        def stage(t: Mapping[str, Tensor]) -> Tensor:
            passes = begin(t)
            for number, plan in enumerate(each):
                for _ in range(times):
                    passes.take(self._pass(t, plan, f"{number} "))
            return passes.out()

        arrays = {
            f"{number} {key}": array for number, planned in enumerate(plans) for key, array in planned.arrays.items()
        }
        padded = plans[0].padded
        return launch, self._launcher.run(launch, stage, padded, arrays, *each, tensors=tensors, name=name, times=times)

    def _pass(self, t: Mapping[str, Tensor], plan: Plan, name: str) -> Tensor:
        """One pass; name: before the names of its inputs."""
        text, caches, kernels = self._text_slots.text, self._caches, self._model.kernels
        rows, table = t[f"{name}rows"], table_of(t, f"{name}latent")
        x = t["states"].index_select(0, rows) if self._reads_states else Ids(text.ids, rows)
        where = t[f"{name}look"], t[f"{name}closed"], t[f"{name}sequence"]
        page, offset = kernels.latent_places(text, *where, table, self._page_size, self._slots_per_patch)
        attends = plan.on_device(t, f"{name}plan")
        return self._model.decoder(x, caches.latent, page, offset, caches.decoder, attends, t[f"{name}logit_rows"])

    def no_logits(self) -> Tensor:
        return torch.empty((0, self.vocab_size), device=self._launcher.device)

    def skip_exact(self, rows: Rows) -> None:
        """Lets the decoder skip rows that were exact when they drafted: up to the first that closes a patch, which read
        a latent that was not there."""
        if not rows.num_exact:
            return
        starts = rows.sequence.patching.starts
        closing = bisect_right(starts, rows.start)
        first = starts[closing] - 1 if closing < len(starts) else rows.end
        rows.decode_from = min(first, rows.start + rows.num_exact)
        rows.logits_from = max(rows.logits_from, rows.decode_from)
        rows.drawn_from = max(rows.drawn_from, rows.decode_from)
