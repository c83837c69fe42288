"""The tasks of the ladder as the target reads them."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

from d2sd_jax.decoding.answers import Answer, Request
from d2sd_jax.decoding.report import answer_text
from d2sd_jax.eval.prompts import PROMPT_SETS, load_follow_ups, load_prompts
from d2sd_jax.io.tokenizer import ChatTokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """A set's conversations, as the target reads them.

  Attributes:
    name: of the set.
    requests: first turns in file order, then second turns, if there are any.
    ids: of each request.
    prompts: of each request, the number of the prompt it belongs to.
  """

  name: str
  requests: list[Request]
  ids: list[str]
  prompts: list[int]


def load_task_prompts(name: str, num: int) -> list[dict[str, str]]:
  """The first prompts of a set, with `follow_up` where there are any.

  Args:
    name: a key of `PROMPT_SETS`.
    num: prompts; all where the set has fewer.
  """
  num = min(num, PROMPT_SETS[name].count)
  prompts, follow_ups = load_prompts(name, num), load_follow_ups(name, num)
  for prompt, follow_up in zip(prompts, follow_ups, strict=False):
    prompt["follow_up"] = follow_up
  return prompts


def prompt_sha256(prompt: Mapping[str, str]) -> str:
  """Of the user's turns, which are not stored themselves."""
  turns = [prompt["prompt"], prompt.get("follow_up", "")]
  return sha256("\0".join(turns))


def sha256(text: str) -> str:
  """Of the text in UTF-8."""
  return hashlib.sha256(text.encode()).hexdigest()


def first_turns(
  name: str, prompts: Sequence[Mapping[str, str]], tokenizer: ChatTokenizer
) -> Task:
  """A task of single turns."""
  return Task(
    name=name,
    requests=[
      Request(sequence_id=i, tokens=tuple(tokenizer.encode_prompt(p["prompt"])))
      for i, p in enumerate(prompts)
    ],
    ids=[p["id"] for p in prompts],
    prompts=list(range(len(prompts))),
  )


def with_second_turns(
  task: Task,
  prompts: Sequence[Mapping[str, str]],
  answers: Sequence[Answer],
  tokenizer: ChatTokenizer,
) -> Task:
  """Adds the second turns, behind the target's own answers to the first."""
  requests = []
  for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
    text = answer_text(tokenizer, answer.tokens)
    turns = [
      {"role": "user", "content": prompt["prompt"]},
      {"role": "assistant", "content": text},
      {"role": "user", "content": prompt["follow_up"]},
    ]
    ids = tuple(tokenizer.encode_chat(turns))
    requests.append(Request(sequence_id=len(prompts) + i, tokens=ids))
  return Task(
    name=task.name,
    requests=task.requests + requests,
    ids=task.ids + [f"{name}/2" for name in task.ids],
    prompts=task.prompts * 2,
  )
