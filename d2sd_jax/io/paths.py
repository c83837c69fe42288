"""Where files are: cache, shipped configs and drafters; safe writing."""

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import platformdirs

from d2sd_jax.errors import UsageError, require
from d2sd_jax.io.hub import fetch_folder, is_hub_id

_PACKAGE = Path(__file__).resolve().parents[1]


def cache_dir() -> Path:
  """The folder for downloads: `$D2SD_CACHE`, else the user's cache folder.

  The folder need not exist yet.

  Raises:
    UsageError: `$D2SD_CACHE` is no usable path.
  """
  override = os.environ.get("D2SD_CACHE")
  if override:
    return user_path(override)
  return Path(platformdirs.user_cache_dir("d2sd_jax"))


def user_path(name: str | os.PathLike[str]) -> Path:
  """A path as a user writes it, `~` for home.

  Raises:
    UsageError: there is no such home, or the name is too long.
  """
  try:
    path = Path(name).expanduser()
    path.exists()
  except (RuntimeError, OSError, ValueError) as error:
    shown = str(name)[:80]
    raise UsageError(
      f"path={shown!r}: expected a usable path ({error})"[:300]
    ) from error
  return path


def find_config(name: str | os.PathLike[str]) -> Path:
  """The Python file of a config, given by path or by a shipped name.

  `smollm2_vp`, `smollm2_vp.py` and `configs/smollm2_vp.py` all name the
  shipped file, unless the last two exist where the user stands.

  Raises:
    UsageError: there is neither such a file nor a shipped config.
  """
  path = user_path(name)
  if path.is_file():
    return path
  folder = _shipped_folder("configs")
  shipped = {p.stem: p for p in folder.glob("*.py") if p.stem[0] != "_"}
  stem = path.name.removesuffix(".py")
  return _look_up("config", "file", path, stem, shipped)


def find_checkpoint(
  name: str | os.PathLike[str], field: str = "drafter"
) -> Path:
  """The folder of a drafter, given by path, shipped name or hub id.

  Args:
    name: a folder, the name of a drafter in `checkpoints/`, or `owner/model`.
    field: what an error calls the value, e.g. the flag it came from.

  Raises:
    UsageError: there is no such folder nor shipped drafter, nor can the hub
      give it.
  """
  path = user_path(name)
  if path.is_dir():
    return path
  folder = _shipped_folder("checkpoints")
  visible = (p for p in folder.glob("[!._]*") if p.is_dir())
  shipped = {p.name: p for p in visible}
  if is_hub_id(str(name)) and path.name not in shipped:
    return fetch_folder(str(name), field)
  return _look_up(field, "folder", path, path.name, shipped)


def check_writable(field: str, name: str | os.PathLike[str], folder: Path):
  """Raises `UsageError` unless files can be put into `folder`.

  A file without a name is made for a moment to find out: permissions alone do
  not tell. A folder that does not exist yet must be possible to make.

  Args:
    field: what an error calls the value.
    name: the value as the user wrote it.
    folder: where files are to be written later.
  """
  folder = folder.absolute()
  there = next(p for p in (folder, *folder.parents) if p.exists())
  try:
    with tempfile.TemporaryFile(dir=there):
      pass
  except OSError as error:
    raise UsageError(
      f"{field}={str(name)!r}: expected a place open to writing"
      f" ({there}: {error.strerror})"
    ) from error


def check_output(name: str, field: str = "json") -> Path:
  """Path of a file to be written later, if that can work.

  Args:
    name: the path as the user wrote it.
    field: what an error calls it.

  Raises:
    UsageError: it is there and no plain file, may not be written to, or lies
      where nothing can be written.
  """
  path = user_path(name)
  # Not a device either: the new file will take the place of the old one.
  fits = not path.exists() or (path.is_file() and os.access(path, os.W_OK))
  require(bool(name) and fits, field, name, "a file to write")
  path = Path(os.path.realpath(path))
  check_writable(field, name, path.parent)
  return path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
  """Yields a temporary path that becomes the file `path` on success.

  A reader of `path` sees the old file or the whole new one. Whatever ends
  the block early, Ctrl-C included, leaves the old one and no temporary file.
  Missing parent folders are made.
  """
  final = Path(path)
  final.parent.mkdir(parents=True, exist_ok=True)
  temporary = final.with_name(f".{uuid.uuid4().hex}.part")
  try:
    yield temporary
    os.replace(temporary, final)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def _shipped_folder(kind: str) -> Path:
  """`configs` or `checkpoints`: in the installed package, else the checkout.

  The package goes first: the folder above an installed package belongs to
  everybody, and another project's `configs` may lie there.
  """
  installed = _PACKAGE / kind
  return installed if installed.is_dir() else _PACKAGE.parent / kind


def _look_up(
  field: str, kind: str, path: Path, key: str, shipped: Mapping[str, Path]
) -> Path:
  """The shipped entry `key`, if `path` is a bare name or `folder/name`."""
  folders = {".", *(p.parent.name for p in shipped.values())}
  if key in shipped and str(path.parent) in folders:
    return shipped[key]
  names = ", ".join(sorted(shipped)) or "none here"
  raise UsageError(
    f"{field}={str(path)!r}: no such {kind}; expected an existing one or a"
    f" shipped name ({names})"
  )
