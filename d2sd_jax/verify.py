"""What the target makes of the tree: its choices and the accepted path."""

import dataclasses

import jax
import jax.numpy as jnp

from d2sd_jax.sampling import Sampling, sample
from d2sd_jax.tree import PrefixTree, ancestor_mask
from d2sd_jax.typing import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
  """The longest path of the tree that the target agrees with.

  Attributes:
    path: node indices from the anchor down, `path[0] == 0`; entries beyond
      `num_accepted` are 0.
    num_accepted: drafted tokens accepted, the anchor not counted.
    next_anchor: the target's own choice after the last accepted token.
  """

  path: Int[Array, "B P"]
  num_accepted: Int[Array, " B"]
  next_anchor: Int[Array, " B"]


def target_choices(
  logits: Float[Array, "B R V"],
  positions: Int[Array, "B R"],
  sequence_ids: Int[Array, " B"],
  sampling: Sampling,
  axis: str | None = None,
) -> Int[Array, "B R"]:
  """The token the target chooses after each node.

  Sampling noise depends on the seed, the sequence and the position of the
  token being chosen, and on nothing else: whichever tree a position is
  reached through, the choice there is the same. That makes speculative output
  equal plain autoregressive output token for token.

  Args:
    logits: the target's logits at each node.
    positions: position of each *node* in its sequence; its choice is the token
      at `positions + 1`.
    sequence_ids: the prompt's index in the input, never the batch row.
    sampling: how to choose.
    axis: of a mesh, over whose devices the vocabulary is split.

  Returns:
    int32 token ids.
  """
  return sample(logits, positions + 1, sequence_ids, sampling, axis)


def longest_accepted_path(
  tree: PrefixTree, choices: Int[Array, "B R"], max_length: int
) -> Verdict:
  """The deepest node all of whose tokens the target chose (Sec. 3.3).

  A node is accepted when its parent is and its token is the parent's choice.
  Siblings may carry the same token: every matching path stays alive, and the
  deepest wins; among equals the lowest node, so the trunk before a branch.

  Args:
    tree: the candidates.
    choices: the target's choice after each node.
    max_length: P, the nodes of the longest path, the anchor included.

  Returns:
    The accepted path.
  """
  parent_choice = jnp.take_along_axis(
    choices, jnp.maximum(tree.parents, 0), axis=1
  )
  matches = tree.valid & (tree.tokens == parent_choice)
  matches = matches.at[:, 0].set(True)
  ancestors = ancestor_mask(tree.parents)
  accepted = matches & ~(ancestors & ~matches[:, None, :]).any(-1)
  last = jnp.argmax(jnp.where(accepted, tree.depths, -1), axis=1)
  row = lambda x: jnp.take_along_axis(x, last[:, None], axis=1)[:, 0]

  on_path = jnp.take_along_axis(ancestors, last[:, None, None], axis=1)[:, 0]
  at_depth = tree.depths[:, None, :] == jnp.arange(max_length)[:, None]
  nodes = jnp.arange(tree.tokens.shape[1])
  path = jnp.where(at_depth & on_path[:, None, :], nodes, 0).sum(-1)
  return Verdict(
    path=path.astype(jnp.int32),
    num_accepted=row(tree.depths),
    next_anchor=row(choices),
  )
