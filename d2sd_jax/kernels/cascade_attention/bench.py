"""Times cascade attention alone, beside its floors, and checks what it times.

Random operands, more of them in turn than four times the L2 cache holds; each
call's output is the next one's query, so that nothing can be left out or run
at once. All of it is one program on the device. A row says which
implementation ran, or why it could not: none is ever replaced by another.
"""

import dataclasses
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from d2sd_jax import cli
from d2sd_jax.errors import UsageError, require
from d2sd_jax.io.paths import atomic_write, user_path
from d2sd_jax.kernels import hopper
from d2sd_jax.kernels.cascade_attention import (
  IMPLEMENTATIONS,
  cascade_attention,
  mosaic_gpu,
)
from d2sd_jax.kernels.device import compiler_options
from d2sd_jax.timing import check_seconds, time_marginally
from d2sd_jax.typing import Array

PROGRAM = "-m d2sd_jax.kernels.cascade_attention.bench"
EXAMPLES = f"""\
  python {PROGRAM} --output=op.json
  python {PROGRAM} --shapes=1x80@8192 --implementations=xla,mosaic_gpu
  python {PROGRAM} --shapes=1x80@32768 --implementations=mosaic_gpu --sweep
  python {PROGRAM} --shapes=1024x1@512 --used=0.5 --kv-heads=3 --group=3 \\
      --head-size=64
"""
SHAPES = "1x16@8192,1x80@1024,1x80@8192,1x80@32768,8x80@4096"
L2_BYTES = 50 * 2**20
MAX_SETS = 64
# Steps of a timed call last about so long.
SECONDS = 0.03


@dataclasses.dataclass(frozen=True)
class Shape:
  """Sizes of one measurement; `used` rows of the `cache` are seen."""

  batch: int
  nodes: int
  cache: int
  used: int
  kv_heads: int = 8
  group: int = 4
  head_size: int = 128

  def bytes(self, itemsize: int = 2) -> int:
    """Bytes that must move: the prefix and the nodes' K, V, Q and output."""
    keys = self.used + self.nodes + self.nodes * self.group
    width = self.kv_heads * self.head_size
    return 2 * itemsize * self.batch * keys * width

  def flops(self) -> int:
    """Of the two products, over the prefix and all of the tree."""
    rows = self.batch * self.nodes * self.kv_heads * self.group
    return 4 * rows * (self.used + self.nodes) * self.head_size


def parse_shapes(text: str, **sizes: Any) -> list[Shape]:
  """Shapes from "BATCHxNODES@CACHE,...".

  Args:
    text: as on the command line.
    **sizes: the other fields of `Shape`; `used` as a share of the cache.

  Raises:
    UsageError: `text` is no such list.
  """
  share = sizes.pop("used", 1.0)
  require(0 <= share <= 1, "used", share, "a number from 0 to 1")
  shapes = []
  for part in text.split(","):
    try:
      batch, rest = part.split("x")
      nodes, cache = rest.split("@")
      numbers = int(batch), int(nodes), int(cache)
    except ValueError:
      numbers = (0, 0, 0)
    require(min(numbers) > 0, "shapes", part, "BATCHxNODES@CACHE, as 1x80@8192")
    used = max(int(numbers[2] * share), 1)
    shapes.append(Shape(*numbers, used, **sizes))
  return shapes


def jax_nn(library: str) -> Callable[..., Array]:
  """The op by `jax.nn.dot_product_attention` on the prefix, then a merge.

  Its log-sum-exp has the operands' dtype: too coarse to serve, fit to time.

  Args:
    library: its `implementation`.
  """

  def attend(
    query, prefix_keys, prefix_values, local_keys, local_values, *, prefix_end
  ):
    batch, _, nodes, _, head_dim = query.shape
    output, log_sum = jax.nn.dot_product_attention(
      query[:, 0],
      rearrange(prefix_keys, "b j s h -> b s j h"),
      rearrange(prefix_values, "b j s h -> b s j h"),
      query_seq_lengths=jnp.full((batch,), nodes, jnp.int32),
      key_value_seq_lengths=prefix_end,
      implementation=library,
      return_residual=True,
    )
    split = functools.partial(
      rearrange, pattern="b r (j n) ... -> b r j n ...", j=local_keys.shape[3]
    )
    scores = jnp.einsum(
      "brjnh,bkjh->brjnk",
      split(query[:, 0]),
      local_keys[:, 0],
      preferred_element_type=jnp.float32,
    )
    scores = scores / math.sqrt(head_dim)
    tree_sum = jax.nn.logsumexp(scores, -1)
    weights = jnp.exp(scores - tree_sum[..., None]).astype(query.dtype)
    tree = jnp.einsum("brjnk,bkjh->brjnh", weights, local_values[:, 0])
    share = jax.nn.sigmoid(split(log_sum).astype(jnp.float32) - tree_sum)
    merged = tree + share[..., None] * (split(output) - tree)
    return rearrange(merged, "b r j n h -> b 1 r (j n) h").astype(query.dtype)

  return attend


def implementation(name: str, plan: Any = None) -> Callable[..., Array]:
  """The function of that name, all-to-all over one group of nodes.

  Args:
    name: a key of `IMPLEMENTATIONS`, or `jax.nn`, or `jax.nn_cudnn`.
    plan: of Mosaic GPU's kernel.
  """
  if name.startswith("jax.nn"):
    return jax_nn("cudnn" if name == "jax.nn_cudnn" else "xla")
  if plan is None:
    return functools.partial(cascade_attention, implementation=name)

  def planned(query, *arrays, prefix_end):
    nodes = query.shape[2]
    return mosaic_gpu.cascade_attention(
      query,
      *arrays,
      prefix_end=prefix_end[:, None],
      prefix_start=None,
      local_mask=jnp.ones((1, 1, nodes, nodes), bool),
      sinks=None,
      plan=plan,
    )

  return planned


def operands(shape: Shape, dtype: Any, seed: int) -> list[Array]:
  """Random query, cache and nodes; the cache is random past `used` too."""
  b, j, r, h = shape.batch, shape.kv_heads, shape.nodes, shape.head_size
  sizes: list[tuple[int, ...]] = [(b, 1, r, j * shape.group, h)]
  sizes += [(b, j, shape.cache, h)] * 2 + [(b, 1, r, j, h)] * 2
  keys = jax.random.split(jax.random.key(seed), len(sizes))
  draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
  return [draw(k, s, dtype) for k, s in zip(keys, sizes, strict=True)]


def measure(
  attend: Callable[..., Array],
  shape: Shape,
  dtype: Any,
  repeats: int,
  seconds: float = SECONDS,
) -> dict[str, Any]:
  """Times `attend` and compares one output with a float32 one.

  Args:
    attend: takes the op's arrays and `prefix_end`.
    shape: sizes.
    dtype: of the operands.
    repeats: see `time_marginally`.
    seconds: see there.

  Returns:
    Microseconds: `median_us`, `least_us`, `most_us`; `max_error`; `sets` of
    operands taken in turn.
  """
  need = 4 * L2_BYTES // shape.bytes(jnp.dtype(dtype).itemsize) + 1
  sets = [operands(shape, dtype, i) for i in range(min(need + 1, MAX_SETS))]
  ends = jnp.full((shape.batch,), shape.used, jnp.int32)

  @functools.partial(
    jax.jit, compiler_options=compiler_options(one_device=True)
  )
  def loop(query, others, ends, count):
    def once(_, query):
      for arrays in others:
        query = attend(query, *arrays, prefix_end=ends)
      return query

    return jax.lax.fori_loop(0, count, once, query)

  others = [arrays[1:] for arrays in sets]

  def timed(count):
    start = time.perf_counter()
    jax.block_until_ready(loop(sets[0][0], others, ends, count))
    return time.perf_counter() - start

  timed(1)  # Compiles.
  times, *_ = time_marginally(timed, repeats=repeats, seconds=seconds)
  each = [1e6 * time / len(sets) for time in times]
  return {
    "median_us": statistics.median(each),
    "least_us": min(each),
    "most_us": max(each),
    "max_error": _max_error(attend, sets[0], ends),
    "sets": len(sets),
  }


def _max_error(attend, arrays, ends):
  """The largest difference from XLA's output in float32."""
  wide = [x.astype(jnp.float32) for x in arrays]
  exact = jax.jit(implementation("xla"))(*wide, prefix_end=ends)
  got = jax.jit(attend)(*arrays, prefix_end=ends)
  return float(np.abs(np.asarray(got, np.float32) - np.asarray(exact)).max())


def plans(shape: Shape) -> Iterator[Any]:
  """Plans worth trying: those near the one that is chosen."""
  # Nodes move by whole chunks.
  chunk = mosaic_gpu.TILE
  rows = -(-shape.nodes // chunk) * chunk * shape.group
  pairs = shape.batch * shape.kv_heads
  chosen = mosaic_gpu.choose_plan(
    rows, pairs, shape.cache, shape.head_size, shape.nodes
  )
  yield chosen
  tiles = -(-rows // 64)
  for warpgroups in range(1, min(tiles, 3) + 1):
    blocks = -(-tiles // warpgroups)
    for block_keys in (64, 128):
      most = mosaic_gpu.most_stages(warpgroups, block_keys, shape.head_size)
      for stages in sorted({2, min(most, 4), most} - {0, 1}):
        for splits in (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 24, 32):
          waves = blocks * pairs * splits / hopper.MULTIPROCESSORS
          plan = dataclasses.replace(
            chosen,
            warpgroups=warpgroups,
            blocks=blocks,
            block_keys=block_keys,
            stages=stages,
            splits=splits,
          )
          if plan != chosen and stages <= most and (0.4 < waves < 5):
            yield plan


def rows(
  shapes: Sequence[Shape],
  names: Sequence[str],
  options: Mapping[str, Any],
  sweep: bool,
  dtype: Any,
  rates: tuple[float, float],
) -> Iterator[dict[str, Any]]:
  """Measures all of it, a row at a time.

  Args:
    shapes: to be measured.
    names: implementations, see `implementation`.
    options: `repeats` and `seconds` of `measure`.
    sweep: whether to try Mosaic GPU's kernel with many plans.
    dtype: of the operands.
    rates: bytes and FLOPs per second the chip reaches.
  """
  device = jax.devices()[0].device_kind
  for shape in shapes:
    size = jnp.dtype(dtype).itemsize
    floors = shape.bytes(size) / rates[0], shape.flops() / rates[1]
    for name in names:
      tuned = plans(shape) if sweep and name == "mosaic_gpu" else [None]
      for plan in tuned:
        row = {
          "shape": dataclasses.asdict(shape),
          "implementation": name,
          "plan": plan and dataclasses.asdict(plan),
          "bytes_floor_us": 1e6 * floors[0],
          "flops_floor_us": 1e6 * floors[1],
          "dtype": jnp.dtype(dtype).name,
          "device": device,
          "jax": jax.__version__,
        }
        try:
          attend = implementation(name, plan)
          row |= measure(attend, shape, dtype, **options)
        except Exception as error:  # A row says why; others go on.
          row["failed"] = cli.one_line(error)
        yield row


def main(arguments: Sequence[str]) -> None:
  """Measures, prints a line a row and writes them as JSON.

  Args:
    arguments: of the command line.
  """
  flags = _flags(arguments)
  shapes = parse_shapes(
    flags.shapes,
    used=flags.used,
    kv_heads=flags.kv_heads,
    group=flags.group,
    head_size=flags.head_size,
  )
  names = flags.implementations.split(",")
  known = sorted([*IMPLEMENTATIONS, "jax.nn", "jax.nn_cudnn"])
  for name in names:
    require(name in known, "implementations", name, f"of {', '.join(known)}")
  require(flags.repeats > 0, "repeats", flags.repeats, "1 or more")
  check_seconds(flags.seconds)
  output = user_path(flags.output) if flags.output else None
  options = {"repeats": flags.repeats, "seconds": flags.seconds}
  rates = flags.terabytes * 1e12, flags.teraflops * 1e12
  done: list[dict[str, Any]] = []
  for row in rows(shapes, names, options, flags.sweep, flags.dtype, rates):
    print(_line(row), flush=True)
    done.append(row)
    if output:  # A long grid may be cut short.
      _write(output, done)


def _write(path: Path, done: list[dict[str, Any]]) -> None:
  with atomic_write(path) as temporary:
    temporary.write_text(json.dumps(done, indent=1) + "\n")


def _line(row: Mapping[str, Any]) -> str:
  shape = row["shape"]
  sizes = f"{shape['batch']}x{shape['nodes']}@{shape['used']}/{shape['cache']}"
  plan = row["plan"]
  name = row["implementation"]
  if plan:
    name += "(" + ",".join(str(x) for x in plan.values()) + ")"
  floors = f"floors {row['bytes_floor_us']:.1f} {row['flops_floor_us']:.1f}"
  if "failed" in row:
    return f"{sizes:18} {name:34} failed: {row['failed'][:200]}"
  spread = f"{row['least_us']:.1f}-{row['most_us']:.1f}"
  return (
    f"{sizes:18} {name:34} {row['median_us']:9.1f} us ({spread}), {floors},"
    f" error {row['max_error']:.1e}"
  )


def _flags(arguments: Sequence[str]) -> Any:
  parser = cli.FlagParser(PROGRAM, str(__doc__), EXAMPLES)
  add = parser.add_argument
  add("--shapes", default=SHAPES, help="BATCHxNODES@CACHE, by commas")
  add(
    "--implementations",
    default="xla,cudnn,jax.nn,jax.nn_cudnn,mosaic_gpu",
    help="of the op, and jax.nn's own",
  )
  add("--used", type=cli.number, default=1.0, help="share of the cache seen")
  add("--kv-heads", type=cli.whole_number, default=8, help="key heads")
  add("--group", type=cli.whole_number, default=4, help="query heads of each")
  add("--head-size", type=cli.whole_number, default=128, help="64 or 128")
  add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
  add("--repeats", type=cli.whole_number, default=7, help="timed calls")
  add("--seconds", type=cli.number, default=SECONDS, help="of a call's steps")
  add("--sweep", action="store_true", help="try many plans of mosaic_gpu")
  add("--terabytes", type=cli.number, default=4.27, help="a second, for floors")
  add("--teraflops", type=cli.number, default=790.0, help="likewise")
  add("--output", help="a JSON file for the rows")
  flags, _ = parser.parse(arguments)
  sizes = flags.kv_heads, flags.group, flags.head_size
  if min(sizes) < 1:
    raise UsageError(f"kv-heads, group, head-size={sizes}: expected 1 or more")
  return flags


if __name__ == "__main__":
  cli.exit_with(cli.run(main))
