"""The whole engine with Triton's kernels and our own, with stages as recordings: torch's bytes."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine import checkpoint
from engine.build import records_graphs
from engine.config import EngineConfig, PatchingRule
from engine.step.graphs import Eager, Graphs, pack, padded, unpack
from engine.types import Request, SamplingParams, UnmaskRule
from kernels.dispatch import choose_kernels
from tests.engines import engine_logits, make_engine, request, run, save_ours
from tests.models import our_config, our_model, text
from training.evaluate import as_float8

DECODERS: dict[str, dict[str, Any]] = {
    "blt": {"decoder": "blt"},
    "blt-s": {"decoder": "blt-s", "draft_length": 3},
    "blt-d": {"decoder": "blt-d", "block_size": 4, "unmask": UnmaskRule(rule="confidence", alpha=0.2)},
    "blt-dv": {"decoder": "blt-dv", "block_size": 4, "unmask": UnmaskRule(rule="entropy", gamma=4.0)},
    "sampled": {"decoder": "blt-s", "draft_length": 2, "sampling": SamplingParams(temperature=0.9, top_p=0.8, seed=3)},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = our_config(decoder_input="embedding", mask_id=260, block_size=4)
    config, tensors = our_model(replace(config, isolate_documents=True), 3)
    rule = replace(config.patching, max_patch_length=6)
    return save_ours(tmp_path_factory.mktemp("triton") / "model", (replace(config, patching=rule), tensors))


def requests(count: int, prompt: int = 20) -> list[Request]:
    """One per decoder, with prompts of different lengths."""
    return [request(name, text(prompt + 2 * i, i), count, **how) for i, (name, how) in enumerate(DECODERS.items())]


def texts(model: Path, requests: list[Request], **choices: Any) -> dict[str, list[int]]:
    return {name: output.ids for name, output in run(make_engine(model, **choices), requests).items()}


def test_triton_kernels_write_the_bytes_of_torch_kernels_with_every_decoder(model: Path) -> None:
    assert texts(model, requests(3, 2), kernels="triton") == texts(model, requests(3, 2), kernels="torch")


@pytest.mark.parametrize("name", ["blt", "blt-s", "blt-d"])
def test_triton_kernels_launched_ahead_write_the_bytes_of_torch_kernels(model: Path, name: str) -> None:
    """The host does not see the bytes that the device feeds on."""
    asked = [request(name, text(3, 1), 6 if name == "blt" else 4, **DECODERS[name])]
    engine = make_engine(model, kernels="triton", run_ahead="always")
    found = {key: output.ids for key, output in run(engine, asked).items()}
    assert found == texts(model, asked, kernels="torch")
    assert engine.snapshot().steps < engine.ledger.total.calls["decoder"]


def test_pages_that_no_kernel_is_compiled_for_are_refused(model: Path) -> None:
    with pytest.raises(ValueError, match=r"--page-size 4096: must be at most \d+ for heads of 16 in float32 on a GPU"):
        make_engine(model, kernels="triton", page_size=4096)
    make_engine(model, kernels="torch", page_size=4096, cache_bytes=1 << 28)


def test_only_tritons_kernels_are_recorded_on_a_cuda_device() -> None:
    """Torch's twins wait for the device, which a recording does not allow."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    config = EngineConfig("", device="cuda")
    triton, plain = (choose_kernels(name, cpu) for name in ("triton", "torch"))
    assert records_graphs(config, triton, cuda) and not records_graphs(config, plain, cuda)
    assert not records_graphs(config, plain, cpu) and records_graphs(replace(config, graphs=True), plain, cpu)
    assert not records_graphs(replace(config, graphs=False), triton, cuda)
    with pytest.raises(ValueError, match="--graphs: a CUDA device cannot record torch's kernels"):
        records_graphs(replace(config, graphs=True), plain, cuda)


def test_native_kernels_write_the_bytes_of_torch_kernels(model: Path) -> None:
    assert texts(model, requests(40), kernels="native") == texts(model, requests(40), kernels="torch")


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0), SamplingParams(temperature=0.9, seed=7)])
def test_exact_decoders_write_the_bytes_of_blt_in_bfloat16(model: Path, sampling: SamplingParams) -> None:
    """Rows are the same bits in any company whatever the dtype, so that near-ties of random weights decide alike."""
    ways = {name: how for name, how in DECODERS.items() if how["decoder"] in ("blt", "blt-s", "blt-dv")}
    asked = [request(name, text(20, 1), 60, **how | {"sampling": sampling}) for name, how in ways.items()]
    found = texts(model, asked, kernels="native", dtype="bfloat16")
    assert len(set(found["blt"])) > 5
    assert all(ids == found["blt"] for ids in found.values())


@pytest.mark.parametrize("page_size", [16, 64])
def test_recorded_stages_with_padded_buffers_change_no_byte(model: Path, page_size: int) -> None:
    expected = texts(model, requests(40))
    engine = make_engine(model, graphs=True, page_size=page_size)
    executor = engine.stepper.executor
    assert isinstance(executor, Graphs)
    found = {name: output.ids for name, output in run(engine, requests(40)).items()}
    assert found == expected
    recorded = executor.num_recorded
    run(engine, requests(40))
    assert executor.num_recorded == recorded, "the same shapes are recorded once"


@pytest.mark.parametrize("executor", [Eager, Graphs])
def test_the_launch_callback_runs_right_before_the_stage(executor: type[Eager]) -> None:
    said: list[str] = []

    def stage(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        said.append(f"stage {inputs['a'].tolist()} {inputs['b'].tolist()}")
        return inputs["b"]

    runs = executor(torch.device("cpu"), 1)
    for n in (1, 2):
        runs.run("s", stage, 2, {"a": np.arange(n)}, {"b": torch.ones(n)}, None, lambda: said.append("launching"))
    assert said == ["launching", "stage [0] [1.0]", "launching", "stage [0, 1] [1.0, 1.0]"]


def test_buffer_lengths_are_padded_to_few_sizes() -> None:
    lengths = {padded(n) for n in range(1, 257)}
    assert all(n <= padded(n) <= max(n * 1.5, 1) for n in range(1, 257))
    assert lengths == {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256}


def test_arrays_packed_into_one_buffer_are_unpacked_unchanged() -> None:
    arrays = {"a": np.arange(3), "b": np.zeros((0, 5), np.int64), "c": np.arange(10).reshape(2, 5)}
    for name, part in unpack(torch.from_numpy(pack(arrays)), arrays).items():
        assert torch.equal(part, torch.from_numpy(arrays[name]))


def test_float8_weights_change_logits_little_and_patches_not_at_all(model: Path) -> None:
    ids = text(60, 5)
    whole, rounded = make_engine(model), make_engine(model, weights="float8")
    expected, found = engine_logits(whole, ids, 16), engine_logits(rounded, ids, 16)
    difference = (found - expected).square().mean().sqrt() / expected.std()
    assert 0 < difference < 0.15
    asked = [request("a", ids, 4, patches_from=0)]
    first, second = run(whole, asked)["a"], run(rounded, asked)["a"]
    assert len(first.starts) > 5 and first.starts[: len(ids) // 2] == second.starts[: len(ids) // 2]
    assert first.entropies[: len(ids) - 1] == second.entropies[: len(ids) - 1]


def test_float8_weights_equal_the_rounding_used_to_measure_quality(model: Path, tmp_path: Path) -> None:
    loaded = checkpoint.load(model)
    rounded = save_ours(tmp_path / "model", (loaded.config, as_float8(dict(loaded.tensors))))
    ids = text(60, 5)
    found = engine_logits(make_engine(model, weights="float8"), ids, 16)
    torch.testing.assert_close(found, engine_logits(make_engine(rounded), ids, 16), atol=1e-4, rtol=1e-4)


def test_triton_kernels_write_the_bytes_of_torch_kernels_with_single_byte_patches(tmp_path: Path) -> None:
    """Global calls in every step, through recordings."""
    config, tensors = our_model(our_config(), 8)
    folder = save_ours(tmp_path / "model", (replace(config, patching=PatchingRule(mode="bytes")), tensors))
    one = [request("a", text(30, 1), 20)]
    assert run(make_engine(folder, graphs=True), one)["a"].ids == run(make_engine(folder), one)["a"].ids
