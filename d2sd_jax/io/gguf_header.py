"""The header of a GGUF file: its metadata and its table of tensors.

Parsed here rather than by `gguf.GGUFReader`, which takes seconds over a
tokenizer's 100,000 strings and raises whatever NumPy does on a damaged file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from d2sd_jax.errors import UsageError

_SCALARS = {
  gguf.GGUFValueType.UINT8: "<B",
  gguf.GGUFValueType.INT8: "<b",
  gguf.GGUFValueType.UINT16: "<H",
  gguf.GGUFValueType.INT16: "<h",
  gguf.GGUFValueType.UINT32: "<I",
  gguf.GGUFValueType.INT32: "<i",
  gguf.GGUFValueType.FLOAT32: "<f",
  gguf.GGUFValueType.BOOL: "<?",
  gguf.GGUFValueType.UINT64: "<Q",
  gguf.GGUFValueType.INT64: "<q",
  gguf.GGUFValueType.FLOAT64: "<d",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
  """Where a tensor lies in the file.

  Attributes:
    shape: rows first, so [out, in] for a matrix.
    kind: its quantisation.
    start: offset in bytes from the beginning of the file.
  """

  shape: tuple[int, ...]
  kind: gguf.GGMLQuantizationType
  start: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
  """A GGUF file without its weights."""

  path: Path
  metadata: Mapping[str, Any]
  tensors: Mapping[str, TensorInfo]


def read_header(path: str | os.PathLike[str]) -> Header:
  """Reads all metadata and the table of tensors, none of the weights.

  Raises:
    UsageError: no such file, not GGUF (version 2 or 3), or truncated.
  """
  path = Path(path)
  cursor = _Cursor(path, map_file(path))
  if cursor.take(4) != b"GGUF":
    raise UsageError(f"{path}: expected a GGUF file, which begins with 'GGUF'")
  version = cursor.scalar("<I")
  if version not in (2, 3):
    raise UsageError(f"{path}: GGUF version {version}: expected 2 or 3")
  num_tensors, num_keys = cursor.scalar("<Q"), cursor.scalar("<Q")
  metadata: dict[str, Any] = {}
  for _ in range(num_keys):
    key = cursor.string()
    metadata[key] = cursor.value(key)
  tensors: dict[str, TensorInfo] = {}
  for _ in range(num_tensors):
    name = cursor.string()
    if name in tensors:
      raise UsageError(f"{path}: tensor {name!r} is there twice")
    tensors[name] = cursor.tensor_info(name)
  base = _align(cursor.position, metadata.get("general.alignment", 32), path)
  tensors = {
    name: dataclasses.replace(info, start=base + info.start)
    for name, info in tensors.items()
  }
  return Header(path=path, metadata=metadata, tensors=tensors)


def map_file(path: Path) -> mmap.mmap:
  """The file's bytes, read from disk when they are looked at."""
  try:
    with open(path, "rb") as file:
      return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  except OSError as error:
    raise UsageError(
      f"{path}: {error.strerror}; expected a GGUF file"
    ) from error
  except ValueError as error:
    raise UsageError(f"{path}: empty; expected a GGUF file") from error


class _Cursor:
  """Reads a mapped file from its beginning; running off the end is an error."""

  def __init__(self, path: Path, data: mmap.mmap):
    self.path = path
    self.position = 0
    self._data = data

  def take(self, num_bytes: int) -> bytes:
    end = self.position + num_bytes
    if end > len(self._data):
      raise UsageError(
        f"{self.path}: truncated: its header goes on after its"
        f" {len(self._data)} bytes"
      )
    taken = self._data[self.position : end]
    self.position = end
    return taken

  def scalar(self, form: str) -> Any:
    return struct.unpack(form, self.take(struct.calcsize(form)))[0]

  def string(self) -> str:
    raw = self.take(self.scalar("<Q"))
    try:
      return raw.decode()
    except UnicodeDecodeError as error:
      raise UsageError(f"{self.path}: {raw[:40]!r}: expected UTF-8") from error

  def value(self, key: str) -> Any:
    kind = self.scalar("<I")
    if kind == gguf.GGUFValueType.ARRAY:
      kind, length = self.scalar("<I"), self.scalar("<Q")
      if kind == gguf.GGUFValueType.STRING:
        return [self.string() for _ in range(length)]
      form = self._form(key, kind)
      raw = self.take(length * struct.calcsize(form))
      return np.frombuffer(raw, form).tolist()
    if kind == gguf.GGUFValueType.STRING:
      return self.string()
    return self.scalar(self._form(key, kind))

  def tensor_info(self, name: str) -> TensorInfo:
    num_dims = self.scalar("<I")
    dims = [self.scalar("<Q") for _ in range(num_dims)]
    kind, start = self.scalar("<I"), self.scalar("<Q")
    try:
      known = gguf.GGMLQuantizationType(kind)
    except ValueError as error:
      raise UsageError(
        f"{self.path}: tensor {name!r} has the unknown type {kind}"
      ) from error
    return TensorInfo(shape=tuple(dims[::-1]), kind=known, start=start)

  def _form(self, key: str, kind: int) -> str:
    form = _SCALARS.get(kind)  # type: ignore[call-overload]
    if form is None:
      raise UsageError(f"{self.path}: {key!r} has the unknown type {kind}")
    return form


def _align(position: int, alignment: Any, path: Path) -> int:
  """The first multiple of `alignment` from `position` on."""
  if type(alignment) is not int or alignment < 1:
    raise UsageError(
      f"{path}: general.alignment={alignment!r}: expected a positive integer"
    )
  return -(-position // alignment) * alignment
