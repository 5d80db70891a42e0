"""A model's own continuations, the targets of its blocks: equal to full passes, one byte after another."""

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from engine.config import EOS_ID, PAD_ID, ModelConfig
from tests.models import OUR_MODELS, text
from training import model, objective
from training.continuing import greedy
from training.model import Patches

LENGTH, COUNT = 97, 8
FP32 = torch.float32


def row_of(seed: int) -> list[int]:
    return [i if i not in (PAD_ID, EOS_ID) else 100 for i in text(LENGTH + 1, seed)]


@pytest.fixture(scope="module")
def random_model() -> tuple[ModelConfig, dict[str, Tensor]]:
    return OUR_MODELS["fast-blt"]()


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return torch.tensor([row_of(3), row_of(4)])


def step_by_step(
    config: ModelConfig, weights: dict[str, Tensor], ids: Tensor, patches: Patches, start: int, count: int
) -> list[int]:
    """One text's continuation from `start` by whole passes over it and what was found; it stays in the open patch."""
    found = ids[0, :start].tolist()
    for _ in range(count):
        more = len(found) - start
        own, reads = (getattr(patches, n)[:, :start] for n in ("own", "reads"))
        # All that is found belongs to one patch, the one after the last that is read.
        held = reads[:, -1:] + 1
        count_before = int(held) + 1
        same = Patches(
            torch.cat([own, held.expand(1, more)], 1),
            torch.cat([reads, reads[:, -1:].expand(1, more)], 1),
            torch.arange(count_before)[None],  # only their number matters
            torch.tensor([count_before]),
        )
        rows = model.clean_rows(config, weights, torch.tensor([found]), same, FP32).rows
        found.append(int(model.logits(config, weights, rows, FP32)[0, -1].argmax()))
    return found[start:]


@torch.no_grad()
def test_a_continuation_equals_whole_passes(random_model: tuple[ModelConfig, dict[str, Tensor]], rows: Tensor) -> None:
    config, weights = random_model
    assert config.decoder.window is not None and config.decoder.window < LENGTH
    ids = rows[:, :-1]
    patches = model.patch(config.patching, model.entropies(config, weights, ids))
    starts = torch.tensor([[1, 2, 30, 53, LENGTH - 1], [7, 44, 45, 46, 90]])
    found = greedy(config, weights, model.clean_rows(config, weights, ids, patches, FP32), starts, COUNT, FP32)
    seen = set()
    for i in range(2):
        alone = Patches(*(getattr(patches, f.name)[i : i + 1] for f in fields(Patches)))
        for place, start in enumerate(starts[i].tolist()):
            expected = step_by_step(config, weights, ids[i : i + 1], alone, start, COUNT)
            if EOS_ID in expected:
                end = expected.index(EOS_ID) + 1
                expected[end:] = [PAD_ID] * (COUNT - end)
            assert found[i, place].tolist() == expected
            seen.add(tuple(expected))
    assert len(seen) > 5, "continuations of different places must differ"


@torch.no_grad()
def test_nothing_follows_an_end(random_model: tuple[ModelConfig, dict[str, Tensor]], rows: Tensor) -> None:
    config, weights = random_model
    ids = rows[:1, :-1]
    patches = model.patch(config.patching, model.entropies(config, weights, ids))
    clean = model.clean_rows(config, weights, ids, patches, FP32)
    first = greedy(config, weights, clean, torch.tensor([[40]]), COUNT, FP32)[0, 0].tolist()
    # Exchanges the rows of EOS and of the third byte in the head: the model then ends where it wrote that byte.
    third = first[2]
    assert EOS_ID not in first[:3]
    changed, order = dict(weights), torch.arange(config.vocab_size)
    order[[EOS_ID, third]] = order[[third, EOS_ID]]
    changed["lm_head.weight"] = weights["lm_head.weight"][order[: len(weights["lm_head.weight"])]]
    found = greedy(config, changed, clean, torch.tensor([[40]]), COUNT, FP32)[0, 0].tolist()
    place = first.index(third)
    assert found == [*first[:place], EOS_ID, *[PAD_ID] * (COUNT - place - 1)]


def test_own_blocks_start_anywhere_and_hold_what_continues(
    random_model: tuple[ModelConfig, dict[str, Tensor]], rows: Tensor
) -> None:
    config, weights = random_model
    rows = rows.clone()
    rows[0, 60:] = PAD_ID
    patches = model.patch(config.patching, model.entropies(config, weights, rows[:, :-1]))
    asked: list[Tensor] = []

    def continued(starts: Tensor) -> Tensor:
        asked.append(starts)
        return (100 + starts[..., None] % 100 + torch.arange(config.block_size or 0)).long()

    def drawn(own_share: float) -> objective.Corruption:
        draw = torch.Generator().manual_seed(2)
        return objective.corrupt(config, rows, patches, 12, draw, 1.0, own_share=own_share, continued=continued)

    plain, found = drawn(0.0), drawn(0.5)
    assert len(asked) == 1 and asked[0].equal(found.blocks.starts[:1])
    assert found.targets[0].equal(continued(found.blocks.starts[0]))
    starts = found.blocks.starts[0].tolist()
    assert len(set(starts)) == 12 and min(starts) >= 1 and max(starts) < 60
    assert not set(starts) <= set(patches.starts[0].tolist()), "some must start inside patches"
    assert found.blocks.patches[0].tolist() == [int(patches.reads[0, s - 1]) for s in starts]
    assert found.scores[0].all()
    # They stand for as many blocks as those of patches would: the term keeps its weight.
    eligible = int((patches.starts[0] < 60).sum()) - 1
    assert found.stands_for[0].tolist() == pytest.approx([eligible / 12] * 12)
    for name in ("ids", "starts", "patches"):
        assert getattr(found.blocks, name)[1].equal(getattr(plain.blocks, name)[1])
    assert found.targets[1].equal(plain.targets[1]), "the other texts' blocks are as before"


def test_a_share_of_few_texts_is_kept_on_average(
    random_model: tuple[ModelConfig, dict[str, Tensor]], rows: Tensor
) -> None:
    config, weights = random_model
    patches = model.patch(config.patching, model.entropies(config, weights, rows[:, :-1]))
    asked: list[int] = []

    def continued(starts: Tensor) -> Tensor:
        asked.append(len(starts))
        return starts[..., None].expand(*starts.shape, config.block_size or 0) + 4

    def drawn(own_share: float, draw: torch.Generator) -> None:
        objective.corrupt(config, rows, patches, 1, draw, own_share=own_share, continued=continued)

    draw = torch.Generator().manual_seed(0)
    for _ in range(400):
        drawn(0.1, draw)
    assert 60 < len(asked) < 100 and {*asked} == {1}, "a fifth of a text in each step, on average"
    asked.clear()
    for _ in range(50):
        drawn(0.75, draw)
    assert {*asked} == {1, 2}
    # Whole numbers of texts take no draw: the numbers after it are those of a run without a share.
    left = []
    for share in (0.0, 0.5, 1.0):
        draw = torch.Generator().manual_seed(1)
        drawn(share, draw)
        left.append(float(torch.rand((), generator=draw)))
    assert left[0] == left[1] == left[2]
