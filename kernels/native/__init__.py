"""The CPU's own kernels: a whole stack of layers is one call into C, made for few rows.

torch's operations cost several microseconds each before they begin, and a step of a small model is hundreds of them;
its products of few rows read a matrix once per row, or nearly so. Here a stack is one call, weights are laid out once
for the only product, and a row's bits do not depend on other rows, without padding. `hatch_build.py` compiles the C
when the package is installed; otherwise torch computes.
"""

import ctypes
import logging
import threading
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import available
from ..attention import AttentionPlan, PlanShape
from ..boundary import Rule
from ..embedding import Ids
from ..hash_embed import HashTables
from ..hash_embed import hash_embed as hash_embed_torch
from ..linear import FP8, Matrix
from ..planning import SPAN, Lengths, Spans, Tiling
from ..pooling import PageTable
from ..stack import (
    CrossCache,
    CrossKvWeights,
    KvCache,
    LayerWeights,
    SlotsWeights,
    StackWeights,
)
from ..text import Text

log = logging.getLogger("fastblt.kernels")

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


def _library() -> ctypes.CDLL | None:
    """None where there is none that fits to this code."""
    if not (path := available.library()):
        return None
    try:
        library = _declared(ctypes.CDLL(str(path)))
        if available.sources() in (None, library.fastblt_sources().decode()):
            return library
        why = "it was compiled from other sources: `python hatch_build.py` compiles it anew"
    except (OSError, AttributeError) as error:
        why = str(error)
    log.warning("%s is not used: %s", path, why)
    return None


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    for name, types in {
        "fastblt_pack": "pp qqq p i",
        "fastblt_multiply": "qi",
        "fastblt_linear": "ppp f i p i p q ii",
        "fastblt_attention": "pppp q ii",
        "fastblt_stack": "ppppppppp q p i",
        "fastblt_cross_kv": "p q pppp q i",
        "fastblt_hash_embed": "pppppp q i",
        "fastblt_entropy": "pp qq i",
        "fastblt_patch_max": "ppp q pppp qqq i",
        "fastblt_boundaries": "ppppp qq i ff p q",
        "fastblt_argmax": "ppp qq",
        "fastblt_sample": "p i ppp qq",
        "fastblt_accepted": "pppp qq",
        "fastblt_confidence_and_entropy": "ppp qq",
        "fastblt_unmask": "pppppp qq",
        "fastblt_step": "pp q p d i",
        "fastblt_step_sizes": "p",
        "fastblt_plan": "pqp pqp p qqqq ppq",
    }.items():
        kinds = {"p": _POINTER, "q": _INT, "i": ctypes.c_int, "f": ctypes.c_float, "d": ctypes.c_double}
        function = getattr(library, name)
        function.argtypes = [kinds[letter] for letter in types.replace(" ", "")]
        function.restype = None
    library.fastblt_sources.restype = ctypes.c_char_p
    for function in (library.fastblt_panel, library.fastblt_plan, library.fastblt_multiply):
        function.restype = _INT
    return library


LIBRARY = _library()
_NOTHING = (None, None, None, None)


class _Matrix(ctypes.Structure):
    _fields_ = [("panels", _POINTER), ("scale", _POINTER), ("out", _INT), ("width", _INT), ("itemsize", _INT)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("attention_norm", "ffn_norm", "rope")),
        *((name, _Matrix) for name in ("qkv", "o", "gate_up", "down")),
        *((name, _INT) for name in ("dim", "heads", "kv_heads", "head_dim", "ffn_dim")),
        ("eps", ctypes.c_float),
        ("bf16", ctypes.c_int32),
    ]


class _Slots(ctypes.Structure):
    _fields_ = [
        ("norm", _POINTER),
        *((name, _Matrix) for name in ("q", "o")),
        *((name, _INT) for name in ("dim", "heads", "head_dim", "slots")),
        ("eps", ctypes.c_float),
        ("bf16", ctypes.c_int32),
    ]


class _CrossKv(ctypes.Structure):
    _fields_ = [("norm", _POINTER), ("kv", _Matrix), ("eps", ctypes.c_float), ("bf16", ctypes.c_int32)]


class _Stack(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)),
        ("slots", ctypes.POINTER(_Slots)),
        ("cross_kv", ctypes.POINTER(_CrossKv)),
        *((name, _POINTER) for name in ("embedding", "norm")),
        ("head", _Matrix),
        *((name, _INT) for name in ("num_layers", "num_slots", "num_cross_kv", "dim")),
        ("eps", ctypes.c_float),
        ("bf16", ctypes.c_int32),
    ]


class Packed(Matrix):
    """A matrix as `product.h` reads it: data (panels, in, outputs) in its dtype, scale (out,) float32."""

    out: int
    struct: _Matrix


def pack(matrix: Matrix) -> Packed:
    """Lays out a matrix of float32, bfloat16 or float8."""
    data, scale = matrix
    if data.dtype == FP8:
        # The kernel's codes are all numbers; an output with a NaN among its weights is NaN by its scale.
        bad = (data.view(torch.uint8) & 0x7F == 0x7F).any(1)
        if bad.any():
            scale = torch.where(bad, torch.nan, torch.ones(len(data)) if scale is None else scale)
    return join([data], scale)


def join(parts: Sequence[Tensor], scale: Tensor | None = None) -> Packed:
    """Stacks matrices (out, in) of one dtype along their outputs; each is read once, in place."""
    assert LIBRARY
    parts = [part.contiguous() for part in parts]
    outs, width, panel = [len(part) for part in parts], parts[0].shape[1], LIBRARY.fastblt_panel()
    out = sum(outs)
    panels = parts[0].new_empty(-(-out // panel), width, panel)
    addresses = (_POINTER * len(parts))(*(part.data_ptr() for part in parts))
    LIBRARY.fastblt_pack(
        addresses, (_INT * len(parts))(*outs), len(parts), width, panels.itemsize, panels.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    packed = Packed(panels, scale)
    packed.out = out
    packed.struct = _Matrix(panels.data_ptr(), _address(scale), out, width, panels.itemsize)
    return packed


def linear(
    x: Tensor,
    weight: Matrix,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Tensor | None = None,
    twice: bool = False,
    rows: Tensor | None = None,
    wide: bool = False,
) -> Tensor:
    """`kernels.linear.linear` for a packed matrix."""
    assert LIBRARY and isinstance(weight, Packed)
    x = x.contiguous() if rows is None else x.index_select(0, rows)
    y = x.new_empty(len(x), weight.out // 2 if gated else weight.out)
    wide_norm = None if norm is None else norm.float()
    before = None if residual is None else residual.contiguous()
    LIBRARY.fastblt_linear(
        ctypes.byref(weight.struct), x.data_ptr(), _address(wide_norm), eps, gated, _address(before), twice,
        y.data_ptr(), len(x), _is_bf16(x), torch.get_num_threads(),
    )  # fmt: skip
    return y.float() if wide else y


def multiply() -> int:
    """Runs the arithmetic of `linear` in the nearest caches for some milliseconds, on all threads: bfloat16 weights are
    widened and multiplied in float32, for as many rows as use a weight at a time. Returns the number of multiply-adds.
    """
    assert LIBRARY
    threads = torch.get_num_threads()
    return int(LIBRARY.fastblt_multiply(128 * threads, threads))


def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan) -> Tensor:
    """`kernels.attention.attention`. Outputs of padding rows are zeros."""
    assert LIBRARY
    q = q.contiguous()
    out = torch.empty_like(q)
    LIBRARY.fastblt_attention(
        q.data_ptr(), out.data_ptr(), plan.addresses, KvCache([(k_cache, v_cache)]).addresses, q.shape[1], _is_bf16(q),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def hash_embed(ids: Tensor, at: Tensor, positions: Tensor, embedding: Tensor, hashing: HashTables) -> Tensor:
    """`kernels.hash_embed.hash_embed`."""
    assert LIBRARY
    rows, dim = at.shape[0], embedding.shape[1]
    if hashing.dtype not in (torch.float32, torch.bfloat16):
        return hash_embed_torch(ids, at, positions, embedding, hashing)
    x = embedding.new_empty(rows, dim)
    LIBRARY.fastblt_hash_embed(
        hashing.description, ids.data_ptr(), at.data_ptr(), positions.data_ptr(), embedding.data_ptr(), x.data_ptr(),
        rows, _is_bf16(x),
    )  # fmt: skip
    return x


def entropy(logits: Tensor) -> Tensor:
    """`kernels.entropy.entropy`."""
    assert LIBRARY
    rows, vocabulary = logits.shape
    nats = logits.new_empty(rows, dtype=torch.float32)
    LIBRARY.fastblt_entropy(logits.data_ptr(), nats.data_ptr(), rows, vocabulary, _is_bf16(logits))
    return nats


def patch_max(cache: Tensor, table: PageTable, sequence: Tensor, begin: Tensor, after: Tensor) -> Tensor:
    """`kernels.pooling.patch_max`."""
    assert LIBRARY
    patches, dim = begin.shape[0], cache.shape[2]
    out = cache.new_empty(patches, dim)
    LIBRARY.fastblt_patch_max(
        cache.data_ptr(), table.pages.data_ptr(), table.first.data_ptr(), table.pages.shape[1], sequence.data_ptr(),
        begin.data_ptr(), after.data_ptr(), out.data_ptr(), patches, cache.shape[1], dim, _is_bf16(cache),
    )  # fmt: skip
    return out


class _Planner(threading.local):
    """Buffer for a plan's numbers, until they are copied out."""

    def __init__(self) -> None:
        self.found = (_INT * 3)()
        self.grow(1 << 12)

    def grow(self, numbers: int) -> None:
        self.out = np.empty(numbers, dtype=np.int64)
        self.address = self.out.ctypes.data


_planner = _Planner()


@cache
def _tiling(tiling: Tiling) -> "ctypes.Array[ctypes.c_int64]":
    return (_INT * 4)(*tiling)


def plan(
    writes: Spans, queries: Spans, tiling: Tiling, lengths: Lengths
) -> tuple[NDArray[np.int64], PlanShape]:  # fmt: skip
    """`kernels.planning.plan`."""
    assert LIBRARY
    w, wp, q, qp = writes.spans, writes.pages, queries.spans, queries.pages
    planner = _planner
    while True:
        numbers = LIBRARY.fastblt_plan(
            w.buffer_info()[0], len(w) // SPAN, wp.buffer_info()[0], q.buffer_info()[0], len(q) // SPAN,
            qp.buffer_info()[0], _tiling(tiling), *lengths, planner.found, planner.address, len(planner.out),
        )  # fmt: skip
        if numbers <= len(planner.out):
            break
        planner.grow(2 * numbers)
    return planner.out[:numbers].copy(), PlanShape(lengths.rows, lengths.queries, *planner.found)


def boundaries(entropies: Tensor, text: Text, spans: Tensor, rule: Rule) -> Tensor:
    """`kernels.boundary.boundaries`."""
    assert LIBRARY
    rows = entropies.shape[0]
    found = torch.empty(2, rows)
    LIBRARY.fastblt_boundaries(
        entropies.data_ptr(), text.entropies.data_ptr(), text.patch.data_ptr(), text.patch_start.data_ptr(),
        spans.data_ptr(), spans.shape[0], rule.longest, judge_of(rule), rule.threshold, rule.rise or 0.0,
        found.data_ptr(), rows,
    )  # fmt: skip
    return found


def judge_of(rule: Rule) -> int:
    """`judge` of `Rule` in bytes.h."""
    return 3 if rule.every_byte else 2 if rule.monotonic else 0 if rule.rise is None else 1


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.sampling.argmax`."""
    assert LIBRARY
    logits, (rows, vocabulary) = logits.contiguous(), logits.shape
    ids, highest = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    LIBRARY.fastblt_argmax(logits.data_ptr(), ids.data_ptr(), highest.data_ptr(), rows, vocabulary)
    return ids, highest


def sample(logits: Tensor, params: Tensor, uniforms: Tensor) -> Tensor:
    """`kernels.sampling.sample`."""
    assert LIBRARY
    logits, (rows, vocabulary) = logits.contiguous(), logits.shape
    ids = torch.empty(rows, dtype=torch.int64)
    LIBRARY.fastblt_sample(
        logits.data_ptr(), logits.dtype == torch.float64, params.data_ptr(), uniforms.data_ptr(), ids.data_ptr(), rows,
        vocabulary,
    )  # fmt: skip
    return ids


def accepted(drafts: Tensor, drawn: Tensor, lengths: Tensor) -> Tensor:
    """`kernels.sampling.accepted`."""
    assert LIBRARY
    right = torch.empty_like(lengths)
    LIBRARY.fastblt_accepted(drafts.data_ptr(), drawn.data_ptr(), lengths.data_ptr(), right.data_ptr(), *drafts.shape)
    return right


def confidence_and_entropy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.unmasking.confidence_and_entropy`."""
    assert LIBRARY
    logits, (rows, vocabulary) = logits.contiguous(), logits.shape
    confidence, entropies = torch.empty(rows), torch.empty(rows)
    LIBRARY.fastblt_confidence_and_entropy(
        logits.data_ptr(), confidence.data_ptr(), entropies.data_ptr(), rows, vocabulary
    )
    return confidence, entropies


def unmask(masked: Tensor, confidence: Tensor, entropy: Tensor, rules: Tensor, bounds: Tensor) -> Tensor:
    """`kernels.unmasking.unmask`."""
    assert LIBRARY
    settled = torch.empty_like(masked)
    LIBRARY.fastblt_unmask(
        masked.data_ptr(), confidence.data_ptr(), entropy.data_ptr(), rules.data_ptr(), bounds.data_ptr(),
        settled.data_ptr(), *masked.shape,
    )  # fmt: skip
    return settled


class Stack:
    """`kernels.stack.composed_stack` as one call."""

    def __init__(self, w: StackWeights) -> None:
        norms = Norms()
        layers = [_layer(layer, norms) for layer in w.layers]
        slots = [slots_struct(slots, norms) for slots in w.slots]
        cross_kv = [_cross_kv(kv, norms) for kv in w.cross_kv]
        like, self._width = w.layers[0].attention_norm, layers[0].dim
        self._dtype = like.dtype
        self.struct = _Stack(
            (_Layer * len(layers))(*layers), (_Slots * len(slots))(*slots), (_CrossKv * len(cross_kv))(*cross_kv),
            _address(w.embedding), None, _Matrix(), len(layers), len(slots), len(cross_kv), self._width, 0.0,
            _is_bf16(like),
        )  # fmt: skip
        if w.head is not None:
            self.struct.norm, self.struct.eps = norms(w.head.norm), w.head.eps
            self.struct.head = matrix_struct(w.head.matrix)
            self._width = self.struct.head.out
        self._address = ctypes.byref(self.struct)
        # Keeps the memory behind the addresses.
        self._alive = w, norms

    def __call__(
        self, x: Tensor | Ids, cache: KvCache, plan: AttentionPlan, cross: CrossCache | None = None,
        logit_rows: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        assert LIBRARY
        if isinstance(x, Ids):
            x = x.ids.index_select(0, x.at)
        rows = (x if logit_rows is None else logit_rows).shape[0]
        y = torch.empty(rows, self._width, dtype=self._dtype)
        crosses = _NOTHING if cross is None else (
            cross.cache.addresses, _address(cross.states), cross.page.data_ptr(), cross.offset.data_ptr()
        )  # fmt: skip
        LIBRARY.fastblt_stack(
            self._address, plan.addresses, cache.addresses, *crosses, x.data_ptr(), _address(logit_rows), rows,
            y.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return y


class CrossKv:
    """`kernels.stack.composed_cross_kv` as one call."""

    def __init__(self, ws: Sequence[CrossKvWeights]) -> None:
        norms = Norms()
        self.structs = (_CrossKv * len(ws))(*(_cross_kv(w, norms) for w in ws))
        self._alive = ws, norms

    def __call__(self, x: Tensor, cache: KvCache, page: Tensor, offset: Tensor) -> None:
        assert LIBRARY
        LIBRARY.fastblt_cross_kv(
            self.structs, len(self.structs), page.data_ptr(), offset.data_ptr(), cache.addresses, x.data_ptr(),
            x.shape[0], torch.get_num_threads(),
        )  # fmt: skip


class Norms(list[Tensor]):
    """float32 copies of norms, kept."""

    def __call__(self, norm: Tensor) -> int:
        self.append(norm.float())
        return self[-1].data_ptr()


def _layer(w: LayerWeights, norms: Norms) -> _Layer:
    matrices = [matrix_struct(m) for m in (w.qkv, w.o, w.gate_up, w.down)]
    return _Layer(
        norms(w.attention_norm), norms(w.ffn_norm), w.rope.data_ptr(), *matrices, len(w.attention_norm), w.heads,
        w.kv_heads, w.head_dim, matrices[3].width, w.eps, _is_bf16(w.attention_norm),
    )  # fmt: skip


def slots_struct(w: SlotsWeights, norms: Norms) -> _Slots:
    return _Slots(
        norms(w.norm), matrix_struct(w.q), matrix_struct(w.o), len(w.norm), w.heads, w.head_dim, w.slots, w.eps,
        _is_bf16(w.norm),
    )  # fmt: skip


def _cross_kv(w: CrossKvWeights, norms: Norms) -> _CrossKv:
    return _CrossKv(norms(w.norm), matrix_struct(w.kv), w.eps, _is_bf16(w.norm))


def matrix_struct(matrix: Matrix) -> _Matrix:
    assert isinstance(matrix, Packed)
    return matrix.struct


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _is_bf16(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16
