"""Array aliases.

Shapes in signatures use the project's dimension letters: B batch, S cache
slots, R tree nodes, G groups of nodes, K branches, L layers, N query heads,
J key/value heads, H head size, D width, F target features (taps * D),
V vocabulary, A anchors, T tokens, E experts, M inner width.
"""

from typing import TypeAlias

import jax
from jaxtyping import Bool, Float, Int, UInt8

Array: TypeAlias = jax.Array

__all__ = ["Array", "Bool", "Float", "Int", "UInt8"]
