"""The only table of tensor names and shapes.

Names are Hugging Face's, with one exception: in memory there is one hash table per (function, group size). Hugging
Face's files concatenate them into `FUSED_HASHES`.
"""

from ..config import ModelConfig, StackConfig

HASHES = "model.encoder_hash_tok_embedding"
FUSED_HASHES = f"{HASHES}.weight"
ENCODER = "model.local_encoder"
GLOBAL = "model.global_transformer"
DECODER = "model.local_decoder"
PATCHER = "model.patcher"

Shape = tuple[int, ...]


def hash_table(index: int) -> str:
    """Name of table function * len(group_sizes) + size_index."""
    return f"{HASHES}.{index}.weight"


def expected_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name and shape, in memory, of every tensor of a model with this configuration."""
    local, latent = config.encoder.dim, config.slots * config.encoder.dim
    shapes: dict[str, Shape] = {hash_table(t): (config.hashes.rows, local) for t in range(config.hashes.num_tables)}

    shapes[f"{ENCODER}.embed_tokens.weight"] = (config.vocab_size, local)
    shapes[f"{ENCODER}.patch_embedding_projection.weight"] = (latent, local)
    shapes |= _layers(ENCODER, config.encoder)
    shapes |= cross_attention(ENCODER, config.encoder, config.encoder.num_layers if config.encoder_refine else 1)

    if config.projects_latent:
        shapes[f"{GLOBAL}.token_embedding_projection.weight"] = (config.global_.dim, latent)
    shapes |= _layers(GLOBAL, config.global_)

    if config.decoder_input == "embedding":
        rows = config.vocab_size + (config.mask_id is not None)
        shapes[f"{DECODER}.embed_tokens.weight"] = (rows, local)
    shapes[f"{DECODER}.patch_embedding_projection.weight"] = (latent, config.global_.dim)
    shapes |= _layers(DECODER, config.decoder)
    shapes |= cross_attention(
        DECODER, config.decoder, config.decoder.num_layers if config.decoder_cross_all_layers else 1
    )
    shapes[f"{DECODER}.norm.weight"] = (local,)
    shapes["lm_head.weight"] = (config.vocab_size, local)

    shapes[f"{PATCHER}.embed_tokens.weight"] = (config.vocab_size, config.patcher.dim)
    shapes |= _layers(PATCHER, config.patcher)
    shapes[f"{PATCHER}.norm.weight"] = (config.patcher.dim,)
    shapes[f"{PATCHER}.lm_head.weight"] = (config.vocab_size, config.patcher.dim)
    return shapes


def cross_attention(prefix: str, stack: StackConfig, count: int) -> dict[str, Shape]:
    """The cross-attention layers 0..count-1 of an encoder or decoder."""
    kv = stack.num_kv_heads * stack.head_dim
    shapes: dict[str, Shape] = {}
    for i in range(count):
        layer = f"{prefix}.cross_attn_layers.{i}"
        shapes |= {
            f"{layer}.q_norm.weight": (stack.dim,),
            f"{layer}.k_norm.weight": (stack.dim,),
            f"{layer}.q_proj.weight": (stack.dim, stack.dim),
            f"{layer}.k_proj.weight": (kv, stack.dim),
            f"{layer}.v_proj.weight": (kv, stack.dim),
            f"{layer}.o_proj.weight": (stack.dim, stack.dim),
        }
    return shapes


def _layers(prefix: str, stack: StackConfig) -> dict[str, Shape]:
    kv = stack.num_kv_heads * stack.head_dim
    shapes: dict[str, Shape] = {}
    for i in range(stack.num_layers):
        layer = f"{prefix}.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (stack.dim,),
            f"{layer}.self_attn.q_proj.weight": (stack.dim, stack.dim),
            f"{layer}.self_attn.k_proj.weight": (kv, stack.dim),
            f"{layer}.self_attn.v_proj.weight": (kv, stack.dim),
            f"{layer}.self_attn.o_proj.weight": (stack.dim, stack.dim),
            f"{layer}.post_attention_layernorm.weight": (stack.dim,),
            f"{layer}.mlp.gate_proj.weight": (stack.ffn_dim, stack.dim),
            f"{layer}.mlp.up_proj.weight": (stack.ffn_dim, stack.dim),
            f"{layer}.mlp.down_proj.weight": (stack.dim, stack.ffn_dim),
        }
    return shapes
