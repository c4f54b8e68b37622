"""Several documents packed in one row: segment ids, their boundaries, and the positions inside each."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "SegmentRanges",
    "cu_seqlens_from_segment_ids",
    "positions_from_segments",
    "renumber_segments",
    "segment_ids_from_cu_seqlens",
    "segment_tile_ranges",
]


def _checked(name: str, array: Any, least_rank: int = 1) -> tuple[Any, Any]:
    array = array if isinstance(array, jax.Array) else np.asarray(array)
    if array.ndim < least_rank or not jnp.issubdtype(array.dtype, jnp.integer) or array.shape[-1] == 0:
        raise ValueError(f"{name} must be integers [..., T] with T > 0; got {array.dtype}, shape {array.shape}")
    return array, jnp if isinstance(array, jax.Array) else np


def _running_max(array: Any, xp: Any) -> Any:
    return np.maximum.accumulate(array, axis=-1) if xp is np else jax.lax.cummax(array, axis=array.ndim - 1)


def _starts(ids: Any, xp: Any) -> Any:
    """Marks the first token of each run; padding neither ends a run nor belongs to one."""
    place = np.arange(ids.shape[-1])
    real = ids >= 0
    latest = _running_max(xp.where(real, place, -1), xp)
    before = xp.concatenate([xp.full((*ids.shape[:-1], 1), -1, latest.dtype), latest[..., :-1]], axis=-1)
    previous = xp.take_along_axis(ids, xp.maximum(before, 0), axis=-1)
    return real & ((before < 0) | (previous != ids))


def renumber_segments(segment_ids: Any) -> Any:
    """Numbers the runs of equal ids from 0, so that an id that comes back later is a segment of its own.

    new[t] = number of runs that start at or before t, minus 1;  negative ids (padding) are kept

    A run ends where two consecutive non-padding ids differ. On renumbered ids the softmax engine, which compares ids,
    and the recurrence engine, which splits rows into runs, see the same segments.

    Args:
      segment_ids: Integers [..., T]; negative = padding.

    Returns:
      int32 [..., T]; numpy from numpy.

    Raises:
      ValueError: If the ids are not integers of rank 1 or more.

    Example:
      >>> import numpy as np
      >>> renumber_segments(np.array([7, 7, -1, 7, 2, 7])).tolist()
      [0, 0, -1, 0, 1, 2]

    Source: standard practice of document packing; own definition.
    """
    ids, xp = _checked("segment_ids", segment_ids)
    run = xp.cumsum(_starts(ids, xp), axis=-1, dtype=np.int32) - 1
    return xp.where(ids >= 0, run, ids).astype(np.int32)


def positions_from_segments(segment_ids: Any) -> Any:
    """Positions that start again at 0 with every run of equal ids.

    position[t] = t - start of the run of t;  0 for padding

    Args:
      segment_ids: Integers [..., T]; negative = padding.

    Returns:
      int32 [..., T]; numpy from numpy.

    Raises:
      ValueError: If the ids are not integers of rank 1 or more.

    Example:
      >>> import numpy as np
      >>> positions_from_segments(np.array([4, 4, 4, 9, 9, -1])).tolist()
      [0, 1, 2, 0, 1, 0]

    Source: standard practice of document packing.
    """
    ids, xp = _checked("segment_ids", segment_ids)
    place = np.arange(ids.shape[-1])
    start = _running_max(xp.where(_starts(ids, xp), place, 0), xp)
    return xp.where(ids >= 0, place - start, 0).astype(np.int32)


def segment_ids_from_cu_seqlens(cu_seqlens: Any, length: int) -> Any:
    """Segment ids from the cumulative lengths that variable-length kernels take.

    id[t] = n where cu_seqlens[n] <= t < cu_seqlens[n + 1];  -1 (padding) from the last one on

    Args:
      cu_seqlens: Integers [n + 1], ascending from 0; equal neighbors are empty documents.
      length: T, number of tokens with padding.

    Returns:
      int32 [T]; numpy from numpy.

    Raises:
      ValueError: If cu_seqlens is not of rank 1 or (outside jit) does not ascend from 0 to at most `length`.

    Example:
      >>> import numpy as np
      >>> segment_ids_from_cu_seqlens(np.array([0, 2, 5]), 6).tolist()
      [0, 0, 1, 1, 1, -1]

    Source: the interface of FlashAttention's variable-length functions (arXiv 2205.14135, code).
    """
    ends, xp = _checked("cu_seqlens", cu_seqlens)
    if ends.ndim != 1:
        raise ValueError(f"cu_seqlens must have one axis; got shape {ends.shape}")
    if not isinstance(ends, jax.core.Tracer):
        values = np.asarray(ends)
        if values[0] != 0 or (np.diff(values) < 0).any() or values[-1] > length:
            raise ValueError(f"cu_seqlens must ascend from 0 to at most {length}; got {values}")
    place = np.arange(length)
    ids = xp.searchsorted(ends, place, side="right").astype(np.int32) - 1
    return xp.where(place < ends[-1], ids, -1).astype(np.int32)


def cu_seqlens_from_segment_ids(segment_ids: Any, num_segments: int | None = None) -> Any:
    """Cumulative lengths of the runs of a packed row; the inverse of `segment_ids_from_cu_seqlens`.

    cu[n] = start of run n, then the number of tokens before the padding

    Args:
      segment_ids: Integers [T]; padding (negative) only at the end.
      num_segments: Length of the result minus 1; needed under jit. Further entries repeat the last one.

    Returns:
      int32 [num_segments + 1]; numpy from numpy.

    Raises:
      ValueError: If the ids are not of rank 1, if num_segments is missing under jit, or (outside jit) if padding stands
        between documents or there are more runs than num_segments.

    Example:
      >>> import numpy as np
      >>> cu_seqlens_from_segment_ids(np.array([3, 3, 5, 5, 5, -1])).tolist()
      [0, 2, 5]

    Source: the interface of FlashAttention's variable-length functions (arXiv 2205.14135, code).
    """
    ids, xp = _checked("segment_ids", segment_ids)
    if ids.ndim != 1:
        raise ValueError(f"segment_ids must have one axis here; got shape {ids.shape}")
    starts = _starts(ids, xp)
    traced = isinstance(ids, jax.core.Tracer)
    if traced and num_segments is None:
        raise ValueError("num_segments must be given under jit, where the number of runs is not known")
    if not traced:
        real, runs = np.asarray(ids) >= 0, int(np.asarray(starts).sum())
        if (np.diff(real.astype(np.int8)) > 0).any():
            raise ValueError("segment_ids holds padding before or between documents; cu_seqlens cannot express it")
        if num_segments is not None and runs > num_segments:
            raise ValueError(f"segment_ids holds {runs} runs; num_segments is {num_segments}")
        num_segments = runs if num_segments is None else num_segments
    assert num_segments is not None
    place, total = np.arange(ids.shape[0]), xp.sum(ids >= 0)
    # Starts in ascending order, everything else behind them.
    ordered = xp.sort(xp.where(starts, place, ids.shape[0]))
    ordered = xp.concatenate([ordered, xp.full(max(0, num_segments + 1 - ids.shape[0]), ids.shape[0], ordered.dtype)])
    return xp.minimum(ordered[: num_segments + 1], total).astype(np.int32)


class SegmentRanges(NamedTuple):
    """Ids of each tile of tokens.

    Attributes:
      low: [..., n], smallest id that is not padding; the largest int32 if there is none.
      high: [..., n], largest id; -1 if there is only padding.
      padded: [..., n], whether the tile holds padding.
    """

    low: Any
    high: Any
    padded: Any


def segment_tile_ranges(segment_ids: Any, block: int) -> SegmentRanges:
    """Smallest and largest segment id of every tile of `block` tokens.

    Two tiles may see each other only if their ranges overlap; they see each other wholly iff all four ends are equal
    and neither holds padding. The last tile may be shorter, which is not padding.

    Args:
      segment_ids: Integers [..., T]; negative = padding.
      block: Tokens a tile.

    Returns:
      `SegmentRanges` with axes [..., ceil(T / block)].

    Raises:
      ValueError: If the ids are not integers or block is not positive.

    Example:
      >>> import numpy as np
      >>> ranges = segment_tile_ranges(np.array([0, 0, 0, 1, -1]), 2)
      >>> ranges.low[:2].tolist(), ranges.high.tolist(), ranges.padded.tolist()
      ([0, 0], [0, 1, -1], [False, False, True])

    Source: the block skipping of packed sequences in FlexAttention (arXiv 2412.05496).
    """
    ids, xp = _checked("segment_ids", segment_ids)
    if block < 1:
        raise ValueError(f"block must be at least 1; got {block}")
    length = ids.shape[-1]
    tiles = -(-length // block)
    widths = [(0, 0)] * (ids.ndim - 1) + [(0, tiles * block - length)]
    inside = (np.arange(tiles * block) < length).reshape(tiles, block)
    ids = xp.pad(ids, widths).reshape(*ids.shape[:-1], tiles, block)
    real = inside & (ids >= 0)
    low = xp.min(xp.where(real, ids, np.iinfo(np.int32).max), axis=-1)
    high = xp.max(xp.where(real, ids, -1), axis=-1)
    return SegmentRanges(low, high, xp.any(inside & (ids < 0), axis=-1))
