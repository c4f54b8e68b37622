"""Block layouts from maps of live tiles: the last step of every compiler."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.softmax.layout import BlockLayout, is_concrete, lists_from_live
from jattn.softmax.masks import Mask
from jattn.softmax.topk import topk_mask

__all__ = ["as_four_axes", "check_sizes", "from_block_mask", "make_layout"]


def _module_of(*arrays: Any) -> Any:
    return jnp if any(isinstance(x, jax.Array) for x in arrays) else np


def as_four_axes(name: str, array: Any, dtype: Any = None) -> Any:
    """The array as [Bb, Hb, nQ, nK]; ValueError for another rank or dtype."""
    array = array if isinstance(array, jax.Array) else np.asarray(array)
    if not 2 <= array.ndim <= 4 or (dtype is not None and array.dtype != dtype):
        kind = "" if dtype is None else " boolean"
        raise ValueError(f"{name} must be{kind} [Bb, Hb, nQ, nK] or [nQ, nK]; got {array.dtype}, shape {array.shape}")
    return array.reshape((1,) * (4 - array.ndim) + array.shape)


def check_sizes(query_block: int, key_block: int, **counts: int) -> None:
    """Raises ValueError for a size below 1."""
    for name, size in {"query_block": query_block, "key_block": key_block, **counts}.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {size}")


def _tile_shape(name: str, array: Any, slots: tuple[int, int], blocks: tuple[int, int]) -> None:
    tiles = tuple(-(-s // b) for s, b in zip(slots, blocks, strict=True))
    if array.shape[-2:] != tiles:
        raise ValueError(
            f"{name} has shape {array.shape}; expected {tiles} tiles for {slots[0]} x {slots[1]} slots in tiles of "
            f"{blocks[0]} x {blocks[1]}"
        )


def make_layout(
    live: Any,
    full: Any,
    predicate: Mask | None,
    blocks: tuple[int, int],
    slots: tuple[int, int],
    perms: tuple[Any, Any],
    capacity: int | None,
    forced: Any = None,
    scores: Any = None,
) -> BlockLayout:
    """Makes the lists, cutting rows that exceed the capacity: forced tiles stay first, then the highest scores."""
    tiles = live.shape[-1]
    overflow = None
    if capacity is not None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1; got {capacity}")
        capacity = min(capacity, tiles)
        wanted = _module_of(live).sum(live, axis=-1, dtype=np.int32)
        overflow = _module_of(live).maximum(wanted - capacity, 0)
        if capacity < tiles:
            xp = _module_of(live, scores, forced)
            if scores is None:
                scores = xp.broadcast_to(-xp.arange(tiles), live.shape)
            elif jnp.issubdtype(scores.dtype, jnp.floating):
                # A live tile keeps its place in the order whatever its score, so that `overflow` counts every loss.
                lowest = jnp.finfo(scores.dtype).min
                scores = xp.where(scores > -np.inf, scores, xp.asarray(lowest, scores.dtype))
            first = topk_mask(scores, capacity, allowed=live if forced is None else live & forced)
            if forced is not None:
                rest = xp.maximum(capacity - xp.sum(first, axis=-1, dtype=np.int32), 0)
                first = first | topk_mask(scores, rest, allowed=live & ~forced)
            live = first
        if is_concrete(overflow) and np.asarray(overflow).any():
            most = int(np.asarray(wanted).max())
            raise ValueError(
                f"capacity {capacity} is too small: a row has {most} live tiles (pass capacity={most} or more)"
            )
    count, index, full = lists_from_live(live, full, tiles if capacity is None else capacity)
    return BlockLayout(
        count=count,
        index=index,
        full=full,
        predicate=predicate,
        query_perm=perms[0],
        key_perm=perms[1],
        overflow=overflow,
        query_block=blocks[0],
        key_block=blocks[1],
        query_slots=slots[0],
        key_slots=slots[1],
    ).validate(values=False)


def from_block_mask(
    block_mask: Any,
    predicate: Mask | None = None,
    *,
    query_slots: int,
    key_slots: int,
    query_block: int = 128,
    key_block: int = 128,
    full: Any = None,
    query_perm: Any = None,
    key_perm: Any = None,
    capacity: int | None = None,
    forced: Any = None,
    scores: Any = None,
) -> BlockLayout:
    """Turns a map of live tiles into a block layout.

    full = the given map, or all live tiles if there is no predicate, or none

    Args:
      block_mask: Booleans [Bb, Hb, nQ, nK] or [nQ, nK], True = live.
      predicate: What is allowed in live tiles that are not full; None allows all pairs.
      query_slots: Number of query slots (T if there is no perm).
      key_slots: Number of key slots.
      query_block: Queries a tile.
      key_block: Keys a tile.
      full: Booleans broadcastable to block_mask: tiles that need no predicate.
      query_perm: int32 [Bp, Hp, query_slots] token of each slot, -1 = empty.
      key_perm: int32 [Bp, Hp, key_slots].
      capacity: Length M of the lists, nK by default. With fewer, rows that do not fit keep their forced tiles, then the
        highest scores (the lowest ids without scores), and `overflow` tells how many were lost.
      forced: Booleans broadcastable to block_mask: tiles to keep first when cutting.
      scores: [Bb, Hb, nQ, nK] by which to keep tiles when cutting.

    Returns:
      A BlockLayout.

    Raises:
      ValueError: If shapes do not fit, or (outside jit) a row exceeds the capacity.

    Example:
      >>> import numpy as np
      >>> layout = from_block_mask(np.eye(2, dtype=bool), query_slots=15, key_slots=16, query_block=8, key_block=8)
      >>> layout.index[0, 0, :, 0].tolist(), layout.density
      ([0, 1], 0.5)

    Source: own design.
    """
    check_sizes(query_block, key_block, query_slots=query_slots, key_slots=key_slots)
    live = as_four_axes("block_mask", block_mask, bool)
    slots, blocks = (query_slots, key_slots), (query_block, key_block)
    _tile_shape("block_mask", live, slots, blocks)
    xp = _module_of(live, full)
    if full is None:
        full = live if predicate is None else xp.zeros(live.shape, bool)
    else:
        full = xp.broadcast_to(as_four_axes("full", full, bool), live.shape)
    if forced is not None:
        forced = _module_of(live, forced).broadcast_to(as_four_axes("forced", forced, bool), live.shape)
    if scores is not None:
        scores = jax.lax.stop_gradient(scores) if isinstance(scores, jax.Array) else np.asarray(scores)
        scores = _module_of(live, scores).broadcast_to(as_four_axes("scores", scores), live.shape)
    return make_layout(live, full, predicate, blocks, slots, (query_perm, key_perm), capacity, forced, scores)
