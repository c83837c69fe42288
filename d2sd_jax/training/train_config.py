"""What one distillation run is told: `train.py --config`."""

import dataclasses

from d2sd_jax.config import DTYPES, ROLES, check_batch
from d2sd_jax.errors import require_at_least, require_fields
from d2sd_jax.sharding import BATCH_AXES

SLOT_WEIGHTINGS = ("exponential", "d_pace")
LOSSES = ("cross_entropy", "distillation")
OPTIMIZERS = ("adamw", "muon")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """One distillation run of one drafter (Sec. 3.4).

  Attributes:
    role: `dflash` trains drafter 1, `vp_drafter` drafter 2.
    corpus, heldout: JSON lines of conversations the target answered.
    init_from: a drafter folder to start from instead of random weights.
    num_anchors: blocks trained at once in every sequence (A).
    optimizer: `adamw`, or `muon`: orthogonalised updates of the matrices.
    loss: `cross_entropy` of the corpus's own tokens, or `distillation`, the
      divergence from the target's distributions.
    slot_weighting: `exponential`, by distance (Eq. 7), or `d_pace`, by the
      accepted tokens that hang on a slot.
    loss_decay: τ of exponential weights; `None` is the paper's for the block.
    prefix_decay: β of Eq. 6. min_prefix_length: 0 as in the paper's Eq. 6,
      1 as in its released code.
    first_drafter: for drafter 2: the folder of a drafter 1. In `failing_share`
      of the blocks in which drafter 1's draft goes wrong, the visible prefix
      then ends before the first wrong token, at l = 0 too, and not where Eq. 6
      says.
    loss_normalizer: `batch`, one ratio over the global batch, or `example`,
      the mean of one ratio per sequence.
    mesh: devices by axis, such as `data:4,fsdp:2`; `None` is one device. The
      batch is split over both axes, the drafter's weights and the optimizer's
      state over `fsdp` alone (see `sharding`).
    shard_target: the frozen target is split over `fsdp` too, not whole on
      every device.
  """

  target: str = "smollm2-135m"
  role: str = "dflash"
  corpus: str
  heldout: str
  init_from: str | None = None
  num_layers: int = 5
  block_size: int = 16
  target_layer_ids: tuple[int, ...] | None = None
  mask_token_id: int = 16
  num_anchors: int = 32
  max_length: int = 512
  batch_size: int = 64
  num_steps: int = 3000
  optimizer: str = "adamw"
  learning_rate: float = 1e-3
  warmup_fraction: float = 0.04
  weight_decay: float = 0.0
  clip_norm: float = 1.0
  loss: str = "cross_entropy"
  slot_weighting: str = "exponential"
  loss_decay: float | None = None
  prefix_decay: float = 0.9
  min_prefix_length: int = 0
  first_drafter: str | None = None
  failing_share: float = 0.75
  loss_normalizer: str = "batch"
  dtype: str = "bfloat16"
  mesh: str | None = None
  shard_target: bool = False
  seed: int = 0
  log_every: int = 20
  eval_every: int = 500
  eval_sequences: int = 256
  checkpoint_every: int = 500

  def __post_init__(self):
    require_at_least(
      *(self, 1, "num_layers", "num_anchors", "batch_size", "num_steps"),
      *("log_every", "eval_every", "eval_sequences", "checkpoint_every"),
    )
    require_fields(
      self,
      ("role", self.role in ROLES, f"one of {', '.join(ROLES)}"),
      ("block_size", self.block_size >= 2, "at least 2"),
      (
        "max_length",
        self.max_length > self.block_size,
        f"more than block_size = {self.block_size}",
      ),
      ("loss", self.loss in LOSSES, f"one of {', '.join(LOSSES)}"),
      (
        "slot_weighting",
        self.slot_weighting in SLOT_WEIGHTINGS,
        f"one of {', '.join(SLOT_WEIGHTINGS)}",
      ),
      (
        "optimizer",
        self.optimizer in OPTIMIZERS,
        f"one of {', '.join(OPTIMIZERS)}",
      ),
      ("learning_rate", 0 < self.learning_rate <= 1e3, "above 0, at most 1000"),
      ("warmup_fraction", 0 <= self.warmup_fraction < 1, "0 to below 1"),
      ("weight_decay", self.weight_decay >= 0, "0 or more"),
      ("clip_norm", self.clip_norm > 0, "above 0"),
      (
        "loss_decay",
        self.loss_decay is None or self.loss_decay > 0,
        "above 0",
      ),
      ("prefix_decay", 0 < self.prefix_decay <= 1, "above 0 and at most 1"),
      (
        "min_prefix_length",
        0 <= self.min_prefix_length <= self.block_size - 2,
        f"0 to block_size-2 = {self.block_size - 2}",
      ),
      (
        "first_drafter",
        self.first_drafter is None or self.role == "vp_drafter",
        "none, for only role=vp_drafter has a use for it",
      ),
      ("failing_share", 0 <= self.failing_share <= 1, "0 to 1"),
      (
        "loss_normalizer",
        self.loss_normalizer in ("batch", "example"),
        "batch or example",
      ),
      ("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
      ("seed", 0 <= self.seed < 2**32, "0 to 2^32-1"),
    )
    check_batch(self, BATCH_AXES)
