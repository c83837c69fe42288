"""What a corpus is made of."""

import dataclasses
from pathlib import Path

from d2sd_jax.config import DTYPES
from d2sd_jax.errors import require

# Sequence ids of a file and step are told apart up to 2^29.
LIMITS = {
  "num_conversations": 10**8,
  "num_heldout": 10**6,
  "num_shards": 10**4,
  "batch_size": 2**16,
  "sort_window": 2**10,
}
# Of all other whole numbers: lengths in tokens.
MAX_TOKENS = 2**17


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusConfig:
  """One corpus; everything but the file names decides what is written.

  Attributes:
    out, heldout: JSON lines of conversations; the second is never trained on
      and is answered greedily throughout.
    num_shards: files that `out` is split into, if more than one.
    exclude: JSON lines of prompts that may not be trained on.
    share_...: about how many of the turns come from a source of prompts; a
      source that runs out gives what it has.
    dtype: `None` is float32 on a CPU and bfloat16 elsewhere.
    max_turn_tokens, max_answer_tokens: longest turn and answer.
    max_prefix_tokens, max_prompt_tokens: most tokens of what they follow.
    prompt_lengths: shorter static lengths that batches of prompts may have;
      each is a program to compile.
    min_answer_tokens: shorter answers are dropped.
    sort_window: batches of turns that are sorted by length before they are
      answered, so that short prompts do not wait for long ones.
  """

  out: str
  heldout: str
  num_conversations: int = 61440
  num_shards: int = 1
  num_heldout: int = 512
  batch_size: int = 2048
  seed: int = 0
  target: str = "smollm2-135m"
  dtype: str | None = None
  exclude: str | None = None
  max_turn_tokens: int = 120
  max_answer_tokens: int = 256
  max_prefix_tokens: int = 96
  max_prompt_tokens: int = 192
  prompt_lengths: tuple[int, ...] = (96, 128)
  min_answer_tokens: int = 8
  sort_window: int = 8
  share_nq_open: float = 0.0
  share_boolq: float = 0.0
  share_mmlu: float = 0.0
  share_reasoning_gym: float = 0.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type is int and field.name != "seed":
        most = LIMITS.get(field.name, MAX_TOKENS)
        require(1 <= value <= most, field.name, value, f"1 to {most}")
    require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2^32-1")
    known = self.dtype is None or self.dtype in DTYPES
    require(known, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
    lengths = self.prompt_lengths
    positive = all(length >= 1 for length in lengths)
    require(positive, "prompt_lengths", lengths, "lengths of 1 or more")
    for name, share in self.shares.items():
      require(0 <= share < 1, f"share_{name}", share, "0 to below 1")
    total = sum(self.shares.values())
    require(total <= 0.9, "share_...", total, "at most 0.9 in all")
    most = self.num_conversations
    fits = self.num_shards <= most
    require(fits, "num_shards", self.num_shards, f"at most {most}")
    stem = lambda path: Path(path).resolve().with_suffix("")
    same = stem(self.out) == stem(self.heldout)
    require(not same, "heldout", self.heldout, "another name than out's")

  @property
  def shares(self) -> dict[str, float]:
    """The share of every source, by its name."""
    prefix = "share_"
    values = vars(self).items()
    return {
      k.removeprefix(prefix): v for k, v in values if k.startswith(prefix)
    }
