"""Renders a chat template; a program of its own, since templates are foreign.

`chat_template.render` runs it: a request in JSON on standard input, and on
standard output the texts, or what went wrong. Jinja's sandbox keeps a template
from the interpreter; a process keeps it from our memory and our time.
"""

import datetime
import json
import resource
import sys


def main() -> None:
  """Reads the request, limits itself, renders, and answers."""
  request = json.load(sys.stdin)
  seconds, num_bytes = request["seconds"], request["bytes"]
  resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
  resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
  sys.path[:0] = request["path"]
  try:
    answer: dict[str, object] = {"texts": render(request)}
  except MemoryError:
    answer = {"error": "it takes too much memory"}
  except RecursionError:
    answer = {"error": "it calls itself too often"}
  except Exception as error:  # whatever a template may raise
    message = " ".join(str(error).split())
    answer = {"error": f"{type(error).__name__}: {message}"[:300]}
  json.dump(answer, sys.stdout)


def render(request: dict) -> list[str]:
  """Text of every conversation."""
  template = environment().from_string(request["template"])
  texts, left = [], request["characters"]
  for messages in request["conversations"]:
    pieces = []
    for piece in template.generate(messages=messages, **request["variables"]):
      left -= len(piece)
      if left < 0:
        raise ValueError("it writes too much")
      pieces.append(piece)
    texts.append("".join(pieces))
  return texts


def environment():
  """A sandbox with what published chat templates use."""
  from jinja2 import ext, nodes, sandbox

  class Generation(ext.Extension):
    """`{% generation %}` marks the answer, for training; here it is plain."""

    tags = frozenset({"generation"})

    def parse(self, parser):
      line = next(parser.stream).lineno
      body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
      return nodes.Scope(body, lineno=line)

  made = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[Generation, "jinja2.ext.loopcontrols"],
  )
  made.filters["tojson"] = to_json
  made.globals["raise_exception"] = refuse
  made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(
    form
  )
  return made


def to_json(
  value,
  ensure_ascii=False,
  indent=None,
  separators=None,
  sort_keys=False,
) -> str:
  """JSON without the escapes that Jinja's own filter makes for HTML."""
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


def refuse(message):
  """What a template calls for a conversation it cannot write."""
  raise ValueError(message)


if __name__ == "__main__":
  main()
