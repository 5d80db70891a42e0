"""A whole step as one call into C: all stages over rows of many sequences, and the choice of their bytes."""

import ctypes
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..boundary import Rule
from ..hash_embed import HashTables
from ..linear import Matrix
from ..planning import Tiling
from ..stack import KvCache, SlotsWeights
from . import LIBRARY, CrossKv, Norms, Stack, _CrossKv, _Matrix, _Slots, _Stack, judge_of, matrix_struct, slots_struct

CACHES = ("patcher", "encoder", "open", "global", "latent", "decoder")
"""In the order of a share's tables."""
STAGES = ("patcher", "encoder", "global", "decoder")
"""In the order of an answer's `served` and of the totals."""
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


class AskKind(IntEnum):
    """What a sequence asks for: only to compute rows, the byte after the text, a draft, an unmasked block, or how many
    of the drafts that are its last rows the model would give."""

    PREFILL = 0
    NEXT = 1
    DRAFT = 2
    UNMASK = 3
    VERIFY = 4


@dataclass(frozen=True, slots=True)
class StepWeights:
    """Everything that a model's stages hold. closing: the cross-attention that pools patches; open_slots, latent_slots:
    what makes slots of a pooled patch and of a latent; projection: to the global stage's width."""

    patcher: Stack
    encoder: Stack
    global_: Stack
    decoder: Stack
    hashes: HashTables
    embedding: Tensor
    closing: Sequence[SlotsWeights]
    latent_kv: CrossKv
    open_slots: Matrix
    projection: Matrix | None
    latent_slots: Matrix
    slots: int
    reads_states: bool
    mask_id: int


@dataclass(frozen=True, slots=True)
class StepCaches:
    """Where the step reads and writes: by `CACHES`."""

    kv: dict[str, KvCache]
    open_states: Tensor
    tilings: dict[str, Tiling]


class Limits(NamedTuple):
    """isolates, isolates_global: whether bytes and patches are hidden from later documents, which begin after `eos`.
    specials: ids that a block's cell never becomes. most_read: rows of the decoder's cache that sequences read which
    draft together; 0 for any number."""

    isolates: bool
    isolates_global: bool
    eos: int
    specials: tuple[int, int, int]
    most_read: int


class StepShare(NamedTuple):
    """A sequence's part of a step: `Share` of step.h up to `logits`, in its order. Positions, counts and flags as in
    `engine.rows`.

    ids .. patch_start: addresses of its text; tables: for each of `CACHES` the address of its pages and the page number
    of the first. ask: an `AskKind`. decided: rows before it have frozen boundaries. floor, patch_floor: where the
    documents of `start` and of its patch begin; cells_floor: that of the first cell. exact: how many rows drafted
    exactly; drafts: the last rows that are drafts. passes: most passes to take part in. draws: whether C chooses bytes.
    rounds: 0, or after how many rounds to stop: each ends with the verification of its drafts, or with a block if this
    `closes` the patch before it; another, with `width` drafts and the ask `kind`, begins if its first draft is at a
    place before `until`, and no EOS is near. log: the address of room for `rounds` times what `logged` reads. params,
    cell_params: addresses of seven doubles, those of `kernels.sampling` and the penalties for presence, frequency and
    repetition. Addresses of V doubles, 0 for none: changes are added to all logits, bias is before the penalty for
    repetition; counts: how often each id was generated before the place `committed`, -1 for ids that are not penalised;
    ends are added before the place `first_end`. stops: 0, or the address of how many strings end the text, and of each
    the length and the ids: C makes no bytes after one, which saves time and changes nothing else. seed, sample_index,
    num_prompt: of the random number of a place. rule, bound: of unmasking. settled: address of the pass in which each
    cell was settled. logits: 0, or the address of room for the logits (rows, V) float32: of each byte of NEXT, each
    cell of UNMASK in the pass that settled it, each row of VERIFY; where C chooses nothing, of all rows from
    `logits_from` on.
    """

    ids: int
    entropies: int
    patch: int
    patch_start: int
    tables: tuple[int, ...]
    ask: int
    start: int
    end: int
    decided: int
    floor: int
    patch_floor: int
    decode_from: int
    logits_from: int
    drawn_from: int
    counted_from: int
    cells_start: int
    cells_floor: int
    num_cells: int
    num_block: int
    closes: int
    exact: int
    drafts: int
    passes: int
    draws: int
    rounds: int
    until: int
    kind: int
    width: int
    params: int
    cell_params: int
    changes: int
    bias: int
    counts: int
    ends: int
    stops: int
    committed: int
    first_end: int
    seed: int
    sample_index: int
    num_prompt: int
    rule: int
    bound: float
    settled: int
    log: int
    logits: int


class Served(NamedTuple):
    """What a stage did for a sequence in all passes: see step.h."""

    calls: int
    rows: int
    counted: int
    looked: int
    counted_share: float
    looked_counted: float


class Answer(NamedTuple):
    """The rest of `Share`. num_passes: that it took part in, without one that verified the drafts of those before.
    accepted: drafts; given: the byte after these. ended: the position after the last row of the text that ran. bad:
    whether logits were no distribution. num_logits: rows of logits in the last pass. num_rounds: rounds in
    the log, or bytes of NEXT. served: by `STAGES`."""

    num_passes: int
    accepted: int
    given: int
    ended: int
    bad: bool
    num_logits: int
    num_rounds: int
    served: tuple[Served, ...]


class Totals(NamedTuple):
    """Of each of `STAGES`: calls, rows, seconds. round: seconds of a round, on average, but for the first if there were
    others."""

    calls: tuple[int, ...]
    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    round: float


_SHARE = struct.Struct(f"4q {2 * len(CACHES)}q 32q 2Q 2q d 3q")
_ANSWER = struct.Struct("8q" + 4 * "4q2d")
_SIZE = _SHARE.size + _ANSWER.size
_TOTALS = struct.Struct("4q4q5d")


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.POINTER(_Stack)) for name in ("patcher", "encoder", "global_", "decoder")),
        ("hashes", _POINTER),
        ("embedding", _POINTER),
        ("closing", ctypes.POINTER(_Slots)),
        ("latent_kv", ctypes.POINTER(_CrossKv)),
        *((name, _Matrix) for name in ("open_slots", "projection", "latent_slots")),
        ("caches", _POINTER * len(CACHES)),
        ("open_states", _POINTER),
        ("tilings", _INT * 4 * len(CACHES)),
        *((name, _INT) for name in ("num_closing", "num_latent_kv", "slots", "reads_states")),
        *((name, _INT) for name in ("isolates", "isolates_global", "eos", "mask", "most_read")),
        ("specials", _INT * 3),
        ("longest", _INT),
        ("judge", _INT),
        ("threshold", ctypes.c_float),
        ("rise", ctypes.c_float),
    ]


class Step:
    """A model with its caches, and the call."""

    def __init__(self, w: StepWeights, caches: StepCaches, rule: Rule, limits: Limits) -> None:
        norms = Norms()
        closing = (_Slots * len(w.closing))(*(slots_struct(slots, norms) for slots in w.closing))
        addresses = [ctypes.addressof(caches.kv[name].addresses) for name in CACHES]
        tilings = (_INT * 4 * len(CACHES))(*((_INT * 4)(*caches.tilings[name]) for name in CACHES))
        stacks = (ctypes.pointer(stack.struct) for stack in (w.patcher, w.encoder, w.global_, w.decoder))
        matrices = (_Matrix() if m is None else matrix_struct(m) for m in (w.open_slots, w.projection, w.latent_slots))
        self._model = _Model(
            *stacks, ctypes.addressof(w.hashes.description), w.embedding.data_ptr(), closing, w.latent_kv.structs,
            *matrices, (_POINTER * len(CACHES))(*addresses), caches.open_states.data_ptr(), tilings, len(closing),
            len(w.latent_kv.structs), w.slots, w.reads_states, limits.isolates, limits.isolates_global, limits.eos,
            w.mask_id, limits.most_read, (_INT * 3)(*limits.specials), rule.longest, judge_of(rule), rule.threshold,
            rule.rise or 0.0,
        )  # fmt: skip
        # Keeps the memory behind the addresses.
        self._alive = w, caches, norms
        self._shares, self._totals = ctypes.create_string_buffer(_SIZE), ctypes.create_string_buffer(_TOTALS.size)

    def __call__(self, shares: Sequence[StepShare], seconds: float) -> tuple[list[Answer], Totals]:
        """Runs a step, which writes what it finds into the texts and caches. From the third on no round begins that
        would probably end so many seconds after the call; prompts that run in the first do not count."""
        assert LIBRARY
        if len(self._shares) < len(shares) * _SIZE:
            self._shares = ctypes.create_string_buffer(2 * len(shares) * _SIZE)
        packed, totals = self._shares, self._totals
        for number, share in enumerate(shares):
            _SHARE.pack_into(packed, number * _SIZE, *share[:4], *share.tables, *share[5:])
        LIBRARY.fastblt_step(ctypes.byref(self._model), packed, len(shares), totals, seconds, torch.get_num_threads())
        found = _TOTALS.unpack(totals)
        answers = [_answer(packed, number * _SIZE + _SHARE.size) for number in range(len(shares))]
        return answers, Totals(found[:4], found[4:8], found[8:12], found[12])


def _answer(packed: "ctypes.Array[ctypes.c_char]", at: int) -> Answer:
    numbers = _ANSWER.unpack_from(packed, at)
    served = tuple(Served(*numbers[6 * stage + 8 : 6 * stage + 14]) for stage in range(len(STAGES)))
    num_passes, accepted, given, ended, bad, _, num_logits, num_rounds = numbers[:8]
    return Answer(num_passes, accepted, given, ended, bool(bad), num_logits, num_rounds, served)


class LoggedRound(NamedTuple):
    """A round that has ended, as in `Committed` of engine/decoders. settled: in which pass each cell of a block was."""

    ids: list[int]
    drafts: list[int]
    accepted: int
    settled: list[int]


def log_size(rounds: int, width: int) -> int:
    """Numbers in the log of so many rounds of up to `width` drafts."""
    return rounds * (3 + 2 * width)


def logged(log: "array[int]", number: int, width: int, kind: AskKind) -> LoggedRound:
    """A round of a log."""
    count, accepted, given, *rest = log[log_size(number, width) : log_size(number + 1, width)]
    drafts, settled = rest[:count], rest[width:][:count] if kind == AskKind.UNMASK else []
    return LoggedRound([*drafts[:accepted], given][: accepted + (given >= 0)], drafts, accepted, settled)


def sizes() -> tuple[int, int, int]:
    """Bytes of a model, a share and the totals, as they are laid out here; C must agree."""
    return ctypes.sizeof(_Model), _SIZE, _TOTALS.size


def processor_cache() -> int:
    """Bytes of the largest cache of the first core, which it may share with others; 0 where Linux does not tell."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().removesuffix("K")) << 10 for size in sizes), default=0)
