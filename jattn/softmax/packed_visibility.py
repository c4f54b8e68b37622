"""Which pairs are visible, one bit a pair: for kernels that cannot read the arrays of masks themselves."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.softmax.kernel_arguments import make_inputs, make_pipeline
from jattn.softmax.masks import PARTIAL
from jattn.softmax.problem import Problem
from pallas_kernels.flash_attention.pipeline import Pipeline, Place, TileInput

NAME = "visible"


def is_needed_for(name: str) -> bool:
    """Whether an input of tiles only serves to tell what is visible."""
    return name == "layout full" or name.startswith(("held ", "mask ")) or name.endswith("_segments")


def packed_visibility(problem: Problem, code: Any, block_q: int, block_k: int) -> tuple[TileInput, Any]:
    """What `Pipeline.visible` says in every partial tile, 32 rows a word; and the function that reads it in the kernel.

    Args:
        problem: a problem whose masks, or the predicate of whose layout, hold arrays.
        code: class of every tile, `[B|1, N|1, nQ, nK]`; only tiles that are partial somewhere are looked at.
        block_q: rows of a tile.
        block_k: columns of a tile.

    Returns:
        An input `[B|1, N|1, nQ * nK, ceil(block_q / 32), block_k]` of int32, T x S / 8 bytes for each batch row and
        head on which visibility depends; and what stands for `Pipeline.visible`.
    """
    batch, num_heads = problem.sizes[0], problem.sizes[3]
    inputs, pipeline = make_inputs(problem, {}), make_pipeline(problem, False)
    rows, columns = code.shape[2:]

    def visible(i, j):
        row, column = i * block_q + jnp.arange(block_q), j * block_k + jnp.arange(block_k)
        place = Place(
            jnp.arange(batch)[:, None, None, None],
            jnp.arange(num_heads)[None, :, None, None],
            row[:, None],
            column[None, :],
        )
        tiles = {name: _tile(given, i, j, row, column) for name, given in inputs.items()}
        tiles = {n: x.reshape(()) if n.startswith("held ") and not callable(x) else x for n, x in tiles.items()}
        seen = pipeline.visible(place, tiles)
        return jnp.broadcast_to(seen, (*(1,) * (4 - seen.ndim), *seen.shape)[:2] + (block_q, block_k))

    like = jax.eval_shape(visible, jnp.int32(0), jnp.int32(0))
    looked_at = (jnp.asarray(code) == PARTIAL).any((0, 1)).reshape(-1)

    def words(n):
        tile = jax.lax.cond(
            looked_at[n], lambda: visible(n // columns, n % columns), lambda: jnp.zeros(like.shape, like.dtype)
        )
        return _packed(tile)

    found = jnp.moveaxis(jax.lax.map(words, jnp.arange(rows * columns)), 0, 2)
    return TileInput(found, packed=True), lambda place, tiles: tiles[NAME] != 0


def _tile(given: TileInput, i, j, row, column) -> Any:
    """What a tile reads of an input, `[B|1, N|1, Bq|1, Bk|1]`; a function if it is gathered."""
    if given.gathered:
        return lambda *index: given.array[index]
    if given.by_tile:
        row, column = i[None], j[None]
    array = given.array
    for axis, numbers in ((2, row), (3, column)):
        # Rows and columns beyond the ends read the last ones; the kernel hides them.
        array = array if array.shape[axis] == 1 else jnp.take(array, numbers, axis, mode="clip")
    return array


def _packed(bits: Any) -> jax.Array:
    """Booleans `[..., rows, columns]` as int32 `[..., ceil(rows / 32), columns]`, the first row in the lowest bit."""
    rows, columns = bits.shape[-2:]
    bits = jnp.pad(bits, [(0, 0)] * (bits.ndim - 2) + [(0, -rows % 32), (0, 0)])
    bits = bits.reshape(*bits.shape[:-2], -1, 32, columns).astype(jnp.uint32)
    words = (bits << np.arange(32, dtype=np.uint32)[:, None]).sum(-2, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def with_packed_visibility(
    problem: Problem, inputs: dict[str, TileInput], pipeline: Pipeline, code: Any, block_q: int, block_k: int
) -> tuple[dict[str, TileInput], Pipeline]:
    """The inputs and the pipeline of a kernel with visibility read from bits."""
    bits, visible = packed_visibility(problem, code, block_q, block_k)
    kept = {name: given for name, given in inputs.items() if not is_needed_for(name)}
    return {**kept, NAME: bits}, dataclasses.replace(pipeline, visible=visible)
