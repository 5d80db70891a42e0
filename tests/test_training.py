"""The training objective on a random model: equal to the oracle, and blind to whatever it must not see."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import EOS_ID, PAD_ID, ModelConfig
from tests import reference
from tests.models import OUR_MODELS, text
from training import model, objective
from training.model import Blocks, Patches

LENGTH = 97  # more than the windows of 24 and 20, and no multiple of either
FP32 = torch.float32


@pytest.fixture(scope="module")
def random_model() -> tuple[ModelConfig, dict[str, Tensor]]:
    return OUR_MODELS["fast-blt"]()


@pytest.fixture(scope="module")
def row(random_model: tuple[ModelConfig, dict[str, Tensor]]) -> Tensor:
    """(1, LENGTH + 1), without EOS: a row holds one document."""
    return torch.tensor([[i if i not in (PAD_ID, EOS_ID) else 100 for i in text(LENGTH + 1, 3)]])


@pytest.fixture(scope="module")
def patches(random_model: tuple[ModelConfig, dict[str, Tensor]], row: Tensor) -> Patches:
    config, weights = random_model
    return model.patch(config.patching, model.entropies(config, weights, row[:, :-1]))


def blocks_at(config: ModelConfig, row: Tensor, patches: Patches, chosen: list[int]) -> Blocks:
    """Blocks that start with the chosen patches, every second cell masked, PAD behind the row."""
    starts = patches.starts[:, chosen]
    cells = starts[..., None] + torch.arange(config.block_size)
    ids = row.gather(1, cells.clamp(max=row.shape[1] - 1).flatten(1)).view_as(cells)
    ids = ids.masked_fill(cells >= row.shape[1], PAD_ID)
    ids[..., ::2] = config.mask_id
    return Blocks(ids, starts, torch.tensor([chosen]) - 1)


def run(
    config: ModelConfig, weights: dict[str, Tensor], ids: Tensor, patches: Patches, blocks: Blocks | None
) -> tuple[Tensor, Tensor]:
    clean = model.clean_rows(config, weights, ids, patches, FP32)
    cells = clean.rows[:, :0] if blocks is None else model.block_rows(config, weights, clean, blocks, FP32)
    return model.logits(config, weights, clean.rows, FP32), model.logits(config, weights, cells, FP32)


def losses(
    config: ModelConfig, weights: dict[str, Tensor], row: Tensor, patches: Patches, corruption: objective.Corruption
) -> tuple[Tensor, Tensor]:
    """Of next bytes and of blocks."""
    clean, found = objective.next_bytes(config, weights, row, patches, FP32)
    return found.nats, objective.block_bytes(config, weights, row, clean, corruption, FP32).nats


@pytest.mark.parametrize("changes", [{}, {"max_patch_length": 3}])
def test_patches_in_training_equal_those_in_serving(
    random_model: tuple[ModelConfig, dict[str, Tensor]], row: Tensor, changes: dict[str, int]
) -> None:
    config, weights = random_model
    rule = replace(config.patching, **changes)
    entropy = reference.entropies(config, weights, row[0, :-1].tolist())
    found = model.patch(rule, entropy[None])
    expected = reference.patch_starts(rule, entropy)
    inside = [start for start in expected if start < LENGTH]
    assert found.starts[0].tolist() == inside
    assert found.counts.tolist() == [len(inside)]
    held = [(found.own[0] == p).nonzero().flatten().tolist() for p in range(len(inside))]
    assert held == [list(range(a, b)) for a, b in zip(inside, [*inside[1:], LENGTH], strict=True)]
    last_of = [max(p for p, s in enumerate(expected) if s <= j + 1) - 1 for j in range(LENGTH)]
    assert found.reads[0].tolist() == last_of


@pytest.mark.parametrize("name", ["fast-blt", "max-patch-length"])
def test_the_training_pass_equals_the_oracle(name: str, row: Tensor) -> None:
    config, weights = OUR_MODELS[name]()
    if config.decoder_input != "embedding":
        config = replace(config, decoder_input="embedding")
        weights["model.local_decoder.embed_tokens.weight"] = weights["model.local_encoder.embed_tokens.weight"].flip(0)
    ids = row[:, :-1].repeat(2, 1)
    ids[1, 40:] = ids[1, 40:].flip(0)
    patches = model.patch(config.patching, model.entropies(config, weights, ids))
    found, _ = run(config, weights, ids, patches, None)
    for text_ids, logits in zip(ids.tolist(), found, strict=True):
        torch.testing.assert_close(logits, reference.forward(config, weights, text_ids), atol=1e-4, rtol=0)


def test_no_row_attends_to_a_later_byte_even_through_a_latent(
    random_model: tuple[ModelConfig, dict[str, Tensor]], row: Tensor, patches: Patches
) -> None:
    config, weights = random_model
    ids = row[:, :-1]
    before, _ = run(config, weights, ids, patches, None)
    changed = ids.repeat(LENGTH, 1)
    changed.fill_diagonal_(50)
    everywhere = Patches(*(getattr(patches, name).expand(LENGTH, *[-1] * (getattr(patches, name).dim() - 1))
                           for name in ("own", "reads", "starts", "counts")))  # fmt: skip
    after, _ = run(config, weights, changed, everywhere, None)
    moved = (after - before).abs().amax(-1) > 1e-5
    assert not moved.tril(-1).any(), "row b changes byte b: no row before it may move"
    assert moved.diagonal()[1:].float().mean() > 0.9


def test_a_block_attends_to_no_clean_byte_from_its_start_on(
    random_model: tuple[ModelConfig, dict[str, Tensor]], row: Tensor, patches: Patches
) -> None:
    config, weights = random_model
    for chosen in (3, 9, int(patches.counts[0]) - 1):
        blocks = blocks_at(config, row, patches, [chosen])
        start = int(blocks.starts[0, 0])
        _, before = run(config, weights, row[:, :-1], patches, blocks)
        changed = row[:, :-1].clone()
        changed[:, start:] = 50
        _, after = run(config, weights, changed, patches, blocks)
        torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
        changed = row[:, :-1].clone()
        changed[:, start - 1] = 50
        _, after = run(config, weights, changed, patches, blocks)
        assert ((after - before).abs().amax(-1) > 1e-4).all(), "the byte just before the block is seen by all its cells"


def test_a_block_after_a_text_and_one_within_it_give_the_same_logits(
    random_model: tuple[ModelConfig, dict[str, Tensor]], row: Tensor, patches: Patches
) -> None:
    config, weights = random_model
    for chosen in (1, 4, 12):
        blocks = blocks_at(config, row, patches, [chosen])
        _, within = run(config, weights, row[:, :-1], patches, blocks)
        prefix = row[:, : int(blocks.starts[0, 0])]
        short = model.patch(config.patching, model.entropies(config, weights, prefix))
        assert int(short.counts[0]) == chosen
        _, behind = run(config, weights, prefix, short, blocks)
        torch.testing.assert_close(behind, within, atol=1e-5, rtol=0)


def test_a_block_attends_to_all_of_itself_and_no_other_row_attends_to_it(
    random_model: tuple[ModelConfig, dict[str, Tensor]], row: Tensor, patches: Patches
) -> None:
    config, weights = random_model
    blocks = blocks_at(config, row, patches, [4, 5, 9])
    clean, cells = run(config, weights, row[:, :-1], patches, blocks)
    alone, _ = run(config, weights, row[:, :-1], patches, None)
    torch.testing.assert_close(clean, alone, atol=1e-5, rtol=0)
    ids = blocks.ids.clone()
    ids[0, 1, -1] = 50
    clean_after, cells_after = run(config, weights, row[:, :-1], patches, Blocks(ids, blocks.starts, blocks.patches))
    torch.testing.assert_close(clean_after, clean, atol=1e-5, rtol=0)
    torch.testing.assert_close(cells_after[0, [0, 2]], cells[0, [0, 2]], atol=1e-5, rtol=0)
    assert ((cells_after - cells)[0, 1].abs().amax(-1) > 1e-4).all(), "the last cell is seen by the first"


def test_the_clean_loss_equals_the_oracles_over_every_byte(
    random_model: tuple[ModelConfig, dict[str, Tensor]], row: Tensor, patches: Patches
) -> None:
    config, weights = random_model
    _, found = objective.next_bytes(config, weights, row, patches, FP32)
    logits = reference.forward(config, weights, row[0, :-1].tolist())
    torch.testing.assert_close(found.nats, F.cross_entropy(logits, row[0, 1:]), atol=1e-4, rtol=0)
    assert float(found.right) == pytest.approx(float((logits.argmax(-1) == row[0, 1:]).float().mean()))


def test_the_mask_loss_equals_the_papers_sum_over_all_blocks(
    random_model: tuple[ModelConfig, dict[str, Tensor]], row: Tensor, patches: Patches
) -> None:
    config, weights = random_model
    corruption = objective.corrupt(config, row, patches, 1000, torch.Generator().manual_seed(0))
    _, found = losses(config, weights, row, patches, corruption)
    blocks, total = corruption.blocks, 0.0
    assert sorted(blocks.starts[corruption.stands_for > 0].tolist()) == patches.starts[0, 1:].tolist()
    _, cells = run(config, weights, row[:, :-1], patches, blocks)
    for s, rate in enumerate(corruption.rates[0].tolist()):
        if corruption.stands_for[0, s] == 0:
            continue
        start = int(blocks.starts[0, s])
        for k in range(config.block_size or 0):
            if blocks.ids[0, s, k] == config.mask_id:
                total -= float(cells[0, s, k].log_softmax(-1)[row[0, start + k]]) / rate
    assert float(found) == pytest.approx(total / LENGTH, rel=1e-4)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_a_share_of_the_blocks_is_masked_whole(
    random_model: tuple[ModelConfig, dict[str, Tensor]], row: Tensor, patches: Patches, share: float
) -> None:
    config, _ = random_model
    starts = int(patches.counts[0]) - 1
    drawn = objective.corrupt(config, row, patches, starts, torch.Generator().manual_seed(0), full_share=share)
    whole = drawn.rates[0] == 1
    assert int(whole.sum()) == pytest.approx(share * starts, abs=1)
    assert (drawn.scores[0, whole] == (drawn.targets[0, whole] != PAD_ID)).all()
    rest = drawn.rates[0, ~whole].sort().values
    assert not len(rest) or (rest[0] < 0.2 and rest[-1] > 0.8 and rest.diff().max() < 2.5 / len(rest))


def test_sampled_blocks_are_weighted_to_stand_for_all_and_skip_padding(
    random_model: tuple[ModelConfig, dict[str, Tensor]], row: Tensor, patches: Patches
) -> None:
    config, weights = random_model
    rows = row.repeat(4, 1)
    for r, end in enumerate((LENGTH + 1, 60, 20, 2)):
        rows[r, end:] = PAD_ID
    found = model.patch(config.patching, model.entropies(config, weights, rows[:, :-1]))
    drawn = objective.corrupt(config, rows, found, 5, torch.Generator().manual_seed(1))
    texts = rows != PAD_ID
    blocks_of = [sum(texts[r, s] for s in found.starts[r, 1 : found.counts[r]].tolist()) for r in range(4)]
    assert drawn.stands_for.sum(1).tolist() == pytest.approx([float(n) for n in blocks_of])
    assert (drawn.targets[drawn.scores] != PAD_ID).all() and (drawn.blocks.ids[drawn.scores] == config.mask_id).all()
    assert ((drawn.blocks.ids == drawn.targets) | drawn.scores | (drawn.stands_for == 0)[..., None]).all()
    rates = drawn.rates.flatten().sort().values
    assert rates[0] >= objective.MIN_RATE and rates[-1] <= 1
    assert rates.diff().max() < 2 / len(rates), "rates are spread evenly"
    assert all(math.isfinite(float(loss)) for loss in losses(config, weights, rows, found, drawn))


def test_every_weight_gets_a_gradient(
    random_model: tuple[ModelConfig, dict[str, Tensor]], row: Tensor, patches: Patches
) -> None:
    config, weights = random_model
    weights = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    corruption = objective.corrupt(config, row, patches, 8, torch.Generator().manual_seed(0))
    clean, mask = losses(config, weights, row, patches, corruption)
    (clean + mask + objective.patcher_loss(config, weights, row, FP32)).backward()
    silent = [n for n, w in weights.items() if w.grad is None or not w.grad.any()]
    assert not silent
    assert weights["model.local_decoder.embed_tokens.weight"].grad[config.mask_id].any()
