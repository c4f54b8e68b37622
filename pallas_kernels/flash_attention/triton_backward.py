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
from pallas_kernels.flash_attention.triton_offsets import offset_table
from pallas_kernels.flash_attention.triton_pull import row_side, tile_pull
from pallas_kernels.flash_attention.triton_tiles import (
    Static,
    all_specs,
    call_kernel,
    computed_once,
    dot,
    make_static,
    real_axes,
    visit,
    whole_spec,
)


def _query_kernel(static: Static, wanted: Sequence[str], *refs):
    query_ref, key_ref, value_ref, *rest = refs
    list_refs, rest = rest[:4], rest[4:]
    count = len(static.names)
    input_refs, (output_ref, lse_ref, total_ref), outs = rest[:count], rest[count : count + 3], rest[count + 3 :]
    sizes, (_, length, _, _, _, head_dim, _) = static.sizes, static.shape
    i, h, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    side = row_side(static, (query_ref, output_ref, lse_ref, total_ref), (), h, i)
    state = (
        jnp.zeros((sizes.block_q, outs[0].shape[-1]), static.dtype),
        {name: jnp.zeros((sizes.block_q,), static.dtype) for name in wanted},
    )

    def tile(j, partial, state):
        done = tile_pull(static, (key_ref, value_ref), input_refs, (), side, (b, h, i, j), partial, wanted)
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
            side = row_side(static, (query_ref, output_ref, lse_ref, total_ref), (), h, i)
            done = tile_pull(static, (key_ref, value_ref), input_refs, (), side, (b, h, i, j), partial, wanted)
            query, output, _, weights, products_ct, inputs_ct = done
            key_ct, value_ct, sums = state
            if static.pipeline.drop is not None:
                weights, products_ct = computed_once(weights), computed_once(products_ct)
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


def _pair_kernel(static: Static, name: str, reads: tuple[bool, ...], *refs):
    """The cotangent of one input of pairs: a tile of it, summed over the heads and batch rows that share it."""
    query_ref, key_ref, value_ref, code_ref, *rest = refs
    input_refs, (output_ref, lse_ref, total_ref, out) = rest[:-4], rest[-4:]
    sizes, (batch, length, source, num_heads, *_) = static.sizes, static.shape
    i, j, n = pl.program_id(0), pl.program_id(1), pl.program_id(2)

    def batch_and_head(m):
        """The m-th batch row and head among those that this program sums over."""
        if reads == (True, False):
            return n, m
        if reads == (False, True):
            return m, n
        both = n if reads[0] else m
        heads = jnp.asarray(num_heads, both.dtype)
        return jax.lax.div(both, heads), jax.lax.rem(both, heads)

    def one(m, total):
        b, h = batch_and_head(m)
        code = code_ref[b if code_ref.shape[0] != 1 else 0, h if code_ref.shape[1] != 1 else 0, i, j]
        side = row_side(static, (query_ref, output_ref, lse_ref, total_ref), (b,), h, i)
        keys, tile = (key_ref, value_ref), (b, h, i, j)

        def visit(_, total):
            *_, inputs_ct = tile_pull(static, keys, input_refs, (b,), side, tile, True, (name,))
            return total + inputs_ct[name].astype(static.dtype)

        return jax.lax.fori_loop(0, jnp.minimum(code, 1), visit, total)

    total = jnp.zeros((sizes.block_q, sizes.block_k), static.dtype)
    total = jax.lax.fori_loop(0, (1 if reads[0] else batch) * (1 if reads[1] else num_heads), one, total)
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
    """Cotangents of queries, keys and values, and of the wanted inputs, in their shapes and dtypes.

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
        NotImplementedError: a table of offsets is wanted, and positions are given, which make offsets irregular.
    """
    tables = [name for name in wanted if inputs[name].center is not None]
    if tables and {"query_positions", "key_positions"} & set(inputs):
        raise NotImplementedError(f"gradients of offset tables at given positions ({', '.join(tables)})")
    static = make_static(pipeline, sizes, query, key, value, scale, precision, inputs, lists)
    batch, length, source, num_heads, kv_heads, head_dim, value_dim = static.shape
    arrays, specs = all_specs(query, key, value, lists, inputs)
    more = [given.output, given.lse, given.total]
    more_specs = [whole_spec(given.output, padded(value_dim)), whole_spec(given.lse), whole_spec(given.total)]
    others = [n for n in wanted if n not in tables]
    of_columns = [n for n in others if inputs[n].reads[3] and not inputs[n].reads[2]]
    of_pairs = [n for n in others if inputs[n].reads[3] and inputs[n].reads[2]]
    of_rows = [n for n in others if not inputs[n].reads[3]]
    block_q, block_k = sizes.block_q, sizes.block_k

    def side(array, block):
        spec = pl.BlockSpec((None, block, None, padded(array.shape[3])), lambda i, h, b: (b, i, h, 0))
        return (array.shape, array.dtype), spec

    row = (
        ((batch, num_heads, length), static.dtype),
        pl.BlockSpec((None, None, block_q), lambda i, h, b: (b, h, i)),
    )
    query_ct, *sums = call_kernel(
        lambda static, *refs: _query_kernel(static, of_rows, *refs),
        static,
        (pl.cdiv(length, block_q), num_heads, batch),
        arrays + more,
        specs + more_specs,
        [side(query, block_q), *[row] * len(of_rows)],
        interpret,
        "flash_attention_backward_query",
    )
    found = {n: summed_like(x[..., None], inputs[n]) for n, x in zip(of_rows, sums, strict=True)}

    turned = given.columns
    swapped = [turned.full_count, turned.full_index, turned.partial_count, turned.partial_index]
    column = (
        ((batch, num_heads, source), static.dtype),
        pl.BlockSpec((None, num_heads, source), lambda j, h, b: (b, 0, 0)),
    )
    key_ct, value_ct, *sums = call_kernel(
        lambda static, *refs: _key_kernel(static, of_columns, *refs),
        static,
        (pl.cdiv(source, block_k), kv_heads, batch),
        arrays[:3] + swapped + arrays[7:] + more,
        specs[:3] + [whole_spec(x) for x in swapped] + specs[7:] + more_specs,
        [side(key, block_k), side(value, block_k), *[column] * len(of_columns)],
        interpret,
        "flash_attention_backward_key",
    )
    found |= {n: summed_like(x[:, :, None], inputs[n]) for n, x in zip(of_columns, sums, strict=True)}
    for name in of_pairs:
        found[name] = _pairs(static, name, query, key, value, inputs, given, interpret)
    for name in tables:
        reads = [*arrays[:3], given.code, *arrays[7:], *more]
        read_specs = [*specs[:3], whole_spec(given.code), *specs[7:], *more_specs]
        found[name] = offset_table(static, name, reads, read_specs, interpret)
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
        ((*lead, length, source), static.dtype),
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
