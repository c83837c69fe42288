"""The target writes its own conversations, for the drafters to learn from.

`python -m d2sd_jax.training.corpus --config=configs/corpus_smollm2.py`

Self-synthesis: behind the chat format up to `user`, the target writes a user's
turn; then it answers that turn. Both run on this library's decode loop without
drafters, a batch ahead of the host, which meanwhile filters and writes.

Every batch is a function of the seed and its number, so a run that was stopped
goes on, with the same command, to the very same file.
"""

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.progress import TaskID

from d2sd_jax import cli
from d2sd_jax.config import from_mapping
from d2sd_jax.decoding.state import Models
from d2sd_jax.io.models import load_target, load_tokenizer
from d2sd_jax.io.paths import check_output, user_path
from d2sd_jax.progress import progress_bar
from d2sd_jax.training.corpus_config import CorpusConfig
from d2sd_jax.training.ledger import Ledger
from d2sd_jax.training.manifest import manifest_path, read_manifest
from d2sd_jax.training.ngrams import TurnFilter, read_excluded
from d2sd_jax.training.openings import KINDS, TEMPLATES
from d2sd_jax.training.sources import TopUp, load_top_ups
from d2sd_jax.training.synthesis import (
  Part,
  Show,
  Tools,
  write_part,
)
from d2sd_jax.training.writer import Writer

EXAMPLES = """\
  python -m d2sd_jax.training.corpus --config=configs/corpus_smollm2.py
  python -m d2sd_jax.training.corpus --out=runs/corpus.jsonl \\
      --heldout=runs/heldout.jsonl --num_conversations=40960
"""


def open_parts(
  config: CorpusConfig, excluded: Sequence[str], top_ups: Sequence[TopUp] = ()
) -> list[Part]:
  """Both files, checked against the manifests of an earlier run, if any."""
  names = ("out", "heldout", "exclude")
  flags = {k: v for k, v in vars(config).items() if k not in names}
  digest = lambda data: hashlib.sha256(repr(data).encode()).hexdigest()
  identity = {
    **flags,
    "prompt_lengths": list(config.prompt_lengths),
    "dtype": config.dtype or default_dtype(),
    "excluded_prompts": len(excluded),
    "excluded_sha256": digest(excluded),
    "openings_sha256": digest(KINDS),
    "sources": [top_up.describe() for top_up in top_ups],
  }
  heldout = Ledger(
    config.heldout, {"part": "heldout", **identity}, config.num_heldout
  )
  out = Ledger(
    config.out,
    {"part": "corpus", **identity},
    config.num_conversations,
    config.num_shards,
  )
  return [
    Part(
      index=0, num_records=config.num_heldout, greedy_only=True, ledger=heldout
    ),
    Part(
      index=1,
      num_records=config.num_conversations,
      greedy_only=False,
      ledger=out,
    ),
  ]


def own_texts(prompts: Sequence[str]) -> list[str]:
  """Excluded prompts without the fixed words of a format."""
  for template in TEMPLATES:
    prompts = [prompt.replace(template, "\n") for prompt in prompts]
  return list(prompts)


def default_dtype() -> str:
  """Float32 on a CPU, bfloat16 elsewhere."""
  return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def write_corpus(
  target: Any,
  tokenizer: Any,
  config: CorpusConfig,
  show: Show = lambda step, done, wanted: None,
) -> None:
  """Writes both files; goes on where an earlier run stopped.

  Args:
    target: implements `Target`.
    tokenizer: the target's; see `ChatTokenizer`.
    config: what to write.
    show: called as the files grow.

  Raises:
    UsageError: files that are there do not belong to this corpus.
  """
  excluded = own_texts(read_excluded(config.exclude))
  top_ups = load_top_ups(config.shares)
  writer = Writer(
    models=Models(target=target),
    batch_size=config.batch_size,
    stop_ids=tokenizer.stop_ids,
    seed=config.seed,
  )
  turn_filter = TurnFilter(excluded)
  for part in open_parts(config, excluded, top_ups):
    name = part.ledger.path.name
    tools = Tools(
      writer=writer,
      tokenizer=tokenizer,
      config=config,
      turn_filter=turn_filter,
      top_ups=top_ups,
      show=lambda step, *counts, name=name: show(f"{name} {step}", *counts),
    )
    with contextlib.closing(part.ledger):
      write_part(part, tools)


@contextlib.contextmanager
def progress_bars() -> Iterator[Show]:
  """Yields a `show` that draws one bar per file and step on stderr."""
  tasks: dict[str, TaskID] = {}
  with progress_bar() as bars:

    def show(step: str, done: int, wanted: int) -> None:
      if step not in tasks:
        tasks[step] = bars.add_task(step)
      bars.update(tasks[step], completed=min(done, wanted), total=wanted)

    yield show


def parse_flags(arguments: Sequence[str]) -> CorpusConfig:
  """A config file, if any, and flags for the fields of `CorpusConfig`.

  Raises:
    UsageError: a flag is unknown, missing or of another type.
  """
  parser = cli.FlagParser(
    "-m d2sd_jax.training.corpus",
    "The target writes conversations to train drafters on.",
    EXAMPLES,
  )
  parser.add_argument("--config", help="a file in configs/")
  kinds = {int: cli.whole_number, float: cli.number}
  for field in dataclasses.fields(CorpusConfig):
    kind: Any = field.type
    if field.name == "prompt_lengths":
      continue
    required = field.default is dataclasses.MISSING
    parser.add_argument(
      f"--{field.name}",
      type=kinds.get(kind, str),
      help="required" if required else f"default {field.default}",
    )
  flags, overrides = parser.parse(arguments)
  given = {k: v for k, v in vars(flags).items() if v is not None}
  name = given.pop("config", None)
  values = overrides | given
  if name is not None:
    return cli.load_config(CorpusConfig, name, values)
  return from_mapping(CorpusConfig, values)


def run(config: CorpusConfig) -> None:
  """Checks files first, then loads the target and writes the corpus."""
  for field in ("out", "heldout"):
    check_output(getattr(config, field), field)
  excluded = own_texts(read_excluded(config.exclude))
  open_parts(config, excluded, load_top_ups(config.shares))
  tokenizer = load_tokenizer(config.target)
  dtype = config.dtype or default_dtype()
  target = load_target(config.target, dtype=jnp.dtype(dtype))
  print(f"writing with {config.target} in {dtype}", file=sys.stderr)
  with progress_bars() as show:
    write_corpus(target, tokenizer, config, show)
  for name in (config.heldout, config.out):
    manifest = read_manifest(manifest_path(user_path(name)))
    print(json.dumps({"file": name, **manifest}))


def main(arguments: Sequence[str]) -> None:
  """Reads the flags, then writes the corpus."""
  config = parse_flags(arguments)
  cli.setup_jax_cache()
  run(config)


if __name__ == "__main__":
  cli.exit_with(cli.run(main))
