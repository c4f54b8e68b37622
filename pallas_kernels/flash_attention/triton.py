"""The forward attention kernel for NVIDIA GPUs from Ampere on, through Pallas and Triton.

One program a tile of queries and head, online softmax in float32; output and log-sum-exp are all that is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.flash_attention.pipeline import LOG2_E, Pipeline, TileInput, TileLists
from pallas_kernels.flash_attention.sizes import TileSizes, padded
from pallas_kernels.flash_attention.triton_tiles import (
    Static,
    all_specs,
    call_kernel,
    dot,
    load_rows,
    load_tiles,
    make_place,
    make_static,
    visible_pairs,
    visit,
    without_unseen,
)


def _forward_kernel(static: Static, *refs):
    query_ref, key_ref, value_ref, *rest = refs
    list_refs, input_refs, (out_ref, lse_ref) = rest[:4], rest[4:-2], rest[-2:]
    sizes, (_, length, source, _, _, head_dim, value_dim) = static.sizes, static.shape
    i, h, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    query = load_rows(query_ref, (), h, i * sizes.block_q, sizes.block_q, length, head_dim)
    softmax = static.pipeline.phi is None
    state = (
        jnp.full((sizes.block_q,), -jnp.inf if softmax else 0.0, static.dtype),
        jnp.zeros((sizes.block_q,), static.dtype),
        jnp.zeros((sizes.block_q, out_ref.shape[-1]), static.dtype),
    )

    def tile(j, partial, state):
        maximum, total, weighted = state
        place, starts = make_place(static, b, h, i, j)
        tiles = load_tiles(static, input_refs, (), place, starts)
        visible = visible_pairs(static, place, tiles) if partial else None
        key = load_rows(key_ref, (), h // static.group, starts[1], sizes.block_k, source, head_dim)
        value = load_rows(value_ref, (), h // static.group, starts[1], sizes.block_k, source, value_dim)
        (value,) = without_unseen(static, visible, 0, value)
        (seen_query,) = without_unseen(static, visible, 1, query)
        (key,) = without_unseen(static, visible, 0, key)
        products = dot(static, seen_query, key, trans_b=True)
        if not softmax:
            weights, raw = static.pipeline.weights(products * static.scale, visible, place, tiles, None)
            return maximum, total + raw.sum(1), weighted + dot(static, weights.astype(value.dtype), value)
        logits, factor = static.pipeline.exponents(products, static.scale, visible, place, tiles)
        new = jnp.maximum(maximum, jnp.max(logits, axis=1) * factor)
        shift = jnp.where(new == -jnp.inf, 0.0, new)
        raw, decay = jnp.exp2(logits * factor - shift[:, None]), jnp.exp2(maximum - shift)
        weights = raw if static.pipeline.drop is None else static.pipeline.drop(raw, place, tiles)
        return (
            new,
            total * decay + jnp.sum(raw, axis=1),
            weighted * decay[:, None] + dot(static, weights.astype(value.dtype), value),
        )

    maximum, total, weighted = visit(static.lists, list_refs, b, h, i, state, tile)
    if softmax:
        alive = total != 0.0
        safe = jnp.where(alive, total, 1.0)
        total = jnp.where(alive, maximum / LOG2_E + jnp.log(safe), -jnp.inf)
        weighted = weighted / safe[:, None]
    rows = i * sizes.block_q + jnp.arange(sizes.block_q) < length
    lanes = jnp.arange(out_ref.shape[-1]) < value_dim
    plgpu.store(out_ref, weighted.astype(out_ref.dtype), mask=rows[:, None] & lanes[None, :])
    plgpu.store(lse_ref, total, mask=rows)


def forward(
    query,
    key,
    value,
    lists: TileLists,
    inputs: Mapping[str, TileInput],
    pipeline: Pipeline,
    sizes: TileSizes,
    *,
    scale: float,
    precision: Any = None,
    out_dtype: Any = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention, and the log-sum-exp of its rows (pointwise: the unscaled sums, and the sums of unnormalized weights).

    Args:
        query: `[B, T, N, D]`.
        key: `[B, S, K, D]`; K divides N.
        value: `[B, S, K, Dv]`.
        lists: key tiles of every query tile.
        inputs: what tiles read besides, by name; `query_positions` and `key_positions` replace row and column numbers.
        pipeline: what happens between the products.
        sizes: of tiles.
        scale: of the logits.
        precision: of the products of float32.
        out_dtype: of the output; that of sums, float32 at least, if not given.
        interpret: whether to run in Pallas' interpreter.

    Returns:
        `[B, T, N, Dv]` and `[B, N, T]` float32, -inf for rows that see nothing.
    """
    static = make_static(pipeline, sizes, query, key, value, scale, precision, inputs, lists)
    batch, length, _, num_heads, _, _, value_dim = static.shape
    arrays, specs = all_specs(query, key, value, lists, inputs)
    block = sizes.block_q
    outputs = [
        (
            ((batch, length, num_heads, value_dim), static.dtype if out_dtype is None else out_dtype),
            pl.BlockSpec((None, block, None, padded(value_dim)), lambda i, h, b: (b, i, h, 0)),
        ),
        (
            ((batch, num_heads, length), static.dtype),
            pl.BlockSpec((None, None, block), lambda i, h, b: (b, h, i)),
        ),
    ]
    grid = (pl.cdiv(length, block), num_heads, batch)
    return tuple(
        call_kernel(_forward_kernel, static, grid, arrays, specs, outputs, interpret, "flash_attention_forward")
    )
