"""What the kernels for one query are given besides what all kernels are: which tiles of keys are live."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jattn.softmax.blockwise import schedule
from jattn.softmax.masks import DEAD
from jattn.softmax.problem import Problem


def live_tiles(problem: Problem, block: int) -> jax.Array:
    """Which tiles of `block` keys some head sees, int32 `[B|1, tiles]`, for a problem of one query."""
    cut = dataclasses.replace(problem, block_sizes=(1, min(block, problem.sizes[2])))
    code, _ = schedule.tile_code(cut, True)
    return jnp.asarray((code != DEAD).any((1, 2)), jnp.int32)
