"""What a model takes, before it is read, and in which dtype its hash tables are held."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint import PRESETS, load, random_tensors, save
from engine.config import HashConfig
from engine.layout import WEIGHTS
from engine.memory import room
from engine.model import progress
from engine.model.layers import Weights
from kernels.dispatch import choose_kernels
from tests.engines import engine_logits, make_engine
from tests.models import text

CPU = torch.device("cpu")
FUSED = "model.encoder_hash_tok_embedding.weight"
TABLE = "model.encoder_hash_tok_embedding.0.weight"


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """As Hugging Face's converter leaves it: all in bfloat16 but the hash tables."""
    config = replace(PRESETS["tiny"], hashes=HashConfig((3, 4), 2, 300))
    save(tmp_path, config, random_tensors(config, 3), torch.float32)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({name: t if name == FUSED else t.bfloat16() for name, t in tensors.items()}, tmp_path / WEIGHTS)
    return tmp_path


def test_a_device_holds_hash_tables_no_wider_than_the_model(mixed: Path) -> None:
    """The meta device stands for one that is no CPU: it has shapes and dtypes, and no memory."""
    tensors, meta, kernels = load(mixed).tensors, torch.device("meta"), choose_kernels("torch", CPU)
    assert tensors[TABLE].dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float32):
        held = Weights(tensors, dtype, meta, kernels).stored(TABLE)
        assert (held.device, held.dtype) == (meta, dtype)
        assert Weights(tensors, dtype, CPU, kernels).stored(TABLE) is tensors[TABLE]
    narrow = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    assert Weights(narrow, torch.float32, meta, kernels).stored(TABLE).dtype == torch.bfloat16


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_wide_tables_in_a_file_give_the_bits_of_tables_in_the_models_dtype(
    mixed: Path, kernels: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """So that it makes no difference where they are rounded: whole, on a device, or a row at a time, on a CPU."""
    found, narrow, ids = load(mixed), tmp_path_factory.mktemp("narrow"), text(70, 3)
    save(narrow, found.config, found.tensors, torch.bfloat16)
    logits = [
        engine_logits(make_engine(folder, dtype="bfloat16", kernels=kernels), ids, 30) for folder in (mixed, narrow)
    ]
    assert torch.equal(*logits)


def test_wide_tables_do_not_make_the_matrices_wide(mixed: Path) -> None:
    """Our own products widen what they read: in float32, too, the matrices stay as small as they are."""
    kernels = choose_kernels("native", CPU)
    assert Weights(load(mixed).tensors, torch.float32, CPU, kernels).matrix_dtype == torch.bfloat16


def test_the_log_states_needed_and_free_memory(mixed: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fastblt.engine")
    make_engine(mixed, dtype="bfloat16")
    (line,) = caplog.messages
    # Two functions, two group sizes, 300 rows of 32 numbers of four bytes.
    assert "150 KiB of hash tables in their file" in line
    assert " are free on cpu" in line


def test_a_model_larger_than_free_memory_is_refused_before_it_is_read(
    mixed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(room, "available", lambda device: 100_000)
    with pytest.raises(ValueError, match=r"and 97\.7 KiB are free on cpu: --cache-bytes makes the caches smaller"):
        make_engine(mixed)
    # Torch may use them where they are, in the file: that is slow, and works.
    make_engine(mixed, kernels="torch")
    # Enough for the weights: pages of the caches are not there before they are used.
    monkeypatch.setattr(room, "available", lambda device: 10 << 20)
    make_engine(mixed)
    assert "it may run out of memory when it is busy" in caplog.text
    monkeypatch.setattr(room, "available", lambda device: None)
    make_engine(mixed)


def test_free_memory_respects_the_memory_limit_of_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 0 < (room.available(CPU) or 0) < 1 << 50
    monkeypatch.setattr(room, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(room, "CGROUP", tmp_path)
    assert room.available(CPU) is None
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemFree:  50 kB\nMemAvailable:  7000 kB\nSwapFree:  5 kB\n")
    assert room.available(CPU) == 7005 << 10
    (tmp_path / "memory.max").write_text("max\n")
    assert room.available(CPU) == 7005 << 10
    (tmp_path / "memory.max").write_text(f"{5000 << 10}\n")
    (tmp_path / "memory.current").write_text(f"{4000 << 10}\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 102400\nactive_file 1024\n")
    assert room.available(CPU) == (1000 << 10) + 102400 + 1024


def test_loading_logs_its_progress(
    mixed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fastblt.engine")
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    make_engine(mixed)
    told = [message for message in caplog.messages if message.startswith("read ")]
    shares = [int(message.split()[1]) for message in told]
    assert len(told) > 20 and shares == sorted(shares) and shares[-1] == 100
