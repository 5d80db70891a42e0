"""Checkpoints of every format come in with the right meaning and the right numbers, and go out whole."""

import json
import os
import re
import struct
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BltConfig, BltForCausalLM

from engine.checkpoint import (
    PRESETS,
    CheckpointError,
    RandomTensors,
    describe,
    expected_shapes,
    load,
    random_tensors,
    read_config,
    save,
)
from engine.checkpoint.files import open_torch
from engine.checkpoint.hf_config import render
from engine.config import HashConfig, ModelConfig, PatchingRule, StackConfig
from engine.layout import WEIGHTS
from tests import reference
from tests.models import HF_MODELS, hf_logits, text

FUSED = "model.encoder_hash_tok_embedding.weight"
IDS = text(60, 5)


def assert_same_tensors(given: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert given.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(given[name], tensor), name


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


# Hugging Face's


@pytest.mark.parametrize("name", HF_MODELS)
def test_a_model_saved_by_transformers_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    model = HF_MODELS[name]()
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.format == "hf"
    assert {n: tuple(t.shape) for n, t in loaded.tensors.items()} == expected_shapes(loaded.config)
    ours = reference.forward(loaded.config, loaded.tensors, IDS)
    torch.testing.assert_close(ours, hf_logits(model, IDS), atol=1e-4, rtol=0)


def test_a_sharded_checkpoint_loads_like_one_file(tmp_path: Path) -> None:
    model = HF_MODELS["k2"]()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="50kB")
    many = load(tmp_path / "many")
    assert len(many.files) > 3
    assert_same_tensors(many.tensors, load(tmp_path / "one").tensors)


def test_missing_config_keys_take_the_defaults_of_transformers(tmp_path: Path) -> None:
    BltConfig().save_pretrained(tmp_path / "full")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "blt"}')
    assert replace(read_config(tmp_path / "bare"), name="full") == read_config(tmp_path / "full")
    assert read_config(tmp_path / "bare").encoder.ffn_dim == 2730


def test_the_released_config_with_its_old_keys_is_the_1b_preset(tmp_path: Path) -> None:
    def stack(hidden: int, layers: int, heads: int, ffn: int, positions: int, theta: int) -> dict[str, object]:
        return {
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": None,
            "intermediate_size": ffn,
            "max_position_embeddings": positions,
            "norm_eps": 0.00001,
            "dropout": 0,
            "rope_theta": theta,
        }

    local = {"cross_attn_k": 2, "hidden_size_global": 2048, "rope_scaling": {"rope_type": "default"}}
    config = {
        "model_type": "blt",
        "patch_size": 4.5,
        "patching_threshold_add": None,
        "monotonicity": False,
        "cross_attn_k": 2,
        "encoder_config": stack(1024, 1, 16, 2816, 24576, 500000) | local | {"cross_attn_all_layers": False},
        "decoder_config": stack(1024, 9, 16, 2816, 24576, 500000) | local | {"cross_attn_all_layers": True},
        "global_config": stack(2048, 25, 16, 5632, 4096, 500000),
        "patcher_config": stack(768, 14, 12, 2048, 8192, 10000) | {"attn_impl": "xformers"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert replace(read_config(tmp_path), name="1b") == PRESETS["1b"]


def test_old_and_new_config_keys_give_the_same_config(tmp_path: Path) -> None:
    HF_MODELS["k2"]().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["patcher_config"] |= {"rms_norm_eps": 1e-4, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    new = read_config(tmp_path)
    for key in ("rms_norm_eps", "rope_parameters"):
        del config["patcher_config"][key]
    config["patcher_config"] |= {"norm_eps": 1e-4, "rope_theta": 7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path) == new
    assert (new.patcher.norm_eps, new.patcher.rope_theta) == (1e-4, 7.0)


@pytest.mark.parametrize("beside", [{}, {"rope_theta": 5.0}])
@pytest.mark.parametrize("parameters", [None, {"rope_type": "default", "rope_theta": 7.0}])
@pytest.mark.parametrize("scaling", [None, {"rope_type": "default"}, {"rope_type": "default", "rope_theta": 9.0}])
def test_the_base_of_rotary_positions_is_found_where_transformers_finds_it(
    scaling: dict[str, Any] | None, parameters: dict[str, Any] | None, beside: dict[str, Any], tmp_path: Path
) -> None:
    HF_MODELS["k2"]().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("rope_parameters", "rope_theta", "rope_scaling"):
        config["patcher_config"].pop(key, None)
    given = {"rope_scaling": scaling, "rope_parameters": parameters} | beside
    config["patcher_config"] |= {key: value for key, value in given.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = BltConfig.from_pretrained(tmp_path).patcher_config.rope_parameters["rope_theta"]
    assert read_config(tmp_path).patcher.rope_theta == theirs


def test_a_fused_hash_table_may_have_another_dtype(tmp_path: Path) -> None:
    HF_MODELS["k2"]().save_pretrained(tmp_path)
    tensors = {n: t if n == FUSED else t.bfloat16() for n, t in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    loaded = load(tmp_path).tensors
    assert loaded["model.encoder_hash_tok_embedding.3.weight"].dtype == torch.float32
    assert loaded["lm_head.weight"].dtype == torch.bfloat16


# Ours


FULL_CONFIG = ModelConfig(
    name="a model",
    vocab_size=260,
    slots=3,
    encoder=StackConfig(32, 2, 4, 4, 48, 1000.0, 512, 40, 1e-6),
    global_=StackConfig(64, 2, 8, 2, 80, 2000.0, 256, None, 1e-4),
    decoder=StackConfig(32, 3, 2, 2, 56, 3000.0, 640, 40, 1e-3),
    patcher=StackConfig(16, 1, 2, 1, 24, 4000.0, 768, 12, 1e-2),
    hashes=HashConfig((2, 9), 3, 17),
    patching=PatchingRule(threshold=1.25, threshold_add=0.5, max_patch_length=6),
    decoder_input="embedding",
    decoder_cross_all_layers=False,
    encoder_refine=True,
    isolate_documents=True,
    mask_id=260,
    block_size=4,
)


@pytest.mark.parametrize(
    "config",
    [
        FULL_CONFIG,
        PRESETS["tiny"],
        replace(
            FULL_CONFIG, patching=PatchingRule(monotonic=True), mask_id=None, block_size=None, encoder_refine=False
        ),
        replace(
            PRESETS["tiny"], patching=PatchingRule(mode="bytes"), decoder_input="encoder", mask_id=None, block_size=None
        ),
    ],
    ids=["everything set", "tiny", "monotonic", "bytes"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_checkpoint_is_loaded_unchanged(config: ModelConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = random_tensors(config, 3, dtype)
    save(tmp_path, config, tensors)
    loaded = load(tmp_path)
    assert (loaded.config, loaded.format) == (config, "fastblt")
    assert_same_tensors(loaded.tensors, tensors)
    assert read_config(tmp_path) == config


def test_saving_converts_every_tensor_to_the_dtype_asked_for(tmp_path: Path) -> None:
    tensors = random_tensors(PRESETS["tiny"], 0, torch.float32)
    save(tmp_path, PRESETS["tiny"], tensors, torch.bfloat16)
    assert_same_tensors(load(tmp_path).tensors, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_transformers_loads_our_checkpoints_with_the_same_logits(tmp_path: Path) -> None:
    config = replace(
        PRESETS["tiny"], decoder_input="encoder", mask_id=None, block_size=None, patching=PatchingRule(threshold=4)
    )
    tensors = random_tensors(config, 1)
    save(tmp_path, config, tensors)
    model, report = BltForCausalLM.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(hf_logits(model, IDS), reference.forward(config, tensors, IDS), atol=1e-4, rtol=0)


def test_a_checkpoint_may_be_saved_over_the_files_it_is_mapped_from(tmp_path: Path) -> None:
    save(tmp_path, PRESETS["tiny"], random_tensors(PRESETS["tiny"], 0))
    loaded = load(tmp_path)
    save(tmp_path, loaded.config, loaded.tensors, torch.bfloat16)
    assert torch.equal(load(tmp_path).tensors["lm_head.weight"], loaded.tensors["lm_head.weight"].bfloat16())


def test_large_models_are_written_in_shards_and_smaller_ones_replace_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = random_tensors(PRESETS["tiny"], 0)
    monkeypatch.setattr("engine.checkpoint.hf.SHARD_BYTES", 100_000)
    save(tmp_path, PRESETS["tiny"], tensors)
    loaded = load(tmp_path)
    assert len(loaded.files) > 3
    assert_same_tensors(loaded.tensors, tensors)
    monkeypatch.undo()
    save(tmp_path, PRESETS["tiny"], tensors)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", WEIGHTS}
    assert (tmp_path / WEIGHTS).stat().st_mode & 0o444 == 0o444
    assert_same_tensors(load(tmp_path).tensors, tensors)


def write_sparse(folder: Path, shapes: Mapping[str, Sequence[int]], dtype: str) -> None:
    """A file of zeros that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * (4 if dtype == "F32" else 2)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)


def test_loading_maps_the_file_and_reads_no_page_of_it(tmp_path: Path) -> None:
    """A sparse file of 4 GiB stands in for a large model: reading it would show as resident memory."""
    config = replace(PRESETS["tiny"], hashes=HashConfig((3, 4), 1, 1 << 24))
    shapes = {name: s for name, s in expected_shapes(config).items() if "hash" not in name} | {FUSED: (2 << 24, 32)}
    write_sparse(tmp_path, shapes, "F32")
    (tmp_path / "config.json").write_text(json.dumps(render(config, "float32")))

    before = resident_bytes()
    tensors = load(tmp_path).tensors
    assert resident_bytes() - before < 64 << 20
    assert (tmp_path / WEIGHTS).stat().st_size > 4 << 30
    tables = [tensors[f"model.encoder_hash_tok_embedding.{t}.weight"] for t in range(2)]
    assert tables[1].data_ptr() - tables[0].data_ptr() == tables[0].nbytes
    assert tables[1][-1].sum() == 0


def test_saving_holds_one_shard_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, alive, most = PRESETS["tiny"], weakref.WeakSet[torch.Tensor](), 0

    class Watched(RandomTensors):
        def __getitem__(self, name: str) -> torch.Tensor:
            nonlocal most
            tensor = super().__getitem__(name)
            alive.add(tensor)
            most = max(most, sum(t.nbytes for t in alive))
            return tensor

    monkeypatch.setattr("engine.checkpoint.hf.SHARD_BYTES", 100_000)
    save(tmp_path, config, Watched(config, 0, torch.float32))
    assert most < 300_000 < sum(t.nbytes for t in load(tmp_path).tensors.values())


# Meta's


def meta_name(name: str) -> str:
    """Their names, after their sources."""
    for ours, theirs in {
        "model.": "",
        "patcher.": "",
        "self_attn": "attention",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "embed_tokens": "tok_embeddings",
        "q_norm": "cross_attn_norm_q",
        "k_norm": "cross_attn_norm_kv",
        "lm_head": "output" if "patcher" in name else "local_decoder.output",
    }.items():
        name = name.replace(ours, theirs)
    return re.sub(r"\b([qkvo])_proj", r"w\1", name)


META_CONFIG = ModelConfig(
    name="blt_1b",
    vocab_size=260,
    slots=2,
    encoder=StackConfig(32, 2, 4, 4, 96, 500000.0, 2048, 24),
    global_=StackConfig(96, 2, 4, 2, 256, 500000.0, 512),
    decoder=StackConfig(32, 2, 4, 4, 96, 500000.0, 2048, 24),
    patcher=StackConfig(32, 2, 4, 4, 96, 10000.0, 1024, 512),
    hashes=HashConfig((3, 4), 2, 101),
    patching=PatchingRule(threshold=1.3, threshold_add=0.2, max_patch_length=9),
    encoder_refine=True,
    isolate_documents=True,
)
META_ARGS = {
    "vocab_size": 260,
    "pm_size": 0,
    "dim_global": 96,
    "dim_local_encoder": 32,
    "dim_local_decoder": 32,
    "n_layers_global": 2,
    "n_layers_local_encoder": 2,
    "n_layers_local_decoder": 2,
    "n_heads_global": 4,
    "n_heads_local_encoder": 4,
    "n_heads_local_decoder": 4,
    "n_kv_heads": None,
    "n_kv_heads_global": 2,
    "multiple_of": 32,
    "rope_theta": 500000.0,
    "max_seqlen": 512,
    "max_encoder_seq_length": 2048,
    "local_attention_window_len": 24,
    "cross_attn_k": 2,
    "cross_attn_nheads": 4,
    "cross_attn_all_layers_encoder": True,
    "cross_attn_all_layers_decoder": True,
    "cross_attn_encoder": True,
    "cross_attn_decoder": True,
    "cross_attn_init_by_pooling": True,
    "use_local_encoder_transformer": True,
    "downsampling_by_pooling": "max",
    "encoder_hash_byte_group_size": "3,4",
    "encoder_hash_byte_group_vocab": 101,
    "encoder_hash_byte_group_nb_functions": 2,
    "attn_bias_type": "block_causal",
}
PATCHER_ARGS = {"patching_mode": "entropy", "threshold": 1.3, "threshold_add": 0.2, "max_patch_length": 9}
ENTROPY_ARGS = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "max_seqlen": 1024,
    "ffn_dim_multiplier": 1.0,
    "multiple_of": 32,
    "vocab_size": 260,
    "sliding_window": 17,
}


def write_meta(folder: Path, tensors: dict[str, torch.Tensor], *, hub: bool, beside: bool) -> None:
    """As on the hub (config.json, safetensors), or as trained (params.json, consolidated.pth)."""
    main = {meta_name(n): t for n, t in tensors.items() if "patcher" not in n}
    patcher = {meta_name(n): t for n, t in tensors.items() if "patcher" in n}
    entropy = (folder.parent if beside else folder) / "entropy_model"
    folder.mkdir(parents=True)
    entropy.mkdir()
    training = {"data": {"patcher_args": PATCHER_ARGS}}
    if hub:
        (folder / "config.json").write_text(json.dumps({"args": META_ARGS}))
        (folder / "train_args.json").write_text(json.dumps(training))
        save_file(main, folder / WEIGHTS)
    else:
        (folder / "params.json").write_text(json.dumps({"model": META_ARGS} | training))
        torch.save({"model": main | {"local_encoder.rope.freqs_cis": torch.ones(4)}}, folder / "consolidated.pth")
    (entropy / "params.json").write_text(json.dumps({"entropy_model": ENTROPY_ARGS, "data": {"patcher_args": {}}}))
    torch.save(patcher | {"rope.freqs_cis": torch.ones(4)}, entropy / "consolidated.pth")


@pytest.mark.parametrize("hub", [True, False], ids=["as on the hub", "as trained"])
@pytest.mark.parametrize("beside", [True, False], ids=["patcher beside", "patcher inside"])
def test_a_checkpoint_in_metas_layout_is_loaded(hub: bool, beside: bool, tmp_path: Path) -> None:
    tensors = random_tensors(META_CONFIG, 0, torch.bfloat16)
    write_meta(tmp_path / "blt_1b", tensors, hub=hub, beside=beside)
    loaded = load(tmp_path / "blt_1b")
    assert (loaded.config, loaded.format) == (META_CONFIG, "meta")
    assert_same_tensors(loaded.tensors, tensors)


def test_a_pth_file_may_hold_views_and_parameters(tmp_path: Path) -> None:
    """Kernels read numbers where they lie, one after the other."""
    tensors = random_tensors(META_CONFIG, 0)
    views = {name: t.t().contiguous().t() if t.dim() == 2 else torch._neg_view(-t) for name, t in tensors.items()}
    write_meta(tmp_path / "m", {name: torch.nn.Parameter(t) for name, t in views.items()}, hub=False, beside=False)
    loaded = load(tmp_path / "m").tensors
    assert_same_tensors(loaded, tensors)
    assert all(t.is_contiguous() and not t.is_neg() and not t.requires_grad for t in loaded.values())


def test_feed_forward_widths_of_meta_checkpoints_are_the_released_ones(tmp_path: Path) -> None:
    write_meta(tmp_path / "m", random_tensors(META_CONFIG, 0), hub=True, beside=False)
    wide = {"dim_local_encoder": 1024, "dim_local_decoder": 1024, "dim_global": 4096, "multiple_of": 256}
    (tmp_path / "m" / "config.json").write_text(json.dumps({"args": META_ARGS | wide}))
    config = read_config(tmp_path / "m")
    assert (config.encoder.ffn_dim, config.global_.ffn_dim) == (2816, 11008)


def test_patching_missing_in_metas_training_arguments_is_taken_from_the_models(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    write_meta(folder, random_tensors(META_CONFIG, 0), hub=True, beside=False)
    (folder / "train_args.json").unlink()
    # The entropy model's own training has no patches, and says nothing about ours.
    params = {"entropy_model": ENTROPY_ARGS, "data": {"patcher_args": {"patching_mode": "byte", "threshold": 0.1}}}
    (folder / "entropy_model" / "params.json").write_text(json.dumps(params))
    found = load(folder)
    assert found.config.patching == PatchingRule()
    assert [str(folder / "train_args.json") in note and "1.335" in note for note in found.notes] == [True]

    said = {
        "patching_threshold": 1.574,
        "patching_threshold_add": 0.1,
        "max_patch_length": 7,
        "patching_mode": "entropy",
    }
    (folder / "config.json").write_text(json.dumps({"args": META_ARGS | said}))
    found = load(folder)
    assert found.config.patching == PatchingRule(threshold=1.574, threshold_add=0.1, max_patch_length=7)
    assert not found.notes

    (folder / "train_args.json").write_text(json.dumps({"data": {"patcher_args": {"threshold": 1.25}}}))
    found = load(folder)
    assert found.config.patching == PatchingRule(threshold=1.25, threshold_add=0.1, max_patch_length=7)
    assert [note for note in found.notes if "threshold = 1.25 is used" in note and "not 1.574" in note] == list(
        found.notes
    )

    said = {"patching_mode": "byte", "monotonicity": True, "patching_threshold": 2}
    (folder / "train_args.json").unlink()
    (folder / "config.json").write_text(json.dumps({"args": META_ARGS | said}))
    assert read_config(folder).patching == PatchingRule(mode="bytes", monotonic=True, threshold=2.0)


@pytest.mark.parametrize("bias", ["block_causal", "causal", None, "absent"])
def test_metas_global_stage_isolates_documents_only_with_a_block_causal_mask(bias: str | None, tmp_path: Path) -> None:
    write_meta(tmp_path / "m", random_tensors(META_CONFIG, 0), hub=True, beside=False)
    args = META_ARGS | {"attn_bias_type": bias}
    if bias == "absent":
        del args["attn_bias_type"]
    (tmp_path / "m" / "config.json").write_text(json.dumps({"args": args}))
    config = read_config(tmp_path / "m")
    assert (config.isolate_documents, config.isolate_global) == (True, bias == "block_causal")


def test_the_patcher_may_lie_in_any_folder_and_in_either_format(tmp_path: Path) -> None:
    tensors = random_tensors(META_CONFIG, 0, torch.bfloat16)
    write_meta(tmp_path / "blt_1b", tensors, hub=True, beside=False)
    apart = (tmp_path / "blt_1b" / "entropy_model").rename(tmp_path / "apart")
    with pytest.raises(CheckpointError, match="--patcher FOLDER names another place"):
        load(tmp_path / "blt_1b")
    assert_same_tensors(load(tmp_path / "blt_1b", patcher=apart).tensors, tensors)
    # As facebook/blt-entropy.
    patcher = {meta_name(n): t for n, t in tensors.items() if "patcher" in n}
    hub = tmp_path / "blt-entropy"
    hub.mkdir()
    (hub / "config.json").write_text(json.dumps({"args": ENTROPY_ARGS}))
    save_file(patcher, hub / WEIGHTS)
    loaded = load(tmp_path / "blt_1b", patcher=hub)
    assert loaded.config == META_CONFIG
    assert_same_tensors(loaded.tensors, tensors)
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        load(tmp_path / "blt_1b", patcher=tmp_path / "nowhere")
    save(tmp_path / "ours", PRESETS["tiny"], random_tensors(PRESETS["tiny"], 0))
    with pytest.raises(CheckpointError, match="contains its own"):
        load(tmp_path / "ours", patcher=hub)


# Whatever the format


def test_a_given_patching_threshold_overrides_the_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, PRESETS["tiny"], random_tensors(PRESETS["tiny"], 0))
    tiny = PRESETS["tiny"].patching
    assert load(tmp_path, patching_threshold=-0.5).config.patching == replace(tiny, threshold=-0.5)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(CheckpointError, match=f"patching_threshold {bad}: must be a finite number of nats"):
            load(tmp_path, patching_threshold=bad)
    every_byte = replace(PRESETS["tiny"], patching=PatchingRule(mode="bytes"))
    save(tmp_path, every_byte, random_tensors(every_byte, 0))
    with pytest.raises(CheckpointError, match=r"patching_threshold 1\.5: tiny has no threshold"):
        load(tmp_path, patching_threshold=1.5)


def test_a_model_is_named_by_its_folder_and_not_by_the_target_of_a_link(tmp_path: Path) -> None:
    blobs = tmp_path / "models--org--a.model-1" / "blobs"
    save(blobs, PRESETS["tiny"], random_tensors(PRESETS["tiny"], 0))
    config = json.loads((blobs / "config.json").read_text())
    del config["fastblt"]
    (blobs / "config.json").write_text(json.dumps(config))

    def link(folder: Path) -> Path:
        folder.mkdir(parents=True)
        for file in blobs.iterdir():
            (folder / file.name).symlink_to(file)
        return folder

    revision = tmp_path / "models--org--a.model-1" / "snapshots" / ("0123456789" * 4)
    assert read_config(link(tmp_path / "my model")).name == "my model"
    assert read_config(link(revision)).name == "org/a.model-1"
    assert read_config(link(revision / "blt_1b")).name == "org/a.model-1/blt_1b"
    (tmp_path / "current").symlink_to(revision)
    assert read_config(tmp_path / "current").name == "current"


def test_meta_folders_in_the_hub_cache_keep_their_names(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--facebook--blt" / "snapshots" / "main"
    write_meta(snapshot / "blt_1b", random_tensors(META_CONFIG, 0), hub=False, beside=True)
    assert read_config(snapshot / "blt_1b") == replace(META_CONFIG, name="facebook/blt/blt_1b")


def larger_than_memory() -> int:
    """Bytes. No machine maps so many as its own."""
    return 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_safetensors_larger_than_memory_are_described_and_mapped(tmp_path: Path) -> None:
    rows = larger_than_memory() // (2 * 32 * 2)
    config = replace(PRESETS["tiny"], hashes=HashConfig((3, 4), 1, rows))
    shapes = {n: s for n, s in expected_shapes(config).items() if "hash" not in n} | {FUSED: (2 * rows, 32)}
    write_sparse(tmp_path, shapes, "BF16")
    (tmp_path / "config.json").write_text(json.dumps(render(config, "bfloat16")))
    assert describe(tmp_path).file_bytes > larger_than_memory()
    tables = load(tmp_path).tensors
    assert tables["model.encoder_hash_tok_embedding.1.weight"][-1].sum() == 0


def test_pth_files_larger_than_memory_are_mapped(tmp_path: Path) -> None:
    rows = larger_than_memory() // (32 * 2)
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        table = torch.empty(rows, 32, dtype=torch.bfloat16)
        torch.save({"model": {"table": table[1:], "small": torch.empty(3, 5)}}, tmp_path / "consolidated.pth")
    stored = open_torch(tmp_path / "consolidated.pth")
    assert (stored["table"].shape, stored["table"].dtype) == ((rows - 1, 32), "bfloat16")
    assert stored["table"].map()[-1].sum() == 0
    assert (stored["small"].shape, stored["small"].map().sum()) == ((3, 5), 0)


def test_mapped_tensors_of_pth_files_equal_the_saved_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the way that files larger than the memory take, which are too large to hold anything here."""
    whole = torch.randn(7, 6)
    tensors = {
        "turned": whole.T,
        "part": whole[2:, 1:4],
        "half": whole.bfloat16(),
        "freqs_cis": torch.ones(2, dtype=torch.int64),
    }
    torch.save(tensors, tmp_path / "some.pth")
    load_of_torch = torch.load

    def refuse_to_map(*args: Any, **options: Any) -> Any:
        if options.get("mmap"):
            raise RuntimeError("unable to mmap 100 bytes from file: Cannot allocate memory (12)")
        return load_of_torch(*args, **options)

    monkeypatch.setattr("torch.load", refuse_to_map)
    stored = open_torch(tmp_path / "some.pth")
    for name in ("turned", "part", "half"):
        assert torch.equal(stored[name].map(), tensors[name]), name
