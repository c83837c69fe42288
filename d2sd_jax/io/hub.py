"""Folders of the Hugging Face hub, where the network allows."""

import re
from pathlib import Path

from d2sd_jax.errors import UsageError

FILES = ["*.json", "*.jinja", "*.safetensors"]
_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(name: str) -> bool:
  """Whether a name reads `owner/model`; paths may, too."""
  return _ID.fullmatch(name) is not None


def fetch_folder(name: str, field: str) -> Path:
  """The folder of a hub's model, in the hub client's own cache.

  Only small files, templates and safetensors are fetched.

  Args:
    name: `owner/model`.
    field: what an error calls the value.

  Raises:
    UsageError: the hub cannot be reached, or has no such model.
  """
  try:
    import huggingface_hub

    found = huggingface_hub.snapshot_download(name, allow_patterns=FILES)
  except Exception as error:  # of many kinds: network, rights, names
    reason = " ".join(str(error).split())[:200]
    raise UsageError(
      f"{field}={name!r}: expected an existing path, or a hub id that can be"
      f" reached ({reason})"
    ) from error
  return Path(found)
