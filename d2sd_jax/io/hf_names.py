"""Published tensors of a target: their names and shapes.

Both are Hugging Face's: matrices `[out, in]`, except the experts' where they
are not quantised.
"""

from d2sd_jax.config import DrafterConfig, TargetConfig
from d2sd_jax.io import mxfp4

# Name of each field of a dense layer; its biases have the same names.
LAYER_TENSORS = {
  "input_norm": "input_layernorm",
  "q_proj": "self_attn.q_proj",
  "k_proj": "self_attn.k_proj",
  "v_proj": "self_attn.v_proj",
  "o_proj": "self_attn.o_proj",
  "q_norm": "self_attn.q_norm",
  "k_norm": "self_attn.k_norm",
  "post_norm": "post_attention_layernorm",
  "gate_proj": "mlp.gate_proj",
  "up_proj": "mlp.up_proj",
  "down_proj": "mlp.down_proj",
}
EMBEDDING, NORM, HEAD = (
  "model.embed_tokens.weight",
  "model.norm.weight",
  "lm_head.weight",
)
SINKS, ROUTER, EXPERTS = "self_attn.sinks", "mlp.router", "mlp.experts"


def target_tensors(config: TargetConfig) -> dict[str, tuple[int, ...]]:
  """Name and shape of every tensor that such a target is published as."""
  table = (config.vocab_size, config.hidden_size)
  layer = layer_tensors(config)
  tensors = {EMBEDDING: table, NORM: (config.hidden_size,)}
  for i in range(config.num_layers):
    tensors |= {in_layer(i, name): shape for name, shape in layer.items()}
  return tensors if config.tied_head else {**tensors, HEAD: table}


def layer_tensors(
  config: TargetConfig | DrafterConfig,
) -> dict[str, tuple[int, ...]]:
  """Name within its layer, and shape, of each tensor of one layer."""
  c = config
  width = c.hidden_size
  query, key = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
  attention = {
    "q_proj": (query, width),
    "k_proj": (key, width),
    "v_proj": (key, width),
    "o_proj": (width, query),
  }
  shapes = {"input_norm": (width,), "post_norm": (width,), **attention}
  if c.qk_norm:
    shapes |= {"q_norm": (c.head_dim,), "k_norm": (c.head_dim,)}
  if not c.num_experts:
    mlp = c.intermediate_size
    shapes |= {"gate_proj": (mlp, width), "up_proj": (mlp, width)}
    shapes |= {"down_proj": (width, mlp)}
  tensors = {f"{LAYER_TENSORS[k]}.weight": v for k, v in shapes.items()}
  if c.attention_bias:
    for field, shape in attention.items():
      tensors[f"{LAYER_TENSORS[field]}.bias"] = shape[:1]
  if c.sinks:
    tensors[SINKS] = (c.num_heads,)
  if isinstance(c, TargetConfig) and c.num_experts:
    tensors |= _expert_tensors(c)
  return tensors


def _expert_tensors(config: TargetConfig) -> dict[str, tuple[int, ...]]:
  """Those of a layer's experts; gate and up alternate in one matrix."""
  count, width = config.num_experts, config.hidden_size
  mlp = config.intermediate_size
  tensors: dict[str, tuple[int, ...]] = {
    f"{ROUTER}.weight": (count, width),
    f"{ROUTER}.bias": (count,),
  }
  for field, inputs, outputs in (
    ("gate_up_proj", width, 2 * mlp),
    ("down_proj", mlp, width),
  ):
    name = f"{EXPERTS}.{field}"
    tensors[f"{name}_bias"] = (count, outputs)
    if config.mxfp4:
      blocks = inputs // mxfp4.BLOCK
      tensors[f"{name}_blocks"] = (count, outputs, blocks, mxfp4.BLOCK // 2)
      tensors[f"{name}_scales"] = (count, outputs, blocks)
    else:
      tensors[name] = (count, inputs, outputs)
  return tensors


def in_layer(layer: int, name: str) -> str:
  """The whole name of a layer's tensor."""
  return f"model.layers.{layer}.{name}"
