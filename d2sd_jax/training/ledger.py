"""Files that only grow by whole batches, and a manifest of what counts."""

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from d2sd_jax.errors import UsageError, require
from d2sd_jax.io.paths import atomic_write, user_path
from d2sd_jax.training.manifest import (
  check_files,
  check_size,
  manifest_path,
  read_manifest,
  sha256_of,
  shard_names,
)

_ENCODER = json.JSONEncoder(ensure_ascii=False)


_Write = tuple[Path, int, bytes]


class Ledger:
  """A corpus in one or more files, its turns, and a manifest of what is done.

  All files only grow, by whole batches; the manifest, replaced atomically
  after each batch, says up to which byte they count. What lies behind, a run
  that was stopped left, and it is cut off. Writing is done in the background,
  in order; `close` waits for it.
  """

  def __init__(
    self,
    path: str,
    identity: dict[str, Any],
    num_records: int,
    num_shards: int = 1,
  ):
    """Opens the files of an earlier run, or starts new ones.

    Args:
      path: the corpus; shards are named after it.
      identity: what must be the same for a run to go on.
      num_records: records of all shards together.
      num_shards: files; all but the last hold equally many records.

    Raises:
      UsageError: the files are no part of this corpus, or were cut off.
    """
    self.path = user_path(path)
    self.turns_path = self.path.with_suffix(".turns.jsonl")
    self.manifest_path = manifest_path(self.path)
    self._shard_size = -(-num_records // num_shards)
    names = shard_names(self.path, -(-num_records // self._shard_size))
    self.manifest: dict[str, Any] = {
      "identity": identity,
      "turns": {
        **{"batches": 0, "bytes": 0, "kept": 0, "sampled_tokens": 0},
        **{"dropped": {}, "kinds": {}, "looked_at": {}},
      },
      "answers": {
        **{"batches": 0, "records": 0, "tokens": 0, "prompt_tokens": 0},
        **{"sampled_tokens": 0, "dropped": {}, "temperatures": {}},
        **{"prompt_lengths": {}, "answer_lengths": {}},
      },
      "files": {
        name: {"records": 0, "bytes": 0, "sha256": None} for name in names
      },
      "timed": {
        "turns": {"tokens": 0, "seconds": 0.0, "tokens_per_second": None},
        "answers": {"tokens": 0, "seconds": 0.0, "tokens_per_second": None},
      },
      "wall_seconds": 0.0,
      "answer_tokens_per_wall_second": None,
      "finished": False,
    }
    self._pool = ThreadPoolExecutor(1, "ledger")
    self._writing: Future[None] | None = None
    self._since = time.monotonic()
    if self.manifest_path.exists():
      self._resume(identity)
    else:
      for file in (*map(self.path.with_name, names), self.turns_path):
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

  def read_turns(self) -> list[dict[str, Any]]:
    """All turns so far."""
    if not self.turns_path.exists():
      return []
    lines = self.turns_path.read_bytes()[: self.turns["bytes"]].splitlines()
    return [json.loads(line) for line in lines]

  def begin(self) -> None:
    """Writes the manifest and starts the clock."""
    self._since = time.monotonic()
    self.save()

  def append(
    self, step: str, lines: Sequence[Any], **counts: int | Counter[str]
  ) -> None:
    """Adds a batch's lines to the files of a step, then to the manifest."""
    progress = self.manifest[step]
    if step == "answers":
      writes = list(self._to_shards(lines))
    else:
      writes = [_grow(self.turns_path, progress, lines)]
    progress["batches"] += 1
    for name, count in counts.items():
      progress[name] = (
        progress[name] + count
        if isinstance(count, int)
        else dict(sorted((Counter(progress[name]) + count).items()))
      )
    now = time.monotonic()
    wall = round(self.manifest["wall_seconds"] + now - self._since, 3)
    self.manifest["wall_seconds"] = wall
    self._since = now
    self.manifest["answer_tokens_per_wall_second"] = _rate(
      self.answers["tokens"], wall
    )
    snapshot = json.loads(_ENCODER.encode(self.manifest))
    self._wait()
    self._writing = self._pool.submit(self._write, writes, snapshot)

  def time(self, step: str, tokens: int, seconds: float) -> None:
    """Notes how long a batch of a step took."""
    timed = self.manifest["timed"][step]
    timed["tokens"] += tokens
    timed["seconds"] = round(timed["seconds"] + seconds, 3)
    timed["tokens_per_second"] = _rate(timed["tokens"], timed["seconds"])

  def finish(self) -> None:
    """Notes the finished files' checksums."""
    self._wait()
    for name, file in self.manifest["files"].items():
      file["sha256"] = sha256_of(self.path.with_name(name))
    self.manifest["finished"] = True
    self.save()

  def save(self) -> None:
    """Writes the manifest."""
    self._save(self.manifest)

  def close(self) -> None:
    """Waits for what is being written.

    Raises:
      OSError: it could not be.
    """
    self._wait()
    self._pool.shutdown()

  def _wait(self) -> None:
    """Waits for the last batch, and raises what went wrong with it."""
    if self._writing is not None:
      self._writing.result()

  def _to_shards(self, lines: Sequence[Any]) -> Iterator[_Write]:
    """Fills shard after shard."""
    for name, file in self.manifest["files"].items():
      room = self._shard_size - file["records"]
      mine, lines = lines[:room], lines[room:]
      if mine:
        file["records"] += len(mine)
        yield _grow(self.path.with_name(name), file, mine)

  def _write(self, writes: Sequence[_Write], manifest: dict[str, Any]) -> None:
    """Puts data on the disk, and only then the manifest that counts it."""
    for path, offset, data in writes:
      path.parent.mkdir(parents=True, exist_ok=True)
      with open(path, "r+b" if path.exists() else "wb") as file:
        file.truncate(offset)
        file.seek(offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    self._save(manifest)

  def _save(self, manifest: dict[str, Any]) -> None:
    with atomic_write(self.manifest_path) as path:
      path.write_text(json.dumps(manifest, indent=2) + "\n")

  def _resume(self, identity: dict[str, Any]) -> None:
    manifest = read_manifest(self.manifest_path)
    found = manifest["identity"]
    for key in identity:
      if found.get(key) != identity[key]:
        raise UsageError(
          f"{self.manifest_path} is of another corpus: {key}="
          f"{found.get(key)!r}, expected {identity[key]!r}"
        )
    check_files(self.manifest_path, manifest)
    check_size(self.turns_path, manifest["turns"]["bytes"])
    self.manifest = manifest


def _grow(path: Path, entry: dict[str, Any], lines: Iterable[Any]) -> _Write:
  """What to write where; counts it in the entry of the file."""
  text = "".join(_ENCODER.encode(line) + "\n" for line in lines)
  data, offset = text.encode(), entry["bytes"]
  entry["bytes"] += len(data)
  return path, offset, data


def _rate(tokens: int, seconds: float) -> float:
  """Tokens per second."""
  return round(tokens / max(seconds, 1e-3), 1)
