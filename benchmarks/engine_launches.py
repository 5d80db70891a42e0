"""Counts every launch of the real engine: of each call of a stage, of the host around them, and of a committed byte.

`benchmarks.launches` counts what single calls of the model launch. This runs whole rounds of every decoder, with stages
over padded buffers as on a GPU, on a model with the layers of a preset and tiny widths: the host reads every pass, or
runs ahead. `python -m benchmarks.engine_launches` prints for each stage what a recording holds, and for each round what
is launched between recordings: kernels, torch's own operations and copies, with the line that each comes from.

A launch is a kernel, an operation of torch that writes memory, or a copy, also between host and device. Views and
allocations are none. What a CPU leaves out is added as a GPU does it: the copy of a recording's output, numbers sent to
the device, and values read back.

Kernels are counted, but not run: the interpreter would take minutes. New tensors hold zeros, so that no byte closes a
patch and every block is done in one pass. What a call launches does not depend on that, and how often there are calls
is not counted here but given (`benchmarks.launches.RATES`). What the host adds for the later passes of a block of blt-d
is only counted running ahead.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from engine import transfer
from engine.checkpoint import PRESETS, RandomTensors, save
from engine.config import EngineConfig, ModelConfig, Policy, StackConfig
from engine.costs.ledger import Launch
from engine.engine import Engine
from engine.memory.text import Slots
from engine.step.ahead import Ahead
from engine.step.graphs import Stage
from engine.step.launch import Launcher
from engine.types import Delta, Request
from kernels.lang import IN_INTERPRETER

from .generate import GREEDY, abandon, begin, prompts
from .launches import RATES
from .models import shaped
from .replay import replayed
from .report import ROOT, table
from .variants import RANDOM

Kind = Literal["kernel", "torch", "copy"]
KINDS: tuple[Kind, ...] = get_args(Kind)
AHEAD: tuple[Policy, ...] = ("never", "always")
STAGES = ("patcher", "encoder", "global", "decoder", "around")
DECODERS = ("decoder", "draft", "unmask")
"""Launches of the decoder stage."""
LAUNCHES = {
    "_local_scalar_dense": 1,
    "constant_pad_nd": 2,  # a fill and a copy
    "index_copy": 2,  # a copy and the operation in place; so are the next ones
    "index_fill": 2,
    "index_put": 2,
    "masked_fill": 2,
    "scatter": 2,
    "sort": 2,
}
"""Launches of torch's operations that are neither views nor allocations; 1 where not named."""
ALLOCATES = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
NO_LAUNCH = (*ALLOCATES, "set_", "lift_fresh", "_pin_memory", "detach_")
OWN = tuple(str(ROOT / folder) + os.sep for folder in ("engine", "kernels"))
ROUTES = ("engine/transfer.py",)
"""Files that only pass on what others launch."""


class Launched(NamedTuple):
    """where: file and line."""

    kind: Kind
    name: str
    where: str


Tally = Counter[Launched]


@dataclass
class Calls:
    """All calls of a stage: their launches together, and how many calls and passes they were. A launch of several
    passes is one call."""

    tally: Tally = field(default_factory=Counter)
    calls: int = 0
    passes: int = 0

    def add(self, other: "Calls") -> None:
        self.tally.update(other.tally)
        self.calls += other.calls
        self.passes += other.passes

    @property
    def per_pass(self) -> float:
        return self.tally.total() / self.passes if self.passes else 0.0


class Watch:
    """Counts the launches of all engines while it is entered. around: what belongs to no stage."""

    def __init__(self) -> None:
        self.reset()
        self._stage: str | None = None
        self._entered = ExitStack()

    def reset(self) -> None:
        self.stages: dict[str, Calls] = defaultdict(Calls)
        self.around: Tally = Counter()

    def count(self, kind: Kind, name: str, number: int = 1) -> None:
        tally = self.around if self._stage is None else self.stages[self._stage].tally
        tally[Launched(kind, name, _where())] += number

    def __enter__(self) -> "Watch":
        self._patch(GridExecutor, "__call__", self._kernel)
        self._patch(Launcher, "run", self._run)
        self._patch(Slots, "write", self._write)
        self._patch(transfer.Readback, "__init__", self._read_back)
        for name, instead in (("to_device", self._to_device), ("read_async", self._read_async)):
            found = getattr(transfer, name)
            for module in list(sys.modules.values()):
                if getattr(module, "__name__", "").startswith("engine.") and getattr(module, name, None) is found:
                    self._patch(module, name, instead)
        self._entered.enter_context(_Operations(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._entered.close()

    def _patch(self, owner: Any, name: str, instead: Callable[..., Any]) -> None:
        """Calls `instead` with what was there, and then the arguments."""
        was = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            return instead(was, *args, **kwargs)

        self._entered.enter_context(mock.patch.object(owner, name, call))

    def _kernel(self, launch: Any, executor: GridExecutor, *_: Any, **__: Any) -> None:
        # A launch of no programs is none.
        if callable(executor.grid) or prod(executor.grid):
            self.count("kernel", executor.fn.__name__.removesuffix("_kernel"))

    def _run(
        self, run: Any, launcher: Launcher, launch: Launch, stage: Stage, *args: Any, name: str = "", **more: Any
    ) -> Tensor:
        of = (name or launch.stage).rstrip(" 0123456789")

        def counted(inputs: Mapping[str, Tensor]) -> Tensor:
            self._stage = of
            try:
                out = stage(inputs)
                self.count("copy", "output of the recording")
            finally:
                self._stage = None
            return out

        calls = self.stages[of]
        calls.calls += 1
        calls.passes += launch.passes
        out: Tensor = run(launcher, launch, counted, *args, name=name, **more)
        return out

    def _write(self, write: Any, *args: Any) -> bool:
        changed = bool(write(*args))
        if changed:
            self.count("copy", "ids to the device")
        return changed

    def _to_device(self, to_device: Any, *args: Any) -> Tensor:
        self.count("copy", "to the device")
        moved: Tensor = to_device(*args)
        return moved

    def _read_back(self, init: Any, *args: Any) -> None:
        self.count("copy", "to the host")
        init(*args)

    def _read_async(self, read: Any, *tensors: Tensor) -> Callable[[], list[Any]]:
        transfer.packed(tensors)
        self.count("copy", "to the host")
        lists: Callable[[], list[Any]] = read(*tensors)
        return lists


class _Operations(TorchDispatchMode):
    """Shows torch's operations to a watch."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch = watch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._can_decompose():
            # In inference mode operations that only call others arrive here too.
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in ALLOCATES:
            out.zero_()
        if not func.is_view and name not in NO_LAUNCH and _writes(out):
            copies = name in ("copy_", "clone", "_local_scalar_dense")
            self._watch.count("copy" if copies else "torch", name, LAUNCHES.get(name, 1))
        return out


def _writes(out: Any) -> bool:
    """Whether an operation with this result has anything to do: torch launches nothing for tensors without elements."""
    outs = [each for each in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(each, Tensor)]
    return not outs or any(each.numel() for each in outs)


def _where() -> str:
    """The innermost line of the engine or the kernels."""
    frame = sys._getframe(2)
    while frame.f_back:
        if frame.f_code.co_filename.startswith(OWN) and not frame.f_code.co_filename.endswith(ROUTES):
            return f"{os.path.relpath(frame.f_code.co_filename, ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


# What is run.


def deep(preset: str) -> ModelConfig:
    """A preset's layers and tables in Fast-BLT's form, as narrow as they can be."""
    config = shaped(preset, "fast")

    def narrow(stack: StackConfig, dim: int) -> StackConfig:
        return replace(stack, dim=dim, num_heads=2, num_kv_heads=2, ffn_dim=dim)

    enc, glob = config.encoder, config.global_
    dim = 16 * config.slots if glob.dim == enc.dim * config.slots else 32 * config.slots
    return replace(
        config,
        encoder=narrow(enc, 16),
        global_=narrow(glob, dim),
        decoder=narrow(config.decoder, 16),
        patcher=narrow(config.patcher, 16),
        hashes=replace(config.hashes, rows=61),
    )


@dataclass(frozen=True)
class Counted:
    """The launches of some rounds of one request. around: the host's, between stages."""

    stages: Mapping[str, Calls]
    around: Tally
    committed: int
    rounds: int


def engine_of(folder: Path, preset: str, ahead: Policy) -> Engine:
    """An engine whose stages are over padded buffers; its model is made in the folder."""
    model = folder / preset
    if not model.exists():
        config = deep(preset)
        save(model, config, dict(RandomTensors(config, 0, torch.bfloat16)), torch.bfloat16)
    return Engine(
        EngineConfig(
            model=str(model), kernels="triton", graphs=True, dtype="bfloat16", run_ahead=ahead,
            cache_bytes=16 << 20, max_sequences=2, max_length=512,
        )
    )  # fmt: skip


def count(engine: Engine, watch: Watch, way: str, rounds: int = 2) -> Counted:
    """The launches of one request's rounds, after its first."""
    how = RANDOM["fast"][way]
    request = Request(
        id="counted", prompt_ids=prompts(1, 12)[0], max_tokens=256, sampling=GREEDY, ignore_eos=True, **how
    )
    passes = round(RATES[way].drafts + RATES[way].blocks)
    # The host cannot learn how many passes blocks need.
    with mock.patch.object(Ahead, "_num_passes", lambda _, known, *__: max(passes - known, 1)):
        begin(engine, [request], replayed(engine))
        watch.reset()
        before, committed, done = engine.snapshot().decoders[request.decoder].rounds, 0, 0
        while done < rounds:
            committed += sum(len(event.ids) for event in engine.step() if isinstance(event, Delta))
            done = engine.snapshot().decoders[request.decoder].rounds - before
        found = Counted(dict(watch.stages), watch.around, committed, done)
        watch.reset()
        abandon(engine, [request])
    return found


@dataclass(frozen=True)
class Launches:
    """All counts of a preset: of each decoder, without and with running ahead."""

    preset: str
    counted: Mapping[Policy, Mapping[str, Counted]]

    @classmethod
    def of(cls, preset: str, watch: Watch | None = None) -> "Launches":
        """Runs every decoder. Raises RuntimeError where kernels are compiled: only the interpreter can leave them
        out."""
        if not IN_INTERPRETER:
            raise RuntimeError("to count launches, set TRITON_INTERPRET=1 before Triton is loaded")
        counted: dict[Policy, dict[str, Counted]] = {}
        with tempfile.TemporaryDirectory() as folder, watch or Watch() as watching:
            for ahead in AHEAD:
                engine = engine_of(Path(folder), preset, ahead)
                counted[ahead] = {way: count(engine, watching, way) for way in RATES}
        return cls(preset, counted)

    def stages(self, ahead: Policy) -> dict[str, Calls]:
        """The calls of each stage by all decoders together."""
        stages: dict[str, Calls] = defaultdict(Calls)
        for counted in self.counted[ahead].values():
            for name, calls in counted.stages.items():
                stages[name].add(calls)
        return stages

    def per_pass(self, way: str, ahead: Policy) -> dict[str, float]:
        """Launches of a call of each stage, and of a decoder pass as this decoder makes them."""
        own = [calls for name, calls in self.counted[ahead][way].stages.items() if name in DECODERS]
        found = {name: self.stages(ahead)[name].per_pass for name in ("patcher", "encoder", "global")}
        return found | {"decoder": sum(calls.tally.total() for calls in own) / sum(calls.passes for calls in own)}

    def by_stage(self, way: str, ahead: Policy) -> dict[str, float]:
        """Launches for each committed byte: of every stage, and the host's around them."""
        rates, counted = RATES[way], self.counted[ahead][way]
        calls = {"patcher": 1.0, "encoder": 1.0, "global": rates.global_, "decoder": rates.drafts + rates.blocks}
        found = {name: number * calls[name] for name, number in self.per_pass(way, ahead).items()}
        found = {name: number / rates.bytes for name, number in found.items()}
        if unread := counted.stages.get("global unread"):
            # Launched for every byte but the first of a launch, whether or not a patch closes.
            share = unread.calls / counted.committed
            found["global"] = found["global"] * (1 - share) + unread.per_pass * share
            found["around"] = counted.around.total() / counted.committed
        else:
            found["around"] = counted.around.total() / counted.rounds / rates.bytes
        return found

    def per_byte(self, way: str, ahead: Policy) -> float:
        return sum(self.by_stage(way, ahead).values())


# What is printed.


def render(launches: Launches, *, lines: bool = True) -> str:
    """Markdown: launches a byte, then every stage's call, and what the host adds. lines: with the line of each."""
    header = ["decoder", "running ahead", *STAGES, "launches a byte"]
    rows = []
    for ahead in AHEAD:
        for way in RATES:
            parts = launches.by_stage(way, ahead)
            rows.append([way, ahead, *(f"{parts[name]:.1f}" for name in STAGES), f"{sum(parts.values()):.1f}"])
    sections = [f"# Launches of the layers of {launches.preset}, one sequence", table(header, rows)]
    seen: dict[str, Calls] = {}
    for ahead in AHEAD:
        seen = {**launches.stages(ahead), **seen}
    for name, calls in seen.items():
        sections += [f"## {name}: {calls.per_pass:g} a pass", _told(calls.tally, calls.passes, lines)]
    for ahead in AHEAD:
        for way, counted in launches.counted[ahead].items():
            each = counted.around.total() / counted.rounds
            title = f"## around the stages, {way}, running ahead {ahead}: {each:g} a round"
            sections += [title, _told(counted.around, counted.rounds, lines)]
    return "\n\n".join(sections)


def _told(tally: Tally, times: int, lines: bool) -> str:
    """Kernels by name, then torch's operations and copies by line."""
    kept: Tally = Counter()
    for launched, number in tally.items():
        kept[launched if lines and launched.kind != "kernel" else launched._replace(where="")] += number
    ordered = sorted(kept.items(), key=lambda item: (KINDS.index(item[0].kind), -item[1], item[0]))
    rows = [[of.kind, of.name, f"{number / times:g}", of.where] for of, number in ordered]
    return table(["", "name", "launches", "from"], rows)


def as_json(launches: Launches) -> dict[str, Any]:
    return {
        "preset": launches.preset,
        "per_pass": {ahead: {way: launches.per_pass(way, ahead) for way in RATES} for ahead in AHEAD},
        "per_byte": {ahead: {way: launches.by_stage(way, ahead) for way in RATES} for ahead in AHEAD},
    }


def rerun_interpreted(module: str) -> None:
    """Begins the program anew with Triton's interpreter, unless it has it: Triton reads the variable when it loads."""
    if not IN_INTERPRETER:
        command = [sys.executable, "-m", module, *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, "TRITON_INTERPRET": "1"})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_launches", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="1b", help="whose numbers of layers")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args()
    rerun_interpreted("benchmarks.engine_launches")
    launches = Launches.of(options.preset)
    print(json.dumps(as_json(launches)) if options.json else render(launches))


if __name__ == "__main__":
    main()
