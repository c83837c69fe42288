"""How the user turns of a corpus begin: kinds of prompts, formats, suffixes.

The formats are those that drafters are used and evaluated with; the words are
the target's own, but for a few that begin a turn.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from d2sd_jax.eval.prompts import (
  REASONING_SUFFIX,
  cruxeval_prompt,
  humaneval_prompt,
)

_MARK = "\0"
_SOLVE, _FENCE_END = humaneval_prompt({"prompt": _MARK}).split(_MARK)
_RETURN, _CALL, _CALL_END = cruxeval_prompt(
  {"function": _MARK, "input": _MARK}
).split(_MARK)
# Words of a format, not of a user.
TEMPLATES = (_SOLVE, _RETURN, REASONING_SUFFIX)
DOCSTRING_END, FENCE_END = '"""', "```"
SUFFIX_SHARE = 0.6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opening:
  """What a turn is made of beside the target's words.

  Attributes:
    kind: a key of `KINDS`.
    before: words of the format; no part of the user's own text.
    start: first words of the user's own text.
    after: words of the format behind the text.
    stop: where the text is cut: behind the docstring it has opened, or before
      the end of the fence or function; empty if the target ends it.
  """

  kind: str
  before: str = ""
  start: str = ""
  after: str = ""
  stop: str = ""


def _plain(kind: str, starts: Sequence[str]) -> tuple[Opening, ...]:
  return tuple(Opening(kind=kind, start=start) for start in starts)


_NAMES = (
  *("Sarah", "Tom", "Maria", "Ben", "Priya", "Omar", "Lily", "Carlos"),
  *("A farmer", "A teacher", "A baker", "A shop", "A school", "A train"),
)
_VERBS = (
  *("has", "buys", "sells", "needs", "wants to", "makes", "earns"),
  *("starts with", "travels", "spends", "is saving", "orders"),
)
_STORIES = (
  *("A store sells", "There are", "How many", "Calculate", "In a class of"),
  *("The price of", "Every day,", "If a car", "Half of the"),
)
_COMPETITION = (
  *("Find the number of", "Find the sum of", "Find the largest"),
  *("Find the remainder when", "How many positive integers", "Let $x$ be"),
  *("Let $n$ be", "Let $ABC$ be", "Suppose that", "Compute the"),
  *("Determine all", "What is the probability that", "A sequence is"),
  *("In a triangle", "The polynomial", "Solve the equation"),
)
_FUNCTIONS = (
  *("Write a function to", "Write a python function to"),
  *("Write a Python function that", "Write a program that"),
  *("Write a function to find", "Write a function to check if"),
  *("Write a function to remove", "Write a function to convert"),
  *("Write a python function to count", "Write a python function to get"),
  *("Fix this code:", "How do I use", "What does this code do?"),
  *("Write a SQL query", "Write a regular expression", "Write a class"),
)
_IMPORT = "from typing import List\n\n\n"
_SIGNATURES = tuple(
  f"{_IMPORT if 'List' in rest else ''}def {rest}:"
  for rest in (
    "count_items(items: List[str]) -> int",
    "merge_names(names: List[str], sep: str) -> str",
    "largest_gap(numbers: List[int]) -> int",
    "digits_of(number: int) -> List[int]",
    "average_of(values: List[float]) -> float",
    "find_words(text: str, length: int) -> List[str]",
    "shift_letters(text: str, steps: int) -> str",
    "is_well_formed(text: str) -> bool",
    "rotate_by(items, k)",
    "solution(n)",
    "next_value(a, b, c)",
    "keep_if(numbers, limit)",
    "compare_two(first, second)",
    "group_by_key(pairs)",
  )
)
# First words of a docstring, and of a body: where a line has just ended the
# target would rather close the fence.
_DOCSTRINGS = ("", " Given a", "\n    Return", " Check if", "\n    You are")
_CALLS = (
  ("text", "result = ''\n    for"),
  ("text", "words ="),
  ("text", "if"),
  ("text, char", "count = 0\n    for"),
  ("text, char", "parts ="),
  ("text, n", "return"),
  ("nums", "total = 0\n    for"),
  ("nums", "result = []\n    for"),
  ("nums, n", "while"),
  ("nums, n", "nums = sorted"),
  ("d", "result = {}\n    for key, value in"),
  ("d, n", "keys = list"),
  ("n", "if n"),
  ("text, nums", "for i in"),
)
_WRITING = (
  *("Write a short story about", "Write an email", "Write a poem about"),
  *("Write a blog post about", "Write a letter to", "Write a song about"),
  *("Write an essay about", "Write a riddle about", "Write a limerick about"),
  *("Write a funny", "Write a cover letter", "Write a product description"),
  *("Write a resume for", "Write a dialogue between", "Write an advertisement"),
  *("Rewrite the following", "Rewrite this sentence", "Given the sentence"),
  *("Create an itinerary for", "Give me a summary of", "Come up with"),
  *("Write two", "Write a review of", "Describe", "Your answer must"),
)
_GENERAL = (
  *("Explain", "Explain how", "Why do", "What is the difference between"),
  *("Summarize the following text:", "Summarize this article:"),
  *("List", "Give me a list of", "What are the main", "Name five"),
  *("Correct the grammar:", "Translate", "Edit the following paragraph"),
  *("Can you give me advice on", "How can I", "I'm planning", "Help me"),
  *("Imagine you are", "Pretend to be", "You are a", "Act as"),
  *("Compare", "What are the pros and cons of", "Discuss", "Could you"),
  *("Who was", "When did", "Where is", "What is the", "Given the following"),
  *("Evaluate the following", "Extract the following", "Identify the"),
  *("Which of these", "Read the following", "Classify"),
)
# Requests about an answer's form, as some users append them.
CONSTRAINTS = (
  *(" Use only lowercase letters.", " Answer in capital letters only."),
  *(" Use fewer than 80 words.", " Write at least 120 words."),
  *(" Use exactly three bullet points, each marked with *.",),
  *(" Give it a title in double angular brackets.", " Avoid commas."),
  *(" Put your whole answer in quotation marks.", " Add a P.S. at the end."),
  *(" Structure it in two sections, Section 1 and Section 2.",),
  *(" Separate the paragraphs with ***.", " Answer as JSON."),
  *(" Finish with the words: Is there anything else?",),
  *(" Leave at least two placeholders in square brackets.",),
  *(" Use the word 'light' at least twice.", " Use four sentences."),
)

KINDS: Mapping[str, tuple[float, tuple[Opening, ...]]] = {
  "free": (0.22, (Opening(kind="free"),)),
  "arithmetic": (
    0.14,
    _plain(
      "arithmetic",
      [f"{a} {b}" for a in _NAMES for b in _VERBS] + 4 * list(_STORIES),
    ),
  ),
  "competition": (0.08, _plain("competition", _COMPETITION)),
  "function": (0.10, _plain("function", _FUNCTIONS)),
  "docstring": (
    0.13,
    tuple(
      Opening(
        kind="docstring",
        before=_SOLVE,
        start=f'{signature}\n    """{words}',
        after=_FENCE_END,
        stop=DOCSTRING_END,
      )
      for signature in _SIGNATURES
      for words in _DOCSTRINGS
    ),
  ),
  "call": (
    0.13,
    tuple(
      Opening(
        kind="call",
        before=_RETURN,
        start=f"def f({names}):\n    {body}",
        # Values stand here once the opening is drawn.
        after=names,
        stop=FENCE_END,
      )
      for names, body in _CALLS
    ),
  ),
  "writing": (0.10, _plain("writing", _WRITING)),
  "general": (0.10, _plain("general", _GENERAL)),
}
_SUFFIXES: Mapping[str, Sequence[str]] = {
  "arithmetic": (REASONING_SUFFIX,),
  "competition": (REASONING_SUFFIX,),
  "writing": CONSTRAINTS,
}
_LETTERS = list("abcdefghijklmnopqrstuvwxyzABCDEFGHI 0123")


def draw_openings(count: int, seed: Sequence[int]) -> list[Opening]:
  """How each turn of a batch begins, with suffixes and values drawn as well.

  Args:
    count: of openings.
    seed: of the draws.
  """
  rng = np.random.default_rng(list(seed))
  shares = np.array([share for share, _ in KINDS.values()])
  kinds = rng.choice(list(KINDS), size=count, p=shares / shares.sum())
  return [_draw_opening(str(kind), rng) for kind in kinds]


def _draw_opening(kind: str, rng: np.random.Generator) -> Opening:
  openings = KINDS[kind][1]
  opening = openings[int(rng.integers(len(openings)))]
  if kind == "call":
    values = [_draw_value(name, rng) for name in opening.after.split(", ")]
    after = f"{_CALL}{', '.join(values)}{_CALL_END}"
    return dataclasses.replace(opening, after=after)
  suffixes = _SUFFIXES.get(kind, ())
  if suffixes and rng.random() < SUFFIX_SHARE:
    after = suffixes[int(rng.integers(len(suffixes)))]
    return dataclasses.replace(opening, after=after)
  return opening


def _draw_value(name: str, rng: np.random.Generator) -> str:
  """A Python literal for an argument of that name."""
  word = lambda most: "".join(rng.choice(_LETTERS, rng.integers(1, most)))
  number = lambda: int(rng.integers(-9, 60))
  size = int(rng.integers(1, 7))
  draw = {
    "text": lambda: repr(word(18)),
    "char": lambda: repr(str(rng.choice(_LETTERS))),
    "n": lambda: repr(int(rng.integers(0, 12))),
    "nums": lambda: repr([number() for _ in range(size)]),
    "d": lambda: repr({word(5): number() for _ in range(size)}),
  }
  return draw[name]()
