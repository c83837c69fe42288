"""The prefix tree: every candidate token stored once (Sec. 3.3)."""

import dataclasses

import jax
import jax.numpy as jnp

from d2sd_jax.typing import Array, Bool, Int

NO_PARENT = -1
ANCHOR, FIRST_DRAFT, RE_DRAFT = 0, 1, 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixTree:
  """A batch of token trees in R static slots; a parent precedes its children.

  Node 0 is the anchor. Slots that are not `valid` are unused: they have no
  parent and no children, and whatever is computed for them is never read.

  Attributes:
    tokens: int32 token of each node.
    parents: int32 index of each node's parent; `NO_PARENT` for the root and
      for unused nodes.
    depths: int32 edges between the node and the root; 0 where unused.
    valid: whether the slot holds a node.
    origins: int8, the pass that proposed the token: `ANCHOR`, `FIRST_DRAFT`
      or `RE_DRAFT`.
  """

  tokens: Int[Array, "B R"]
  parents: Int[Array, "B R"]
  depths: Int[Array, "B R"]
  valid: Bool[Array, "B R"]
  origins: Int[Array, "B R"]


def chain_tree(tokens: Int[Array, "B R"]) -> PrefixTree:
  """A tree without branches: each token is the child of the one before.

  Args:
    tokens: the anchor, then a draft of R - 1 tokens.

  Returns:
    A tree of R nodes, all of them valid.
  """
  slots = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  return PrefixTree(
    tokens=tokens.astype(jnp.int32),
    parents=(slots - 1).astype(jnp.int32),
    depths=slots.astype(jnp.int32),
    valid=jnp.ones_like(slots, bool),
    origins=jnp.where(slots == 0, ANCHOR, FIRST_DRAFT).astype(jnp.int8),
  )


def build_prefix_tree(
  trunk: Int[Array, "B block"],
  branches: Int[Array, "B K branch"],
  prefix_lengths: Int[Array, "B K"],
  num_nodes: int,
) -> PrefixTree:
  """Hangs each branch's re-drafted suffix under the trunk (Sec. 3.3).

  Branch k shares slots 0..i with the trunk, i = `prefix_lengths[k]`; only its
  slots i+1.. become nodes, the first of them a child of trunk node i. Branches
  are laid out one after the other; where the budget ends, the last branches
  lose their tails, never a node with a kept descendant.

  Args:
    trunk: the anchor and the first draft, γ tokens: nodes 0..γ-1.
    branches: for each branch all of its slots, the shared ones included.
    prefix_lengths: distinct accepted lengths the branches start from, likeliest
      first, each below γ.
    num_nodes: R, the static number of slots, at least γ.

  Returns:
    The tree; slots beyond the nodes in use are not valid.
  """
  block, branch = trunk.shape[1], branches.shape[2]
  suffix_lengths = branch - 1 - prefix_lengths
  ends = block + jnp.cumsum(suffix_lengths, axis=1)
  node = jnp.arange(block, num_nodes)

  # For each node after the trunk: which branch it lies in, and at which slot.
  owner = (node[None, :, None] >= ends[:, None, :]).sum(-1)
  valid = owner < branches.shape[1]
  owner = jnp.minimum(owner, max(branches.shape[1] - 1, 0))
  of_owner = lambda per_branch: jnp.take_along_axis(per_branch, owner, axis=1)
  first = of_owner(ends - suffix_lengths)
  shared = of_owner(prefix_lengths)
  slot = jnp.clip(node - first + shared + 1, 0, branch - 1)
  tokens = jnp.take_along_axis(
    jnp.take_along_axis(branches, owner[:, :, None], axis=1),
    slot[:, :, None],
    axis=2,
  )[:, :, 0]
  parents = jnp.where(node == first, shared, node - 1)

  suffixes = PrefixTree(
    tokens=jnp.where(valid, tokens, 0),
    parents=jnp.where(valid, parents, NO_PARENT).astype(jnp.int32),
    depths=jnp.where(valid, slot, 0).astype(jnp.int32),
    valid=valid,
    origins=jnp.full(valid.shape, RE_DRAFT, jnp.int8),
  )
  return jax.tree.map(
    lambda a, b: jnp.concatenate([a, b.astype(a.dtype)], axis=1),
    chain_tree(trunk),
    suffixes,
  )


def ancestor_mask(parents: Int[Array, "B R"]) -> Bool[Array, "B R R"]:
  """Which nodes are on the path from each node up to its root.

  Args:
    parents: parent of each node, `NO_PARENT` where there is none.

  Returns:
    `mask[b, i, j]`: node j is node i or one of its ancestors.
  """
  nodes = jnp.arange(parents.shape[1])
  reach = (nodes[:, None] == nodes) | (parents[:, :, None] == nodes)
  # Reaching 2^s levels up after s squarings; no path is longer than R - 1.
  for _ in range(max(parents.shape[1] - 2, 0).bit_length()):
    steps = reach.astype(jnp.float32)
    reach = jnp.einsum("bij,bjk->bik", steps, steps) > 0
  return reach
