"""The ring of the GPU check (CUDA C++), run on the CPU with its threads in many orders, against torch."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.gpu_check.handover import ring

HERE = Path(__file__).parent
COMPILER = shutil.which("c++")
DIM, WARPS, STAGES, PHASES = 64, 2, 3, 5
Run = Callable[[Tensor, int], tuple[bool, Tensor]]

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


def compiled(folder: Path, source: str) -> Run:
    """What runs the chain over rows x (R, DIM) in the order of a seed: whether it ended, and the rows that came out."""
    assert COMPILER
    (folder / "ring.cu").write_text(source)
    library = folder / "ring.so"
    options = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{HERE}", "-DON_CPU", f"-DDIM={DIM}"]
    options += [f"-DWARPS={WARPS}", f"-DSTAGES={STAGES}", f'-DRING="{folder / "ring.cu"}"']
    subprocess.run([COMPILER, *options, "-o", library, HERE / "ring_on_cpu.cpp"], check=True)
    run = ctypes.CDLL(str(library)).run
    laid_out = ring.packed(weights(), WARPS)

    def chain(x: Tensor, seed: int) -> tuple[bool, Tensor]:
        words = ring.words_of(x, 100)
        pointers = (ctypes.c_void_p(laid_out.data_ptr()), ctypes.c_void_p(words.data_ptr()))
        ended = run(*pointers, PHASES, len(x), 100, seed)
        return bool(ended), ring.rows_in(words, len(x), PHASES)

    return chain


def weights() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(PHASES, DIM, DIM, generator=generator) * DIM**-0.5).bfloat16()


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return torch.randn(8, DIM, generator=torch.Generator().manual_seed(1)).bfloat16()


def test_the_ring_kernel_equals_torch_in_any_order_of_its_threads(tmp_path: Path, rows: Tensor) -> None:
    chain = compiled(tmp_path, ring.SOURCE.read_text())
    ended, eight = chain(rows, 0)
    assert ended
    torch.testing.assert_close(eight, ring.expected(weights(), rows), atol=0.05, rtol=0.05)
    for count, seed in ((8, 1), (3, 2)):
        ended, found = chain(rows[:count], seed)
        assert ended and torch.equal(found, eight[:count]), "a row's bits depend on neither order nor company"


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("        barrier_wait(full + s, (p / STAGES) & 1);\n", ""),
        ("!(differs & 0xffff)", "true"),
    ],
    ids=["weights not awaited", "words not awaited"],
)
def test_a_ring_kernel_without_a_wait_gives_wrong_results(tmp_path: Path, rows: Tensor, right: str, wrong: str) -> None:
    source = ring.SOURCE.read_text()
    assert right in source
    chain = compiled(tmp_path, source.replace(right, wrong))
    expected = ring.expected(weights(), rows)
    ended, found = chain(rows, 0)
    assert not (ended and torch.allclose(found.float(), expected.float(), atol=0.05, rtol=0.05))
