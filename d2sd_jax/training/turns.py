"""User turns of a corpus, from what the target or a source of prompts wrote."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from d2sd_jax.errors import require
from d2sd_jax.training.openings import (
  DOCSTRING_END,
  FENCE_END,
  KINDS,
  Opening,
)
from d2sd_jax.training.writer import Written

SYNTHESIS = "self-synthesis"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
  """A user's turn.

  Attributes:
    text: the user's own words; n-grams are counted in these.
    before, after: words of a format around them.
    kind: which opening it had, or the source of the prompt.
    prompt_length: tokens of the prompt that the turn becomes.
  """

  text: str
  before: str = ""
  after: str = ""
  kind: str
  prompt_length: int = 0

  @property
  def prompt(self) -> str:
    """The whole turn."""
    return f"{self.before}{self.text}{self.after}"


def turn_prefixes(tokenizer: Any, max_tokens: int) -> dict[str, list[int]]:
  """Ids of the chat format up to a user's turn, for every opening's words.

  Args:
    tokenizer: the target's; see `ChatTokenizer`.
    max_tokens: most ids that a prefix may have.

  Raises:
    UsageError: one is longer.
  """
  prefixes = {}
  for opening in (opening for _, group in KINDS.values() for opening in group):
    begun = opening.before + opening.start
    prefixes[begun] = turn_prefix(tokenizer, begun)
  longest = max(map(len, prefixes.values()))
  fits = longest <= max_tokens
  require(fits, "max_prefix_tokens", max_tokens, f"{longest} or more")
  return prefixes


def turn_prefix(tokenizer: Any, begun: str) -> list[int]:
  """Ids of the chat format up to a user's turn that begins with `begun`."""
  ids = tokenizer.encode_chat([{"role": "user", "content": begun}])
  turn_end = tokenizer.stop_ids[0]
  return ids[: len(ids) - 1 - ids[::-1].index(turn_end)]


def read_turns(
  tokenizer: Any,
  openings: Sequence[Opening],
  written: Written,
  max_prompt_tokens: int,
) -> list[tuple[Turn, str]]:
  """Every turn of a batch, and why it cannot be used ("" if it can).

  Args:
    tokenizer: the target's.
    openings: what the turns begin with.
    written: what the target wrote behind that.
    max_prompt_tokens: longest prompt that a turn may become.
  """
  inside = np.arange(written.tokens.shape[1]) < written.lengths[:, None] - 1
  special = np.isin(written.tokens, tokenizer.special_ids) & inside
  garbled = np.any(special, axis=1).tolist()
  turns = []
  for opening, row, bad in zip(openings, written.rows(), garbled, strict=True):
    finished = row[-1] == tokenizer.stop_ids[0]
    text = opening.start + tokenizer.decode(row[:-1] if finished else row)
    text, reason = own_text(opening, text, finished)
    if not reason and (bad or "\ufffd" in text):
      reason = "garbled"
    turn = Turn(
      text=text, before=opening.before, after=opening.after, kind=opening.kind
    )
    turns.append((turn, reason))
  return measure(tokenizer, turns, max_prompt_tokens)


def own_text(opening: Opening, text: str, finished: bool) -> tuple[str, str]:
  """A turn's own text, cut where its format says, and why it is none.

  Args:
    opening: what it begins with.
    text: all of it so far.
    finished: whether the target ended it.
  """
  if opening.stop == DOCSTRING_END:
    head, words, *rest = text.split(DOCSTRING_END)
    whole = f"{head}{DOCSTRING_END}{words}{DOCSTRING_END}"
    complete, shapely = bool(rest), bool(words.strip())
  elif opening.stop == FENCE_END:
    whole, complete = _first_function(text)
    complete, shapely = complete or finished, "return " in whole
  else:
    whole, complete = text.strip(), finished
    story = opening.kind == "arithmetic"
    shapely = not story or any(map(str.isdigit, whole))
  if not complete:
    return "", "unfinished"
  if whole in ("", opening.start):
    return whole, "empty"
  return whole, "" if shapely else "shapeless"


def _first_function(text: str) -> tuple[str, bool]:
  """A function's definition, and whether something stands behind it."""
  code, *rest = text.split(FENCE_END)
  head, *lines = code.split("\n")
  inside = itertools.takewhile(lambda x: not x.strip() or x[0] == " ", lines)
  body = list(inside)
  whole = "\n".join([head, *body]).rstrip()
  return whole, bool(rest) or len(body) < len(lines)


def measure(
  tokenizer: Any, turns: Iterable[tuple[Turn, str]], max_prompt_tokens: int
) -> list[tuple[Turn, str]]:
  """Counts the prompts' tokens, and refuses those that have too many."""
  turns = list(turns)
  usable = [turn.prompt for turn, reason in turns if not reason]
  lengths = iter(map(len, tokenizer.encode_prompts(usable)))
  measured = []
  for turn, reason in turns:
    if not reason:
      turn = dataclasses.replace(turn, prompt_length=next(lengths))
      reason = "long" if turn.prompt_length > max_prompt_tokens else ""
    measured.append((turn, reason))
  return measured
