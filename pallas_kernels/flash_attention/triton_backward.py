"""The backward attention kernels for Triton.

One program a tile of queries for dQ, one a tile of keys for dK and dV, one a tile of pairs for inputs like a pair bias.
Everything is computed again from Q, K and the log-sum-exp; nothing is added concurrently, so runs agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.flash_attention.pipeline import Backward, Pipeline, TileInput, TileLists, summed_like
from pallas_kernels.flash_attention.sizes import TileSizes, padded
from pallas_kernels.flash_attention.triton_tiles import (
    Static,
    all_specs,
    call_kernel,
    dot,
    load_numbers,
    load_rows,
    load_tiles,
    make_place,
    make_static,
    real_axes,
    visible_pairs,
    visit,
    whole_spec,
    without_unseen,
)


def _row_side(static: Static, refs, lead, h, i):
    """Queries, output cotangents, lse and total cotangents of a tile of rows."""
    query_ref, output_ref, lse_ref, total_ref = refs
    sizes, (_, length, _, _, _, head_dim, value_dim) = static.sizes, static.shape
    start = i * sizes.block_q
    query = load_rows(query_ref, lead, h, start, sizes.block_q, length, head_dim)
    output = load_rows(output_ref, lead, h, start, sizes.block_q, length, value_dim)
    lse, total = (load_numbers(ref, lead, h, start, sizes.block_q, length)[:, None] for ref in (lse_ref, total_ref))
    return query, output, lse, total


def _tile_pull(static: Static, key_refs, input_refs, lead, side, place_of, partial: bool, wanted: Sequence[str]):
    """One tile of the backward pass: rows, keys, weights, and the cotangents of products and wanted inputs."""
    sizes, (_, _, source, _, _, head_dim, value_dim) = static.sizes, static.shape
    query, output, lse, total = side
    b, h, i, j = place_of
    place, starts = make_place(static, b, h, i, j)
    tiles = load_tiles(static, input_refs, lead, place, starts)
    visible = visible_pairs(static, place, tiles) if partial else None
    key = load_rows(key_refs[0], lead, h // static.group, starts[1], sizes.block_k, source, head_dim)
    value = load_rows(key_refs[1], lead, h // static.group, starts[1], sizes.block_k, source, value_dim)
    key, value = without_unseen(static, visible, 0, key, value)
    query, output, total = without_unseen(static, visible, 1, query, output, total)
    products = dot(static, query, key, trans_b=True) * static.scale
    weighted_ct = dot(static, output, value, trans_b=True)
    lse = lse if static.pipeline.phi is None else None
    cotangents = (weighted_ct, total)
    weights, products_ct, inputs_ct = static.pipeline.pull(products, visible, place, tiles, lse, cotangents, wanted)
    return query, output, key, weights, products_ct, inputs_ct


def _query_kernel(static: Static, wanted: Sequence[str], *refs):
    query_ref, key_ref, value_ref, *rest = refs
    list_refs, rest = rest[:4], rest[4:]
    count = len(static.names)
    input_refs, (output_ref, lse_ref, total_ref), outs = rest[:count], rest[count : count + 3], rest[count + 3 :]
    sizes, (_, length, _, _, _, head_dim, _) = static.sizes, static.shape
    i, h, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    side = _row_side(static, (query_ref, output_ref, lse_ref, total_ref), (), h, i)
    state = (
        jnp.zeros((sizes.block_q, outs[0].shape[-1]), static.dtype),
        {name: jnp.zeros((sizes.block_q,), static.dtype) for name in wanted},
    )

    def tile(j, partial, state):
        done = _tile_pull(static, (key_ref, value_ref), input_refs, (), side, (b, h, i, j), partial, wanted)
        _, _, key, _, products_ct, inputs_ct = done
        sums = {name: state[1][name] + inputs_ct[name].reshape(-1).astype(static.dtype) for name in wanted}
        return state[0] + dot(static, products_ct.astype(key.dtype), key), sums

    query_ct, sums = visit(static.lists, list_refs, b, h, i, state, tile)
    rows = i * sizes.block_q + jnp.arange(sizes.block_q) < length
    lanes = jnp.arange(outs[0].shape[-1]) < head_dim
    plgpu.store(outs[0], (query_ct * static.scale).astype(outs[0].dtype), mask=rows[:, None] & lanes[None, :])
    for name, out in zip(wanted, outs[1:], strict=True):
        plgpu.store(out, sums[name], mask=rows)


def _key_kernel(static: Static, wanted: Sequence[str], *refs):
    query_ref, key_ref, value_ref, *rest = refs
    list_refs, rest = rest[:4], rest[4:]
    count = len(static.names)
    input_refs, (output_ref, lse_ref, total_ref), outs = rest[:count], rest[count : count + 3], rest[count + 3 :]
    sizes, (_, _, source, _, _, head_dim, value_dim) = static.sizes, static.shape
    j, kv_head, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    columns = j * sizes.block_k + jnp.arange(sizes.block_k) < source

    def head(g, state):
        h = kv_head * static.group + g

        def tile(i, partial, state):
            side = _row_side(static, (query_ref, output_ref, lse_ref, total_ref), (), h, i)
            done = _tile_pull(static, (key_ref, value_ref), input_refs, (), side, (b, h, i, j), partial, wanted)
            query, output, _, weights, products_ct, inputs_ct = done
            key_ct, value_ct, sums = state
            key_ct = key_ct + dot(static, products_ct.astype(query.dtype), query, trans_a=True)
            value_ct = value_ct + dot(static, weights.astype(output.dtype), output, trans_a=True)
            return key_ct, value_ct, {n: sums[n] + inputs_ct[n].reshape(-1).astype(static.dtype) for n in wanted}

        zeros = {name: jnp.zeros((sizes.block_k,), static.dtype) for name in wanted}
        *state, sums = visit(static.lists, list_refs, b, h, j, (*state, zeros), tile)
        for name, out in zip(wanted, outs[2:], strict=True):
            plgpu.store(out.at[h, pl.ds(j * sizes.block_k, sizes.block_k)], sums[name], mask=columns)
        return tuple(state)

    state = tuple(jnp.zeros((sizes.block_k, out.shape[-1]), static.dtype) for out in outs[:2])
    key_ct, value_ct = jax.lax.fori_loop(0, static.group, head, state)
    for out, cotangent, width in ((outs[0], key_ct * static.scale, head_dim), (outs[1], value_ct, value_dim)):
        lanes = jnp.arange(out.shape[-1]) < width
        plgpu.store(out, cotangent.astype(out.dtype), mask=columns[:, None] & lanes[None, :])


def _pair_kernel(static: Static, name: str, reads: tuple[bool, bool], *refs):
    """The cotangent of one input of pairs: a tile of it, summed over the heads and batch rows that share it."""
    query_ref, key_ref, value_ref, code_ref, *rest = refs
    input_refs, (output_ref, lse_ref, total_ref, out) = rest[:-4], rest[-4:]
    sizes, (batch, length, source, num_heads, *_) = static.sizes, static.shape
    i, j, n = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    batches, heads = (1 if reads[0] else batch), (1 if reads[1] else num_heads)
    # Which batch row and head this program begins with, and how many of each it sums over.
    first_b, first_h = (n // (num_heads if reads[1] else 1), n % (num_heads if reads[1] else 1))

    def one(m, total):
        b, h = (first_b + m // heads if not reads[0] else first_b), (m % heads if not reads[1] else first_h)
        code = code_ref[b if code_ref.shape[0] != 1 else 0, h if code_ref.shape[1] != 1 else 0, i, j]
        side = _row_side(static, (query_ref, output_ref, lse_ref, total_ref), (b,), h, i)
        keys, tile = (key_ref, value_ref), (b, h, i, j)

        def visit(_, total):
            *_, inputs_ct = _tile_pull(static, keys, input_refs, (b,), side, tile, True, (name,))
            return total + inputs_ct[name].astype(static.dtype)

        return jax.lax.fori_loop(0, jnp.where(code > 0, 1, 0), visit, total)

    total = jnp.zeros((sizes.block_q, sizes.block_k), static.dtype)
    total = jax.lax.fori_loop(0, batches * heads, one, total)
    rows = i * sizes.block_q + jnp.arange(sizes.block_q) < length
    columns = j * sizes.block_k + jnp.arange(sizes.block_k) < source
    plgpu.store(out, total, mask=rows[:, None] & columns[None, :])


def backward(
    query,
    key,
    value,
    lists: TileLists,
    inputs: Mapping[str, TileInput],
    pipeline: Pipeline,
    sizes: TileSizes,
    given: Backward,
    wanted: Sequence[str] = (),
    *,
    scale: float,
    precision: Any = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, dict[str, jax.Array]]:
    """Cotangents of queries, keys and values, float32, and of the wanted inputs in their shapes.

    Args:
        query: as in `forward`, and so the next ones.
        key: `[B, S, K, D]`.
        value: `[B, S, K, Dv]`.
        lists: key tiles of every query tile.
        inputs: what tiles read besides.
        pipeline: what happens between the products.
        sizes: of tiles.
        given: cotangents, and what the forward pass has kept.
        wanted: names of float inputs.
        scale: of the logits.
        precision: of the products of float32.
        interpret: whether to run in Pallas' interpreter.

    Returns:
        dQ, dK, dV, and a dictionary of the wanted cotangents.

    Raises:
        NotImplementedError: a table of offsets is wanted.
    """
    tables = [name for name in wanted if inputs[name].center is not None]
    if tables:
        raise NotImplementedError(f"the Triton kernel has no gradient of offset tables ({', '.join(tables)})")
    static = make_static(pipeline, sizes, query, key, value, scale, precision, inputs, lists)
    batch, length, source, num_heads, kv_heads, head_dim, value_dim = static.shape
    arrays, specs = all_specs(query, key, value, lists, inputs)
    more = [given.output, given.lse, given.total]
    more_specs = [whole_spec(given.output, padded(value_dim)), whole_spec(given.lse), whole_spec(given.total)]
    of_columns = [n for n in wanted if inputs[n].reads[3] and not inputs[n].reads[2]]
    of_pairs = [n for n in wanted if inputs[n].reads[3] and inputs[n].reads[2]]
    of_rows = [n for n in wanted if not inputs[n].reads[3]]
    block_q, block_k = sizes.block_q, sizes.block_k

    def side(shape, block):
        return (
            jax.ShapeDtypeStruct(shape, static.dtype),
            pl.BlockSpec((None, block, None, padded(shape[3])), lambda i, h, b: (b, i, h, 0)),
        )

    row = (
        jax.ShapeDtypeStruct((batch, num_heads, length), static.dtype),
        pl.BlockSpec((None, None, block_q), lambda i, h, b: (b, h, i)),
    )
    query_ct, *sums = call_kernel(
        lambda static, *refs: _query_kernel(static, of_rows, *refs),
        static,
        (pl.cdiv(length, block_q), num_heads, batch),
        arrays + more,
        specs + more_specs,
        [side(query.shape, block_q), *[row] * len(of_rows)],
        interpret,
        "flash_attention_backward_query",
    )
    found = {n: summed_like(x[..., None], inputs[n]) for n, x in zip(of_rows, sums, strict=True)}

    turned = given.columns
    swapped = [turned.full_count, turned.full_index, turned.partial_count, turned.partial_index]
    column = (
        jax.ShapeDtypeStruct((batch, num_heads, source), static.dtype),
        pl.BlockSpec((None, num_heads, source), lambda j, h, b: (b, 0, 0)),
    )
    key_ct, value_ct, *sums = call_kernel(
        lambda static, *refs: _key_kernel(static, of_columns, *refs),
        static,
        (pl.cdiv(source, block_k), kv_heads, batch),
        arrays[:3] + swapped + arrays[7:] + more,
        specs[:3] + [whole_spec(x) for x in swapped] + specs[7:] + more_specs,
        [side(key.shape, block_k), side(value.shape, block_k), *[column] * len(of_columns)],
        interpret,
        "flash_attention_backward_key",
    )
    found |= {n: summed_like(x[:, :, None], inputs[n]) for n, x in zip(of_columns, sums, strict=True)}
    for name in of_pairs:
        found[name] = _pairs(static, name, query, key, value, inputs, given, interpret)
    return query_ct, key_ct, value_ct, {n: found[n].astype(inputs[n].array.dtype) for n in wanted}


def _pairs(static: Static, name: str, query, key, value, inputs, given: Backward, interpret: bool):
    batch, length, source, num_heads, _, _, value_dim = static.shape
    block_q, block_k = static.sizes.block_q, static.sizes.block_k
    reads = inputs[name].reads[:2]
    lead = (batch if reads[0] else 1, num_heads if reads[1] else 1)
    arrays = [query, key, value, given.code, *(x.array for x in inputs.values()), given.output, given.lse, given.total]
    widths = {0: padded(query.shape[3]), 1: padded(query.shape[3]), 2: padded(value_dim)}
    widths[len(arrays) - 3] = padded(value_dim)

    def everything(number: int, array) -> pl.BlockSpec:
        shape = (*array.shape[:-1], widths.get(number, array.shape[-1]))
        if 4 <= number < 4 + len(inputs):
            shape = real_axes(static.inputs[number - 4])
        return pl.BlockSpec(shape, lambda i, j, n: (0,) * len(shape))

    output = (
        jax.ShapeDtypeStruct((*lead, length, source), static.dtype),
        pl.BlockSpec((None, None, block_q, block_k), lambda i, j, n: (n // lead[1], n % lead[1], i, j)),
    )
    (found,) = call_kernel(
        lambda static, *refs: _pair_kernel(static, name, reads, *refs),
        static,
        (pl.cdiv(length, block_q), pl.cdiv(source, block_k), lead[0] * lead[1]),
        arrays,
        [everything(number, array) for number, array in enumerate(arrays)],
        [output],
        interpret,
        f"flash_attention_backward_{name.replace('/', '_')}",
    )
    return found
