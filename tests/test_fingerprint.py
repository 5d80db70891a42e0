"""The fingerprint of a model: of what decides its texts, and of nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.checkpoint import PRESETS, calibrated, fingerprint, load, random_tensors, save
from engine.installed import installed
from tests.engines import make_engine

TINY = PRESETS["tiny"]


def test_a_model_has_one_fingerprint_wherever_it_lies(tmp_path: Path) -> None:
    tensors = random_tensors(TINY, seed=1)
    for name in ("one", "two"):
        save(tmp_path / name, replace(TINY, name=name), tensors)
    assert fingerprint(load(tmp_path / "one")) == fingerprint(load(tmp_path / "two"))


def test_other_weights_and_settings_have_another_fingerprint(tmp_path: Path) -> None:
    tensors = dict(random_tensors(TINY, seed=1))
    save(tmp_path / "one", TINY, tensors)
    one = load(tmp_path / "one")
    found = {fingerprint(one), fingerprint(one, "float32"), fingerprint(one, "bfloat16")}
    found.add(fingerprint(replace(one, config=replace(one.config, isolate_documents=True))))
    # Trained by one step more: most numbers of one matrix are slightly different.
    name = max(tensors, key=lambda name: tensors[name].numel())
    save(tmp_path / "two", TINY, tensors | {name: tensors[name] * (1 + 1e-4 * torch.rand(tensors[name].shape))})
    found.add(fingerprint(load(tmp_path / "two")))
    assert len(found) == 5


def test_an_engine_on_another_kind_of_processor_has_another_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = random_tensors(TINY, seed=1)
    save(tmp_path / "one", calibrated(TINY, tensors), tensors)
    found = [make_engine(tmp_path / "one").limits.fingerprint for _ in range(2)]
    monkeypatch.setattr("engine.build.installed", lambda: replace(installed(), instruction_set="another"))
    found.append(make_engine(tmp_path / "one").limits.fingerprint)
    assert found[0] == found[1] != found[2]
