"""Tree policies: a mode decides which nodes the tree has, and nothing else."""

import dataclasses
from collections.abc import Callable, Mapping

import jax.numpy as jnp

from d2sd_jax.boundary import (
  boundary_posterior,
  select_prefixes,
  token_confidence,
)
from d2sd_jax.config import TreeConfig
from d2sd_jax.decoding.state import DecodeState, Models
from d2sd_jax.models.drafter import fill_masked
from d2sd_jax.tree import PrefixTree, build_prefix_tree, chain_tree
from d2sd_jax.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class TreePolicy:
  """How a mode drafts.

  Attributes:
    build: `(models, state, tree_config) -> PrefixTree`, root at the anchor.
    num_drafters: drafters it needs.
    max_path: nodes of its longest path, the anchor included.
  """

  build: Callable[[Models, DecodeState, TreeConfig], PrefixTree]
  num_drafters: int
  max_path: Callable[[TreeConfig], int]


def anchor_only(
  models: Models, state: DecodeState, config: TreeConfig
) -> PrefixTree:
  """Nothing is drafted: the target goes on token by token."""
  del models, config
  return chain_tree(state.anchors[:, None])


def first_draft(
  models: Models, state: DecodeState, config: TreeConfig
) -> PrefixTree:
  """Drafter 1's block and no branches (DFlash)."""
  trunk, _ = _first_draft(models, state, config)
  return chain_tree(trunk)


def dual_draft(
  models: Models, state: DecodeState, config: TreeConfig
) -> PrefixTree:
  """Both drafts (D²SD): re-draft where the first one is likely to fail.

  Sec. 3.1: first draft and its confidence. Sec. 3.2: the K likeliest places of
  failure. Sec. 3.3: one batched second draft and the prefix tree.
  """
  trunk, confidence = _first_draft(models, state, config)
  if config.num_branches == 0:
    return chain_tree(trunk)
  posterior = boundary_posterior(confidence)
  prefix_lengths = select_prefixes(posterior, config.num_branches)

  extra = config.branch_size - config.block_size
  drafted = jnp.pad(trunk, ((0, 0), (0, extra)))[:, None]
  blocks = fill_masked(
    jnp.repeat(drafted, config.num_branches, axis=1),
    prefix_lengths + 1,
    models.drafters[1].config.mask_token_id,
  )
  logits = denoise(models, state, 1, blocks)
  if config.forbid_repeat:
    logits = _forbid_repeat(logits, trunk, prefix_lengths)
  redrafted = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  # Slot 0 is the anchor; logits start at slot 1.
  branches = jnp.concatenate([blocks[:, :, :1], redrafted], axis=-1)
  return build_prefix_tree(trunk, branches, prefix_lengths, config.num_nodes)


def denoise(
  models: Models,
  state: DecodeState,
  index: int,
  blocks: Int[Array, "B G block"],
) -> Float[Array, "B G slots V"]:
  """Logits of slots 1.. of blocks that all start at the row's anchor.

  Args:
    models: target and drafters.
    state: the anchor's position and the drafters' context.
    index: which drafter.
    blocks: the anchor, visible tokens, then masks.
  """
  slots = jnp.arange(blocks.shape[-1])
  positions = state.lengths[:, None, None] + slots
  hidden = models.drafters[index](
    models.target.embed(blocks),
    jnp.broadcast_to(positions, blocks.shape),
    state.drafter_caches[index],
    state.lengths,
  )
  return models.target.head(hidden[:, :, 1:])


def _first_draft(
  models: Models, state: DecodeState, config: TreeConfig
) -> tuple[Int[Array, "B block"], Float[Array, "B slots"]]:
  """Anchor and greedy draft, and the confidence of each drafted token."""
  anchors = state.anchors[:, None, None]
  blocks = fill_masked(
    jnp.repeat(anchors, config.block_size, axis=-1),
    1,
    models.drafters[0].config.mask_token_id,
  )
  logits = denoise(models, state, 0, blocks)[:, 0]
  drafted = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  trunk = jnp.concatenate([state.anchors[:, None], drafted], axis=1)
  return trunk, token_confidence(logits)


def _forbid_repeat(logits, trunk, prefix_lengths):
  """Bars each branch's first new slot from the trunk's token there."""
  slot = jnp.arange(logits.shape[2])
  first = slot == prefix_lengths[:, :, None]
  rejected = jnp.take_along_axis(trunk, prefix_lengths + 1, axis=1)
  vocabulary = jnp.arange(logits.shape[-1])
  barred = vocabulary == rejected[:, :, None, None]
  return jnp.where(first[..., None] & barred, -jnp.inf, logits)


POLICIES: Mapping[str, TreePolicy] = {
  "ar": TreePolicy(anchor_only, 0, lambda config: 1),
  "dflash": TreePolicy(first_draft, 1, lambda config: config.block_size),
  "d2sd": TreePolicy(dual_draft, 2, lambda config: config.branch_size),
}
