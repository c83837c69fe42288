"""Prompts from a flag, from standard input or from a file of JSON lines."""

import json
import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

from d2sd_jax.errors import UsageError, require
from d2sd_jax.io.paths import user_path
from d2sd_jax.io.tokenizer import check_messages, check_unicode

Conversation: TypeAlias = list[dict[str, str]]


def read_prompts(
  prompt: str | None, prompts_file: str | None
) -> list[Conversation]:
  """Conversations to be answered, checked.

  Args:
    prompt: one user turn; `-` reads it from standard input.
    prompts_file: JSON lines, each with `prompt` (one user turn) or `messages`.

  Raises:
    UsageError: both or neither is given, there is no such file, a line is
      malformed, or a prompt is empty.
  """
  if (prompt is None) == (prompts_file is None):
    given = "neither was" if prompt is None else "both were"
    raise UsageError(
      f"--prompt, --prompts_file: expected exactly one of them; {given} given"
    )
  if prompts_file is not None:
    return read_prompts_file(prompts_file)
  return [_user_turn(_read_stdin() if prompt == "-" else prompt)]


def _read_stdin() -> str:
  if sys.stdin is None:
    raise UsageError("prompt=-: expected standard input to be open")
  try:
    return sys.stdin.read()
  except UnicodeDecodeError as error:
    raise UsageError(f"prompt=-: expected UTF-8 text ({error})") from error


def read_prompts_file(
  name: str, field: str = "prompts_file"
) -> list[Conversation]:
  """One conversation per line; blank lines count but say nothing.

  Args:
    name: of the file.
    field: what an error calls it.

  Raises:
    UsageError: there is no such file, a line is malformed, or all are blank.
  """
  path = user_path(name)
  try:
    lines = path.read_bytes().split(b"\n")
  except OSError as error:
    raise UsageError(
      f"{field}={str(path)!r}: expected a file of JSON lines ({error.strerror})"
    ) from error
  prompts = []
  for number, line in enumerate(lines, 1):
    if line.strip():
      try:
        prompts.append(_parse_line(line))
      except UsageError as error:
        raise UsageError(f"{path}, line {number}: {error}") from error
  require(bool(prompts), field, str(path), "at least one prompt in it")
  return prompts


def _parse_line(line: bytes) -> Conversation:
  expected = "expected a JSON object with prompt or messages"
  try:
    record = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise UsageError(f"{expected} ({error})") from error
  if not isinstance(record, dict):
    raise UsageError(f"{expected}, not {type(record).__name__}")
  if ("prompt" in record) == ("messages" in record):
    raise UsageError(f"{expected}: exactly one of the two")
  if "prompt" in record:
    return _user_turn(record["prompt"])
  return _check_turns(record["messages"])


def _user_turn(text: Any) -> Conversation:
  is_text = isinstance(text, str) and bool(text.strip())
  require(is_text, "prompt", text, "some text")
  check_unicode("prompt", text)
  return _check_turns([{"role": "user", "content": text}])


def _check_turns(messages: Any) -> Conversation:
  is_list = isinstance(messages, list)
  require(is_list, "messages", messages, "a list of turns")
  check_messages(messages)
  last: Sequence[str] = messages[-1]["role"], messages[-1]["content"].strip()
  require(
    last[0] == "user" and bool(last[1]),
    "messages",
    messages[-1],
    "a last turn of the user's that is not empty",
  )
  return messages
