"""What the ladder measures with: its config, models, tasks and sessions."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

from d2sd_jax.config import MODES, TreeConfig
from d2sd_jax.decoding.answers import Answer, Request
from d2sd_jax.decoding.decode_config import DecodeConfig
from d2sd_jax.decoding.plan import Plan, make_plan
from d2sd_jax.decoding.policies import POLICIES
from d2sd_jax.decoding.session import Session
from d2sd_jax.decoding.state import Models
from d2sd_jax.errors import require, require_at_least
from d2sd_jax.eval import calibration, measure
from d2sd_jax.eval.measure import Measured
from d2sd_jax.eval.prompts import PROMPT_SETS
from d2sd_jax.eval.tasks import Task, first_turns, with_second_turns
from d2sd_jax.evaluation import choice_margin
from d2sd_jax.io.models import load_tokenizer
from d2sd_jax.models.drafter import FusedDrafter
from d2sd_jax.models.target import LlamaTarget
from d2sd_jax.sampling import Sampling

Cell: TypeAlias = tuple[str, float]  # A set's name and a temperature.
# The usual draft of prompt lookup is 8 tokens; γ-1 is tried as well.
_LOOKUP_BLOCK = 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class LadderConfig:
  """One ladder.

  Attributes:
    sets, policies, temperatures: what is measured.
    num_prompts: the first of each set, in file order; fewer where there are
      fewer.
    timing_prompts: of them, how many are timed one at a time; 0 for none.
    batch_size: rows decoded together to measure α.
    dtype: `None` is float32 on a CPU and bfloat16 elsewhere.
    out: the results file; the table is written beside it.
  """

  target: str = "smollm2-135m"
  drafter: str = "smollm2-135m-dflash"
  vp_drafter: str = "smollm2-135m-vp"
  sets: tuple[str, ...] = tuple(PROMPT_SETS)
  policies: tuple[str, ...] = MODES
  temperatures: tuple[float, ...] = (0.0, 1.0)
  num_prompts: int = 40
  timing_prompts: int = 10
  max_new_tokens: int = 256
  batch_size: int = 40
  block_size: int | None = None
  num_branches: int = 4
  second_block_size: int | None = None
  node_budget: int | None = None
  forbid_repeat: bool = True
  dtype: str | None = None
  seed: int = 0
  out: str = "results/ladder.json"

  def __post_init__(self):
    for field, known in (("sets", PROMPT_SETS), ("policies", MODES)):
      expected = f"some of {', '.join(known)}"
      chosen = getattr(self, field)
      fits = 0 < len(chosen) == len(set(chosen)) and set(chosen) <= set(known)
      require(fits, field, chosen, f"{expected}, each once")
    chosen = self.temperatures
    fits = 0 < len(chosen) == len(set(chosen))
    fits = fits and all(0 <= t <= 1e30 for t in chosen)
    require(fits, "temperatures", chosen, "numbers of 0 or more, each once")
    require_at_least(self, 1, "num_prompts")
    require_at_least(self, 0, "timing_prompts")
    require_at_least(self, 2, "max_new_tokens")

  def decode_config(self, policy: str) -> DecodeConfig:
    """What `decode.py` would be told for one policy."""
    fields = {f.name for f in dataclasses.fields(DecodeConfig)}
    shared = {k: v for k, v in vars(self).items() if k in fields}
    return DecodeConfig(**shared, mode=policy)

  def trees(self, policy: str) -> list[TreeConfig]:
    """Sizes of a policy's tree; of several, the one with the best α counts."""
    tree = make_plan(self.decode_config(policy)).trees[policy]
    if policy != "prompt_lookup":
      return [tree]
    # γ is the drafters', which lookup does not need.
    block = make_plan(self.decode_config("dflash")).trees["dflash"].block_size
    sizes = dict.fromkeys((_LOOKUP_BLOCK, block))
    return [dataclasses.replace(tree, block_size=size) for size in sizes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
  """Models and tasks, and the sessions that are made of them."""

  config: LadderConfig
  plan: Plan
  target: LlamaTarget
  drafters: tuple[FusedDrafter, ...]
  stop_ids: tuple[int, ...]
  tasks: Mapping[str, Task]

  def requests(self, num: int | None = None) -> list[Request]:
    """The first `num` requests of every task, or all."""
    tasks = self.tasks.values()
    return [request for task in tasks for request in task.requests[:num]]

  @property
  def batch_size(self) -> int:
    """Rows decoded together: no more than the largest task has."""
    largest = max(len(task.requests) for task in self.tasks.values())
    return min(self.config.batch_size, largest)

  @property
  def dtype(self) -> str:
    """Of all models."""
    return self.plan.config.dtype or "float32"

  def sampling(self, temperature: float) -> Sampling:
    """How the target chooses."""
    return Sampling.create(temperature, seed=self.config.seed)

  def session(
    self,
    policy: str,
    tree: TreeConfig,
    requests: Sequence[Request],
    batch_size: int,
  ) -> Session:
    """Compiles a policy's programs, once for all sets and temperatures."""
    count = POLICIES[policy].num_drafters
    return Session(
      Models(target=self.target, drafters=self.drafters[:count]),
      requests,
      self.sampling(0.0),
      mode=policy,
      tree=tree,
      max_new_tokens=self.config.max_new_tokens,
      stop_ids=self.stop_ids,
      batch_size=batch_size,
      prompt_size=measure.prompt_size(requests),
    )

  def first_answers(self, task: Task) -> list[Answer]:
    """The target's own greedy answers."""
    (tree,) = self.config.trees("ar")
    size = self.batch_size
    session = self.session("ar", tree, task.requests, size)
    return measure.decode_all(session, task.requests, size)

  def margin(
    self, temperature: float
  ) -> Callable[[Request, Sequence[int]], float]:
    """See `measure.make_row`."""
    sampling = self.sampling(temperature)
    pad_to = measure.prompt_size(self.requests()) + self.config.max_new_tokens
    return lambda request, tokens: choice_margin(
      self.target,
      [*request.tokens, *tokens],
      request.sequence_id,
      sampling,
      pad_to,
    )


def measure_policy(
  bench: Bench, policy: str, cells: Sequence[Cell]
) -> Iterator[tuple[Cell, Measured]]:
  """Measures one policy, with one compilation for all of its cells.

  Yields:
    The cell, and the policy's result there.
  """
  trees = bench.config.trees(policy)
  compiled = lambda requests, size: [
    bench.session(policy, tree, requests, size) for tree in trees
  ]
  batched, timed = compiled(bench.requests(), bench.batch_size), []
  if bench.config.timing_prompts:
    # Not the cache of the longest prompt there is: these few are timed.
    first = bench.requests(bench.config.timing_prompts)
    timed = compiled(first, 1)
    for session in timed:
      measure.warm_up(session, first[0])
  for name, temperature in cells:
    sampling = bench.sampling(temperature)
    measured = _measure_cell(
      bench,
      bench.tasks[name].requests,
      [session.with_sampling(sampling) for session in batched],
      [session.with_sampling(sampling) for session in timed],
    )
    yield (name, temperature), measured


def _measure_cell(
  bench: Bench,
  requests: Sequence[Request],
  batched: Sequence[Session],
  timed: Sequence[Session],
) -> Measured:
  """The best of a policy's sessions; D²SD's first drafts are looked at too."""
  size = bench.batch_size
  runs = [measure.decode_all(s, requests, size) for s in batched]
  best = max(range(len(runs)), key=lambda i: measure.alpha(runs[i]))
  first = requests[: bench.config.timing_prompts]
  ms = measure.time_per_token(timed[best], first) if timed else None
  outcomes = [
    outcome
    for part in measure.batches(requests, size)
    if batched[best].mode == "d2sd"
    for outcome in calibration.observe_drafts(batched[best], part)
  ]
  return Measured(
    tree=batched[best].tree,
    answers=runs[best],
    ms_per_token=ms,
    calibration=calibration.summarise(outcomes) if outcomes else None,
  )


def set_up(
  config: LadderConfig,
  plan: Plan,
  prompts: Mapping[str, Sequence[Mapping[str, str]]],
) -> Bench:
  """Loads the models and asks all first turns that have a second one.

  Args:
    config: what is measured.
    plan: of a config of mode `d2sd`.
    prompts: of each set; see `load_task_prompts`.

  Raises:
    UsageError: a weights file is damaged, or a prompt is too long.
  """
  drafters = plan.load_drafters()
  tokenizer = load_tokenizer(config.target)
  for drafter in drafters:
    tokenizer.check_mask_token(drafter.config.mask_token_id)
  tasks = {
    name: first_turns(name, some, tokenizer) for name, some in prompts.items()
  }
  for task in tasks.values():
    plan.check_context(task.requests)
  bench = Bench(
    config=config,
    plan=plan,
    target=plan.load_target(),
    drafters=drafters,
    stop_ids=tokenizer.stop_ids,
    tasks=tasks,
  )
  for name, task in tasks.items():
    if "follow_up" in prompts[name][0]:
      answers = bench.first_answers(task)
      tasks[name] = with_second_turns(task, prompts[name], answers, tokenizer)
      plan.check_context(tasks[name].requests)
  return bench
