"""The table of every model family: the names of its tensors in a checkpoint on disk, and the roles of their axes.

Read a table next to the family's `modeling_*.py` in transformers. A linear layer's weight has shape (outputs, inputs),
so `q_proj: "query, residual"` says that its rows are query heads and its columns read the residual stream. `spaces`
explains the roles. Parts that several families share are written only once, and a comment on each family says what is
special about it.

Biases are always listed, because a config can switch them on or off. They are optional in a checkpoint.
"""

from mpunlearn.architecture.spaces import Family

_LAYER = "model.layers.{layer}."


def _in_layer(table: dict[str, str], prefix: str = _LAYER) -> dict[str, str]:
    """The table of one layer, with the layer's prefix added to every name."""
    return {prefix + name: roles for name, roles in table.items()}


_OUTSIDE = {
    "model.embed_tokens.weight": "vocabulary, residual",
    "model.norm.weight": "norm",
    "lm_head.weight": "vocabulary, residual",
}
_ATTENTION = _in_layer(
    {
        "self_attn.q_proj.weight": "query, residual",
        "self_attn.q_proj.bias": "query",
        "self_attn.k_proj.weight": "key, residual",
        "self_attn.k_proj.bias": "key",
        "self_attn.v_proj.weight": "value, residual",
        "self_attn.v_proj.bias": "value",
        "self_attn.o_proj.weight": "residual, attended",
        "self_attn.o_proj.bias": "residual",
    }
)
_FFN = _in_layer(
    {
        "mlp.gate_proj.weight": "gate, residual",
        "mlp.gate_proj.bias": "gate",
        "mlp.up_proj.weight": "ffn, residual",
        "mlp.up_proj.bias": "ffn",
        "mlp.down_proj.weight": "residual, ffn",
        "mlp.down_proj.bias": "residual",
    }
)
_NORMS_BEFORE = _in_layer({"input_layernorm.weight": "norm", "post_attention_layernorm.weight": "norm"})
_NORMS_AFTER = _in_layer({"post_attention_layernorm.weight": "norm", "post_feedforward_layernorm.weight": "norm"})
_NORMS_AROUND = {**_NORMS_BEFORE, **_NORMS_AFTER, **_in_layer({"pre_feedforward_layernorm.weight": "norm"})}
_NORM_PER_HEAD = _in_layer({"self_attn.q_norm.weight": "head norm", "self_attn.k_norm.weight": "head norm"})
_NORM_OF_ALL_HEADS = _in_layer({"self_attn.q_norm.weight": "query norm", "self_attn.k_norm.weight": "key norm"})

_LLAMA = {**_OUTSIDE, **_NORMS_BEFORE, **_ATTENTION, **_FFN}
_GEMMA_2 = {**_OUTSIDE, **_NORMS_AROUND, **_ATTENTION, **_FFN}
_OLD_BUFFERS = (_LAYER + "self_attn.rotary_emb.inv_freq",)

_PHI = {
    "model.embed_tokens.weight": "vocabulary, residual",
    "model.final_layernorm.weight": "norm",
    "model.final_layernorm.bias": "residual",
    "lm_head.weight": "vocabulary, residual",
    "lm_head.bias": "vocabulary",
    **_in_layer(
        {
            "input_layernorm.weight": "norm",
            "input_layernorm.bias": "residual",
            "self_attn.q_proj.weight": "query, residual",
            "self_attn.q_proj.bias": "query",
            "self_attn.k_proj.weight": "key, residual",
            "self_attn.k_proj.bias": "key",
            "self_attn.v_proj.weight": "value, residual",
            "self_attn.v_proj.bias": "value",
            "self_attn.dense.weight": "residual, attended",
            "self_attn.dense.bias": "residual",
            "mlp.fc1.weight": "gate, residual",
            "mlp.fc1.bias": "gate",
            "mlp.fc2.weight": "residual, gate",
            "mlp.fc2.bias": "residual",
        }
    ),
}
_PHI_3 = {
    **_OUTSIDE,
    **_NORMS_BEFORE,
    **_in_layer(
        {
            "self_attn.qkv_proj.weight": "query + key + value, residual",
            "self_attn.o_proj.weight": "residual, attended",
            "mlp.gate_up_proj.weight": "gate + ffn, residual",
            "mlp.down_proj.weight": "residual, ffn",
        }
    ),
}
_GPT_NEOX = {
    "gpt_neox.embed_in.weight": "vocabulary, residual",
    "gpt_neox.final_layer_norm.weight": "norm",
    "gpt_neox.final_layer_norm.bias": "residual",
    "embed_out.weight": "vocabulary, residual",
    **_in_layer(
        {
            "input_layernorm.weight": "norm",
            "input_layernorm.bias": "residual",
            "post_attention_layernorm.weight": "norm",
            "post_attention_layernorm.bias": "residual",
            "attention.query_key_value.weight": "qkv, residual",
            "attention.query_key_value.bias": "qkv",
            "attention.dense.weight": "residual, attended",
            "attention.dense.bias": "residual",
            "mlp.dense_h_to_4h.weight": "gate, residual",
            "mlp.dense_h_to_4h.bias": "gate",
            "mlp.dense_4h_to_h.weight": "residual, gate",
            "mlp.dense_4h_to_h.bias": "residual",
        },
        "gpt_neox.layers.{layer}.",
    ),
}
_MIXTRAL_EXPERTS = _in_layer(
    {
        "block_sparse_moe.gate.weight": "experts, residual",
        "block_sparse_moe.experts.{expert}.w1.weight": "gate, residual",
        "block_sparse_moe.experts.{expert}.w3.weight": "ffn, residual",
        "block_sparse_moe.experts.{expert}.w2.weight": "residual, ffn",
    }
)
_QWEN_EXPERTS = _in_layer(
    {
        "mlp.gate.weight": "experts, residual",
        "mlp.experts.{expert}.gate_proj.weight": "gate, residual",
        "mlp.experts.{expert}.up_proj.weight": "ffn, residual",
        "mlp.experts.{expert}.down_proj.weight": "residual, ffn",
    }
)

FAMILIES: dict[str, Family] = {
    "llama": Family(_LLAMA, constants=_OLD_BUFFERS),
    "mistral": Family(_LLAMA, constants=_OLD_BUFFERS, defaults={"num_key_value_heads": 8}),
    "qwen2": Family(_LLAMA, constants=_OLD_BUFFERS, defaults={"num_key_value_heads": 32}),
    # A norm on every query and key head.
    "qwen3": Family(
        {**_LLAMA, **_NORM_PER_HEAD}, query_key="signs", defaults={"head_dim": 128, "num_key_value_heads": 32}
    ),
    # head_dim is not hidden_size / num_attention_heads. Norms store w - 1, which makes no difference to a permutation.
    "gemma": Family(_LLAMA, defaults={"head_dim": 256, "num_key_value_heads": 16, "tie_word_embeddings": True}),
    # Norms before and after every sublayer.
    "gemma2": Family(_GEMMA_2, defaults={"head_dim": 256, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "gemma3_text": Family(
        {**_GEMMA_2, **_NORM_PER_HEAD},
        query_key="signs",
        defaults={"head_dim": 256, "num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    # One LayerNorm with bias for both sublayers, which are parallel; RoPE on part of each head; FFN without a gate.
    "phi": Family(_PHI, signs=False, partial_rotary=0.5, parallel=True),
    # q, k and v are fused, and so are gate and up.
    "phi3": Family(_PHI_3, partial_rotary=1.0),
    # LayerNorm with bias; RoPE on part of each head; q, k and v interleaved by head; FFN without a gate.
    "gpt_neox": Family(
        _GPT_NEOX,
        embedding="gpt_neox.embed_in.weight",
        head="embed_out.weight",
        signs=False,
        partial_rotary=0.25,
        parallel="use_parallel_residual",
        defaults={"use_parallel_residual": True},
        constants=tuple(
            "gpt_neox.layers.{layer}.attention." + name for name in ("bias", "masked_bias", "rotary_emb.inv_freq")
        ),
    ),
    # Norms only after the sublayers, and one norm over all query heads and one over all key heads.
    "olmo2": Family({**_OUTSIDE, **_NORMS_AFTER, **_ATTENTION, **_FFN, **_NORM_OF_ALL_HEADS}, query_key="signs"),
    # Experts, each with its own hidden space.
    "mixtral": Family(
        {**_OUTSIDE, **_NORMS_BEFORE, **_ATTENTION, **_MIXTRAL_EXPERTS},
        constants=_OLD_BUFFERS,
        defaults={"num_key_value_heads": 8, "num_local_experts": 8},
    ),
    # Experts in some layers, a single FFN in the others.
    "qwen3_moe": Family(
        {**_LLAMA, **_NORM_PER_HEAD, **_QWEN_EXPERTS},
        query_key="signs",
        defaults={"num_key_value_heads": 4},
    ),
}
"""Every supported family, by the `model_type` in config.json."""
