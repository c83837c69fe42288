"""One step of distillation: frozen target in, one drafter's update out."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import nnx
from jax.sharding import Mesh

from d2sd_jax.config import DrafterConfig
from d2sd_jax.models.drafter import Drafter, FusedDrafter
from d2sd_jax.models.target import Target
from d2sd_jax.sharding import batch_shards, constrain_weights, gather
from d2sd_jax.training.blocks import (
  Blocks,
  Conversations,
  is_anchor,
  make_blocks,
  pace_weights,
  sample_anchors,
  sample_prefix_lengths,
  slot_weights,
)
from d2sd_jax.training.losses import (
  Teacher,
  accepted_lengths,
  block_loss,
  default_loss_decay,
  token_losses,
)
from d2sd_jax.training.optimizer import make_optimizer
from d2sd_jax.training.train_config import TrainConfig
from d2sd_jax.typing import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
  """All that a run needs to go on exactly where it stopped.

  Attributes:
    params: the drafter's leaves (`nnx.split`), float32 master weights.
    opt_state: of the optimizer.
    step: updates made; also the position in the data and in all randomness.
  """

  params: Any
  opt_state: Any
  step: Array


def init_train_state(
  drafter: Drafter, config: TrainConfig
) -> tuple[nnx.GraphDef, TrainState]:
  """Splits the drafter once; the leaves become the master weights."""
  graphdef, params = nnx.split(drafter)
  params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  opt_state = make_optimizer(config).init(params)
  state = TrainState(params=params, opt_state=opt_state, step=jnp.int32(0))
  return graphdef, state


def target_features(
  target: Target,
  batch: Conversations,
  config: DrafterConfig,
  distill: bool = False,
) -> Float[Array, "B T taps D"]:
  """What a drafter reads of the frozen target, in one pass over everything.

  Args:
    target: frozen.
    batch: the sequences.
    config: of the drafter, whose taps come first.
    distill: whether the target's last layer is wanted behind them.
  """
  own, last = config.target_layer_ids, config.num_target_layers - 1
  taps = tuple(sorted({*own, last})) if distill else own
  output = target.prefill(batch.tokens, batch.lengths, taps)
  return jax.lax.stop_gradient(output.features)


def block_hidden(
  drafter: FusedDrafter,
  target: Target,
  features: Float[Array, "B T taps D"],
  blocks: Blocks,
) -> Float[Array, "B A slots D"]:
  """Slots 1..γ-1 of all blocks, ready for the head, just as in decoding.

  A block sees the features of tokens strictly before its anchor, and nothing
  of other blocks.

  Args:
    drafter: drafter 1 or 2.
    target: frozen; embeds tokens.
    features: see `target_features`.
    blocks: cut out of the sequences.
  """
  index = jnp.arange(features.shape[1])
  context = drafter.context_kv(
    features[:, :, : len(drafter.config.target_layer_ids)],
    jnp.broadcast_to(index, features.shape[:2]),
  )
  hidden = drafter(
    target.embed(blocks.inputs), blocks.positions, context, blocks.anchors
  )
  return hidden[:, :, 1:]


def teacher_of(
  target: Any, features: Float[Array, "B T taps D"], blocks: Blocks
) -> Teacher:
  """The target's own distribution of each slot 1..γ-1.

  Args:
    target: frozen; a `Target` with the method `logits` of `LlamaTarget`.
    features: see `target_features`, with `distill`.
    blocks: cut out of the sequences.
  """
  last = features[:, :, -1]
  # The hidden states one token before a slot's are of the slot's token.
  before = blocks.positions[:, :, :-1]
  flat = jnp.minimum(before, last.shape[1] - 1).reshape(len(last), -1)
  rows = jnp.take_along_axis(last, flat[:, :, None], axis=1)
  shape = (*before.shape, last.shape[-1])
  return Teacher(head=target.logits, hidden=rows.reshape(shape))


@functools.partial(
  jax.jit,
  static_argnames=("graphdef", "config", "mesh"),
  donate_argnames="state",
)
def train_step(
  graphdef: nnx.GraphDef,
  state: TrainState,
  target: Target,
  batch: Conversations,
  first_drafter: FusedDrafter | None = None,
  *,
  config: TrainConfig,
  mesh: Mesh | None = None,
) -> tuple[TrainState, dict[str, Array]]:
  """One update.

  Anchors and prefixes are drawn from (seed, step) alone, so a run that was
  killed draws the same again, on whatever mesh. Sums and means are those of
  the whole batch.

  Args:
    graphdef: of the drafter.
    state: donated.
    target: frozen; its dtype is the dtype of all computation.
    batch: sequences.
    first_drafter: for drafter 2: drafter 1, which then decides where a share
      of the prefixes end; see `failing_prefixes`.
    config: the run.
    mesh: where the arguments lie; see `sharding`. `None` is one device.

  Returns:
    The new state, and `loss`, `grad_norm` and `accuracy` by slot.
  """
  key = jax.random.fold_in(jax.random.key(config.seed), state.step)
  anchor_key, prefix_key = jax.random.split(key)
  anchors, valid = sample_anchors(anchor_key, batch, config.num_anchors)
  lengths = draw_prefixes(prefix_key, anchors.shape, config)
  target = gather(mesh, target)
  shards = num_shards(mesh)
  distill = config.loss == "distillation"
  drafter_config = nnx.merge(graphdef, state.params).config
  features = target_features(target, batch, drafter_config, distill)
  if first_drafter is not None:
    at_all = cut(batch, anchors, valid, jnp.zeros_like(lengths), config)
    fails = failing_prefixes(first_drafter, target, features, at_all, shards)
    share_key = jax.random.fold_in(prefix_key, 1)
    chosen = jax.random.bernoulli(
      share_key, config.failing_share, anchors.shape
    )
    chosen &= fails < config.block_size - 1
    lengths = jnp.where(chosen, fails, lengths)
  blocks = cut(batch, anchors, valid, lengths, config)

  def loss_fn(params):
    compute = jax.tree.map(lambda x: x.astype(config.dtype), params)
    drafter = nnx.merge(graphdef, gather(mesh, compute))
    hidden = block_hidden(drafter.fuse(), target, features, blocks)
    teacher = teacher_of(target, features, blocks) if distill else None
    labels = blocks.labels[:, :, 1:]
    losses, label_losses, correct = token_losses(
      target.head, hidden, labels, shards, teacher
    )
    weights = block_weights(blocks, label_losses, config)
    return block_loss(losses, weights, config.loss_normalizer), correct

  value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
  (loss, correct), grads = value_and_grad(state.params)
  updates, opt_state = make_optimizer(config).update(
    grads, state.opt_state, state.params
  )
  supervised = blocks.supervised[:, :, 1:]
  hits, counts = (supervised & correct).sum((0, 1)), supervised.sum((0, 1))
  new_state = TrainState(
    params=optax.apply_updates(state.params, updates),
    opt_state=opt_state,
    step=state.step + 1,
  )
  metrics = {
    "loss": loss,
    "grad_norm": optax.tree.norm(grads),
    "accuracy": hits / jnp.maximum(counts, 1),
  }
  return constrain_weights(mesh, new_state), gather(mesh, metrics)


@functools.partial(jax.jit, static_argnames=("graphdef", "config", "mesh"))
def eval_step(
  graphdef: nnx.GraphDef,
  params: Any,
  target: Target,
  batch: Conversations,
  *,
  config: TrainConfig,
  mesh: Mesh | None = None,
) -> dict[str, Array]:
  """Sums over *all* anchors of held-out sequences, a row a device at a time.

  Args:
    graphdef: of the drafter.
    params: its leaves.
    target: frozen.
    batch: sequences.
    config: the run.
    mesh: as for `train_step`.

  Returns:
    Sums that add up over batches: `anchors`, `accepted` (masked slots right
    before the first wrong one), and per slot 1..γ-1 `correct` and `supervised`.
  """
  compute = jax.tree.map(lambda x: x.astype(config.dtype), params)
  drafter = nnx.merge(graphdef, gather(mesh, compute))
  target = gather(mesh, target)
  shards, size = num_shards(mesh), batch.tokens.shape[1]

  def some(rows):
    anchors = jnp.arange(size, dtype=jnp.int32)[None]
    # The same prefixes in every row and evaluation, so that curves are
    # comparable.
    lengths = draw_prefixes(jax.random.key(0), anchors.shape, config)
    everywhere = lambda x: jnp.broadcast_to(x, (shards, size))
    anchors, lengths = everywhere(anchors), everywhere(lengths)
    blocks = cut(rows, anchors, is_anchor(rows), lengths, config)
    features = target_features(target, rows, drafter.config)
    hidden = block_hidden(drafter.fuse(), target, features, blocks)
    labels = blocks.labels[:, :, 1:]
    *_, correct = token_losses(target.head, hidden, labels, shards)
    supervised = blocks.supervised[:, :, 1:]
    # An anchor whose visible prefix reaches the end has nothing to draft.
    counted = supervised.any(-1)
    return {
      "anchors": counted.sum(),
      "accepted": (accepted_lengths(correct, supervised) * counted).sum(),
      "correct": (correct & supervised).sum((0, 1)),
      "supervised": supervised.sum((0, 1)),
    }

  in_turn = lambda x: rearrange(
    x, "(shards n) ... -> n shards ...", shards=shards
  )
  sums = jax.lax.map(some, jax.tree.map(in_turn, batch))
  return gather(mesh, jax.tree.map(lambda x: x.sum(0), sums))


def failing_prefixes(
  drafter: FusedDrafter,
  target: Target,
  features: Float[Array, "B T taps D"],
  blocks: Blocks,
  shards: int = 1,
) -> Int[Array, "B A"]:
  """How many tokens of its draft of each block are right before one is wrong.

  It is there that a second drafter is of use: all tokens of its visible prefix
  accepted, and the token it begins with one that drafter 1 gets wrong. Drawn
  from Eq. 6 alone, most prefixes end where drafter 1 needs no help.

  Args:
    drafter: drafter 1.
    target: frozen.
    features: see `target_features`.
    blocks: cut out of the sequences, with nothing visible but the anchors.
    shards: see `token_losses`.

  Returns:
    int32; γ - 1 where no token of the draft is wrong.
  """
  hidden = block_hidden(drafter, target, features, blocks)
  labels, supervised = blocks.labels[:, :, 1:], blocks.supervised[:, :, 1:]
  *_, correct = token_losses(target.head, hidden, labels, shards)
  right, slots = accepted_lengths(correct, supervised), supervised.shape[-1]
  fails = right < supervised.sum(-1)
  return jnp.where(fails, right, slots).astype(jnp.int32)


def num_shards(mesh: Mesh | None) -> int:
  """Devices that each have rows of their own."""
  return 1 if mesh is None else batch_shards(mesh.shape)


def block_weights(
  blocks: Blocks, label_losses: Float[Array, "B A slots"], config: TrainConfig
) -> Float[Array, "B A slots"]:
  """Weights of slots 1..γ-1 by the run's rule; no gradient runs through."""
  if config.slot_weighting == "d_pace":
    probability = jnp.exp(-label_losses)
    return pace_weights(blocks.supervised[:, :, 1:], probability)
  return slot_weights(blocks, loss_decay(config))[:, :, 1:]


def draw_prefixes(key: Array, shape: tuple[int, ...], config: TrainConfig):
  """Visible prefixes by role: none for drafter 1, Eq. 6 for drafter 2."""
  if config.role == "dflash":
    return jnp.zeros(shape, jnp.int32)
  return sample_prefix_lengths(
    key, shape, config.block_size, config.prefix_decay, config.min_prefix_length
  )


def cut(batch, anchors, valid, lengths, config: TrainConfig) -> Blocks:
  """`make_blocks` with the run's sizes."""
  return make_blocks(
    batch, anchors, valid, lengths, config.block_size, config.mask_token_id
  )


def loss_decay(config: TrainConfig) -> float:
  """τ: the config's, or the published one for the block size."""
  return config.loss_decay or default_loss_decay(config.block_size)
