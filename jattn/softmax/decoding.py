"""What the kernels for one query are given besides what all kernels are: which tiles of keys are live."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jattn.softmax.blockwise import schedule
from jattn.softmax.masks import DEAD
from jattn.softmax.problem import Problem, positions


def live_tiles(problem: Problem, block: int) -> jax.Array:
    """Which tiles of `block` keys some head sees, int32 `[B|1, tiles]`, for a problem of one query."""
    cut = dataclasses.replace(problem, block_sizes=(1, min(block, problem.sizes[2])))
    code, _ = schedule.tile_code(cut, True)
    return jnp.asarray((code != DEAD).any((1, 2)), jnp.int32)


def evaluated_mask(problem: Problem) -> Problem:
    """The problem of one query, a mask that holds arrays replaced by its values, which are no larger than a bias."""
    if not jax.tree.leaves(problem.mask):
        return problem
    assert problem.mask is not None
    i, j = positions(problem)
    b, h = jnp.arange(problem.sizes[0])[:, None, None, None], np.arange(problem.sizes[3])[None, :, None, None]
    seen = jnp.asarray(problem.mask(b, h, i[:, None, :, None], j[:, None, None, :]))
    return dataclasses.replace(problem, mask=None, mask_arrays=(*problem.mask_arrays, seen))
