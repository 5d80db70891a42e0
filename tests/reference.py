"""The model as plain maths: the oracle that the engine is held to, and the shortest description of what it computes.

One uncached forward pass over one whole text, dense masks, one idea per function, nothing of the engine but its
configuration. Slow on purpose. Tensors are the canonical ones (`engine.checkpoint`), widened to `DTYPE`.

    entropies     bytes -> how sure the patcher is of each next byte        (BLT 2.3)
    patch_starts  entropies -> where patches start
    forward       bytes -> logits of each next byte                         (BLT 3)
    greedy        the most likely byte, again and again
    block_diffusion  blocks of masked bytes, unmasked pass by pass   (Fast BLT 3.1)
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import EOS_ID, ModelConfig, PatchingRule, StackConfig

DTYPE = torch.float32

PRIMES = (
    1000000007,
    5915587277,
    1500450271,
    3267000013,
    5754853343,
    4093082899,
    9576890767,
    3628273133,
    2860486313,
    5463458053,
    3367900313,
)

Weights = Mapping[str, Tensor]


def entropies(config: ModelConfig, tensors: Weights, ids: Sequence[int]) -> Tensor:
    """Entropy in nats of the patcher's next-byte distribution after each byte: (N,)."""
    w = _widened(tensors)
    x = w["model.patcher.embed_tokens.weight"][torch.tensor(ids)]
    visible = _visible_bytes(ids, config.patcher.window, config.isolate_documents)
    x = _stack(x, w, "model.patcher", config.patcher, visible)
    x = _rms_norm(x, w["model.patcher.norm.weight"], config.patcher.norm_eps)
    log_p = (x @ w["model.patcher.lm_head.weight"].T).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def patch_starts(rule: PatchingRule, entropies: Tensor | Sequence[float]) -> list[int]:
    """Indices of the bytes that start patches, the not yet existing byte N included if it starts one.

    Bytes 0 and 1 always do. First the natural starts, then every natural patch, the next byte's place counted in, is
    cut from its left end into chunks of `max_patch_length` (Meta's rule).
    """
    h = torch.as_tensor(entropies)
    count = len(h)
    if rule.mode == "bytes":
        return list(range(count + 1))
    above, rise = h > rule.threshold, h.diff(prepend=h[:1])
    natural = [0, 1]
    for byte in range(2, count + 1):
        if rule.monotonic:
            starts = byte == 2 or rise[byte - 1] > rule.threshold
        elif rule.threshold_add is not None:
            starts = byte == 2 or (byte >= 4 and above[byte - 1] and rise[byte - 1] > rule.threshold_add)
        else:
            starts = above[byte - 1]
        if starts:
            natural.append(byte)
    step = rule.max_patch_length or count + 1
    return [start for left, right in pairwise([*natural, count + 1]) for start in range(left, right, step)]


def forward(config: ModelConfig, tensors: Weights, ids: Sequence[int], block: Sequence[int] = ()) -> Tensor:
    """Logits of the byte after each byte: (N, vocab_size); behind them, of each cell of a block that follows `ids`.

    A block's cells see the text and each other, and all read the latent of the last patch, as if it ended with `ids`
    (Fast BLT 3.1.1).
    """
    w, count = _widened(tensors), len(ids)
    starts = patch_starts(config.patching, entropies(config, tensors, ids))
    patch_of = torch.searchsorted(torch.tensor(starts), torch.arange(count + 1), right=True) - 1
    own, num_patches = patch_of[:count], int(patch_of[count - 1]) + 1

    states, slots = _encode(config, w, ids, own, num_patches)

    # Global: patches see patches. One that holds an EOS ends its document.
    patches = slots.view(num_patches, -1)
    if config.projects_latent:
        patches = patches @ w["model.global_transformer.token_embedding_projection.weight"].T
    holds_eos = torch.zeros(num_patches, dtype=torch.bool)
    holds_eos[own[torch.tensor(ids) == EOS_ID]] = True
    visible = _visible(holds_eos, config.global_.window, config.isolate_documents and config.isolate_global)
    latents = _stack(patches, w, "model.global_transformer", config.global_, visible)

    # Decoder: the row that predicts byte j + 1 reads the latent before the patch that holds byte j + 1, and only that.
    if config.decoder_input == "embedding":
        y = w["model.local_decoder.embed_tokens.weight"][torch.tensor([*ids, *block])]
    else:
        y = states
    slots = (latents @ w["model.local_decoder.patch_embedding_projection.weight"].T).view(-1, config.decoder.dim)
    slot_patch = torch.arange(num_patches).repeat_interleave(config.slots)
    reads = torch.cat([patch_of[1:] - 1, torch.full((len(block),), num_patches - 1)])[:, None] == slot_patch
    no_ends = [*ids, *[-1] * len(block)]
    visible = _visible_bytes(no_ends, config.decoder.window, config.isolate_documents)
    visible[count:, count:] = True
    for i in range(config.decoder.num_layers):
        if i == 0 or config.decoder_cross_all_layers:
            y = y + _cross_attention(y, slots, w, f"model.local_decoder.cross_attn_layers.{i}", config.decoder, reads)
        y = _layer(y, w, f"model.local_decoder.layers.{i}", config.decoder, visible)
    return _rms_norm(y, w["model.local_decoder.norm.weight"], config.decoder.norm_eps) @ w["lm_head.weight"].T


def greedy(config: ModelConfig, tensors: Weights, ids: Sequence[int], n: int) -> list[int]:
    """The n ids that follow `ids`, each the most likely one, no id barred and none ending the text."""
    text = list(ids)
    for _ in range(n):
        text.append(int(forward(config, tensors, text)[-1].argmax()))
    return text[len(ids) :]


def block_diffusion(
    config: ModelConfig,
    tensors: Weights,
    ids: Sequence[int],
    n: int,
    size: int,
    settle: Callable[[Tensor], list[int]],
) -> list[int]:
    """At least n ids behind `ids`, block by block (Fast BLT, algorithm 1, greedy, without verification).

    settle: which rows of probabilities (masked cells, vocab_size) become bytes after a pass.
    """
    assert config.mask_id is not None
    text = list(ids)
    while len(text) < len(ids) + n:
        block = [config.mask_id] * size
        while config.mask_id in block:
            found = forward(config, tensors, text, block)[len(text) :]
            found[:, [0, 1, 3]] = float("-inf")
            masked = [place for place in range(size) if block[place] == config.mask_id]
            for row in settle(found[masked].softmax(-1)):
                block[masked[row]] = int(found[masked[row]].argmax())
        text += block
    return text[len(ids) :]


def hash_rows(config: ModelConfig, ids: Sequence[int]) -> list[list[int]]:
    """The row of every n-gram table for every byte: tables by bytes, tables function-major.

    Places before the text hold id 0, the oldest id has power 0, the sum wraps around as int64, the modulus is floored.
    """
    rows = []
    for prime in PRIMES[: config.hashes.num_functions]:
        for size in config.hashes.group_sizes:
            padded = [0] * (size - 1) + list(ids)
            totals = [sum(padded[j + i] * prime**i for i in range(size)) for j in range(len(ids))]
            rows.append([((total + 2**63) % 2**64 - 2**63) % config.hashes.rows for total in totals])
    return rows


def _encode(
    config: ModelConfig, w: Weights, ids: Sequence[int], own: Tensor, num_patches: int
) -> tuple[Tensor, Tensor]:
    """Byte states (N, d) and the patches' slots (num_patches * k, d)."""
    h = w["model.local_encoder.embed_tokens.weight"][torch.tensor(ids)]
    for t, rows in enumerate(hash_rows(config, ids)):
        h = h + w[f"model.encoder_hash_tok_embedding.{t}.weight"][torch.tensor(rows)]

    visible = _visible_bytes(ids, config.encoder.window, config.isolate_documents)
    holds = torch.arange(num_patches).repeat_interleave(config.slots)[:, None] == own
    slots = None
    last = config.encoder.num_layers - 1
    for i in range(config.encoder.num_layers):
        h = _layer(h, w, f"model.local_encoder.layers.{i}", config.encoder, visible)
        if i < last and not config.encoder_refine:
            continue
        if slots is None:
            pooled = torch.stack([h[own == p].amax(0) for p in range(num_patches)])
            slots = (pooled @ w["model.local_encoder.patch_embedding_projection.weight"].T).view(-1, config.encoder.dim)
        name = f"model.local_encoder.cross_attn_layers.{i}"
        if f"{name}.q_proj.weight" not in w:
            name = "model.local_encoder.cross_attn_layers.0"
        slots = slots + _cross_attention(slots, h, w, name, config.encoder, holds)
    assert slots is not None
    return h, slots


def _stack(x: Tensor, w: Weights, prefix: str, stack: StackConfig, visible: Tensor) -> Tensor:
    for i in range(stack.num_layers):
        x = _layer(x, w, f"{prefix}.layers.{i}", stack, visible)
    return x


def _layer(x: Tensor, w: Weights, prefix: str, stack: StackConfig, visible: Tensor) -> Tensor:
    """Pre-norm self-attention with rotary positions, then a SwiGLU feed-forward."""
    n = _rms_norm(x, w[f"{prefix}.input_layernorm.weight"], stack.norm_eps)
    q, k, v = (
        (n @ w[f"{prefix}.self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, stack.head_dim)) for p in ("q", "k", "v")
    )
    attended = _attention(_rope(q, stack.rope_theta), _rope(k, stack.rope_theta), v, visible)
    x = x + attended @ w[f"{prefix}.self_attn.o_proj.weight"].T
    m = _rms_norm(x, w[f"{prefix}.post_attention_layernorm.weight"], stack.norm_eps)
    gate, up = m @ w[f"{prefix}.mlp.gate_proj.weight"].T, m @ w[f"{prefix}.mlp.up_proj.weight"].T
    return x + (F.silu(gate) * up) @ w[f"{prefix}.mlp.down_proj.weight"].T


def _cross_attention(x: Tensor, states: Tensor, w: Weights, prefix: str, stack: StackConfig, visible: Tensor) -> Tensor:
    """x plus what its rows read from `states`; no positions. The callers add x once more, as both originals do."""
    q = _rms_norm(x, w[f"{prefix}.q_norm.weight"], stack.norm_eps) @ w[f"{prefix}.q_proj.weight"].T
    kv = _rms_norm(states, w[f"{prefix}.k_norm.weight"], stack.norm_eps)
    k, v = kv @ w[f"{prefix}.k_proj.weight"].T, kv @ w[f"{prefix}.v_proj.weight"].T
    attended = _attention(*(t.unflatten(-1, (-1, stack.head_dim)) for t in (q, k, v)), visible)
    return x + attended @ w[f"{prefix}.o_proj.weight"].T


def _attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """q (Q, heads, head_dim) over k, v (K, kv_heads, head_dim) where visible (Q, K): (Q, heads * head_dim)."""
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


def _rope(x: Tensor, theta: float) -> Tensor:
    """Turns the pairs (0, 1), (2, 3), ... of x (N, heads, head_dim), as complex numbers, by position * frequency."""
    count, _, dim = x.shape
    angles = torch.arange(count, dtype=x.dtype)[:, None] / theta ** (torch.arange(0, dim, 2, dtype=x.dtype) / dim)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def _visible_bytes(ids: Sequence[int], window: int | None, isolate: bool) -> Tensor:
    return _visible(torch.tensor(ids) == EOS_ID, window, isolate)


def _visible(ends: Tensor, window: int | None, isolate: bool) -> Tensor:
    """Which position (column) each position (row) sees: (N, N). `ends` marks the last position of a document."""
    distance = torch.arange(len(ends))[:, None] - torch.arange(len(ends))
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    if isolate:
        document = ends.cumsum(0) - ends.long()
        visible &= document[:, None] == document
    return visible


def _widened(tensors: Weights) -> Weights:
    return {name: tensor.to(DTYPE) for name, tensor in tensors.items()}
