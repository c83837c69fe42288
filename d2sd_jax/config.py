"""Frozen, hashable configurations; an unknown key or a bad value is an error.

Static sizes live here and are compiled in. What may change without compiling
again (temperature, seed, filters) is a pytree: `d2sd_jax.sampling.Sampling`.
"""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from d2sd_jax.errors import UsageError, require, require_at_least
from d2sd_jax.models.rope import RopeScaling
from d2sd_jax.sharding import batch_shards, parse_mesh

MODES = (
  *("ar", "prompt_lookup", "dflash", "dflash_samples"),
  *("reuse", "d2sd", "d2sd_3"),
)
COMPARED = ("ar", "dflash", "d2sd")
DTYPES = ("float32", "bfloat16")
DRAFTER_WEIGHTS = ("bfloat16", "int8")
ROLES = ("dflash", "vp_drafter")
# Rows of a tile in the memories of GPUs and TPUs.
NODE_TILE = 8
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetConfig:
  """Shape of a target; a family is a config: Llama, Qwen3, GPT-OSS.

  Attributes:
    intermediate_size: of the feed-forward network, or of each expert.
    rope_scaling: how RoPE is stretched; `None` is not at all.
    qk_norm: RMS norms on queries and keys (Qwen3).
    attention_bias: queries, keys, values and the output have biases.
    sinks: a learnt logit per head joins the softmax's denominator.
    windows: tokens seen by each layer, the token itself included; `None` is
      all of them, and no entries at all that every layer sees all.
    num_experts: experts of each layer; 0 is one plain SwiGLU.
    experts_per_token: how many of them a token takes.
    swiglu_limit: clamps the experts' activations.
    mxfp4: the experts' matrices are published as 4-bit blocks with scales.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float
  rms_norm_eps: float
  max_length: int
  tied_head: bool
  qk_norm: bool = False
  rope_scaling: RopeScaling | None = None
  attention_bias: bool = False
  sinks: bool = False
  windows: tuple[int | None, ...] = ()
  num_experts: int = 0
  experts_per_token: int = 0
  swiglu_limit: float = 7.0
  mxfp4: bool = False

  def window(self, layer: int) -> int | None:
    """Tokens that a layer sees, the token itself included."""
    return self.windows[layer] if self.windows else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrafterConfig:
  """Shape of a drafter; both drafters share the architecture.

  Attributes:
    block_size: slots in a block, the anchor included (γ in the paper).
    mask_token_id: the vocabulary id that stands for a slot to be filled.
    target_layer_ids: the target layers whose outputs are tapped.
    training_mode: `dflash` (drafter 1) or `vp_drafter` (drafter 2).
    prefix_weight_base: β of Eq. 6, the prior the `vp_drafter` trained with.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float
  rms_norm_eps: float
  max_length: int
  block_size: int
  mask_token_id: int
  target_layer_ids: tuple[int, ...]
  num_target_layers: int
  training_mode: str = "dflash"
  prefix_weight_base: float = 0.9
  # What targets choose and drafters do not.
  rope_scaling: ClassVar[RopeScaling | None] = None
  qk_norm: ClassVar[bool] = True
  attention_bias: ClassVar[bool] = False
  sinks: ClassVar[bool] = False
  num_experts: ClassVar[int] = 0

  def __post_init__(self):
    require_at_least(
      *(self, 1, "vocab_size", "hidden_size", "intermediate_size"),
      *("num_layers", "num_heads", "num_kv_heads", "head_dim", "max_length"),
    )
    shared = self.num_heads % self.num_kv_heads == 0
    expected = f"a divisor of num_heads = {self.num_heads}"
    require(shared, "num_kv_heads", self.num_kv_heads, expected)
    require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number")
    for field in ("rope_theta", "rms_norm_eps"):
      value = getattr(self, field)
      require(0 < value < float("inf"), field, value, "above 0, and finite")
    require(self.block_size >= 2, "block_size", self.block_size, "at least 2")
    require(
      self.training_mode in ROLES,
      "training_mode",
      self.training_mode,
      f"one of {', '.join(ROLES)}",
    )
    require(
      0 <= self.mask_token_id < self.vocab_size,
      "mask_token_id",
      self.mask_token_id,
      f"an id of the vocabulary, below {self.vocab_size}",
    )
    ids = self.target_layer_ids
    require(
      len(ids) > 0
      and list(ids) == sorted(set(ids))
      and ids[0] >= 0
      and ids[-1] < self.num_target_layers,
      "target_layer_ids",
      ids,
      f"ascending layer numbers below {self.num_target_layers}",
    )

  def check_fits(self, target: TargetConfig) -> None:
    """Raises `UsageError` unless the drafter was made for such a target.

    A shared embedding and head force equal widths and vocabularies; taps
    count the target's layers.
    """
    for field, mine, theirs in (
      ("hidden_size", self.hidden_size, target.hidden_size),
      ("vocab_size", self.vocab_size, target.vocab_size),
      ("num_target_layers", self.num_target_layers, target.num_layers),
    ):
      require(
        mine == theirs, f"drafter {field}", mine, f"the target's {theirs}"
      )


def default_target_layer_ids(
  num_layers: int, num_taps: int, field: str = "num_taps"
) -> tuple[int, ...]:
  """Tapped layers: evenly from 1 to L-3, rounded half to even.

  `default_target_layer_ids(36, 5) == (1, 9, 17, 25, 33)`. A single tap is the
  middle layer, L // 2.

  Args:
    num_layers: L, of the target.
    num_taps: how many layers to tap.
    field: what an error calls the number of taps.
  """
  if num_taps == 1:
    return (num_layers // 2,)
  last = num_layers - 3
  require(
    1 < num_taps <= last,
    field,
    num_taps,
    f"1 to {max(last, 1)} taps for a target of {num_layers} layers",
  )
  step = (last - 1) / (num_taps - 1)
  return tuple(round(1 + step * i) for i in range(num_taps))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeConfig:
  """What a tree policy may draft: static sizes of the prefix tree.

  Attributes:
    block_size: slots in the first draft, anchor included (γ).
    num_branches: branches of the second draft (K).
    second_block_size: slots of a branch, anchor included; `None` is γ.
    node_budget: nodes of the tree (R); `None` is as many as can be used, in
      whole tiles of 8.
    forbid_repeat: a branch may not begin with the token it is to correct:
      where it repeats that, the target has refused it with the trunk's.
  """

  block_size: int = 16
  num_branches: int = 4
  second_block_size: int | None = None
  node_budget: int | None = None
  forbid_repeat: bool = True

  def __post_init__(self):
    gamma, branches = self.block_size, self.num_branches
    require(gamma >= 2, "block_size", gamma, "at least 2")
    require(
      0 <= branches <= gamma - 1,
      "num_branches",
      branches,
      f"0 to block_size-1 = {gamma - 1}",
    )
    if self.second_block_size is not None:
      require(
        self.second_block_size >= gamma,
        "second_block_size",
        self.second_block_size,
        f"at least block_size = {gamma}",
      )
    if self.node_budget is not None:
      require(
        self.node_budget >= gamma,
        "node_budget",
        self.node_budget,
        f"at least block_size = {gamma}",
      )

  @property
  def branch_size(self) -> int:
    """Slots of one branch of the second draft, anchor included."""
    return self.second_block_size or self.block_size

  @property
  def most_nodes(self) -> int:
    """The most nodes that a trunk and K branches can ever use.

    Branch i hangs `branch_size - 1 - i` nodes under trunk node i; the K
    branches are distinct, so at most the K longest suffixes occur together.
    """
    suffixes = (self.branch_size - 1 - i for i in range(self.num_branches))
    return self.block_size + sum(suffixes)

  @property
  def num_nodes(self) -> int:
    """Nodes R of the tree: the budget, or as many as can be used."""
    return self.within_budget(self.most_nodes)

  def within_budget(self, most: int) -> int:
    """Slots for `most` nodes, in whole tiles; never more than the budget.

    Kernels take whole tiles of rows: spare slots once in the tree cost less
    than padding the operands of every layer.
    """
    whole = -(-most // NODE_TILE) * NODE_TILE
    return min(self.node_budget or whole, whole)


def check_batch(config: Any, axes: Sequence[str]) -> None:
  """Raises `UsageError` unless a mesh of these axes splits the batch evenly.

  Args:
    config: of a run, with `mesh` and `batch_size`.
    axes: a mesh may have.
  """
  shards = batch_shards(parse_mesh(config.mesh, axes))
  require(
    config.batch_size % shards == 0,
    "batch_size",
    config.batch_size,
    f"a multiple of {shards}, the parts that mesh={config.mesh!r} makes",
  )


def from_mapping(cls: type[_T], values: Mapping[str, Any]) -> _T:
  """Builds a config dataclass; an unknown or missing key is a `UsageError`.

  Types are checked against the field's annotation (an int may stand for a
  float; a list for a tuple), so that a bad config fails before any work.
  """
  fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
  for key in values:
    if key not in fields:
      raise UsageError(
        f"config key {key!r}: expected one of {', '.join(sorted(fields))}"
      )
  for name, field in fields.items():
    if field.default is dataclasses.MISSING and name not in values:
      raise UsageError(f"config key {name!r} is missing from the config")
  return cls(**{k: _coerce(k, v, fields[k].type) for k, v in values.items()})


def _coerce(key: str, value: Any, annotation: Any) -> Any:
  """`value` as the annotated type, or a `UsageError` that names the key."""
  if isinstance(value, list):
    value = tuple(value)
  if annotation in (float, float | None) and type(value) is int:
    require(abs(value) < 2**1000, f"config key {key}", "...", "a float")
    value = float(value)
  if isinstance(value, tuple):
    value = _coerce_items(key, value, annotation)
  optional = value is None and isinstance(None, _classes(annotation))
  kinds = _classes(annotation)
  right = optional or (
    isinstance(value, kinds) and not (type(value) is bool and bool not in kinds)
  )
  expected = " or ".join(k.__name__ for k in kinds)
  require(right, f"config key {key}", value, f"a value of type {expected}")
  return value


def _coerce_items(
  key: str, values: tuple[Any, ...], annotation: Any
) -> tuple[Any, ...]:
  """The items of a tuple as `tuple[T, ...]` wants them."""
  members = (annotation, *typing.get_args(annotation))
  tuples = [m for m in members if typing.get_origin(m) is tuple]
  kind = typing.get_args(tuples[0])[0] if tuples else int
  if kind is float:
    values = tuple(float(v) if type(v) is int else v for v in values)
  names = {int: "whole numbers", float: "numbers", str: "text"}
  right = all(type(item) is kind for item in values)
  require(right, f"config key {key}", values, names[kind])
  return values


def _classes(annotation: Any) -> tuple[type, ...]:
  """The plain classes of an annotation such as `int | None`."""
  members = getattr(annotation, "__args__", None)
  if members is None or getattr(annotation, "__origin__", None) is tuple:
    return (getattr(annotation, "__origin__", annotation),)
  return tuple(t for m in members for t in _classes(m))
