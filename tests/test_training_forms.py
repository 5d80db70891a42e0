"""The training pass gives the engine's logits for a model of any form that the engine serves."""

from pathlib import Path

import pytest
import torch

from engine import checkpoint
from tests.engines import engine_logits, make_engine, save_ours
from tests.models import HF_MODELS, OUR_MODELS, text
from training import model
from training.model import Blocks

LENGTH = 200  # more than any window of these models but the widest
TOLERANCE = 1e-4


def saved(name: str, folder: Path) -> Path:
    if name not in HF_MODELS:
        return save_ours(folder / "model", OUR_MODELS[name]())
    HF_MODELS[name]().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [*HF_MODELS, *OUR_MODELS])
def test_training_logits_equal_the_engines(name: str, tmp_path: Path) -> None:
    folder = saved(name, tmp_path)
    loaded = checkpoint.load(folder)
    ids = text(LENGTH, 17, specials=False)
    row = torch.tensor([ids, [*ids[:1], *ids[:0:-1]]])
    with torch.no_grad():
        patches = model.patch(loaded.config.patching, model.entropies(loaded.config, loaded.tensors, row))
        clean = model.clean_rows(loaded.config, loaded.tensors, row, patches, torch.float32)
        found = model.logits(loaded.config, loaded.tensors, clean.rows, torch.float32)
    engine = make_engine(folder)
    for line, logits in zip(row.tolist(), found, strict=True):
        torch.testing.assert_close(logits, engine_logits(engine, line, 64), atol=TOLERANCE, rtol=0)


def test_layers_that_are_recomputed_give_the_same_gradients() -> None:
    config, tensors = OUR_MODELS["fast-blt"]()
    row = torch.tensor([text(60, 5, specials=False)])
    patches = model.patch(config.patching, model.entropies(config, tensors, row))
    blocks = Blocks(torch.full((1, 2, 4), 100), torch.tensor([[20, 33]]), torch.tensor([[2, 3]]))
    gradients = []
    for recompute in (False, True):
        weights = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        clean = model.clean_rows(config, weights, row, patches, torch.float32, recompute=recompute)
        cells = model.block_rows(config, weights, clean, blocks, torch.float32, recompute=recompute)
        for rows in (clean.rows, cells):
            model.logits(config, weights, rows, torch.float32).logsumexp(-1).sum().backward(retain_graph=True)
        gradients.append({name: weight.grad for name, weight in weights.items()})
    kept, again = gradients
    assert any(gradient is not None and bool(gradient.any()) for gradient in kept.values())
    for name, gradient in kept.items():
        assert (gradient is None) == (again[name] is None)
        if gradient is not None:
            torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-6)
