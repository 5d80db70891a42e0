"""Folders that are no whole BLT: one line says what they are, and what is read instead."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.checkpoint import PRESETS, CheckpointError, load, random_tensors, save
from engine.foreign import READ_INSTEAD
from tests.test_checkpoint_formats import ENTROPY_ARGS, META_CONFIG, write_meta
from tests.test_cli import fails


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"model_type": "bolmo", "architectures": ["BolmoForCausalLM"]}, "Bolmo, another kind of byte model"),
        ({"model_type": "evabyte"}, "EvaByte, another kind of byte model"),
        ({"model_type": "t5", "vocab_size": 384}, "ByT5, another kind of byte model"),
        ({"model_type": "t5", "vocab_size": 32128}, "a model of the kind 't5'"),
        ({"arch_layout": ["m4", ["T22"], "m4"], "d_model": [1024, 1536]}, "H-Net, another kind of byte model"),
        ({"model_type": "llama"}, "a model of the kind 'llama'"),
        ({"model_type": 3}, "a model of no known kind: it has no model_type"),
    ],
)
def test_a_foreign_model_is_refused_by_name(config: dict[str, Any], what: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert refusal(tmp_path) == f"{tmp_path / 'config.json'}: this is {what}. {READ_INSTEAD}"


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["model-Q4_K_M.gguf", "README.md"], "a model in the GGUF format (model-Q4_K_M.gguf), which is llama.cpp's"),
        (["adapter_config.json", "adapter_model.safetensors"], "a PEFT adapter (adapter_config.json)"),
        (["hnet_1stage_L.pt"], "H-Net, another kind of byte model"),
        ([".metadata", "__0_0.distcp", "train_state_00000.json"], "in pieces (.distcp)"),
        (["abc.incomplete"], "an unfinished download (abc.incomplete)"),
        ([], "there is no config.json or params.json"),
    ],
)
def test_a_foreign_folder_without_a_config_is_refused_by_name(names: list[str], what: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    message = refusal(tmp_path)
    assert what in message and READ_INSTEAD in message


def blt_of_transformers(folder: Path) -> None:
    save(folder, PRESETS["tiny"], random_tensors(PRESETS["tiny"], 0, torch.bfloat16))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("pytorch_model.bin", "a model with pickled weights (pytorch_model.bin)"),
        ("adapter_config.json", "a PEFT adapter"),
        ("tiny.gguf", "in the GGUF format"),
    ],
)
def test_a_blt_with_weights_in_another_format_is_refused(name: str, what: str, tmp_path: Path) -> None:
    blt_of_transformers(tmp_path)
    (tmp_path / name).touch()
    message = refusal(tmp_path)
    assert "model.safetensors: no such file. This is" in message and what in message


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 9266854224\n"


@pytest.mark.parametrize("hub", [True, False])
def test_a_git_lfs_pointer_is_refused_as_weights(hub: bool, tmp_path: Path) -> None:
    write_meta(tmp_path / "m", random_tensors(META_CONFIG, 0), hub=hub, beside=False)
    (tmp_path / "m" / ("model.safetensors" if hub else "consolidated.pth")).write_text(LFS)
    assert "a Git LFS pointer, not the weights: run `git lfs pull`" in refusal(tmp_path / "m")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_broken_link_is_reported(name: str, tmp_path: Path) -> None:
    save(tmp_path, PRESETS["tiny"], random_tensors(PRESETS["tiny"], 0))
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("../../blobs/0123")
    assert f"{name}: a broken link, perhaps from an unfinished download" in refusal(tmp_path)


# Meta's folders


def write_trained(folder: Path) -> None:
    write_meta(folder, random_tensors(META_CONFIG, 0), hub=False, beside=False)


def dump(folder: Path) -> None:
    """As the training leaves it: pieces, and below them the whole."""
    write_trained(folder)
    (folder / "consolidated").mkdir()
    (folder / "consolidated.pth").rename(folder / "consolidated" / "consolidated.pth")
    (folder / "__0_0.distcp").touch()


def unfinished(folder: Path) -> None:
    write_trained(folder)
    (folder / "consolidated.pth").unlink()
    (folder / "__0_0.distcp").touch()


def only_configured(folder: Path) -> None:
    write_trained(folder)
    (folder / "consolidated.pth").unlink()


def several(folder: Path) -> None:
    write_trained(folder / "blt_1b")
    write_trained(folder / "blt_7b")
    (folder / "entropy_model").mkdir()
    (folder / "entropy_model" / "params.json").write_text("{}")


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (dump, "The weights are in {folder}/consolidated: name that folder"),
        (unfinished, "consolidated.pth: no such file, nor model.safetensors. This is a checkpoint of Meta's training"),
        (only_configured, "consolidated.pth: no such file, nor model.safetensors"),
        (several, "this folder is not a model, but contains some. Name one of them: {folder}/blt_1b, {folder}/blt_7b"),
    ],
)
def test_errors_about_nested_or_incomplete_meta_folders_say_where_to_look(
    make: Callable[[Path], None], what: str, tmp_path: Path
) -> None:
    folder = tmp_path / "blt"
    make(folder)
    assert what.format(folder=folder) in refusal(folder)


@pytest.mark.parametrize("form", ["hub", "trained", "in a config"])
def test_a_patcher_alone_is_refused_as_a_model(form: str, tmp_path: Path) -> None:
    if form == "hub":
        (tmp_path / "config.json").write_text(json.dumps({"args": ENTROPY_ARGS}))
    else:
        training = {"model": None if form == "trained" else {}, "entropy_model": ENTROPY_ARGS}
        (tmp_path / "params.json").write_text(json.dumps(training))
    save_file({"output.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert "this is a BLT's patcher (entropy model) alone. Name the model itself; --patcher takes" in refusal(tmp_path)


def test_a_model_whose_params_mention_its_entropy_model_is_loaded(tmp_path: Path) -> None:
    write_trained(tmp_path / "m")
    params = json.loads((tmp_path / "m" / "params.json").read_text())
    (tmp_path / "m" / "params.json").write_text(json.dumps(params | {"entropy_model": ENTROPY_ARGS}))
    assert load(tmp_path / "m").config == replace(META_CONFIG, name="m")


def test_every_command_refuses_a_foreign_model_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").touch()
    for command in (["inspect"], ["size", "--model"], ["generate", "--prompt=a", "--model"], ["serve", "--model"]):
        assert "this is a model in the GGUF format (x.gguf)" in fails(*command, tmp_path)
