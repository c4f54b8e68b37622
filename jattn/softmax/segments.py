"""Several documents packed in one row: segment ids, their boundaries, and the positions inside each."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "SegmentRanges",
    "cu_seqlens_from_segment_ids",
    "pack_cu_seqlens",
    "positions_from_segments",
    "renumber_segments",
    "segment_ids_from_cu_seqlens",
    "segment_tile_ranges",
    "unpack_cu_seqlens",
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
    ends, xp = _ends(cu_seqlens, length)
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


def unpack_cu_seqlens(packed: Any, cu_seqlens: Any, max_length: int | None = None, *, axis: int = 0) -> tuple[Any, Any]:
    """Packed documents as rows of their own, filled up with zeros.

    rows[m, t] = packed[cu[m] + t],  ids[m, t] = m   where t < cu[m + 1] - cu[m];  elsewhere 0 and -1 (padding)

    Args:
      packed: [T, ...], or with `axis=1` [1, T, ...]; or a pytree of such arrays, such as queries, keys and values.
      cu_seqlens: Integers [M + 1], ascending from 0 to at most T; equal neighbors are empty documents.
      max_length: L, tokens a row; None takes those of the longest document, which needs cu_seqlens that are known
        outside of jit. Under jit what lies behind the first L tokens of a document is cut off.
      axis: Where the T tokens lie, 0 or 1.

    Returns:
      The rows [M, L, ...], and the segment ids int32 [M, L] for both engines. Numpy from numpy.

    Raises:
      ValueError: If shapes do not fit, if max_length is missing under jit, or (outside jit) if cu_seqlens does not
        ascend from 0 to at most T or a document is longer than max_length.

    Example:
      >>> import numpy as np
      >>> rows, ids = unpack_cu_seqlens(np.array([5, 6, 7]), np.array([0, 1, 3]))
      >>> rows.tolist(), ids.tolist()
      ([[5, 0], [6, 7]], [[0, -1], [1, 1]])

    Source: the interface of FlashAttention's variable-length functions (arXiv 2205.14135, code).
    """
    length = _tokens(packed, axis)
    ends, xp = _ends(cu_seqlens, length)
    lengths = ends[1:] - ends[:-1]
    if not isinstance(ends, jax.core.Tracer):
        longest = max(1, *np.asarray(lengths).tolist()) if len(lengths) else 1
        max_length = longest if max_length is None else max_length
        if max_length < longest:
            raise ValueError(f"max_length is {max_length}, but cu_seqlens has a document of {longest} tokens")
    if max_length is None or max_length < 1:
        raise ValueError(f"max_length must be at least 1, and given under jit; got {max_length}")
    place = np.arange(max_length)
    real = place < lengths[:, None]
    source = xp.minimum(ends[:-1, None] + place, length - 1)

    def row(x: Any) -> Any:
        return _taken(x if axis == 0 else x[0], real, source)

    ids = xp.where(real, np.arange(len(lengths))[:, None], -1).astype(np.int32)
    return jax.tree.map(row, packed), ids


def pack_cu_seqlens(rows: Any, cu_seqlens: Any, length: int, *, axis: int = 0) -> Any:
    """The inverse of `unpack_cu_seqlens`: rows of documents, one behind the other.

    packed[cu[m] + t] = rows[m, t]   where t < cu[m + 1] - cu[m];  0 from the last document on

    Args:
      rows: [M, L, ...], or a pytree of such arrays; what lies behind the end of a document is not read.
      cu_seqlens: Integers [M + 1], ascending from 0 to at most `length`; equal neighbors are empty documents.
      length: T, number of tokens with padding.
      axis: Where the T tokens shall lie, 0 or 1.

    Returns:
      [T, ...], or with `axis=1` [1, T, ...]. Numpy from numpy.

    Raises:
      ValueError: If shapes do not fit, or (outside jit) if cu_seqlens does not ascend from 0 to at most `length` or a
        document is longer than L.

    Example:
      >>> import numpy as np
      >>> pack_cu_seqlens(np.array([[5, 0], [6, 7]]), np.array([0, 1, 3]), 4).tolist()
      [5, 6, 7, 0]

    Source: the interface of FlashAttention's variable-length functions (arXiv 2205.14135, code).
    """
    ends, xp = _ends(cu_seqlens, length)
    ids = segment_ids_from_cu_seqlens(ends, length)
    document = xp.maximum(ids, 0)
    place = np.arange(length) - ends[document]

    def packed(x: Any) -> Any:
        if x.ndim < 2 or x.shape[0] != len(ends) - 1 or not x.size:
            raise ValueError(f"rows must be [{len(ends) - 1}, L, ...] to fit cu_seqlens; got {list(x.shape)}")
        if not isinstance(ends, jax.core.Tracer) and np.max(np.diff(np.asarray(ends))) > x.shape[1]:
            raise ValueError(f"rows have room for {x.shape[1]} tokens, but cu_seqlens has a longer document: {ends}")
        # A document that unpacking cut off has zeros where its tokens are missing.
        there = (ids >= 0) & (place < x.shape[1])
        taken = _taken(x, there, document, xp.clip(place, 0, x.shape[1] - 1))
        return taken if axis == 0 else taken[None]

    if axis not in (0, 1):
        raise ValueError(f"axis must be 0 or 1, got {axis}")
    return jax.tree.map(packed, rows)


def _ends(cu_seqlens: Any, length: int) -> tuple[Any, Any]:
    """Checked cumulative lengths, and the module that computes with them."""
    ends, xp = _checked("cu_seqlens", cu_seqlens)
    if ends.ndim != 1:
        raise ValueError(f"cu_seqlens must have one axis; got shape {ends.shape}")
    if not isinstance(ends, jax.core.Tracer):
        values = np.asarray(ends)
        if values[0] != 0 or (np.diff(values) < 0).any() or values[-1] > length:
            raise ValueError(f"cu_seqlens must ascend from 0 to at most {length}; got {values}")
    return ends, xp


def _tokens(packed: Any, axis: int) -> int:
    """T of a pytree of packed arrays; ValueError if they do not agree."""
    if axis not in (0, 1):
        raise ValueError(f"axis must be 0 or 1, got {axis}")
    shapes = [np.shape(x) for x in jax.tree.leaves(packed)]
    lengths = {shape[axis] for shape in shapes if len(shape) > axis and (axis == 0 or shape[0] == 1)}
    if (
        len(lengths) != 1
        or 0 in lengths
        or any(len(shape) <= axis or shape[:axis] not in ((), (1,)) for shape in shapes)
    ):
        raise ValueError(
            f"packed must be arrays {'[T, ...]' if axis == 0 else '[1, T, ...]'} of one T > 0; got {shapes}"
        )
    return lengths.pop()


def _taken(x: Any, real: Any, *places: Any) -> Any:
    """The tokens of x at some places, zeros where they are not `real` [M, L] or [T]."""
    xp = np if isinstance(real, np.ndarray) and isinstance(x, np.ndarray) else jnp
    x = xp.asarray(x)[places]
    return xp.where(real.reshape(*real.shape, *(1,) * (x.ndim - real.ndim)), x, xp.zeros((), x.dtype))


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
