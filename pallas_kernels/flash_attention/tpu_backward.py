"""The backward attention kernels for TPUs.

One walk over the tiles of queries for dQ, one over the tiles of keys for dK and dV, one over the tiles of pairs for
inputs like a pair bias. Everything is computed again from Q, K and the log-sum-exp, and every result is added up in one
place, so runs agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention.pipeline import Backward, Pipeline, TileInput, summed_like
from pallas_kernels.flash_attention.tpu import row_walk
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
    seen_rows,
    specs_of,
    split,
    table_size,
    unskewed,
    visible_pairs,
    widened,
    window_slice,
)


def _tile_pull(static: Static, refs, input_refs, place_of, partial: bool, wanted: Sequence[str]):
    """One tile of the backward pass: queries, output cotangents, keys, weights, cotangents of products and inputs."""
    query_ref, key_ref, value_ref, output_ref, lse_ref, total_ref = refs
    b, h, i, j = place_of
    place = make_place(static, b, h, i, j)
    tiles = load_tiles(static, input_refs, place, i, j, partial)
    visible = visible_pairs(static, place, tiles) if partial else None
    key, value = seen_keys(static, visible, key_ref[...], value_ref[...])
    rows = (query_ref[...], output_ref[...], lse_ref[...].T, total_ref[...].T)
    query, output, lse, total = seen_rows(static, visible, *rows)
    products = dot(static, query, key, (1, 1))
    cotangents = (dot(static, output, value, (1, 1)), total)
    lse = lse if static.pipeline.phi is None else None
    pulled = static.pipeline.pull(products, static.scale, visible, place, tiles, lse, cotangents, wanted)
    return query, output, key, *pulled


def _query_kernel(static: Static, walk: Walk, rows, tables, steps_ref, *refs):
    """DQ, and cotangents of inputs that vary by row only, and of tables of offsets."""
    count = len(static.inputs)
    arrays, input_refs, outs = (*refs[:3], *refs[3 + count : 6 + count]), refs[3 : 3 + count], refs[6 + count : -1]
    query_sum = refs[-1]
    query_out, row_outs, table_outs = outs[0], outs[1 : 1 + len(rows)], outs[1 + len(rows) :]
    ids = program_ids()
    step, (b, h, i, j) = walk.step(ids, steps_ref), walk.place(ids, steps_ref)

    @pl.when(ids[2] == 0)
    def _():
        for out in table_outs:
            out[...] = jnp.zeros(out.shape, out.dtype)

    @pl.when(is_first(step, 0))
    def _():
        for out in (query_sum, *row_outs):
            out[...] = jnp.zeros(out.shape, out.dtype)

    def tile(partial):
        _, _, key, _, products_ct, inputs_ct = _tile_pull(
            static, arrays, input_refs, (b, h, i, j), partial, (*rows, *tables)
        )
        query_sum[...] += dot(static, products_ct.astype(key.dtype), key, (1, 0))
        for name, out in zip(rows, row_outs, strict=True):
            out[...] += inputs_ct[name].T
        for name, out in zip(tables, table_outs, strict=True):
            out[window_slice(static, i, j)] += unskewed(static, inputs_ct[name])

    on_tiles(static, step, tile)

    @pl.when(is_last(step, 0, 1))
    def _():
        query_out[...] = (query_sum[...] * static.scale).astype(query_out.dtype)


def _key_kernel(static: Static, walk: Walk, columns, steps_ref, *refs):
    """DK and dV, and cotangents of inputs that vary by column only, one row for each head of the group."""
    count = len(static.inputs)
    arrays, input_refs, outs = (*refs[:3], *refs[3 + count : 6 + count]), refs[3 : 3 + count], refs[6 + count : -2]
    key_sum, value_sum = refs[-2:]
    key_out, value_out, *column_outs = outs
    ids = program_ids()
    step, (b, h, i, j) = walk.step(ids, steps_ref), walk.place(ids, steps_ref)

    @pl.when(is_first(step, ids[3]))
    def _():
        for out in (key_sum, value_sum, *column_outs):
            out[...] = jnp.zeros(out.shape, out.dtype)

    def tile(partial):
        query, output, _, weights, products_ct, inputs_ct = _tile_pull(
            static, arrays, input_refs, (b, h, i, j), partial, columns
        )
        key_sum[...] += dot(static, products_ct.astype(query.dtype), query, (0, 0))
        value_sum[...] += dot(static, weights.astype(output.dtype), output, (0, 0))
        member = jax.lax.rem(h, jnp.int32(static.group))
        for name, out in zip(columns, column_outs, strict=True):
            out[pl.ds(member, 1), :] += inputs_ct[name]

    on_tiles(static, step, tile)

    @pl.when(is_last(step, ids[3], walk.members))
    def _():
        key_out[...] = (key_sum[...] * static.scale).astype(key_out.dtype)
        value_out[...] = value_sum[...].astype(value_out.dtype)


def _pair_kernel(static: Static, walk: Walk, name: str, steps_ref, *refs):
    """The cotangent of one input of pairs: a tile of it, summed over the heads and batch rows that share it."""
    count = len(static.inputs)
    arrays, input_refs, out = (*refs[:3], *refs[3 + count : 6 + count]), refs[3 : 3 + count], refs[-1]
    ids = program_ids()
    step, place = walk.step(ids, steps_ref), walk.place(ids, steps_ref)

    @pl.when(is_first(step, ids[3]))
    def _():
        out[...] = jnp.zeros(out.shape, out.dtype)

    def tile(partial):
        *_, inputs_ct = _tile_pull(static, arrays, input_refs, place, partial, (name,))
        out[...] += inputs_ct[name]

    on_tiles(static, step, tile)


def _key_walk(static: Static, code) -> Walk:
    """Tile of keys by tile of keys, of every batch row and key head, through the heads of its group."""
    batch, kv_heads, group, rows = static.shape[0], static.shape[4], static.group, static.tiles[0]
    turned = code.swapaxes(2, 3)
    if code.shape[1] == 1:
        return make_walk(
            turned,
            (batch, kv_heads),
            group,
            lambda b, kv, position, g: (b, kv * group + g, *reversed(split(position, rows))),
        )

    def locate(b, kv, position, _):
        j, g, i = split(position, group, rows)
        return b, kv * group + g, i, j

    lead, (columns, _) = code.shape[0], turned.shape[2:]
    by_group = turned.reshape(lead, kv_heads, group, columns, rows).swapaxes(2, 3)
    return make_walk(by_group.reshape(lead, kv_heads, columns, group * rows), (batch, kv_heads), 1, locate)


def _pair_walk(static: Static, code, reads: tuple[bool, bool]) -> Walk:
    """Tile of pairs by tile of pairs, through the batch rows and heads that share an input."""
    batch, num_heads, (rows, columns) = static.shape[0], static.shape[3], static.tiles
    sets = (batch if reads[0] else 1, num_heads if reads[1] else 1)
    sharing = (batch // sets[0], num_heads // sets[1])

    def locate(x, y, position, member):
        (i, j), (b, h) = split(position, columns), split(member, sharing[1])
        return (x if reads[0] else b), (y if reads[1] else h), i, j

    if all(size == 1 or read for size, read in zip(code.shape, reads, strict=False)):
        flat = code.reshape(*code.shape[:2], rows * columns, 1)
        return make_walk(flat, sets, sharing[0] * sharing[1], locate)
    many = sharing[0] * sharing[1]
    xp: Any = np if isinstance(code, np.ndarray) else jnp
    full = xp.broadcast_to(code, (batch, num_heads, rows, columns))
    full = full.reshape(sets[0], sharing[0], sets[1], sharing[1], rows * columns).transpose(0, 2, 4, 1, 3)
    full = full.reshape(*sets, rows * columns, many)
    return make_walk(full, sets, 1, lambda x, y, position, _: locate(x, y, *split(position, many)))


def backward(
    query,
    key,
    value,
    inputs: Mapping[str, TileInput],
    pipeline: Pipeline,
    sizes: TpuTiles,
    given: Backward,
    wanted: Sequence[str] = (),
    *,
    scale: float,
    precision: Any = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array, dict[str, jax.Array]]:
    """Cotangents of queries, keys and values, and of the wanted inputs, in their shapes and dtypes.

    Args:
        query: as in `forward`, and so the next ones.
        key: `[B, S, K, D]`.
        value: `[B, S, K, Dv]`.
        inputs: what tiles read besides.
        pipeline: what happens between the products.
        sizes: of tiles.
        given: cotangents, and what the forward pass has kept; its `code` is that of tiles of these sizes.
        wanted: names of float inputs.
        scale: of the logits.
        precision: of the products of float32.
        interpret: as in `forward`.

    Returns:
        dQ, dK, dV, and a dictionary of the wanted cotangents.

    Raises:
        NotImplementedError: a list of tiles does not fit the scalar memory.
    """
    static = make_static(pipeline, sizes, query, key, value, scale, precision, inputs, given.code)
    batch, length, source, num_heads, kv_heads, head_dim, value_dim = static.shape
    arrays = [jnp.swapaxes(x, 1, 2) for x in (query, key, value)]
    arrays += [input_array(static, x) for x in inputs.values()]
    arrays += [jnp.swapaxes(given.output, 1, 2), given.lse[:, :, None], given.total[:, :, None]]
    bq, bk = static.blocks

    def launch(kernel, walk: Walk, outputs, sums, name: str):
        spec = specs_of(static, walk)
        specs = array_specs(static, walk, inputs)
        specs.append(spec((None, None, bq, value_dim), lambda b, h, i, j: (b, h, i, 0)))
        specs += [spec((None, None, 1, bq), lambda b, h, i, j: (b, h, 0, i))] * 2
        results = [((shape, dtype), place(spec)) for shape, dtype, place in outputs]
        scratch = [pltpu.VMEM(shape, static.dtype) for shape in sums]
        return call_kernel(kernel, static, walk, arrays, specs, results, scratch, interpret, name)

    tables = [n for n in wanted if inputs[n].center is not None]
    rows = [n for n in wanted if n not in tables and not inputs[n].reads[3]]
    columns = [n for n in wanted if n not in tables and inputs[n].reads[3] and not inputs[n].reads[2]]
    pairs = [n for n in wanted if n not in (*tables, *rows, *columns)]
    found: dict[str, Any] = {}

    def group_of(h):
        return jax.lax.div(h, jnp.int32(static.group))

    by_rows = (arrays[0].shape, query.dtype, lambda spec: spec((None, None, bq, head_dim), _at_rows))
    row = (
        (batch, num_heads, 1, length),
        static.dtype,
        lambda spec: spec((None, None, 1, bq), lambda b, h, i, j: (b, h, 0, i)),
    )
    size = table_size(static)
    table = (
        (batch, num_heads, 1, size),
        static.dtype,
        lambda spec: spec((None, None, 1, size), lambda b, h, i, j: (b, h, 0, 0)),
    )
    query_ct, *more = launch(
        lambda static, walk, *refs: _query_kernel(static, walk, rows, tables, *refs),
        row_walk(static, given.code),
        [by_rows, *[row] * len(rows), *[table] * len(tables)],
        [(bq, head_dim)],
        "flash_attention_backward_query",
    )
    for name, cotangent in zip(rows, more[: len(rows)], strict=True):
        found[name] = summed_like(jnp.swapaxes(cotangent, 2, 3), inputs[name])
    for name, cotangent in zip(tables, more[len(rows) :], strict=True):
        entry = inputs[name]
        fold = jax.linear_transpose(
            lambda t, center=entry.center: widened(static, t, center),
            jax.ShapeDtypeStruct(entry.array.shape, static.dtype),
        )
        found[name] = fold(_summed_lead(cotangent, entry))[0]

    sides = [
        (
            array.shape,
            array.dtype,
            lambda spec, width=array.shape[3]: spec((None, None, bk, width), lambda b, h, i, j: (b, group_of(h), j, 0)),
        )
        for array in arrays[1:3]
    ]
    column = (
        (batch, kv_heads, static.group, source),
        static.dtype,
        lambda spec: spec((None, None, static.group, bk), lambda b, h, i, j: (b, group_of(h), 0, j)),
    )
    key_ct, value_ct, *more = launch(
        lambda static, walk, *refs: _key_kernel(static, walk, columns, *refs),
        _key_walk(static, given.code),
        [*sides, *[column] * len(columns)],
        [(bk, head_dim), (bk, value_dim)],
        "flash_attention_backward_key",
    )
    for name, cotangent in zip(columns, more, strict=True):
        found[name] = summed_like(cotangent.reshape(batch, num_heads, 1, source), inputs[name])
    for name in pairs:
        of_batch, of_heads, _, _ = inputs[name].reads
        shape = (batch if of_batch else 1, num_heads if of_heads else 1, length, source)
        lead = lambda b, h, x=of_batch, y=of_heads: (b if x else 0, h if y else 0)  # noqa: E731
        tile = (
            shape,
            static.dtype,
            lambda spec, lead=lead: spec((None, None, bq, bk), lambda b, h, i, j: (*lead(b, h), i, j)),
        )
        (found[name],) = launch(
            lambda static, walk, *refs, name=name: _pair_kernel(static, walk, name, *refs),
            _pair_walk(static, given.code, (of_batch, of_heads)),
            [tile],
            [],
            f"flash_attention_backward_{name.replace('/', '_')}",
        )
    query_ct, key_ct, value_ct = (jnp.swapaxes(x, 1, 2) for x in (query_ct, key_ct, value_ct))
    return query_ct, key_ct, value_ct, {n: found[n].astype(inputs[n].array.dtype) for n in wanted}


def _at_rows(b, h, i, j):
    return b, h, i, 0


def _summed_lead(cotangent, given: TileInput):
    """Sum of `[B, N, 1, R]` over the leading axes that a table broadcasts over."""
    axes = tuple(axis for axis, real in enumerate(given.reads[:2]) if not real)
    return jnp.sum(cotangent, axis=axes, keepdims=True)
