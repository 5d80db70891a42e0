"""Checkpoints in Meta's layouts, read only.

A folder holds `params.json` (training arguments) and `consolidated.pth`, or `config.json` with the model's arguments
under "args" and `model.safetensors`. The patcher is a model of its own in the same layout. Its folder is
`entropy_model`, inside the model's folder or beside it, or one that the user names. Its window is always 512, as in
Meta's loader.

How a text is patched is set by the training arguments, under data.patcher_args. They are in `params.json`, or in
`train_args.json` beside `config.json`. Settings missing there are taken from the model's own arguments. The entropy
model's training arguments do not count: it is trained without patches.
`engine.checkpoint.fields` describes how fields are accounted for; the immaterial ones are those that Meta's code at
commit 9774ed4f does not read when it generates.
"""

import os
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from math import ceil
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, field_validator

from ..config import HashConfig, ModelConfig, PatchingRule, StackConfig
from ..foreign import models_inside
from ..layout import CONFIG, CONSOLIDATED, ENTROPY_FOLDER, PARAMS, TRAIN_ARGS, WEIGHTS, WEIGHTS_INDEX
from .base import Checkpoint, CheckpointError
from .fields import Few, Groups, Positions, Section, Size, Theta, unknown_note
from .files import (
    Said,
    Stored,
    check,
    is_there,
    kind_of_folder,
    model_name,
    open_safetensors,
    open_torch,
    read_json,
    require_folder,
    said_of_stack,
    validate,
)
from .names import PATCHER, Shape, expected_shapes

PATCHER_WINDOW = 512

_META_SEGMENTS = {
    "embed_tokens": "tok_embeddings",
    "self_attn": "attention",
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp": "feed_forward",
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
    "q_norm": "cross_attn_norm_q",
    "k_norm": "cross_attn_norm_kv",
}


_TRAINING = "of training"
_SPEED = "how fast Meta's code computes, not what"
_UNUSED = "Meta's code does not use it"


class _Transformer(Section):
    """Arguments that the main model and the patcher share, with Meta's defaults."""

    head_dim: Size | None = None
    n_kv_heads: Size | None = None
    ffn_dim_multiplier: float | None = Field(default=None, gt=0, le=1000)
    multiple_of: Size = 256
    norm_eps: PositiveFloat = 1e-5
    rope_theta: Theta = 10000.0
    max_seqlen: Positions = 1024
    eos_id: Literal[2] = 2

    immaterial = {
        **dict.fromkeys(("init_base_std", "init_std_factor", "seed"), _TRAINING),
        "attn_impl": _SPEED,
        "rope_use_fp32_in_outer_product": "angles are always computed in float32",
    }

    def stack(
        self, dim: int, layers: int, heads: int, kv_heads: int | None, positions: int, window: int | None
    ) -> StackConfig:
        hidden = int((self.ffn_dim_multiplier or 1.0) * int(2 * 4 * dim / 3))
        stack = StackConfig(
            dim=dim,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads or heads,
            ffn_dim=self.multiple_of * ceil(hidden / self.multiple_of),
            rope_theta=self.rope_theta,
            max_positions=positions,
            window=window,
            norm_eps=self.norm_eps,
        )
        if self.head_dim not in (None, stack.head_dim):
            raise ValueError(f"head_dim {self.head_dim} must be width / heads, here {stack.head_dim}")
        return stack


class EntropyArgs(_Transformer):
    vocab_size: Size
    dim: Size
    n_layers: Few
    n_heads: Size
    weight_tying: Literal[False] = False

    immaterial = _Transformer.immaterial | dict.fromkeys(
        ("attn_bias_type", "sliding_window"), "Meta's loader puts local_block_causal and 512 in its place"
    )


class PatcherArgs(Section):
    patching_mode: Literal["entropy", "byte"] = "entropy"
    threshold: float = 1.335442066192627
    threshold_add: float | None = None
    monotonicity: bool = False
    max_patch_length: Size | None = None

    immaterial = {
        **dict.fromkeys(("device", "log_time", "patching_batch_size", "patching_device"), _SPEED),
        "entropy_model_checkpoint_dir": "the patcher is beside the model, or in the folder that --patcher names",
        "patch_size": "only counts for patches of one size",
        "realtime_patching": "patches are always decided as bytes arrive",
    }

    def rule(self) -> PatchingRule:
        return PatchingRule(
            mode="entropy" if self.patching_mode == "entropy" else "bytes",
            threshold=self.threshold,
            threshold_add=self.threshold_add,
            monotonic=self.monotonicity,
            max_patch_length=self.max_patch_length,
        )


class BytesOfTokenizer(Section):
    add_bos: Literal[True] = True
    bpe_delim: Literal[False] = False
    vocab_size_unit_1: Literal[256] = 256

    immaterial = {
        "add_eos": "a prompt does not end with one",
        "bpe_tokenizer_path": "only counts with bpe_delim",
    }


class TokenizerArgs(Section):
    name: Literal["blt", "bytes"] = "blt"
    init_kwargs: BytesOfTokenizer | None = None


class _Data(Section):
    """The part of the training arguments about the model's input. All other fields only matter for training."""

    patcher_args: dict[str, Any] = {}
    tokenizer_args: TokenizerArgs = TokenizerArgs()


class ModelArgs(_Transformer):
    """A literal is the only value that this architecture allows."""

    vocab_size: Size
    pm_size: int = Field(default=0, ge=0, lt=2**31)
    dim_global: Size
    dim_local_encoder: Size
    dim_local_decoder: Size
    n_layers_global: Few
    n_layers_local_encoder: Few
    n_layers_local_decoder: Few
    n_heads_global: Size
    n_heads_local_encoder: Size
    n_heads_local_decoder: Size
    n_kv_heads_global: Size | None = None
    ffn_dim_multiplier: float | None = Field(default=1.0, gt=0, le=1000)
    max_encoder_seq_length: Positions | None = None
    local_attention_window_len: Size | None = None
    cross_attn_k: Size
    cross_attn_nheads: Size
    cross_attn_all_layers_encoder: bool = False
    cross_attn_all_layers_decoder: bool = False
    cross_attn_encoder: Literal[True]
    cross_attn_decoder: Literal[True]
    cross_attn_init_by_pooling: Literal[True]
    cross_attn_window_encoder: None = None
    cross_attn_window_decoder: None = None
    use_local_encoder_transformer: Literal[True]
    downsampling_by_pooling: Literal["max"]
    encoder_enable_byte_ngrams: Literal[False] = False
    use_rope: Literal[True] = True
    attn_bias_type: Literal["block_causal", "causal"] | None = "causal"
    dim_token: Size | None = None
    patching_mode: Literal["entropy", "byte", "static", "space", "bpe", "bpe_patcher"] | None = None
    patching_threshold: float | None = None
    patching_threshold_add: float | None = None
    monotonicity: bool = False
    max_patch_length: Size | None = None
    alpha_depth: Literal["disabled"] = "disabled"
    architecture: Literal["vanilla"] = "vanilla"
    conv_kernel_size: None = None
    entropy_model_is_ngram_model: Literal[False] = False
    global_local_decoder_residual_layer: None = None
    non_linearity: Literal["swiglu"] = "swiglu"
    norm_affine: Literal[True] = True
    norm_type: Literal["rmsnorm"] = "rmsnorm"
    pre_norm: Literal[True] = True
    tie_local_encoder_decoder: Literal[False] = False
    tie_local_encoder_decoder_logits: Literal[False] = False
    tokenize_with_bpe_delimiter: Literal[False] = False
    encoder_hash_byte_group_size: Groups = Field(min_length=1)
    encoder_hash_byte_group_vocab: Size = 30000
    encoder_hash_byte_group_nb_functions: Size = Field(default=3, le=11)

    immaterial = {
        **_Transformer.immaterial,
        **dict.fromkeys(
            (
                *("attn_to_keep", "custom_bwd", "dropout", "encoder_lm_loss", "encoder_preds_low_entropy_toks"),
                *("encoder_preds_random_toks", "full_logging_n_layers", "fuse_sequence_parallel", "init_use_depth"),
                *("init_use_gaussian", "layer_ckpt", "log_patch_lengths", "loss_parallel", "pad_to_max_length"),
                *("recompute_attn", "recompute_fc1_out", "recompute_fc3_out", "sequence_parallel", "use_fsdp"),
            ),
            _TRAINING,
        ),
        **dict.fromkeys(("cross_attn_use_flex_attention", "patching_batch_size", "patching_device"), _SPEED),
        **dict.fromkeys(
            (
                *(
                    "encoder_enable_byte_group_hash",
                    "encoder_ngram_table_dir",
                    "output_size",
                    "patching_thresholds_str",
                ),
                *("share_encoder_decoder_emb", "weight_tying"),
            ),
            _UNUSED,
        ),
        **dict.fromkeys(("dim", "n_heads", "n_layers"), "every stage has its own"),
        **dict.fromkeys(("dim_patch_emb", "dim_token_emb"), "follow from the widths of the stages"),
        **dict.fromkeys(
            ("encoder_ngram_to_size_str", "ngram_vocab_sizes"), "only count with encoder_enable_byte_ngrams"
        ),
        "entropy_model_checkpoint_dir": "the patcher is beside the model, or in the folder that --patcher names",
        "max_length": "only counts without rotary positions",
        "patch_in_forward": "patches are always decided before the model runs",
        "patch_size": "only counts for patches of one size",
    }

    @field_validator("encoder_hash_byte_group_size", mode="before")
    @classmethod
    def _split(cls, sizes: object) -> object:
        return [size for size in sizes.split(",") if size] if isinstance(sizes, str) else sizes

    def model(self, name: str, entropy: EntropyArgs, patching: PatchingRule) -> ModelConfig:
        """Raises ValueError where arguments contradict each other."""
        vocab_size = self.vocab_size + self.pm_size
        if entropy.vocab_size != vocab_size:
            raise ValueError(f"the patcher's vocab_size {entropy.vocab_size} must equal the model's, {vocab_size}")
        if self.dim_token not in (None, self.dim_local_encoder):
            raise ValueError(f"dim_token {self.dim_token} must be dim_local_encoder {self.dim_local_encoder}, or null")
        heads = {self.n_heads_local_encoder, self.n_heads_local_decoder, self.n_kv_heads or self.cross_attn_nheads}
        if heads != {self.cross_attn_nheads}:
            raise ValueError(
                f"cross_attn_nheads {self.cross_attn_nheads} must equal those of encoder and decoder, {sorted(heads)}"
            )
        positions, window = self.max_encoder_seq_length or self.max_seqlen, self.local_attention_window_len
        return ModelConfig(
            name=name,
            vocab_size=vocab_size,
            slots=self.cross_attn_k,
            encoder=self.stack(
                self.dim_local_encoder,
                self.n_layers_local_encoder,
                self.n_heads_local_encoder,
                self.n_kv_heads,
                positions,
                window,
            ),
            global_=self.stack(
                self.dim_global,
                self.n_layers_global,
                self.n_heads_global,
                self.n_kv_heads_global,
                self.max_seqlen,
                None,
            ),
            decoder=self.stack(
                self.dim_local_decoder,
                self.n_layers_local_decoder,
                self.n_heads_local_decoder,
                self.n_kv_heads,
                positions,
                window,
            ),
            patcher=entropy.stack(
                entropy.dim,
                entropy.n_layers,
                entropy.n_heads,
                entropy.n_kv_heads,
                entropy.max_seqlen,
                PATCHER_WINDOW,
            ),
            hashes=HashConfig(
                group_sizes=tuple(self.encoder_hash_byte_group_size),
                num_functions=self.encoder_hash_byte_group_nb_functions,
                rows=self.encoder_hash_byte_group_vocab,
            ),
            patching=patching,
            decoder_cross_all_layers=self.cross_attn_all_layers_decoder,
            encoder_refine=self.cross_attn_all_layers_encoder and self.n_layers_local_encoder > 1,
            isolate_documents=True,
            # Encoder, decoder and patcher always isolate documents; the global stage has the mask named here.
            isolate_global=self.attn_bias_type == "block_causal",
        )

    @property
    def patching(self) -> dict[str, Any]:
        """The patching that these arguments set, under the names in data.patcher_args."""
        arguments = {
            "patching_mode": self.patching_mode,
            "threshold": self.patching_threshold,
            "threshold_add": self.patching_threshold_add,
            "monotonicity": self.monotonicity or None,
            "max_patch_length": self.max_patch_length,
        }
        return {name: value for name, value in arguments.items() if value is not None}


def read_config(path: Path, patcher: Path | None = None) -> tuple[ModelConfig, tuple[str, ...]]:
    """The configuration, and what the user should know about how the files were understood.

    Raises CheckpointError that names the file, the field and its value.
    """
    file, data, arguments = _arguments(path, "model", of_model=True)
    entropy_file, _, entropy_arguments = _arguments(_entropy_folder(path, patcher), "entropy_model", of_model=False)
    entropy = validate(EntropyArgs, entropy_arguments, entropy_file)
    args = validate(ModelArgs, arguments, file)
    notes = unknown_note(args, str(file)) + unknown_note(entropy, str(entropy_file))

    training_file, training = file, data
    if is_there(path / TRAIN_ARGS):
        training_file = path / TRAIN_ARGS
        training = read_json(training_file)
    found = validate(_Data, training.get("data") or {}, training_file, "data")
    notes += unknown_note(found.tokenizer_args, str(training_file), "data.tokenizer_args.")
    given = found.patcher_args
    # First by themselves, so that an error names the right file.
    validate(PatcherArgs, given, training_file, "data.patcher_args")
    patching = validate(PatcherArgs, args.patching | given, file)
    notes += unknown_note(patching, str(training_file), "data.patcher_args.")
    for name, value in args.patching.items():
        if given.get(name, value) != value:
            notes.append(
                f"{training_file}: data.patcher_args.{name} = {given[name]} is used, as in Meta's code, "
                f"and not {value} from {file}"
            )
    if "threshold" not in args.patching | given and patching.patching_mode == "entropy":
        notes.append(
            f"{training_file if given else path / TRAIN_ARGS}: no patching threshold is set; {patching.threshold}, the "
            "default of Meta's code, is used. --patching-threshold sets another"
        )
    try:
        return args.model(model_name(path), entropy, patching.rule()), tuple(notes)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def read(path: Path, patcher: Path | None = None) -> Checkpoint:
    """The checkpoint in folder `path`; tensors are mapped, under canonical names."""
    config, notes = read_config(path, patcher)
    shapes = expected_shapes(config)
    of_patcher = {name: shape for name, shape in shapes.items() if name.startswith(PATCHER)}
    main = {name: shape for name, shape in shapes.items() if name not in of_patcher}
    stored = _open(path, main, _said(config))
    said_of_patcher = said_of_stack(config.patcher, "", "dim", "n_layers")
    stored |= _open(_entropy_folder(path, patcher), of_patcher, said_of_patcher)
    files = tuple(sorted({s.file for s in stored.values()}))
    places = {name: s.place for name, s in stored.items()}
    return Checkpoint(config, {name: stored[name].map() for name in shapes}, "meta", files, places, notes)


def _arguments(path: Path, key: str, *, of_model: bool) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The file with a model's arguments, its contents, and the arguments."""
    file = _arguments_file(path)
    key = key if file.name == PARAMS else "args"
    data = read_json(file)
    args = data.get(key)
    patcher = args if key == "args" else data.get("entropy_model")
    if of_model and not (isinstance(args, dict) and "dim_global" in args) and _is_patcher(patcher):
        raise CheckpointError(
            f"{file}: this is a BLT's patcher (entropy model) alone. Name the model itself; --patcher takes this one"
        )
    if not isinstance(args, dict):
        raise CheckpointError(f"{file}: {key} = {str(args)[:60]} must be an object with the model's arguments")
    return file, data, args


def _arguments_file(path: Path) -> Path:
    return path / (PARAMS if is_there(path / PARAMS) else CONFIG)


def _is_patcher(args: object) -> bool:
    return isinstance(args, dict) and {"dim", "n_layers", "vocab_size"} <= args.keys() and "dim_global" not in args


def _entropy_folder(path: Path, patcher: Path | None) -> Path:
    if patcher is not None:
        require_folder(patcher)
        return patcher
    for folder in (path / ENTROPY_FOLDER, Path(os.path.abspath(path)).parent / ENTROPY_FOLDER):
        if is_there(folder):
            return folder
    raise CheckpointError(
        f"{path}: no folder {ENTROPY_FOLDER} with the patcher inside or beside it; --patcher FOLDER names another place"
    )


def _said(config: ModelConfig) -> list[Said]:
    """What arguments say of the main model's tensors."""
    fields = [Said("vocab_size", config.vocab_size, "", config.vocab_size)]
    for name, stack in (
        ("local_encoder", config.encoder),
        ("global", config.global_),
        ("local_decoder", config.decoder),
    ):
        prefix = "global_transformer." if name == "global" else f"{name}."
        fields += said_of_stack(stack, prefix, f"dim_{name}", f"n_layers_{name}")
    return fields


def _open(path: Path, shapes: Mapping[str, Shape], said: Seq[Said]) -> dict[str, Stored]:
    """The tensors of one of the two models, checked, under canonical names."""
    if not any(is_there(path / name) for name in (CONSOLIDATED, WEIGHTS, WEIGHTS_INDEX)):
        inside = [name for name in models_inside(path) if (path / name / CONSOLIDATED).exists()]
        raise CheckpointError(
            f"{path / CONSOLIDATED}: no such file. The weights are in {path / inside[0]}: name that folder"
            if inside
            else f"{path / CONSOLIDATED}: no such file, nor {WEIGHTS}"
            + (f". This is {kind}" if (kind := kind_of_folder(path)) else "")
        )
    pickled = is_there(path / CONSOLIDATED) and not is_there(path / WEIGHTS)
    stored = open_torch(path / CONSOLIDATED) if pickled else open_safetensors(path)
    stored = {name: tensor for name, tensor in stored.items() if not name.endswith("freqs_cis")}
    names = {_meta_name(name): name for name in shapes}
    check(stored, {meta: shapes[name] for meta, name in names.items()}, _arguments_file(path), said)
    return {name: stored[meta] for meta, name in names.items()}


def _meta_name(name: str) -> str:
    if name == "lm_head.weight":
        return "local_decoder.output.weight"
    if name.startswith(PATCHER):
        name = name.removeprefix(f"{PATCHER}.").replace("lm_head", "output")
    segments = name.removeprefix("model.").split(".")
    return ".".join(_META_SEGMENTS.get(segment, segment) for segment in segments)
