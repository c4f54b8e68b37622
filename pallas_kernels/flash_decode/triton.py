"""Split-key attention of one query for Triton.

One program a batch row, key head and part of the keys: its tile holds all query heads of the group, so keys and values
are read once. Tiles of keys that no head sees are not read.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.flash_attention.pipeline import Pipeline, Place, TileInput
from pallas_kernels.flash_attention.sizes import padded
from pallas_kernels.flash_attention.triton_tiles import gather, input_spec, keep_rows, load_rows, whole_spec
from pallas_kernels.flash_decode.joining import join
from pallas_kernels.flash_decode.pages import Pages, check_block, pages_of

PROGRAMS = 264
"""Programs that keep a large GPU busy: two for each of its multiprocessors."""


@dataclasses.dataclass(frozen=True)
class Static:
    """Everything about a kernel that is known when it is built."""

    pipeline: Pipeline
    block_k: int
    tiles: int  # of keys that one program visits, at most
    shape: tuple[int, int, int, int, int]  # S, N, K, D, Dv
    pages: Pages
    scale: float
    precision: Any
    names: tuple[str, ...]
    inputs: tuple[TileInput, ...]  # without arrays
    dtype: Any

    @property
    def group(self) -> int:
        """Query heads a key head."""
        return self.shape[1] // self.shape[2]


def choose_splits(batch: int, kv_heads: int, tiles: int) -> int:
    """Parts that the keys are split into, so that there are programs enough and none is empty.

    Example:
        >>> choose_splits(1, 8, 64), choose_splits(64, 8, 64)
        (32, 1)
    """
    wanted = max(1, min(tiles, PROGRAMS // (batch * kv_heads)))
    return -(-tiles // -(-tiles // wanted))


def _tile_input(given: TileInput, ref, place: Place, columns: int, tiles: Mapping[str, Any]):
    """What a tile reads of an input: `[heads|1, Bk|1]`, or a scalar, or a function that reads entries."""
    if given.gathered:
        return gather(given, ref)
    _, of_heads, _, of_columns = given.reads
    index = [place.h] if of_heads else []
    if given.center is not None:
        size = given.array.shape[3]
        offset = tiles.get("key_positions", place.column) - tiles.get("query_positions", place.row) + given.center
        index.append(jnp.clip(offset, 0, size - 1))
        return plgpu.load(ref.at[tuple(jnp.broadcast_arrays(*index))])
    if of_columns:
        index.append(jnp.minimum(place.column, columns - 1))
    if not index:
        return ref[...]
    return plgpu.load(ref.at[tuple(jnp.broadcast_arrays(*index))])


def _kernel(static: Static, query_ref, key_ref, value_ref, live_ref, *rest):
    of_pages = 1 if static.pages.shared else 0
    table_ref, input_refs, (out_ref, lse_ref) = rest[:of_pages], rest[of_pages:-2], rest[-2:]
    source, _, _, head_dim, value_dim = static.shape
    split, kv_head, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    heads = out_ref.shape[0]
    member = jnp.arange(heads, dtype=jnp.int32)[:, None]
    head = kv_head * static.group + jnp.minimum(member, static.group - 1)
    query = load_rows(query_ref, (), kv_head, 0, heads, static.group, head_dim)
    softmax = static.pipeline.phi is None
    state = (
        jnp.full((heads,), -jnp.inf if softmax else 0.0, static.dtype),
        jnp.zeros((heads,), static.dtype),
        jnp.zeros((heads, out_ref.shape[-1]), static.dtype),
    )

    def tile(j, state):
        maximum, total, weighted = state
        start = j * static.block_k
        column = (start + jnp.arange(static.block_k, dtype=jnp.int32))[None, :]
        place = Place(b, head, jnp.zeros_like(member), column)
        tiles: dict[str, Any] = {}
        for n in sorted(range(len(input_refs)), key=lambda n: static.inputs[n].center is not None):
            tiles[static.names[n]] = _tile_input(static.inputs[n], input_refs[n], place, source, tiles)
        visible = jnp.broadcast_to(static.pipeline.visible(place, tiles), (heads, static.block_k)) & (column < source)
        page, part = static.pages.tile(b, j, static.block_k, lambda n: table_ref[0][n])
        first = part * static.block_k
        key = load_rows(key_ref, (page,), kv_head, first, static.block_k, static.pages.size, head_dim)
        value = load_rows(value_ref, (page,), kv_head, first, static.block_k, static.pages.size, value_dim)
        if static.pipeline.guard:
            seen = jnp.max(visible.astype(jnp.int32), axis=0)[:, None]
            key, value = keep_rows(key, seen), keep_rows(value, seen)
        products = plgpu.dot(query, key, trans_b=True, precision=static.precision) * static.scale
        if not softmax:
            weights, raw = static.pipeline.weights(products, visible, place, tiles, None)
            added = plgpu.dot(weights.astype(value.dtype), value, precision=static.precision)
            return maximum, total + raw.sum(1), weighted + added
        logits = jnp.where(visible, static.pipeline.logits(products, visible, place, tiles), -jnp.inf)
        new = jnp.maximum(maximum, jnp.max(logits, axis=1))
        shift = jnp.where(new == -jnp.inf, 0.0, new)
        raw, decay = jnp.exp(logits - shift[:, None]), jnp.exp(maximum - shift)
        weights = raw if static.pipeline.drop is None else static.pipeline.drop(raw, place, tiles)
        added = plgpu.dot(weights.astype(value.dtype), value, precision=static.precision)
        return new, total * decay + jnp.sum(raw, axis=1), weighted * decay[:, None] + added

    def visit(m, state):
        j = split * static.tiles + m
        return jax.lax.fori_loop(0, jnp.minimum(live_ref[j], 1), lambda _, state: tile(j, state), state)

    maximum, total, weighted = jax.lax.fori_loop(0, static.tiles, visit, state)
    if softmax:
        alive = total != 0.0
        safe = jnp.where(alive, total, 1.0)
        total = jnp.where(alive, maximum + jnp.log(safe), -jnp.inf)
        weighted = weighted / safe[:, None]
    out_ref[...] = weighted
    lse_ref[...] = total


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
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention of one query, and its log-sum-exp (pointwise: the unscaled sums, and the sums of unnormalized weights).

    Args:
        query: `[B, 1, N, D]`.
        key: `[B, S, K, D]`, K divides N; or a pool `[P, page, K, D]`, and S is M times the page below.
        value: `[B, S, K, Dv]`, or a pool `[P, page, K, Dv]`.
        live: which tiles of keys some head sees, int32 `[B|1, ceil(S / block_k)]`.
        inputs: what tiles read besides, by name, as in `pallas_kernels.flash_attention`.
        pipeline: what happens between the products; `place.h` holds one head a row.
        block_k: keys of a tile.
        scale: of the logits.
        block_table: int32 `[B, M]`: token t of row b is token t % page of the pool's page `block_table[b, t // page]`.
            Entries without a live tile are not read.
        precision: of the products of float32.
        splits: parts of the keys; chosen by the number of programs if not given.
        interpret: whether to run in Pallas' interpreter.

    Returns:
        `[B, 1, N, Dv]` and `[B, N, 1]`, float32 at least; -inf where nothing is seen.

    Raises:
        ValueError: tiles of keys that do not divide the pages.
    """
    batch, _, num_heads, head_dim = query.shape
    pages, source = pages_of(key, block_table)
    check_block(pages, block_k)
    kv_heads, value_dim = value.shape[2:]
    group, tiles = num_heads // kv_heads, pl.cdiv(source, block_k)
    parts = choose_splits(batch, kv_heads, tiles) if splits is None else splits
    each = pl.cdiv(tiles, parts)
    live = jnp.pad(live, ((0, 0), (0, parts * each - tiles)))
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    bare = tuple(dataclasses.replace(x, array=jax.typeof(x.array)) for x in inputs.values())
    shape = (source, num_heads, kv_heads, head_dim, value_dim)
    static = Static(pipeline, block_k, each, shape, pages, scale, precision, tuple(inputs), bare, dtype)
    # Heads of a group as rows of one tile: [B, group, K, D].
    grouped = jnp.swapaxes(query.reshape(batch, kv_heads, group, head_dim), 1, 2)
    of_rows = [live] if block_table is None else [live, block_table]
    arrays = [grouped, key, value, *of_rows, *(x.array for x in inputs.values())]
    specs = [whole_spec(grouped, padded(head_dim)), _pool_spec(key), _pool_spec(value)]
    specs += [whole_spec(x) for x in of_rows] + [input_spec(x) for x in inputs.values()]
    rows, lanes = padded(group), padded(value_dim)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, static),
        grid=(parts, kv_heads, batch),
        in_specs=specs,
        out_specs=[
            pl.BlockSpec((None, None, None, rows, lanes), lambda s, k, b: (b, k, s, 0, 0)),
            pl.BlockSpec((None, None, None, rows), lambda s, k, b: (b, k, s, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, kv_heads, parts, rows, lanes), dtype),
            jax.ShapeDtypeStruct((batch, kv_heads, parts, rows), dtype),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="flash_decode",
    )(*arrays)
    out, lse = join(out[..., :group, :value_dim], lse[..., :group], pipeline.phi is None)
    return out.reshape(batch, 1, num_heads, value_dim), lse.reshape(batch, num_heads, 1)


def _pool_spec(pool) -> pl.BlockSpec:
    """All of a pool, the last axis filled up."""
    return pl.BlockSpec((*pool.shape[:-1], padded(pool.shape[-1])), lambda *_: (0,) * pool.ndim)
