"""Which user turns are new, and none of the evaluation's, by word n-grams."""

import array
import re
from collections.abc import Iterable

from d2sd_jax.io.prompts import read_prompts_file

DUPLICATE_NGRAM = 8
EXCLUDED_NGRAM = 13


def words(text: str) -> list[str]:
  """Lower-case words of a text, punctuation left out."""
  return re.findall(r"\w+", text.lower())


class TurnFilter:
  """Decides which turns are kept; remembers those that were.

  A turn is a near-duplicate if more than half of its word 8-grams were seen,
  and excluded if it shares a word 13-gram with an excluded prompt. Of a
  shorter text all words count as one n-gram.
  """

  def __init__(self, excluded: Iterable[str] = ()):
    self._numbers: dict[str, int] = {}
    self._seen: set[bytes] = set()
    self._excluded = {
      gram
      for text in excluded
      for gram in _ngrams(self._encode(text), EXCLUDED_NGRAM)
    }

  def reject(self, text: str) -> str:
    """Why a turn is dropped; empty if it is kept, and then remembered."""
    encoded = self._encode(text)
    if not encoded:
      return "empty"
    if not self._excluded.isdisjoint(_ngrams(encoded, EXCLUDED_NGRAM)):
      return "excluded"
    grams = _ngrams(encoded, DUPLICATE_NGRAM)
    if 2 * sum(map(self._seen.__contains__, grams)) > len(grams):
      return "duplicate"
    self._seen.update(grams)
    return ""

  def _encode(self, text: str) -> bytes:
    """A number for every word, 4 bytes each: exact, and cheap to slice."""
    numbers = self._numbers
    encoded = [numbers.setdefault(word, len(numbers)) for word in words(text)]
    return array.array("i", encoded).tobytes()


def _ngrams(encoded: bytes, size: int) -> list[bytes]:
  """All n-grams in order; a shorter text is a single one."""
  last = max(len(encoded) - 4 * size, 0)
  return [encoded[i : i + 4 * size] for i in range(0, last + 1, 4)]


def read_excluded(path: str | None) -> list[str]:
  """User turns of a prompts file; none if there is no file.

  Raises:
    UsageError: the file is missing, or a line of it is malformed.
  """
  if path is None:
    return []
  conversations = read_prompts_file(path, "exclude")
  turns = (turn for turns in conversations for turn in turns)
  return [turn["content"] for turn in turns if turn["role"] == "user"]
