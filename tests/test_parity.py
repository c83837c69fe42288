"""Live comparisons with transformers and the reference drafter, in torch.

    pip install -e '.[parity,test]' && pytest -m parity

On models the recordings do not hold: other seeds, through the same checks.
"""

import sys

import goldens
import pytest

pytestmark = pytest.mark.parity
_SEEDS = (11, 12, 13)


@pytest.fixture(scope="module")
def recorders():
  """The recording scripts as modules; torch without gradients."""
  torch = pytest.importorskip("torch")
  torch.set_num_threads(1)  # Threads only get in the way of tiny models.
  sys.path.insert(0, str(goldens.DATA))
  try:
    import record_dflash
    import record_tiny

    with torch.no_grad():
      yield record_tiny, record_dflash
  finally:
    sys.path.remove(str(goldens.DATA))


@pytest.mark.parametrize("seed", _SEEDS)
@pytest.mark.parametrize(
  "name", ["tiny_qwen3", "tiny_llama", "tiny_llama3", "tiny_gpt_oss"]
)
def test_targets(recorders, name, seed):
  recorder, _ = recorders
  golden = recorder.record(recorder.MODELS[name][1], seed)
  logits, features = goldens.check_target(golden)
  tree = goldens.check_tree(golden)
  print(f"{name} seed {seed}: {logits:.1e}, {features:.1e}, {tree:.1e}")
  goldens.check_greedy(golden)


@pytest.mark.parametrize("seed", _SEEDS)
def test_drafter(recorders, seed, tmp_path):
  _, recorder = recorders
  error = goldens.check_drafter(recorder.record(seed), tmp_path)
  print(f"drafter seed {seed}: {error:.1e}")
