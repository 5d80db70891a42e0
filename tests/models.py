"""Random models for the tests: Hugging Face's own, and ours in forms that Hugging Face does not have.

All are lively: logits with a standard deviation around 1, and a patching threshold that lies in the middle of the
patcher's entropies, so that patches of 1 to many bytes occur. Sizes are the least that exercise the shape.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers import BltConfig, BltForCausalLM

from engine.checkpoint import expected_shapes
from engine.config import HashConfig, ModelConfig, PatchingRule, StackConfig
from tests import reference

MEAN_PATCH = 3.5


def text(count: int, seed: int = 0, *, specials: bool = True) -> list[int]:
    """A BOS and `count` - 1 random ids from a small alphabet, so that n-grams repeat."""
    draw = random.Random(seed)
    alphabet = [*range(100, 120), 4, 131, 200, 259, *([0, 1, 2, 3] if specials else [])]
    return [1, *(draw.choice(alphabet) for _ in range(count - 1))]


def middle_threshold(values: Sequence[float], mean_patch: float = MEAN_PATCH) -> float:
    """A threshold in the middle of a gap between two entropies, exceeded by one in `mean_patch`."""
    ordered = sorted(values)
    at = round(len(ordered) * (1 - 1 / mean_patch))
    gap = max(range(at - 5, at + 5), key=lambda i: ordered[i + 1] - ordered[i])
    return (ordered[gap] + ordered[gap + 1]) / 2


def hf_model(
    seed: int = 0,
    *,
    slots: int = 2,
    dim: int = 32,
    global_dim: int = 64,
    encoder_layers: int = 1,
    encoder_cross_all: bool = False,
    decoder_cross_all: bool = True,
    window: int | None = 512,
    patcher_window: int | None = 512,
    group_sizes: Sequence[int] = (3, 4, 5, 6, 7, 8),
    functions: int = 1,
    rows: int = 211,
    kv_heads: int | None = None,
    mode: str = "entropy",
    mean_patch: float = MEAN_PATCH,
    max_positions: int = 4096,
    patcher_positions: int | None = None,
    vocab_size: int = 260,
) -> BltForCausalLM:
    """A random BLT made by Hugging Face's own classes, float32, eager attention."""
    local = dict(
        hidden_size=dim,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        intermediate_size=3 * dim,
        cross_attn_k=slots,
        hidden_size_global=global_dim,
        max_position_embeddings=max_positions,
    )
    config = BltConfig(
        vocab_size=vocab_size,
        cross_attn_k=slots,
        local_attention_window_len=window,
        encoder_hash_byte_group_size=list(group_sizes),
        encoder_hash_byte_group_vocab=rows,
        encoder_hash_byte_group_nb_functions=functions,
        patching_mode=mode,
        max_position_embeddings=max_positions,
        encoder_config=dict(
            **local, vocab_size=vocab_size, num_hidden_layers=encoder_layers, cross_attn_all_layers=encoder_cross_all
        ),
        decoder_config=dict(**local, num_hidden_layers=2, cross_attn_all_layers=decoder_cross_all),
        global_config=dict(
            hidden_size=global_dim,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            num_hidden_layers=2,
            intermediate_size=96,
            max_position_embeddings=max_positions,
        ),
        patcher_config=dict(
            vocab_size=vocab_size,
            hidden_size=32,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            num_hidden_layers=2,
            intermediate_size=64,
            sliding_window=patcher_window,
            max_position_embeddings=patcher_positions or max_positions,
        ),
        attn_implementation="eager",
    )
    torch.manual_seed(seed)
    model = BltForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            elif name.endswith("patcher.lm_head.weight"):
                parameter.mul_(2)
        entropies, _, _ = model.model.patcher(torch.tensor([text(400, 1234)]), patch_size=4, threshold=0.0)
    model.config.patching_threshold = middle_threshold(entropies[0].tolist(), mean_patch)
    return model


HF_MODELS: dict[str, Callable[[], BltForCausalLM]] = {
    "k2": partial(hf_model, 0),
    "k4-projection": partial(hf_model, 1, slots=4, global_dim=96, mean_patch=5.5),
    "k3-no-projection": partial(hf_model, 2, slots=3, dim=32, global_dim=96, decoder_cross_all=False),
    "2-encoder-layers": partial(hf_model, 3, encoder_layers=2),
    "2-encoder-layers-cross-all": partial(hf_model, 4, encoder_layers=2, encoder_cross_all=True, mean_patch=2.2),
    "windows-16-12": partial(hf_model, 5, window=16, patcher_window=12),
    "no-window": partial(hf_model, 6, window=None, patcher_window=None),
    "hash-2-functions": partial(hf_model, 7, group_sizes=(2, 4, 11), functions=2, rows=97),
    "gqa": partial(hf_model, 8, kv_heads=2, window=64, patcher_window=48),
    "64-patcher-positions": partial(hf_model, 10, patcher_positions=64, patcher_window=48),
    "264-ids": partial(hf_model, 11, vocab_size=264, group_sizes=(3, 5)),
    "every-byte": partial(hf_model, 9, mode="byte", window=32, group_sizes=(3,), rows=4099),
}


def hf_logits(model: BltForCausalLM, ids: Sequence[int]) -> torch.Tensor:
    """(N, vocab_size), by the only forward pass of Hugging Face's that is right: without its cache."""
    with torch.no_grad():
        return model(torch.tensor([list(ids)]), use_cache=False).logits[0]


def our_config(
    *,
    slots: int = 2,
    dim: int = 32,
    global_dim: int = 64,
    encoder_layers: int = 1,
    window: int | None = 24,
    patcher_window: int | None = 20,
    kv_heads: int = 4,
    hashes: HashConfig = HashConfig((3, 5, 8), 1, 211),
    patching: PatchingRule = PatchingRule(),
    max_positions: int = 4096,
    **forms: object,
) -> ModelConfig:
    """A tiny configuration of ours; `forms` are further fields of `ModelConfig`."""

    def stack(dim: int, layers: int, window: int | None, theta: float = 500000.0) -> StackConfig:
        return StackConfig(dim, layers, 4, kv_heads, 2 * dim, theta, max_positions, window)

    return ModelConfig(
        name="random",
        vocab_size=260,
        slots=slots,
        encoder=stack(dim, encoder_layers, window),
        global_=stack(global_dim, 2, None),
        decoder=stack(dim, 2, window),
        patcher=stack(32, 2, patcher_window, 10000.0),
        hashes=hashes,
        patching=patching,
        **forms,
    )


def our_model(config: ModelConfig, seed: int = 0) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The configuration with a threshold that suits them, and random tensors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_shapes(config).items():
        drawn = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            tensors[name] = 1 + 0.2 * drawn
        else:
            tensors[name] = drawn * shape[1] ** -0.5 * (2 if name.endswith("patcher.lm_head.weight") else 1)
    h = reference.entropies(config, tensors, text(400, 1234))
    rule = config.patching
    if rule.monotonic:
        rule = replace(rule, threshold=middle_threshold(h.diff().tolist()))
    else:
        rule = replace(
            rule, threshold=middle_threshold(h.tolist(), 2.0 if rule.threshold_add is not None else MEAN_PATCH)
        )
    return replace(config, patching=rule), tensors


OUR_MODELS: dict[str, Callable[[], tuple[ModelConfig, dict[str, Tensor]]]] = {
    "plain": lambda: our_model(our_config(), 20),
    "max-patch-length": lambda: our_model(our_config(patching=PatchingRule(max_patch_length=4)), 21),
    "monotonic": lambda: our_model(our_config(patching=PatchingRule(monotonic=True), window=None), 22),
    "threshold-add": lambda: our_model(our_config(patching=PatchingRule(threshold_add=0.1, max_patch_length=6)), 23),
    "fast-blt": lambda: our_model(
        our_config(
            decoder_input="embedding",
            mask_id=260,
            block_size=8,
            slots=4,
            global_dim=96,
            patching=PatchingRule(max_patch_length=8),
        ),
        24,
    ),
    "refine": lambda: our_model(our_config(encoder_layers=2, encoder_refine=True), 25),
    "gqa-isolated": lambda: our_model(our_config(kv_heads=2, isolate_documents=True), 26),
}
