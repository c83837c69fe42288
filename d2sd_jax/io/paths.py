"""Where files are: cache, shipped configs and drafters; safe writing."""

import contextlib
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import platformdirs

from d2sd_jax.errors import UsageError

_PACKAGE = Path(__file__).resolve().parents[1]


def cache_dir() -> Path:
  """The folder for downloads: `$D2SD_CACHE`, else the user's cache folder.

  The folder need not exist yet.
  """
  override = os.environ.get("D2SD_CACHE")
  if override:
    return Path(override).expanduser()
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
  return _look_up("config", path, path.name.removesuffix(".py"), shipped)


def find_checkpoint(
  name: str | os.PathLike[str], field: str = "drafter"
) -> Path:
  """The folder of a drafter, given by path or by a shipped name.

  Args:
    name: a folder, or the name of a drafter in `checkpoints/`.
    field: what an error calls the value, e.g. the flag it came from.

  Raises:
    UsageError: there is neither such a folder nor a shipped drafter.
  """
  path = user_path(name)
  if path.is_dir():
    return path
  folder = _shipped_folder("checkpoints")
  visible = (p for p in folder.glob("[!._]*") if p.is_dir())
  return _look_up(field, path, path.name, {p.name: p for p in visible})


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
  """Yields a temporary path that becomes the file `path` on success.

  A reader of `path` sees the old file or the whole new one. Whatever ends
  the block early, Ctrl-C included, leaves the old one and no temporary file.
  Missing parent folders are made.
  """
  final = Path(path)
  final.parent.mkdir(parents=True, exist_ok=True)
  temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.part")
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
  field: str, path: Path, key: str, shipped: Mapping[str, Path]
) -> Path:
  """The shipped entry `key`, if `path` is a bare name or `folder/name`."""
  folders = {".", *(p.parent.name for p in shipped.values())}
  if key in shipped and str(path.parent) in folders:
    return shipped[key]
  names = ", ".join(sorted(shipped)) or "none here"
  raise UsageError(
    f"{field}={str(path)!r}: no such path; expected an existing one or a"
    f" shipped name ({names})"
  )
