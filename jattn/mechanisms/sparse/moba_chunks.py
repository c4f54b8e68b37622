"""Chunks of keys within segments: who belongs to which, and an order of the keys in which complete chunks are aligned.

The keys of a segment are ranked by position; chunk c of a segment holds ranks c C .. c C + C - 1. Of all chunks at
most floor(S / C) are complete, however many segments there are, and only complete ones are ever chosen: they come
first, in slots u C .. u C + C - 1, so that a choice per chunk is a choice per block of slots. What is left over (the
last, incomplete chunk of each segment) follows, hidden keys have no slot.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jattn.softmax.mask_type import Mask, readable


class ChunkOrder(NamedTuple):
    """The order of the keys and where queries stand in it; the numbers of all segments continue each other.

    Attributes:
        perm: int32 `[B, S]`, key of each slot, -1 = empty.
        rank: int32 `[B, S]`, number of the key in each slot.
        key_own: int32 `[B, S]`, number of the first key of its chunk; -1 for empty slots.
        query_own: int32 `[B, T]`, the same for the chunk that a query is in; -1 for one that sees nothing.
        limit: int32 `[B, T]`, number of the first key that a query does not see.
        query_segment: int32 `[B, T]`, number of the first key of its segment.
        block_start: int32 `[B, ceil(S / C)]`, number of the first key of each block of slots; the largest int if the
            block is no complete chunk.
        block_segment: int32 `[B, ceil(S / C)]`, number of the first key of its segment.
    """

    perm: jax.Array
    rank: jax.Array
    key_own: jax.Array
    query_own: jax.Array
    limit: jax.Array
    query_segment: jax.Array
    block_start: jax.Array
    block_segment: jax.Array


def order_by_chunks(
    query_ids: jax.Array,
    key_ids: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    valid: jax.Array,
    chunk_size: int,
) -> ChunkOrder:
    """Put the keys in the order of their chunks.

    Args:
        query_ids: int `[B, T]`, segments; negative = padding.
        key_ids: int `[B, S]`.
        query_positions: int `[B, T]`.
        key_positions: int `[B, S]`.
        valid: bool `[B, S]`, keys that are there.
        chunk_size: C.

    Returns:
        The order.

    Example:
        >>> ids, places = jnp.array([[0, 0, 0, 1, 1]]), jnp.arange(5)[None]
        >>> order = order_by_chunks(ids, ids, places, places, ids >= 0, 2)
        >>> order.perm.tolist(), order.query_own.tolist()
        ([[0, 1, 3, 4, 2]], [[0, 0, 2, 3, 3]])
    """
    top = jnp.iinfo(jnp.int32).max
    source = key_ids.shape[1]
    ids = jnp.concatenate([jnp.where(valid, key_ids, top), jnp.where(query_ids >= 0, query_ids, top)], 1)
    is_query = jnp.broadcast_to(jnp.arange(ids.shape[1]) >= source, ids.shape)
    # Keys before queries at equal positions: a query's number is then that of the keys up to its own position.
    order = jnp.lexsort((is_query, jnp.concatenate([key_positions, query_positions], 1), ids), axis=-1)
    back = jnp.argsort(order, axis=-1)
    sorted_ids = jnp.take_along_axis(ids, order, 1)
    is_key = (~jnp.take_along_axis(is_query, order, 1)) & (sorted_ids < top)
    number = jnp.cumsum(is_key, axis=1, dtype=jnp.int32)
    changes = sorted_ids[:, 1:] != sorted_ids[:, :-1]
    starts, ends = (jnp.pad(changes, [(0, 0), side], constant_values=True) for side in ((1, 0), (0, 1)))
    first = jax.lax.cummax(jnp.where(starts, number - is_key, -1), axis=1)
    last = jax.lax.cummin(jnp.where(ends, number, top), axis=1, reverse=True)
    number, first, last = (jnp.take_along_axis(x, back, 1) for x in (number, first, last))

    rank, segment = number[:, :source] - 1, first[:, :source]
    own = segment + (rank - segment) // chunk_size * chunk_size
    complete = valid & (own + chunk_size <= last[:, :source])
    kind = jnp.where(complete, 0, jnp.where(valid, 1, 2))
    slots = jnp.lexsort((rank, kind), axis=-1).astype(jnp.int32)
    rank, own, segment, complete, valid = (
        jnp.take_along_axis(x, slots, 1) for x in (rank, own, segment, complete, valid)
    )
    limit, query_segment = number[:, source:], first[:, source:]
    seen = limit - query_segment
    query_own = query_segment + jnp.maximum(seen - 1, 0) // chunk_size * chunk_size
    heads = slice(None, None, chunk_size)
    # The first slot of a block may hold the end of the row's last, incomplete block: only its last slot tells.
    tail = jnp.pad(complete, [(0, 0), (0, -source % chunk_size)])[:, chunk_size - 1 :: chunk_size]
    return ChunkOrder(
        perm=jnp.where(valid, slots, -1),
        rank=rank,
        key_own=jnp.where(valid, own, -1),
        query_own=jnp.where((query_ids >= 0) & (seen > 0), query_own, -1),
        limit=limit,
        query_segment=query_segment,
        block_start=jnp.where(tail, own[:, heads], top),
        block_segment=segment[:, heads],
    )


def chunk_means(ordered: jax.Array, chunk_size: int) -> jax.Array:
    """Means of runs of C keys, in float32 at least and without gradient: `[B, nC C, K, D]` -> `[B, nC, K, D]`."""
    ordered = jax.lax.stop_gradient(ordered)
    ordered = ordered.astype(jnp.promote_types(ordered.dtype, jnp.float32))
    return ordered.reshape(ordered.shape[0], -1, chunk_size, *ordered.shape[2:]).mean(2)


def gates(query: jax.Array, means: jax.Array) -> jax.Array:
    """Q . kbar, `[B, N, T, nC]`, in float32 at least, without gradient."""
    batch, length, num_heads, head_dim = query.shape
    query, means = jax.lax.stop_gradient((query.astype(means.dtype), means))
    grouped = query.reshape(batch, length, means.shape[2], -1, head_dim)
    gate = jnp.einsum("btkgd,bckd->bkgtc", grouped, means, precision=jax.lax.Precision.HIGHEST)
    return gate.reshape(batch, num_heads, length, means.shape[1])


def live_tiles(
    chosen: jax.Array, order: ChunkOrder, chunk_size: int, query_block: int, key_block: int
) -> tuple[jax.Array, jax.Array]:
    """Live and full tiles `[B, N, nQ, nK]`: those that hold chosen chunks, and those where own chunks may meet."""
    length, source = chosen.shape[2], order.perm.shape[1]
    rows, columns = -(-length // query_block), -(-source // key_block)

    def reduced(fill: bool, join: Any) -> jax.Array:
        x = jnp.pad(chosen, [(0, 0), (0, 0), (0, rows * query_block - length), (0, 0)], constant_values=fill)
        x = join(x.reshape(*x.shape[:2], rows, query_block, -1), axis=3)
        # The chunks that a tile of keys touches: one, or several whole ones.
        x = jnp.repeat(x, max(1, chunk_size // key_block), axis=-1)
        per_tile = max(1, key_block // chunk_size)
        x = jnp.pad(x, [(0, 0)] * 3 + [(0, max(0, columns * per_tile - x.shape[-1]))])[..., : columns * per_tile]
        return join(x.reshape(*x.shape[:3], columns, per_tile), axis=-1)

    def extent(own: jax.Array, block: int, count: int) -> tuple[jax.Array, jax.Array]:
        top = jnp.iinfo(jnp.int32).max
        padded = jnp.pad(own, [(0, 0), (0, count * block - own.shape[1])], constant_values=-1)
        padded = padded.reshape(own.shape[0], count, block)
        return jnp.where(padded < 0, top, padded).min(-1), padded.max(-1)

    q_low, q_high = extent(order.query_own, query_block, rows)
    k_low, k_high = extent(order.key_own, key_block, columns)
    meet = (q_low[:, :, None] <= k_high[:, None]) & (k_low[:, None] <= q_high[:, :, None])
    return reduced(False, jnp.any) | meet[:, None], reduced(True, jnp.all)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OwnChunk(Mask):
    """A query sees the keys of its own chunk up to itself, by slot.

    Attributes:
        query_own: int32 `[B, T]`, chunk of each query, -1 = none.
        limit: int32 `[B, T]`, number of the first key that it does not see.
        key_own: int32 `[B, S]`, chunk of the key in each slot, -1 = none.
        rank: int32 `[B, S]`, number of the key in each slot.
    """

    query_own: Any
    limit: Any
    key_own: Any
    rank: Any

    def at(self, b: Any, h: Any, i: Any, j: Any, query_slot: Any, key_slot: Any) -> Any:
        """Visibility by slot."""
        arrays = (self.query_own, self.limit, self.key_own, self.rank)
        query_own, limit, key_own, rank = (readable(x, query_slot, key_slot) for x in arrays)
        row = b if query_own.shape[0] > 1 else 0
        # Slots of a tile may run past the end; whoever masks the padding hides what is read there.
        query = row, jnp.minimum(query_slot, query_own.shape[1] - 1)
        key = row, jnp.minimum(key_slot, key_own.shape[1] - 1)
        own = query_own[query]
        return (own >= 0) & (own == key_own[key]) & (rank[key] < limit[query])
