"""What the forward and the backward kernels for Triton share: loading tiles, visiting lists, and launching."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.flash_attention.pipeline import Pipeline, Place, TileInput, TileLists, result_shape
from pallas_kernels.flash_attention.sizes import TileSizes, padded


@dataclasses.dataclass(frozen=True)
class Static:
    """Everything about a kernel that is known when it is built."""

    pipeline: Pipeline
    sizes: TileSizes
    shape: tuple[int, int, int, int, int, int, int]  # B, T, S, N, K, D, Dv
    scale: float
    precision: Any
    names: tuple[str, ...]
    inputs: tuple[TileInput, ...]  # without arrays
    lists: TileLists  # without arrays
    dtype: Any  # of sums: float32, and float64 where the interpreter is given that

    @property
    def group(self) -> int:
        """Query heads a key head."""
        return self.shape[3] // self.shape[4]


def make_static(pipeline, sizes, query, key, value, scale, precision, inputs, lists) -> Static:
    """What a kernel knows when it is built, from its arguments."""
    batch, length, num_heads, head_dim = query.shape
    shape = (batch, length, key.shape[1], num_heads, key.shape[2], head_dim, value.shape[3])
    bare = tuple(dataclasses.replace(x, array=jax.typeof(x.array)) for x in inputs.values())
    counts = {f.name: None for f in dataclasses.fields(lists) if not f.metadata.get("static")}
    bare_lists = dataclasses.replace(lists, **counts)
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    return Static(pipeline, sizes, shape, scale, precision, tuple(inputs), bare, bare_lists, dtype)


def load_rows(ref, lead, head, start, block: int, length: int, width: int):
    """Rows `[block, padded width]` of `[*lead, T, N, D]`, 0 beyond the ends."""
    lanes = ref.shape[-1]
    row, lane = start + jnp.arange(block), jnp.arange(lanes)
    inside = [row[:, None] < length] if length % block else []
    inside += [lane[None, :] < width] if lanes != width else []
    part = ref.at[(*lead, pl.ds(start, block), head, slice(None))]
    if not inside:
        return plgpu.load(part)
    mask = functools.reduce(jnp.logical_and, [jnp.broadcast_to(x, (block, lanes)) for x in inside])
    return plgpu.load(part, mask=mask, other=0)


def load_numbers(ref, lead, head, start, block: int, length: int):
    """Numbers `[block]` of `[*lead, N, T]`, 0 beyond the end."""
    part = ref.at[(*lead, head, pl.ds(start, block))]
    if length % block:
        return plgpu.load(part, mask=start + jnp.arange(block) < length, other=0)
    return plgpu.load(part)


def gather(given: TileInput, ref):
    """The function that reads entries of a gathered input."""

    def read(*index):
        places = [x for x, real in zip(index, given.reads, strict=True) if real]
        shape = jnp.broadcast_shapes(*(jnp.shape(x) for x in places))
        # Scalars stay scalars, which cost nothing; Triton wants the others alike.
        places = [x if jnp.ndim(x) == 0 else jnp.broadcast_to(x, shape) for x in places]
        return plgpu.load(ref.at[tuple(places)]) if places else ref[...]

    return read


def _tile_input(given: TileInput, ref, lead, place: Place, starts, blocks, lengths, tiles):
    """What a tile reads of an input: `[Bq|1, Bk|1]`, or a scalar, or a function that reads entries."""
    if given.gathered:
        return gather(given, ref)
    of_batch, of_heads, of_rows, of_columns = given.reads
    index: list[Any] = [*(lead if of_batch else ()), *([place.h] if of_heads else [])]
    if given.center is not None:
        size = given.array.shape[3]
        offset = _positions(tiles, place, 1) - _positions(tiles, place, 0) + given.center
        return plgpu.load(ref.at[(*index, jnp.clip(offset, 0, size - 1))])
    if given.by_tile:
        own = zip((of_rows, of_columns), starts, blocks, strict=True)
        index += [jax.lax.div(start, jnp.asarray(block, start.dtype)) for real, start, block in own if real]
        return ref[tuple(index)] if index else ref[...]
    inside = []
    for axis, real in enumerate((of_rows, of_columns)):
        index += [pl.ds(starts[axis], blocks[axis])] if real else []
        if real and lengths[axis] % blocks[axis]:
            inside.append((place.row if axis == 0 else place.column) < lengths[axis])
    if not (of_rows or of_columns):
        return ref[tuple(index)] if index else ref[...]
    part = ref.at[tuple(index)]
    shape = (blocks[0] if of_rows else 1, blocks[1] if of_columns else 1)
    if not inside:
        found = plgpu.load(part)
    else:
        mask = functools.reduce(jnp.logical_and, [jnp.broadcast_to(x, shape) for x in inside])
        mask = mask if of_rows and of_columns else mask.reshape(-1)
        found = plgpu.load(part, mask=mask, other=0)
    return found.reshape(shape)


def _positions(tiles, place: Place, axis: int):
    name = ("query_positions", "key_positions")[axis]
    return tiles[name] if name in tiles else (place.row, place.column)[axis]


def load_tiles(static: Static, refs, lead, place: Place, starts):
    """All inputs of a tile by name; positions come first, since tables are read at them."""
    sizes, (_, length, source, *_) = static.sizes, static.shape
    blocks = (sizes.block_q, sizes.block_k)
    tiles: dict[str, Any] = {}
    order = sorted(range(len(refs)), key=lambda n: static.inputs[n].center is not None)
    for n in order:
        tiles[static.names[n]] = _tile_input(
            static.inputs[n], refs[n], lead, place, starts, blocks, (length, source), tiles
        )
    return tiles


def make_place(static: Static, b, h, i, j) -> tuple[Place, tuple[Any, Any]]:
    """The place of the tile of query tile `i` and key tile `j`, and its first row and column."""
    sizes = static.sizes
    starts = (i * sizes.block_q, j * sizes.block_k)
    row = (starts[0] + jnp.arange(sizes.block_q, dtype=jnp.int32))[:, None]
    column = (starts[1] + jnp.arange(sizes.block_k, dtype=jnp.int32))[None, :]
    return Place(b, h, row, column), starts


def visible_pairs(static: Static, place: Place, tiles):
    """Which pairs of a partial tile are visible, `[Bq, Bk]`; none beyond the ends."""
    sizes, (_, length, source, *_) = static.sizes, static.shape
    visible = jnp.broadcast_to(static.pipeline.visible(place, tiles), (sizes.block_q, sizes.block_k))
    if length % sizes.block_q:
        visible = visible & (place.row < length)
    if source % sizes.block_k:
        visible = visible & (place.column < source)
    return visible


def visit(lists: TileLists, refs, b, h, n, carry, body):
    """`carry = body(other tile, partial, carry)` for the tiles in the lists of tile `n`."""
    full_count, full_index, partial_count, partial_index = refs
    for exists, counts, indices, partial in (
        (lists.any_full, full_count, full_index, False),
        (lists.any_partial, partial_count, partial_index, True),
    ):
        if not exists:
            continue
        head = h if counts.shape[0] != 1 else 0

        def step(m, carry, indices=indices, head=head, partial=partial):
            return body(indices[head, n, m], partial, carry)

        carry = jax.lax.fori_loop(0, counts[head, n], step, carry)
    return carry


def dot(static: Static, left, right, trans_a: bool = False, trans_b: bool = False):
    """A product of two tiles, summed in float32 at least."""
    return plgpu.dot(left, right, trans_a=trans_a, trans_b=trans_b, precision=static.precision)


def without_unseen(static: Static, visible, axis: int, *arrays):
    """The arrays `[rows, D]` with 0 in rows that nobody sees (axis 0) or that see nothing (axis 1)."""
    if visible is None or not static.pipeline.guard:
        return arrays
    seen = jnp.max(visible.astype(jnp.int32), axis=axis)[:, None]
    return tuple(keep_rows(x, seen) for x in arrays)


def computed_once(tile):
    """The tile, which Triton does not compute again in the layout of a product.

    It would do so with long chains of cheap operations, such as dropout's cipher, at a cost in compile time that grows
    beyond all bounds where the product turns the tile; it does not pass a reduction, even of an axis of length one.
    """
    return jnp.max(tile[..., None], axis=-1)


def keep_rows(array, seen):
    """The rows for which `seen` is 1, 0 in place of those for which it is 0.

    With all bits or none: a select would need single bits in the layout of a product, which Triton lacks on Ampere.
    """
    bits = jnp.dtype(f"int{8 * array.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(array, bits) & jnp.broadcast_to(-seen.astype(bits), array.shape), array.dtype
    )


def whole_spec(array, width: int | None = None) -> pl.BlockSpec:
    """Everything of one batch row, `[1, ...] -> [...]`, the last axis filled up to `width`."""
    shape = (None, *array.shape[1:-1], array.shape[-1] if width is None else width)
    if array.shape[0] == 1:
        return pl.BlockSpec(shape, lambda i, h, b: (0,) * len(shape))
    return pl.BlockSpec(shape, lambda i, h, b: (b,) + (0,) * (len(shape) - 1))


def input_spec(given: TileInput) -> pl.BlockSpec:
    """One batch row of an input, or all of a gathered one, without the axes that are one long."""
    if given.gathered:
        return pl.BlockSpec(real_axes(given), lambda *_: (0,) * len(given.reads))
    own = given.reads[0]
    return pl.BlockSpec((None, *real_axes(given)[1:]), lambda i, h, b: (b if own else 0, 0, 0, 0))


def real_axes(given: TileInput) -> tuple[int | None, ...]:
    """The shape of an input, None for axes that are one long; the entries of a table stay, however few."""
    shape = tuple(None if size == 1 else size for size in given.array.shape)
    return shape if given.center is None else (*shape[:3], given.array.shape[3])


def all_specs(query, key, value, lists: TileLists, inputs: Mapping[str, TileInput]):
    """The arrays that every kernel reads, in order, and how each program sees them."""
    widths = (padded(query.shape[3]), padded(key.shape[3]), padded(value.shape[3]))
    arrays = [query, key, value]
    specs = [whole_spec(x, width) for x, width in zip(arrays, widths, strict=True)]
    more = [lists.full_count, lists.full_index, lists.partial_count, lists.partial_index]
    specs += [whole_spec(x) for x in more] + [input_spec(x) for x in inputs.values()]
    return arrays + more + [x.array for x in inputs.values()], specs


def call_kernel(kernel, static: Static, grid, arrays, specs, outputs, interpret: bool, name: str):
    """Launch a kernel; `outputs` are pairs of (shape, dtype) and a block spec."""
    shapes, out_specs = zip(*outputs, strict=True)
    return pl.pallas_call(
        functools.partial(kernel, static),
        grid=grid,
        in_specs=specs,
        out_specs=list(out_specs),
        out_shape=[result_shape(shape, dtype, arrays) for shape, dtype in shapes],
        compiler_params=plgpu.CompilerParams(num_warps=static.sizes.num_warps, num_stages=static.sizes.num_stages),
        interpret=interpret,
        name=name,
    )(*arrays)
