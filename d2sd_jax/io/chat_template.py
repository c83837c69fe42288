"""A model's own chat template, rendered where it can do no harm."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2sd_jax.errors import UsageError

MAX_SECONDS = 10
MAX_BYTES = 2**30
# Of each conversation; a template that repeats itself ends here.
MAX_CHARACTERS = 2**21


def render(
  template: str,
  conversations: Sequence[Sequence[Mapping[str, str]]],
  variables: Mapping[str, Any],
  where: str,
) -> list[str]:
  """Texts of conversations by a Jinja template.

  It runs in Jinja's immutable sandbox, in a process of its own that is limited
  in time, memory and output: a template comes with the weights, from anywhere.

  Args:
    template: Jinja source, as in `chat_template.jinja`.
    conversations: messages with `role` and `content`.
    variables: what else the template may ask for.
    where: what errors call the template.

  Raises:
    UsageError: the template is malformed, refuses a conversation, or takes
      more than it may.
  """
  request = {
    "template": template,
    "conversations": [list(map(dict, c)) for c in conversations],
    "variables": dict(variables),
    "path": [_folder_of("jinja2"), _folder_of("markupsafe")],
    "seconds": MAX_SECONDS,
    "bytes": MAX_BYTES,
    "characters": MAX_CHARACTERS * len(conversations),
  }
  program = Path(__file__).with_name("render_chat.py")
  failed = f"{where}: expected a chat template that renders a conversation"
  try:
    done = subprocess.run(
      [sys.executable, "-I", str(program)],
      input=json.dumps(request),
      capture_output=True,
      text=True,
      encoding="utf-8",
      timeout=2 * MAX_SECONDS,
    )
    answer = json.loads(done.stdout)
  except subprocess.TimeoutExpired as error:
    raise UsageError(f"{failed} (it takes too long)") from error
  except ValueError as error:
    # Stopped for its time or its memory, it had no last word.
    raise UsageError(f"{failed} (it takes too much)") from error
  if "error" in answer:
    raise UsageError(f"{failed} ({answer['error']})")
  return answer["texts"]


def _folder_of(package: str) -> str:
  """The folder a package was installed in."""
  spec = importlib.util.find_spec(package)
  if spec is None or spec.origin is None:
    raise UsageError(f"{package}: expected to be installed, for chat templates")
  return str(Path(spec.origin).parents[1])
