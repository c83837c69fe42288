"""What is measured: sizes of the models, the grid, and how long."""

import dataclasses

import jax

from d2sd_jax.config import (
  DRAFTER_WEIGHTS,
  DTYPES,
  DrafterConfig,
  TargetConfig,
  TreeConfig,
  default_target_layer_ids,
)
from d2sd_jax.errors import require, require_at_least
from d2sd_jax.kernels.cascade_attention.api import IMPLEMENTATIONS
from d2sd_jax.sharding import DATA, DECODING_AXES, TENSOR, parse_mesh
from d2sd_jax.tensor_parallel import check_split
from d2sd_jax.timing import check_seconds

_SIZES = (
  *("vocab_size", "hidden_size", "intermediate_size", "num_layers"),
  *("num_heads", "num_kv_heads", "head_dim", "drafter_layers", "repeats"),
  *("copy_megabytes", "gemm_size", "grid_nodes"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
  """One benchmark.

  Attributes:
    num_taps: target layers the drafters read.
    drafter_weights: `bfloat16` is `dtype`, unquantised.
    mesh: the devices that share the models, such as `data:1,tensor:4`; `None`
      is one device.
    shard_drafters: whether they share the drafters too, or each has both.
    implementation: of the target's attention; `None` chooses.
    batches, caches: the grid; all rows at the first of both, and elsewhere
      the AR step, `grid_nodes` nodes verified and the whole cycle.
    verify_nodes: sizes of the trees verified at the first of both.
    op_shapes, op_implementations: see
      `d2sd_jax.kernels.cascade_attention.bench`.
    repeats: timed calls of a row; its median counts.
    seconds: about how long their steps last (`d2sd_jax.timing`).
    copy_megabytes, gemm_size: of the arrays that measure the device's rates.
    out: the results file.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  tied_head: bool = False
  qk_norm: bool = True
  drafter_layers: int = 5
  num_taps: int = 5
  block_size: int = 16
  num_branches: int = 4
  dtype: str | None = None
  drafter_weights: str = "bfloat16"
  mesh: str | None = None
  shard_drafters: bool = False
  implementation: str | None = None
  batches: tuple[int, ...] = (1, 4, 16)
  caches: tuple[int, ...] = (1024, 8192, 32768)
  verify_nodes: tuple[int, ...] = (16, 32, 64, 80, 128, 256)
  grid_nodes: int = 80
  op_shapes: tuple[str, ...] = ()
  op_implementations: tuple[str, ...] = ("xla",)
  repeats: int = 7
  seconds: float = 0.2
  copy_megabytes: int = 2048
  gemm_size: int = 8192
  seed: int = 0
  out: str = "results/bench.json"

  def __post_init__(self):
    require_at_least(self, 1, *_SIZES)
    for field in ("batches", "caches", "verify_nodes"):
      chosen = getattr(self, field)
      fits = len(chosen) == len(set(chosen)) > 0 and min(chosen) > 0
      require(fits, field, chosen, "sizes of 1 or more, each once")
    room = self.tree.branch_size + 1
    smallest = min(self.caches)
    require(smallest > room, "caches", smallest, f"more than {room} rows")
    for field, known in (
      ("dtype", (None, *DTYPES)),
      ("drafter_weights", DRAFTER_WEIGHTS),
      ("implementation", (None, *IMPLEMENTATIONS)),
    ):
      value = getattr(self, field)
      names = ", ".join(name for name in known if name)
      require(value in known, field, value, f"one of {names}")
    check_seconds(self.seconds)
    self._check_mesh()
    # What does not fit together is refused there.
    _ = self.target, self.drafter

  def _check_mesh(self):
    sizes = self.mesh_sizes
    check_split(self.target, sizes[TENSOR])
    parts = sizes[DATA]
    fits = all(batch % parts == 0 for batch in self.batches)
    expected = f"multiples of {parts}, the size of mesh axis {DATA}"
    require(fits, "batches", self.batches, expected)
    fits = self.mesh is not None or not self.shard_drafters
    require(fits, "shard_drafters", self.shard_drafters, "a mesh with it")

  @property
  def mesh_sizes(self) -> dict[str, int]:
    """Of the axes `data` and `tensor`; 1 where there is no mesh."""
    return parse_mesh(self.mesh, DECODING_AXES)

  @property
  def dtype_name(self) -> str:
    """Of weights and caches: float32 on a CPU, else bfloat16."""
    on_cpu = jax.default_backend() == "cpu"
    return self.dtype or ("float32" if on_cpu else "bfloat16")

  @property
  def tree(self) -> TreeConfig:
    """Of the whole cycle, mode `d2sd`."""
    return TreeConfig(
      block_size=self.block_size, num_branches=self.num_branches
    )

  @property
  def target(self) -> TargetConfig:
    """Shape of the target."""
    return TargetConfig(
      num_layers=self.num_layers,
      intermediate_size=self.intermediate_size,
      tied_head=self.tied_head,
      qk_norm=self.qk_norm,
      **self._shared,
    )

  @property
  def drafter(self) -> DrafterConfig:
    """Shape of both drafters."""
    return DrafterConfig(
      num_layers=self.drafter_layers,
      intermediate_size=self.intermediate_size,
      block_size=self.block_size,
      mask_token_id=self.vocab_size - 1,
      target_layer_ids=default_target_layer_ids(self.num_layers, self.num_taps),
      num_target_layers=self.num_layers,
      **self._shared,
    )

  @property
  def _shared(self) -> dict:
    return {
      "vocab_size": self.vocab_size,
      "hidden_size": self.hidden_size,
      "num_heads": self.num_heads,
      "num_kv_heads": self.num_kv_heads,
      "head_dim": self.head_dim,
      "rope_theta": 1e6,
      "rms_norm_eps": 1e-6,
      "max_length": 2 * max(self.caches),
    }
