"""The prefix tree: every candidate token stored once (Sec. 3.3)."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from d2sd_jax.typing import Array, Bool, Int

NO_PARENT = -1
# Which pass proposed a token; `ANCHOR` also stands for the target's choices.
ANCHOR, FIRST_DRAFT, RE_DRAFT, LOOKUP, SAMPLE, THIRD_DRAFT = range(6)


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
    origins: int8, the pass that proposed the token: `ANCHOR`, `FIRST_DRAFT`,
      `RE_DRAFT`, `LOOKUP`, `SAMPLE` or `THIRD_DRAFT`.
  """

  tokens: Int[Array, "B R"]
  parents: Int[Array, "B R"]
  depths: Int[Array, "B R"]
  valid: Bool[Array, "B R"]
  origins: Int[Array, "B R"]


def chain_tree(
  tokens: Int[Array, "B R"],
  num_drafted: Int[Array, " B"] | int | None = None,
  origin: int = FIRST_DRAFT,
) -> PrefixTree:
  """A tree without branches: each token is the child of the one before.

  Args:
    tokens: the anchor, then a draft of R - 1 tokens.
    num_drafted: tokens of the draft that are nodes; `None` is all of them.
    origin: where the draft came from.

  Returns:
    A tree of R slots.
  """
  slots = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  most = tokens.shape[1] if num_drafted is None else num_drafted
  valid = slots <= jnp.asarray(most)[..., None]
  return PrefixTree(
    tokens=jnp.where(valid, tokens, 0).astype(jnp.int32),
    parents=jnp.where(valid, slots - 1, NO_PARENT).astype(jnp.int32),
    depths=jnp.where(valid, slots, 0).astype(jnp.int32),
    valid=valid,
    origins=jnp.where(slots == 0, ANCHOR, origin).astype(jnp.int8),
  )


def build_prefix_tree(
  trunk: Int[Array, "B block"],
  branches: Int[Array, "B K branch"],
  prefix_lengths: Int[Array, "B K"],
  num_nodes: int,
  hosts: Int[Array, "B K"] | None = None,
  origins: Sequence[int] | None = None,
) -> PrefixTree:
  """Hangs each branch's re-drafted suffix under the trunk (Sec. 3.3).

  Branch k shares slots 0..i with the trunk, i = `prefix_lengths[k]`; only its
  slots i+1.. become nodes, the first of them a child of trunk node i. Branches
  are laid out one after the other; where the budget ends, the last branches
  lose their tails, never a node with a kept descendant.

  Args:
    trunk: the anchor and the first draft, γ tokens: nodes 0..γ-1.
    branches: for each branch all of its slots, the shared ones included.
    prefix_lengths: lengths the branches start from, likeliest first; those of
      branches under the trunk are each below γ.
    num_nodes: R, the static number of slots, at least γ.
    hosts: which path each branch hangs under: 0 the trunk, k+1 branch k, which
      must be an earlier one and have a node of its own at slot i. `None` is
      the trunk for all.
    origins: of each branch's tokens; `None` is `RE_DRAFT` for all.

  Returns:
    The tree; slots beyond the nodes in use are not valid.
  """
  block, (_, count, branch) = trunk.shape[1], branches.shape
  suffix_lengths = branch - 1 - prefix_lengths
  ends = block + jnp.cumsum(suffix_lengths, axis=1)
  hosted = _host_nodes(ends - suffix_lengths, prefix_lengths, hosts)
  node = jnp.arange(block, num_nodes)

  # For each node after the trunk: which branch it lies in, and at which slot.
  owner = (node[None, :, None] >= ends[:, None, :]).sum(-1)
  valid = owner < count
  owner = jnp.minimum(owner, max(count - 1, 0))
  of_owner = lambda per_branch: jnp.take_along_axis(per_branch, owner, axis=1)
  first = of_owner(ends - suffix_lengths)
  slot = node - first + of_owner(prefix_lengths) + 1
  slot = jnp.clip(slot, 0, branch - 1)
  tokens = jnp.take_along_axis(
    jnp.take_along_axis(branches, owner[:, :, None], axis=1),
    slot[:, :, None],
    axis=2,
  )[:, :, 0]
  parents = jnp.where(node == first, of_owner(hosted), node - 1)
  of_branch = [RE_DRAFT] * count if origins is None else origins

  suffixes = PrefixTree(
    tokens=jnp.where(valid, tokens, 0),
    parents=jnp.where(valid, parents, NO_PARENT).astype(jnp.int32),
    depths=jnp.where(valid, slot, 0).astype(jnp.int32),
    valid=valid,
    origins=jnp.asarray(of_branch, jnp.int8)[owner],
  )
  return jax.tree.map(
    lambda a, b: jnp.concatenate([a, b.astype(a.dtype)], axis=1),
    chain_tree(trunk),
    suffixes,
  )


def merge_paths(
  trunk: Int[Array, "B block"],
  paths: Int[Array, "B K branch"],
  num_nodes: int,
  origins: Sequence[int],
) -> PrefixTree:
  """A tree of unique nodes: what paths have in common is stored once.

  Each path hangs under the earliest of those before it, the trunk first, with
  which it has the most tokens in common. No two siblings are equal.

  Args:
    trunk: the anchor and the first draft, γ tokens: nodes 0..γ-1.
    paths: further drafts, each from the anchor on, at least γ tokens.
    num_nodes: R, the static number of slots, at least γ.
    origins: where the tokens of each path came from.

  Returns:
    The tree; slots beyond the nodes in use are not valid.
  """
  (_, block), (_, count, size) = trunk.shape, paths.shape
  # A path that goes on behind the trunk differs from it there.
  longer = jnp.pad(
    trunk, ((0, 0), (0, size - block)), constant_values=NO_PARENT
  )
  every = jnp.concatenate([longer[:, None], paths], axis=1)
  equal = paths[:, :, None] == every[:, None]
  # Tokens in common, the anchor not counted.
  shared = jnp.cumprod(equal, axis=-1).sum(-1) - 1
  earlier = jnp.arange(count + 1) <= jnp.arange(count)[:, None]
  shared = jnp.where(earlier, shared, -1)
  hosts = jnp.argmax(shared, axis=-1)
  return build_prefix_tree(
    trunk, paths, shared.max(-1), num_nodes, hosts, origins
  )


def _host_nodes(
  firsts: Int[Array, "B K"],
  prefix_lengths: Int[Array, "B K"],
  hosts: Int[Array, "B K"] | None,
) -> Int[Array, "B K"]:
  """The node each branch hangs under; `firsts` are the branches' own first."""
  if hosts is None:
    return prefix_lengths
  at_host = lambda x: jnp.take_along_axis(x, jnp.maximum(hosts - 1, 0), axis=1)
  offsets = prefix_lengths - at_host(prefix_lengths) - 1
  return jnp.where(hosts == 0, prefix_lengths, at_host(firsts) + offsets)


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
