"""What the passes of the attention kernel for Hopper share: tiles in the matrix unit's layout, inputs, lists, products.

Every tile is `[64, n]`, in the registers of one warpgroup, rows along the first axis. Which side of the logits lies
there is the pass's choice: rows of queries (`turned` False), or keys (`turned` True).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.mosaic_gpu_sizes import CONSUMERS, ROWS, MosaicSizes, rounded
from pallas_kernels.flash_attention.pipeline import Pipeline, Place, TileInput, TileLists, result_shape

MATRIX = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True)
class Static:
    """Everything about a kernel that is known when it is built; arrays are left out of inputs and lists."""

    pipeline: Pipeline
    sizes: MosaicSizes
    shape: tuple[int, int, int, int, int, int, int]  # B, T, S, N, K, D, Dv; T, S, D and Dv as tiles see them
    length: int
    source: int
    scale: float
    names: tuple[str, ...]
    inputs: tuple[TileInput, ...]
    lists: TileLists
    interpret: bool

    @property
    def group(self) -> int:
        """Query heads a key head."""
        return self.shape[3] // self.shape[4]

    @property
    def approximate(self) -> bool:
        """Whether the hardware's approximations are good enough: those of exp2 and log are, that of tanh is not."""
        pipeline = self.pipeline
        return pipeline.modify is None and pipeline.drop is None and pipeline.phi is None


def _fill(array, sizes: Mapping[int, int]):
    pad = [(0, sizes.get(axis, size) - size) for axis, size in enumerate(array.shape)]
    return jnp.pad(array, pad) if any(after for _, after in pad) else array


def held_rows(static: Static, real: int, tiled: int) -> int:
    """How long an axis of rows must be in memory.

    The copy engine fills what it reads beyond an end with 0 and writes nothing there, but moves 8 rows at a time; the
    interpreter's copies do not clip.
    """
    return tiled if static.interpret else rounded(real, 8)


def make_static(pipeline, sizes, query, key, value, scale, inputs, lists, interpret) -> Static:
    """What a kernel knows when it is built, from its arguments."""
    batch, length, num_heads, head_dim = query.shape
    source, kv_heads, value_dim = key.shape[1], key.shape[2], value.shape[3]
    whole = (rounded(length, sizes.block_q), rounded(source, sizes.block_k))
    shape = (batch, *whole, num_heads, kv_heads, rounded(head_dim, 16), rounded(value_dim, 16))
    bare = tuple(dataclasses.replace(x, array=jax.typeof(x.array)) for x in inputs.values())
    counts = {f.name: None for f in dataclasses.fields(lists) if not f.metadata.get("static")}
    bare_lists = dataclasses.replace(lists, **counts)
    return Static(pipeline, sizes, shape, length, source, scale, tuple(inputs), bare, bare_lists, interpret)


def whole_heads(static: Static, array, tiled: int):
    """`[B, T, N, D]` filled up with 0 to what the copy engine can move; `tiled` is T in whole tiles."""
    return _fill(array, {1: held_rows(static, array.shape[1], tiled), 3: rounded(array.shape[3], 16)})


def whole_rows(array, tiled: int):
    """Numbers `[..., T]` of rows as float32, filled up with 0 to whole tiles."""
    return _fill(array.astype(jnp.float32), {array.ndim - 1: tiled})


def input_arrays(static: Static, inputs: Mapping[str, TileInput], turned: Sequence[bool]) -> list[Any]:
    """The arrays of inputs, without their axes of one, whole tiles long; pairs as often and as turned as they are read.

    In both orders a pair's array would be read along its rows; reading against them fetches 32 bytes an element.
    """
    _, length, source, *_ = static.shape
    found = []
    for given in inputs.values():
        array, axes = given.array, given.reads
        sizes = {2: length} if axes[2] else {}
        sizes |= {3: source} if axes[3] else {}
        if given.by_tile:
            sizes = {}
        array = _fill(array, sizes)
        for flip in turned if axes[2] and axes[3] and not given.by_tile else (False,):
            one = array.swapaxes(2, 3) if flip else array
            found.append(one.reshape([size for axis, size in enumerate(one.shape) if axis < 2 or axes[axis]]))
    return found


def iota(static: Static, shape: tuple[int, int], axis: int):
    """Numbers along an axis of a tile."""
    if static.interpret:
        return lax.broadcasted_iota(jnp.int32, shape, axis)
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX)


def constant(static: Static, shape: tuple[int, ...], number: float, dtype: Any = jnp.float32):
    """A tile `[64, n]`, or a vector `[64]` of its rows, of one number."""
    array = jnp.full(shape, number, dtype)
    if static.interpret:
        return array
    return plgpu.layout_cast(array, MATRIX if len(shape) == 2 else MATRIX.reduce(1))


def spread(static: Static, vector, shape: tuple[int, int], axis: int):
    """A vector along `axis` of a tile, as a tile."""
    tile = lax.broadcast_in_dim(vector, shape, (axis,))
    return tile if static.interpret else plgpu.layout_cast(tile, MATRIX)


def load_vector(static: Static, ref, index, axis: int):
    """A vector in memory that runs along `axis` of a tile."""
    if static.interpret:
        return ref[index]
    return plgpu.load(ref, index, layout=MATRIX.reduce(1 - axis), optimized=False)


def load_matrix(static: Static, ref, index):
    """A tile in memory."""
    return ref[index] if static.interpret else plgpu.load(ref, index, layout=MATRIX, optimized=False)


def shared(shape: tuple[int, ...], dtype):
    """Shared memory for tiles `[..., rows, n]` in the layout that the matrix unit reads."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    transforms = (plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def products(static: Static, first, *rest):
    """Several products, issued one behind the other and awaited together.

    Each is (sum so far or its shape, left, right, whether right is turned); left is a tile or shared memory, right is
    shared memory. The last argument may be a function, called when all are issued.
    """
    *tasks, issued = (first, *rest) if callable(rest[-1] if rest else first) else (first, *rest, lambda: None)
    if static.interpret:
        done = []
        for total, left, right, flip in tasks:
            left, right = left[...], right[...]
            product = jnp.dot(left, right.T if flip else right, preferred_element_type=jnp.float32)
            done.append(product if isinstance(total, tuple) else total + product)
        issued()
        return tuple(done)

    def issue(sums):
        for total, (_, left, right, flip) in zip(sums, tasks, strict=True):
            plgpu.wgmma(total, left, plgpu.transpose_ref(right, (1, 0)) if flip else right)
        issued()

    starts = [constant(static, x, 0.0) if isinstance(x, tuple) else x for x, *_ in tasks]
    return pl.run_state(issue)(tuple(plgpu.ACC.init(x) for x in starts))


def with_plain_sums(function, *arrays):
    """`function(*arrays)` with sums in place of `add_any`, which transposition leaves behind and Mosaic GPU lacks."""
    closed = jax.make_jaxpr(function)(*arrays)
    found = _evaluate(closed.jaxpr, closed.consts, arrays)
    return tuple(found)


def _evaluate(jaxpr, consts, arrays):
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arrays), strict=True))
    read = lambda x: x.val if hasattr(x, "val") else known[x]  # noqa: E731
    for equation in jaxpr.eqns:
        given, inner = [read(x) for x in equation.invars], equation.params.get("jaxpr")
        if equation.primitive.name == "add_any":
            done = [given[0] + given[1]]
        elif equation.primitive.name in ("jit", "pjit"):
            done = _evaluate(inner.jaxpr, inner.consts, given)
        else:
            done = equation.primitive.bind(*given, **equation.primitive.get_bind_params(equation.params))
            done = done if equation.primitive.multiple_results else [done]
        known |= zip(equation.outvars, done, strict=True)
    return [read(x) for x in jaxpr.outvars]


def make_place(static: Static, b, h, starts, shape: tuple[int, int], turned: bool) -> Place:
    """The place of a tile that begins at row `starts[0]` and key `starts[1]`."""
    row, column = (start + iota(static, shape, axis ^ turned) for axis, start in enumerate(starts))
    return Place(b, h, row, column)


def load_tiles(static: Static, refs, place: Place, starts, shape: tuple[int, int], turned: bool, both: bool):
    """All inputs of a tile by name, tiles or numbers; with `both`, pairs are there in both orders."""
    tiles: dict[str, Any] = {}
    refs = iter(refs)
    for name, given in zip(static.names, static.inputs, strict=True):
        of_batch, of_heads, of_rows, of_columns = given.reads
        lead = (place.b if of_batch else 0, place.h if of_heads else 0)
        found = [next(refs) for _ in range(2 if both and of_rows and of_columns and not given.by_tile else 1)]
        ref = found[turned] if len(found) == 2 else found[0]
        if given.by_tile:
            blocks = (static.sizes.block_q, static.sizes.block_k)
            own = zip((of_rows, of_columns), starts, blocks, strict=True)
            tiles[name] = ref[(*lead, *(lax.div(start, jnp.int32(block)) for real, start, block in own if real))]
        elif of_rows and of_columns:
            spans = [pl.ds(starts[axis ^ turned], shape[axis]) for axis in range(2)]
            tiles[name] = load_matrix(static, ref, (*lead, *spans))
        elif of_rows or of_columns:
            axis = (1 if of_columns else 0) ^ turned
            span = pl.ds(starts[1 if of_columns else 0], shape[axis])
            tiles[name] = spread(static, load_vector(static, ref, (*lead, span), axis), shape, axis)
        else:
            tiles[name] = ref[lead]
    return tiles


def visible_pairs(static: Static, place: Place, tiles, shape: tuple[int, int]):
    """Which pairs of a partial tile are visible; none beyond the ends."""
    visible = static.pipeline.visible(place, tiles)
    for number, size, real in (
        (place.row, static.shape[1], static.length),
        (place.column, static.shape[2], static.source),
    ):
        if size != real:
            visible = visible & (number < real)
    return jnp.broadcast_to(visible, shape)


def read_tile(static: Static, refs, b, h, starts, shape, turned: bool, partial: bool) -> tuple[Any, Any, Any]:
    """Place and inputs of a tile, and which of its pairs are visible: None in full tiles, all None if nobody asks."""
    if not partial and static.approximate:
        return None, None, None
    place = make_place(static, b, h, starts, shape, turned)
    tiles = load_tiles(static, refs, place, starts, shape, turned, static.pipeline.guard)
    return place, tiles, visible_pairs(static, place, tiles, shape) if partial else None


def find_tile(static: Static, refs, b, h, n):
    """Numbers of full and of all tiles in the lists of tile `n`, and a function from a place in them to the tile."""
    full_count, full_index, partial_count, partial_index = refs
    at = lambda ref: (b if ref.shape[0] != 1 else 0, h if ref.shape[1] != 1 else 0, n)  # noqa: E731
    full = full_count[at(full_count)] if static.lists.any_full else jnp.int32(0)
    count = full + partial_count[at(partial_count)] if static.lists.any_partial else full

    def tile(t):
        if not static.lists.any_partial:
            return full_index[(*at(full_index), t)]
        later = partial_index[(*at(partial_index), jnp.maximum(t - full, 0))]
        if not static.lists.any_full:
            return later
        return jnp.where(t < full, full_index[(*at(full_index), jnp.minimum(t, full_index.shape[3] - 1))], later)

    return full, count, tile


def fill_ring(stages: int, groups, start, count, drained: bool = True):
    """What the loading warpgroup does: `count` rounds of copies into the slots of rings, beginning with round `start`.

    Each group is (copies, filled, freed): copies are pairs of a function from the round, counted from 0, to what is
    copied, and a ring. A slot is filled once both consumers have freed it. `drained` awaits the last releases too.
    """

    def fill(t, _):
        slot = lax.rem(start + t, jnp.int32(stages))
        for copies, filled, freed in groups:
            pl.when(start + t >= stages)(lambda freed=freed: plgpu.barrier_wait(freed.at[slot]))
            for source, ring in copies:
                plgpu.copy_gmem_to_smem(source(t), ring.at[slot], filled.at[slot])

    lax.fori_loop(jnp.int32(0), count, fill, None)
    if drained:
        drain_ring(stages, groups, start + count)


def drain_ring(stages: int, groups, rounds):
    """Await the releases that no later round awaits."""

    def drain(n, _):
        for _, _, freed in groups:
            plgpu.barrier_wait(freed.at[lax.rem(n, jnp.int32(stages))])

    lax.fori_loop(jnp.maximum(rounds - stages, 0), rounds, drain, None)


def hide_rows(static: Static, barrier, thread, refs: Sequence[Any], seen):
    """Put 0 into the rows of shared tiles for which `seen(chunk)` is 0, half of the chunks of 64 rows a warpgroup.

    Afterwards both warpgroups may multiply: what is written here is seen by the matrix units of both.
    """
    for chunk in range(refs[0].shape[0] // ROWS):

        @pl.when(thread == chunk % CONSUMERS)
        def _(chunk=chunk):
            keep = seen(chunk)
            for ref in refs:
                part = ref.at[pl.ds(chunk * ROWS, ROWS)]
                tile = load_matrix(static, part, (slice(None), slice(None)))
                part[...] = jnp.where(spread(static, keep, tile.shape, 0) != 0, tile, jnp.zeros((), tile.dtype))

    plgpu.commit_smem()
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def seen_rows(static: Static, refs, b, h, starts, turned: bool, block: int):
    """For 64 rows of a tile (keys, if turned): 1 where anything among `block` of the other side is visible."""
    _, _, visible = read_tile(static, refs, b, h, starts, (ROWS, block), turned, True)
    return jnp.max(visible.astype(jnp.float32), axis=1)


def launch(body, static: Static, arrays, outputs, scratch, grid: Mapping[str, int], name: str):
    """Run `body(*refs of arrays, outputs and scratch)` in a grid of three warpgroups a program."""
    interpret: Any = None
    if static.interpret:
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

        interpret = InterpretGPUParams(detect_races=True)
    return plgpu.kernel(
        body,
        out_type=[result_shape(x.shape, x.dtype, arrays) for x in outputs],
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=CONSUMERS + 1,
        thread_name="thread",
        # Reductions stay within warps: two consumers could not share the memory that others would pass through.
        compiler_params=plgpu.CompilerParams(approx_math=static.approximate, reduction_scratch_bytes=0),
        interpret=interpret,
        kernel_name=name,
    )(*arrays)
