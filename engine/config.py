"""What a model is and how an engine runs it: frozen values, made once at the edge and passed down.

`ModelConfig` says everything that the four stages need to know about a checkpoint. It is independent of the file
format; `engine.checkpoint` translates Hugging Face's and Meta's files into it. `EngineConfig` holds the choices of
whoever starts the engine.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

KernelName = Literal["torch", "triton", "native"]
WeightsName = Literal["float8"]
Policy = Literal["measured", "always", "never"]

BOE_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3
SPECIAL_NAMES = {BOE_ID: "<boe>", BOS_ID: "<s>", EOS_ID: "</s>", PAD_ID: "<pad>"}
BYTE_OFFSET = 4
"""The id of byte value b is b + 4; ids 0..3 are the specials above. A model may have ids beyond the bytes' (Meta's
`pm_size`): they are drawn and fed like any other, and are no text."""
BYTES_END = BYTE_OFFSET + 256


def is_byte(token: int) -> bool:
    """Whether an id is text."""
    return BYTE_OFFSET <= token < BYTES_END


def text_of(ids: Iterable[int]) -> bytes:
    """The bytes among them."""
    return bytes(token - BYTE_OFFSET for token in ids if is_byte(token))


@dataclass(frozen=True, slots=True)
class StackConfig:
    """One stack of transformer layers.

    `window` is the number of positions a row sees, itself included; None means all. `max_positions` counts bytes for
    the patcher, encoder and decoder, patches for the global stage.
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
    """When does the next byte start a patch? Entropies in nats.

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
    a table of the decoder's own (Fast-BLT), which is what lets it draft without the encoder. `mask_id` and
    `block_size` are None unless the checkpoint was trained with block diffusion. The mask is the id right behind the
    vocabulary: the decoder's table has one row more for it, and no head ever predicts it.
    encoder_refine: several encoder layers with cross-attention in each refine the slots layer by layer (Meta); off,
    only the last layer's cross-attention counts (Hugging Face, and every released model, which has one layer).
    isolate_documents: an EOS ends a document; later bytes do not attend across it (Meta). Off equals Hugging Face.
    isolate_global: whether that holds for patches too. Meta's code always isolates bytes, but patches only where the
    model's arguments say so, as those of all released models do.
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
        """Most ids (prompt with BOS, plus output) that a sequence may hold: no byte position may leave a table."""
        return min(self.encoder.max_positions, self.decoder.max_positions)

    @property
    def patcher_positions(self) -> int:
        """Positions that the patcher's rotary table has: those of a whole sequence, however few the checkpoint names
        (8,192 of 24,576 in the released models). Rotary positions have no end, and Hugging Face's entropies go on
        beyond them; Meta's code cuts a longer text into pieces of 8,192, which hardly differs, as the patcher sees a
        window of 512."""
        return max(self.patcher.max_positions, self.max_length)

    def __post_init__(self) -> None:
        if self.vocab_size < BYTES_END:
            raise ValueError(f"vocab_size {self.vocab_size} must be at least {BYTES_END}: 4 special ids and 256 bytes")
        if self.encoder.dim != self.decoder.dim:
            raise ValueError(f"encoder.dim {self.encoder.dim} and decoder.dim {self.decoder.dim} must be equal")
        if (self.mask_id is None) != (self.block_size is None):
            raise ValueError("mask_id and block_size belong together: both or neither")
        if self.mask_id is not None and self.decoder_input != "embedding":
            raise ValueError("a [MASK] needs decoder_input 'embedding'")
        if self.mask_id is not None and self.mask_id != self.vocab_size:
            raise ValueError(f"mask_id {self.mask_id} must be the id behind the vocabulary, {self.vocab_size}")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How an engine runs a model. Sizes are counts, not bytes, unless the name says so."""

    model: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    kernels: KernelName | None = None
    """None takes Triton's on a CUDA device, torch's elsewhere."""
    graphs: bool | None = None
    """Whether stages run as recorded graphs; None records on a CUDA device only."""
    weights: WeightsName | None = None
    """How the large matrices are stored; None: in `dtype`."""
    max_sequences: int = 64
    """Most sequences in the running batch."""
    max_step_rows: int = 512
    """Most byte rows per step, prompt and generated together: what memory is planned for."""
    max_stall_ms: float = 50.0
    """By how many milliseconds prompts may make a step longer. It may always become twice as long as the shortest
    one."""
    stage_costs: str | None = None
    """File with what steps cost: read if it is of this model, else measured at the start and written."""
    cache_bytes: int = 2 << 30
    """Memory for all page pools together."""
    page_size: int = 64
    """Rows per page of the caches; those that keep a few rows per sequence use an eighth of it."""
    prefix_cache: bool = True
    """Whether what was computed of a text serves later ones that begin like it."""
    max_length: int | None = None
    """Most ids per sequence; None takes the model's own limit, or less if the caches could not hold one such
    sequence."""
    isolate_documents: bool | None = None
    """Overrides the checkpoint's setting."""
    num_threads: int | None = None
    """CPU threads for tensor work; None takes one per core."""
    patcher: str | None = None
    """Folder of the patcher, for a model in Meta's layout whose patcher is elsewhere."""
    patching_threshold: float | None = None
    """Nats; None takes the checkpoint's."""
    run_ahead: Policy = "measured"
    """When the host launches work before it has read what earlier work gave: where measured times say that it pays,
    wherever it can, or not at all. No text depends on it. See `engine.step.ahead.policy`."""


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the server must know of a loaded model, without tensors."""

    name: str
    max_length: int
    vocab_size: int
    block_size: int | None
    decoders: tuple[str, ...] = ("blt",)
    parameters: int = 0
    pages: dict[str, int] = field(default_factory=dict)
    """Pages per pool."""
    patching: PatchingRule = PatchingRule()
