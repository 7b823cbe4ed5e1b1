"""The model families: name templates, as they stand in a checkpoint on disk, and the roles of their axes.

Read a table beside the family's `modeling_*.py`: a linear layer's weight is (outputs, inputs), so `q_proj: "query residual"`
says that its rows are query heads and its columns read the residual stream. Roles are explained in `spaces`.
"""

from mpunlearn.architecture.spaces import EMBEDDING, HEAD, Family

_LLAMA = {
    EMBEDDING: "vocabulary residual",
    "model.layers.{layer}.input_layernorm.weight": "norm",
    "model.layers.{layer}.self_attn.q_proj.weight": "query residual",
    "model.layers.{layer}.self_attn.q_proj.bias": "query",
    "model.layers.{layer}.self_attn.k_proj.weight": "key residual",
    "model.layers.{layer}.self_attn.k_proj.bias": "key",
    "model.layers.{layer}.self_attn.v_proj.weight": "value residual",
    "model.layers.{layer}.self_attn.v_proj.bias": "value",
    "model.layers.{layer}.self_attn.o_proj.weight": "residual attended",
    "model.layers.{layer}.self_attn.o_proj.bias": "residual",
    "model.layers.{layer}.post_attention_layernorm.weight": "norm",
    "model.layers.{layer}.mlp.gate_proj.weight": "gate residual",
    "model.layers.{layer}.mlp.gate_proj.bias": "gate",
    "model.layers.{layer}.mlp.up_proj.weight": "ffn residual",
    "model.layers.{layer}.mlp.up_proj.bias": "ffn",
    "model.layers.{layer}.mlp.down_proj.weight": "residual ffn",
    "model.layers.{layer}.mlp.down_proj.bias": "residual",
    "model.norm.weight": "norm",
    HEAD: "vocabulary residual",
}
_INVERSE_FREQUENCIES = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq",)

FAMILIES: dict[str, Family] = {
    "llama": Family(_LLAMA, constants=_INVERSE_FREQUENCIES),
    "mistral": Family(_LLAMA, constants=_INVERSE_FREQUENCIES, defaults={"num_key_value_heads": 8}),
    "qwen2": Family(_LLAMA, constants=_INVERSE_FREQUENCIES),
}
"""Every known family by the model_type of its config.json."""
