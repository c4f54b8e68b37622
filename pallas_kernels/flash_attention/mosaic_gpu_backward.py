"""The backward attention kernels for Hopper, through Pallas and Mosaic GPU.

One program a tile of queries for dQ, one a tile of keys for dK and dV, which walks the queries of all heads that share
the keys. Everything is computed again from Q, K and the log-sum-exp; nothing is added concurrently, so runs agree bit
for bit.

Each program is two consuming warpgroups, which hold 64 rows each of the side that stays, and one that loads the other
side. Its ring has one barrier a slot for each direction: `filled` completes when all copies of a round have arrived,
`freed` when both consumers have finished with the slot (two arrivals). Consumers wait once for each round and free it
once; the loading warpgroup waits once for each release, for the last ones at its end. Where values must be hidden,
both consumers meet at `hidden` once a partial tile, before its products; their lists are the same, so they meet
equally often.
"""

from __future__ import annotations

import functools
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
    drain_ring,
    fill_ring,
    find_tile,
    held_rows,
    hide_rows,
    input_arrays,
    launch,
    load_vector,
    make_static,
    products,
    read_tile,
    seen_rows,
    shared,
    spread,
    whole_heads,
    whole_rows,
    with_plain_sums,
)
from pallas_kernels.flash_attention.pipeline import LOG2_E, Backward, Pipeline, TileInput, TileLists

EVERYTHING = (slice(None),)
MAX_SUM = 128
"""Columns of a sum that stays in registers beside another one as wide and the tiles of the backward pass."""


def _pulled(static: Static, input_refs, where, shape, turned: bool, partial: bool, logits, weights_ct, lse, total):
    """Weights of a tile, and the cotangents of its products before they are scaled (None without those of weights)."""
    b, h, starts = where
    pipeline = static.pipeline
    place, tiles, visible = read_tile(static, input_refs, b, h, starts, shape, turned, partial)
    if static.approximate:
        exponent = logits * (static.scale * LOG2_E) - lse * LOG2_E
        weights = jnp.exp2(exponent if visible is None else jnp.where(visible, exponent, -jnp.inf))
        if weights_ct is None:
            return weights, None
        cotangent = weights * (weights_ct + total)
        return weights, cotangent if visible is None else jnp.where(visible, cotangent, 0.0)

    def weigh(logits):
        return pipeline.weights(logits, visible, place, tiles, lse if pipeline.phi is None else None)

    def pulled(logits, weights_ct, total):
        (weights, _), pull = jax.vjp(weigh, logits)
        return weights, pull((weights_ct, total))[0]

    if weights_ct is None:
        return weigh(logits * static.scale)[0], None
    return with_plain_sums(pulled, logits * static.scale, weights_ct, total)


def _both_kinds(static: Static, full, count, step, state):
    """The full tiles of a list, then the partial ones."""
    if static.lists.any_full:
        state = lax.fori_loop(jnp.int32(0), full, lambda t, state: step(t, False, state), state)
    if static.lists.any_partial:
        state = lax.fori_loop(full, count, lambda t, state: step(t, True, state), state)
    return state


def _query_side(static: Static, input_refs, where, list_of, rows, held, ring, hidden):
    """dQ of 64 rows of queries, unscaled."""
    (b, h, row, thread), (full, count, tile) = where, list_of
    (lse, total), (query, output), (keys, values, filled, freed) = rows, held, ring
    block = static.sizes.block_k
    shape = (ROWS, block)
    guard = static.pipeline.guard

    def step(t, partial, query_ct):
        slot, start = lax.rem(t, jnp.int32(static.sizes.stages)), tile(t) * block
        key = keys.at[slot]
        plgpu.barrier_wait(filled.at[slot])
        if partial and guard:
            first = row - thread * ROWS
            seen = lambda chunk: seen_rows(  # noqa: E731
                static, input_refs, b, h, (first, start + chunk * ROWS), True, static.sizes.block_q
            )
            hide_rows(static, hidden, thread, [key], seen)
        logits, weights_ct = products(static, (shape, query, key, True), (shape, output, values.at[slot], True))
        sides = (spread(static, x, shape, 0) for x in (lse, total))
        _, cotangent = _pulled(
            static, input_refs, (b, h, (row, start)), shape, False, partial, logits, weights_ct, *sides
        )
        (query_ct,) = products(static, (query_ct, cotangent.astype(keys.dtype), key, False))
        plgpu.barrier_arrive(freed.at[slot])
        return query_ct

    return _both_kinds(static, full, count, step, constant(static, query.shape, 0.0))


def _key_side(static: Static, input_refs, where, list_of, held, ring, hidden, base, state):
    """dK (unscaled) and dV of 64 keys, added to what other heads have given; `base` rounds of the ring came before.

    `state` holds those of the two that are wanted, by name.
    """
    (b, h, start, thread), (full, count, tile) = where, list_of
    (key, value), (queries, outputs, lses, totals, filled, freed) = held, ring
    block = static.sizes.block_q
    shape = (ROWS, block)
    guard = static.pipeline.guard

    def step(t, partial, state):
        slot, row = lax.rem(base + t, jnp.int32(static.sizes.stages)), tile(t) * block
        query, output = queries.at[slot], outputs.at[slot]
        plgpu.barrier_wait(filled.at[slot])
        if partial and guard:
            first = start - thread * ROWS
            seen = lambda chunk: seen_rows(  # noqa: E731
                static, input_refs, b, h, (row + chunk * ROWS, first), False, static.sizes.block_k
            )
            hide_rows(static, hidden, thread, [query, output], seen)
        tasks = [(shape, key, query, True)] + [(shape, value, output, True)] * ("key" in state)
        logits, weights_ct = (*products(static, *tasks), None)[:2]
        sides = (spread(static, load_vector(static, x.at[slot], EVERYTHING, 1), shape, 1) for x in (lses, totals))
        weights, cotangent = _pulled(
            static, input_refs, (b, h, (row, start)), shape, True, partial, logits, weights_ct, *sides
        )
        pairs = {"key": (cotangent, query), "value": (weights, output)}
        tasks = [(total, pairs[n][0].astype(key.dtype), pairs[n][1], False) for n, total in state.items()]
        state = dict(zip(state, products(static, *tasks), strict=True))
        plgpu.barrier_arrive(freed.at[slot])
        return state

    return _both_kinds(static, full, count, step, state)


def _store(parts):
    """Move tiles through shared memory to memory: triples of a tile, where it passes, and where it goes."""
    for tile, held, _ in parts:
        held[...] = tile.astype(held.dtype)
    plgpu.commit_smem()
    for _, held, target in parts:
        plgpu.copy_smem_to_gmem(held, target)
    plgpu.wait_smem_to_gmem(0)


def backward_query(
    query,
    key,
    value,
    lists: TileLists,
    inputs: Mapping[str, TileInput],
    pipeline: Pipeline,
    sizes: MosaicSizes,
    given: Backward,
    *,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """Cotangent of the queries, in their shape and dtype; arguments as of `forward`."""
    static = make_static(pipeline, sizes, query, key, value, scale, inputs, lists, interpret)
    batch, length, source, num_heads, _, head_dim, value_dim = static.shape
    block, stages, tiles = sizes.block_k, sizes.stages, length // sizes.block_q
    read = input_arrays(static, inputs, (False, True) if pipeline.guard else (False,))

    def body(query_ref, key_ref, value_ref, output_ref, lse_ref, total_ref, *refs):
        list_refs, input_refs, (out_ref, *scratch) = refs[:4], refs[4 : 4 + len(read)], refs[4 + len(read) :]
        queries, outputs, keys, values, held, filled, freed, hidden = scratch
        thread, b, h = (lax.axis_index(name) for name in ("thread", "batch", "head"))
        # The longest rows of causal tiles first, so that short ones fill the end.
        i = tiles - 1 - lax.axis_index("tile")
        list_of = find_tile(static, list_refs, b, h, i)

        @pl.when(thread < CONSUMERS)
        def _():
            plgpu.set_max_registers(240, action="increase")
            row = i * sizes.block_q + thread * ROWS
            own = (b, pl.ds(row, ROWS), h)
            query_part, output_part = queries.at[thread], outputs.at[thread]
            plgpu.copy_gmem_to_smem(query_ref.at[own], query_part, held.at[thread])
            plgpu.copy_gmem_to_smem(output_ref.at[own], output_part, held.at[thread])
            plgpu.barrier_wait(held.at[thread])
            rows = [load_vector(static, ref, (b, h, pl.ds(row, ROWS)), 0) for ref in (lse_ref, total_ref)]
            query_ct = _query_side(
                static,
                input_refs,
                (b, h, row, thread),
                list_of,
                rows,
                (query_part, output_part),
                (keys, values, filled, freed),
                hidden,
            )
            _store([(query_ct * scale, query_part, out_ref.at[own])])

        @pl.when(thread == CONSUMERS)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            kv_head, (_, count, tile) = lax.div(h, jnp.int32(static.group)), list_of
            part = lambda ref: lambda t: ref.at[b, pl.ds(tile(t) * block, block), kv_head]  # noqa: E731
            copies = [(part(key_ref), keys), (part(value_ref), values)]
            fill_ring(stages, [(copies, filled, freed)], jnp.int32(0), count)

    scratch = [
        shared((CONSUMERS, ROWS, head_dim), query.dtype),
        shared((CONSUMERS, ROWS, value_dim), value.dtype),
        shared((stages, block, head_dim), key.dtype),
        shared((stages, block, value_dim), value.dtype),
        plgpu.Barrier(num_arrivals=2, num_barriers=CONSUMERS),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        plgpu.Barrier(num_arrivals=CONSUMERS),
    ]
    rows = held_rows(static, query.shape[1], length)
    output = jax.ShapeDtypeStruct((batch, rows, num_heads, head_dim), query.dtype)
    arrays = [whole_heads(static, query, length), whole_heads(static, key, source), whole_heads(static, value, source)]
    arrays += [whole_heads(static, given.output, length), *(whole_rows(x, length) for x in (given.lse, given.total))]
    arrays += [lists.full_count, lists.full_index, lists.partial_count, lists.partial_index, *read]
    grid = {"head": num_heads, "tile": tiles, "batch": batch}
    (found,) = launch(body, static, arrays, [output], scratch, grid, "flash_attention_backward_query")
    return found[:, : query.shape[1], :, : query.shape[3]]


def backward_key(
    query,
    key,
    value,
    columns: TileLists,
    inputs: Mapping[str, TileInput],
    pipeline: Pipeline,
    sizes: MosaicSizes,
    given: Backward,
    *,
    scale: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Cotangents of keys and of values, in their shapes and dtypes.

    `columns` holds the lists seen from the keys: query tiles of every key tile. Other arguments as of `forward`.
    """
    static = make_static(pipeline, sizes, query, key, value, scale, inputs, columns, interpret)
    batch, length, source, _, kv_heads, head_dim, value_dim = static.shape
    block, stages, tiles = sizes.block_q, sizes.stages, source // sizes.block_k
    read = input_arrays(static, inputs, (False, True) if pipeline.guard else (True,))

    def body(wanted, query_ref, key_ref, value_ref, output_ref, lse_ref, total_ref, *refs):
        list_refs, input_refs, rest = refs[:4], refs[4 : 4 + len(read)], refs[4 + len(read) :]
        *outs, keys, values, queries, outputs, lses, totals, held, filled, freed, hidden = rest
        thread, b, kv_head, j = (lax.axis_index(name) for name in ("thread", "batch", "head", "tile"))

        def heads(visit, state):
            """`visit(head, rounds before, list, state)` for the query heads that share the keys."""

            def one(g, carry):
                h = kv_head * static.group + g
                list_of = find_tile(static, list_refs, b, h, j)
                return carry[0] + list_of[1], visit(h, carry[0], list_of, carry[1])

            return lax.fori_loop(jnp.int32(0), jnp.int32(static.group), one, (jnp.int32(0), state))

        @pl.when(thread < CONSUMERS)
        def _():
            plgpu.set_max_registers(240, action="increase")
            start = j * sizes.block_k + thread * ROWS
            own = (b, pl.ds(start, ROWS), kv_head)
            key_part, value_part = keys.at[thread], values.at[thread]
            plgpu.copy_gmem_to_smem(key_ref.at[own], key_part, held.at[thread])
            plgpu.copy_gmem_to_smem(value_ref.at[own], value_part, held.at[thread])
            plgpu.barrier_wait(held.at[thread])
            ring = (queries, outputs, lses, totals, filled, freed)

            def visit(h, base, list_of, state):
                where = (b, h, start, thread)
                return _key_side(static, input_refs, where, list_of, (key_part, value_part), ring, hidden, base, state)

            parts = {"key": key_part, "value": value_part}
            _, found = heads(visit, {name: constant(static, parts[name].shape, 0.0) for name in wanted})
            if "key" in found:
                found["key"] = found["key"] * scale
            _store([(found[name], parts[name], out.at[own]) for name, out in zip(wanted, outs, strict=True)])

        @pl.when(thread == CONSUMERS)
        def _():
            plgpu.set_max_registers(24, action="decrease")

            def groups(h, tile):
                span = lambda t: pl.ds(tile(t) * block, block)  # noqa: E731
                wide = [(lambda t, ref=ref: ref.at[b, span(t), h]) for ref in (query_ref, output_ref)]
                flat = [(lambda t, ref=ref: ref.at[b, h, span(t)]) for ref in (lse_ref, total_ref)]
                return [(list(zip(wide + flat, (queries, outputs, lses, totals), strict=True)), filled, freed)]

            def visit(h, base, list_of, state):
                fill_ring(stages, groups(h, list_of[2]), base, list_of[1], drained=False)
                return state

            rounds, _ = heads(visit, jnp.int32(0))
            drain_ring(stages, [((), filled, freed)], rounds)

    scratch = [
        shared((CONSUMERS, ROWS, head_dim), key.dtype),
        shared((CONSUMERS, ROWS, value_dim), value.dtype),
        shared((stages, block, head_dim), query.dtype),
        shared((stages, block, value_dim), value.dtype),
        *[plgpu.SMEM((stages, block), jnp.float32)] * 2,
        plgpu.Barrier(num_arrivals=2, num_barriers=CONSUMERS),
        plgpu.Barrier(num_arrivals=4, num_barriers=stages),
        plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        plgpu.Barrier(num_arrivals=CONSUMERS),
    ]
    rows = held_rows(static, key.shape[1], source)
    outputs = {
        name: jax.ShapeDtypeStruct((batch, rows, kv_heads, width), like.dtype)
        for name, width, like in (("key", head_dim, key), ("value", value_dim, value))
    }
    arrays = [whole_heads(static, query, length), whole_heads(static, key, source), whole_heads(static, value, source)]
    arrays += [whole_heads(static, given.output, length), *(whole_rows(x, length) for x in (given.lse, given.total))]
    arrays += [columns.full_count, columns.full_index, columns.partial_count, columns.partial_index, *read]
    grid = {"head": kv_heads, "tile": tiles, "batch": batch}
    # Sums of both that are wider than this would leave the registers, which costs more than products made twice.
    together = head_dim + value_dim <= 2 * MAX_SUM
    found: dict[str, jax.Array] = {}
    for wanted in [("key", "value")] if together else [("key",), ("value",)]:
        shapes, name = [outputs[n] for n in wanted], f"flash_attention_backward_{'_'.join(wanted)}"
        found |= zip(
            wanted, launch(functools.partial(body, wanted), static, arrays, shapes, scratch, grid, name), strict=True
        )
    return tuple(found[n][:, : key.shape[1], :, : x.shape[3]] for n, x in (("key", key), ("value", value)))
