"""Rotary position embedding, and the ways to stretch it over longer texts.

A scaling changes the frequencies of the rotation, once; `None` is none.
"""

import dataclasses
import math

import jax.numpy as jnp

from d2sd_jax.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
  """Position interpolation: every frequency divided by `factor`."""

  factor: float
  attention_factor: float = 1.0

  def scale(
    self, frequencies: Float[Array, " half"], theta: float
  ) -> Float[Array, " half"]:
    """Stretches the frequencies theta^(-i/half), in radians per position."""
    return frequencies / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
  """Llama 3.1's: long waves are stretched, short ones are not.

  Waves longer than `original_length / low_freq_factor` positions are divided
  by `factor`, those shorter than `original_length / high_freq_factor` kept;
  in between the two are mixed linearly in the frequency.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_length: int
  attention_factor: float = 1.0

  def scale(
    self, frequencies: Float[Array, " half"], theta: float
  ) -> Float[Array, " half"]:
    """Stretches the frequencies theta^(-i/half), in radians per position."""
    turns = self.original_length * frequencies / (2 * math.pi)
    span = self.high_freq_factor - self.low_freq_factor
    kept = jnp.clip((turns - self.low_freq_factor) / span, 0, 1)
    return frequencies * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
  """YaRN (Peng et al. 2023, Sec. 3.2-3.4): interpolation by wavelength.

  A pair of dimensions that turns `beta_fast` times or more within
  `original_length` positions keeps its frequency, one that turns at most
  `beta_slow` times is divided by `factor`, with a ramp over the dimensions
  between. Rotated queries and keys are both multiplied by `attention_factor`.

  Attributes:
    truncate: the ramp's ends are rounded outwards to whole dimensions.
  """

  factor: float
  original_length: int
  attention_factor: float
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True

  def scale(
    self, frequencies: Float[Array, " half"], theta: float
  ) -> Float[Array, " half"]:
    """Stretches the frequencies theta^(-i/half), in radians per position."""
    half = frequencies.shape[0]
    low, high = self._ramp(half, theta)
    ramp = jnp.clip((jnp.arange(half) - low) / (high - low), 0, 1)
    return frequencies * (1 - ramp + ramp / self.factor)

  def _ramp(self, half: int, theta: float) -> tuple[float, float]:
    """Where the ramp begins and ends, counted in pairs of dimensions."""

    def pair_of(turns: float) -> float:
      wave = self.original_length / (turns * 2 * math.pi)
      return half * math.log(wave) / math.log(theta)

    low, high = pair_of(self.beta_fast), pair_of(self.beta_slow)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    return low, high if high != low else high + 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrequencyFactors:
  """A divisor for each frequency, as GGUF files of Llama 3 hold them."""

  divisors: tuple[float, ...]
  attention_factor: float = 1.0

  def scale(
    self, frequencies: Float[Array, " half"], theta: float
  ) -> Float[Array, " half"]:
    """Stretches the frequencies theta^(-i/half), in radians per position."""
    return frequencies / jnp.asarray(self.divisors, frequencies.dtype)


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | FrequencyFactors


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
  """0.1 m ln(factor) + 1, YaRN's temperature for that much stretching."""
  return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def cos_sin(
  positions: Int[Array, "*positions"],
  head_dim: int,
  theta: float,
  scaling: RopeScaling | None = None,
) -> tuple[Float[Array, "*positions half"], Float[Array, "*positions half"]]:
  """Cosines and sines of each position's angles, in float32."""
  half = head_dim // 2
  frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  if scaling is not None:
    frequencies = scaling.scale(frequencies, theta)
  angles = positions[..., None].astype(jnp.float32) * frequencies
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  if scaling is not None and scaling.attention_factor != 1:
    cos, sin = (scaling.attention_factor * x for x in (cos, sin))
  return cos, sin


def rotate(
  x: Float[Array, "*positions heads H"],
  positions: Int[Array, "*positions"],
  theta: float,
  scaling: RopeScaling | None = None,
) -> Float[Array, "*positions heads H"]:
  """Rotary embedding in its rotate-half form, angles in float32."""
  half = x.shape[-1] // 2
  cos, sin = cos_sin(positions[..., None], x.shape[-1], theta, scaling)
  a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
  return rotated.astype(x.dtype)
