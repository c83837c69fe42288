"""A target's Hugging Face folder: its small files, its tensors on demand.

Weights come from safetensors alone: no pickle is ever opened.
"""

import concurrent.futures
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from d2sd_jax.errors import UsageError, require

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
DTYPES: Mapping[str, Any] = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "U8": np.uint8,
}
# One thread's copy out of the page cache is slower than a device's link.
_CHUNK, _THREADS = 16 * 2**20, 8


def read_json(path: Path) -> dict[str, Any]:
  """The object in a small JSON file.

  Raises:
    UsageError: there is no such file, or it holds no JSON object.
  """
  expected = "expected a file that holds a JSON object"
  try:
    value = json.loads(path.read_bytes())
  except OSError as error:
    raise UsageError(f"{path}: {expected} ({error.strerror})") from error
  except (ValueError, RecursionError) as error:
    raise UsageError(f"{path}: {expected} ({error})") from error
  if not isinstance(value, dict):
    raise UsageError(f"{path}: {expected}")
  return value


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor lies: `num_bytes` from byte `start` of a file."""

  path: Path
  dtype: str
  shape: tuple[int, ...]
  start: int
  num_bytes: int


class TensorFolder(Mapping[str, np.ndarray]):
  """Tensors of a folder by name, each read from its shard when asked for.

  One array is in host memory at a time: the one that was read last, for as
  long as the caller keeps it.
  """

  def __init__(self, folder: Path):
    """Reads and checks the shards' headers; no tensor yet.

    Args:
      folder: holds `model.safetensors`, or shards and their index.

    Raises:
      UsageError: a file is missing, damaged, or outside the folder; the index
        does not fit the shards; or a tensor has an unknown dtype.
    """
    self.tensors = _find_tensors(folder)

  def __getitem__(self, name: str) -> np.ndarray:
    return self.part(name, ())

  def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """A box of a tensor; of the first axis only what is in it is read.

    Args:
      name: of the tensor.
      index: slices of the leading axes, of step 1.
    """
    tensor = self.tensors[name]
    if index:
      start, stop, _ = index[0].indices(tensor.shape[0])
      tensor = _rows(tensor, start, max(stop - start, 0))
    whole = _read(tensor).view(DTYPES[tensor.dtype]).reshape(tensor.shape)
    return whole[:, *index[1:]] if index else whole

  def __iter__(self) -> Iterator[str]:
    return iter(self.tensors)

  def __len__(self) -> int:
    return len(self.tensors)


def _find_tensors(folder: Path) -> dict[str, Tensor]:
  """Every tensor of the folder, by name."""
  if not (folder / INDEX_FILE).is_file():
    path = folder / WEIGHTS_FILE
    expected = f"a folder with {WEIGHTS_FILE}, or with shards and {INDEX_FILE}"
    require(path.is_file(), "target", str(folder), expected)
    return read_header(path)
  listed = _read_index(folder / INDEX_FILE)
  tensors: dict[str, Tensor] = {}
  for shard in sorted(set(listed.values())):
    header = read_header(folder / shard)
    wanted = {name for name, where in listed.items() if where == shard}
    for name in sorted(header.keys() ^ wanted):
      problem = "not in it" if name in wanted else "not listed for it"
      raise UsageError(
        f"{folder / INDEX_FILE}: tensor {name} of {shard}: {problem}"
      )
    tensors |= header
  return tensors


def _read_index(path: Path) -> dict[str, str]:
  """Shard of each tensor; shards are files beside the index."""
  listed = read_json(path).get("weight_map")
  if not isinstance(listed, dict) or not listed:
    raise UsageError(f"{path}: weight_map: expected names and their shards")
  for name, shard in listed.items():
    plain = isinstance(shard, str) and Path(shard).name == shard
    if not plain or not shard.endswith(".safetensors"):
      raise UsageError(
        f"{path}: tensor {name}: shard {shard!r}: expected the name of a"
        " safetensors file in the folder"
      )
    if not (path.parent / shard).is_file():
      raise UsageError(
        f"{path}: tensor {name}: shard {shard!r}: expected a file in the folder"
      )
  return listed


def read_header(path: Path) -> dict[str, Tensor]:
  """Tensors of one safetensors file, without reading any of them.

  Args:
    path: the file.

  Raises:
    UsageError: it is no safetensors file, was cut off, or holds a dtype that
      is not read.
  """
  try:
    # The library checks that offsets fit each other, shapes and the file.
    with safe_open(path, framework="numpy"), path.open("rb") as file:
      size = int.from_bytes(file.read(8), "little")
      header = json.loads(file.read(size))
  except (OSError, SafetensorError, ValueError) as error:
    raise UsageError(
      f"{path}: expected a whole safetensors file ({error})"
    ) from error
  header.pop("__metadata__", None)
  tensors = {}
  for name, entry in header.items():
    first, last = entry["data_offsets"]
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if dtype not in DTYPES:
      raise UsageError(
        f"{path}: tensor {name}: dtype {dtype}, expected one of"
        f" {', '.join(DTYPES)}"
      )
    if math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize != last - first:
      raise UsageError(f"{path}: tensor {name}: expected bytes for {shape}")
    tensors[name] = Tensor(path, dtype, shape, 8 + size + first, last - first)
  return tensors


def _rows(tensor: Tensor, start: int, count: int) -> Tensor:
  """Where rows `[start, start + count)` of a tensor lie."""
  row = tensor.num_bytes // max(tensor.shape[0], 1)
  return dataclasses.replace(
    tensor,
    shape=(count, *tensor.shape[1:]),
    start=tensor.start + start * row,
    num_bytes=count * row,
  )


def _read(tensor: Tensor) -> np.ndarray:
  """The tensor's bytes, read by several threads."""
  buffer = np.empty(tensor.num_bytes, np.uint8)
  view = memoryview(buffer.data)

  def fill(offset: int) -> None:
    last = min(offset + _CHUNK, tensor.num_bytes)
    while offset < last:
      place = tensor.start + offset
      count = os.preadv(file.fileno(), [view[offset:last]], place)
      if not count:
        raise UsageError(f"{tensor.path}: the file became shorter")
      offset += count

  with (
    tensor.path.open("rb", buffering=0) as file,
    concurrent.futures.ThreadPoolExecutor(_THREADS) as pool,
  ):
    list(pool.map(fill, range(0, tensor.num_bytes, _CHUNK)))
  return buffer
