"""Joins corpora that were written side by side, each from a seed of its own.

`python -m d2sd_jax.training.join_corpora PART PART.. --heldout=FILE --out=FILE`

One writer drops near-duplicates of its own turns but knows nothing of the
others'. Here every user's turn is kept once, and none that is held out. The
result has a manifest, by which training refuses it if it is cut off.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from d2sd_jax import cli
from d2sd_jax.errors import UsageError, require
from d2sd_jax.io.paths import atomic_write, check_output, user_path
from d2sd_jax.training.manifest import corpus_files, manifest_path, sha256_of

EXAMPLES = """\
  python -m d2sd_jax.training.join_corpora runs/part1.jsonl runs/part2.jsonl \\
      --heldout=runs/heldout1.jsonl --out=runs/corpus.jsonl
"""


def join_corpora(
  parts: Sequence[Path], heldout: Path | None, out: Path
) -> dict[str, Any]:
  """Writes all conversations of `parts`, in order, each user's turn once.

  Args:
    parts: files of conversations, or manifests of corpora in several files.
    heldout: conversations whose turns are left out, if any.
    out: the file to write; its manifest comes beside it.

  Returns:
    The manifest.

  Raises:
    UsageError: a file is missing, cut off or unfinished, a line is no
      conversation, or nothing is left.
  """
  files = [
    file
    for i, part in enumerate(parts, 1)
    for file in corpus_files(part, f"part {i}")
  ]
  taken = out.resolve() not in {file.resolve() for file in files}
  require(taken, "out", str(out), "none of the parts")
  held = set()
  if heldout is not None:
    for file in corpus_files(heldout, "heldout"):
      held |= {turn for turn, _, _ in _lines(file)}
  counts: Counter[str] = Counter(records=0, tokens=0)
  seen: set[str] = set()
  with atomic_write(out) as temporary:
    with temporary.open("w", encoding="utf-8") as joined:
      for file in files:
        for turn, tokens, line in _lines(file):
          if turn in held or turn in seen:
            counts["held out" if turn in held else "seen before"] += 1
            continue
          seen.add(turn)
          counts.update(records=1, tokens=tokens)
          joined.write(f"{line}\n")
    require(
      bool(seen), "parts", len(parts), "a conversation that is not held out"
    )
  size = {"bytes": out.stat().st_size, "sha256": sha256_of(out)}
  manifest = {
    "identity": {"parts": {str(file): sha256_of(file) for file in files}},
    "turns": {"bytes": 0},
    "answers": {"batches": 0, **counts},
    "files": {out.name: size},
    "finished": True,
  }
  with atomic_write(manifest_path(out)) as temporary:
    temporary.write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
  return manifest


def _lines(path: Path) -> Iterator[tuple[str, int, str]]:
  """The user's last turn, the number of answer tokens, and the line itself."""
  with path.open(encoding="utf-8", errors="surrogateescape") as lines:
    for number, line in enumerate(lines, 1):
      try:
        record = json.loads(line)
        turn = record["messages"][-2]["content"]
        yield str(turn), len(record["tokens"]), line.rstrip("\n")
      except (ValueError, TypeError, KeyError, IndexError) as error:
        raise UsageError(
          f"{path}, line {number}: expected a conversation of a corpus"
        ) from error


def main(arguments: Sequence[str]) -> None:
  """Reads the flags, then joins."""
  parser = cli.FlagParser(
    "-m d2sd_jax.training.join_corpora",
    "Joins corpora; each user's turn once, none that is held out.",
    EXAMPLES,
  )
  add = parser.add_argument
  add("parts", nargs="+", metavar="PART", help="JSON lines, or a manifest")
  add("--heldout", metavar="FILE", help="conversations that stay out")
  add("--out", metavar="FILE", required=True, help="the file to write")
  flags, _ = parser.parse(arguments)
  out = check_output(flags.out, "out")
  heldout = None if flags.heldout is None else user_path(flags.heldout)
  manifest = join_corpora([user_path(p) for p in flags.parts], heldout, out)
  print(json.dumps(manifest["answers"]))
  print(f"{out} is written", file=sys.stderr)


if __name__ == "__main__":
  cli.exit_with(cli.run(main))
