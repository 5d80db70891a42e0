"""`config.json` of Hugging Face's BLT, read and written.

Ours is the same file plus the section `fastblt`, for features that Hugging Face's model does not have. Absent keys take
the defaults of transformers' `BltConfig`. Both spellings of its keys are read (`rms_norm_eps` and `norm_eps`,
`rope_parameters.rope_theta` and `rope_theta`). `engine.checkpoint.fields` describes how fields are accounted for.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, PositiveFloat, field_validator

from ..config import HashConfig, ModelConfig, PatchingRule, StackConfig
from .base import CheckpointError, printable
from .fields import Few, Groups, Positions, Section, Size, Theta, unknown_note
from .files import Said, model_name, said_of_stack, validate
from .names import DECODER, ENCODER, GLOBAL, HASHES, PATCHER

VERSION = 1

_BOOKKEEPING = "transformers' own bookkeeping"
_ATTENTION = "how transformers computes attention, not what"
_IMMATERIAL = {
    **dict.fromkeys(
        (
            *(
                "_name_or_path",
                "architectures",
                "chunk_size_feed_forward",
                "id2label",
                "is_encoder_decoder",
                "label2id",
            ),
            *("model_type", "output_attentions", "output_hidden_states", "problem_type", "return_dict"),
            *("transformers_version", "use_cache"),
        ),
        _BOOKKEEPING,
    ),
    **dict.fromkeys(("_attn_implementation", "attn_implementation", "attn_impl"), _ATTENTION),
    **dict.fromkeys(("dtype", "torch_dtype"), "every tensor has its own dtype, and --dtype sets that of arithmetic"),
    "initializer_range": "of weights before training",
    "dropout": "of training",
    "pad_token_id": "batches are not padded",
}
_EACH_STAGE = "every stage has its own"
_ONCE = "only the one of the whole configuration counts"


class _Section(Section):
    model_config = ConfigDict(strict=True)

    immaterial = _IMMATERIAL


class _Rope(_Section):
    rope_type: Literal["default"] = Field(default="default", validation_alias=AliasChoices("rope_type", "type"))
    rope_theta: Theta | None = None
    partial_rotary_factor: float = Field(default=1.0, ge=1, le=1)


class _Stack(_Section):
    default_theta: ClassVar[float] = 500000.0

    hidden_size: Size
    num_hidden_layers: Few
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    intermediate_size: Size | None = None
    max_position_embeddings: Positions
    rms_norm_eps: PositiveFloat = Field(default=1e-5, validation_alias=AliasChoices("rms_norm_eps", "norm_eps"))
    rope_parameters: _Rope | None = None
    rope_theta: Theta | None = None
    rope_scaling: _Rope | None = None
    hidden_act: Literal["silu"] = "silu"

    immaterial = _IMMATERIAL | {
        "attn_bias_type": "transformers does not read it",
        "tie_word_embeddings": "transformers never ties those of a stage",
        "encoder_cross_output_size": "follows from the width of the encoder",
        "bos_token_id": _ONCE,
        "eos_token_id": _ONCE,
    }

    def stack(self, window: int | None) -> StackConfig:
        rope = self.rope_scaling or self.rope_parameters
        stack = StackConfig(
            dim=self.hidden_size,
            num_layers=self.num_hidden_layers,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_key_value_heads or self.num_attention_heads,
            ffn_dim=self.intermediate_size or int(8 * self.hidden_size / 3),
            rope_theta=(rope and rope.rope_theta) or self.rope_theta or self.default_theta,
            max_positions=self.max_position_embeddings,
            window=window,
            norm_eps=self.rms_norm_eps,
        )
        if self.head_dim not in (None, stack.head_dim):
            raise ValueError(
                f"head_dim {self.head_dim} must be hidden_size / num_attention_heads, here {stack.head_dim}"
            )
        return stack


class EncoderSection(_Stack):
    vocab_size: Size = 260
    hidden_size: Size = 1024
    num_hidden_layers: Few = 1
    num_attention_heads: Size = 16
    max_position_embeddings: Positions = 24576
    cross_attn_all_layers: bool | None = False
    cross_attn_k: Size = 2
    pm_size: Literal[0] | None = 0

    immaterial = _Stack.immaterial | {
        "sliding_window": "transformers puts local_attention_window_len in its place",
        "hidden_size_global": "the encoder does not use it",
    }


class DecoderSection(_Stack):
    hidden_size: Size = 1024
    num_hidden_layers: Few = 9
    num_attention_heads: Size = 16
    intermediate_size: Size | None = 2816
    max_position_embeddings: Positions = 24576
    cross_attn_all_layers: bool | None = True
    cross_attn_k: Size = 2
    hidden_size_global: Size = 2048

    immaterial = _Stack.immaterial | {"vocab_size": "the head is made for the vocab_size of the whole configuration"}


class GlobalSection(_Stack):
    hidden_size: Size = 2048
    num_hidden_layers: Few = 25
    num_attention_heads: Size = 16
    intermediate_size: Size | None = 5632
    max_position_embeddings: Positions = 4096


class PatcherSection(_Stack):
    default_theta: ClassVar[float] = 10000.0

    vocab_size: Size = 260
    hidden_size: Size = 768
    num_hidden_layers: Few = 14
    num_attention_heads: Size = 12
    intermediate_size: Size | None = 2048
    max_position_embeddings: Positions = 8192
    sliding_window: Size | None = 512


class _Fastblt(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    version: Literal[1]
    name: str
    decoder_input: Literal["encoder", "embedding"]
    mask_id: Size | None
    block_size: Few | None
    monotonic: bool
    threshold_add: float | None
    isolate_documents: bool
    isolate_global: bool = True
    encoder_refine: bool


class HfConfig(_Section):
    """The contents of the file; `model` translates them."""

    model_type: Literal["blt"]
    vocab_size: Size = 260
    patch_in_forward: Literal[True] = True
    patch_size: PositiveFloat | None = 4
    patching_mode: str | None = "entropy"
    patching_threshold: float = 1.335442066192627
    patching_threshold_add: float | None = None
    monotonicity: bool | None = False
    max_patch_length: Size | None = None
    local_attention_window_len: Size | None = 512
    cross_attn_k: Size = 2
    encoder_hash_byte_group_size: Groups | None = None
    encoder_hash_byte_group_vocab: Size = 500002
    encoder_hash_byte_group_nb_functions: Size = Field(default=1, le=11)
    encoder_config: EncoderSection | None = None
    decoder_config: DecoderSection | None = None
    global_config: GlobalSection | None = None
    patcher_config: PatcherSection | None = None
    tie_word_embeddings: Literal[False] | None = False
    bos_token_id: Literal[1] | None = None
    eos_token_id: Literal[2] | None = None
    pm_size: Literal[0] | None = 0
    quantization_config: None = None
    fastblt: _Fastblt | None = None

    immaterial = _IMMATERIAL | {
        "max_position_embeddings": _EACH_STAGE,
        "rope_parameters": _EACH_STAGE,
        "rope_theta": _EACH_STAGE,
        "patching_batch_size": "how many texts transformers patches at once",
        "patching_device": "where transformers patches",
        "realtime_patching": "patches are always decided as bytes arrive",
    }

    @field_validator("eos_token_id", mode="before")
    @classmethod
    def _only_one(cls, value: object) -> object:
        return value[0] if isinstance(value, list) and len(value) == 1 else value

    @property
    def cross_layers_of_encoder(self) -> int:
        """Cross-attention layers that the file holds for the encoder, used or not."""
        encoder = self.encoder_config or EncoderSection()
        return encoder.num_hidden_layers if encoder.cross_attn_all_layers else 1

    def model(self, name: str) -> ModelConfig:
        """Raises ValueError where fields contradict each other."""
        encoder, decoder = self.encoder_config or EncoderSection(), self.decoder_config or DecoderSection()
        global_, patcher = self.global_config or GlobalSection(), self.patcher_config or PatcherSection()
        _require_equal("encoder_config.cross_attn_k", encoder.cross_attn_k, "cross_attn_k", self.cross_attn_k)
        _require_equal("decoder_config.cross_attn_k", decoder.cross_attn_k, "cross_attn_k", self.cross_attn_k)
        _require_equal("encoder_config.vocab_size", encoder.vocab_size, "vocab_size", self.vocab_size)
        _require_equal("patcher_config.vocab_size", patcher.vocab_size, "vocab_size", self.vocab_size)
        _require_equal(
            "decoder_config.hidden_size_global",
            decoder.hidden_size_global,
            "global_config.hidden_size",
            global_.hidden_size,
        )
        window, own = self.local_attention_window_len, self.fastblt
        return ModelConfig(
            name=printable(own.name) if own else name,
            vocab_size=self.vocab_size,
            slots=self.cross_attn_k,
            encoder=encoder.stack(window),
            global_=global_.stack(None),
            decoder=decoder.stack(window),
            patcher=patcher.stack(patcher.sliding_window),
            hashes=HashConfig(
                group_sizes=tuple(self.encoder_hash_byte_group_size or (3, 4, 5, 6, 7, 8)),
                num_functions=self.encoder_hash_byte_group_nb_functions,
                rows=self.encoder_hash_byte_group_vocab,
            ),
            patching=PatchingRule(
                # Anything else makes every byte its own patch.
                mode="entropy" if self.patching_mode == "entropy" and self.patch_size is not None else "bytes",
                threshold=self.patching_threshold,
                threshold_add=own.threshold_add if own else self.patching_threshold_add,
                monotonic=own.monotonic if own else bool(self.monotonicity),
                max_patch_length=self.max_patch_length,
            ),
            decoder_input=own.decoder_input if own else "encoder",
            decoder_cross_all_layers=bool(decoder.cross_attn_all_layers),
            encoder_refine=own.encoder_refine if own else False,
            isolate_documents=own.isolate_documents if own else False,
            isolate_global=own.isolate_global if own else True,
            mask_id=own.mask_id if own else None,
            block_size=own.block_size if own else None,
        )

    def notes(self, path: Path) -> list[str]:
        """What the user should know about how the file was understood."""
        notes = []
        if self.fastblt is None and (self.monotonicity or self.patching_threshold_add is not None):
            rule = "monotonicity" if self.monotonicity else f"patching_threshold_add = {self.patching_threshold_add}"
            notes.append(f"{path}: {rule} is followed as in Meta's code; transformers ignores it")
        return notes + unknown_note(self, str(path))


def parse(data: dict[str, Any], path: Path) -> tuple[HfConfig, ModelConfig]:
    """data: the contents of `path`. Raises CheckpointError that names the field and its value."""
    config = validate(HfConfig, data, path)
    try:
        return config, config.model(model_name(path.parent))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def said(config: ModelConfig) -> list[Said]:
    """What fields say of tensors."""
    rows = config.hashes.rows
    fields = [
        Said("vocab_size", config.vocab_size, "", config.vocab_size),
        Said("encoder_hash_byte_group_vocab", rows, HASHES, config.hashes.num_tables * rows),
    ]
    for section, prefix, stack in (
        ("encoder_config", ENCODER, config.encoder),
        ("global_config", GLOBAL, config.global_),
        ("decoder_config", DECODER, config.decoder),
        ("patcher_config", PATCHER, config.patcher),
    ):
        fields += said_of_stack(stack, f"{prefix}.", f"{section}.hidden_size", f"{section}.num_hidden_layers")
        fields.append(Said(f"{section}.intermediate_size", stack.ffn_dim, f"{prefix}.", stack.ffn_dim))
    return fields


def render(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The contents of `config.json`. Raises CheckpointError for what the format cannot express."""
    if config.encoder.window != config.decoder.window:
        raise CheckpointError(
            f"cannot be saved: encoder.window {config.encoder.window} must equal decoder.window {config.decoder.window}"
        )
    if config.global_.window is not None:
        raise CheckpointError(f"cannot be saved: global_.window {config.global_.window} must be None")
    cross = {"cross_attn_k": config.slots, "hidden_size_global": config.global_.dim}
    rule = config.patching
    return {
        "architectures": ["BltForCausalLM"],
        "model_type": "blt",
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.global_.max_positions,
        "patch_in_forward": True,
        "patch_size": 4,
        "patching_mode": "entropy" if rule.mode == "entropy" else "byte",
        "patching_threshold": float(rule.threshold),
        "max_patch_length": rule.max_patch_length,
        "local_attention_window_len": config.encoder.window,
        "cross_attn_k": config.slots,
        "encoder_hash_byte_group_size": list(config.hashes.group_sizes),
        "encoder_hash_byte_group_vocab": config.hashes.rows,
        "encoder_hash_byte_group_nb_functions": config.hashes.num_functions,
        "encoder_config": _render_stack(config.encoder, "blt_local_encoder")
        | cross
        | {"vocab_size": config.vocab_size, "cross_attn_all_layers": config.encoder_refine},
        "decoder_config": _render_stack(config.decoder, "blt_local_decoder")
        | cross
        | {"vocab_size": config.vocab_size, "cross_attn_all_layers": config.decoder_cross_all_layers},
        "global_config": _render_stack(config.global_, "blt_global_transformer"),
        "patcher_config": _render_stack(config.patcher, "blt_patcher")
        | {"vocab_size": config.vocab_size, "sliding_window": config.patcher.window},
        "tie_word_embeddings": False,
        "fastblt": {
            "version": VERSION,
            "name": config.name,
            "decoder_input": config.decoder_input,
            "mask_id": config.mask_id,
            "block_size": config.block_size,
            "monotonic": rule.monotonic,
            "threshold_add": rule.threshold_add,
            "isolate_documents": config.isolate_documents,
            "isolate_global": config.isolate_global,
            "encoder_refine": config.encoder_refine,
        },
    }


def _render_stack(stack: StackConfig, model_type: str) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": stack.dim,
        "num_hidden_layers": stack.num_layers,
        "num_attention_heads": stack.num_heads,
        "num_key_value_heads": stack.num_kv_heads,
        "intermediate_size": stack.ffn_dim,
        "max_position_embeddings": stack.max_positions,
        "rms_norm_eps": stack.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(stack.rope_theta)},
        "hidden_act": "silu",
    }


def _require_equal(name: str, value: object, other: str, required: object) -> None:
    if value != required:
        raise ValueError(f"{name} {value} must equal {other} {required}")
