"""Writes `docs/scaling.md`: what models past one device should cost, and why.

Nothing is measured here, and no device is needed: the tables are predictions of
`d2sd_jax.bench.predict`, beside what would prove them wrong. The text around
them is `scaling_template.md`; the same command writes the same bytes anywhere.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from d2sd_jax import cli
from d2sd_jax.bench.predict import (
  Chip,
  Plan,
  Shape,
  attention_seconds,
  d2sd_seconds,
  dflash_seconds,
  distinct_experts,
  draft_seconds,
  exchange_seconds,
  fits,
  memory_bytes,
  paying_batches,
  step_seconds,
  sum_seconds,
  target_seconds,
  tokens_per_second,
)
from d2sd_jax.io.paths import check_output

PROGRAM = "-m d2sd_jax.bench.scaling"
_TEMPLATE = Path(__file__).with_name("scaling_template.md")
TENSORS, BATCHES = (1, 2, 4, 8), (1, 4, 16, 64)
_MORE_BATCHES = tuple(2**i for i in range(10))
# α of `dflash` and `d2sd`: of the pair that ships, and the paper's.
SHIPPED, PAPER = (3.89, 5.13), (5.31, 7.05)
# Times that were measured with attention in XLA: of 80 nodes and 1024 keys.
_XLA_ATTENTION = 69e-6

_NVLINK = 900e9 / 2
H200 = Chip(
  name="H200, 10 µs a message",
  memory=4.22e12,
  peak=797e12,
  link=_NVLINK,
  latency=10e-6,
  kernel=1.6e-6,
  attention=5e-6,
  capacity=141e9,
)
H200_ONE_SHOT = dataclasses.replace(
  H200, name="H200, 4 µs a message", latency=4e-6
)
H100 = dataclasses.replace(
  H200, name="H100", memory=2.94e12, peak=796e12, capacity=80e9
)
V6E = Chip(
  name="TPU v6e, 5 µs a message",
  memory=1.64e12 * 4.22 / 4.8,
  peak=918e12 * 797 / 989,
  link=448e9 / 2,
  latency=5e-6,
  kernel=0.5e-6,
  attention=2e-6,
  capacity=32e9,
)

QWEN3_32B = Shape(
  name="Qwen3-32B",
  num_layers=64,
  hidden_size=5120,
  inner_size=25_600,
  num_heads=64,
  num_kv_heads=8,
  head_dim=128,
  vocab_size=151_936,
  drafter_inner=25_600,
)
QWEN3_8B = dataclasses.replace(
  QWEN3_32B,
  name="Qwen3-8B",
  num_layers=36,
  hidden_size=4096,
  inner_size=12_288,
  num_heads=32,
  drafter_inner=12_288,
)
SMOLLM2 = dataclasses.replace(
  QWEN3_32B,
  name="SmolLM2-135M",
  num_layers=30,
  hidden_size=576,
  inner_size=1536,
  num_heads=9,
  num_kv_heads=3,
  head_dim=64,
  vocab_size=49_152,
  drafter_inner=1536,
)
GPT_OSS = Shape(
  name="GPT-OSS-120B, MXFP4 read by kernels",
  num_layers=36,
  hidden_size=2880,
  inner_size=2880,
  num_heads=64,
  num_kv_heads=8,
  head_dim=64,
  vocab_size=201_088,
  drafter_inner=8640,
  num_experts=128,
  top_k=4,
  expert_bits=4.25,
  grouped=True,
  window=128,
  windowed_layers=18,
)
GPT_OSS_WIDE = dataclasses.replace(
  GPT_OSS,
  name="GPT-OSS-120B, bfloat16, this library's experts",
  expert_bits=16.0,
  grouped=False,
)
TABLES = (
  (QWEN3_32B, H200),
  (QWEN3_32B, H200_ONE_SHOT),
  (QWEN3_32B, V6E),
  (GPT_OSS, H200),
  (GPT_OSS, V6E),
  (GPT_OSS_WIDE, H200),
)


def document() -> str:
  """All of `docs/scaling.md`."""
  return _TEMPLATE.read_text(encoding="utf-8").format(
    program=PROGRAM,
    shipped=SHIPPED,
    paper=PAPER,
    checks=_checks(),
    tables="\n\n".join(
      f"### {shape.name}, {chip.name}\n\n{_table(shape, chip)}"
      for shape, chip in TABLES
    ),
    last_batch=_MORE_BATCHES[-1],
    stopping=_stopping(),
    rows=_predicted_rows(),
    **_reasons(),
  )


def main(arguments: Sequence[str]) -> None:
  """Everything the script does."""
  example = f"  python {PROGRAM} --out=docs/scaling.md"
  parser = cli.FlagParser(PROGRAM, str(__doc__), example)
  parser.add_argument(
    "--out", metavar="FILE", help="the document; default is standard output"
  )
  flags, _ = parser.parse(arguments)
  if flags.out is None:
    print(document(), end="")
    return
  path = check_output(flags.out, "out")
  path.write_text(document(), encoding="utf-8")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A table; all but its first column are to the right."""
  lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ms(seconds: float) -> str:
  milliseconds = 1e3 * seconds
  return f"{milliseconds:.{2 if milliseconds < 99.995 else 0}f}"


def _checks() -> str:
  """What was measured beside what the model says of it."""
  on_h200 = Plan(shape=QWEN3_8B, chip=H200, context=1007)
  on_h100 = Plan(shape=QWEN3_8B, chip=H100, context=512)
  small = Plan(shape=SMOLLM2, chip=H100, context=256)
  nodes, layers = 80, QWEN3_8B.num_layers
  ours = attention_seconds(on_h200, 1, nodes, nodes, on_h200.context)
  in_xla = target_seconds(on_h200, nodes) + layers * (_XLA_ATTENTION - ours)
  larger = dataclasses.replace(on_h200, shape=QWEN3_32B)
  shared = lambda plan, count: dataclasses.replace(plan, tensor=count)
  rows = (
    ("Qwen3-8B, `ar`, H200", step_seconds(on_h200), "5.2, now 4.30"),
    (
      "the same, two of one host",
      step_seconds(shared(on_h200, 2)),
      "5.18, then 3.71",
    ),
    (
      "the same, four of one host",
      step_seconds(shared(on_h200, 4)),
      "5.04, then 3.04",
    ),
    (
      "Qwen3-8B, a cycle of `d2sd`, H200",
      d2sd_seconds(on_h200),
      "7.38, now 6.78",
    ),
    ("the same cycle, two", d2sd_seconds(shared(on_h200, 2)), "6.90"),
    ("the same cycle, four", d2sd_seconds(shared(on_h200, 4)), "6.31"),
    ("Qwen3-32B, `ar`, H200", step_seconds(larger), "17.34, now 17.03"),
    ("its `ar`, two", step_seconds(shared(larger, 2)), "10.66"),
    ("its `ar`, four", step_seconds(shared(larger, 4)), "7.20"),
    (
      "Qwen3-32B, a cycle of `d2sd`, H200",
      d2sd_seconds(larger),
      "23.55, now 22.73",
    ),
    ("its cycle, two", d2sd_seconds(shared(larger, 2)), "17.21"),
    ("its cycle, four", d2sd_seconds(shared(larger, 4)), "13.58"),
    ("Qwen3-8B, 80 rows, attention in XLA, H200", in_xla, "7.1 to 7.3"),
    ("80 rows, H200", target_seconds(on_h200, nodes), "5.42, now 4.99"),
    ("Qwen3-8B, a cycle of `d2sd`, H100", d2sd_seconds(on_h100), "10.95"),
    ("SmolLM2, `ar`, H100", step_seconds(small), "1.33"),
    ("SmolLM2, `dflash`, H100", dflash_seconds(small), "1.20"),
    ("SmolLM2, `d2sd`, H100", d2sd_seconds(small), "1.78"),
  )
  return markdown(
    ("", "predicted, ms", "measured, ms"),
    [(name, _ms(time), measured) for name, time, measured in rows],
  )


def _table(shape: Shape, chip: Chip) -> str:
  """One row per mesh and batch."""
  plans = [
    Plan(shape=shape, chip=chip, tensor=tensor, batch=batch)
    for tensor in TENSORS
    for batch in BATCHES
  ]
  head = (
    *("tensor × batch", "GB", "`ar`, ms", "exchanged", "`dflash`"),
    *("`d2sd`", "split", "`ar`, tokens/s"),
    *(f"`d2sd`, α {alpha}" for alpha in (SHIPPED[1], PAPER[1])),
  )
  split = lambda plan: dataclasses.replace(plan, split_drafters=True)
  return markdown(head, [_row(p) for p in plans if fits(split(p))])


def _row(plan: Plan) -> tuple[str, ...]:
  name = f"{plan.tensor} × {plan.batch}"
  split = dataclasses.replace(plan, split_drafters=True)
  gigabytes = f"{memory_bytes(plan) / 1e9:.0f}"
  step, best = step_seconds(plan), d2sd_seconds(split)
  whole = d2sd_seconds(plan) if fits(plan) else None
  if whole is not None:
    best = min(best, whole)

  def rate(alpha: float) -> str:
    tokens = tokens_per_second(plan, best, alpha)
    return f"{tokens:,.0f} ({alpha * step / best:.2f}x)"

  return (
    *(name, gigabytes, _ms(step), _ms(exchange_seconds(plan, 1))),
    *(_ms(dflash_seconds(plan)), "–" if whole is None else _ms(whole)),
    *(_ms(d2sd_seconds(split)), f"{tokens_per_second(plan, step):,.0f}"),
    *(rate(SHIPPED[1]), rate(PAPER[1])),
  )


def _stopping() -> str:
  """Up to which batch drafting pays."""
  modes = (("`dflash`", dflash_seconds, 1), ("`d2sd`", d2sd_seconds, 2))
  columns = [
    (f"{mode}, α {alphas[drafters - 1]:.2f}", alphas[drafters - 1], seconds)
    for mode, seconds, drafters in modes
    for alphas in (SHIPPED, PAPER)
  ]
  rows = []
  for shape, chip in TABLES:
    for tensor in TENSORS:
      plan = Plan(shape=shape, chip=chip, tensor=tensor, split_drafters=True)
      if fits(plan):
        cells = [_pays(plan, alpha, seconds) for _, alpha, seconds in columns]
        rows.append((f"{shape.name}, {chip.name}", str(tensor), *cells))
  return markdown(("", "tensor", *(name for name, *_ in columns)), rows)


def _pays(plan: Plan, alpha: float, seconds: Callable[[Plan], float]) -> str:
  """Ranges of batches, as `1-8`."""
  drafters = 1 if seconds is dflash_seconds else 2
  fits_at = lambda batch: fits(_with_batch(plan, batch), drafters)
  fitting = [batch for batch in _MORE_BATCHES if fits_at(batch)]
  good = paying_batches(plan, alpha, seconds, fitting)
  runs: list[list[int]] = []
  for batch in good:
    if runs and runs[-1][1] * 2 == batch:
      runs[-1][1] = batch
    else:
      runs.append([batch, batch])
  text = ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in runs)
  full = good and good[-1] == fitting[-1] < _MORE_BATCHES[-1]
  return (text or "none") + ("+" if full else "")


def _reasons() -> dict[str, Any]:
  """Numbers of the model that the text names."""
  ratio = lambda plan: d2sd_seconds(plan) / step_seconds(plan)

  def steps(split: bool) -> dict[int, float]:
    plan = Plan(shape=QWEN3_32B, chip=H200, split_drafters=split)
    at = lambda tensor: dataclasses.replace(plan, tensor=tensor)
    return {tensor: ratio(at(tensor)) for tensor in TENSORS}

  on_eight = Plan(shape=QWEN3_32B, chip=H200, tensor=8)
  sums, step = exchange_seconds(on_eight, 1), step_seconds(on_eight)
  nodes = on_eight.tree.num_nodes
  chosen = [f"{distinct_experts(128, 4, n):.0f}" for n in (16, 72, 288)]
  return {
    "ridge": H200.peak / H200.memory,
    "whole": steps(False),
    "split": steps(True),
    "sums": 1e3 * sums,
    "share": 100 * sums / step,
    "large": 1e3 * sum_seconds(H200, 8, 64 * nodes * 5120 * 2),
    "chosen": f"{chosen[0]}, {chosen[1]} and {chosen[2]}",
    "experts": ratio(Plan(shape=GPT_OSS, chip=H200)),
  }


def _predicted_rows() -> str:
  """Of the benchmark's own rows, on four devices."""
  plans = [
    Plan(shape=QWEN3_32B, chip=chip, tensor=4, context=1007)
    for chip in (H200, H200_ONE_SHOT)
  ]
  split = lambda plan: dataclasses.replace(plan, split_drafters=True)
  timed: tuple[tuple[str, Callable[[Plan], float]], ...] = (
    ("`ar/1x1024`", step_seconds),
    ("`draft_1/1x1024`", lambda plan: draft_seconds(plan, 0)),
    ("the same, `--shard_drafters`", lambda p: draft_seconds(split(p), 0)),
    ("`draft_2/1x1024`", lambda plan: draft_seconds(plan, 1)),
    ("`verify_80/1x1024`", lambda plan: target_seconds(plan, 80)),
    ("`cycle/1x1024`", d2sd_seconds),
    ("`collectives_1/1x1024`", lambda plan: exchange_seconds(plan, 1)),
    ("`collectives_80/1x1024`", lambda plan: exchange_seconds(plan, 80)),
    ("`cycle/16x1024`", lambda p: d2sd_seconds(_with_batch(p, 16))),
    ("`ar/16x1024`", lambda p: step_seconds(_with_batch(p, 16))),
  )
  rows = [
    (name, *(_ms(seconds(plan)) for plan in plans)) for name, seconds in timed
  ]
  return markdown(("row", "10 µs a message", "4 µs"), rows)


def _with_batch(plan: Plan, batch: int) -> Plan:
  return dataclasses.replace(plan, batch=batch)


if __name__ == "__main__":
  cli.exit_with(cli.run(main))
