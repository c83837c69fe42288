"""What is asked and what became of it, on the host."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from d2sd_jax.decoding.placement import to_host
from d2sd_jax.decoding.state import DecodeState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """A prompt in ids, and its index in the input."""

  sequence_id: int
  tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
  """What became of a request.

  Attributes:
    request: the request.
    mode: how it was decoded.
    tokens: the new ids, a stop id included.
    origins: which pass proposed each of them (`d2sd_jax.tree`).
    accepted_per_cycle: tokens each cycle committed.
    num_verified: tree nodes that were verified, in all cycles.
    prefill_seconds: of the batch the request was in.
    decode_seconds: of the same batch, from its first token to its last.
    batch_rows: requests in that batch.
    implementation: of attention in verification; see `cascade_attention`.
  """

  request: Request
  mode: str
  tokens: list[int]
  origins: list[int]
  accepted_per_cycle: list[int]
  num_verified: int
  prefill_seconds: float
  decode_seconds: float
  batch_rows: int
  implementation: str

  @property
  def steps(self) -> list[slice]:
    """Where in `tokens` prefill's is, and then each cycle's."""
    return steps(self.accepted_per_cycle)

  @property
  def cycles(self) -> list[slice]:
    """Where each cycle's tokens are in `tokens`; prefill gave the first."""
    return self.steps[1:]


def steps(accepted: Sequence[int]) -> list[slice]:
  """Where prefill's new token is, and then each cycle's.

  Args:
    accepted: tokens each cycle committed.
  """
  ends = np.cumsum([0, 1, *accepted]).tolist()
  return [slice(a, b) for a, b in itertools.pairwise(ends)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """What a row of a state holds for its request so far, on the host."""

  tokens: list[int]
  origins: list[int]
  accepted: list[int]
  num_verified: int
  finished: bool


def read_rows(state: DecodeState, requests: Sequence[Request]) -> list[Row]:
  """What every request's row holds so far, on the host."""
  host = to_host(
    (
      *(state.tokens, state.origins, state.accepted),
      *(state.lengths, state.finished, state.num_cycles),
      state.num_verified,
    )
  )
  tokens, origins, accepted, lengths, finished, cycles, verified = host
  rows = []
  for i, request in enumerate(requests):
    new = slice(len(request.tokens), int(lengths[i]) + 1)
    counts = accepted[i, :cycles]
    rows.append(
      Row(
        tokens=tokens[i, new].tolist(),
        origins=origins[i, new].tolist(),
        accepted=counts[counts > 0].tolist(),
        num_verified=int(verified[i]),
        finished=bool(finished[i]),
      )
    )
  return rows
