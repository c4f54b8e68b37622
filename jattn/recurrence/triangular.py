"""The inverse of I - L for a strictly lower triangular L, by forward substitution in blocks.

Blocks of 16 x 16 are inverted row by row, T_i = e_i + sum_{j < i} L_ij T_j, then merged two by two:

    [I - A    0  ]^-1   [      T_A         0  ]
    [ -B    I - D]    = [T_D B T_A        T_D ]

Products of powers of L would need fewer steps, but they grow and cancel where keys resemble each other.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jattn.recurrence.decay import HIGHEST, lower_blocks

BLOCK = 16


@jax.custom_jvp
def unit_lower_inverse(lower: jax.Array) -> jax.Array:
    """(I - L)^-1.

    Args:
        lower: L `[..., C, C]`, strictly lower triangular.

    Returns:
        `[..., C, C]`, unit lower triangular.

    Example:
        >>> unit_lower_inverse(jnp.array([[0.0, 0.0], [2.0, 0.0]])).tolist()
        [[1.0, 0.0], [2.0, 1.0]]
    """
    size = lower.shape[-1]
    width = min(BLOCK, size)
    padded = width
    while padded < size:
        padded *= 2
    if padded > size:
        lower = jnp.pad(lower, [(0, 0)] * (lower.ndim - 2) + [(0, padded - size)] * 2)
    inverse = _inverted_rows(_diagonal_blocks(lower, width, 0))
    while width < padded:
        inverse = _merged(inverse, _diagonal_blocks(lower, width, 1))
        width *= 2
    return inverse[..., 0, :size, :size]


@unit_lower_inverse.defjvp
def _derivative(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    inverse = unit_lower_inverse(*primals)
    return inverse, _dot(_dot(inverse, tangents[0]), inverse)


def _diagonal_blocks(x: jax.Array, width: int, below: int) -> jax.Array:
    """The blocks on the diagonal, or for `below` = 1 every other one under it: `[..., count, width, width]`."""
    count = x.shape[-1] // width
    blocks = x.reshape(*x.shape[:-2], count, width, count, width)
    rows = np.arange(below, count, 1 + below)
    return jnp.stack([blocks[..., row, :, row - below, :] for row in rows], -3)


def _inverted_rows(blocks: jax.Array) -> jax.Array:
    size = blocks.shape[-1]
    start = jnp.broadcast_to(jnp.eye(size, dtype=blocks.dtype), blocks.shape) + 0 * blocks

    def row(i: jax.Array, inverse: jax.Array) -> jax.Array:
        taken = jax.lax.dynamic_index_in_dim(blocks, i, axis=blocks.ndim - 2, keepdims=True)
        added = jnp.sum(jnp.swapaxes(taken, -1, -2) * inverse, -2, keepdims=True)
        return inverse + jnp.where((jnp.arange(size) == i)[:, None], added, 0)

    return jax.lax.fori_loop(1, size, row, start)


def _merged(inverse: jax.Array, below: jax.Array) -> jax.Array:
    """Inverses `[..., 2 m, w, w]` and the blocks under the first of each pair `[..., m, w, w]`: `[..., m, 2w, 2w]`."""
    first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
    corner = _dot(_dot(second, below), first)
    return lower_blocks(first, corner, second)


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=HIGHEST)
