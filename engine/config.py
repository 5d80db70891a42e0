"""The configurations of a model and of an engine: frozen values, made once at the edge and passed down.

`ModelConfig` has all that the four stages need to know about a checkpoint. It is independent of the file format;
`engine.checkpoint` translates Hugging Face's and Meta's files into it. `EngineConfig` holds the operator's choices.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from kernels.available import KernelName as KernelName

DtypeName = Literal["float32", "bfloat16"]
DeviceName = Literal["cpu", "cuda"]
WeightsName = Literal["float8"]
Policy = Literal["measured", "always", "never"]

BOE_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3
SPECIAL_NAMES = {BOE_ID: "<boe>", BOS_ID: "<s>", EOS_ID: "</s>", PAD_ID: "<pad>"}
BYTE_OFFSET = 4
"""The id of byte value b is b + 4; ids 0..3 are the specials above. A model may have ids after those of bytes (Meta's
`pm_size`): they are drawn and fed like any other, but are not text."""
BYTES_END = BYTE_OFFSET + 256
MOST_SLOTS = 16
"""Of a patch: the queries of a tile of attention."""


def is_byte(token: int) -> bool:
    """Whether an id is text."""
    return BYTE_OFFSET <= token < BYTES_END


def text_of(ids: Iterable[int]) -> bytes:
    """The bytes among some ids."""
    return bytes(token - BYTE_OFFSET for token in ids if is_byte(token))


@dataclass(frozen=True, slots=True)
class StackConfig:
    """One stack of transformer layers.

    `window` is the number of positions that a row sees, itself included; None means all. `max_positions` counts bytes
    for the patcher, encoder and decoder, patches for the global stage.
    """

    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_dim: int
    rope_theta: float
    max_positions: int
    window: int | None = None
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or self.head_dim % 2:
            raise ValueError(f"dim {self.dim} must split into {self.num_heads} heads of even size")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")


@dataclass(frozen=True, slots=True)
class HashConfig:
    """Hash n-gram tables: one per (function, group size), each of `rows` rows (BLT 3.2.1)."""

    group_sizes: tuple[int, ...]
    num_functions: int
    rows: int

    @property
    def num_tables(self) -> int:
        return self.num_functions * len(self.group_sizes)


@dataclass(frozen=True, slots=True)
class PatchingRule:
    """When the next byte starts a patch. Entropies are in nats.

    mode "entropy": H > threshold; with `monotonic`, H - H_previous > threshold; with `threshold_add`, both
    H > threshold and H - H_previous > threshold_add. mode "bytes": every byte is its own patch. A patch is closed as
    soon as it holds `max_patch_length` bytes (Meta's rule, counted from its left end).
    """

    mode: Literal["entropy", "bytes"] = "entropy"
    threshold: float = 1.335442066192627
    threshold_add: float | None = None
    monotonic: bool = False
    max_patch_length: int | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The whole model. `slots` (k in the paper) is the number of query slots per patch.

    decoder_input: "encoder" reads the encoder's last byte states (BLT as released); "embedding" looks the bytes up in
    the decoder's own table (Fast-BLT), so that it can draft without the encoder. `mask_id` and `block_size` are None
    unless the checkpoint was trained with block diffusion. The mask is the first id after the vocabulary: the decoder's
    table has one more row for it, and no head ever predicts it.
    encoder_refine: whether the cross-attention of each encoder layer refines the slots (Meta). If not, only that of the
    last layer counts (Hugging Face, and every released model, which has one layer).
    isolate_documents: an EOS ends a document; later bytes do not attend across it (Meta). Off equals Hugging Face.
    isolate_global: whether that holds for patches too. Meta's code always isolates bytes, but patches only if the
    model's arguments ask for it, as those of all released models do.
    """

    name: str
    vocab_size: int
    slots: int
    encoder: StackConfig
    global_: StackConfig
    decoder: StackConfig
    patcher: StackConfig
    hashes: HashConfig
    patching: PatchingRule
    decoder_input: Literal["encoder", "embedding"] = "encoder"
    decoder_cross_all_layers: bool = True
    encoder_refine: bool = False
    isolate_documents: bool = False
    isolate_global: bool = True
    mask_id: int | None = None
    block_size: int | None = None

    @property
    def projects_latent(self) -> bool:
        """Whether the concatenated slots need a projection to the global width."""
        return self.slots * self.encoder.dim != self.global_.dim

    @property
    def max_length(self) -> int:
        """Most ids of a sequence, prompt with BOS plus output: the encoder and decoder have no further positions."""
        return min(self.encoder.max_positions, self.decoder.max_positions)

    @property
    def patcher_positions(self) -> int:
        """Positions of the patcher's rotary table: enough for a whole sequence, even if the checkpoint names fewer
        (8,192 of 24,576 in the released models). Rotary positions have no end, and Hugging Face's code uses them for
        longer texts. Meta's code cuts such a text into pieces of 8,192. The entropies hardly differ, as the patcher
        sees a window of 512."""
        return max(self.patcher.max_positions, self.max_length)

    def __post_init__(self) -> None:
        if self.vocab_size < BYTES_END:
            raise ValueError(f"vocab_size {self.vocab_size} must be at least {BYTES_END}: 4 special ids and 256 bytes")
        if self.encoder.dim != self.decoder.dim:
            raise ValueError(f"encoder.dim {self.encoder.dim} and decoder.dim {self.decoder.dim} must be equal")
        if self.slots > MOST_SLOTS:
            raise ValueError(f"slots (cross_attn_k) {self.slots} must be at most {MOST_SLOTS}")
        if (self.mask_id is None) != (self.block_size is None):
            raise ValueError(f"mask_id {self.mask_id}, block_size {self.block_size}: both must be set, or neither")
        if self.mask_id is not None and self.decoder_input != "embedding":
            raise ValueError(f"with a mask_id decoder_input must be 'embedding', not {self.decoder_input!r}")
        if self.mask_id is not None and self.mask_id != self.vocab_size:
            raise ValueError(f"mask_id {self.mask_id} must be {self.vocab_size}, the first id after the vocabulary")


def _flag(help_text: str, least: int | None = None, most: int | None = None) -> dict[str, Any]:
    """Metadata of a field of `EngineConfig`: the help of its flag, and the least and the greatest value of a number."""
    return {"help": help_text, "least": least, "most": most}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How an engine runs a model. Every field is also a flag of `fastblt serve`, documented by its help. Sizes are
    counts, and bytes only where the name has `bytes`."""

    model: str = field(
        metadata=_flag("Folder of the checkpoint, or a model on the Hugging Face hub: org/name[/folder][@revision].")
    )
    dtype: DtypeName = field(default="float32", metadata=_flag("Dtype of weights and arithmetic."))
    device: DeviceName = field(default="cpu", metadata=_flag("Where the model runs."))
    kernels: KernelName | None = field(
        default=None,
        metadata=_flag(
            "Kernel backend: native, torch or triton; by default triton on a CUDA device and native on a CPU, or torch "
            "where these are missing."
        ),
    )
    """See `kernels.dispatch.choose_kernels`."""
    graphs: bool | None = field(
        default=None,
        metadata=_flag("Whether kernels are launched as recorded graphs; by default Triton's on a CUDA device."),
    )
    weights: WeightsName | None = field(
        default=None,
        metadata=_flag(
            "float8 rounds the large matrices to a byte per weight, half of bfloat16's; by default as --dtype."
        ),
    )
    max_sequences: int = field(default=64, metadata=_flag("Most sequences in the running batch.", 1, 1 << 16))
    max_step_rows: int = field(
        default=512,
        metadata=_flag("Most byte rows per step, prompts included; memory is planned for them.", 1, 1 << 20),
    )
    max_stall_ms: float = field(
        default=50.0,
        metadata=_flag(
            "Milliseconds by which prompts may lengthen a step, or the length of the shortest step if that is more.", 0
        ),
    )
    stage_costs: str | None = field(
        default=None,
        metadata=_flag(
            "JSON file of measured step costs: read if it fits this model, else measured and written; by default "
            "measured at every start."
        ),
    )
    warm_up_seconds: float = field(
        default=60.0,
        metadata=_flag(
            "Most seconds, before the server is ready, for compiling kernels and recording graphs on a CUDA device.", 0
        ),
    )
    """See `engine.warm_up`."""
    cache_bytes: int = field(default=2 << 30, metadata=_flag("Memory for all caches together, in bytes.", 1))
    page_size: int = field(default=64, metadata=_flag("Rows per cache page.", 1, 1 << 16))
    """Caches that keep a few rows per sequence use an eighth of it."""
    prefix_cache: bool = field(
        default=True, metadata=_flag("Whether later prompts reuse the cached beginning of earlier texts.")
    )
    max_length: int | None = field(
        default=None, metadata=_flag("Most ids per sequence; by default what the model and the caches can hold.", 1)
    )
    isolate_documents: bool | None = field(
        default=None,
        metadata=_flag("Whether an end-of-sequence id hides the text before it; by default as the model says."),
    )
    patcher: str | None = field(
        default=None,
        metadata=_flag(
            "Folder or repository of the patcher, for a model in Meta's layout whose patcher is elsewhere; by default "
            "entropy_model in or beside the model's folder."
        ),
    )
    patching_threshold: float | None = field(
        default=None,
        metadata=_flag(
            "Entropy above which a byte starts a patch, in nats; by default the model's own. `fastblt calibrate` finds "
            "one for a mean patch length."
        ),
    )
    run_ahead: Policy = field(
        default="measured",
        metadata=_flag(
            "Whether the host launches work before it has read earlier results: measured (where it pays), always or "
            "never. No text depends on it."
        ),
    )
    """See `engine.step.ahead`."""
    num_threads: int | None = field(
        default=None, metadata=_flag("CPU threads for tensor work; by default one per core.", 1, 256)
    )
    """Our own kernels use no more, see `kernels/native/pool.h`."""

    def check(self) -> None:
        """Raises ValueError for a number outside the range of its flag."""
        for f in fields(self):
            value, least, most = getattr(self, f.name), f.metadata["least"], f.metadata["most"]
            if value is not None and ((least is not None and value < least) or (most is not None and value > most)):
                limits = f"at least {least}" if most is None else f"from {least} to {most}"
                raise ValueError(f"--{f.name.replace('_', '-')} {value} must be {limits}")


def flag_help(name: str, *, phrase: bool = False) -> str:
    """The help of the flag of an `EngineConfig` field. phrase: without the capital and the full stop, as in the help of
    developers' programs."""
    text: str = next(f for f in fields(EngineConfig) if f.name == name).metadata["help"]
    if not phrase:
        return text
    first, _, rest = text.removesuffix(".").partition(" ")
    return f"{first if first.isupper() else first.lower()} {rest}"


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the server must know about a loaded model."""

    name: str
    max_length: int
    vocab_size: int
    block_size: int | None
    decoders: tuple[str, ...] = ("blt",)
    parameters: int = 0
    pages: dict[str, int] = field(default_factory=dict)
    """Pages per pool."""
    patching: PatchingRule = PatchingRule()
    fingerprint: str = ""
    """Of the weights, and of what else decides the bytes of a text."""
