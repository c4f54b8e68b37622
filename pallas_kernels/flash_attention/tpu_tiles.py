"""What the forward and the backward kernels for TPUs share: the walk over live tiles, and what a tile reads.

Arrays have their heads before their rows, since the last two axes of a block are what the vector memory lays out.
Numbers a row come as `[..., 1, T]`: an axis of one at the end would be stored 128 times as large.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention.pipeline import Pipeline, Place, TileInput, result_shape
from pallas_kernels.flash_attention.steps import BITS, FIRST, FULL, LAST, PARTIAL, make_steps
from pallas_kernels.flash_attention.tpu_sizes import LANES, SCALAR_MEMORY, TpuTiles


@dataclasses.dataclass(frozen=True)
class Static:
    """Everything about a kernel that is known when it is built."""

    pipeline: Pipeline
    shape: tuple[int, int, int, int, int, int, int]  # B, T, S, N, K, D, Dv
    blocks: tuple[int, int]
    scale: float
    precision: Any
    inputs: Mapping[str, TileInput]  # without arrays
    dtype: Any  # of sums: float32, and float64 where the interpreter is given that
    kinds: tuple[bool, bool]  # whether there can be whole tiles, and partial ones

    @property
    def group(self) -> int:
        """Query heads a key head."""
        return self.shape[3] // self.shape[4]

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles of queries and of keys."""
        return pl.cdiv(self.shape[1], self.blocks[0]), pl.cdiv(self.shape[2], self.blocks[1])

    @property
    def ragged(self) -> bool:
        """Whether a tile reaches beyond an end, where blocks hold anything."""
        return bool(self.shape[1] % self.blocks[0] or self.shape[2] % self.blocks[1])

    @property
    def window(self) -> int:
        """Entries of an offset table that a tile reads, in whole lanes."""
        return -(-sum(self.blocks) // LANES) * LANES


def make_static(pipeline, sizes: TpuTiles, query, key, value, scale, precision, inputs, code) -> Static:
    """What a kernel knows when it is built, from its arguments."""
    batch, length, num_heads, head_dim = query.shape
    source, kv_heads, value_dim = key.shape[1], key.shape[2], value.shape[3]
    bare = {name: dataclasses.replace(x, array=jax.typeof(x.array)) for name, x in inputs.items()}
    known = isinstance(code, np.ndarray)
    return Static(
        pipeline,
        (batch, length, source, num_heads, kv_heads, head_dim, value_dim),
        (min(sizes.block_q, length), min(sizes.block_k, source)),
        scale,
        precision,
        bare,
        jnp.promote_types(query.dtype, jnp.float32),
        (bool((code == 2).any()), bool((code == 1).any())) if known else (True, True),
    )


@dataclasses.dataclass(frozen=True)
class Walk:
    """The steps of a kernel's grid `[*sets, steps, members]`.

    `locate(x, y, position, member)` is the (batch row, query head, query tile, key tile) of a step. Members are heads
    or batch rows that share the list of tiles and add to one result.
    """

    steps: Any
    sets: tuple[int, int]
    members: int
    locate: Callable[..., tuple[Any, Any, Any, Any]]

    @property
    def grid(self) -> tuple[int, ...]:
        """Sizes of the grid."""
        return (*self.sets, self.steps.shape[2], self.members)

    def step(self, ids, steps_ref):
        """The packed step at the ids of a program, in the lists one after the other."""
        sizes = self.steps.shape
        number = (ids[0] if sizes[0] != 1 else 0) * sizes[1] + (ids[1] if sizes[1] != 1 else 0)
        return steps_ref[number * sizes[2] + ids[2]]

    def place(self, ids, steps_ref):
        """Where a program is."""
        return self.locate(ids[0], ids[1], self.step(ids, steps_ref) >> BITS, ids[3])


def make_walk(code, sets, members: int, locate) -> Walk:
    """A walk over `code` `[1|B, 1|heads, results, tiles]`; lists that scalar memory cannot hold are joined over heads.

    Raises:
        NotImplementedError: even the joined list is too long for the scalar memory.
    """
    steps = make_steps(code)
    if steps.size * 4 > SCALAR_MEMORY:
        raise NotImplementedError(
            f"the TPU kernel keeps the list of tiles in scalar memory: {steps.size * 4} bytes, "
            f"it may take {SCALAR_MEMORY}; larger tiles make it shorter"
        )
    return Walk(jnp.asarray(steps), sets, members, locate)


def split(number, *sizes: int):
    """The digits of a number in a mixed base, the first one unbounded."""
    digits = []
    for size in reversed(sizes):
        # `%` and `//` of jax.numpy round for negative numbers, which costs the scalar unit a dozen instructions.
        digits.append(jax.lax.rem(number, jnp.int32(size)))
        number = jax.lax.div(number, jnp.int32(size))
    return (number, *reversed(digits))


def specs_of(static: Static, walk: Walk):
    """`spec(block, at)`: a block spec whose index is `at(b, h, i, j)`."""

    def spec(block, at):
        return pl.BlockSpec(block, lambda *args: at(*walk.place(args[:4], args[4])))

    return spec


def array_specs(static: Static, walk: Walk, inputs: Mapping[str, TileInput]):
    """Block specs of queries, keys, values and inputs."""
    spec, (bq, bk), group = specs_of(static, walk), static.blocks, static.group
    head_dim, value_dim = static.shape[5:]
    found = [
        spec((None, None, bq, head_dim), lambda b, h, i, j: (b, h, i, 0)),
        spec((None, None, bk, head_dim), lambda b, h, i, j: (b, jax.lax.div(h, jnp.int32(group)), j, 0)),
        spec((None, None, bk, value_dim), lambda b, h, i, j: (b, jax.lax.div(h, jnp.int32(group)), j, 0)),
    ]
    return found + [_input_spec(static, spec, given) for given in inputs.values()]


def _input_spec(static: Static, spec, given: TileInput):
    of_batch, of_heads, of_rows, of_columns = given.reads[:4]
    bq, bk = static.blocks
    lead = lambda b, h: (b if of_batch else 0, h if of_heads else 0)  # noqa: E731
    if given.packed:
        shape = (None, None, None, *given.array.shape[3:])
        return spec(shape, lambda b, h, i, j: (*lead(b, h), i * static.tiles[1] + j, 0, 0))
    if given.center is not None:
        return spec((None, None, 1, table_size(static)), lambda b, h, i, j: (*lead(b, h), 0, 0))
    if given.by_tile:
        tiles = given.array.shape[3]
        number = lambda i, j: (i if of_rows else 0) * tiles + (j if of_columns else 0)  # noqa: E731
        return spec((None, None, None, 1, 1), lambda b, h, i, j: (*lead(b, h), number(i, j), 0, 0))
    if of_rows and not of_columns:
        return spec((None, None, 1, bq), lambda b, h, i, j: (*lead(b, h), 0, i))
    shape = (bq if of_rows else 1, bk if of_columns else 1)
    return spec((None, None, *shape), lambda b, h, i, j: (*lead(b, h), i if of_rows else 0, j if of_columns else 0))


def input_array(static: Static, given: TileInput):
    """The array of an input as the kernel reads it."""
    # TPUs load no float16.
    array = given.array.astype(jnp.float32) if given.array.dtype == jnp.float16 else given.array
    if given.packed:
        return array
    if given.center is not None:
        return widened(static, array, given.center)
    if given.by_tile:
        return array.reshape(*array.shape[:2], -1, 1, 1)
    return jnp.swapaxes(array, 2, 3) if given.reads[2] and not given.reads[3] else array


def table_size(static: Static) -> int:
    """Entries of a table that holds every offset between tiles."""
    (bq, bk), (rows, columns) = static.blocks, static.tiles
    return (rows - 1) * bq + (columns - 1) * bk + static.window


def widened(static: Static, table, center: int):
    """A table `[..., R]` as `[..., table_size]`: entry e is that of the offset e - (padded T), clipped to the ends."""
    offsets = np.arange(table_size(static)) - static.tiles[0] * static.blocks[0] + center
    return jnp.take(table, np.clip(offsets, 0, table.shape[-1] - 1), axis=-1)


def window_start(static: Static, i, j):
    """First entry of a widened table that the tile of `i` and `j` reads: a whole number of lanes."""
    (bq, bk), rows = static.blocks, static.tiles[0]
    return (rows - 1 - i) * bq + j * bk


def window_slice(static: Static, i, j):
    """The entries of a widened table that the tile of `i` and `j` reads."""
    # A single window may be of any blocks; several are whole lanes apart.
    start = 0 if static.tiles == (1, 1) else pl.multiple_of(window_start(static, i, j), LANES)
    return (slice(None), pl.ds(start, static.window))


def _sheared(array, towards: int):
    """Row r rolled by r lanes, to the right or (-1) to the left."""
    rows, width = array.shape
    number = jax.lax.broadcasted_iota(jnp.int32, array.shape, 0)
    for bit in range((rows - 1).bit_length()):
        turned = pltpu.roll(array, towards * (1 << bit) % width, 1)
        array = jnp.where((number >> bit) & 1 == 1, turned, array)
    return array


def skewed(static: Static, window):
    """The tile `[Bq, Bk]` of a window `[1, W]` of a table: entry (r, c) is window[c - r + Bq]."""
    (bq, bk), width = static.blocks, static.window
    start = pltpu.roll(window, (width - bq) % width, 1)
    return _sheared(jnp.broadcast_to(start, (bq, width)), 1)[:, :bk]


def unskewed(static: Static, tile):
    """Transpose of `skewed`: the sums of a tile along its diagonals, `[1, W]`."""
    (bq, bk), width = static.blocks, static.window
    filled = tile if width == bk else jnp.pad(tile, ((0, 0), (0, width - bk)))
    return pltpu.roll(_sheared(filled, -1).sum(0, keepdims=True), bq, 1)


def load_tiles(static: Static, refs, place: Place, i, j, partial: bool) -> dict[str, Any]:
    """All inputs of a tile by name, `[Bq|1, Bk|1]`, numbers in 32 bits at least, 0 beyond the ends."""
    found = {}
    for (name, given), ref in zip(static.inputs.items(), refs, strict=True):
        array = ref[window_slice(static, i, j)] if given.center is not None else ref[...]
        if jnp.issubdtype(array.dtype, jnp.floating):
            array = array.astype(static.dtype)
        elif array.dtype != jnp.uint32:
            array = array.astype(jnp.int32)
        if given.center is not None:
            array = skewed(static, array)
        elif given.packed:
            array = _unpacked(array, static.blocks)
        elif given.reads[2] and not given.reads[3] and not given.by_tile:
            array = array.T
        if partial and given.center is None and not (given.by_tile or given.packed):
            for axis, numbers in ((0, place.row), (1, place.column)):
                if given.reads[2 + axis] and static.shape[1 + axis] % static.blocks[axis]:
                    array = jnp.where(numbers < static.shape[1 + axis], array, 0)
        found[name] = array
    return found


def _unpacked(words, shape: tuple[int, int]):
    """Words of 32 rows `[ceil(Bq / 32), Bk]` as their bits `[Bq, Bk]`."""
    parts = [jnp.broadcast_to(words[n : n + 1], (32, shape[1])) for n in range(words.shape[0])]
    spread = (parts[0] if len(parts) == 1 else jnp.concatenate(parts))[: shape[0]]
    return (spread >> (jax.lax.broadcasted_iota(jnp.int32, shape, 0) & 31)) & 1


def make_place(static: Static, b, h, i, j) -> Place:
    """The place of the tile of query tile `i` and key tile `j`."""
    bq, bk = static.blocks
    row = i * bq + jax.lax.broadcasted_iota(jnp.int32, (bq, 1), 0)
    return Place(b, h, row, j * bk + jax.lax.broadcasted_iota(jnp.int32, (1, bk), 1))


def visible_pairs(static: Static, place: Place, tiles):
    """Which pairs of a partial tile are visible, `[Bq, Bk]`; none beyond the ends."""
    (bq, bk), (_, length, source, *_) = static.blocks, static.shape
    visible = jnp.broadcast_to(static.pipeline.visible(place, tiles), (bq, bk))
    if length % bq:
        visible = visible & (place.row < length)
    if source % bk:
        visible = visible & (place.column < source)
    return visible


def dot(static: Static, left, right, over: tuple[int, int]):
    """The product of two tiles over one axis of each, summed in float32 at least."""
    return jax.lax.dot_general(
        left,
        right,
        (((over[0],), (over[1],)), ((), ())),
        precision=dot_precision(static.precision, left.dtype),
        preferred_element_type=static.dtype,
    )


def dot_precision(precision: Any, dtype: Any) -> Any:
    """The precision to ask for in a product of `dtype`: one that Mosaic has, and as high as what was asked for."""
    if jnp.dtype(dtype).itemsize <= 2:
        # These products are exact; a default that a user has set in JAX must not reach them either.
        return jax.lax.Precision.DEFAULT
    asked = jax.config.jax_default_matmul_precision if precision is None else precision
    return jax.lax.Precision.HIGHEST if asked in _THREE_PASSES else precision


_THREE_PASSES = (jax.lax.Precision.HIGH, "high", "tensorfloat32", "bfloat16_3x")


def seen_keys(static: Static, visible, *arrays):
    """The arrays `[Bk, D]` with 0 in rows that nobody sees."""
    if visible is None or not (static.pipeline.guard or static.ragged):
        return arrays
    # A product, whose sums come out as columns: the largest bit of each column would lie along the wrong axis.
    bits = jnp.where(visible, 1.0, 0.0).astype(jnp.bfloat16)
    ones = jnp.ones((bits.shape[0], LANES), jnp.bfloat16)
    precision = dot_precision(None, bits.dtype)
    sums = jax.lax.dot_general(
        bits, ones, (((0,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
    seen = sums[:, :1] > 0
    return tuple(_kept(x, seen) for x in arrays)


def seen_rows(static: Static, visible, *arrays):
    """The arrays `[Bq, D]` with 0 in rows that see nothing."""
    if visible is None or not (static.pipeline.guard or static.ragged):
        return arrays
    seen = jnp.where(visible, 1.0, 0.0).max(1, keepdims=True) > 0
    return tuple(_kept(x, seen) for x in arrays)


def _kept(array, rows):
    wide = array.astype(jnp.promote_types(array.dtype, jnp.float32))
    return jnp.where(rows, wide, 0).astype(array.dtype)


def on_tiles(static: Static, step, body) -> None:
    """`body(partial)` if the step has a tile."""
    for exists, flag, partial in zip(static.kinds, (FULL, PARTIAL), (False, True), strict=True):
        if exists:
            pl.when((step & flag) != 0)(functools.partial(body, partial))


def is_first(step, member):
    """Whether a step is the first of its result."""
    return ((step & FIRST) != 0) & (member == 0)


def is_last(step, member, members: int):
    """Whether a step is the last of its result."""
    return ((step & LAST) != 0) & (member == members - 1)


def program_ids():
    """The four ids of a program."""
    return tuple(pl.program_id(axis) for axis in range(4))


def call_kernel(kernel, static: Static, walk: Walk, arrays, specs, outputs, scratch, interpret, name: str):
    """Launch a kernel over a walk; `outputs` are pairs of (shape, dtype) and a block spec."""
    shapes, out_specs = zip(*outputs, strict=True)
    semantics = ("parallel", "parallel", "arbitrary", "arbitrary")
    return pl.pallas_call(
        functools.partial(kernel, static, walk),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=walk.grid, in_specs=specs, out_specs=list(out_specs), scratch_shapes=scratch
        ),
        out_shape=[result_shape(shape, dtype, arrays) for shape, dtype in shapes],
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        interpret=interpret,
        name=name,
        # Scalar memory would fill up each list of several to 128 numbers.
    )(walk.steps.reshape(-1), *arrays)
