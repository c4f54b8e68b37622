"""Split-key attention of one query for TPUs.

A step of the grid takes a tile of keys with all key heads: caches `[B, S, K, D]` and pools `[P, page, K, D]` are read
as they lie, since turning heads outwards would copy the whole cache for every token. The query heads of a key head are
rows of one tile, filled up to a multiple of 8. Each batch row walks its own list of live tiles; the list, its length
and the table of pages lie in scalar memory and say which block is fetched, and steps beyond the end of a list name the
last block again, so that nothing is fetched for them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention.pipeline import Pipeline, Place, TileInput
from pallas_kernels.flash_attention.tpu_tiles import dot_precision
from pallas_kernels.flash_decode.joining import join
from pallas_kernels.flash_decode.pages import Pages, check_block, pages_of

SUBLANES, LANES = 8, 128
MOST_KEYS = 256
"""Keys of a tile at most: with 8 heads of 128 channels half a megabyte, whose transfer outlasts the start of a step."""
TILE_BYTES = 4 << 20
"""Of the tiles of keys and values, two of each; the 16 MB that a kernel may ask for hold what is made of them, too."""
SCALAR_BYTES = (1 << 20) - (16 << 10)
"""Of lists and tables, in the 1 MB of scalar memory that every TPU has."""


@dataclasses.dataclass(frozen=True)
class Static:
    """Everything about a kernel that is known when it is built."""

    pipeline: Pipeline
    block_k: int
    steps: int  # of one part of the keys
    source: int
    kv_heads: int
    group: int  # query heads a key head
    rows: int  # that they are filled up to
    pages: Pages
    scale: float
    precision: Any
    names: tuple[str, ...]
    one_list: bool  # of live tiles, for all batch rows
    dtype: Any

    def tile(self, b, part, step, order_ref, count_ref):
        """Which tile of keys a step takes, and whether it is one that was not taken before."""
        row = 0 if self.one_list else b
        m = part * self.steps + step
        count = count_ref[row]
        return order_ref[row, jnp.maximum(jnp.minimum(m, count - 1), 0)], m < count

    def block(self, b, part, step, order_ref, count_ref, *table_ref):
        """The block of the pool that a step takes."""
        j, _ = self.tile(b, part, step, order_ref, count_ref)
        return *self.pages.tile(b, j, self.block_k, lambda n: table_ref[0][b, n]), 0, 0


def tile_keys(kv_heads: int, head_dim: int, value_dim: int, itemsize: int) -> int:
    """Keys of a tile, a power of two, so that two tiles of keys and of values fit.

    Example:
        >>> tile_keys(8, 128, 128, 2), tile_keys(32, 256, 256, 4)
        (256, 32)
    """
    lanes = sum(-(-width // LANES) * LANES for width in (head_dim, value_dim))
    each = 2 * -(-kv_heads // SUBLANES) * SUBLANES * lanes * itemsize
    return min(MOST_KEYS, 1 << (TILE_BYTES // each).bit_length() - 1)


def check_scalars(scalars: Sequence[Any], block_k: int) -> None:
    """ValueError where lists and tables, whose length goes with 1 / block_k, do not fit in scalar memory."""
    padded = [-(-x.shape[0] // SUBLANES) * SUBLANES * -(-x.shape[1] // LANES) * LANES for x in scalars if x.ndim == 2]
    needed = sum(padded) * 4
    if needed > SCALAR_BYTES:
        factor = 1 << (-(-needed // SCALAR_BYTES) - 1).bit_length()
        raise ValueError(
            f"lists of live tiles and the table of pages take {needed} bytes of scalar memory, of which there are "
            f"{SCALAR_BYTES}: tiles (and pages) of {factor * block_k} keys in place of {block_k} would do, or a batch "
            f"in {factor} parts"
        )


def _columns_of(seen):
    """A row `[1, n]` as a column `[n, 1]`; by its diagonal, since short rows have no transpose."""
    size = seen.shape[1]
    diagonal = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0) == jax.lax.broadcasted_iota(
        jnp.int32, (size, size), 1
    )
    return jnp.sum(jnp.where(diagonal, seen, 0), axis=1, keepdims=True)


def _kernel(static: Static, order_ref, count_ref, *rest):
    refs = rest[1:] if static.pages.shared else rest
    query_ref, key_ref, value_ref, *input_refs, out_ref, lse_ref, maximum_ref, total_ref = refs
    b, part, step = (pl.program_id(axis) for axis in range(3))
    softmax = static.pipeline.phi is None

    @pl.when(step == 0)
    def _start():
        maximum_ref[...] = jnp.full(maximum_ref.shape, -jnp.inf if softmax else 0.0, static.dtype)
        total_ref[...] = jnp.zeros(total_ref.shape, static.dtype)
        out_ref[...] = jnp.zeros(out_ref.shape, static.dtype)

    j, live = static.tile(b, part, step, order_ref, count_ref)

    @pl.when(live)
    def _add():
        heads = [slice(k * static.rows, (k + 1) * static.rows) for k in range(static.kv_heads)]
        place, tiles, visible = _look(static, b, j, input_refs)
        products = [_dot(static, query_ref[0, own], key_ref[0, :, k, :], ((1,), (1,))) for k, own in enumerate(heads)]
        products = jnp.concatenate(products, axis=0) * static.scale
        if softmax:
            logits = jnp.where(visible, static.pipeline.logits(products, visible, place, tiles), -jnp.inf)
            new = jnp.maximum(maximum_ref[...], jnp.max(logits, axis=1, keepdims=True))
            shift = jnp.where(new == -jnp.inf, 0.0, new)
            raw, decay = jnp.exp(logits - shift), jnp.exp(maximum_ref[...] - shift)
            weights = raw if static.pipeline.drop is None else static.pipeline.drop(raw, place, tiles)
            maximum_ref[...] = new
        else:
            weights, raw = static.pipeline.weights(products, visible, place, tiles, None)
            decay = 1.0
        total_ref[...] = total_ref[...] * decay + jnp.sum(raw, axis=1, keepdims=True)
        added = []
        for k, own in enumerate(heads):
            value = value_ref[0, :, k, :]
            if static.pipeline.guard or static.source % static.block_k:
                seen = jnp.max(jnp.where(visible[own], 1, 0), axis=0, keepdims=True)
                value = jnp.where(_columns_of(seen) != 0, value, jnp.zeros_like(value))
            added.append(_dot(static, weights[own].astype(value.dtype), value, ((1,), (0,))))
        out_ref[0, 0] = out_ref[0, 0] * decay + jnp.concatenate(added, axis=0)

    @pl.when(step == static.steps - 1)
    def _finish():
        total = total_ref[...]
        if softmax:
            alive = total != 0.0
            safe = jnp.where(alive, total, 1.0)
            out_ref[0, 0] = out_ref[0, 0] / safe
            total = jnp.where(alive, maximum_ref[...] + jnp.log(safe), -jnp.inf)
        lse_ref[0, 0] = total


def _look(static: Static, b, j, input_refs):
    """Place, inputs and visible pairs of a tile: `[K rows, block_k]`."""
    shape = (static.kv_heads * static.rows, static.block_k)
    row = jax.lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0)
    # Not `//` and `%`: kernels would look at the signs.
    rows = jnp.asarray(static.rows, jnp.int32)
    member = jnp.minimum(jax.lax.rem(row, rows), static.group - 1)
    column = j * static.block_k + jax.lax.broadcasted_iota(jnp.int32, (1, shape[1]), 1)
    place = Place(b, jax.lax.div(row, rows) * static.group + member, jnp.zeros_like(row), column)
    tiles = {name: ref[0, 0] for name, ref in zip(static.names, input_refs, strict=True)}
    visible = static.pipeline.visible(place, tiles) & (column < static.source)
    return place, tiles, jnp.broadcast_to(visible, shape)


def _dot(static: Static, left, right, contracted):
    precision = dot_precision(static.precision, left.dtype)
    return jax.lax.dot_general(
        left, right, (contracted, ((), ())), precision=precision, preferred_element_type=static.dtype
    )


def _in_rows(array, static: Static):
    """`[B, N, ...]` as `[B, K rows, ...]`: the heads of a group one after the other, the last one repeated."""
    batch, heads, *rest = array.shape
    grouped = array.reshape(batch, static.kv_heads, heads // static.kv_heads, *rest)
    pad = [(0, 0), (0, 0), (0, static.rows - static.group), *[(0, 0)] * len(rest)]
    return jnp.pad(grouped, pad, mode="edge").reshape(batch, -1, *rest)


def _in_tiles(given: TileInput, static: Static, tiles: int, positions):
    """An input as `[B|1, tiles|1, K rows|1, block_k|1]`, so that a block is a tile of whole axes."""
    array = given.array
    if given.center is not None:
        # For one query a table is as large as what is read of it.
        offset = jnp.clip(positions[1] - positions[0] + given.center, 0, array.shape[3] - 1)
        batch, heads = max(array.shape[0], offset.shape[0]), array.shape[1]
        table = jnp.broadcast_to(array, (batch, heads, 1, array.shape[3]))
        array = jnp.take_along_axis(table, jnp.broadcast_to(offset, (batch, heads, 1, offset.shape[3])), axis=3)
    if array.dtype.itemsize < 4:
        wide = jnp.float32 if jnp.issubdtype(array.dtype, jnp.floating) else jnp.int32
        array = array.astype(wide)
    array = array[:, :, 0]
    array = _in_rows(array, static) if array.shape[1] != 1 else array
    if array.shape[2] == 1:
        return array[:, None]
    array = jnp.pad(array, ((0, 0), (0, 0), (0, tiles * static.block_k - array.shape[2])))
    return jnp.swapaxes(array.reshape(*array.shape[:2], tiles, static.block_k), 1, 2)


def _input_spec(array, static: Static) -> pl.BlockSpec:
    def index(b, part, step, order_ref, count_ref, *_):
        j, _ = static.tile(b, part, step, order_ref, count_ref)
        return b if array.shape[0] != 1 else 0, j if array.shape[1] != 1 else 0, 0, 0

    return pl.BlockSpec((1, 1, *array.shape[2:]), index)


def forward(
    query,
    key,
    value,
    live,
    inputs: Mapping[str, TileInput],
    pipeline: Pipeline,
    block_k: int,
    *,
    scale: float,
    block_table: jax.Array | None = None,
    precision: Any = None,
    splits: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention of one query, and its log-sum-exp (pointwise: the unscaled sums, and the sums of unnormalized weights).

    Args:
        query: `[B, 1, N, D]`.
        key: `[B, S, K, D]`, K divides N; or a pool `[P, page, K, D]`, and S is M times the page below.
        value: `[B, S, K, Dv]`, or a pool `[P, page, K, Dv]`.
        live: which tiles of keys some head sees, int32 `[B|1, ceil(S / block_k)]`.
        inputs: what tiles read besides, by name, as in `pallas_kernels.flash_attention`.
        pipeline: what happens between the products; `place.h` holds one head a row.
        block_k: keys of a tile; see `tile_keys`.
        scale: of the logits.
        block_table: int32 `[B, M]`: token t of row b is token t % page of the pool's page `block_table[b, t // page]`.
            Entries without a live tile are not read, unless a row has no live tile at all.
        precision: of the products of float32.
        splits: parts of the keys, for cores that work side by side; two for a single batch row if not given.
        interpret: whether to run in Pallas' interpreter, or `pltpu.InterpretParams`.

    Returns:
        `[B, 1, N, Dv]` and `[B, N, 1]`, float32 at least; -inf where nothing is seen.

    Raises:
        ValueError: tiles of keys that do not divide the pages, or more of them than scalar memory can list.
    """
    batch, _, num_heads, head_dim = query.shape
    pages, source = pages_of(key, block_table)
    check_block(pages, block_k)
    kv_heads, value_dim = value.shape[2:]
    group, tiles = num_heads // kv_heads, pl.cdiv(source, block_k)
    parts = min(tiles, 2 if batch == 1 else 1) if splits is None else splits
    static = Static(
        pipeline=pipeline,
        block_k=block_k,
        steps=pl.cdiv(tiles, parts),
        source=source,
        kv_heads=kv_heads,
        group=group,
        rows=pl.cdiv(group, SUBLANES) * SUBLANES,
        pages=pages,
        scale=scale,
        precision=precision,
        names=tuple(inputs),
        one_list=live.shape[0] == 1,
        dtype=jnp.promote_types(query.dtype, jnp.float32),
    )
    rows = kv_heads * static.rows
    positions = (
        inputs["query_positions"].array if "query_positions" in inputs else jnp.zeros((1,) * 4, jnp.int32),
        inputs["key_positions"].array if "key_positions" in inputs else jnp.arange(source).reshape(1, 1, 1, -1),
    )
    arrays = [_in_tiles(x, static, tiles, positions) for x in inputs.values()]
    order = jnp.argsort(live == 0, axis=1, stable=True).astype(jnp.int32)
    scalars = [order, (live != 0).sum(1, dtype=jnp.int32)]
    scalars += [] if block_table is None else [block_table.astype(jnp.int32)]
    check_scalars(scalars, block_k)

    def of_row(b, part, step, *_):
        return b, part, 0, 0

    out, lse = pl.pallas_call(
        functools.partial(_kernel, static),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, parts, static.steps),
            in_specs=[
                pl.BlockSpec((1, rows, head_dim), lambda b, *_: (b, 0, 0)),
                *(pl.BlockSpec((1, block_k, *x.shape[2:]), static.block) for x in (key, value)),
                *(_input_spec(x, static) for x in arrays),
            ],
            out_specs=[pl.BlockSpec((1, 1, rows, value_dim), of_row), pl.BlockSpec((1, 1, rows, 1), of_row)],
            scratch_shapes=[pltpu.VMEM((rows, 1), static.dtype)] * 2,
        ),
        out_shape=[jax.ShapeDtypeStruct((batch, parts, rows, width), static.dtype) for width in (value_dim, 1)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="flash_decode",
    )(*scalars, _in_rows(query[:, 0], static), key, value, *arrays)
    out, lse = (
        jnp.swapaxes(x.reshape(batch, parts, kv_heads, static.rows, -1)[:, :, :, :group], 1, 2) for x in (out, lse)
    )
    out, lse = join(out, lse[..., 0], pipeline.phi is None)
    return out.reshape(batch, 1, num_heads, value_dim), lse.reshape(batch, num_heads, 1)
