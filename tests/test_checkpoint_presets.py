"""Random models are reproducible and lively, and the figures of every preset are those of the published models."""

import json
from dataclasses import asdict, replace
from math import prod
from pathlib import Path

import pytest
import torch

from engine.checkpoint import (
    PRESETS,
    RandomTensors,
    calibrated,
    count_parameters,
    describe,
    expected_shapes,
    random_tensors,
    render,
    save,
)
from engine.checkpoint.describe import cache_costs
from engine.config import HashConfig
from tests import reference
from tests.models import text

# The parts of the released models (BLT-1B as measured, 8B after the paper's shapes), and Fast-BLT's totals.
RELEASED = {
    "1b": {
        "hash tables": 3_072_012_288,
        "global": 1_284_608_000,
        "decoder": 157_586_432,
        "encoder": 19_406_848,
        "head": 266_240,
        "patcher": 99_512_064,
        "total": 4_633_391_872,
    },
    "7b": {
        "hash tables": 3_840_015_360,
        "global": 6_497_239_040,
        "decoder": 182_222_080,
        "encoder": 33_761_280,
        "head": 332_800,
        "patcher": 99_512_064,
        "total": 10_653_082_624,
    },
}
KIB = 1024


@pytest.mark.parametrize("name", RELEASED)
def test_released_shapes_have_the_published_parameter_counts(name: str) -> None:
    assert count_parameters(PRESETS[name]) == RELEASED[name]
    assert sum(prod(shape) for shape in expected_shapes(PRESETS[name]).values()) == RELEASED[name]["total"]


def test_the_3b_preset_has_the_parameter_counts_fitted_to_fast_blts_tables() -> None:
    counts = count_parameters(PRESETS["3b"])
    # The table of the paper's P_dec counts the head, and its P_enc + P_glob neither hashes nor patcher; in millions.
    embedding = 261 * 1024
    assert (counts["decoder"] + counts["head"] - embedding) / 1e6 == pytest.approx(159.95, abs=0.05)
    assert (counts["encoder"] + counts["global"]) / 1e6 == pytest.approx(2844.4, abs=0.1)


@pytest.mark.parametrize(
    ("name", "kib"),
    [
        ("1b", {"patcher": 42, "encoder": 4, "decoder": 36, "global": 200, "latent": 72, "open": 6}),
        ("7b", {"patcher": 42, "encoder": 5, "decoder": 30, "global": 512, "latent": 120, "open": 7.5}),
    ],
)
def test_bytes_per_row_of_each_cache_follow_from_the_shapes(name: str, kib: dict[str, float]) -> None:
    costs = cache_costs(PRESETS[name], torch.bfloat16)
    assert {cache: cost.bytes_per_row / KIB for cache, cost in costs.items()} == kib
    assert costs["decoder"].most_bytes == 512 * kib["decoder"] * KIB
    assert costs["global"].most_bytes == 4096 * kib["global"] * KIB
    assert {cache for cache, cost in costs.items() if cost.row == "patch"} == {"global", "latent"}


def test_the_embedded_model_fits_into_24_megabytes() -> None:
    assert 2 * count_parameters(PRESETS["nano"])["total"] < 24_000_000


def test_random_tensors_depend_on_seed_and_name_alone() -> None:
    config = PRESETS["tiny"]
    first, again = random_tensors(config, 5), RandomTensors(config, 5, torch.float32)
    assert first.keys() == expected_shapes(config).keys()
    for name in reversed(first):
        assert torch.equal(first[name], again[name])
    other = random_tensors(config, 6)
    assert not any(torch.equal(first[n], other[n]) for n in first if first[n].ndim == 2)
    matrices = [tensor.flatten()[:32] for tensor in first.values() if tensor.ndim == 2]
    assert len(torch.stack(matrices).unique(dim=0)) == len(matrices)


@pytest.mark.parametrize("name", ["tiny", "nano"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_random_model_has_varied_logits_and_entropies(name: str, seed: int) -> None:
    tensors = random_tensors(PRESETS[name], seed)
    config = calibrated(PRESETS[name], tensors)
    ids = text(200, seed, specials=False)
    assert reference.forward(config, tensors, ids).std() == pytest.approx(1, abs=0.15)
    entropies = reference.entropies(config, tensors, ids)
    assert 1 < entropies.min() < 3 < entropies.max() < 5.6
    assert entropies.std() > 0.25
    assert 1.5 < len(ids) / len(reference.patch_starts(config.patching, entropies)) < 8
    assert len(set(reference.greedy(config, tensors, ids[:10], 60))) > 20


def test_calibration_reaches_a_mean_patch_of_four_under_every_rule() -> None:
    tensors = random_tensors(PRESETS["tiny"], 0)
    words = [1, *(byte + 4 for byte in b"the quick brown fox jumps over a lazy dog and runs away " * 8)]
    for changes in ({"max_patch_length": None}, {"max_patch_length": 8}, {"monotonic": True}, {"threshold_add": 0.1}):
        config = PRESETS["tiny"]
        config = calibrated(replace(config, patching=replace(config.patching, **changes)), tensors)
        starts = reference.patch_starts(config.patching, reference.entropies(config, tensors, words))
        assert 2 < len(words) / len(starts) < 8, changes


def test_describe_reports_the_contents_of_the_checkpoint(tmp_path: Path) -> None:
    config = replace(PRESETS["tiny"], hashes=HashConfig((3, 5), 1, 40))
    tensors = random_tensors(config, 0, torch.bfloat16)
    save(tmp_path, config, tensors | {"lm_head.weight": tensors["lm_head.weight"].float()})
    d = describe(tmp_path)
    total = sum(tensor.numel() for tensor in tensors.values())
    assert d.parameters["total"] == total == sum(count for part, count in d.parameters.items() if part != "total")
    assert d.dtypes == {"bfloat16": total - 260 * 32, "float32": 260 * 32}
    assert d.file_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert (d.format, d.block_size, d.stages["decoder"]) == ("fastblt", 8, config.decoder)
    assert json.loads(json.dumps(asdict(d)))["hashes"]["rows"] == 40


def test_the_rendered_description_holds_its_figures(tmp_path: Path) -> None:
    save(tmp_path, PRESETS["tiny"], random_tensors(PRESETS["tiny"], 0))
    lines = render(describe(tmp_path)).splitlines()
    assert lines[0].startswith("tiny: fastblt format, ")
    assert any(line.split() == ["total", f"{count_parameters(PRESETS['tiny'])['total']:,}"] for line in lines)
    assert any(line.split()[:6] == ["encoder", "1", "32", "4", "4", "96"] for line in lines)
    assert any("blocks of 8 (mask id 260)" in line for line in lines)
