"""Files that only grow by whole batches, and a manifest of what counts."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from d2sd_jax.errors import UsageError, require
from d2sd_jax.io.paths import atomic_write


class Ledger:
  """One corpus file, its turns beside it, and a manifest of what is done.

  Both files only grow, by whole batches; the manifest, replaced atomically
  after each batch, says up to which byte they count. What lies behind, a run
  that was stopped left, and it is cut off.
  """

  def __init__(self, path: str, identity: dict[str, Any]):
    """Opens the files of an earlier run, or starts new ones.

    Raises:
      UsageError: the files are no part of this corpus, or were cut off.
    """
    self.path = Path(path)
    self.turns_path = self.path.with_suffix(".turns.jsonl")
    self.manifest_path = self.path.with_suffix(".manifest.json")
    self.manifest: dict[str, Any] = {
      "identity": identity,
      "turns": {"batches": 0, "bytes": 0, "kept": 0, "dropped": {}},
      "answers": {
        **{"batches": 0, "bytes": 0, "records": 0, "tokens": 0},
        **{"sampled_tokens": 0, "prompt_tokens": 0, "dropped": {}},
      },
      "timed_tokens": 0,
      "timed_seconds": 0.0,
      "tokens_per_second": None,
      "sha256": None,
    }
    if self.manifest_path.exists():
      self._resume(identity)
    else:
      for file in (self.path, self.turns_path):
        fresh = not file.exists()
        expected = f"a new file (it has no {self.manifest_path.name})"
        require(fresh, "out", str(file), expected)

  @property
  def turns(self) -> dict[str, Any]:
    """Progress of the turns."""
    return self.manifest["turns"]

  @property
  def answers(self) -> dict[str, Any]:
    """Progress of the answers."""
    return self.manifest["answers"]

  def read_turns(self) -> list[str]:
    """Texts of all turns so far."""
    if not self.turns_path.exists():
      return []
    lines = self.turns_path.read_bytes()[: self.turns["bytes"]].splitlines()
    return [json.loads(line)["text"] for line in lines]

  def append(
    self, step: str, lines: Iterable[Any], dropped: Counter[str], **counts: int
  ) -> None:
    """Adds a batch's lines to the file of a step, then to the manifest."""
    progress = self.manifest[step]
    data = "".join(
      json.dumps(line, ensure_ascii=False) + "\n" for line in lines
    ).encode()
    path = self.path if step == "answers" else self.turns_path
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "r+b" if path.exists() else "wb") as file:
      file.truncate(progress["bytes"])
      file.seek(progress["bytes"])
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    progress["bytes"] += len(data)
    progress["batches"] += 1
    progress["dropped"] = dict(
      sorted((Counter(progress["dropped"]) + dropped).items())
    )
    for name, count in counts.items():
      progress[name] += count
    self.save()

  def time(self, tokens: int, seconds: float) -> None:
    """Notes how long some answer tokens took."""
    manifest = self.manifest
    manifest["timed_tokens"] += tokens
    manifest["timed_seconds"] = round(manifest["timed_seconds"] + seconds, 3)
    rate = manifest["timed_tokens"] / max(manifest["timed_seconds"], 1e-3)
    manifest["tokens_per_second"] = round(rate, 1)

  def finish(self) -> None:
    """Notes the finished file's checksum."""
    self.manifest["sha256"] = _sha256(self.path)
    self.save()

  def save(self) -> None:
    """Writes the manifest."""
    with atomic_write(self.manifest_path) as path:
      path.write_text(json.dumps(self.manifest, indent=2) + "\n")

  def _resume(self, identity: dict[str, Any]) -> None:
    try:
      manifest = json.loads(self.manifest_path.read_text())
      found = manifest["identity"]
      sizes = {
        self.path: manifest["answers"]["bytes"],
        self.turns_path: manifest["turns"]["bytes"],
      }
    except (ValueError, KeyError, TypeError) as error:
      raise UsageError(
        f"{self.manifest_path}: expected the manifest of a corpus"
      ) from error
    for key in identity:
      if found.get(key) != identity[key]:
        raise UsageError(
          f"{self.manifest_path} is of another corpus: {key}="
          f"{found.get(key)!r}, expected {identity[key]!r}"
        )
    for path, size in sizes.items():
      if size > (path.stat().st_size if path.exists() else 0):
        raise UsageError(f"{path} was cut off: expected at least {size} bytes")
    if manifest["sha256"] not in (None, _sha256(self.path)):
      raise UsageError(
        f"{self.path}: expected sha256 {manifest['sha256']}, as in its manifest"
      )
    self.manifest = manifest


def _sha256(path: Path) -> str:
  if not path.exists():
    return ""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
