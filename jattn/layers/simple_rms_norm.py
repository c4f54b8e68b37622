"""A norm without parameters: every vector gets the length sqrt(M).

y = x / sqrt(mean(x^2) + eps)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from jattn.mechanisms.entry import Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import normal


def simple_rms_norm(x: ArrayLike, epsilon: float | int = 1e-6) -> jax.Array:
    """Divide vectors by their root mean square.

    y = x / sqrt(mean(x^2) + eps), over the last axis

    Args:
        x: `[..., M]`.
        epsilon: eps.

    Returns:
        `[..., M]` in the dtype of x, computed in float32 at least.

    Example:
        >>> [round(y, 4) for y in simple_rms_norm(jnp.array([3.0, 4.0])).tolist()]
        [0.8485, 1.1314]

    Source: Scaling TransNormer to 175 Billion Parameters (arXiv 2307.14995), published code for eps.
    """
    x = jnp.asarray(x)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)).astype(x.dtype)


class SimpleRMSNorm(nnx.Module):
    """`simple_rms_norm` as a layer; nothing is learned.

    y = x / sqrt(mean(x^2) + eps)

    Args:
        epsilon: eps.

    Example:
        >>> import jax.numpy as jnp
        >>> SimpleRMSNorm()(2 * jnp.ones((1, 2))).round(4).tolist()
        [[1.0, 1.0]]

    Source: Scaling TransNormer to 175 Billion Parameters (arXiv 2307.14995).
    """

    def __init__(self, *, epsilon: float | int = 1e-6):
        self.epsilon = epsilon

    def __call__(self, x: ArrayLike) -> jax.Array:
        """`[..., M]` -> `[..., M]`."""
        return simple_rms_norm(x, self.epsilon)


def _example(key, length):
    return LayerExample((), {}, (normal(key, 2, length, 8),), {})


ENTRY = Entry(
    name="SimpleRMSNorm",
    kind="layer",
    family="layers",
    layer=SimpleRMSNorm,
    papers=(Paper("Scaling TransNormer to 175 Billion Parameters", "2307.14995", 2023),),
    cost=Cost(flops="T", memory="T"),
    decode="a token at a time",
    example=_example,
    fidelity="official code",
)
