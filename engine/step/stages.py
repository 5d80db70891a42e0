"""The four stages over the rows of many sequences.

    patcher   bytes -> entropy -> does the next byte start a patch?
    encoder   bytes -> states
    global    closed patches -> latents    (only for sequences that closed a patch)
    decoder   bytes -> logits

Rows that feed a byte and rows that prefill a prompt are the same thing; a step does not know the difference.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from torch import Tensor

from ..config import BYTE_OFFSET
from ..costs.ledger import Launch, Ledger
from ..decoders import Verify
from ..memory.caches import Caches
from ..memory.memory import Hold, Memory
from ..model import Model
from ..rows import Rows
from .decoder import DecoderRows, DecoderStage
from .encoder import EncoderStage
from .global_ import GlobalStage
from .launch import Launcher, padded_tensor
from .patcher import Decide, PatcherStage

STAND_IN = BYTE_OFFSET
"""What the host holds for an id that only the device knows."""


@dataclass(slots=True)
class Begun:
    """A step whose patcher and encoder were launched before the host knew its ids. hold: of the rows that these write;
    ids: those of each sequence, once the host knows them."""

    batch: Seq[Rows]
    hold: Hold
    launches: list[Launch]
    decide: Decide
    states: Tensor
    ids: Seq[list[int]] = ()

    def is_of(self, batch: Seq[Rows]) -> bool:
        """Whether these are the rows, their pages are still theirs, and they hold the ids that were fed."""
        if self.hold.broken or not len(batch) == len(self.batch) == len(self.ids):
            return False
        return all(
            rows.sequence is begun.sequence
            and rows.start == begun.start
            and rows.sequence.ids[rows.start : rows.end] == ids
            for rows, begun, ids in zip(batch, self.batch, self.ids, strict=True)
        )


class Stages:
    """Runs them once over a batch, and begins the next step before the host knows its ids."""

    def __init__(
        self, model: Model, caches: Caches, launcher: Launcher, memory: Memory, ledger: Ledger, *, isolate: bool
    ) -> None:
        self.launcher = launcher
        self.patcher = PatcherStage(model, caches, launcher)
        self.encoder = EncoderStage(model, caches, launcher)
        self.global_ = GlobalStage(model, caches, launcher, isolate=isolate and model.config.isolate_global)
        self.decoder = DecoderStage(model, caches, launcher)
        self._memory, self._ledger = memory, ledger
        self.begun: Begun | None = None

    def run(self, batch: Seq[Rows]) -> Tensor:
        """The wanted logits, (rows, V) float32 on the device: of each sequence its wanted rows of the text, then its
        cells. Pages must be reserved. Afterwards decided boundaries are in the sequences."""
        text = [rows for rows in batch if rows.num_text]
        decide, states = self._take_up(batch, text) or self._first_half(batch, text)
        # While the device runs these, the host plans the decoder's rows, unless it depends on boundaries which run.
        skips = any(isinstance(rows.ask, Verify) for rows in batch)
        planned = None if skips else self.decoder.plan(batch)
        if decide:
            decide()
        if launch := self.global_.launch(text):
            self._ledger.took(launch, launch.shares)
        for rows in batch if skips else ():
            self.decoder.skip_exact(rows)
        planned = self.plan_decoder(batch) if planned is None else self.decoder.add_latents(planned)
        if not planned.num_rows:
            return self.decoder.no_logits()
        launch, logits = self.decoder.launch(planned, states=states)
        self._ledger.took(launch, launch.shares)
        return logits

    def plan_decoder(self, batch: Seq[Rows]) -> DecoderRows:
        """The batch's rows of the decoder stage, where all boundaries are decided."""
        return self.decoder.add_latents(self.decoder.plan(batch))

    def begin(self, batch: Seq[Rows], windows: Tensor) -> Begun:
        """Launches patcher and encoder of the next step, over rows of the text whose ids only the device knows. `run`
        takes them up if it is to run these rows, no others of the text, and no cells that are encoded.

        windows (R, W) int64: the last ids up to each row. The host holds stand-ins for them, and must say in
        `Begun.ids` what they were.
        """
        windows = padded_tensor(windows, self.launcher.executor.rows(len(windows)))
        patched, decide = self.patcher.launch(batch, windows[:, -1].contiguous())
        launched = self.encoder.launch(batch, windows)
        assert launched
        self.discard()
        hold = self._memory.hold({rows.sequence.arrival: rows.end for rows in batch})
        self.begun = Begun(batch, hold, [patched, launched[0]], decide, launched[1])
        return self.begun

    def discard(self, *, broken: bool = False) -> None:
        """Discards the step launched ahead; its cost is charged to no request. broken: only one that cannot be taken
        up any more."""
        begun = self.begun
        if begun and (begun.hold.broken or not broken):
            for launch in begun.launches:
                self._ledger.took(launch)
            self.begun = None
            self._memory.hold({})

    def _first_half(self, batch: Seq[Rows], text: Seq[Rows]) -> tuple[Decide | None, Tensor | None]:
        """Patcher and encoder. The encoder does not ask where patches start: the device runs it while the host plans
        and waits for that."""
        decide = states = None
        if text:
            launch, decide = self.patcher.launch(text)
            self._ledger.took(launch, launch.shares)
        if launched := self.encoder.launch(batch):
            launch, states = launched
            self._ledger.took(launch, launch.shares)
        return decide, states

    def _take_up(self, batch: Seq[Rows], text: Seq[Rows]) -> tuple[Decide, Tensor] | None:
        """The step that was begun, if it was this one."""
        begun = self.begun
        others = self.encoder.takes_cells and any(rows.cells for rows in batch)
        if not begun or others or not begun.is_of(text):
            self.discard()
            return None
        self.begun = None
        self._memory.hold({})
        for launch in begun.launches:
            self._ledger.took(launch, launch.shares)
        return begun.decide, begun.states
