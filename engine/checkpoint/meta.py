"""Checkpoints in Meta's layouts, read only.

A folder holds `params.json` (training arguments) and `consolidated.pth`, or `config.json` with the model's arguments
under "args" and `model.safetensors`. The patcher is a model of its own, of the same form, in a folder `entropy_model`
inside or beside. Its window is 512 whatever its file says, as in Meta's loader.
"""

from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from ..config import HashConfig, ModelConfig, PatchingRule, StackConfig
from .base import Checkpoint, CheckpointError
from .files import CONFIG, Stored, check, open_safetensors, open_torch, read_json, validate
from .names import PATCHER, Shape, expected_shapes

PARAMS = "params.json"
CONSOLIDATED = "consolidated.pth"
ENTROPY_FOLDER = "entropy_model"
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


class _Section(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class _Transformer(_Section):
    """Arguments that the main model and the patcher share, with Meta's defaults."""

    head_dim: PositiveInt | None = None
    n_kv_heads: PositiveInt | None = None
    ffn_dim_multiplier: PositiveFloat | None = None
    multiple_of: PositiveInt = 256
    norm_eps: PositiveFloat = 1e-5
    rope_theta: PositiveFloat = 10000.0
    max_seqlen: PositiveInt = 1024

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


class _EntropyArgs(_Transformer):
    vocab_size: PositiveInt
    dim: PositiveInt
    n_layers: PositiveInt
    n_heads: PositiveInt
    weight_tying: Literal[False] = False


class _PatcherArgs(_Section):
    patching_mode: Literal["entropy", "byte"] = "entropy"
    threshold: float = 1.335442066192627
    threshold_add: float | None = None
    monotonicity: bool = False
    max_patch_length: PositiveInt | None = None

    def rule(self) -> PatchingRule:
        return PatchingRule(
            mode="entropy" if self.patching_mode == "entropy" else "bytes",
            threshold=self.threshold,
            threshold_add=self.threshold_add,
            monotonic=self.monotonicity,
            max_patch_length=self.max_patch_length,
        )


class _ModelArgs(_Transformer):
    """Only what decides the computation. A literal is the one value that this architecture has."""

    vocab_size: PositiveInt
    pm_size: NonNegativeInt = 0
    dim_global: PositiveInt
    dim_local_encoder: PositiveInt
    dim_local_decoder: PositiveInt
    n_layers_global: PositiveInt
    n_layers_local_encoder: PositiveInt
    n_layers_local_decoder: PositiveInt
    n_heads_global: PositiveInt
    n_heads_local_encoder: PositiveInt
    n_heads_local_decoder: PositiveInt
    n_kv_heads_global: PositiveInt | None = None
    ffn_dim_multiplier: PositiveFloat | None = 1.0
    max_encoder_seq_length: PositiveInt | None = None
    local_attention_window_len: PositiveInt | None = None
    cross_attn_k: PositiveInt
    cross_attn_nheads: PositiveInt
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
    encoder_hash_byte_group_size: list[PositiveInt]
    encoder_hash_byte_group_vocab: PositiveInt = 30000
    encoder_hash_byte_group_nb_functions: PositiveInt = Field(default=3, le=11)

    @field_validator("encoder_hash_byte_group_size", mode="before")
    @classmethod
    def _split(cls, sizes: object) -> object:
        return [size for size in sizes.split(",") if size] if isinstance(sizes, str) else sizes

    def model(self, name: str, entropy: _EntropyArgs, patching: PatchingRule) -> ModelConfig:
        """Raises ValueError where arguments contradict each other."""
        vocab_size = self.vocab_size + self.pm_size
        if entropy.vocab_size != vocab_size:
            raise ValueError(f"the patcher's vocab_size {entropy.vocab_size} must equal the model's, {vocab_size}")
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
        )


def read_config(path: Path) -> ModelConfig:
    """Raises CheckpointError that names the file, the field and its value."""
    file, data, args = _arguments(path, "model")
    entropy_path = _entropy_folder(path)
    entropy_file, entropy_data, entropy_args = _arguments(entropy_path, "entropy_model")
    entropy = validate(_EntropyArgs, entropy_args, entropy_file)

    patcher_file, training = file, data
    if (path / "train_args.json").exists():
        patcher_file = path / "train_args.json"
        training = read_json(patcher_file)
    elif "data" not in training:
        patcher_file, training = entropy_file, entropy_data
    found = training.get("data")
    patching = validate(_PatcherArgs, found.get("patcher_args", {}) if isinstance(found, dict) else {}, patcher_file)
    try:
        return validate(_ModelArgs, args, file).model(path.resolve().name, entropy, patching.rule())
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def read(path: Path) -> Checkpoint:
    """The checkpoint in folder `path`; tensors are mapped, under canonical names."""
    config = read_config(path)
    entropy_path = _entropy_folder(path)
    shapes = expected_shapes(config)
    patcher = {name: shape for name, shape in shapes.items() if name.startswith(PATCHER)}
    main = {name: shape for name, shape in shapes.items() if name not in patcher}
    stored = _open(path, main) | _open(entropy_path, patcher)
    files = tuple(sorted({s.file for s in stored.values()}))
    return Checkpoint(config, {name: stored[name].map() for name in shapes}, "meta", files)


def _arguments(path: Path, key: str) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The file with a model's arguments, all that it holds, and the arguments."""
    file, key = (path / PARAMS, key) if (path / PARAMS).exists() else (path / CONFIG, "args")
    data = read_json(file)
    args = data.get(key)
    if not isinstance(args, dict):
        raise CheckpointError(f"{file}: {key} = {args!r} must be an object with the model's arguments")
    return file, data, args


def _entropy_folder(path: Path) -> Path:
    for folder in (path / ENTROPY_FOLDER, path.resolve().parent / ENTROPY_FOLDER):
        if folder.is_dir():
            return folder
    raise CheckpointError(f"{path}: no folder {ENTROPY_FOLDER} with the patcher inside or beside it")


def _open(path: Path, shapes: Mapping[str, Shape]) -> dict[str, Stored]:
    """The tensors of one of the two models, checked, under canonical names."""
    stored = open_torch(path / CONSOLIDATED) if (path / CONSOLIDATED).exists() else open_safetensors(path)
    stored = {name: tensor for name, tensor in stored.items() if not name.endswith("freqs_cis")}
    names = {_meta_name(name): name for name in shapes}
    check(stored, {meta: shapes[name] for meta, name in names.items()}, path)
    return {name: stored[meta] for meta, name in names.items()}


def _meta_name(name: str) -> str:
    if name == "lm_head.weight":
        return "local_decoder.output.weight"
    if name.startswith(PATCHER):
        name = name.removeprefix(f"{PATCHER}.").replace("lm_head", "output")
    segments = name.removeprefix("model.").split(".")
    return ".".join(_META_SEGMENTS.get(segment, segment) for segment in segments)
