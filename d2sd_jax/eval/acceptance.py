"""How much of its drafts the target accepts, for `--mode=auto`.

`python -m d2sd_jax.eval.acceptance --out=FOLDER/acceptance.json` decodes the
first prompts of the ladder's tasks in each mode and counts how many tokens
each cycle committed. The file belongs beside drafter 1.
"""

import sys
from collections.abc import Iterable, Sequence

import numpy as np

from d2sd_jax import cli
from d2sd_jax.decoding.acceptance import Acceptance, write_acceptance
from d2sd_jax.decoding.answers import Answer
from d2sd_jax.decoding.plan import make_plan
from d2sd_jax.decoding.policies import LOOKUP_SIZES
from d2sd_jax.eval.bench import Bench, LadderConfig, set_up
from d2sd_jax.eval.measure import decode_all
from d2sd_jax.eval.tasks import load_task_prompts
from d2sd_jax.io.paths import check_output

POLICIES = ("prompt_lookup", "dflash", "d2sd")
PROGRAM = "-m d2sd_jax.eval.acceptance"
EXAMPLES = f"""\
  python {PROGRAM} --out=checkpoints/smollm2-135m-dflash/acceptance.json
  python {PROGRAM} --num_prompts=40 --config.batch_size=40 --out=FILE
"""


def flag_parser() -> cli.FlagParser:
  """All flags of this script."""
  parser = cli.FlagParser(PROGRAM, str(__doc__), EXAMPLES)
  add = parser.add_argument
  add(
    "--config",
    metavar="FILE",
    default="ladder_smollm2",
    help="of a ladder; --config.KEY=VALUE overrides any key (default"
    " ladder_smollm2)",
  )
  for name, text in (
    ("num_prompts", "of each set (default 4)"),
    ("max_new_tokens", "default 160"),
  ):
    add(f"--{name}", type=cli.whole_number, metavar="N", help=text)
  add("--out", metavar="FILE", required=True, help="the file to write")
  return parser


def main(arguments: Sequence[str]) -> None:
  """Everything the script does."""
  flags, overrides = flag_parser().parse(arguments)
  sizes = {
    "num_prompts": flags.num_prompts or 4,
    "max_new_tokens": flags.max_new_tokens or 160,
    "timing_prompts": 0,
  }
  config = cli.load_config(
    LadderConfig, flags.config, {**overrides, **sizes, "policies": POLICIES}
  )
  out = check_output(flags.out, "out")
  plan = make_plan(config.decode_config("d2sd"))
  cli.setup_jax_cache()
  prompts = {
    name: load_task_prompts(name, config.num_prompts) for name in config.sets
  }
  bench = set_up(config, plan, prompts)
  found: list[Acceptance] = []
  for policy in config.policies:
    for temperature in config.temperatures:
      found.append(_measure(bench, policy, temperature))
      print(found[-1], file=sys.stderr, flush=True)
      write_acceptance(out, found)


def _measure(bench: Bench, policy: str, temperature: float) -> Acceptance:
  """Decodes all tasks together in one mode."""
  # Of lookup's two sizes, the longer one says what the shorter would do.
  tree = max(bench.config.trees(policy), key=lambda tree: tree.block_size)
  requests = bench.requests()
  size = min(bench.config.batch_size, len(requests))
  session = bench.session(policy, tree, requests, size)
  session = session.with_sampling(bench.sampling(temperature))
  answers = decode_all(session, requests, size)
  lengths = [n for a in answers for n in a.accepted_per_cycle]
  counts = np.bincount(lengths, minlength=tree.block_size + 1)
  return Acceptance(
    mode=policy,
    temperature=temperature,
    block_size=tree.block_size,
    num_branches=tree.num_branches,
    counts=tuple(counts.tolist()),
    drafting=_drafting(answers) if policy == "prompt_lookup" else 1.0,
  )


def _drafting(answers: Iterable[Answer]) -> float:
  """The share of cycles in which prompt lookup has anything to draft."""
  drafts = []
  for answer in answers:
    tokens = [*answer.request.tokens, *answer.tokens]
    start = len(answer.request.tokens)
    for cycle in answer.cycles:
      before = tokens[: start + cycle.start]
      drafts.append(any(_seen(before, size) for size in LOOKUP_SIZES))
  return float(np.mean(drafts)) if drafts else 0.0


def _seen(tokens: Sequence[int], size: int) -> bool:
  """Whether the last `size` tokens stood together earlier."""
  last = tuple(tokens[-size:])
  earlier = range(len(tokens) - size)
  return any(tuple(tokens[i : i + size]) == last for i in earlier)


if __name__ == "__main__":
  cli.exit_with(cli.run(main))
