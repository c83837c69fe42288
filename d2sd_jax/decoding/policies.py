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
from d2sd_jax.sampling import draft_samples
from d2sd_jax.tensor_parallel import best_token, token_ids
from d2sd_jax.tree import (
  LOOKUP,
  RE_DRAFT,
  SAMPLE,
  THIRD_DRAFT,
  PrefixTree,
  build_prefix_tree,
  chain_tree,
  merge_paths,
)
from d2sd_jax.typing import Array, Bool, Float, Int

LOOKUP_SIZES = (3, 2)


@dataclasses.dataclass(frozen=True)
class TreePolicy:
  """How a mode drafts.

  Attributes:
    build: `(models, state, tree_config) -> PrefixTree`, root at the anchor.
    num_drafters: drafters it needs.
    max_path: nodes of its longest path, the anchor included.
    num_nodes: slots of its tree.
    reads: fields of `TreeConfig` that mean something to it.
    may_abstain: its tree may be the anchor alone, which then is a step of
      `ar`.
  """

  build: Callable[[Models, DecodeState, TreeConfig], PrefixTree]
  num_drafters: int
  max_path: Callable[[TreeConfig], int]
  num_nodes: Callable[[TreeConfig], int] = lambda config: config.num_nodes
  reads: tuple[str, ...] = ()
  may_abstain: bool = False


def anchor_only(
  models: Models, state: DecodeState, config: TreeConfig
) -> PrefixTree:
  """Nothing is drafted: the target goes on token by token."""
  del models, config
  return chain_tree(state.anchors[:, None])


def prompt_lookup(
  models: Models, state: DecodeState, config: TreeConfig
) -> PrefixTree:
  """What followed the last three tokens when they were last seen, or two.

  The baseline without drafters: at most γ-1 tokens are copied from the row's
  own prompt and answer, and none where neither n-gram was seen before. A
  `block_size` of 9 drafts the usual 8 tokens.
  """
  del models
  slots = jnp.arange(config.block_size)
  found = jnp.stack([_latest_match(state, n) for n in LOOKUP_SIZES])
  # The longer n-gram goes first; -1 is no match.
  source = jnp.where(found[0] >= 0, found[0], found[1])
  num_drafted = jnp.where(source >= 0, state.lengths - source, 0)
  drafted = jnp.take_along_axis(
    state.tokens, source[:, None] + slots, axis=1, mode="clip"
  )
  chain = jnp.where(slots == 0, state.anchors[:, None], drafted)
  return chain_tree(chain, num_drafted, LOOKUP)


def first_draft(
  models: Models, state: DecodeState, config: TreeConfig
) -> PrefixTree:
  """Drafter 1's block and no branches (DFlash)."""
  return chain_tree(draft_block(models, state, config)[0])


def sampled_drafts(
  models: Models, state: DecodeState, config: TreeConfig
) -> PrefixTree:
  """Drafter 1's block, and K blocks drawn from its marginals at T = 1.

  Each slot is drawn independently of the others, with noise of its own (see
  `draft_samples`); equal prefixes are merged.
  """
  logits = _first_logits(models, state, config)
  trunk = _with_anchor(state, best_token(logits, models.axis))
  positions = state.lengths[:, None] + 1 + jnp.arange(logits.shape[1])
  count = config.num_branches
  drawn = draft_samples(
    logits, positions, state.sequence_ids, state.draft_key, count, models.axis
  )
  anchors = jnp.repeat(trunk[:, None, :1], count, axis=1)
  paths = jnp.concatenate([anchors, drawn], axis=-1)
  origins = [SAMPLE] * count
  return merge_paths(trunk, paths, _sampled_nodes(config), origins)


def dual_draft(
  models: Models, state: DecodeState, config: TreeConfig
) -> PrefixTree:
  """Both drafts (D²SD): re-draft where the first one is likely to fail.

  Sec. 3.1: first draft and its confidence. Sec. 3.2: the K likeliest places of
  failure. Sec. 3.3: one batched second draft and the prefix tree.
  """
  return _dual_draft(models, state, config, 1)


def reused_draft(
  models: Models, state: DecodeState, config: TreeConfig
) -> PrefixTree:
  """As `dual_draft`, with drafter 1 in the place of drafter 2."""
  return _dual_draft(models, state, config, 0)


def triple_draft(
  models: Models, state: DecodeState, config: TreeConfig
) -> PrefixTree:
  """D²SD with a third level: every branch is re-drafted once more.

  Eq. 4-5 over a branch's own confidences give the likeliest place of failure
  after its first new token (before it, drafter 2 would only repeat itself);
  one more batched pass of drafter 2 goes on from there.
  """
  trunk, confidence = draft_block(models, state, config)
  if config.num_branches == 0:
    return chain_tree(trunk)
  starts = _likely_failures(confidence, config)
  hosts = _hosts(trunk, config)
  branches, confidence = redraft(models, state, config, 1, hosts, starts)

  slots = jnp.arange(confidence.shape[-1])
  settled = slots <= starts[:, :, None]
  posterior = boundary_posterior(jnp.where(settled, 1.0, confidence))
  again = jnp.maximum(select_prefixes(posterior, 1)[..., 0], starts + 1)
  thirds, _ = redraft(models, state, config, 1, branches, again)
  # Branch k hangs under the trunk, host 0; its re-draft under the branch.
  count = config.num_branches
  under = jnp.array([0] * count + list(range(1, count + 1)))
  return build_prefix_tree(
    trunk,
    jnp.concatenate([branches, thirds], axis=1),
    jnp.concatenate([starts, again], axis=1),
    _triple_nodes(config),
    jnp.broadcast_to(under, (trunk.shape[0], 2 * count)),
    [RE_DRAFT] * count + [THIRD_DRAFT] * count,
  )


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
  return models.draft_logits(hidden[:, :, 1:])


def draft_block(
  models: Models, state: DecodeState, config: TreeConfig
) -> tuple[Int[Array, "B block"], Float[Array, "B slots"]]:
  """Anchor and greedy first draft, and the confidence of each drafted token."""
  logits = _first_logits(models, state, config)
  trunk = _with_anchor(state, best_token(logits, models.axis))
  return trunk, token_confidence(logits, models.axis)


def _first_logits(models, state, config):
  """Drafter 1's logits of slots 1.. with nothing but the anchor visible."""
  anchors = state.anchors[:, None, None]
  blocks = fill_masked(
    jnp.repeat(anchors, config.block_size, axis=-1),
    1,
    models.drafters[0].config.mask_token_id,
  )
  return denoise(models, state, 0, blocks)[:, 0]


def _with_anchor(state, drafted):
  """The anchor of each row, then its draft: `[B, block]`."""
  anchors = state.anchors[:, None]
  return jnp.concatenate([anchors, drafted], axis=1)


def _dual_draft(models, state, config, second):
  """The prefix tree of a first draft and re-drafts by drafter `second`."""
  trunk, confidence = draft_block(models, state, config)
  if config.num_branches == 0:
    return chain_tree(trunk)
  starts = _likely_failures(confidence, config)
  hosts = _hosts(trunk, config)
  branches, _ = redraft(models, state, config, second, hosts, starts)
  return build_prefix_tree(trunk, branches, starts, config.num_nodes)


def _likely_failures(confidence, config):
  """The K likeliest accepted lengths of the first draft (Eq. 4-5)."""
  return select_prefixes(boundary_posterior(confidence), config.num_branches)


def _hosts(trunk, config):
  """What each branch starts from: the trunk, as long as a branch."""
  extra = config.branch_size - config.block_size
  longer = jnp.pad(trunk, ((0, 0), (0, extra)))[:, None]
  return jnp.repeat(longer, config.num_branches, axis=1)


def redraft(
  models: Models,
  state: DecodeState,
  config: TreeConfig,
  index: int,
  hosts: Int[Array, "B K branch"],
  prefix_lengths: Int[Array, "B K"],
) -> tuple[Int[Array, "B K branch"], Float[Array, "B K slots"]]:
  """Keeps `prefix_lengths` drafted tokens of each host, re-drafts the rest.

  All branches go through one drafter in one batched pass.

  Returns:
    The branches, and the confidence of each re-drafted token; what stands
    there at slots that were kept means nothing.
  """
  blocks = fill_masked(
    hosts, prefix_lengths + 1, models.drafters[index].config.mask_token_id
  )
  logits = denoise(models, state, index, blocks)
  confidence = token_confidence(logits, models.axis)
  if config.forbid_repeat:
    logits = _forbid_repeat(logits, hosts, prefix_lengths, models.axis)
  redrafted = best_token(logits, models.axis)
  kept = jnp.arange(hosts.shape[-1]) <= prefix_lengths[:, :, None]
  # Slot 0 is the anchor; logits start at slot 1.
  drafted = jnp.concatenate([hosts[:, :, :1], redrafted], axis=-1)
  return jnp.where(kept, hosts, drafted), confidence


def _forbid_repeat(logits, hosts, prefix_lengths, axis):
  """Bars each branch's first new slot from its host's token there."""
  slot = jnp.arange(logits.shape[2])
  first = slot == prefix_lengths[:, :, None]
  rejected = hosts[:, :, 1:]
  vocabulary = token_ids(logits.shape[-1], axis)
  barred = vocabulary == rejected[..., None]
  return jnp.where(first[..., None] & barred, -jnp.inf, logits)


def _latest_match(state: DecodeState, size: int) -> Int[Array, " B"]:
  """Where the row's last `size` tokens last ended before; -1 if nowhere."""
  index = jnp.arange(state.tokens.shape[1])
  ends = jnp.broadcast_to(index, state.tokens.shape)
  matches: Bool[Array, "B S"] = ends < state.lengths[:, None]
  matches &= ends >= size - 1
  for back in range(size):
    # Rolled round the end is only what `ends >= size - 1` leaves out.
    at = jnp.maximum(state.lengths - back, 0)[:, None]
    wanted = jnp.take_along_axis(state.tokens, at, axis=1)
    matches &= jnp.roll(state.tokens, back, axis=1) == wanted
  return jnp.where(matches, ends, -1).max(axis=1)


def _block_size(config: TreeConfig) -> int:
  return config.block_size


def _branch_size(config: TreeConfig) -> int:
  return config.branch_size


def _sampled_nodes(config: TreeConfig) -> int:
  """Where no sample shares a token with another path."""
  most = 1 + (config.block_size - 1) * (config.num_branches + 1)
  return config.within_budget(most)


def _triple_nodes(config: TreeConfig) -> int:
  """Where each third draft keeps one new token of its branch."""
  thirds = (config.branch_size - 2 - i for i in range(config.num_branches))
  return config.within_budget(config.most_nodes + sum(thirds))


_BLOCK = ("block_size",)
_SAMPLES = (*_BLOCK, "num_branches", "node_budget")
_BRANCHES = (*_SAMPLES, "second_block_size", "forbid_repeat")
_one_node = lambda config: 1
_dual_nodes = lambda config: config.num_nodes

POLICIES: Mapping[str, TreePolicy] = {
  "ar": TreePolicy(anchor_only, 0, _one_node, _one_node),
  "prompt_lookup": TreePolicy(
    prompt_lookup, 0, _block_size, _block_size, _BLOCK, may_abstain=True
  ),
  "dflash": TreePolicy(first_draft, 1, _block_size, _block_size, _BLOCK),
  "dflash_samples": TreePolicy(
    sampled_drafts, 1, _block_size, _sampled_nodes, _SAMPLES
  ),
  "reuse": TreePolicy(reused_draft, 1, _branch_size, _dual_nodes, _BRANCHES),
  "d2sd": TreePolicy(dual_draft, 2, _branch_size, _dual_nodes, _BRANCHES),
  "d2sd_3": TreePolicy(triple_draft, 2, _branch_size, _triple_nodes, _BRANCHES),
}
