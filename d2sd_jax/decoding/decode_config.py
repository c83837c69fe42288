"""What decoding is told: `decode.py`'s flags and config."""

import dataclasses

from d2sd_jax.config import DRAFTER_WEIGHTS, DTYPES, MODES, check_batch
from d2sd_jax.errors import require, require_fields
from d2sd_jax.sharding import DECODING_AXES


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
  """Everything `decode.py` can be told; `None` means "decide at run time".

  Mode `auto` decides the policy, its block and its branches; a block that is
  set holds.

  Drafter weights in `bfloat16` are as their files hold them, and are computed
  with in `dtype`; `int8` cannot change the output, only how much is accepted.

  Attributes:
    num_branches: `None` is 4, or as many as a shorter block can have.
    mesh: devices by axis, such as `data:2,tensor:4`; `None` is one device. The
      batch is split over `data`, the target over `tensor`.
    shard_drafters: drafters are split over `tensor` too, not whole on every
      device.
  """

  target: str = "smollm2-135m"
  drafter: str = "smollm2-135m-dflash"
  vp_drafter: str = "smollm2-135m-vp"
  mode: str = "auto"
  block_size: int | None = None
  num_branches: int | None = None
  second_block_size: int | None = None
  node_budget: int | None = None
  forbid_repeat: bool = True
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  max_new_tokens: int = 256
  seed: int = 0
  dtype: str | None = None
  drafter_weights: str = "bfloat16"
  batch_size: int = 1
  mesh: str | None = None
  shard_drafters: bool = False

  def __post_init__(self):
    modes = (*MODES, "compare", "auto")
    require_fields(
      self,
      ("mode", self.mode in modes, f"one of {', '.join(modes)}"),
      (
        "block_size",
        self.block_size is None or self.block_size >= 2,
        "at least 2",
      ),
      (
        "num_branches",
        self.num_branches is None or self.num_branches >= 0,
        "0 or more",
      ),
      ("temperature", 0 <= self.temperature <= 1e30, "0 or more, to 1e30"),
      ("top_k", self.top_k >= 0, "0 (off) or more"),
      ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
      ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
      ("seed", 0 <= self.seed < 2**32, "0 to 2^32-1"),
      ("batch_size", self.batch_size >= 1, "at least 1"),
      (
        "dtype",
        self.dtype is None or self.dtype in DTYPES,
        f"one of {', '.join(DTYPES)}",
      ),
      (
        "drafter_weights",
        self.drafter_weights in DRAFTER_WEIGHTS,
        f"one of {', '.join(DRAFTER_WEIGHTS)}",
      ),
    )
    check_batch(self, DECODING_AXES)
    fits = self.mesh is not None or not self.shard_drafters
    require(fits, "shard_drafters", self.shard_drafters, "False without a mesh")
