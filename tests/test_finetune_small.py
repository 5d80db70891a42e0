"""Fine-tuning a small BLT of the released form, trained here: what becomes of its next byte, and how much of a block
stands."""

import json
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from engine import checkpoint
from engine.config import HashConfig, ModelConfig, PatchingRule, StackConfig
from engine.layout import DECODERS
from server.cli import app
from tests.test_cli import runner
from training.corpus import Corpus
from training.state import PATCHER, Settings, State
from training.train import train

SHAPE = ModelConfig(
    name="plain",
    vocab_size=260,
    slots=2,
    encoder=StackConfig(48, 1, 4, 4, 96, 500000.0, 4096, 128),
    global_=StackConfig(96, 1, 4, 4, 256, 500000.0, 2048),
    decoder=StackConfig(48, 4, 4, 4, 128, 500000.0, 4096, 128),
    patcher=StackConfig(32, 1, 4, 4, 96, 10000.0, 4096, 64),
    hashes=HashConfig((3,), 1, 512),
    patching=PatchingRule(),
)
"""As of released models, one layer reads bytes for patches and many write them; and no patch is too long."""


def write_lines(path: Path, texts: dict[str, bytes]) -> None:
    path.write_text("".join(json.dumps({"text": text.decode()}) + "\n" for text in texts.values()))


def trained_plain(folder: Path, texts: dict[str, bytes], steps: int) -> dict[str, Tensor]:
    """Trains a BLT whose decoder reads the encoder's states, by the next byte alone, and saves it in Hugging Face's
    layout."""
    settings = Settings(steps=steps, bf16=False, lengths=((0.0, 256),), batch_bytes=4096)
    state = State.new(settings, SHAPE)
    train(state, Corpus(tuple(texts), tuple(texts.values())), folder / "plain.run")
    weights = {name: weight.detach() for name, weight in state.weights.items()}
    checkpoint.save(folder / "plain", state.config, weights)
    written = json.loads((folder / "plain" / "config.json").read_text())
    del written["fastblt"]
    (folder / "plain" / "config.json").write_text(json.dumps(written))
    return weights


@pytest.mark.slow
def test_a_small_released_blt_gets_blocks_that_stand_and_keeps_its_next_byte(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    encodings = Path(sysconfig.get_path("stdlib"), "encodings")
    texts = {path.name: path.read_bytes() for path in sorted(encodings.glob("*.py"))}
    held_out = dict(list(texts.items())[::10])
    learnt = {name: text for name, text in texts.items() if name not in held_out}
    write_lines(tmp_path / "learnt.jsonl", learnt)
    write_lines(tmp_path / "held_out.jsonl", held_out)
    before = trained_plain(tmp_path, learnt, steps=240)
    assert checkpoint.load(tmp_path / "plain").format == "hf"

    arguments = ["--model", tmp_path / "plain", "--out", tmp_path / "tuned", "--held-out", tmp_path / "held_out.jsonl"]
    arguments += ["--steps", 500, "--rows", 16, "--row-bytes", 256, "--dtype", "float32", "--learning-rate", 0.02]
    arguments += ["--mask-weight", 0.1, "--held-out-bytes", 60000, "--prompts", 5, tmp_path / "learnt.jsonl"]
    result = runner.invoke(app, ["finetune", *map(str, arguments)])
    assert result.exit_code == 0, result.output

    saved = checkpoint.load(tmp_path / "tuned")
    assert all(saved.tensors[name].equal(weight) for name, weight in before.items() if name.startswith(PATCHER))
    card = (tmp_path / "tuned" / "README.md").read_text()
    bits = [float(cell) for cell in card.split("| next byte, bits |")[1].split("|")[:2]]
    measured: list[dict[str, Any]] = json.loads((tmp_path / "tuned" / DECODERS).read_text())["rows"]
    rows = {row["name"]: row for row in measured}
    stands = rows["BLT-DV-4 one step"]["real_acceptance"]
    record_property(
        "figure", f"next byte: {bits[0]} bits before, {bits[1]} after; one-step BLT-DV-4: {stands:.1%} stand"
    )
    assert bits[1] < 1.02 * bits[0], bits
    assert stands >= 0.3
