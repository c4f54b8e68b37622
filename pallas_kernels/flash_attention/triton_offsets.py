"""Cotangents of offset tables for Triton: sums along the diagonals of the score matrix, without atomics.

One program a diagonal of tiles, head and batch row: it walks down its diagonal and sums each tile's cotangents along
the tile's own diagonals, by way of a tile of memory. What the programs leave, sums by offset for overlapping windows of
offsets, is joined in a fixed order: two runs agree bit for bit. Memory is linear in T and S, a tile a program.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.flash_attention.pipeline import TileInput
from pallas_kernels.flash_attention.triton_pull import row_side, tile_pull
from pallas_kernels.flash_attention.triton_tiles import Static, call_kernel


def _geometry(static: Static) -> tuple[int, int, int, int, int]:
    """Tiles of both sides, how far both sides step in units of the shorter one, and windows of a diagonal's offsets."""
    sizes, (_, length, source, *_) = static.sizes, static.shape
    step = min(sizes.block_q, sizes.block_k)
    tiles = (pl.cdiv(length, sizes.block_q), pl.cdiv(source, sizes.block_k))
    return *tiles, sizes.block_q // step, sizes.block_k // step, 1 + pl.cdiv(sizes.block_q, sizes.block_k)


def _offset_kernel(static: Static, name: str, interpret: bool, *refs):
    """Sums by offset of one diagonal of tiles, those with key step * j - query step * i the same."""
    query_ref, key_ref, value_ref, code_ref, *rest = refs
    count = len(static.names)
    input_refs, (output_ref, lse_ref, total_ref, scratch, *outs) = rest[:count], rest[count:]
    block_q, block_k = static.sizes.block_q, static.sizes.block_k
    query_tiles, key_tiles, query_step, key_step, windows = _geometry(static)
    diagonal, h, b = pl.program_id(0) - (query_tiles - 1) * query_step, pl.program_id(1), pl.program_id(2)
    head = h if code_ref.shape[0] != 1 else 0

    def whole(x, step):
        return jax.lax.div(x, jnp.asarray(step, x.dtype))

    # The diagonal's tiles, counted on the side of the longer ones.
    if query_step == 1:
        first = whole(jnp.maximum(diagonal, 0) + key_step - 1, key_step)
        last = jnp.minimum(whole(query_tiles - 1 + diagonal, key_step), key_tiles - 1)
    else:
        first = whole(jnp.maximum(-diagonal, 0) + query_step - 1, query_step)
        last = jnp.minimum(whole(key_tiles - 1 - diagonal, query_step), query_tiles - 1)

    def synchronize():
        # All threads of a program have written their part of the tile, or read it, before the others go on.
        if not interpret:
            plgpu.debug_barrier()

    def skewed(window):
        """The tile in scratch, each row moved left by its number, as far as it lies in a window of columns."""
        row = jnp.broadcast_to(jnp.arange(block_q)[:, None], (block_q, block_k))
        column = row + jnp.arange(block_k)[None, :] - window * block_k
        inside = (column >= 0) & (column < block_k)
        place = scratch.at[row, jnp.clip(column, 0, block_k - 1)]
        return plgpu.load(place, mask=inside, other=0, volatile=True)

    def tile(i, j, sums):
        side = row_side(static, (query_ref, output_ref, lse_ref, total_ref), (), h, i)
        *_, inputs_ct = tile_pull(static, (key_ref, value_ref), input_refs, (), side, (b, h, i, j), True, (name,))
        plgpu.store(scratch, inputs_ct[name].astype(static.dtype))
        synchronize()
        sums = tuple(total + jnp.sum(skewed(window), axis=0) for window, total in enumerate(sums))
        synchronize()
        return sums

    def visit(m, sums):
        n = first + m
        i, j = (n * key_step - diagonal, n) if query_step == 1 else (n, n * query_step + diagonal)
        live = jnp.minimum(code_ref[head, i, j], 1)
        return jax.lax.fori_loop(0, live, lambda _, sums: tile(i, j, sums), sums)

    sums = tuple(jnp.zeros((block_k,), static.dtype) for _ in range(windows))
    sums = jax.lax.fori_loop(0, last - first + 1, visit, sums)
    for out, total in zip(outs, sums, strict=True):
        plgpu.store(out, total)


def offset_table(static: Static, name: str, arrays, specs, interpret: bool) -> jax.Array:
    """The cotangent `[B|1, N|1, 1, R]` of a table of offsets.

    Args:
        static: what the kernel knows.
        name: of the table.
        arrays: queries, keys, values, classes of tiles, inputs, cotangents of outputs, lse, and cotangents of totals.
        specs: how programs of (diagonal, head, batch row) see them.
        interpret: whether to run in Pallas' interpreter.
    """
    batch, _, _, num_heads, *_ = static.shape
    block_q, block_k = static.sizes.block_q, static.sizes.block_k
    query_tiles, key_tiles, query_step, key_step, windows = _geometry(static)
    diagonals = (query_tiles - 1) * query_step + (key_tiles - 1) * key_step + 1

    def output(*block):
        zeros = (0,) * len(block)
        return (
            ((batch, num_heads, diagonals, *block), static.dtype),
            pl.BlockSpec((None, None, None, *block), lambda d, h, b: (b, h, d, *zeros)),
        )

    _, *sums = call_kernel(
        lambda static, *refs: _offset_kernel(static, name, interpret, *refs),
        static,
        (diagonals, num_heads, batch),
        arrays,
        specs,
        [output(block_q, block_k), *[output(block_k)] * windows],
        interpret,
        f"flash_attention_backward_{name.replace('/', '_')}",
    )
    given = static.inputs[static.names.index(name)]
    shared = tuple(axis for axis in (0, 1) if not given.reads[axis])
    sums = [jnp.sum(x, axis=shared, keepdims=True) for x in sums]
    return _folded(_joined(sums, key_step), given, -(query_tiles - 1) * block_q - (windows - 1) * block_k)


def _joined(sums, key_step: int) -> jax.Array:
    """Sums by offset `[..., offsets]` from those of overlapping windows `[..., diagonals, Bk]`."""
    diagonals, width = sums[0].shape[-2:]
    step = width // key_step
    parts = [x.reshape(*x.shape[:-1], key_step, step) for x in sums]
    total = jnp.zeros((*sums[0].shape[:-2], diagonals - 1 + key_step * len(sums), step), sums[0].dtype)
    for window, part in enumerate(reversed(parts)):
        for n in range(key_step):
            start = window * key_step + n
            total = total.at[..., start : start + diagonals, :].add(part[..., n, :])
    return total.reshape(*total.shape[:-2], -1)


def _folded(sums, given: TileInput, first: int) -> jax.Array:
    """The table's cotangent from sums by offset, from offset `first` on; those beyond its ends belong to the ends."""
    assert given.center is not None
    size = given.array.shape[3]
    entry = np.clip(first + np.arange(sums.shape[-1]) + given.center, 0, size - 1)
    low, high = int(entry[0]), int(entry[-1])
    whole = functools.partial(jnp.sum, axis=-1, keepdims=True)
    if low == high:
        inner = whole(sums)
    else:
        begin, end = int((entry == low).sum()), int((entry < high).sum())
        inner = jnp.concatenate([whole(sums[..., :begin]), sums[..., begin:end], whole(sums[..., end:])], -1)
    return jnp.pad(inner, [(0, 0), (0, 0), (low, size - 1 - high)])[:, :, None]
