"""A target that counts: after token t comes t + 1, mod 53.

It is a table, so every expectation can be counted on one's fingers. The
drafters count as well, but for the positions that a test names.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from d2sd_jax import KVCache, Models, TargetOutput

VOCAB = 53
MASK = 30
BLOCK = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
  """A target of no layers: logits depend on the token alone."""

  logits: jax.Array

  def init_cache(self, batch_size, capacity):
    del batch_size, capacity
    return KVCache(keys=(), values=())

  def embed(self, tokens):
    return jax.nn.one_hot(tokens, VOCAB)

  def head(self, hidden):
    return hidden

  def prefill(self, tokens, lengths, taps):
    last = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0]
    return self._output(self.logits[last], tokens, taps)

  def score_tree(self, tree, cache, lengths, taps):
    del lengths
    assert len(cache) == 0
    return self._output(self.logits[tree.tokens], tree.tokens, taps)

  def _output(self, logits, tokens, taps):
    features = jnp.zeros((*tokens.shape, len(taps), VOCAB))
    return TargetOutput(
      logits=logits, features=features, kv=KVCache(keys=(), values=())
    )


def successor():
  following = (np.arange(VOCAB) + 1) % VOCAB
  return Table(logits=5.0 * jax.nn.one_hot(following, VOCAB))


def drafter_config(**changes):
  return dataclasses.replace(
    tiny.DFLASH,
    vocab_size=VOCAB,
    hidden_size=VOCAB,
    mask_token_id=MASK,
    target_layer_ids=(1,),
    block_size=BLOCK,
    **changes,
  )


def planted(prompts, wrong=(), second_wrong=()):
  """Two drafters that count on like the table, but for some positions."""
  plan = np.zeros((len(prompts), 48), np.int32)
  for row, prompt in zip(plan, prompts, strict=True):
    row[:] = (prompt[0] + np.arange(48)) % VOCAB

  def plant(positions):
    errors = np.zeros_like(plan)
    errors[:, list(positions)] = 3
    return tiny.PlantedDrafter(
      inner=tiny.drafter(drafter_config()),
      tokens=jnp.asarray(plan),
      wrong=jnp.asarray(errors),
      sharpness=jnp.where(errors > 0, 1.0, 9.0),
      directions=jnp.eye(VOCAB),
    )

  return Models(
    target=successor(), drafters=(plant(wrong), plant(second_wrong))
  )
