"""The attention kernels for NVIDIA GPUs from Ampere on, through Pallas and Triton.

Forward: one program a tile of queries and head, online softmax in float32; output and log-sum-exp are kept. Backward:
one program a tile of queries for dQ, one a tile of keys for dK and dV, one a tile of pairs for inputs like a pair bias.
Everything is computed again from Q, K and the log-sum-exp; nothing is added concurrently, so runs agree bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.flash_attention.pipeline import Pipeline, Place, TileInput, TileLists
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

    @property
    def group(self) -> int:
        """Query heads a key head."""
        return self.shape[3] // self.shape[4]


def _static(pipeline, sizes, query, key, value, scale, precision, inputs, lists) -> Static:
    batch, length, num_heads, head_dim = query.shape
    shape = (batch, length, key.shape[1], num_heads, key.shape[2], head_dim, value.shape[3])
    bare = tuple(dataclasses.replace(x, array=jax.typeof(x.array)) for x in inputs.values())
    counts = {f.name: None for f in dataclasses.fields(lists) if not f.metadata.get("static")}
    return Static(pipeline, sizes, shape, scale, precision, tuple(inputs), bare, dataclasses.replace(lists, **counts))


def _rows(ref, head, start, block: int, length: int, width: int):
    """Rows `[block, padded width]` of `[T, N, D]`, 0 beyond the ends."""
    lanes = ref.shape[-1]
    row, lane = start + jnp.arange(block), jnp.arange(lanes)
    inside = [row[:, None] < length] if length % block else []
    inside += [lane[None, :] < width] if lanes != width else []
    part = ref.at[pl.ds(start, block), head, :]
    if not inside:
        return plgpu.load(part)
    mask = functools.reduce(jnp.logical_and, [jnp.broadcast_to(x, (block, lanes)) for x in inside])
    return plgpu.load(part, mask=mask, other=0)


def _row_numbers(ref, head, start, block: int, length: int):
    """Numbers `[block]` of `[N, T]`, 0 beyond the end."""
    part = ref.at[head, pl.ds(start, block)]
    if length % block:
        return plgpu.load(part, mask=start + jnp.arange(block) < length, other=0)
    return plgpu.load(part)


def _tile_input(given: TileInput, ref, place: Place, starts, blocks, lengths, tiles):
    """What a tile reads of an input: `[Bq|1, Bk|1]`, or a scalar."""
    _, of_heads, of_rows, of_columns = given.reads
    head = place.h if of_heads else 0
    if given.center is not None:
        size = given.array.shape[3]
        offset = _positions(tiles, place, 1) - _positions(tiles, place, 0) + given.center
        return plgpu.load(ref.at[head, 0, jnp.clip(offset, 0, size - 1)])
    index: list[Any] = [head]
    inside = []
    for axis, real in enumerate((of_rows, of_columns)):
        index.append(pl.ds(starts[axis], blocks[axis]) if real else 0)
        if real and lengths[axis] % blocks[axis]:
            inside.append((place.row if axis == 0 else place.column) < lengths[axis])
    part = ref.at[tuple(index)]
    shape = (blocks[0] if of_rows else 1, blocks[1] if of_columns else 1)
    if not inside:
        found = plgpu.load(part) if of_rows or of_columns else part[...]
    else:
        mask = functools.reduce(jnp.logical_and, [jnp.broadcast_to(x, shape) for x in inside])
        mask = mask if of_rows and of_columns else mask.reshape(-1)
        found = plgpu.load(part, mask=mask, other=0)
    if not (of_rows or of_columns):
        return found
    return found.reshape(shape)


def _positions(tiles, place: Place, axis: int):
    name = ("query_positions", "key_positions")[axis]
    return tiles[name] if name in tiles else (place.row, place.column)[axis]


def _tiles(static: Static, refs, place: Place, starts):
    """All inputs of a tile by name; positions come first, since tables are read at them."""
    sizes, (_, length, source, *_) = static.sizes, static.shape
    blocks, tiles = (sizes.block_q, sizes.block_k), {}
    order = sorted(range(len(refs)), key=lambda n: static.inputs[n].center is not None)
    for n in order:
        tiles[static.names[n]] = _tile_input(static.inputs[n], refs[n], place, starts, blocks, (length, source), tiles)
    return tiles


def _place(static: Static, b, h, i, j) -> tuple[Place, tuple[Any, Any]]:
    sizes = static.sizes
    starts = (i * sizes.block_q, j * sizes.block_k)
    row = (starts[0] + jnp.arange(sizes.block_q, dtype=jnp.int32))[:, None]
    column = (starts[1] + jnp.arange(sizes.block_k, dtype=jnp.int32))[None, :]
    return Place(b, h, row, column), starts


def _visible(static: Static, place: Place, tiles):
    """Which pairs of a partial tile are visible, `[Bq, Bk]`; none beyond the ends."""
    sizes, (_, length, source, *_) = static.sizes, static.shape
    visible = jnp.broadcast_to(static.pipeline.visible(place, tiles), (sizes.block_q, sizes.block_k))
    if length % sizes.block_q:
        visible = visible & (place.row < length)
    if source % sizes.block_k:
        visible = visible & (place.column < source)
    return visible


def _visit(lists: TileLists, refs, b, h, n, carry, body):
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


def _dot(static: Static, left, right, trans_a: bool = False, trans_b: bool = False):
    return plgpu.dot(left, right, trans_a=trans_a, trans_b=trans_b, precision=static.precision)


def _hidden(static: Static, visible, axis: int, *arrays):
    """The arrays `[rows, D]` with 0 in rows that nobody sees (axis 0) or that see nothing (axis 1)."""
    if visible is None or not static.pipeline.guard:
        return arrays
    seen = jnp.max(visible.astype(jnp.int32), axis=axis)[:, None] > 0
    return tuple(jnp.where(seen, x, jnp.zeros_like(x)) for x in arrays)


def _forward_kernel(static: Static, *refs):
    query_ref, key_ref, value_ref, *rest = refs
    list_refs, input_refs, (out_ref, lse_ref) = rest[:4], rest[4:-2], rest[-2:]
    sizes, (_, length, source, _, _, head_dim, value_dim) = static.sizes, static.shape
    i, h, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    query = _rows(query_ref, h, i * sizes.block_q, sizes.block_q, length, head_dim)
    softmax = static.pipeline.phi is None
    state = (
        jnp.full((sizes.block_q,), -jnp.inf if softmax else 0.0, jnp.float32),
        jnp.zeros((sizes.block_q,), jnp.float32),
        jnp.zeros((sizes.block_q, out_ref.shape[-1]), jnp.float32),
    )

    def tile(j, partial, state):
        maximum, total, weighted = state
        place, starts = _place(static, b, h, i, j)
        tiles = _tiles(static, input_refs, place, starts)
        visible = _visible(static, place, tiles) if partial else None
        key = _rows(key_ref, h // static.group, starts[1], sizes.block_k, source, head_dim)
        value = _rows(value_ref, h // static.group, starts[1], sizes.block_k, source, value_dim)
        (value,) = _hidden(static, visible, 0, value)
        (seen_query,) = _hidden(static, visible, 1, query)
        (key,) = _hidden(static, visible, 0, key)
        products = _dot(static, seen_query, key, trans_b=True) * static.scale
        if not softmax:
            weights, raw = static.pipeline.weights(products, visible, place, tiles, None)
            return maximum, total + raw.sum(1), weighted + _dot(static, weights.astype(value.dtype), value)
        logits = static.pipeline.logits(products, visible, place, tiles)
        if visible is not None:
            logits = jnp.where(visible, logits, -jnp.inf)
        new = jnp.maximum(maximum, jnp.max(logits, axis=1))
        shift = jnp.where(new == -jnp.inf, 0.0, new)
        raw, decay = jnp.exp(logits - shift[:, None]), jnp.exp(maximum - shift)
        weights = raw if static.pipeline.drop is None else static.pipeline.drop(raw, place, tiles)
        return (
            new,
            total * decay + jnp.sum(raw, axis=1),
            weighted * decay[:, None] + _dot(static, weights.astype(value.dtype), value),
        )

    maximum, total, weighted = _visit(static.lists, list_refs, b, h, i, state, tile)
    if softmax:
        alive = total != 0.0
        safe = jnp.where(alive, total, 1.0)
        total = jnp.where(alive, maximum + jnp.log(safe), -jnp.inf)
        weighted = weighted / safe[:, None]
    rows = i * sizes.block_q + jnp.arange(sizes.block_q) < length
    lanes = jnp.arange(out_ref.shape[-1]) < value_dim
    plgpu.store(out_ref, weighted.astype(out_ref.dtype), mask=rows[:, None] & lanes[None, :])
    plgpu.store(lse_ref, total, mask=rows)


def _whole(array, width: int | None = None) -> pl.BlockSpec:
    """Everything of one batch row, `[1, ...] -> [...]`, the last axis filled up to `width`."""
    shape = (None, *array.shape[1:-1], array.shape[-1] if width is None else width)
    if array.shape[0] == 1:
        return pl.BlockSpec(shape, lambda i, h, b: (0,) * len(shape))
    return pl.BlockSpec(shape, lambda i, h, b: (b,) + (0,) * (len(shape) - 1))


def _specs(query, key, value, lists: TileLists, inputs: Mapping[str, TileInput]):
    widths = (padded(query.shape[3]), padded(key.shape[3]), padded(value.shape[3]))
    arrays = [query, key, value]
    specs = [_whole(x, width) for x, width in zip(arrays, widths, strict=True)]
    more = [lists.full_count, lists.full_index, lists.partial_count, lists.partial_index]
    more += [x.array for x in inputs.values()]
    return arrays + more, specs + [_whole(x) for x in more]


def _call(kernel, static: Static, grid, arrays, specs, outputs, interpret: bool, name: str):
    shapes, out_specs = zip(*outputs, strict=True)
    return pl.pallas_call(
        functools.partial(kernel, static),
        grid=grid,
        in_specs=specs,
        out_specs=list(out_specs),
        out_shape=list(shapes),
        compiler_params=plgpu.CompilerParams(num_warps=static.sizes.num_warps, num_stages=static.sizes.num_stages),
        interpret=interpret,
        name=name,
    )(*arrays)


def forward(
    query,
    key,
    value,
    lists: TileLists,
    inputs: Mapping[str, TileInput],
    pipeline: Pipeline,
    sizes: TileSizes,
    *,
    scale: float,
    precision: Any = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention, and the log-sum-exp of its rows (pointwise: the unscaled sums, and the sums of unnormalized weights).

    Args:
        query: `[B, T, N, D]`.
        key: `[B, S, K, D]`; K divides N.
        value: `[B, S, K, Dv]`.
        lists: key tiles of every query tile.
        inputs: what tiles read besides, by name; `query_positions` and `key_positions` replace row and column numbers.
        pipeline: what happens between the products.
        sizes: of tiles.
        scale: of the logits.
        precision: of the products of float32.
        interpret: whether to run in Pallas' interpreter.

    Returns:
        `[B, T, N, Dv]` float32 and `[B, N, T]` float32, -inf for rows that see nothing.
    """
    static = _static(pipeline, sizes, query, key, value, scale, precision, inputs, lists)
    batch, length, _, num_heads, _, _, value_dim = static.shape
    arrays, specs = _specs(query, key, value, lists, inputs)
    block = sizes.block_q
    outputs = [
        (
            jax.ShapeDtypeStruct((batch, length, num_heads, value_dim), jnp.float32),
            pl.BlockSpec((None, block, None, padded(value_dim)), lambda i, h, b: (b, i, h, 0)),
        ),
        (
            jax.ShapeDtypeStruct((batch, num_heads, length), jnp.float32),
            pl.BlockSpec((None, None, block), lambda i, h, b: (b, h, i)),
        ),
    ]
    grid = (pl.cdiv(length, block), num_heads, batch)
    return tuple(_call(_forward_kernel, static, grid, arrays, specs, outputs, interpret, "flash_attention_forward"))


def _pulled(static: Static, products, visible, place: Place, tiles, lse, weighted_ct, total_ct, wanted: Sequence[str]):
    """Weights, and cotangents of the products and of the wanted inputs, from those of weights and of their sums."""

    def weigh(products, chosen):
        return static.pipeline.weights(products, visible, place, {**tiles, **chosen}, lse)

    chosen = {name: tiles[name] for name in wanted}
    (weights, raw), pull = jax.vjp(weigh, products, chosen)
    return weights, pull((weighted_ct, jnp.broadcast_to(total_ct, raw.shape)))


def _row_side(static: Static, refs, h, i):
    """Queries, output cotangents, lse and total cotangents of a tile of rows."""
    query_ref, output_ref, lse_ref, total_ref = refs
    sizes, (_, length, _, _, _, head_dim, value_dim) = static.sizes, static.shape
    start = i * sizes.block_q
    query = _rows(query_ref, h, start, sizes.block_q, length, head_dim)
    output = _rows(output_ref, h, start, sizes.block_q, length, value_dim)
    lse, total = (_row_numbers(ref, h, start, sizes.block_q, length)[:, None] for ref in (lse_ref, total_ref))
    return query, output, lse, total


def _tile_pull(static: Static, key_refs, input_refs, side, b, h, i, j, partial: bool, wanted: Sequence[str]):
    """One tile of the backward pass: rows, keys, weights, and the cotangents of products and wanted inputs."""
    sizes, (_, _, source, _, _, head_dim, value_dim) = static.sizes, static.shape
    query, output, lse, total = side
    place, starts = _place(static, b, h, i, j)
    tiles = _tiles(static, input_refs, place, starts)
    visible = _visible(static, place, tiles) if partial else None
    key = _rows(key_refs[0], h // static.group, starts[1], sizes.block_k, source, head_dim)
    value = _rows(key_refs[1], h // static.group, starts[1], sizes.block_k, source, value_dim)
    key, value = _hidden(static, visible, 0, key, value)
    query, output, total = _hidden(static, visible, 1, query, output, total)
    products = _dot(static, query, key, trans_b=True) * static.scale
    weighted_ct = _dot(static, output, value, trans_b=True)
    lse = lse if static.pipeline.phi is None else None
    weights, (products_ct, inputs_ct) = _pulled(
        static, products, visible, place, tiles, lse, weighted_ct, total, wanted
    )
    return query, output, key, weights, products_ct, inputs_ct


def _query_kernel(static: Static, wanted: Sequence[str], *refs):
    query_ref, key_ref, value_ref, *rest = refs
    list_refs, rest = rest[:4], rest[4:]
    count = len(static.names)
    input_refs, (output_ref, lse_ref, total_ref), outs = rest[:count], rest[count : count + 3], rest[count + 3 :]
    sizes, (_, length, _, _, _, head_dim, _) = static.sizes, static.shape
    i, h, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    side = _row_side(static, (query_ref, output_ref, lse_ref, total_ref), h, i)
    state = (
        jnp.zeros((sizes.block_q, outs[0].shape[-1]), jnp.float32),
        {name: jnp.zeros((sizes.block_q,), jnp.float32) for name in wanted},
    )

    def tile(j, partial, state):
        done = _tile_pull(static, (key_ref, value_ref), input_refs, side, b, h, i, j, partial, wanted)
        _, _, key, _, products_ct, inputs_ct = done
        sums = {name: state[1][name] + _sum_to_rows(inputs_ct[name], sizes.block_q) for name in wanted}
        return state[0] + _dot(static, products_ct.astype(key.dtype), key), sums

    query_ct, sums = _visit(static.lists, list_refs, b, h, i, state, tile)
    rows = i * sizes.block_q + jnp.arange(sizes.block_q) < length
    lanes = jnp.arange(outs[0].shape[-1]) < head_dim
    plgpu.store(outs[0], (query_ct * static.scale).astype(outs[0].dtype), mask=rows[:, None] & lanes[None, :])
    for name, out in zip(wanted, outs[1:], strict=True):
        plgpu.store(out, sums[name], mask=rows)


def _sum_to_rows(cotangent, block: int):
    """Cotangent `[Bq, 1]` or `[1, 1]` of an input as one number a row; a scalar's goes to the first row."""
    if jnp.ndim(cotangent) == 2 and cotangent.shape[0] == block:
        return cotangent.reshape(block).astype(jnp.float32)
    return jnp.where(jnp.arange(block) == 0, cotangent.reshape(()).astype(jnp.float32), 0.0)


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
            side = _row_side(static, (query_ref, output_ref, lse_ref, total_ref), h, i)
            done = _tile_pull(static, (key_ref, value_ref), input_refs, side, b, h, i, j, partial, wanted)
            query, output, _, weights, products_ct, inputs_ct = done
            key_ct, value_ct, sums = state
            key_ct = key_ct + _dot(static, products_ct.astype(query.dtype), query, trans_a=True)
            value_ct = value_ct + _dot(static, weights.astype(output.dtype), output, trans_a=True)
            return key_ct, value_ct, {n: sums[n] + inputs_ct[n].reshape(-1).astype(jnp.float32) for n in wanted}

        zeros = {name: jnp.zeros((sizes.block_k,), jnp.float32) for name in wanted}
        *state, sums = _visit(static.lists, list_refs, b, h, j, (*state, zeros), tile)
        for name, out in zip(wanted, outs[2:], strict=True):
            plgpu.store(out.at[h, pl.ds(j * sizes.block_k, sizes.block_k)], sums[name], mask=columns)
        return tuple(state)

    state = tuple(jnp.zeros((sizes.block_k, out.shape[-1]), jnp.float32) for out in outs[:2])
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
        side = _row_side(static, tuple(r.at[b] for r in (query_ref, output_ref, lse_ref, total_ref)), h, i)
        inputs = [r.at[b if given.reads[0] else 0] for r, given in zip(input_refs, static.inputs, strict=True)]

        def visit(_, total):
            keys = (key_ref.at[b], value_ref.at[b])
            *_, inputs_ct = _tile_pull(static, keys, inputs, side, b, h, i, j, True, (name,))
            return total + inputs_ct[name].astype(jnp.float32)

        return jax.lax.fori_loop(0, jnp.where(code > 0, 1, 0), visit, total)

    total = jnp.zeros((sizes.block_q, sizes.block_k), jnp.float32)
    total = jax.lax.fori_loop(0, batches * heads, one, total)
    rows = i * sizes.block_q + jnp.arange(sizes.block_q) < length
    columns = j * sizes.block_k + jnp.arange(sizes.block_k) < source
    plgpu.store(out, total, mask=rows[:, None] & columns[None, :])


@dataclasses.dataclass(frozen=True)
class Backward:
    """What the backward kernels read beside the forward ones.

    Args:
        output: cotangent of the output (pointwise: of the unscaled sums), `[B, T, N, Dv]`.
        lse: log-sum-exp of the rows `[B, N, T]`, 0 where a row sees nothing; zeros for pointwise normalizers.
        total: cotangent of the sum of unnormalized weights of each row, `[B, N, T]` float32.
        code: class of every tile, `[B|1, N|1, nQ, nK]` int32, 0 where nothing is visible; read for pair inputs.
        columns: the lists seen from the keys: query tiles of every key tile.
    """

    output: Any
    lse: Any
    total: Any
    code: Any
    columns: TileLists


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
    static = _static(pipeline, sizes, query, key, value, scale, precision, inputs, lists)
    batch, length, source, num_heads, kv_heads, head_dim, value_dim = static.shape
    arrays, specs = _specs(query, key, value, lists, inputs)
    more = [given.output, given.lse, given.total]
    more_specs = [_whole(given.output, padded(value_dim)), _whole(given.lse), _whole(given.total)]
    of_columns = [n for n in wanted if inputs[n].reads[3] and not inputs[n].reads[2]]
    of_pairs = [n for n in wanted if inputs[n].reads[3] and inputs[n].reads[2]]
    of_rows = [n for n in wanted if not inputs[n].reads[3]]
    block_q, block_k = sizes.block_q, sizes.block_k

    def side(shape, block):
        return (
            jax.ShapeDtypeStruct(shape, jnp.float32),
            pl.BlockSpec((None, block, None, padded(shape[3])), lambda i, h, b: (b, i, h, 0)),
        )

    row = (
        jax.ShapeDtypeStruct((batch, num_heads, length), jnp.float32),
        pl.BlockSpec((None, None, block_q), lambda i, h, b: (b, h, i)),
    )
    query_ct, *sums = _call(
        lambda static, *refs: _query_kernel(static, of_rows, *refs),
        static,
        (pl.cdiv(length, block_q), num_heads, batch),
        arrays + more,
        specs + more_specs,
        [side(query.shape, block_q), *[row] * len(of_rows)],
        interpret,
        "flash_attention_backward_query",
    )
    found = {n: _reduced(x[..., None], inputs[n]) for n, x in zip(of_rows, sums, strict=True)}

    turned = given.columns
    swapped = [turned.full_count, turned.full_index, turned.partial_count, turned.partial_index]
    column = (
        jax.ShapeDtypeStruct((batch, num_heads, source), jnp.float32),
        pl.BlockSpec((None, num_heads, source), lambda j, h, b: (b, 0, 0)),
    )
    key_ct, value_ct, *sums = _call(
        lambda static, *refs: _key_kernel(static, of_columns, *refs),
        static,
        (pl.cdiv(source, block_k), kv_heads, batch),
        arrays[:3] + swapped + arrays[7:] + more,
        specs[:3] + [_whole(x) for x in swapped] + specs[7:] + more_specs,
        [side(key.shape, block_k), side(value.shape, block_k), *[column] * len(of_columns)],
        interpret,
        "flash_attention_backward_key",
    )
    found |= {n: _reduced(x[:, :, None], inputs[n]) for n, x in zip(of_columns, sums, strict=True)}
    for name in of_pairs:
        found[name] = _pairs(static, name, query, key, value, inputs, given, interpret)
    return query_ct, key_ct, value_ct, {n: found[n].astype(inputs[n].array.dtype) for n in wanted}


def _reduced(cotangent, given: TileInput):
    """Sum `[B, N, T|1, S|1]` over the axes that the input broadcasts over."""
    axes = tuple(axis for axis, real in enumerate(given.reads) if not real)
    return jnp.sum(cotangent, axis=axes, keepdims=True)


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
        return pl.BlockSpec(shape, lambda i, j, n: (0,) * len(shape))

    output = (
        jax.ShapeDtypeStruct((*lead, length, source), jnp.float32),
        pl.BlockSpec((None, None, block_q, block_k), lambda i, j, n: (n // lead[1], n % lead[1], i, j)),
    )
    (found,) = _call(
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
