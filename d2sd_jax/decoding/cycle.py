"""One decode cycle, in the order of Sec. 3.1-3.3."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from d2sd_jax.config import TreeConfig
from d2sd_jax.decoding.policies import TreePolicy
from d2sd_jax.decoding.state import DecodeState, Models
from d2sd_jax.models.cache import append, commit_path
from d2sd_jax.models.target import TargetOutput
from d2sd_jax.sampling import Sampling
from d2sd_jax.tree import ANCHOR, PrefixTree
from d2sd_jax.typing import Array, Bool, Int
from d2sd_jax.verify import Verdict, longest_accepted_path, target_choices


def decode_cycle(
  models: Models,
  state: DecodeState,
  sampling: Sampling,
  *,
  policy: TreePolicy,
  config: TreeConfig,
) -> DecodeState:
  """Drafts a tree, verifies it in one pass, and commits 1 to γ tokens a row.

  Pure, with static shapes: one trace serves all lengths. What counts
  of rows that have finished does not change.

  Args:
    models: target and as many drafters as the policy uses.
    state: see `DecodeState`; donate it.
    sampling: how the target chooses.
    policy: which nodes the tree has, the mode (`POLICIES`).
    config: static sizes of the tree.

  Returns:
    The state after the cycle.
  """
  tree = policy.build(models, state, config)
  choose = functools.partial(score, models, state, sampling)
  if policy.may_abstain:
    drafted = tree.valid[:, 1:] & ~state.finished[:, None]
    alone = lambda tree: _score_anchor(choose, tree)
    choices, scores = jax.lax.cond(models.any(drafted), choose, alone, tree)
  else:
    choices, scores = choose(tree)
  verdict = longest_accepted_path(tree, choices, policy.max_path(config))
  return commit(models, state, tree, scores, verdict)


def score(
  models: Models, state: DecodeState, sampling: Sampling, tree: PrefixTree
) -> tuple[Int[Array, "B R"], TargetOutput]:
  """The target's choice after every node, and its pass without the logits.

  Args:
    models: see `decode_cycle`.
    state: see there.
    sampling: see there.
    tree: the candidates.
  """
  scores = models.target.score_tree(
    tree, state.target_cache, state.lengths, models.taps
  )
  choices = target_choices(
    scores.logits,
    state.lengths[:, None] + tree.depths,
    state.sequence_ids,
    sampling,
    models.axis,
  )
  return choices, dataclasses.replace(scores, logits=scores.logits[:, :0])


def _score_anchor(
  choose: Callable[[PrefixTree], tuple[Int[Array, "B R"], TargetOutput]],
  tree: PrefixTree,
) -> tuple[Int[Array, "B R"], TargetOutput]:
  """As `score`, of the anchor only; zeros stand for all other nodes."""
  choices, scores = choose(jax.tree.map(lambda x: x[:, :1], tree))
  missing = tree.tokens.shape[1] - 1

  def pad(x: Array, axis: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths)

  padded = dataclasses.replace(
    scores,
    features=pad(scores.features, 1),
    kv=jax.tree.map(lambda x: pad(x, 2), scores.kv),
  )
  return pad(choices, 1), padded


def commit(
  models: Models,
  state: DecodeState,
  tree: PrefixTree,
  scores: TargetOutput,
  verdict: Verdict,
) -> DecodeState:
  """Moves the accepted path into the caches and the tokens of every row.

  Only the path's keys and values reach the target's cache, only its features
  the drafters'; one static slab each, whose rows past the new length are
  hidden by it. A stop id or the length limit inside the path ends the row.

  Args:
    models: target and drafters.
    state: the state before the cycle.
    tree: the candidates.
    scores: the target's pass over them.
    verdict: the accepted path.

  Returns:
    The state after the cycle.
  """
  path = verdict.path
  new_tokens, origins = _new_tokens(tree, verdict)
  count, finished = _count_committed(state, new_tokens, verdict.num_accepted)
  positions = state.lengths[:, None] + jnp.arange(path.shape[1])
  features = jnp.take_along_axis(
    scores.features, path[:, :, None, None], axis=1
  )

  def extend(drafter, cache):
    own = models.features_of(drafter, features)
    return append(cache, drafter.context_kv(own, positions), state.lengths)

  # Never negative; but so that XLA knows that rows are written after the whole
  # pass has read the cache. A lone anchor's depend on nothing else, and would
  # be written into a copy of every layer's cache.
  starts = state.lengths + jnp.minimum(verdict.next_anchor, 0)
  at = jnp.arange(path.shape[0])[:, None], positions + 1
  return dataclasses.replace(
    state,
    tokens=state.tokens.at[at].set(new_tokens),
    origins=state.origins.at[at].set(origins),
    lengths=state.lengths + count,
    finished=finished,
    target_cache=commit_path(state.target_cache, scores.kv, path, starts),
    drafter_caches=tuple(
      extend(drafter, cache)
      for drafter, cache in zip(
        models.drafters, state.drafter_caches, strict=True
      )
    ),
    accepted=state.accepted.at[:, state.num_cycles].set(count),
    num_cycles=state.num_cycles + 1,
    num_verified=state.num_verified
    + jnp.where(state.finished, 0, tree.valid.sum(axis=1)),
  )


def _new_tokens(
  tree: PrefixTree, verdict: Verdict
) -> tuple[Int[Array, "B P"], Int[Array, "B P"]]:
  """Accepted tokens, then the next anchor; and where each came from."""
  on_path = lambda x: jnp.take_along_axis(
    x, jnp.roll(verdict.path, -1, axis=1), axis=1
  )
  last = jnp.arange(verdict.path.shape[1]) >= verdict.num_accepted[:, None]
  tokens = jnp.where(last, verdict.next_anchor[:, None], on_path(tree.tokens))
  return tokens, jnp.where(last, ANCHOR, on_path(tree.origins))


def _count_committed(
  state: DecodeState,
  new_tokens: Int[Array, "B P"],
  num_accepted: Int[Array, " B"],
) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
  """Tokens that count after stop ids and limits, and who has finished."""
  room = state.last_positions - state.lengths
  index = jnp.arange(new_tokens.shape[1])
  stops = (new_tokens[:, :, None] == state.stop_ids).any(-1)
  stops &= index <= num_accepted[:, None]
  first_stop = jnp.where(stops, index, new_tokens.shape[1]).min(-1)
  count = jnp.minimum(jnp.minimum(num_accepted, first_stop) + 1, room)
  count = jnp.where(state.finished, 0, count)
  stopped = first_stop < count
  return count, state.finished | stopped | (count >= room)
