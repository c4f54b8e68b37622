"""Which tiles are visited, one after the other: for kernels whose grid is a single walk over the live tiles."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

FIRST, LAST, PARTIAL, FULL = 1, 2, 4, 8
"""Flags of a step: the first or last one of a result, and whether its tile is visible in part or in whole."""
BITS = 4
"""Of a step that hold flags; the others hold the position of the tile."""


def make_steps(code: Any) -> Any:
    """The live tiles of every result in order, `position << BITS | flags`, int32.

    Args:
        code: class of every tile, `[..., results, tiles]`: 0 nothing is visible, 1 something is, 2 everything is. numpy
            where it is known; then there are as many steps as the longest walk needs.

    Returns:
        `[..., steps]`; a position counts results first, tiles within them last. A result without a live tile has one
        step, whose flags name no kind of tile; steps beyond the end of a walk repeat its last position without flags.

    Example:
        >>> steps = make_steps(np.array([[1, 0], [2, 1]]))
        >>> [(int(step) >> BITS, int(step) & 15) for step in steps]
        [(0, 7), (2, 9), (3, 6)]
    """
    xp: Any = np if isinstance(code, np.ndarray) else jnp
    results, tiles = code.shape[-2:]
    live = code != 0
    alone = ~live.any(-1, keepdims=True) & (np.arange(tiles) == 0)
    kept = live | alone
    rank = xp.cumsum(kept, -1)
    flags = (kept & (rank == 1)) * FIRST + (kept & (rank == rank[..., -1:])) * LAST
    flags = flags + (code == 1) * PARTIAL + (code == 2) * FULL
    numbers = (np.arange(results * tiles).reshape(results, tiles) << BITS) + flags
    flat = (*code.shape[:-2], results * tiles)
    numbers, kept = xp.broadcast_to(numbers, code.shape).reshape(flat), kept.reshape(flat)
    total = kept.sum(-1, keepdims=True)
    longest = int(total.max()) if xp is np else results * tiles
    order = xp.argsort(~kept, axis=-1, stable=True)[..., :longest]
    steps = xp.take_along_axis(numbers, order, -1)
    ends = xp.take_along_axis(steps, total - 1, -1) >> BITS << BITS
    return xp.where(np.arange(longest) < total, steps, ends).astype(np.int32)
