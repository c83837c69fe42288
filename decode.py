"""Answers prompts with D²SD; `python decode.py --help` lists the flags.

    python decode.py --prompt="Explain speculative decoding to a child."

Parse and check, load, compile, decode, report: in this order, so that a
mistake is told before anything is downloaded or computed.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
  # JAX takes a second to import; an early Ctrl-C is to end as cleanly as any.
  # And XLA need not comment on the machine a cached program was compiled on.
  signal.signal(signal.SIGINT, lambda *_: os._exit(130))
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from d2sd_jax import cli, distributed
from d2sd_jax.config import MODES
from d2sd_jax.decoding import auto, report
from d2sd_jax.decoding.answers import Answer, Request
from d2sd_jax.decoding.decode_config import DecodeConfig
from d2sd_jax.decoding.plan import Plan, make_plan
from d2sd_jax.decoding.session import Session, bucket
from d2sd_jax.errors import require
from d2sd_jax.evaluation import choice_margin, first_difference
from d2sd_jax.io.models import load_tokenizer
from d2sd_jax.io.paths import check_output, user_path
from d2sd_jax.io.prompts import Conversation, read_prompts
from d2sd_jax.io.tokenizer import ChatTokenizer
from d2sd_jax.models.drafter import FusedDrafter
from d2sd_jax.models.target import LlamaTarget

DESCRIPTION = """\
Answers prompts by dual-diffusion speculative decoding: the same tokens as
plain autoregressive decoding, in fewer passes of the target.
"""
EXAMPLES = """\
  python decode.py --prompt="Explain speculative decoding to a child."
  python decode.py --mode=dflash --trace --prompt="Count to ten."
  echo "Write a haiku." | python decode.py --prompt=- --temperature=0.8 --seed=1
  python decode.py --mode=compare --prompts_file=prompts.jsonl --json=out.json
  python decode.py --config.forbid_repeat=True --prompt="Name three rivers."
  python decode.py --mesh=tensor:4 --target=Qwen/Qwen3-8B --mode=ar --prompt=Hi
"""

# Flag, type, what the help shows for its value, help.
CONFIG_FLAGS = (
  (
    "target",
    str,
    "PATH",
    "smollm2-135m, a Hugging Face folder, or a GGUF file",
  ),
  ("drafter", str, "PATH", "drafter 1: a folder or a shipped name"),
  ("vp_drafter", str, "PATH", "drafter 2: a folder or a shipped name"),
  ("mode", str, "|".join((*MODES, "compare", "auto")), "default auto"),
  ("block_size", cli.whole_number, "N", "slots of a block, anchor included"),
  ("num_branches", cli.whole_number, "N", "branches of the prefix tree"),
  ("temperature", cli.number, "T", "default 0, greedy"),
  ("top_k", cli.whole_number, "N", "keep N tokens (default 0, off)"),
  ("top_p", cli.number, "P", "keep a mass of P (default 1, off)"),
  ("max_new_tokens", cli.whole_number, "N", "default 256"),
  ("seed", cli.whole_number, "N", "of the sampling noise (default 0)"),
  ("dtype", str, "float32|bfloat16", "default float32 on a CPU, else bfloat16"),
  ("drafter_weights", str, "bfloat16|int8", "int8: same output, smaller reads"),
  ("batch_size", cli.whole_number, "N", "prompts at a time (default 1)"),
  ("mesh", str, "AXIS:N,..", "devices, as data:2,tensor:4 (default: one)"),
)


def flag_parser() -> cli.FlagParser:
  """All flags of this script."""
  parser = cli.FlagParser("decode.py", DESCRIPTION, EXAMPLES)
  add = parser.add_argument_group(
    "what to answer (one of the two)"
  ).add_argument
  add("--prompt", metavar="TEXT", help="one user turn; - reads standard input")
  add(
    "--prompts_file",
    metavar="FILE",
    help="JSON lines, each with `prompt` or `messages`",
  )
  add = parser.add_argument_group("what to show").add_argument
  add(
    "--stream",
    action="store_true",
    default=None,
    help="print text as it is accepted (default for batches of one)",
  )
  add(
    "--nostream",
    action="store_false",
    dest="stream",
    help="print each answer when it is complete",
  )
  add("--trace", action="store_true", help="show which pass proposed what")
  add("--json", metavar="FILE", help="write a record per prompt and mode")
  add = parser.add_argument_group("how to decode").add_argument
  add(
    "--config",
    metavar="FILE",
    default="smollm2",
    help="a Python file with get_config(), or a shipped name (default"
    " smollm2); the flags below, and --config.KEY=VALUE for any key, override"
    " it",
  )
  for name, kind, shown, text in CONFIG_FLAGS:
    add(f"--{name}", type=kind, metavar=shown, help=text)
  distributed.add_flags(parser)
  return parser


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """What the flags ask for, checked.

  Attributes:
    plan: what will be run.
    stream: print text as it is accepted.
    trace: show which pass proposed what.
    output: file of the records, if they are wanted.
    conversations: to be answered.
  """

  plan: Plan
  stream: bool
  trace: bool
  output: Path | None
  conversations: list[Conversation]

  def facts(self) -> Mapping[str, Any]:
    """What all processes of a run must share."""
    turns = json.dumps(self.conversations).encode()
    told = {"prompts": hashlib.sha256(turns).hexdigest()[:16]}
    return told | dataclasses.asdict(self.plan.config) | {"stream": self.stream}


def check(flags: argparse.Namespace, overrides: dict[str, Any]) -> Job:
  """What can be known to be wrong before anything is fetched or loaded."""
  for name, *_ in CONFIG_FLAGS:
    if getattr(flags, name) is not None:
      overrides[name] = getattr(flags, name)
  config = cli.load_config(DecodeConfig, flags.config, overrides)
  plan = make_plan(config)
  stream = choose_streaming(flags.stream, config)
  output = check_output(flags.json) if flags.json is not None else None
  if output is not None and flags.prompts_file is not None:
    own = user_path(flags.prompts_file).resolve() != output.resolve()
    require(own, "json", flags.json, "another file than prompts_file")
  return Job(
    plan=plan,
    stream=stream,
    trace=flags.trace,
    output=output,
    conversations=read_prompts(flags.prompt, flags.prompts_file),
  )


def main(arguments: Sequence[str]) -> None:
  """Everything the script does."""
  flags, overrides = flag_parser().parse(arguments)
  distributed.start(flags)
  job = distributed.agree(functools.partial(check, flags, overrides), Job.facts)
  cli.setup_jax_cache()
  with distributed.losing_one_ends_all(), distributed.only_main_speaks():
    # Files may be damaged or missing in one process only.
    run(job, distributed.agree(lambda: load(job), lambda _: {}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
  """What a job runs; mode `auto` has chosen."""

  plan: Plan
  target: LlamaTarget
  drafters: tuple[FusedDrafter, ...]
  tokenizer: ChatTokenizer
  requests: list[Request]


def load(job: Job) -> Loaded:
  """Reads all files, small ones first, since they may be damaged."""
  plan, config = job.plan, job.plan.config
  drafters = plan.load_drafters()
  for warning in plan.role_warnings(drafters):
    print(warning, file=sys.stderr, flush=True)
  tokenizer = load_tokenizer(config.target)
  for drafter in drafters:
    tokenizer.check_mask_token(drafter.config.mask_token_id)
  requests = [
    Request(sequence_id=i, tokens=tuple(ids))
    for i, ids in enumerate(tokenizer.encode_chats(job.conversations))
  ]
  plan.check_context(requests)
  target = plan.load_target()
  if config.mode == "auto":
    plan = auto.resolve(plan, target, drafters, requests)
  return Loaded(
    plan=plan,
    target=target,
    drafters=drafters,
    tokenizer=tokenizer,
    requests=requests,
  )


def run(job: Job, loaded: Loaded) -> None:
  """Compiles, decodes and reports."""
  plan, config = loaded.plan, loaded.plan.config
  target, tokenizer = loaded.target, loaded.tokenizer
  requests = loaded.requests

  # Compile.
  sessions = {}
  for mode, tree in plan.trees.items():
    told = f"compiling {mode} for {plan.devices}"
    print(told, file=sys.stderr, flush=True)
    sessions[mode] = Session(
      plan.models(mode, target, loaded.drafters),
      requests,
      plan.sampling,
      mode=mode,
      tree=tree,
      max_new_tokens=config.max_new_tokens,
      stop_ids=tokenizer.stop_ids,
      batch_size=config.batch_size,
    )

  # Decode and report.
  printer = report.Printer(tokenizer, len(requests), job.stream, job.trace)
  answers: dict[str, list[Answer]] = {}
  if config.mode == "compare":
    for mode, session in sessions.items():
      session.warm_up()
      answers[mode] = printer.decode_quietly(session)
    margins = difference_margins(answers, target, plan)
    report.print_comparison(answers, margins, plan)
  else:
    ((mode, session),) = sessions.items()
    if not job.stream:
      session.warm_up()
    answers[mode] = printer.decode_aloud(session)
    report.print_closing_line(answers[mode], plan)
  in_order = [
    a for prompt in zip(*answers.values(), strict=True) for a in prompt
  ]
  if config.mode == "compare":
    printer.print_traces(in_order)
  if job.output is not None and distributed.is_main():
    records = [report.make_record(a, plan, tokenizer) for a in in_order]
    report.write_json(job.output, records)


def choose_streaming(wanted: bool | None, config: DecodeConfig) -> bool:
  """Whether text is printed as it is accepted; only single rows can be."""
  possible = config.batch_size == 1 and config.mode != "compare"
  require(
    possible or not wanted,
    "stream",
    True,
    "batch_size=1 and a mode other than compare",
  )
  return possible if wanted is None else wanted


def difference_margins(
  answers: Mapping[str, Sequence[Answer]], target: LlamaTarget, plan: Plan
) -> dict[tuple[str, int], float]:
  """How sure `ar` was wherever a mode first differs from it.

  Args:
    answers: of every mode, in input order.
    target: the target.
    plan: what was run.

  Returns:
    The margin between `ar`'s two best scores, by mode and prompt.
  """
  margins = {}
  for mode, others in answers.items():
    for i, (ar, other) in enumerate(zip(answers["ar"], others, strict=True)):
      where = first_difference(ar.tokens, other.tokens)
      if where is not None:
        tokens = [*ar.request.tokens, *ar.tokens[:where]]
        margins[mode, i] = choice_margin(
          target,
          tokens,
          ar.request.sequence_id,
          plan.sampling,
          bucket(len(tokens)),
          plan.mesh,
        )
  return margins


if __name__ == "__main__":
  signal.signal(signal.SIGINT, signal.default_int_handler)
  cli.exit_with(cli.run(main))
