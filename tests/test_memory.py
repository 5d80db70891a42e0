"""What a model takes, before it is read, and in which dtype its hash tables are held."""

import json
import logging
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from engine.checkpoint import PRESETS, calibrated, expected_shapes, load, random_tensors, save
from engine.checkpoint.base import CheckpointError
from engine.checkpoint.hf_config import render
from engine.checkpoint.names import HASHES
from engine.config import EngineConfig, HashConfig
from engine.layout import WEIGHTS
from engine.memory import room
from engine.memory.caches import cache_specs, plan_caches, typical_pages
from engine.model import progress
from engine.model.layers import Weights
from kernels.dispatch import choose_kernels
from server.cli import app
from tests.engines import engine_logits, make_engine, request, run
from tests.models import text

CPU = torch.device("cpu")
BILLION = 10**9
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


def test_a_device_holds_all_hash_tables_in_one_dtype(mixed: Path) -> None:
    """Its kernel reads them by one type."""
    tensors, meta, kernels = dict(load(mixed).tensors), torch.device("meta"), choose_kernels("torch", CPU)
    tensors[TABLE] = tensors[TABLE].bfloat16()
    names = [name for name in tensors if name.startswith(HASHES)]
    for dtype in (torch.bfloat16, torch.float32):
        weights = Weights(tensors, dtype, meta, kernels)
        assert {weights.stored(name).dtype for name in names} == {dtype}


def test_the_texts_of_many_sequences_count_on_a_device(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, gpu = load(mixed), EngineConfig(str(mixed), device="cuda", cache_bytes=6 << 20, max_sequences=4000)
    monkeypatch.setattr(room, "available", lambda device: 20 << 20)
    with pytest.raises(ValueError, match="315 MiB for the texts of --max-sequences and 5.16 MiB for its"):
        room.check_room(
            found.config, found.tensors, plan_caches(found.config, gpu), gpu, torch.float32, fp8=False, mapped=False
        )
    few = replace(gpu, max_sequences=4)
    room.check_room(
        found.config, found.tensors, plan_caches(found.config, few), few, torch.float32, fp8=False, mapped=False
    )


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


# Flags that ask for more than there can be


@pytest.mark.parametrize("value", [BILLION, 1 << 40, 0, -1])
@pytest.mark.parametrize(
    ("name", "most"),
    [("max_sequences", 65536), ("max_step_rows", 1048576), ("page_size", 65536), ("num_threads", 256)],
)
def test_a_flag_outside_its_range_is_refused_by_its_name(mixed: Path, name: str, most: int, value: int) -> None:
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(ValueError, match=rf"^{flag} {value} must be from 1 to {most}$"):
        make_engine(mixed, **{name: value})
    result = CliRunner().invoke(app, ["serve", "--model", str(mixed), flag, str(value)])
    assert result.exit_code == 2
    wrong = f"at least 1, not '{value}'" if value < 1 else f"at most {most}, not '{value}'"
    assert f"Invalid value for {flag} (or FASTBLT_" in result.stderr
    assert wrong in " ".join(result.stderr.split())


@pytest.mark.parametrize(("name", "value"), [("max_step_rows", 1 << 20), ("page_size", 1 << 16), ("cache_bytes", 1)])
def test_caches_too_small_for_a_sequence_name_all_flags_that_matter(mixed: Path, name: str, value: int) -> None:
    settings = {"cache_bytes": 1 << 26, "max_step_rows": 512, "page_size": 64} | {name: value}
    with pytest.raises(ValueError, match="is too small: one sequence of 2048 bytes needs") as caught:
        make_engine(mixed, **settings)
    message = str(caught.value)
    assert message.startswith(f"cache_bytes {settings['cache_bytes']} ")
    assert f"with --max-step-rows {settings['max_step_rows']} and --page-size {settings['page_size']}" in message
    needed = message.partition("needs ")[2].partition(" ")[0]
    if int(needed) < 1 << 28:
        make_engine(mixed, **settings | {"cache_bytes": int(needed)})


@given(st.integers(1 << 22, 1 << 28), st.integers(1, 3000), st.integers(1, 100))
def test_as_many_typical_sequences_as_fit_have_pages(cache_bytes: int, most: int, page_size: int) -> None:
    config = PRESETS["tiny"]
    engine = EngineConfig("x", cache_bytes=cache_bytes, max_sequences=most, page_size=page_size, max_step_rows=40)
    plan = plan_caches(config, engine)
    specs = cache_specs(config, page_size)

    def size(sequences: int) -> int:
        return sum(n * plan.page_bytes[name] for name, n in typical_pages(config, engine, specs, sequences).items())

    (fits,) = {n for n in range(1, most + 1) if size(n) <= cache_bytes and (n == most or size(n + 1) > cache_bytes)}
    pages = typical_pages(config, engine, specs, fits)
    assert {n: count for n, count in plan.pages.items() if n != "global"} == {
        n: count for n, count in pages.items() if n != "global"
    }
    assert plan.pages["global"] >= pages["global"]
    assert plan.num_bytes <= cache_bytes


def test_a_window_that_the_pools_do_not_hold_bounds_the_length(tmp_path: Path) -> None:
    """Else a long text would find no room beside itself, and end the engine."""
    config = PRESETS["tiny"]
    stages = {name: replace(getattr(config, name), window=4096, max_positions=8192) for name in ("encoder", "decoder")}
    tensors = random_tensors(replace(config, **stages), 3)
    save(tmp_path, calibrated(replace(config, **stages), tensors), tensors)
    engine = make_engine(tmp_path, max_sequences=1, page_size=16, max_step_rows=64, cache_bytes=1 << 27)
    longest = engine.limits.max_length
    assert 2048 <= longest < 4096
    out = run(engine, [request("a", text(longest - 5, 1), 5)])["a"]
    assert len(out.ids) == 5 and getattr(out.end, "reason", "") == "length"
    more = make_engine(tmp_path, max_sequences=4, page_size=16, max_step_rows=64, cache_bytes=1 << 28)
    assert more.limits.max_length > 4096


def test_more_texts_than_all_memory_holds_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    config = PRESETS["tiny"]
    stages = {name: replace(getattr(config, name), max_positions=1 << 24) for name in ("encoder", "decoder")}
    save(tmp_path, replace(config, **stages), random_tensors(config, 3))
    with pytest.raises(ValueError, match=r"of memory and swap space in all: .* for texts of 16777216 ids") as caught:
        make_engine(tmp_path, max_sequences=65536)
    assert "(--max-sequences 65536)" in str(caught.value)


@contextmanager
def address_space(spare: int) -> Iterator[None]:
    """As under `ulimit -v`: this process may reserve so many bytes more."""
    old = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + spare, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


@pytest.mark.parametrize(
    ("name", "value", "most"),
    [("cache_bytes", 2 << 30, 300 << 20), ("max_sequences", 10_000, 3_700), ("num_threads", 256, 23)],
)
def test_the_limit_of_the_address_space_is_held_against_flags(mixed: Path, name: str, value: int, most: int) -> None:
    flags = {"cache_bytes": 1 << 23, "max_sequences": 64, "num_threads": 1} | {name: value}
    if name == "cache_bytes":
        flags["max_sequences"] = 300
    with (
        address_space(400 << 20),
        pytest.raises(ValueError, match=r"left of the address space \(ulimit -v\)") as caught,
    ):
        make_engine(mixed, **flags)
    message, flag = str(caught.value), name.replace("_", "-")
    assert f"(--{flag} {value})" in message
    told = int(message.partition(f"a --{flag} of at most ")[2].partition(" ")[0])
    assert most * 0.7 < told < most * 1.3


@pytest.mark.parametrize(
    "ask",
    [
        lambda: np.zeros(1 << 40, np.int8),
        lambda: torch.zeros(1 << 40, dtype=torch.int8),
        lambda: bytearray(1 << 40),
    ],
    ids=["numpy", "torch", "python"],
)
def test_memory_that_cannot_be_had_names_the_flags_and_what_there_is(ask: Callable[[], object]) -> None:
    engine = EngineConfig("x", max_sequences=71)
    wanted = pytest.raises(ValueError, match="^out of memory while loading: ")
    with address_space(1 << 30), wanted as caught, room.naming_flags(engine):
        ask()
    for words in ("--cache-bytes 2147483648", "--max-sequences 71", "--max-step-rows 512", "free on cpu", "ulimit -v"):
        assert words in str(caught.value)


def test_other_errors_while_an_engine_is_made_stay_as_they_are() -> None:
    for error in (RuntimeError("no kernel"), FileNotFoundError(2, "no such file"), KeyError("a")):
        with pytest.raises(type(error)) as caught, room.naming_flags(EngineConfig("x")):
            raise error
        assert caught.value is error


def test_a_file_for_which_no_addresses_are_left_is_named(tmp_path: Path) -> None:
    """A sparse one, of hash tables of 64 GB."""
    config = replace(PRESETS["tiny"], hashes=HashConfig((3,), 1, 1 << 30))
    sizes = {n: 2 * prod(shape) for n, shape in expected_shapes(config).items()}
    ends = dict(zip(sizes, accumulate(sizes.values()), strict=True))
    entries = {
        (FUSED if n == TABLE else n): {"dtype": "BF16", "shape": shape, "data_offsets": [ends[n] - sizes[n], ends[n]]}
        for n, shape in expected_shapes(config).items()
    }
    header = json.dumps(entries).encode()
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + max(ends.values()))
    (tmp_path / "config.json").write_text(json.dumps(render(config, "bfloat16")))
    said = rf"{WEIGHTS}: its 6\d{{10}} bytes cannot be mapped: too few addresses \(ulimit -v\)"
    with address_space(1 << 30), pytest.raises(CheckpointError, match=said):
        load(tmp_path)


def test_a_server_that_cannot_load_says_why_in_one_line_and_fails(mixed: Path) -> None:
    """The whole of it: two processes, and the error crosses from one to the other."""
    tensors = load_file(mixed / WEIGHTS)
    name = "model.patcher.layers.0.mlp.up_proj.weight"
    tensors[name][1, 2] = float("nan")
    save_file(tensors, mixed / WEIGHTS)
    command = [sys.executable, "-m", "server", "serve", "--model", str(mixed), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert f"{mixed / WEIGHTS}: tensor {name} holds nan at [1, 2]" in last
