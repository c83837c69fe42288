"""The manifest beside a corpus: its files, and whether they are whole."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2sd_jax.errors import UsageError, require

SUFFIX = ".manifest.json"


def manifest_path(path: Path) -> Path:
  """Where the manifest of a corpus is."""
  return path.with_suffix(SUFFIX)


def shard_names(path: Path, count: int) -> list[str]:
  """Names of a corpus's files: its own, or numbered ones."""
  if count == 1:
    return [path.name]
  return [
    f"{path.stem}-{i:05}-of-{count:05}{path.suffix}" for i in range(count)
  ]


def corpus_files(path: Path, field: str = "corpus") -> list[Path]:
  """The files of a corpus, checked against its manifest if there is one.

  Args:
    path: a manifest, or a file of conversations.
    field: what an error calls it.

  Raises:
    UsageError: there is no such file, it was cut off or changed, or its
      writer has not finished.
  """
  require(path.is_file(), field, str(path), "a file of JSON lines")
  named = path.name.endswith(SUFFIX)
  beside = path if named else manifest_path(path)
  if not beside.is_file():
    return [path]
  manifest = read_manifest(beside)
  if not named and path.name not in manifest["files"]:
    return [path]
  if not manifest["finished"]:
    raise UsageError(
      f"{beside}: expected a finished corpus; the command that began it goes on"
    )
  check_files(beside, manifest)
  files = [beside.with_name(name) for name in manifest["files"]]
  return files if named else [path]


def read_manifest(path: Path) -> dict[str, Any]:
  """A manifest, with the fields that are needed to go on or to read.

  Raises:
    UsageError: it is none.
  """
  try:
    manifest = json.loads(path.read_text(encoding="utf-8"))
    whole = (
      isinstance(manifest["identity"], dict)
      and isinstance(manifest["turns"]["bytes"], int)
      and isinstance(manifest["answers"]["batches"], int)
      and isinstance(manifest["finished"], bool)
      and all(
        Path(name).name == name and isinstance(file["bytes"], int)
        for name, file in manifest["files"].items()
      )
    )
  except (ValueError, KeyError, TypeError, AttributeError):
    whole = False
  if not whole:
    raise UsageError(f"{path}: expected the manifest of a corpus")
  return manifest


def check_files(path: Path, manifest: Mapping[str, Any]) -> None:
  """Raises `UsageError` unless a manifest's files are there and unchanged."""
  for name, entry in manifest["files"].items():
    file = path.with_name(name)
    check_size(file, entry["bytes"])
    expected = entry.get("sha256")
    if expected not in (None, sha256_of(file)):
      raise UsageError(
        f"{file}: expected sha256 {expected}, as in its manifest"
      )


def check_size(path: Path, size: int) -> None:
  """Raises `UsageError` if a file has fewer bytes than were counted."""
  if size > (path.stat().st_size if path.exists() else 0):
    raise UsageError(f"{path} was cut off: expected at least {size} bytes")


def sha256_of(path: Path) -> str:
  """Checksum of a file; empty if there is none."""
  if not path.exists():
    return ""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
