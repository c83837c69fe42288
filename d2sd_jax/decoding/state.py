"""The state of decoding, and its one allocator."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from d2sd_jax.decoding.placement import (
  ROWS,
  WHOLE,
  cache_spec,
  model_specs,
  spread,
)
from d2sd_jax.errors import require
from d2sd_jax.kernels.dot import matmul
from d2sd_jax.kernels.quantized import QuantizedMatrix, quantize
from d2sd_jax.models.cache import KVCache, append
from d2sd_jax.models.drafter import Drafter
from d2sd_jax.sampling import Sampling, draft_key
from d2sd_jax.sharding import DATA
from d2sd_jax.tensor_parallel import bar_padding
from d2sd_jax.typing import Array, Bool, Float, Int
from d2sd_jax.verify import target_choices


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Models:
  """A target and as many drafters as the tree policy uses (0, 1 or 2).

  Attributes:
    target: implements `Target`.
    drafters: drafter 1, then the `vp_drafter`. The loop runs their fused form,
      and makes it in every call unless `fused` has made it once.
    draft_head: the target's head in int8, for drafts; `None` is the head
      itself.
    mesh: the devices that the models lie on, split or whole, and that
      decoding runs on; `None` is one device.
  """

  target: Any
  drafters: tuple[Any, ...] = ()
  draft_head: QuantizedMatrix | None = None
  mesh: Mesh | None = dataclasses.field(default=None, metadata={"static": True})

  @property
  def axis(self) -> str | None:
    """Of the mesh, over whose devices the vocabulary is split."""
    return getattr(self.target, "axis", None)

  def check_mesh(self, batch_size: int) -> None:
    """Raises `UsageError` where models and batch do not fit the mesh."""
    split = self.axis
    if self.mesh is None:
      require(split is None, "models.mesh", None, f"one with an axis {split}")
      return
    for axis in (DATA, *([split] if split else [])):
      fits = axis in self.mesh.shape
      require(fits, "models.mesh", dict(self.mesh.shape), f"an axis {axis}")
    rows = self.mesh.shape[DATA]
    fits = batch_size % rows == 0
    require(fits, "batch", batch_size, f"a multiple of {rows}, of mesh {DATA}")

  def any(self, flags: Bool[Array, "..."]) -> Bool[Array, ""]:
    """Whether one is true, in a row of any device."""
    found = flags.any()
    if self.mesh is None:
      return found
    return jax.lax.psum(found.astype(jnp.int32), DATA) > 0

  @property
  def taps(self) -> tuple[int, ...]:
    """Target layers any drafter reads, ascending."""
    ids = (d.config.target_layer_ids for d in self.drafters)
    return tuple(sorted({i for layer_ids in ids for i in layer_ids}))

  def fused(self) -> "Models":
    """The same models, each `Drafter` fused; others are left as they are."""
    fuse = lambda d: d.fuse() if isinstance(d, Drafter) else d
    return dataclasses.replace(self, drafters=tuple(map(fuse, self.drafters)))

  def with_int8_drafting(self) -> "Models":
    """Drafters, and the head for drafts only, in int8.

    What the target chooses is untouched, so the output is the same; drafts,
    and with them α, may differ. A target of your own needs `head_weight`,
    `[V, D]`, or drafts go through its head as it is.
    """
    head = getattr(self.target, "head_weight", None)
    return dataclasses.replace(
      self,
      drafters=tuple(drafter.quantize() for drafter in self.fused().drafters),
      draft_head=None if head is None else quantize(head, summed=1),
    )

  def draft_logits(self, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
    """Float32 logits of a drafter's hidden states."""
    if self.draft_head is None:
      return self.target.head(hidden)
    logits = matmul("...d,vd->...v", hidden, self.draft_head, jnp.float32)
    if self.axis is None:
      return logits
    # Rows that fill the devices' shares up score 0, like any others of zeros.
    return bar_padding(logits, self.target.config.vocab_size, self.axis)

  def features_of(
    self, drafter: Any, features: Float[Array, "B R taps D"]
  ) -> Float[Array, "B R own_taps D"]:
    """One drafter's own taps among all that were taken."""
    own = [self.taps.index(i) for i in drafter.config.target_layer_ids]
    return features if len(own) == len(self.taps) else features[:, :, own]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeState:
  """What a decode cycle reads and returns; donate it.

  At the start of a cycle every cache holds exactly tokens `[0, lengths)`; the
  token at index `lengths` is the anchor: committed, without keys and values.

  Attributes:
    tokens: prompt and committed tokens; what lies past the anchor is garbage.
    lengths: n, rows of the caches in use.
    last_positions: index that the last token of a row may have.
    finished: the row committed a stop id or reached its last position.
    stop_ids: ids that end a row.
    sequence_ids: the prompt's index in the input, for sampling noise.
    target_cache: the target's keys and values.
    drafter_caches: one per drafter: its keys and values of target features.
    num_cycles: cycles run so far.
    accepted: tokens each cycle committed; 0 once a row had finished.
    origins: which pass proposed each token (`d2sd_jax.tree`); the target's own
      choices are `ANCHOR`.
    num_verified: tree nodes the target was asked about, by row; none once the
      row had finished.
    draft_key: for drafts that are drawn; never the target's own noise.
  """

  tokens: Int[Array, "B S"]
  lengths: Int[Array, " B"]
  last_positions: Int[Array, " B"]
  finished: Bool[Array, " B"]
  stop_ids: Int[Array, " stops"]
  sequence_ids: Int[Array, " B"]
  target_cache: KVCache
  drafter_caches: tuple[KVCache, ...]
  num_cycles: Int[Array, ""]
  accepted: Int[Array, "B S"]
  origins: Int[Array, "B S"]
  num_verified: Int[Array, " B"]
  draft_key: Int[Array, " words"]

  @property
  def anchors(self) -> Int[Array, " B"]:
    """The last committed token of each row."""
    index = self.lengths[:, None]
    return jnp.take_along_axis(self.tokens, index, axis=1)[:, 0]


def state_specs(models: Models) -> DecodeState:
  """The `PartitionSpec` of each field of a state, of a cache for all layers."""
  specs: dict[str, Any] = {
    field.name: ROWS for field in dataclasses.fields(DecodeState)
  }
  specs |= dict.fromkeys(("stop_ids", "num_cycles", "draft_key"), WHOLE)
  specs["target_cache"] = cache_spec(models.target)
  specs["drafter_caches"] = tuple(map(cache_spec, models.drafters))
  return DecodeState(**specs)


def prefill(
  models: Models,
  tokens: Int[Array, "B T"],
  prompt_lengths: Int[Array, " B"],
  max_new_tokens: Int[Array, " B"],
  sequence_ids: Int[Array, " B"],
  stop_ids: Int[Array, " stops"],
  sampling: Sampling,
  *,
  capacity: int,
) -> DecodeState:
  """Runs the prompts and chooses the first anchor of every row.

  Args:
    models: target and drafters.
    tokens: prompts, padded on the right to T; any padding id will do.
    prompt_lengths: real tokens of each prompt, at least 1.
    max_new_tokens: limit of each row; 0 for a row that is only there to fill
      the batch, which then is finished from the start.
    sequence_ids: index of each prompt in the input.
    stop_ids: ids that end a row.
    sampling: how tokens are chosen.
    capacity: S, rows of all caches; at least T, and at least the longest
      prompt plus its new tokens plus the longest path of a tree. On a TPU a
      multiple of 128, so that caches are written in place.

  Raises:
    UsageError: the models lie on a mesh that is not theirs, or does not split
      the batch evenly.

  Returns:
    The state before the first cycle; its first new token is the anchor. It may
    share `sequence_ids` and `stop_ids`, which then go when it is donated.
  """
  models = models.fused()
  models.check_mesh(len(tokens))
  start = spread(
    functools.partial(_prefill, capacity=capacity),
    models.mesh,
    (model_specs(models), ROWS, ROWS, ROWS, ROWS, WHOLE, WHOLE),
    state_specs(models),
  )
  return start(
    *(models, tokens, prompt_lengths, max_new_tokens, sequence_ids),
    *(stop_ids, sampling),
  )


def _prefill(
  models,
  tokens,
  prompt_lengths,
  max_new_tokens,
  sequence_ids,
  stop_ids,
  sampling,
  *,
  capacity,
):
  """`prefill` of the rows of one device."""
  batch, size = tokens.shape
  output = models.target.prefill(tokens, prompt_lengths, models.taps)
  first = target_choices(
    output.logits[:, None],
    prompt_lengths[:, None] - 1,
    sequence_ids,
    sampling,
    models.axis,
  )
  start = jnp.zeros((batch,), jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(size), tokens.shape)

  def context(drafter):
    features = models.features_of(drafter, output.features)
    rows = drafter.context_kv(features, positions)
    return append(drafter.init_cache(batch, capacity), rows, start)

  last_positions = prompt_lengths + max_new_tokens - 1
  stopped = (first == stop_ids).any(-1) | (prompt_lengths >= last_positions)
  # Not `.at[].set`: where nothing is left, its empty indices end XLA's
  # partitioner on several GPUs.
  buffer = jnp.pad(tokens, ((0, 0), (0, capacity - size)))
  rows = jnp.arange(batch)
  return DecodeState(
    tokens=buffer.at[rows, prompt_lengths].set(first[:, 0]),
    lengths=prompt_lengths.astype(jnp.int32),
    last_positions=last_positions.astype(jnp.int32),
    finished=stopped,
    stop_ids=stop_ids,
    sequence_ids=sequence_ids,
    target_cache=append(
      models.target.init_cache(batch, capacity), output.kv, start
    ),
    drafter_caches=tuple(context(d) for d in models.drafters),
    num_cycles=jnp.int32(0),
    accepted=jnp.zeros((batch, capacity), jnp.int32),
    origins=jnp.zeros((batch, capacity), jnp.int8),
    num_verified=start,
    draft_key=draft_key(sampling.seed),
  )
