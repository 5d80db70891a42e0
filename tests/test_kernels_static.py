"""Every Triton kernel compiles for the real shapes and fits the devices; kernels that break a rule are found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.sass import chain, parse
from kernels.dispatch import TritonKernels

ROOT = Path(__file__).parent.parent
# Kernels that were defined for the interpreter cannot be compiled: another process defines them anew.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


@pytest.mark.slow
def test_triton_kernels_compile_for_real_shapes_and_fit_the_device() -> None:
    # The rest, all shapes for all architectures with two versions of Triton, is `make kernels-static`.
    command = [sys.executable, "-m", "benchmarks.kernels_static", "--models", "1b", "--rows", "1", "--ones"]
    command += ["--bfloat16", "--in-turn"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [[cell.strip() for cell in line.split("|")[1:]] for line in done.stdout.splitlines() if line[:2] == "| "]
    head, *rows = rows
    names = {name for name, value in vars(TritonKernels).items() if isinstance(value, staticmethod)}
    assert {row[0] for row in rows} == names | {"settle"}
    assert {row[2] for row in rows} == {"80", "90", "100"}
    assert "all fit" in done.stdout
    qkv = [dict(zip(head, row, strict=False)) for row in rows if row[0] == "qkv" and "GATE" not in row[1]]
    assert any(float(row["waves"]) > 1 and int(row["chain"]) == 16 for row in qkv)
    weights = [row["weights early / late"] for row in qkv if row["sm"] != "80"]
    assert weights and all(said.endswith(" / 0") and said[0] != "0" for said in weights)


PLANTED = """
import json, sys
import torch
from benchmarks import kernels_static
from kernels.lang import await_inputs, jit, tl
from kernels.product import held

@jit
def planted_kernel(x_ptr, w_ptr, out_ptr, IN: tl.constexpr, OUT: tl.constexpr, LATE: tl.constexpr,
                   GATE: tl.constexpr, OVERLAP: tl.constexpr):
    i_in, i_out, i_row = tl.arange(0, IN), tl.arange(0, OUT), tl.arange(0, 16)
    p_w = w_ptr + i_out[:, None] * IN + i_in[None, :]
    if LATE:
        await_inputs(OVERLAP)
    w = held(tl.load(p_w, eviction_policy="evict_first"))
    if not LATE:
        await_inputs(OVERLAP)
    x = tl.load(x_ptr + i_row[:, None] * IN + i_in[None, :])
    y = tl.dot(x, tl.trans(w))
    tl.store(out_ptr + i_row[:, None] * OUT + i_out[None, :], y)

kernels_static.MULTIPLYING = {"planted"}
recorder = kernels_static.Recorder()
x, out = (torch.empty(1, dtype=dtype, device="meta") for dtype in (torch.bfloat16, torch.float32))
with recorder.recording():
    for how in json.loads(sys.argv[1]):
        planted_kernel[(3, 2)](x, x, out, **how, num_warps=1, OVERLAP=False)
for found in kernels_static.compile_all([(launch, 90) for launch in recorder.launches]):
    row = kernels_static.row(found, recorder.launches[found.launch])
    print(json.dumps({"faults": [*found.faults()], "row": row}))
"""


PLANTS: list[tuple[dict[str, int], str]] = [
    ({"IN": 256, "OUT": 8, "LATE": False, "GATE": False}, ""),
    ({"IN": 256, "OUT": 8, "LATE": True, "GATE": False}, "loads no weights before it waits"),
    ({"IN": 256, "OUT": 8, "LATE": True, "GATE": True}, ""),
    ({"IN": 1024, "OUT": 8, "LATE": False, "GATE": False}, "chains 64 tensor-core instructions"),
    ({"IN": 2048, "OUT": 16, "LATE": False, "GATE": False}, "spills"),
]
"""Constants of a planted kernel, and how its fault begins, if it has one."""


def test_kernels_that_break_a_rule_are_found(tmp_path: Path) -> None:
    file = tmp_path / "planted.py"
    file.write_text(PLANTED)
    command = [sys.executable, str(file), json.dumps([how for how, _ in PLANTS])]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for (_, fault), line in zip(PLANTS, done.stdout.splitlines(), strict=True):
        found = json.loads(line)
        if fault:
            assert any(said.startswith(fault) for said in found["faults"]), found
            assert fault in found["row"]
        else:
            assert found["faults"] == []
        assert "| 6 | 0.05 |" in found["row"], "programs, and their share of the multiprocessors"


SHARED_HEADS = """
import torch
from benchmarks import kernels_static
from kernels.attention import AttentionPlan
from kernels.dispatch import TritonKernels

recorder = kernels_static.Recorder()
ints = lambda *shape: torch.empty(shape, dtype=torch.int64, device="meta")
q, cache = (torch.empty(shape, device="meta") for shape in ((4, 24, 128), (20, 8, 64, 128)))
with recorder.recording():
    for most in (1, 16):
        plan = AttentionPlan.of(*(ints(4) for _ in range(5)), ints(4, 5), ints(40), most)
        TritonKernels().attention(q, cache, cache, plan)
launches = [launch for launch in recorder.launches if not dict(launch.constants)["GATE"]]
print(*(found.spilled for found in kernels_static.compile_all([(launch, 90) for launch in launches])))
"""


@pytest.mark.slow
def test_attention_of_many_heads_in_float32_spills_little() -> None:
    """The 3B shape's: 24 heads, 8 for keys and values. With 4 warps 8 KB and more a thread."""
    command = [sys.executable, "-c", SHARED_HEADS]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, split = map(int, done.stdout.split())
    assert whole <= 128 and split <= 1536


def test_too_much_shared_memory_does_not_fit() -> None:
    from benchmarks.kernels_static import SHARED_LIMIT, Compiled, Launch
    from benchmarks.sass import Code
    from kernels.entropy import entropy_kernel
    from kernels.traffic import Traffic

    launch = Launch(entropy_kernel, (), (), (), (), 1, Traffic())
    faults = [
        [*Compiled(launch, arch, 255, 0, SHARED_LIMIT[90], Code(False, 0, 0, 0, False)).faults()] for arch in (90, 80)
    ]
    assert faults == [[], ["needs more shared memory than 166912 bytes"]]


def test_chains_of_tensor_core_instructions_are_counted_through_copies_and_round_loops() -> None:
    def counted(*lines: str) -> tuple[int, bool]:
        code = [line if line.startswith(".L") else f"/*{16 * i:04x}*/ {line} ;" for i, line in enumerate(lines)]
        return chain(parse("\n".join(code)))

    first, more = "HMMA.16816.F32.BF16 R4, R8, R12, RZ", "HMMA.16816.F32.BF16 R4, R8, R12, R4"
    assert counted("MOV R1, c[0x0][0x28]") == (0, False)
    assert counted(first, more, more) == (3, False)
    assert counted(first, "HMMA.16816.F32.BF16 R20, R8, R12, RZ", more) == (2, False)
    assert counted(first, more, "FADD R4, R4, R9", more) == (2, False), "a sum apart ends a chain"
    assert counted(first, "MOV R20, R4", "@P0 HMMA.16816.F32.BF16 R20, R8, R12, R20") == (2, False)
    assert counted(".L_x_0:", first, more, "@P0 BRA `(.L_x_0)") == (2, False), "begins anew each time"
    assert counted(first, ".L_x_0:", more, more, "@P0 BRA `(.L_x_0)") == (5, True)
    wide = "HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR8]"
    assert counted(f"{wide}, !UPT", f"{wide}, R24", f"{wide}, R24, gsb0") == (3, False)
