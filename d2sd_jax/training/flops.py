"""How much arithmetic a training step is, counted on paper."""

from d2sd_jax.config import DrafterConfig, TargetConfig
from d2sd_jax.training.train_config import TrainConfig


def step_flops(
  config: TrainConfig, target: TargetConfig, drafter: DrafterConfig
) -> float:
  """Model FLOPs of one update: two per multiply-add, nothing recomputed.

  A frozen matrix costs 2 FLOPs a weight and row forwards, and 2 more if the
  gradient passes through it; a trained one costs 6. A `first_drafter`, taken
  to be shaped like the one that is trained, runs forwards on every block. The
  target runs up to its last tapped layer, or to its own logits of every slot
  where it is distilled.
  Attention is counted where it may look: a causal half in the target, half of
  the sequence and the block itself in the drafter.
  Padding counts, as it is computed; norms and activations do not.

  Args:
    config: batch, sequence, anchors and block.
    target: the frozen target.
    drafter: what is trained.
  """
  c = config
  tokens = c.batch_size * c.max_length
  slots = c.batch_size * c.num_anchors * c.block_size
  distill = c.loss == "distillation"
  forwards = 2 if c.first_drafter is not None else 0
  tapped = target.num_layers if distill else drafter.target_layer_ids[-1] + 1
  fc = len(drafter.target_layer_ids) * target.hidden_size * drafter.hidden_size
  key_value = 2 * drafter.hidden_size * drafter.num_kv_heads * drafter.head_dim
  seen = c.max_length / 2 + c.block_size
  return (
    2 * tapped * _layer_weights(target) * tokens
    + 4
    * tapped
    * target.num_heads
    * target.head_dim
    * c.max_length
    / 2
    * tokens
    + (6 + forwards) * (fc + drafter.num_layers * key_value) * tokens
    + (6 + forwards) * drafter.num_layers * _layer_weights(drafter) * slots
    + 2
    * (6 + forwards)
    * drafter.num_layers
    * drafter.num_heads
    * drafter.head_dim
    * seen
    * slots
    + ((6 if distill else 4) + forwards)
    * target.hidden_size
    * target.vocab_size
    * slots
    * (c.block_size - 1)
    / c.block_size
  )


def _layer_weights(config: TargetConfig | DrafterConfig) -> int:
  """Weights of the matrices of one layer that a token meets."""
  heads = 2 * config.num_heads + 2 * config.num_kv_heads
  attention = config.hidden_size * heads * config.head_dim
  mlp = 3 * config.hidden_size * config.intermediate_size
  if isinstance(config, TargetConfig) and config.num_experts:
    router = config.hidden_size * config.num_experts
    return attention + router + config.experts_per_token * mlp
  return attention + mlp
