"""The bytes that decoding reads: by the paper's formula, and as the engine counts them."""

from dataclasses import dataclass

from kernels import attention, cross_attention, hash_embed, linear

from ..checkpoint import count_parameters
from ..config import ModelConfig, StackConfig
from ..memory.caches import decoder_cross_layers, encoder_cross_layers


@dataclass(frozen=True, slots=True)
class PaperFormula:
    """Fast BLT 4.2: b (N_dec P_dec + N_enc (P_enc + P_glob)) bytes; encoder and global are counted together.

    It leaves out the patcher, K/V and look-ups. b, the bytes of a parameter, is 2 in the paper.
    """

    decoder: float
    encoder: float
    global_: float
    bytes_per_parameter: int = 2

    @classmethod
    def of(cls, config: ModelConfig, bytes_per_parameter: int) -> "PaperFormula":
        """Of all parameters but the patcher's and the hash tables'."""
        count = count_parameters(config)
        return cls(count["decoder"] + count["head"], count["encoder"], count["global"], bytes_per_parameter)

    def bytes(self, decoder_calls: float, global_calls: float) -> float:
        return sum(self.by_stage(decoder_calls, global_calls).values())

    def by_stage(self, decoder_calls: float, global_calls: float) -> dict[str, float]:
        return {
            "encoder": self.bytes_per_parameter * global_calls * self.encoder,
            "global": self.bytes_per_parameter * global_calls * self.global_,
            "decoder": self.bytes_per_parameter * decoder_calls * self.decoder,
        }


@dataclass(frozen=True, slots=True)
class StageBytes:
    """Bytes that the stages read.

    weights: per stage, once per call. Closing a patch belongs to the global stage: the encoder's cross-attention, the
    global transformer, the latent's projection and its keys and values. kv_row: per stage, for each row of its cache
    that is read. row: per stage, the look-ups of every row: embeddings, hash rows, its latent's keys and values.
    """

    weights: dict[str, int]
    kv_row: dict[str, int]
    row: dict[str, int]

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        itemsize: int,
        hash_itemsize: int,
        *,
        matrix_itemsize: int | None = None,
        fp8: bool = False,
    ) -> "StageBytes":
        """Sums the kernels' own counts. fp8: the large matrices take a byte per number."""
        enc, glob, dec, pat = config.encoder, config.global_, config.decoder, config.patcher
        encoder_cross, decoder_cross = encoder_cross_layers(config), decoder_cross_layers(config)

        def matrix(out: int, width: int, *, norm: bool = False, exact: bool = False) -> int:
            norms = width * itemsize * norm
            return linear.traffic(0, out, width, matrix_itemsize or itemsize, fp8=fp8 and not exact).read + norms

        def stack(of: StackConfig, *, exact: bool = False) -> int:
            layer = (
                matrix(of.dim + 2 * _kv_width(of), of.dim, norm=True, exact=exact)
                + matrix(of.dim, of.dim, exact=exact)
                + matrix(2 * of.ffn_dim, of.dim, norm=True, exact=exact)
                + matrix(of.dim, of.ffn_dim, exact=exact)
            )
            return of.num_layers * layer

        def kv_row(of: StackConfig) -> int:
            return of.num_layers * attention.traffic(0, 1, of.num_heads, of.num_kv_heads, of.head_dim, itemsize).read

        def head(of: StackConfig) -> int:
            return matrix(config.vocab_size, of.dim, norm=True, exact=True)

        slots = config.slots
        latent = cross_attention.traffic(1, slots, 0, dec.num_kv_heads, dec.head_dim, itemsize).read
        hashed = hash_embed.traffic(1, enc.dim, config.hashes.num_tables, 0, itemsize, hash_itemsize).read
        return cls(
            weights={
                "patcher": stack(pat, exact=True) + head(pat),
                "encoder": stack(enc) + encoder_cross * matrix(2 * _kv_width(enc), enc.dim, norm=True),
                "global": (
                    matrix(slots * enc.dim, enc.dim)
                    + encoder_cross * (matrix(enc.dim, enc.dim, norm=True) + matrix(enc.dim, enc.dim))
                    + (matrix(glob.dim, slots * enc.dim) if config.projects_latent else 0)
                    + stack(glob)
                    + matrix(slots * dec.dim, glob.dim)
                    + decoder_cross * matrix(2 * _kv_width(dec), dec.dim, norm=True)
                ),
                "decoder": (
                    stack(dec)
                    + decoder_cross * (matrix(dec.dim, dec.dim, norm=True) + matrix(dec.dim, dec.dim))
                    + head(dec)
                ),
            },
            kv_row={"patcher": kv_row(pat), "encoder": kv_row(enc), "global": kv_row(glob), "decoder": kv_row(dec)},
            row={
                "patcher": pat.dim * itemsize,
                "encoder": hashed,
                "global": 0,
                "decoder": decoder_cross * latent + dec.dim * itemsize,
            },
        )


def _kv_width(stack: StackConfig) -> int:
    return stack.num_kv_heads * stack.head_dim
