"""Linearized relative positions with learned frequencies: channels are doubled, so that products see the distance.

    x_t -> concat[x_t cos(theta_n t), x_t sin(theta_n t)],   theta_n,d = 10000^(-2 (n D + d) / (N D)) at the start
    q_t . k_s  becomes  sum_d q_td k_sd cos(theta_nd (t - s))

Channels are counted through all heads, so that each head owns a band of frequencies. A function of single tokens, it
suits linear attention, whose state no bias could reach.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from jattn.layers.sharding import axes
from jattn.mechanisms.entry import PATTERNS, Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import normal


class Lrpe(nnx.Module):
    """LRPE-d: every channel turns at a learned frequency, its cosine and its sine stand side by side.

    x_t -> concat[x_t cos(theta t), x_t sin(theta t)]

    Args:
        num_heads: N.
        head_dim: D.
        base: of the first frequencies, base^(-2 i / (N D)), i = 0 .. N D - 1 over heads and channels.
        dtype: of the result; that of the features if not given.
        param_dtype: of the frequencies.

    Example:
        >>> import jax.numpy as jnp
        >>> Lrpe(2, 4)(jnp.ones((1, 3, 2, 4)), jnp.arange(3)).shape
        (1, 3, 2, 8)

    Source: Scaling TransNormer to 175 Billion Parameters (arXiv 2307.14995), published code.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        base: float | int = 10000.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        self.num_heads, self.head_dim, self.dtype = num_heads, head_dim, dtype
        count = num_heads * head_dim
        frequencies = float(base) ** (-2 * np.arange(count) / count)
        self.theta = nnx.Param(
            jnp.asarray(frequencies.reshape(num_heads, head_dim), param_dtype), **axes("heads", "head_dim")
        )

    def __call__(self, x: ArrayLike, positions: ArrayLike) -> jax.Array:
        """Double the channels.

        Args:
            x: `[B, T, N, D]`.
            positions: `[T]` or `[B|1, T]`; a token that is decoded has as its position the number of tokens before it.

        Returns:
            `[B, T, N, 2 D]`, cosines first.

        Raises:
            ValueError: other heads or channels, positions that do not fit.
        """
        x, positions = jnp.asarray(x), jnp.atleast_2d(jnp.asarray(positions))
        if x.ndim != 4 or x.shape[2:] != (self.num_heads, self.head_dim):
            raise ValueError(
                f"features must be [B, T, {self.num_heads}, {self.head_dim}], for keys as for queries (frequencies "
                f"belong to heads, which therefore cannot share keys); got {list(x.shape)}"
            )
        if positions.shape not in ((1, x.shape[1]), x.shape[:2]):
            raise ValueError(f"positions must be [T] or [B, T] = {list(x.shape[:2])}, got {list(positions.shape)}")
        wide = jnp.promote_types(x.dtype, jnp.float32)
        angles = positions[..., None, None].astype(wide) * self.theta.get_value().astype(wide)
        both = jnp.concatenate([x.astype(wide) * jnp.cos(angles), x.astype(wide) * jnp.sin(angles)], -1)
        return both.astype(self.dtype or x.dtype)

    def rotate(
        self, query: ArrayLike, key: ArrayLike, query_positions: ArrayLike, key_positions: ArrayLike
    ) -> tuple[jax.Array, jax.Array]:
        """Queries and keys at their positions, as layers ask a position for them.

        Args:
            query: `[B, T, N, D]`.
            key: `[B, S, N, D]`.
            query_positions: `[T]` or `[B|1, T]`.
            key_positions: `[S]` or `[B|1, S]`.

        Returns:
            `[B, T, N, 2 D]` and `[B, S, N, 2 D]`.
        """
        return self(query, query_positions), self(key, key_positions)


def _example(key, length):
    return LayerExample((2, 4), {}, (normal(key, 2, length, 2, 4), np.arange(length)), {})


ENTRY = Entry(
    name="Lrpe",
    kind="position",
    family="layers",
    layer=Lrpe,
    papers=(Paper("Scaling TransNormer to 175 Billion Parameters", "2307.14995", 2023),),
    patterns=PATTERNS[:2],
    cost=Cost(flops="T", memory="T"),
    decode="by position, the number of tokens decoded",
    example=_example,
    fidelity="official code",
)
