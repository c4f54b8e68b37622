"""The forward attention kernel for Hopper, through Pallas and Mosaic GPU.

One program a tile of 128 query rows and head: two consuming warpgroups of 64 rows each, and one that loads tiles of
keys and values into rings of shared memory, along the list of live tiles. Online softmax in float32; the product of
weights and values of one tile and the products of queries and keys of the next are issued together.

Who waits for whom, for the t-th tile of the list in slot t mod stages:

- `filled` (for keys and for values, each slot): completes when the copy has arrived; each consumer waits once a tile.
- `freed` (likewise): completes when both consumers have arrived, each once a tile, after the products that read the
  slot were awaited. The loading warpgroup waits for it before it fills the slot again, and at its end for the last.
- `turns`: both consumers arrive and wait together, so that one computes weights while the other multiplies. The second
  one comes once more at its beginning, the first one once more at its end. Besides, each comes behind its first
  products and twice a tile (in the last tile once): both have the same list, so the numbers agree; for an empty list
  one meeting is left.
- `hidden`, in place of `turns` where partial tiles may hold values that nobody may see: both consumers meet once a
  partial tile, when each has put 0 into its half of the rows of values, before either multiplies with them.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.mosaic_gpu_sizes import CONSUMERS, ROWS, MosaicSizes
from pallas_kernels.flash_attention.mosaic_gpu_tiles import (
    Static,
    constant,
    fill_ring,
    find_tile,
    held_rows,
    hide_rows,
    input_arrays,
    launch,
    make_static,
    products,
    read_tile,
    seen_rows,
    shared,
    spread,
    whole_heads,
)
from pallas_kernels.flash_attention.pipeline import LOG2_E, Pipeline, TileInput, TileLists


def _weigh(static: Static, input_refs, where, j, partial: bool, state):
    """Weights of a tile from its products, and the running maximum, total and weighted sum in line with them."""
    maximum, total, weighted, logits = state
    b, h, row = where
    pipeline, shape = static.pipeline, (ROWS, static.sizes.block_k)
    starts = (row, j * static.sizes.block_k)
    place, tiles, visible = read_tile(static, input_refs, b, h, starts, shape, False, partial)
    if pipeline.phi is not None:
        weights, raw = pipeline.weights(logits * static.scale, visible, place, tiles, None)
        return weights, (maximum, total + jnp.sum(raw, axis=1), weighted)
    # Powers of 2 take the factor into the subtraction, one operation, and round a little more; maxima allow that if the
    # factor is positive.
    power, unit = (jnp.exp2, LOG2_E) if static.approximate else (jnp.exp, 1.0)
    factor = static.scale * unit
    if pipeline.modify is not None:
        logits, factor = pipeline.logits(logits * static.scale, visible, place, tiles), unit
    if factor <= 0:
        logits, factor = logits * factor, 1.0
    if visible is not None:
        logits = jnp.where(visible, logits, -jnp.inf)
    new = jnp.maximum(maximum, jnp.max(logits, axis=1) * factor)
    shift = jnp.where(new == -jnp.inf, 0.0, new)
    raw = power(logits * factor - spread(static, shift, shape, 0))
    decay = power(maximum - shift)
    weights = raw if pipeline.drop is None else pipeline.drop(raw, place, tiles)
    weighted = weighted * spread(static, decay, weighted.shape, 0)
    return weights, (new, total * decay + jnp.sum(raw, axis=1), weighted)


def _compute(static: Static, input_refs, where, list_of, query_ref, out_ref, lse_ref, scratch):
    """A consuming warpgroup: 64 rows of queries along all tiles of its list."""
    (b, h, row, thread), (full, count, tile) = where, list_of
    query, out, lse, rings, query_filled, turns, hidden = scratch
    key_ring, value_ring, key_filled, value_filled, key_freed, value_freed = rings
    sizes, (*_, value_dim) = static.sizes, static.shape
    own = (b, pl.ds(row, ROWS), h)
    softmax = static.pipeline.phi is None
    guard = static.pipeline.guard and static.lists.any_partial
    slot_of = lambda t: lax.rem(t, jnp.int32(sizes.stages))  # noqa: E731
    tile_shape = (ROWS, sizes.block_k)

    def turn():
        # Consumers that meet at hidden rows cannot also take turns: each would wait for the other.
        if not guard:
            plgpu.barrier_arrive(turns)
            plgpu.barrier_wait(turns)

    def first(t, _):
        plgpu.barrier_wait(key_filled.at[slot_of(t)])
        (logits,) = products(static, (tile_shape, query, key_ring.at[slot_of(t)], True), turn)
        plgpu.barrier_arrive(key_freed.at[slot_of(t)])
        return logits

    def prepare(t, partial, state):
        weights, state = _weigh(static, input_refs, (b, h, row), tile(t), partial, state)
        weights = weights.astype(value_ring.dtype)
        turn()
        plgpu.barrier_wait(value_filled.at[slot_of(t)])
        if partial and guard:
            starts = (row - thread * ROWS, tile(t) * sizes.block_k)
            seen = lambda chunk: seen_rows(  # noqa: E731
                static, input_refs, b, h, (starts[0], starts[1] + chunk * ROWS), True, sizes.block_q
            )
            hide_rows(static, hidden, thread, [value_ring.at[slot_of(t)]], seen)
        return weights, state

    def step(t, partial, state):
        weights, (maximum, total, weighted) = prepare(t, partial, state)
        slot, after = slot_of(t), slot_of(t + 1)
        plgpu.barrier_wait(key_filled.at[after])
        weighted, logits = products(
            static,
            (weighted, weights, value_ring.at[slot], False),
            (tile_shape, query, key_ring.at[after], True),
            turn,
        )
        plgpu.barrier_arrive(value_freed.at[slot])
        plgpu.barrier_arrive(key_freed.at[after])
        return maximum, total, weighted, logits

    def last(t, state):
        weights, (maximum, total, weighted) = prepare(t, static.lists.any_partial, state)
        (weighted,) = products(static, (weighted, weights, value_ring.at[slot_of(t)], False))
        plgpu.barrier_arrive(value_freed.at[slot_of(t)])
        return maximum, total, weighted, state[3]

    plgpu.copy_gmem_to_smem(query_ref.at[own], query, query_filled)
    plgpu.barrier_wait(query_filled)
    pl.when(thread == 1)(turn)
    state = (
        constant(static, (ROWS,), -jnp.inf),
        constant(static, (ROWS,), 0.0),
        constant(static, (ROWS, value_dim), 0.0),
        lax.fori_loop(jnp.int32(0), jnp.minimum(count, 1), first, constant(static, tile_shape, 0.0)),
    )
    # A full tile that is the last one goes through the partial form, whose mask hides nothing of it.
    before_last = count - 1
    border = jnp.minimum(full, before_last)
    if static.lists.any_full:
        state = lax.fori_loop(jnp.int32(0), border, lambda t, state: step(t, False, state), state)
    if static.lists.any_partial:
        state = lax.fori_loop(border, before_last, lambda t, state: step(t, True, state), state)
    maximum, total, weighted, _ = lax.fori_loop(jnp.maximum(before_last, 0), count, last, state)
    pl.when(thread == 0)(turn)

    if softmax:
        alive = total != 0.0
        safe = jnp.where(alive, total, 1.0)
        total = jnp.where(alive, maximum / (LOG2_E if static.approximate else 1.0) + jnp.log(safe), -jnp.inf)
        weighted = weighted * spread(static, 1.0 / safe, weighted.shape, 0)
    out[...] = weighted.astype(out.dtype)
    lse[...] = total
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out, out_ref.at[own])
    plgpu.copy_smem_to_gmem(lse, lse_ref.at[b, h, pl.ds(row, ROWS)])
    plgpu.wait_smem_to_gmem(0)


def forward(
    query,
    key,
    value,
    lists: TileLists,
    inputs: Mapping[str, TileInput],
    pipeline: Pipeline,
    sizes: MosaicSizes,
    *,
    scale: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention, and the log-sum-exp of its rows (pointwise: the unscaled sums, and the sums of unnormalized weights).

    Args:
        query: `[B, T, N, D]`, bfloat16 or float16 (in the interpreter also float32).
        key: `[B, S, K, D]`; K divides N.
        value: `[B, S, K, Dv]`.
        lists: key tiles of every query tile, for the tiles of `sizes`.
        inputs: what tiles read besides, by name; tables of offsets are not among them.
        pipeline: what happens between the products, in operations that Mosaic GPU has.
        sizes: of tiles; `mosaic_gpu_sizes.choose` has some that fit.
        scale: of the logits.
        interpret: whether to run in JAX's GPU interpreter.

    Returns:
        `[B, T, N, Dv]`, in the dtype of the inputs for softmax, else float32; and `[B, N, T]` float32, -inf for rows
        that see nothing.
    """
    static = make_static(pipeline, sizes, query, key, value, scale, inputs, lists, interpret)
    batch, length, source, num_heads, _, head_dim, value_dim = static.shape
    tiles = length // sizes.block_q
    softmax = pipeline.phi is None
    dtype = query.dtype if softmax else jnp.dtype(jnp.float32)
    reuse = dtype == query.dtype and head_dim == value_dim
    read = input_arrays(static, inputs, (False, True) if pipeline.guard else (False,))
    count, block_k, stages = len(read), sizes.block_k, sizes.stages

    def body(query_ref, key_ref, value_ref, *refs):
        list_refs, input_refs, (out_ref, lse_ref, *scratch) = refs[:4], refs[4 : 4 + count], refs[4 + count :]
        queries, outs, lses, *rings, query_filled, turns, hidden = scratch
        thread, b, h = (lax.axis_index(name) for name in ("thread", "batch", "head"))
        # The longest rows of causal tiles first, so that short ones fill the end.
        i = tiles - 1 - lax.axis_index("tile")
        list_of = find_tile(static, list_refs, b, h, i)

        @pl.when(thread < CONSUMERS)
        def _():
            plgpu.set_max_registers(232, action="increase")
            own = queries.at[thread]
            mine = (own, own if reuse else outs.at[thread], lses.at[thread], rings, query_filled.at[thread])
            where = (b, h, i * sizes.block_q + thread * ROWS, thread)
            _compute(static, input_refs, where, list_of, query_ref, out_ref, lse_ref, (*mine, turns, hidden))

        @pl.when(thread == CONSUMERS)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            kv_head, (_, found, tile) = lax.div(h, jnp.int32(static.group)), list_of
            key_ring, value_ring, key_filled, value_filled, key_freed, value_freed = rings
            part = lambda ref: lambda t: ref.at[b, pl.ds(tile(t) * block_k, block_k), kv_head]  # noqa: E731
            groups = [
                ([(part(key_ref), key_ring)], key_filled, key_freed),
                ([(part(value_ref), value_ring)], value_filled, value_freed),
            ]
            fill_ring(stages, groups, jnp.int32(0), found)

    ring = plgpu.Barrier(num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages)
    both = plgpu.Barrier(num_arrivals=CONSUMERS)
    scratch = [
        shared((CONSUMERS, ROWS, head_dim), query.dtype),
        None if reuse else shared((CONSUMERS, ROWS, value_dim), dtype),
        plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
        shared((stages, block_k, head_dim), key.dtype),
        shared((stages, block_k, value_dim), value.dtype),
        *[ring, ring, free, free],
        *[plgpu.Barrier(num_barriers=CONSUMERS), both, both],
    ]
    rows = held_rows(static, query.shape[1], length)
    outputs = [
        jax.ShapeDtypeStruct((batch, rows, num_heads, value_dim), dtype),
        jax.ShapeDtypeStruct((batch, num_heads, length), jnp.float32),
    ]
    arrays = [whole_heads(static, query, length), whole_heads(static, key, source), whole_heads(static, value, source)]
    arrays += [lists.full_count, lists.full_index, lists.partial_count, lists.partial_index]
    arrays += read
    grid = {"head": num_heads, "tile": tiles, "batch": batch}
    out, lse = launch(body, static, arrays, outputs, scratch, grid, "flash_attention_forward")
    return out[:, : query.shape[1], :, : value.shape[3]], lse[:, :, : query.shape[1]]
