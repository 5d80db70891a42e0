"""Compiles every Triton kernel without a GPU: registers, spills, shared memory, programs, expected bytes.

`python -m benchmarks.kernels_static` runs the stages of the models' real shapes on tensors without storage, records
every kernel that they launch, and compiles each for every architecture. Exits with 1 if a kernel spills registers,
needs more shared memory than the device has, or, if it multiplies, loads its weights too late or has too long a chain
of dependent tensor-core instructions.
"""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks import sass
from benchmarks.gpu_check.handover import signals, stack, tile
from benchmarks.gpu_check.handover.scale import scale_for
from engine.checkpoint import PRESETS, expected_shapes
from engine.config import DtypeName, EngineConfig, ModelConfig
from engine.memory.caches import Caches
from engine.model import Model
from kernels import (
    attention,
    boundary,
    closing,
    cross_attention,
    embedding,
    entropy,
    gate,
    hash_embed,
    latents,
    linear,
    norm,
    pooling,
    sampling,
)
from kernels import unmasking as unmask_file
from kernels.attention import AttentionPlan
from kernels.boundary import Rule
from kernels.closing import Sizes, Tables
from kernels.dispatch import TritonKernels
from kernels.embedding import Ids
from kernels.pooling import PageTable
from kernels.stack import CrossKvWeights
from kernels.text import Text
from kernels.traffic import Traffic
from kernels.unmasking import Blocks

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes of shared memory that a program may have, by architecture (CUDA programming guide, compute capabilities)."""
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8e4nv", torch.float64: "fp64",
    torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip
PATCH = 4
"""Bytes of a patch."""
ROWS = (1, 8, 16, 64)
"""Rows of the recorded passes: one byte, a draft, as many as one tensor-core instruction takes, a crowd."""
MULTIPROCESSORS = 132
"""Of an H100 or H200."""
MULTIPLYING = frozenset({"linear", "qkv", "keys_values", "read_slots", "product"})
"""Kernels whose weights must be loaded before they wait for the kernel before, and whose chains of tensor-core
instructions must be short. A gated kernel may not read before it has seen its gate."""
LONGEST_CHAIN = 16
"""Dependent tensor-core instructions, of some 33 cycles each, that a kernel of `MULTIPLYING` may have in a row."""
MOST_HELD = 3
"""Rounds of weights that `kernels.product.hold` loads before the wait; a wider matrix has more."""


@dataclass(frozen=True)
class Launch:
    """One specialisation of a kernel, and where it first occurred."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, int], ...]
    rows: int = field(compare=False)
    traffic: Traffic = field(compare=False)

    @property
    def name(self) -> str:
        return str(self.kernel.__name__).removesuffix("_kernel")

    @property
    def variant(self) -> str:
        types = {kind.lstrip("*") for _, kind in self.signature if kind.startswith("*")} & {"fp32", "bf16", "fp8e4nv"}
        parts = {key: value if type(value) is tuple else (value,) for key, value in self.constants if key.isupper()}
        constants = " ".join(f"{key}={'/'.join(str(int(v)) for v in of)}" for key, of in parts.items() if any(of))
        return f"{'/'.join(sorted(types))} {constants}"


@dataclass(frozen=True)
class Compiled:
    """The result for one architecture."""

    launch: Launch
    arch: int
    registers: int
    spilled: int
    shared: int
    code: sass.Code

    def faults(self) -> Iterator[str]:
        """What must not be, in words."""
        constants = dict(self.launch.constants)
        if self.spilled:
            yield f"spills {self.spilled} bytes"
        if self.shared > SHARED_LIMIT[self.arch]:
            yield f"needs more shared memory than {SHARED_LIMIT[self.arch]} bytes"
        if self.launch.name not in MULTIPLYING:
            return
        if self.code.waits and not constants.get("GATE"):
            if not self.code.early:
                yield "loads no weights before it waits"
            elif self.code.late and constants.get("ROUNDS", 0) <= MOST_HELD:
                yield f"loads weights after it waited ({self.code.late} instructions)"
        if self.code.chain > LONGEST_CHAIN or self.code.endless:
            where = " and more, round a loop" if self.code.endless else ""
            yield f"chains {self.code.chain} tensor-core instructions{where}"


class Recorder:
    """Records launches instead of launching."""

    def __init__(self) -> None:
        self.launches: dict[Launch, set[int]] = {}
        """Every launch, and how many programs it had."""
        self.rows = 0
        self.traffic = Traffic()

    @contextmanager
    def recording(self) -> Iterator[None]:
        def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            self._note(kernel, args, prod(grid), options)

        with mock.patch.object(JITFunction, "run", run):
            yield

    def _note(self, kernel: JITFunction, args: tuple[Any, ...], programs: int, options: dict[str, Any]) -> None:
        names = kernel.arg_names
        values = dict(zip(names, args, strict=False)) | {n: options.pop(n) for n in list(options) if n in names}
        signature, constants, divisible = [], [], []
        for i, (name, parameter) in enumerate(zip(names, kernel.params, strict=True)):
            value = values[name]
            # As Triton's own specialisation: absent pointers and ones become constants, multiples of 16 are marked.
            one = type(value) is int and value == 1 and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or one:
                signature.append((name, "constexpr"))
                constants.append((name, value))
            elif isinstance(value, Tensor):
                signature.append((name, f"*{TYPES[value.dtype]}"))
                divisible.append(i)
            elif isinstance(value, int):
                signature.append((name, "i32"))
                if value % 16 == 0 and not parameter.do_not_specialize:
                    divisible.append(i)
            else:
                signature.append((name, "fp32"))
        traffic = self.traffic
        if kernel is norm.rms_norm_kernel:
            # Part of a product, whose traffic is that of its own kernel.
            traffic = norm.traffic(values["x_ptr"].shape[0], values["width"], values["x_ptr"].itemsize)
        launch = Launch(
            kernel, tuple(signature), tuple(constants), tuple(divisible), tuple(options.items()), self.rows, traffic
        )
        self.launches.setdefault(launch, set()).add(programs)


class Measured(TritonKernels):
    """The Triton kernels; reports the traffic of every call before its launch."""

    def __init__(self, recorder: Recorder) -> None:
        for name, count in TRAFFIC.items():
            setattr(self, name, _counted(getattr(TritonKernels(), name), count, recorder))


def _counted(operation: Any, count: Any, recorder: Recorder) -> Any:
    def run(*args: Any, **how: Any) -> Any:
        recorder.traffic = count(*args, **how)
        return operation(*args, **how)

    return run


def _linear(x: Tensor, weight: linear.Matrix, *, norm: Tensor | None = None, **_: Any) -> Traffic:
    data = weight.data
    return linear.traffic(
        x.shape[0], data.shape[0], data.shape[1], x.itemsize, fp8=weight.scale is not None, norm=norm is not None
    )


def _attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Traffic:
    return attention.traffic(q.shape[0], len(plan.pages) * k.shape[2], q.shape[1], k.shape[1], k.shape[3], k.itemsize)


TRAFFIC: dict[str, Any] = {
    "linear": _linear,
    "attention": _attention,
    "qkv": lambda x, weight, norm, eps, rope, p, page, o, k, v: (
        _linear(x, weight, norm=norm) + Traffic(4 * k.shape[3] * x.shape[0])
    ),
    "keys_values": lambda x, w, cache, page, o, states=None: (
        _linear(x, w.kv, norm=w.norm) + Traffic(0, 0 if states is None else x.nbytes)
    ),
    "read_slots": lambda q, k, v, page, o, slots, weight, x: (
        cross_attention.traffic(q.shape[0], slots, q.shape[1], k.shape[1], k.shape[3], k.itemsize)
        + _linear(q.flatten(1), weight)
    ),
    "embed": lambda ids, at, table: embedding.traffic(len(at), table.shape[1], table.itemsize),
    "hash_embed": lambda ids, at, positions, table, hashing: hash_embed.traffic(
        len(at), table.shape[1], len(hashing.tables), max(hashing.group_sizes), table.itemsize,
        hashing.tables[0].itemsize,
    ),
    # As many bytes as a patch has on average.
    "patch_max": lambda cache, table, sequence, begin, after: pooling.traffic(
        len(begin), PATCH * len(begin), cache.shape[2], cache.itemsize
    ),
    "entropy": lambda logits: entropy.traffic(logits.shape[0], logits.shape[1], logits.itemsize),
    "boundaries": lambda entropies, text, spans, rule: boundary.traffic(len(entropies), len(spans)),
    "closing": lambda text, at, positions, sequence, tables, sizes: closing.traffic(
        len(at), sizes.slots, tables.open.pages.numel() + tables.globals.pages.numel() + tables.latent.pages.numel()
    ),
    "latent_places": lambda text, look, *_: latents.traffic(len(look)),
    "settle": lambda cells, ids, logits, *_: unmask_file.traffic(cells.shape[1], cells.shape[2], logits.shape[1]),
    "argmax": lambda logits: Traffic(logits.nbytes, 12 * logits.shape[0]),
    "sample": lambda logits, *_: sampling.traffic(logits.shape[0], logits.shape[1]),
    "accepted": lambda drafts, *_: Traffic(drafts.nbytes * 2 + 8 * len(drafts), 8 * len(drafts)),
}  # fmt: skip


def record(
    config: ModelConfig,
    *,
    fp8: bool,
    recorder: Recorder,
    rows: tuple[int, ...] = ROWS,
    dtype: DtypeName = "bfloat16",
) -> None:
    """Records the launches of a model's stages for each number of rows."""
    meta, numbers = torch.device("meta"), getattr(torch, dtype)
    tensors = {n: torch.empty(s, dtype=numbers, device=meta) for n, s in expected_shapes(config).items()}
    kernels = Measured(recorder)
    model = Model(config, tensors, numbers, meta, kernels, fp8=fp8)
    engine = EngineConfig(model="", dtype=dtype, max_length=4096)
    caches = Caches(config, replace(engine, device="meta"))  # type: ignore[arg-type]

    def ints(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=meta)

    def plan(queries: int, most_pages: int = 16) -> AttentionPlan:
        where = ints(queries), ints(queries), ints(queries)
        return AttentionPlan.of(*where, ints(queries), ints(queries), ints(queries, 5), ints(10 * queries), most_pages)

    of_bytes = [torch.empty(4096, dtype=dtype, device=meta) for dtype in (torch.float32, torch.int32, torch.int32)]
    text = Text(ints(4096), *of_bytes)
    of = {name: caches.specs[name].page_size for name in ("open", "global", "latent")}
    sizes = Sizes(of["open"], of["global"], of["latent"], config.slots, small=4)

    def close(n: int, most_pages: int) -> None:
        """The global stage over n patches."""
        table, slots = PageTable(ints(n, 2), ints(n)), ints(n * config.slots)
        opened = caches.open_states, caches.open_kv, table, ints(n), ints(n), ints(n)
        pooled = model.encoder.close(*opened, plan(n * config.slots))
        latent = model.global_transformer(pooled, caches.global_, plan(n, most_pages))
        model.decoder.write_latents(latent, caches.latent, slots, slots)

    with recorder.recording():
        for n in rows:
            recorder.rows = n
            entropies = model.patcher(Ids(text.ids, ints(n)), caches.patcher, plan(n))
            for rule in (Rule(1.0, longest=8), Rule(1.0, monotonic=True), Rule(1.0, rise=0.1), Rule(1.0, None, True)):
                kernels.boundaries(entropies, text, ints(n, 4), rule)
            opened = caches.open_states, caches.open_kv
            states = model.encoder(text.ids, ints(n), caches.encoder, plan(n), *opened, plan(n))
            for most_pages in (1, 16):
                close(n, most_pages)
            table = PageTable(ints(n, 2), ints(n))
            tables = Tables(table, table, table, ints(n))
            found = kernels.closing(text, ints(n), ints(n), ints(n), tables, sizes)
            # The host launches it before it knows whether a patch has closed.
            with gate.under(found.any):
                for most_pages in (1, 16):
                    close(n, most_pages)
            look = ints(n), ints(n), ints(n)
            page, offset = kernels.latent_places(text, *look, tables.latent, sizes.latent, config.slots)
            read = states if config.decoder_input == "encoder" else Ids(text.ids, ints(n))
            logits = model.decoder(read, caches.latent, page, offset, caches.decoder, plan(n), ints(n))
            doubles = torch.empty(n, dtype=torch.float64, device=meta)
            blocks = Blocks(ints(n), ints(n), ints(n), ints(n), doubles)
            kernels.settle(ints(3, n, 8), text.ids, logits, ints(n), blocks, 0, 260)
            kernels.argmax(logits)
            kernels.sample(logits, torch.empty(n, 4, dtype=torch.float64, device=meta), doubles)
            kernels.accepted(ints(n, 8), ints(n, 8), ints(n))


def record_ones(recorder: Recorder) -> None:
    """Records the launches for shapes of one element: Triton takes a size of 1 for a constant, and not every expression
    allows that."""
    meta = torch.device("meta")

    def ones(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=meta)

    def one() -> Tensor:
        return ones(1, dtype=torch.int64)

    kernels, cache = TritonKernels(), ones(1, 1, 1, 2)
    rows = one(), one(), one()
    plan = AttentionPlan.of(*rows, one(), one(), ones(1, 5, dtype=torch.int64), one(), 1)
    doubles, singles = ones(1, dtype=torch.float64), ones(1, 1, dtype=torch.float32)
    with recorder.recording():
        for gated in (False, True):
            weight = linear.Matrix(ones(1 + gated, 1))
            kernels.linear(ones(1, 1), weight, norm=ones(1), eps=1e-5, gated=gated, residual=ones(1, 1), twice=True)
        for most in (1, 2):
            kernels.attention(ones(1, 1, 2), cache, cache, replace(plan, shape=plan.shape._replace(most_pages=most)))
        angles, weight = ones(1, 2, 1, dtype=torch.float32), linear.Matrix(ones(6, 1))
        kernels.qkv(ones(1, 1), weight, ones(1), 1e-5, angles, *rows, cache, cache)
        of = CrossKvWeights(ones(1), linear.Matrix(ones(4, 1)), 2, 1e-5)
        kernels.keys_values(ones(1, 1), of, (cache, cache), one(), one(), ones(1, 1, 1))
        kernels.read_slots(ones(1, 1, 2), cache, cache, one(), one(), 1, linear.Matrix(ones(1, 2)), ones(1, 1))
        kernels.embed(one(), one(), ones(1, 1))
        tables = hash_embed.HashTables([ones(1, 1)], [1], 1, 1, meta)
        kernels.hash_embed(*rows, ones(1, 1), tables)
        table, patches = PageTable(ones(1, 1, dtype=torch.int64), one()), [ones(1, dtype=torch.int32) for _ in "ab"]
        text = Text(one(), ones(1, dtype=torch.float32), *patches)
        kernels.patch_max(ones(1, 1, 1), table, *rows)
        kernels.boundaries(kernels.entropy(ones(1, 1)), text, ones(1, 4, dtype=torch.int64), Rule(1.0, longest=1))
        kernels.closing(text, *rows, Tables(table, table, table, one()), Sizes(1, 1, 1, 1, 1))
        kernels.latent_places(text, *rows, table, 1, 1)
        blocks, cells = Blocks(one(), one(), one(), one(), doubles), ones(3, 1, 1, dtype=torch.int64)
        kernels.settle(cells, one(), singles, one(), blocks, 1, 1)
        kernels.argmax(singles)
        for dtype in (torch.float32, torch.float64):
            kernels.sample(ones(1, 1, dtype=dtype), ones(1, 4, dtype=torch.float64), doubles)
        kernels.accepted(ones(1, 1, dtype=torch.int64), ones(1, 1, dtype=torch.int64), one())


def record_handover(recorder: Recorder) -> None:
    """Records the GPU check's hand-over kernels that need most registers: products in segments that load their weights
    before they wait, float8 by bits, words, a stack as one kernel."""
    meta = torch.device("meta")
    scale = replace(scale_for("cuda", quick=False), device=meta)

    def rows(width: int) -> Tensor:
        return torch.empty(1, width, dtype=torch.bfloat16, device=meta)

    def matrix(name: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        stack, _, of = name.partition(" ")
        return torch.empty(scale.stacks[stack].matrices[of], dtype=dtype, device=meta)

    with recorder.recording():
        for name in ("patcher o", "decoder down", "global down", "global qkv"):
            out, width = matrix(name).shape
            tile.product(rows(width), matrix(name), rows(out), overlaps=False)
        tile.product(rows(2048), matrix("global qkv"), rows(6144), norm=rows(2048)[0], overlaps=False)
        tile.product(rows(5632), matrix("global down", torch.uint8), rows(2048), widening=tile.BITS, overlaps=False)
        words = torch.empty(2, signals.WORDS, dtype=torch.int32, device=meta)
        signals.words_kernel[(128,)](words, 0, 2000, WORDS=1024, OWN=8, MOST=tile.MOST_POLLS, num_warps=tile.WARPS)
        of = scale.stacks["patcher"]
        stack.Run(scale, of, stack.draw(scale, of), rows(of.dim), 500)(apart=False)


def compile_for(launch: Launch, arch: int) -> Compiled:
    # As `kernels.lang.overlap` decides.
    constants = dict(launch.constants)
    if "OVERLAP" in constants:
        constants["OVERLAP"] = arch >= 90
    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        {(launch.kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in launch.divisible},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    cubin = compiled.asm["cubin"]
    return Compiled(launch, arch, *sass.resources(cubin), compiled.metadata.shared, sass.read(cubin))


def compile_all(jobs: Sequence[tuple[Launch, int]]) -> Iterator[Compiled]:
    """All jobs, in order, compiled in as many processes as there are cores."""
    # Forked: a kernel cannot be sent to a process, but a child has what its parent has.
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), _take, (jobs,)) as pool:
        for (launch, arch), found in zip(jobs, pool.imap(_compile, range(len(jobs))), strict=True):
            yield Compiled(launch, arch, *found)


_jobs: Sequence[tuple[Launch, int]] = ()


def _take(jobs: Sequence[tuple[Launch, int]]) -> None:
    global _jobs
    _jobs = jobs


def _compile(i: int) -> tuple[int, int, int, sass.Code]:
    found = compile_for(*_jobs[i])
    return found.registers, found.spilled, found.shared, found.code


HEAD = (
    "kernel", "variant", "sm", "registers", "spilled", "shared", "weights early / late", "chain", "programs", "waves",
    "rows", "bytes read", "written",
)  # fmt: skip


def row(c: Compiled, programs: set[int]) -> str:
    """A row of the table. Waves: programs for every multiprocessor of an H200, if each takes one."""
    launch, code = c.launch, c.code
    counts = sorted({min(programs), max(programs)})
    cells = (
        launch.name, launch.variant, c.arch, c.registers, c.spilled, c.shared,
        f"{code.early} / {code.late}" if code.waits and code.early + code.late else "",
        f"{code.chain}{' in a loop' if code.endless else ''}" if code.chain else "",
        " to ".join(map(str, counts)),
        " to ".join(f"{count / MULTIPROCESSORS:.2f}" for count in counts),
        launch.rows, launch.traffic.read, launch.traffic.written,
    )  # fmt: skip
    faults = ", ".join(c.faults())
    return "| " + " | ".join(map(str, cells)) + " |" + f" **{faults}**" * bool(faults)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels_static", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=PRESETS, default=["1b", "7b"])
    parser.add_argument("--arch", nargs="+", type=int, choices=SHARED_LIMIT, default=list(SHARED_LIMIT))
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="compile only kernels of these names")
    parser.add_argument(
        "--in-turn", action="store_true", help="each kernel for one architecture, in turn, and only without a gate"
    )
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--bfloat16", action="store_true", help="without float8 weights")
    forms.add_argument("--float32", action="store_true", help="weights and arithmetic in float32 instead")
    parser.add_argument("--ones", action="store_true", help="also with every size 1")
    parser.add_argument("--handover", action="store_true", help="only the GPU check's hand-over kernels")
    options = parser.parse_args()
    recorder = Recorder()
    if options.handover:
        record_handover(recorder)
    for name in () if options.handover else options.models:
        if options.float32:
            record(PRESETS[name], fp8=False, recorder=recorder, rows=tuple(options.rows), dtype="float32")
            continue
        for fp8 in (False,) if options.bfloat16 else (False, True):
            record(PRESETS[name], fp8=fp8, recorder=recorder, rows=tuple(options.rows))
    if options.ones:
        record_ones(recorder)
    names = {launch.name for launch in recorder.launches}
    only = set(options.only or names)
    if unknown := only - names:
        parser.error(f"--only: no kernel named {', '.join(sorted(unknown))}; there are {', '.join(sorted(names))}")
    launches = [launch for launch in recorder.launches if launch.name in only]
    if options.in_turn:
        launches = [launch for launch in launches if not dict(launch.constants).get("GATE")]
    jobs = [
        (launch, arch)
        for i, launch in enumerate(launches)
        for arch in ([options.arch[i % len(options.arch)]] if options.in_turn else options.arch)
    ]
    print(f"Triton {triton.__version__}\n\n| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    faulty = []
    for c in tqdm(compile_all(jobs), total=len(jobs), disable=not sys.stderr.isatty()):
        print(row(c, recorder.launches[c.launch]), flush=True)
        faulty += [f"{c.launch.name} ({c.launch.variant}) on sm_{c.arch} {fault}" for fault in c.faults()]
    print(f"\n{len(jobs)} compiled; {'not all fit:' if faulty else 'all fit'}", *faulty, sep="\n")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
