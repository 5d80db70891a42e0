"""What decoding reads, in bytes: by the paper's formula and by what the engine does."""

from dataclasses import dataclass, field

from .caches import CacheSpec, decoder_cross_layers, encoder_cross_layers
from .config import ModelConfig, StackConfig

STAGES = ("patcher", "encoder", "global", "decoder")


@dataclass(frozen=True, slots=True)
class PaperFormula:
    """Fast BLT 4.2: b (N_dec P_dec + N_enc (P_enc + P_glob)) bytes; encoder and global are counted together.

    Patcher, K/V and look-ups are not in it. b, the bytes of a parameter, is 2 there.
    """

    decoder: float
    encoder_and_global: float
    bytes_per_parameter: int = 2

    def bytes(self, decoder_calls: float, global_calls: float) -> float:
        return self.bytes_per_parameter * (decoder_calls * self.decoder + global_calls * self.encoder_and_global)


@dataclass(slots=True)
class Cost:
    """What decoding has cost, a prompt's prefill left out."""

    committed: int = 0
    decoder_calls: int = 0
    global_calls: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    bytes_read: float = 0.0

    def add(self, other: "Cost") -> None:
        for name in ("committed", "decoder_calls", "global_calls", "rounds", "drafted", "accepted", "bytes_read"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for stage, count in other.rows.items():
            self.rows[stage] += count


@dataclass(frozen=True, slots=True)
class StageBytes:
    """Bytes that the stages read.

    weights: per stage, once per call. Closing a patch is the global stage's: the encoder's cross-attention, the global
    transformer, the latent's projection and its keys and values. kv_row: per stage, a row of its cache that is looked
    at. row: per stage, what every row looks up: embeddings, hash rows, its latent's keys and values.
    """

    weights: dict[str, int]
    kv_row: dict[str, int]
    row: dict[str, int]

    @classmethod
    def of(cls, config: ModelConfig, specs: dict[str, CacheSpec], itemsize: int, hash_itemsize: int) -> "StageBytes":
        enc, glob, dec, pat = config.encoder, config.global_, config.decoder, config.patcher
        closing = (
            config.slots * enc.dim * enc.dim
            + encoder_cross_layers(config) * (2 * enc.dim * enc.dim + enc.dim)
            + glob.num_layers * _layer(glob)
            + config.projects_latent * config.slots * enc.dim * glob.dim
            + config.slots * dec.dim * glob.dim
            + decoder_cross_layers(config) * (2 * dec.dim * _kv_width(dec) + dec.dim)
        )
        weights = {
            "patcher": pat.num_layers * _layer(pat) + pat.dim + config.vocab_size * pat.dim,
            "encoder": enc.num_layers * _layer(enc)
            + encoder_cross_layers(config) * (2 * enc.dim * _kv_width(enc) + enc.dim),
            "global": closing,
            "decoder": dec.num_layers * _layer(dec)
            + decoder_cross_layers(config) * (2 * dec.dim * dec.dim + dec.dim)
            + dec.dim
            + config.vocab_size * dec.dim,
        }
        return cls(
            weights={stage: count * itemsize for stage, count in weights.items()},
            kv_row={stage: specs[stage].row_elements * itemsize for stage in STAGES},
            row={
                "patcher": pat.dim * itemsize,
                "encoder": enc.dim * (itemsize + config.hashes.num_tables * hash_itemsize),
                "global": 0,
                "decoder": (specs["latent"].row_elements + dec.dim) * itemsize,
            },
        )


def _kv_width(stack: StackConfig) -> int:
    return stack.num_kv_heads * stack.head_dim


def _layer(stack: StackConfig) -> int:
    """Parameters of one transformer layer."""
    return 2 * stack.dim * (stack.dim + _kv_width(stack)) + 3 * stack.dim * stack.ffn_dim + 2 * stack.dim
