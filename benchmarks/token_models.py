"""Llamas with random weights in llama.cpp's format (GGUF), made on demand and kept in a folder. Their vocabulary has a
size and no text, as speed does not depend on the text.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal, get_args

import torch

Format = Literal["f16", "bf16", "q8_0"]
"""How matrices are stored. q8_0: 32 numbers of 8 bits share a scale of 16."""
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True, slots=True)
class Llama:
    """The shape. The embedding is also the head."""

    name: str
    layers: int
    dim: int
    ffn_dim: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float = 500_000.0
    max_positions: int = 131_072

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in the order of the file; those with one dimension are norms."""
        wide, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = {
            "attn_norm": (self.dim,),
            "attn_q": (wide, self.dim),
            "attn_k": (kv, self.dim),
            "attn_v": (kv, self.dim),
            "attn_output": (self.dim, wide),
            "ffn_norm": (self.dim,),
            "ffn_gate": (self.ffn_dim, self.dim),
            "ffn_up": (self.ffn_dim, self.dim),
            "ffn_down": (self.dim, self.ffn_dim),
        }
        yield "token_embd.weight", (self.vocab_size, self.dim)
        for number in range(self.layers):
            yield from ((f"blk.{number}.{name}.weight", shape) for name, shape in layer.items())
        yield "output_norm.weight", (self.dim,)

    @property
    def parameters(self) -> int:
        return sum(prod(shape) for _, shape in self.tensors())

    @property
    def kv_row(self) -> int:
        """Bytes of a token's keys and values, in f16 as llama.cpp keeps them."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


LLAMAS = {
    "tiny": Llama("a tiny Llama", 2, 64, 128, 4, 2, 16, 512),
    "1b": Llama("Llama 3.2 1B", 16, 2048, 8192, 32, 8, 64, 128_256),
}
"""By the shape of ours that each is compared with."""


def token_model(work: Path, shape: str, form: Format) -> Path:
    """A GGUF file in `work` with the Llama of that shape, written there unless it exists."""
    path = work / f"llama-{shape}-{form}.gguf"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.unfinished")
        _write(unfinished, LLAMAS[shape], form)
        unfinished.replace(path)
    return path


def _write(path: Path, llama: Llama, form: Format) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(llama.vocab_size)
    writer.add_context_length(llama.max_positions)
    writer.add_embedding_length(llama.dim)
    writer.add_block_count(llama.layers)
    writer.add_feed_forward_length(llama.ffn_dim)
    writer.add_head_count(llama.heads)
    writer.add_head_count_kv(llama.kv_heads)
    writer.add_rope_dimension_count(llama.head_dim)
    writer.add_rope_freq_base(llama.rope_theta)
    writer.add_layer_norm_rms_eps(1e-5)
    generator = torch.Generator().manual_seed(0)
    stored = {}
    for name, shape in llama.tensors():
        if len(shape) == 1:
            writer.add_tensor(name, torch.ones(shape).numpy())
            continue
        # Every layer has the same numbers in its own memory: as much is read, but only a fifth is drawn.
        kind = name.split(".")[-2]
        if kind not in stored:
            # So that activations stay of order 1.
            drawn = torch.empty(shape).normal_(0, shape[-1] ** -0.5, generator=generator)
            stored[kind] = quantize(drawn.numpy(), GGMLQuantizationType[form.upper()])
        writer.add_tensor(name, stored[kind], raw_dtype=GGMLQuantizationType[form.upper()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
