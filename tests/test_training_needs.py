"""What `fastblt size --training` says is what a run takes: the bytes of its tensors, and of what its passes keep."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from engine import checkpoint
from engine.config import ModelConfig
from server.cli import app
from server.size import render_training
from tests.models import our_config
from tests.other_device import DEVICE, other_device
from tests.test_cli import fails, runner
from training import convert, model, needs, objective
from training.finetune import begin, train
from training.muon import Muon
from training.state import PATCHER
from training.tuning import Settings, Trained, Tuning, is_trained, on_device

ROWS, ROW_BYTES, PATCH = 2, 128, 4.0


def small(**changes: int) -> ModelConfig:
    config = our_config(window=48, kv_heads=2, encoder_layers=1)
    stacks = {name: replace(getattr(config, name), num_layers=3) for name in ("global_", "decoder")}
    return replace(config, **stacks, **changes)


@pytest.mark.parametrize("train", ["decoder", "all"])
def test_what_a_pass_keeps_is_told_without_running_it(train: Trained) -> None:
    config = convert.with_blocks(small(), "small", 8)
    told, told_recomputed = needs.kept(config, train, ROWS, ROW_BYTES, PATCH)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: (torch.randn(shape, generator=generator) * 0.1)
        .to(torch.float32 if len(shape) == 1 or is_trained(name, train) else torch.bfloat16)
        .requires_grad_(is_trained(name, train))
        for name, shape in checkpoint.expected_shapes(config).items()
    }
    row = torch.randint(4, 260, (ROWS, ROW_BYTES + 1), generator=generator)
    patches = needs.even_patches(row[:, :-1], PATCH)
    corruption = objective.corrupt(config, row, patches, ROW_BYTES * needs.BLOCKS_PER_KIB // 1024, generator)
    whole, recomputed = (
        needs.saved_bytes(config, weights, row, patches, corruption, torch.bfloat16, recompute=recompute)
        for recompute in (False, True)
    )
    assert whole == told
    # What the largest layer keeps while its gradients are computed comes on top.
    assert recomputed < 0.6 * whole and recomputed < told_recomputed < recomputed + 0.5 * whole


def test_no_tensor_is_kept_that_is_not_counted() -> None:
    """By a count of its own: of all that autograd packs, by where it lies in memory."""
    config = convert.with_blocks(small(), "small", 8)
    weights = {n: torch.full(s, 0.1).requires_grad_() for n, s in checkpoint.expected_shapes(config).items()}
    row = torch.full((ROWS, ROW_BYTES + 1), 100)
    patches = needs.even_patches(row[:, :-1], PATCH)
    corruption = objective.corrupt(config, row, patches, 4, torch.Generator().manual_seed(0))
    counted = needs.saved_bytes(config, weights, row, patches, corruption, torch.bfloat16, recompute=False)
    held: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        clean = model.clean_rows(config, weights, row[:, :-1], patches, torch.bfloat16)
        cells = model.block_rows(config, weights, clean, corruption.blocks, torch.bfloat16)
        of_rows, of_cells = (model.logits(config, weights, rows, torch.bfloat16) for rows in (clean.rows, cells))
        (of_rows.logsumexp(-1).sum() + of_cells.sum()).backward()
    own = {weight.untyped_storage().data_ptr() for weight in weights.values()}
    assert sum(s.nbytes() for place, s in held.items() if place not in own) == pytest.approx(counted, rel=0.15)


@pytest.mark.parametrize("which", ["decoder", "all"])
def test_weights_gradients_and_averages_are_those_of_a_run(which: Literal["decoder", "all"], tmp_path: Path) -> None:
    config = small()
    tensors = {n: torch.full(s, 0.1, dtype=torch.bfloat16) for n, s in checkpoint.expected_shapes(config).items()}
    checkpoint.save(tmp_path / "model", config, tensors)
    (tmp_path / "text.txt").write_text("some words and then more words\n" * 4000)
    files = (str(tmp_path / "text.txt"),)
    settings = Settings(
        str(tmp_path / "model"), files, train=which, steps=4, rows=1, row_bytes=32, held_out_bytes=64, warm_up=1
    )
    job = begin(settings, "tuned", tmp_path / "run", torch.device("cpu"))
    gradients, averages = [], []

    def watched(self: torch.optim.Optimizer, *arguments: object) -> None:
        groups = [weight for group in self.param_groups for weight in group["params"]]
        gradients[-1] += sum(weight.grad.nbytes for weight in groups if weight.grad is not None)
        state = [tensor for kept in self.state.values() for tensor in kept.values() if tensor.dim()]
        averages[-1] += sum(tensor.nbytes for tensor in state)

    with pytest.MonkeyPatch.context() as patch:
        step, muon = torch.optim.AdamW.step, Muon.step

        def adamw_step(self: torch.optim.AdamW) -> None:
            step(self)
            watched(self)

        def muon_step(self: Muon) -> None:
            gradients.append(0)
            averages.append(0)
            muon(self)
            watched(self)

        gradients.append(0)
        averages.append(0)
        patch.setattr(torch.optim.AdamW, "step", adamw_step)
        patch.setattr(Muon, "step", muon_step)
        train(job)
    told = needs.needs(config, which, 1, 32, PATCH)[0]
    assert sum(weight.nbytes for weight in job.tuning.weights.values()) == told.weights
    assert (gradients[-1], averages[-1]) == (told.gradients, told.optimizer)
    assert sum(job.tuning.weights[name].numel() for name in job.tuning.trained) == told.trained


@pytest.mark.parametrize("which", ["decoder", "all"])
def test_a_gpu_has_frozen_weights_no_wider_than_they_are_served(
    which: Literal["decoder", "all"], tmp_path: Path
) -> None:
    """Of a checkpoint in float32, as Hugging Face's conversions have their hash tables."""
    config = small()
    tensors = {n: torch.full(s, 0.1) for n, s in checkpoint.expected_shapes(config).items()}
    checkpoint.save(tmp_path / "model", config, tensors)
    source, chosen = checkpoint.load(tmp_path / "model"), Settings(str(tmp_path / "model"), (), train=which, steps=3)
    here = on_device(source, torch.device("cpu"), chosen)
    assert {weight.dtype for weight in here.values()} == {torch.float32}
    with other_device():
        there = on_device(source, DEVICE, chosen)
        table = torch.zeros(config.vocab_size + 1, config.decoder.dim, device=DEVICE)
        tuning = Tuning.new(chosen, source, "tuned", "", "", table, there, 1.0, 1.0)
        assert {there[n].dtype for n in there if n.startswith(PATCHER)} == {torch.float32}
        assert all(torch.equal(tuning.weights[n].cpu(), tensors[n]) for n in tuning.trained if n in tensors)
        exact = on_device(source, DEVICE, replace(chosen, dtype="float32"))
        assert {weight.dtype for weight in exact.values()} == {torch.float32}
    needed = printed("size", "--model", str(tmp_path / "model"), "--training", "--context", "64", "--json")
    told = next(need for need in json.loads(needed)["needs"] if need["train"] == which)
    assert sum(weight.nbytes for weight in tuning.weights.values()) == told["weights"]


def printed(*arguments: str) -> str:
    result = runner.invoke(app, [*arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_prints_a_row_for_each_choice() -> None:
    found = json.loads(printed("size", "--config", "nano", "--training", "--context", "256", "--json"))
    assert (found["model"], found["rows"], found["row_bytes"]) == ("nano", 8, 256)
    sizes = {(need["train"], need["recompute"]): need for need in found["needs"]}
    assert len(sizes) == 4
    for need in sizes.values():
        parts = ("weights", "gradients", "optimizer", "activations")
        assert need["total"] == sum(need[part] for part in parts) and all(need[part] > 0 for part in parts)
    assert sizes["decoder", True]["activations"] < sizes["decoder", False]["activations"]
    assert sizes["decoder", False]["total"] < sizes["all", False]["total"]
    text = render_training("nano", 8, 256, found["needs"])
    assert "micro-batches of 8 rows of 256 bytes" in text and "all, --recompute" in text
    assert "--context: must be from 1 to" in fails("size", "--config", "nano", "--training", "--context", "24576")
