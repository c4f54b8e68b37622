"""The forward attention kernel for TPUs.

The grid is one walk over the live tiles of every head: no step is spent on dead ones, and what the next step reads is
fetched while the present one computes. Online softmax in float32; output and log-sum-exp are all that is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention.pipeline import LOG2_E, Pipeline, TileInput
from pallas_kernels.flash_attention.tpu_sizes import TpuTiles
from pallas_kernels.flash_attention.tpu_tiles import (
    Static,
    Walk,
    array_specs,
    call_kernel,
    dot,
    input_array,
    is_first,
    is_last,
    load_tiles,
    make_place,
    make_static,
    make_walk,
    on_tiles,
    program_ids,
    seen_keys,
    specs_of,
    split,
    visible_pairs,
)


def row_walk(static: Static, code) -> Walk:
    """Tile of queries by tile of queries, of every batch row and query head."""
    columns = static.tiles[1]
    return make_walk(
        code, (static.shape[0], static.shape[3]), 1, lambda b, h, position, _: (b, h, *split(position, columns))
    )


def _forward_kernel(static: Static, walk: Walk, steps_ref, *refs):
    query_ref, key_ref, value_ref, *input_refs, out_ref, lse_ref, maximum_ref, total_ref, weighted_ref = refs
    ids = program_ids()
    step, (b, h, i, j) = walk.step(ids, steps_ref), walk.place(ids, steps_ref)
    softmax = static.pipeline.phi is None

    @pl.when(is_first(step, 0))
    def _():
        maximum_ref[...] = jnp.full(maximum_ref.shape, -jnp.inf if softmax else 0.0, static.dtype)
        total_ref[...] = jnp.zeros(total_ref.shape, static.dtype)
        weighted_ref[...] = jnp.zeros(weighted_ref.shape, static.dtype)

    def tile(partial):
        place = make_place(static, b, h, i, j)
        tiles = load_tiles(static, input_refs, place, i, j, partial)
        visible = visible_pairs(static, place, tiles) if partial else None
        (value,) = seen_keys(static, visible, value_ref[...])
        products = dot(static, query_ref[...], key_ref[...], (1, 1))
        if not softmax:
            weights, raw = static.pipeline.weights(products * static.scale, visible, place, tiles, None)
            total_ref[...] += raw.sum(1, keepdims=True)
            weighted_ref[...] += dot(static, weights.astype(value.dtype), value, (1, 0))
            return
        logits, factor = static.pipeline.exponents(products, static.scale, visible, place, tiles)
        old = maximum_ref[...]
        new = jnp.maximum(old, logits.max(1, keepdims=True) * factor)
        shift = jnp.where(new == -jnp.inf, 0.0, new)
        raw, decay = jnp.exp2(logits * factor - shift), jnp.exp2(old - shift)
        weights = raw if static.pipeline.drop is None else static.pipeline.drop(raw, place, tiles)
        maximum_ref[...] = new
        total_ref[...] = total_ref[...] * decay + raw.sum(1, keepdims=True)
        weighted_ref[...] = weighted_ref[...] * decay + dot(static, weights.astype(value.dtype), value, (1, 0))

    on_tiles(static, step, tile)

    @pl.when(is_last(step, 0, 1))
    def _():
        total, weighted = total_ref[...], weighted_ref[...]
        if softmax:
            alive = total != 0.0
            safe = jnp.where(alive, total, 1.0)
            total = jnp.where(alive, maximum_ref[...] / LOG2_E + jnp.log(safe), -jnp.inf)
            weighted = weighted / safe
        out_ref[...] = weighted.astype(out_ref.dtype)
        lse_ref[...] = total.T


def forward(
    query,
    key,
    value,
    code,
    inputs: Mapping[str, TileInput],
    pipeline: Pipeline,
    sizes: TpuTiles,
    *,
    scale: float,
    precision: Any = None,
    out_dtype: Any = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention, and the log-sum-exp of its rows (pointwise: the unscaled sums, and the sums of unnormalized weights).

    Args:
        query: `[B, T, N, D]`.
        key: `[B, S, K, D]`; K divides N.
        value: `[B, S, K, Dv]`.
        code: class of every tile, `[B|1, N|1, nQ, nK]`: 0 nothing visible, 1 something, 2 everything; a tile that
            reaches beyond an end is 1. numpy where it is known while tracing.
        inputs: what tiles read besides, by name; `query_positions` and `key_positions` replace row and column numbers.
        pipeline: what happens between the products.
        sizes: of tiles.
        scale: of the logits.
        precision: of the products of float32.
        out_dtype: of the output; that of sums, float32 at least, if not given.
        interpret: True for the plain interpreter of Pallas, or `pltpu.InterpretParams` for that of TPUs.

    Returns:
        `[B, T, N, Dv]` and `[B, N, T]` float32, -inf for rows that see nothing.

    Raises:
        NotImplementedError: the list of tiles does not fit the scalar memory.
    """
    static = make_static(pipeline, sizes, query, key, value, scale, precision, inputs, code)
    batch, length, _, num_heads, _, _, value_dim = static.shape
    walk, bq = row_walk(static, code), static.blocks[0]
    spec = specs_of(static, walk)
    arrays = [jnp.swapaxes(x, 1, 2) for x in (query, key, value)]
    arrays += [input_array(static, x) for x in inputs.values()]
    outputs = [
        (
            ((batch, num_heads, length, value_dim), static.dtype if out_dtype is None else out_dtype),
            spec((None, None, bq, value_dim), lambda b, h, i, j: (b, h, i, 0)),
        ),
        (
            ((batch, num_heads, 1, length), static.dtype),
            spec((None, None, 1, bq), lambda b, h, i, j: (b, h, 0, i)),
        ),
    ]
    scratch = [pltpu.VMEM((bq, width), static.dtype) for width in (1, 1, value_dim)]
    specs = array_specs(static, walk, inputs)
    out, lse = call_kernel(
        _forward_kernel, static, walk, arrays, specs, outputs, scratch, interpret, "flash_attention_forward"
    )
    return jnp.swapaxes(out, 1, 2), lse[:, :, 0]
