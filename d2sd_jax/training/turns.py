"""User turns of a corpus: how they begin, and which are kept."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d2sd_jax.errors import UsageError, require

DUPLICATE_NGRAM = 8
EXCLUDED_NGRAM = 13

OPENINGS = (
  *("Write a Python function", "Write a program that", "Fix this code:"),
  *("def", "How do I use", "What does this code do?", "Write a SQL query"),
  *("A store sells", "A train", "How many", "Calculate", "There are"),
  *("Sarah has", "A farmer", "Solve the equation"),
  *("Explain", "Explain how", "Why do", "What is the difference between"),
  *("Summarize the following text:", "Summarize this article:"),
  *("List", "Give me a list of", "What are the main", "Name five"),
  *("Rewrite the following", "Correct the grammar:", "Translate"),
  *("Can you give me advice on", "How can I", "I'm planning"),
  *("Write a short story about", "Write an email", "Write a poem about"),
  *("Imagine you are", "Pretend to be", "Describe"),
  *("Compare", "What are the pros and cons of"),
  *("Who was", "When did", "Where is", "What is the"),
)


def words(text: str) -> list[str]:
  """Lower-case words of a text, punctuation left out."""
  return re.findall(r"\w+", text.lower())


def ngrams(tokens: Sequence[str], size: int) -> list[tuple[str, ...]]:
  """All n-grams in order; a shorter text is a single one."""
  starts = range(max(len(tokens) - size, 0) + 1)
  return [tuple(tokens[i : i + size]) for i in starts]


class TurnFilter:
  """Decides which turns are kept; remembers those that were.

  A turn is a near-duplicate if more than half of its word 8-grams were seen,
  and excluded if it shares a word 13-gram with an excluded prompt. Of a
  shorter text all words count as one n-gram.
  """

  def __init__(self, excluded: Iterable[str] = ()):
    self._seen: set[tuple[str, ...]] = set()
    self._excluded = {
      gram for text in excluded for gram in ngrams(words(text), EXCLUDED_NGRAM)
    }

  def reject(self, text: str) -> str:
    """Why a turn is dropped; empty if it is kept, and then remembered."""
    tokens = words(text)
    if not tokens:
      return "empty"
    if not self._excluded.isdisjoint(ngrams(tokens, EXCLUDED_NGRAM)):
      return "excluded"
    grams = ngrams(tokens, DUPLICATE_NGRAM)
    if 2 * sum(gram in self._seen for gram in grams) > len(grams):
      return "duplicate"
    self._seen.update(grams)
    return ""


def read_excluded(path: str | None) -> list[str]:
  """User texts of a prompts file (`prompt` or `messages` on every line).

  Raises:
    UsageError: the file is missing, or a line of it is malformed.
  """
  if path is None:
    return []
  require(Path(path).is_file(), "exclude", path, "a file of JSON lines")
  texts: list[str] = []
  with open(path, encoding="utf-8") as file:
    for number, line in enumerate(file, 1):
      try:
        record = json.loads(line)
        texts += (
          [record["prompt"] + ""]
          if "prompt" in record
          else [
            m["content"] + "" for m in record["messages"] if m["role"] == "user"
          ]
        )
      except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
          f"{path}, line {number}: expected a JSON object with prompt or"
          " messages"
        ) from error
  return texts


def turn_prefix(tokenizer: Any, opening: str) -> list[int]:
  """Ids of the chat format up to a user's turn that begins with `opening`."""
  ids = tokenizer.encode_chat([{"role": "user", "content": opening}])
  turn_end = tokenizer.stop_ids[0]
  return ids[: len(ids) - 1 - ids[::-1].index(turn_end)]


def draw_openings(count: int, seed: Sequence[int]) -> list[str]:
  """How each turn of a batch begins; about half begin freely ("")."""
  rng = np.random.default_rng(list(seed))
  chosen = rng.integers(len(OPENINGS), size=count)
  free = rng.random(count) < 0.5
  pairs = zip(chosen, free, strict=True)
  return ["" if is_free else OPENINGS[i] for i, is_free in pairs]


def read_turn(
  tokenizer: Any, opening: str, ids: Sequence[int], max_prompt_tokens: int
) -> tuple[str, str]:
  """A turn's text, and why it cannot be used ("" if it can).

  Args:
    tokenizer: the target's.
    opening: what the text begins with.
    ids: what the target wrote behind it.
    max_prompt_tokens: longest prompt that the turn may become.
  """
  *body, last = ids
  if last != tokenizer.stop_ids[0]:
    return "", "unfinished"
  text = (opening + tokenizer.decode(body)).strip()
  if not text or text == opening:
    return text, "empty"
  if "\ufffd" in text or set(body) & set(tokenizer.special_ids):
    return text, "garbled"
  if len(tokenizer.encode_prompt(text)) > max_prompt_tokens:
    return text, "long"
  return text, ""
