"""Every field that the public configuration classes have is honoured, refused or known not to matter."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.blt import configuration_blt as blt

from engine.checkpoint import CheckpointError, hf_config, load, meta, random_tensors, read_config, save
from engine.checkpoint.fields import Section
from engine.config import PatchingRule
from tests import reference
from tests.engines import engine_logits, make_engine
from tests.models import HF_MODELS, our_config, our_model, text
from tests.test_checkpoint_formats import ENTROPY_ARGS, META_ARGS, META_CONFIG, PATCHER_ARGS, write_meta

# Transformers'


def accounted_fields(section: type[Section]) -> set[str]:
    """Every name that is declared or immaterial."""
    names = set(section.model_fields) | set(section.immaterial)
    for info in section.model_fields.values():
        choices = getattr(info.validation_alias, "choices", [])
        names |= {choice for choice in choices if isinstance(choice, str)}
    return names


@pytest.mark.parametrize(
    ("public", "ours"),
    [
        (blt.BltConfig, hf_config.HfConfig),
        (blt.BltLocalEncoderConfig, hf_config.EncoderSection),
        (blt.BltLocalDecoderConfig, hf_config.DecoderSection),
        (blt.BltGlobalTransformerConfig, hf_config.GlobalSection),
        (blt.BltPatcherConfig, hf_config.PatcherSection),
    ],
)
def test_every_field_of_transformers_is_accounted_for(public: type[PreTrainedConfig], ours: type[Section]) -> None:
    names = {field.name for field in fields(public)} | public().to_dict().keys()
    assert len(names) > 20
    assert names <= accounted_fields(ours)


RELEASED_BY_HAND = {
    "config": ["patching_device", "patching_threshold_add", "monotonicity", "realtime_patching", "pm_size"],
    "stage": [
        "norm_eps",
        "rope_theta",
        "rope_scaling",
        "dropout",
        "attn_impl",
        "attn_bias_type",
        "_attn_implementation",
    ],
}
"""Fields that the conversions on the hub have and transformers' classes do not."""


def test_every_field_of_converted_checkpoints_on_the_hub_is_accounted_for() -> None:
    assert set(RELEASED_BY_HAND["config"]) <= accounted_fields(hf_config.HfConfig)
    for stage in (
        hf_config.EncoderSection,
        hf_config.DecoderSection,
        hf_config.GlobalSection,
        hf_config.PatcherSection,
    ):
        assert set(RELEASED_BY_HAND["stage"]) <= accounted_fields(stage)


def write_hf(folder: Path, *changes: dict[str, Any], **top: Any) -> Path:
    HF_MODELS["k2"]().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for change in (*changes, top):
        for name, value in change.items():
            config[name] = config[name] | value if isinstance(value, dict) and name in config else value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"eos_token_id": 3}, "eos_token_id = 3"),
        ({"eos_token_id": [2, 3]}, "eos_token_id = [2, 3]"),
        ({"bos_token_id": 0}, "bos_token_id = 0"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"pm_size": 4}, "pm_size = 4"),
        ({"encoder_config": {"vocab_size": 264}}, "encoder_config.vocab_size 264"),
    ],
)
def test_unsupported_values_of_transformers_fields_are_refused(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_config(write_hf(tmp_path, change))
    assert said in str(caught.value)


def test_the_usual_special_ids_may_be_named_in_the_config(tmp_path: Path) -> None:
    assert load(write_hf(tmp_path, eos_token_id=[2], bos_token_id=1, pad_token_id=3)).notes == ()


def test_unknown_config_fields_are_reported(tmp_path: Path) -> None:
    folder = write_hf(tmp_path, {"encoder_config": {"gated": True}}, rotary_pct=0.5, new_thing=None)
    (note,) = load(folder).notes
    assert note == f"{folder}/config.json: unknown fields, ignored: rotary_pct = 0.5, encoder_config.gated = True"


def test_metas_patching_rules_are_read_from_transformers_configs(tmp_path: Path) -> None:
    """Transformers reads neither field."""
    plain = load(write_hf(tmp_path, monotonicity=False, patching_threshold_add=None))
    assert plain.notes == ()
    rising = load(write_hf(tmp_path, monotonicity=True, patching_threshold_add=0.2, patching_threshold=0.1))
    assert rising.config.patching == PatchingRule(threshold=0.1, threshold_add=0.2, monotonic=True)
    (note,) = rising.notes
    assert "monotonicity is followed as in Meta's code; transformers ignores it" in note
    added = load(write_hf(tmp_path, monotonicity=False, patching_threshold_add=0.2, patching_threshold=0.1))
    (note,) = added.notes
    assert "patching_threshold_add = 0.2 is followed" in note
    ids = text(80, 3)
    engine = make_engine(tmp_path)
    torch.testing.assert_close(
        engine_logits(engine, ids, 260), reference.forward(added.config, added.tensors, ids), atol=1e-4, rtol=0
    )


# Meta's

TRANSFORMER = """dim n_layers head_dim n_heads n_kv_heads ffn_dim_multiplier multiple_of norm_eps rope_theta
rope_use_fp32_in_outer_product init_base_std init_std_factor max_seqlen attn_impl attn_bias_type eos_id"""
ENTROPY = TRANSFORMER + " seed vocab_size weight_tying sliding_window"
MODEL = (
    TRANSFORMER
    + """
seed vocab_size weight_tying patch_in_forward dim_token dim_global dim_local_decoder dim_local_encoder n_layers_global
n_layers_local_decoder n_layers_local_encoder patch_size patching_mode patching_threshold patching_threshold_add
monotonicity patching_batch_size patching_device max_patch_length tie_local_encoder_decoder_logits
use_local_encoder_transformer encoder_lm_loss max_encoder_seq_length pad_to_max_length encoder_enable_byte_ngrams
encoder_enable_byte_group_hash ngram_vocab_sizes cross_attn_encoder cross_attn_decoder cross_attn_window_encoder
cross_attn_window_decoder cross_attn_k cross_attn_nheads cross_attn_all_layers_decoder cross_attn_all_layers_encoder
cross_attn_use_flex_attention cross_attn_init_by_pooling encoder_hash_byte_group_size encoder_hash_byte_group_vocab
encoder_hash_byte_group_nb_functions log_patch_lengths non_linearity use_rope recompute_fc1_out recompute_fc3_out
recompute_attn custom_bwd layer_ckpt init_use_gaussian init_use_depth alpha_depth max_length norm_affine pre_norm
norm_type dropout output_size architecture share_encoder_decoder_emb global_local_decoder_residual_layer
tokenize_with_bpe_delimiter patching_thresholds_str tie_local_encoder_decoder encoder_preds_low_entropy_toks
encoder_preds_random_toks dim_token_emb dim_patch_emb encoder_ngram_table_dir encoder_ngram_to_size_str
entropy_model_checkpoint_dir entropy_model_is_ngram_model downsampling_by_pooling n_heads_global
n_heads_local_decoder n_heads_local_encoder n_kv_heads_global conv_kernel_size local_attention_window_len
sequence_parallel loss_parallel fuse_sequence_parallel use_fsdp attn_to_keep pm_size full_logging_n_layers"""
)
PATCHER = """patching_mode patching_device entropy_model_checkpoint_dir realtime_patching threshold threshold_add
max_patch_length patch_size patching_batch_size device monotonicity log_time"""
TOKENIZER = "vocab_size_unit_1 bpe_delim bpe_tokenizer_path add_bos add_eos"


@pytest.mark.parametrize(
    ("public", "ours"),
    [
        (MODEL, meta.ModelArgs),
        (ENTROPY, meta.EntropyArgs),
        (PATCHER, meta.PatcherArgs),
        (TOKENIZER, meta.BytesOfTokenizer),
        ("name init_kwargs", meta.TokenizerArgs),
    ],
    ids=["model", "entropy model", "patcher", "tokenizer", "tokenizer args"],
)
def test_every_field_of_metas_classes_is_accounted_for(public: str, ours: type[Section]) -> None:
    """Of facebookresearch/blt at 9774ed4f. None is listed that these do not have: that would be a slip of the pen."""
    assert set(public.split()) == accounted_fields(ours)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attn_bias_type": "local_block_causal"}, "attn_bias_type = local_block_causal"),
        ({"eos_id": 0}, "eos_id = 0"),
        ({"dim_token": 64}, "dim_token 64 must be dim_local_encoder 32, or null"),
        ({"norm_type": "layernorm"}, "norm_type = layernorm"),
        ({"pre_norm": False}, "pre_norm = False"),
        ({"tokenize_with_bpe_delimiter": True}, "tokenize_with_bpe_delimiter = True"),
        ({"patching_mode": ""}, "patching_mode = "),
        ({"cross_attn_window_decoder": 4}, "cross_attn_window_decoder = 4"),
        ({"conv_kernel_size": 3}, "conv_kernel_size = 3"),
    ],
)
def test_unsupported_values_of_meta_arguments_are_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    write_meta(tmp_path / "m", random_tensors(META_CONFIG, 0), hub=True, beside=False)
    (tmp_path / "m" / "config.json").write_text(json.dumps({"args": META_ARGS | change}))
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "m")
    assert said in str(caught.value)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"tokenizer_args": {"name": "sp"}}, "data.tokenizer_args.name = sp"),
        ({"tokenizer_args": {"name": "blt", "init_kwargs": {"bpe_delim": True}}}, "init_kwargs.bpe_delim = True"),
        ({"tokenizer_args": {"name": "blt", "init_kwargs": {"add_bos": False}}}, "init_kwargs.add_bos = False"),
        ({"patcher_args": {"patching_mode": "space"}}, "data.patcher_args.patching_mode = space"),
    ],
)
def test_unsupported_meta_tokenizers_and_patching_are_refused(data: dict[str, Any], said: str, tmp_path: Path) -> None:
    write_meta(tmp_path / "m", random_tensors(META_CONFIG, 0), hub=True, beside=False)
    (tmp_path / "m" / "train_args.json").write_text(json.dumps({"data": {"patcher_args": PATCHER_ARGS} | data}))
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "m")
    assert said in str(caught.value)
    assert "train_args.json" in str(caught.value)


def test_a_patching_error_names_the_file_that_it_comes_from(tmp_path: Path) -> None:
    """Where two files say how to patch."""
    write_meta(tmp_path / "m", random_tensors(META_CONFIG, 0), hub=True, beside=False)
    (tmp_path / "m" / "config.json").write_text(json.dumps({"args": META_ARGS | {"patching_mode": "static"}}))
    (tmp_path / "m" / "train_args.json").write_text(json.dumps({"data": {"patcher_args": {"threshold": 1.3}}}))
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "m")
    assert str(caught.value).startswith(f"{tmp_path / 'm' / 'config.json'}: patching_mode = static")


def test_unknown_meta_arguments_are_reported(tmp_path: Path) -> None:
    write_meta(tmp_path / "m", random_tensors(META_CONFIG, 0), hub=False, beside=False)
    params = {"model": META_ARGS | {"skip": 1}, "data": {"patcher_args": PATCHER_ARGS | {"jitter": 0.1}}}
    (tmp_path / "m" / "params.json").write_text(json.dumps(params))
    entropy = {"entropy_model": ENTROPY_ARGS | {"depth": 3}}
    (tmp_path / "m" / "entropy_model" / "params.json").write_text(json.dumps(entropy))
    notes = load(tmp_path / "m").notes
    file = tmp_path / "m" / "params.json"
    assert f"{file}: unknown fields, ignored: skip = 1" in notes
    assert f"{file}: unknown fields, ignored: data.patcher_args.jitter = 0.1" in notes
    assert len(notes) == 3


def test_latents_attend_across_documents_without_global_isolation_and_bytes_do_not(tmp_path: Path) -> None:
    """Meta's `attn_bias_type: "causal"`, which isolates documents everywhere but in the global stage."""
    config, tensors = our_model(our_config(isolate_documents=True, isolate_global=False), 27)
    ids = text(150, 8)
    ids[60] = ids[90] = 2
    logits = reference.forward(config, tensors, ids)
    apart = reference.forward(replace(config, isolate_global=True), tensors, ids)
    assert (logits - apart).abs().max() > 0.1
    save(tmp_path, config, tensors)
    assert load(tmp_path).config == config
    torch.testing.assert_close(engine_logits(make_engine(tmp_path), ids, 260), logits, atol=1e-4, rtol=0)
