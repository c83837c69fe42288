"""What targets and drafters hold, what fits what, and what is missing.

Only headers and small files are read, so that a folder of any size is told in
a moment, before anything is put on a device.
"""

import collections
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence

from d2sd_jax import cli
from d2sd_jax.config import DrafterConfig, TargetConfig
from d2sd_jax.errors import UsageError
from d2sd_jax.io.holdings import Holding, Stored, read_holding

EXAMPLES = """\
  python -m d2sd_jax.io.inspect Qwen3-8B Qwen3-8B-DFlash-b16
  python -m d2sd_jax.io.inspect model.gguf runs/dflash/export runs/vp/export
  python -m d2sd_jax.io.inspect smollm2-135m smollm2-135m-dflash smollm2-135m-vp
"""
_BYTES = {"bfloat16": 2, "float32": 4}


def describe(holding: Holding) -> Iterator[str]:
  """The lines of the report about one folder or file."""
  yield f"{holding.name}: {holding.title}"
  yield from _indented(_facts(holding))


def _indented(facts: Iterable[tuple[str, str]]) -> Iterator[str]:
  """Labels and lines under each other."""
  for label, line in facts:
    yield f"  {label:9}{line}"


def _facts(holding: Holding) -> Iterator[tuple[str, str]]:
  """Labels and lines."""
  c = holding.config
  yield (
    "sizes",
    f"{c.num_layers} layers of width {c.hidden_size},"
    f" {c.num_heads} heads over {c.num_kv_heads} of size {c.head_dim},"
    f" feed-forward {c.intermediate_size}",
  )
  yield "text", f"vocabulary {c.vocab_size}, context {c.max_length}"
  if isinstance(c, DrafterConfig):
    taps = ", ".join(map(str, c.target_layer_ids))
    yield "block", f"{c.block_size} slots, mask id {c.mask_token_id}"
    yield "taps", f"layers {taps} of a target's {c.num_target_layers}"
  else:
    yield "kind", ", ".join(_traits(c))
  yield "stored", _stored_line(holding.stored)
  yield from _memory(holding.num_weights, 1000 * holding.cache_row)
  for label, lines in (("missing", holding.missing), ("wrong", holding.wrong)):
    yield label, lines[0] if lines else "nothing"
    for line in lines[1:]:
      yield "", line


def _traits(config: TargetConfig) -> Iterator[str]:
  """What sets one target's architecture apart from another's."""
  yield "head tied to the embedding" if config.tied_head else "head of its own"
  scaling = config.rope_scaling
  stretched = f" stretched by {type(scaling).__name__}" if scaling else ""
  yield f"RoPE base {config.rope_theta:g}{stretched}"
  if config.qk_norm:
    yield "norms on queries and keys"
  if config.sinks:
    yield "attention sinks"
  windows = {w for w in config.windows if w is not None}
  if windows:
    count = sum(w is not None for w in config.windows)
    sizes = " and ".join(map(str, sorted(windows)))
    yield f"windows of {sizes} in {count} layers"
  if config.num_experts:
    yield f"{config.num_experts} experts, {config.experts_per_token} to a token"


def _stored_line(stored: Mapping[str, Stored]) -> str:
  """How many tensors, of which types, in how many bytes."""
  sizes: collections.Counter[str] = collections.Counter()
  for tensor in stored.values():
    sizes[tensor.dtype] += tensor.num_bytes
  parts = ", ".join(f"{k} {_shown(v)}" for k, v in sizes.most_common())
  return f"{len(stored)} tensors" + (f": {parts}" if parts else "")


def _in_both_types(count: int) -> str:
  """Memory of that many numbers."""
  sizes = [f"{_shown(count * size)} in {k}" for k, size in _BYTES.items()]
  return ", ".join(sizes)


def _shown(num_bytes: float) -> str:
  """Three digits and a unit, in powers of a thousand."""
  for unit in ("B", "kB", "MB", "GB"):
    if num_bytes < 999.5:
      return f"{num_bytes:.3g} {unit}"
    num_bytes /= 1000
  return f"{num_bytes:.4g} TB"


def fits(holdings: Sequence[Holding]) -> Iterator[str]:
  """A line for each drafter on each target, and what they need together."""
  targets = [h for h in holdings if isinstance(h.config, TargetConfig)]
  drafters = [h for h in holdings if isinstance(h.config, DrafterConfig)]
  for target in targets:
    together = [target]
    for drafter in drafters:
      right, verdict = _verdict(drafter, target)
      yield f"{drafter.name} {verdict}"
      together += [drafter] if right else []
    if len(together) > 1:
      weights = sum(h.num_weights for h in together)
      cache = 1000 * sum(h.cache_row for h in together)
      yield f"{target.name} and the drafters that fit it:"
      yield from _indented(_memory(weights, cache))


def _verdict(drafter: Holding, target: Holding) -> tuple[bool, str]:
  """Whether a drafter was made for such a target, and that in words."""
  assert isinstance(drafter.config, DrafterConfig)
  assert isinstance(target.config, TargetConfig)
  try:
    drafter.config.check_fits(target.config)
  except UsageError as error:
    return False, f"does not fit {target.name}: {error}"
  broken = [h.name for h in (drafter, target) if h.missing or h.wrong]
  if broken:
    names = " and ".join(broken)
    return True, f"would fit {target.name}, but see what is amiss in {names}"
  return True, f"fits {target.name}"


def _memory(weights: int, cache: int) -> Iterator[tuple[str, str]]:
  """Labels and lines on so many weights, and numbers in the cache."""
  yield "weights", _in_both_types(weights)
  yield "cache", f"{_in_both_types(cache)}, per 1,000 tokens of a row"


def main(arguments: Sequence[str]) -> None:
  """Prints the report on all folders and files that were named."""
  parser = cli.FlagParser(
    "-m d2sd_jax.io.inspect",
    "Tells what targets and drafters hold, what fits what, the memory they"
    " need, and what is missing.",
    EXAMPLES,
  )
  parser.add_argument(
    "folders",
    nargs="+",
    metavar="FOLDER",
    help="a folder of a target or drafter, a GGUF file, or a shipped name",
  )
  parser.usage = "python -m d2sd_jax.io.inspect FOLDER [FOLDER ...]"
  flags, _ = parser.parse(arguments)
  # All are read before any line is printed: a mistake leaves one line.
  holdings = [read_holding(name) for name in flags.folders]
  for holding in holdings:
    print("\n".join(describe(holding)), end="\n\n")
  for line in fits(holdings):
    print(line)


if __name__ == "__main__":
  signal.signal(signal.SIGINT, signal.default_int_handler)
  cli.exit_with(cli.run(main))
