"""The model as one differentiable pass over a padded batch, for training.

The same maths as the engine's stages on the same canonical tensors, without caches: `weights` is what
`engine.checkpoint` saves. Rows are matrix products in `dtype`; the residual streams stay float32. All runs on the
device of its tensors; only `patch` waits for it, once, for the number of patches.

    patch       texts -> where patches start, by the patcher, as when served (BLT 2.3)
    encode      texts, patches -> byte states, and patches from them                  (BLT 3.2)
    latents     patches -> the global transformer's output after each patch           (BLT 3.1)
    clean_rows  texts, patches -> all of these, and the decoder's rows of the texts    (BLT 3.3)
    block_rows  corrupted blocks after clean rows -> the decoder's rows of their cells (Fast BLT 3.2)
    logits      rows -> the next byte

Every form of a model that the engine serves is here too, with one limit: a text is one document, so nothing follows its
EOS but padding.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from engine.config import ModelConfig, PatchingRule, StackConfig
from kernels.hash_embed import ngram_hashes

Weights = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Patches:
    """The patches of a batch of texts, int64.

    own (B, T): the patch that holds each byte. reads (B, T): the patch whose latent each byte's decoder row reads,
    the one before the patch that holds the next byte. starts (B, M): first byte, T for no patch.
    counts (B,): patches per text.
    """

    own: Tensor
    reads: Tensor
    starts: Tensor
    counts: Tensor


@dataclass(frozen=True, slots=True)
class Blocks:
    """Corrupted blocks after the clean rows (Fast BLT 3.2): S blocks of K cells per text.

    ids (B, S, K): cells' ids, some of them [MASK]. starts (B, S): the original index of each block's first cell.
    patches (B, S): the patch that ends just before the block, whose latent its cells read.
    """

    ids: Tensor
    starts: Tensor
    patches: Tensor

    @property
    def positions(self) -> Tensor:
        """The original index of each cell: (B, S * K)."""
        return (self.starts[..., None] + torch.arange(self.ids.shape[-1], device=self.ids.device)).flatten(1)


@dataclass(frozen=True, slots=True)
class Clean:
    """The decoder's rows of a batch of texts, and what the rows of blocks need of them.

    reads (B, T): of `Patches`. slots (B, M, k, d): of `latents`. rows (B, T, d): after the last layer. past: keys and
    values of each layer, (B, KH, T, hd) each.
    """

    reads: Tensor
    slots: Tensor
    rows: Tensor
    past: tuple[tuple[Tensor, Tensor], ...]

    def of(self, count: int) -> "Clean":
        """The first `count` texts."""
        return self._each(lambda tensor: tensor[:count])

    def apart(self) -> "Clean":
        """The same values, from which gradients go no further."""
        return self._each(lambda tensor: tensor.detach().requires_grad_(tensor.is_floating_point()))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Clean":
        past = tuple((change(k), change(v)) for k, v in self.past)
        return Clean(change(self.reads), change(self.slots), change(self.rows), past)


def joined(first: Blocks, second: Blocks) -> Blocks:
    """The blocks of both, for the same texts."""
    return Blocks(*(torch.cat([getattr(b, f.name) for b in (first, second)], 1) for f in fields(Blocks)))


def initial_weights(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Initial float32 weights: unit-gain matrices, and zero outputs of every residual branch."""
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            weights[name] = torch.ones(shape)
        elif name.endswith(("o_proj.weight", "down_proj.weight")) or "lm_head" in name:
            weights[name] = torch.zeros(shape)
        else:
            std = 0.1 if "embed" in name and "projection" not in name else shape[1] ** -0.5
            weights[name] = torch.randn(shape, generator=draw) * std
    return weights


def patcher_logits(config: ModelConfig, weights: Weights, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Next-byte logits of the patcher, ids (B, T) -> (B, T, vocab) float32."""
    positions = torch.arange(ids.shape[1], device=ids.device)
    x = F.embedding(ids, weights["model.patcher.embed_tokens.weight"]).float()
    x = _stack(x, weights, "model.patcher", config.patcher, positions, dtype)
    return _project(
        norm(x, weights, "model.patcher.norm", config.patcher, dtype), weights, "model.patcher.lm_head"
    ).float()


def entropies(config: ModelConfig, weights: Weights, ids: Tensor) -> Tensor:
    """The patcher's entropy of the byte after each byte, in nats: (B, T)."""
    log_p = patcher_logits(config, weights, ids).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def patch(rule: PatchingRule, entropy: Tensor) -> Patches:
    """Cuts texts into patches by entropy (B, T), including the place of the next byte, as `kernels.boundary` does."""
    (count, length), device = entropy.shape, entropy.device
    index = torch.arange(length + 1, device=device)
    opens = torch.ones(count, length + 1, dtype=torch.bool, device=device)
    if rule.mode == "entropy":
        after, rise = entropy[:, 1:], entropy.diff(dim=1)
        # The first differences of entropies are undefined.
        if rule.monotonic:
            opens[:, 3:] = rise[:, 1:] > rule.threshold
        elif rule.threshold_add is not None:
            opens[:, 3:4] = False
            opens[:, 4:] = (after[:, 2:] > rule.threshold) & (rise[:, 2:] > rule.threshold_add)
        else:
            opens[:, 2:] = after > rule.threshold
    if rule.max_patch_length is not None:
        since = index - torch.where(opens, index, 0).cummax(1).values
        opens = since % rule.max_patch_length == 0
    patch_of = opens.cumsum(1) - 1
    own, reads = patch_of[:, :-1], patch_of[:, 1:] - 1
    counts = own[:, -1] + 1
    starts = torch.full((count, int(counts.max()) + 2), length, device=device)
    starts.scatter_(1, torch.where(opens, patch_of, starts.shape[1] - 1), index.expand(count, -1))
    starts = starts[:, :-1].clamp(max=length)
    starts = starts.masked_fill(index[: starts.shape[1]] > counts[:, None], length)
    return Patches(own, reads, starts[:, :-1], counts)


def encode(
    config: ModelConfig, weights: Weights, ids: Tensor, patches: Patches, dtype: torch.dtype, *, recompute: bool = False
) -> tuple[Tensor, Tensor]:
    """The encoder's byte states (B, T, d), and each patch's slots (B, M, k, d), of ids (B, T)."""
    enc, count = config.encoder, patches.starts.shape[1]
    reach = max(config.hashes.group_sizes)
    windows = F.pad(ids, (reach - 1, 0)).unfold(1, reach, 1).flatten(0, 1)
    rows = ngram_hashes(windows, config.hashes.group_sizes, config.hashes.num_functions, config.hashes.rows)
    x = F.embedding(ids, weights["model.local_encoder.embed_tokens.weight"]).float()
    for t in range(config.hashes.num_tables):
        table = weights[f"model.encoder_hash_tok_embedding.{t}.weight"]
        x = x + F.embedding(rows[:, t].view_as(ids), table)

    turns, slots = rotary(torch.arange(ids.shape[1], device=ids.device), enc), None
    for i in range(enc.num_layers):
        name = f"model.local_encoder.layers.{i}"
        x, _, _ = _run(_layer, x, weights, name, enc, turns, dtype, recompute=recompute)
        if not (config.encoder_refine or i == enc.num_layers - 1):
            continue
        if slots is None:
            pooled = _greatest(x, patches.own, count)
            slots = _project(pooled.to(dtype), weights, "model.local_encoder.patch_embedding_projection")
            slots = slots.unflatten(-1, (config.slots, enc.dim)).float()
        name = f"model.local_encoder.cross_attn_layers.{i if config.encoder_refine else 0}"
        read = _run(_read_bytes, slots, x, patches.own, weights, name, enc, dtype, recompute=recompute)
        slots = 2 * slots + read
    assert slots is not None
    return x, slots


def latents(
    config: ModelConfig, weights: Weights, slots: Tensor, dtype: torch.dtype, *, recompute: bool = False
) -> Tensor:
    """The encoder's slots of every patch (B, M, k, d) -> the decoder's (B, M, k, d)."""
    x = slots.flatten(2)
    if config.projects_latent:
        x = _project(x.to(dtype), weights, "model.global_transformer.token_embedding_projection").float()
    turns = rotary(torch.arange(x.shape[1], device=x.device), config.global_)
    for i in range(config.global_.num_layers):
        name = f"model.global_transformer.layers.{i}"
        x, _, _ = _run(_layer, x, weights, name, config.global_, turns, dtype, recompute=recompute)
    out = _project(x.to(dtype), weights, "model.local_decoder.patch_embedding_projection")
    return out.unflatten(-1, (config.slots, config.decoder.dim)).float()


def clean_rows(
    config: ModelConfig, weights: Weights, ids: Tensor, patches: Patches, dtype: torch.dtype, *, recompute: bool = False
) -> Clean:
    """The decoder's rows of texts ids (B, T), by way of `encode` and `latents`. They attend causally.

    recompute: layers keep only their inputs, and run again for their gradients.
    """
    states, slots = encode(config, weights, ids, patches, dtype, recompute=recompute)
    slots = latents(config, weights, slots, dtype, recompute=recompute)
    y = states if config.decoder_input == "encoder" else embedded(weights, ids)
    turns, past = rotary(torch.arange(ids.shape[1], device=ids.device), config.decoder), []
    for i in range(config.decoder.num_layers):
        y = with_latent(config, weights, i, y, slots, patches.reads, dtype, recompute=recompute)
        name = f"model.local_decoder.layers.{i}"
        y, k, v = _run(_layer, y, weights, name, config.decoder, turns, dtype, recompute=recompute)
        # Views of wider arrays, which recomputing is not to keep.
        past.append((k.contiguous(), v.contiguous()) if recompute else (k, v))
    return Clean(patches.reads, slots, y, tuple(past))


def block_rows(
    config: ModelConfig, weights: Weights, clean: Clean, blocks: Blocks, dtype: torch.dtype, *, recompute: bool = False
) -> Tensor:
    """The decoder's rows of the blocks' cells, (B, S, K, d).

    A cell attends to the clean rows before its block and to its whole block; its position is its original index. For a
    decoder with a byte table of its own.
    """
    dec, (_, length) = config.decoder, clean.reads.shape
    y, reads = embedded(weights, blocks.ids.flatten(1)), _repeated(blocks.patches, blocks.ids.shape[2])
    turns, unseen = rotary(blocks.positions, dec), _block_mask(blocks, length, dec.window).to(dtype)
    for i, (keys, values) in enumerate(clean.past):
        y = with_latent(config, weights, i, y, clean.slots, reads, dtype, recompute=recompute)
        name = f"model.local_decoder.layers.{i}"
        y = _run(_block_layer, y, keys, values, unseen, weights, name, dec, turns, dtype, recompute=recompute)
    return y.unflatten(1, blocks.ids.shape[1:])


def logits(config: ModelConfig, weights: Weights, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The decoder's rows (..., d) -> (..., vocab) float32."""
    return _project(norm(rows, weights, "model.local_decoder.norm", config.decoder, dtype), weights, "lm_head").float()


def embedded(weights: Weights, ids: Tensor) -> Tensor:
    """The decoder's own rows for ids, float32."""
    return F.embedding(ids, weights["model.local_decoder.embed_tokens.weight"]).float()


def with_latent(
    config: ModelConfig,
    weights: Weights,
    layer: int,
    y: Tensor,
    slots: Tensor,
    reads: Tensor,
    dtype: torch.dtype,
    *,
    recompute: bool = False,
) -> Tensor:
    """Rows y (B, R, d) with what they read before a decoder's layer of the latents `reads` (B, R)."""
    if layer and not config.decoder_cross_all_layers:
        return y
    name = f"model.local_decoder.cross_attn_layers.{layer}"
    read: Tensor = _run(_read_latent, y, slots, reads, weights, name, config.decoder, dtype, recompute=recompute)
    return 2 * y + read


def _block_mask(blocks: Blocks, length: int, window: int | None) -> Tensor:
    """0 where a cell sees a clean row or another cell, -inf elsewhere: (B, 1, S * K, T + S * K)."""
    _, count, size = blocks.ids.shape
    cells, device = blocks.positions, blocks.ids.device
    clean = torch.arange(length, device=device)
    seen = clean < _repeated(blocks.starts, size)[..., None]
    if window is not None:
        seen &= clean > cells[..., None] - window
    block = torch.arange(count * size, device=device) // size
    own = (block[:, None] == block).expand(len(cells), -1, -1)
    return torch.where(torch.cat([seen, own], 2), 0.0, float("-inf"))[:, None]


def _repeated(x: Tensor, count: int) -> Tensor:
    """Every element `count` times in a row, (B, S) -> (B, S * count)."""
    return x[..., None].expand(-1, -1, count).flatten(1)


def _greatest(x: Tensor, own: Tensor, count: int) -> Tensor:
    """The greatest of each patch's bytes, x (B, T, d) -> (B, count, d); 0 for patches without bytes."""
    index = own[..., None].expand_as(x)
    return x.new_zeros(len(x), count, x.shape[2]).scatter_reduce(1, index, x, "amax", include_self=False)


def _read_bytes(
    slots: Tensor, x: Tensor, own: Tensor, weights: Weights, name: str, stack: StackConfig, dtype: torch.dtype
) -> Tensor:
    """Cross-attention of the k slots of each patch over the patch's own bytes: (B, M, k, d).

    Each byte is scored by the slots of its patch, and the softmax is a sum over the patch, however long it is.
    """
    count, heads = slots.shape[1], (stack.num_kv_heads, stack.num_heads // stack.num_kv_heads)
    key_value = _project(norm(x, weights, f"{name}.k_norm", stack, dtype), weights, f"{name}.k_proj", f"{name}.v_proj")
    key, value = key_value.unflatten(-1, (2, 1, stack.num_kv_heads, 1, stack.head_dim)).unbind(2)
    query = _project(norm(slots, weights, f"{name}.q_norm", stack, dtype), weights, f"{name}.q_proj")
    asked = gather(query.flatten(2), own).unflatten(-1, (slots.shape[2], *heads, stack.head_dim))
    scores = ((asked * key).sum(-1).float() * stack.head_dim**-0.5).flatten(2)
    share = (scores - gather(_greatest(scores.detach(), own, count), own)).exp()
    total = torch.zeros_like(share[:, :1]).expand(-1, count, -1).scatter_add(1, own[..., None].expand_as(share), share)
    share = (share / gather(total, own)).to(dtype).unflatten(-1, (slots.shape[2], *heads, 1))
    weighed = (share * value).flatten(2)
    read = weighed.new_zeros(len(weighed), count, weighed.shape[2])
    read = read.scatter_add(1, own[..., None].expand_as(weighed), weighed)
    return _project(read.unflatten(-1, (slots.shape[2], -1)), weights, f"{name}.o_proj")


def _read_latent(
    y: Tensor, slots: Tensor, reads: Tensor, weights: Weights, name: str, stack: StackConfig, dtype: torch.dtype
) -> Tensor:
    """Cross-attention of each row over the k slots of its latent: (B, R, d)."""
    key_value = _project(
        norm(slots, weights, f"{name}.k_norm", stack, dtype), weights, f"{name}.k_proj", f"{name}.v_proj"
    )
    read = gather(key_value.flatten(2), reads)
    read = read.unflatten(-1, (slots.shape[2], 2, stack.num_kv_heads, 1, stack.head_dim))
    key, value = read.unbind(3)
    query = _project(norm(y, weights, f"{name}.q_norm", stack, dtype), weights, f"{name}.q_proj")
    query = query.unflatten(-1, (1, stack.num_kv_heads, -1, stack.head_dim))
    attend = ((query * key).sum(-1).float() * stack.head_dim**-0.5).softmax(2).to(dtype)
    return _project((attend[..., None] * value).sum(2).flatten(2), weights, f"{name}.o_proj")


def _stack(
    x: Tensor, weights: Weights, prefix: str, stack: StackConfig, positions: Tensor, dtype: torch.dtype
) -> Tensor:
    turns = rotary(positions, stack)
    for i in range(stack.num_layers):
        x, _, _ = _layer(x, weights, f"{prefix}.layers.{i}", stack, turns, dtype)
    return x


def _run(function: Callable[..., Any], *of: Any, recompute: bool) -> Any:
    """function(*of); recompute: without keeping what its gradients need, which is computed again for them."""
    return checkpoint(function, *of, use_reentrant=False) if recompute else function(*of)


def _layer(
    x: Tensor, weights: Weights, prefix: str, stack: StackConfig, turns: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """One transformer layer over x (B, R, dim), and its keys and values (B, KH, R, hd)."""
    q, k, v = queries_keys_values(x, weights, prefix, stack, turns, dtype)
    return after_attention(x, _causal(q, k, v, stack.window), weights, prefix, stack, dtype), k, v


def _block_layer(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    unseen: Tensor,
    weights: Weights,
    prefix: str,
    stack: StackConfig,
    turns: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """One transformer layer over block cells x (B, S * K, dim), after clean rows with `keys` and `values`."""
    q, k, v = queries_keys_values(x, weights, prefix, stack, turns, dtype)
    attended = _attend(q, torch.cat([keys, k], 2), torch.cat([values, v], 2), unseen)
    return after_attention(x, attended, weights, prefix, stack, dtype)


def queries_keys_values(
    x: Tensor, weights: Weights, prefix: str, stack: StackConfig, turns: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The heads of a layer over x (B, R, dim): queries (B, H, R, hd), keys and values (B, KH, R, hd)."""
    attn, heads, kv_heads = f"{prefix}.self_attn", stack.num_heads, stack.num_kv_heads
    n = norm(x, weights, f"{prefix}.input_layernorm", stack, dtype)
    qkv = _project(n, weights, f"{attn}.q_proj", f"{attn}.k_proj", f"{attn}.v_proj").unflatten(-1, (-1, stack.head_dim))
    turned = _turned(qkv[:, :, : heads + kv_heads].float(), turns).to(dtype).transpose(1, 2)
    return turned[:, :heads], turned[:, heads:], qkv[:, :, heads + kv_heads :].transpose(1, 2)


def after_attention(
    x: Tensor, attended: Tensor, weights: Weights, prefix: str, stack: StackConfig, dtype: torch.dtype
) -> Tensor:
    """The rest of a layer: x (B, R, dim) and what its heads attended to (B, H, R, hd) -> (B, R, dim)."""
    x = x + _project(attended.transpose(1, 2).flatten(2), weights, f"{prefix}.self_attn.o_proj")
    m = norm(x, weights, f"{prefix}.post_attention_layernorm", stack, dtype)
    gate, up = _project(m, weights, f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj").chunk(2, -1)
    return x + _project(F.silu(gate) * up, weights, f"{prefix}.mlp.down_proj")


def _causal(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Causal attention, (B, H, T, hd); a window is walked in chunks of its own length, each seeing one chunk back."""
    length = q.shape[2]
    if window is None or length <= window:
        return _attend(q, k, v)
    spare = -length % window
    q, k, v = F.pad(q, (0, 0, 0, spare)), F.pad(k, (0, 0, window, spare)), F.pad(v, (0, 0, window, spare))
    chunks = q.shape[2] // window
    q = q.unflatten(2, (chunks, window)).transpose(1, 2).flatten(0, 1)
    k, v = (t.unfold(2, 2 * window, window).permute(0, 2, 1, 4, 3).flatten(0, 1) for t in (k, v))
    index = torch.arange(2 * window, device=q.device)
    ahead = index - index[:window, None]
    seen = ((ahead > 0) & (ahead <= window)).expand(chunks, -1, -1).clone()
    seen[0, :, :window] = False
    seen = torch.where(seen, 0.0, float("-inf")).to(q.dtype).repeat(len(q) // chunks, 1, 1)[:, None]
    out = _attend(q, k, v, seen)
    return out.unflatten(0, (-1, chunks)).transpose(1, 2).flatten(2, 3)[:, :, :length]


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention with an additive `bias` on its scores, or causal without one.

    Two plain products for bfloat16 heads on a CPU, which has instructions for them: torch's fused attention computes in
    float32 there, and took 2.5 times as long with heads of 64.
    """
    gqa = q.shape[1] != k.shape[1]
    if q.device.type != "cpu" or q.dtype == torch.float32 or gqa:
        return F.scaled_dot_product_attention(q, k, v, bias, is_causal=bias is None, enable_gqa=gqa)
    if bias is None:
        bias = torch.full((q.shape[2], k.shape[2]), float("-inf"), dtype=q.dtype).triu(1)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    return scores.add_(bias).softmax(-1) @ v


def rotary(positions: Tensor, stack: StackConfig) -> Tensor:
    """Cosines and sines of the rotary angles: (2, ..., R, 1, head_dim / 2)."""
    frequencies = stack.rope_theta ** (-torch.arange(0, stack.head_dim, 2, device=positions.device) / stack.head_dim)
    angles = positions[..., None, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()])


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """x (B, R, H, head_dim) with its neighbouring pairs rotated. Not with complex numbers, which compilers do not
    support."""
    (a, b), (cos, sin) = x.unflatten(-1, (-1, 2)).unbind(-1), turns
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def norm(x: Tensor, weights: Weights, name: str, stack: StackConfig, dtype: torch.dtype) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weights[f"{name}.weight"], stack.norm_eps).to(dtype)


def _project(x: Tensor, weights: Weights, *names: str) -> Tensor:
    """x times one or more concatenated matrices, in x's dtype."""
    matrices = [weights[f"{name}.weight"] for name in names]
    return F.linear(x, (matrices[0] if len(matrices) == 1 else torch.cat(matrices)).to(x.dtype))


def gather(x: Tensor, index: Tensor) -> Tensor:
    """x (B, N, C) at index (B, ...) -> (B, ..., C)."""
    offset = torch.arange(len(x), device=x.device).view(-1, *[1] * (index.dim() - 1)) * x.shape[1]
    return F.embedding(index + offset, x.flatten(0, 1))
