"""Generalized neighborhoods: sliding, strided, dilated and blocked windows on 1-D, 2-D and 3-D grids, as a mask.

Per dimension, with X tokens, window w, stride s, dilation d; a key is visible iff it is so in every dimension:

    residue g = x mod d (the key's must be the same),  i = x // d,  L = ceil((X - g) / d)
    noncausal: leader = min((i // s) s + s // 2, L - 1),  start = clip(leader - w // 2, 0, L - w),  end = start + w
    causal:    leader = min((i // s) s + s - 1, L - 1),   start = max(leader - w + 1, 0),           end = i + 1
    visible iff start <= j < end,  j = key x // d

Windows are shifted into the grid at its borders, never cut. Tokens are numbered row by row. Source: arXiv 2504.16922
and the reference masks of NATTEN.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.mechanisms.entry import Cost, Entry, Paper
from jattn.softmax.block_masks import from_block_mask
from jattn.softmax.layout import BlockLayout
from jattn.softmax.masks import DEAD, FULL, PARTIAL, Mask


def _xp(*arrays: Any) -> Any:
    return jnp if any(isinstance(x, jax.Array) for x in arrays) else np


def window_bounds(i: Any, length: Any, window: int, stride: int, is_causal: bool) -> tuple[Any, Any]:
    """First key and end of the window of coordinate i in a line of `length` tokens.

    Args:
        i: coordinates, integers of any shape.
        length: L, at least the window unless causal; None (causal only) for a line without an end.
        window: w.
        stride: s.
        is_causal: whether the window ends with the query.

    Returns:
        start and end of the shape of i; keys start <= j < end are visible.

    Example:
        >>> [x.tolist() for x in window_bounds(np.arange(6), 6, 3, 1, False)]
        [[0, 0, 1, 2, 3, 3], [3, 3, 4, 5, 6, 6]]

    Source: Generalized Neighborhood Attention (arXiv 2504.16922).
    """
    xp = _xp(i, length)
    leader = i // stride * stride + (stride - 1 if is_causal else stride // 2)
    if length is not None:
        leader = xp.minimum(leader, length - 1)
    if is_causal:
        return xp.maximum(leader - (window - 1), 0), i + 1
    start = xp.clip(leader - window // 2, 0, length - window)
    return start, start + window


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Neighborhood(Mask):
    """The mask of `gna_mask`: everything is static.

    Attributes:
        grid: tokens of each dimension; the first may be None, without an end.
        window: of each dimension.
        stride: of each dimension.
        dilation: of each dimension.
        is_causal: of each dimension.
    """

    grid: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})
    window: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    stride: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dilation: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    is_causal: tuple[bool, ...] = dataclasses.field(metadata={"static": True})

    def dimensions(self) -> list[tuple[int | None, int, int, int, bool]]:
        """Grid, window, stride, dilation and causality of each dimension, the last (fastest) first."""
        rows = zip(self.grid, self.window, self.stride, self.dilation, self.is_causal, strict=True)
        return list(rows)[::-1]

    def __call__(self, b: Any, h: Any, i: Any, j: Any) -> Any:
        """Visibility of token j for token i."""
        visible = True
        for n, (size, window, stride, dilation, is_causal) in enumerate(self.dimensions()):
            x, y = i, j
            if n < len(self.grid) - 1 and size is not None:
                (i, x), (j, y) = (i // size, i % size), (j // size, j % size)
            residue = x % dilation
            length = None if size is None else (size - residue + dilation - 1) // dilation
            start, end = window_bounds(x // dilation, length, window, stride, is_causal)
            inner = y // dilation
            visible = visible & (inner >= start) & (inner < end)
            if dilation > 1:
                visible = visible & (y % dilation == residue)
        return visible

    def classify(self, i_lo: Any, i_hi: Any, j_lo: Any, j_hi: Any) -> Any:
        """Class of a rectangle; exact for one dimension without dilation, and for rectangles of whole rows."""
        xp = _xp(i_lo, i_hi, j_lo, j_hi)
        dead, full = False, True
        query, key = (i_lo, i_hi), (j_lo, j_hi)
        for n, (size, window, stride, dilation, is_causal) in enumerate(self.dimensions()):
            (a, b), (c, d) = query, key
            if n < len(self.grid) - 1 and size is not None:
                (a, b), query = _split_range(xp, *query, size)
                (c, d), key = _split_range(xp, *key, size)
            # Bounds grow with the coordinate and with the length of the residue class.
            short, long = (None, None) if size is None else (size // dilation, -(-size // dilation))
            first = [window_bounds(x // dilation, n, window, stride, is_causal) for x, n in ((a, short), (b, long))]
            dead = dead | (d // dilation < first[0][0]) | (c // dilation >= first[1][1])
            if dilation == 1:
                full = full & (c >= first[1][0]) & (d < first[0][1])
            else:
                # Some difference of the two sides must be a multiple of the dilation.
                dead = dead | ((b - c) // dilation * dilation < a - d)
                full = False
        return xp.where(dead, np.int8(DEAD), xp.where(full, np.int8(FULL), np.int8(PARTIAL)))


def _split_range(xp: Any, lo: Any, hi: Any, size: int) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Coordinates that tokens lo..hi have in the fastest dimension (all, if they span rows), and their rows."""
    same = lo // size == hi // size
    return (xp.where(same, lo % size, 0), xp.where(same, hi % size, size - 1)), (lo // size, hi // size)


def _per_dimension(name: str, value: Any, rank: int, kind: type) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, Sequence | np.ndarray) else (value,) * rank
    good = all(isinstance(v, bool | np.bool_) == (kind is bool) and isinstance(v, kind | np.generic) for v in values)
    if len(values) != rank or not good:
        raise ValueError(f"{name} must be one {kind.__name__}, or {rank}, one a dimension; got {value!r}")
    return tuple(kind(v) for v in values)


def gna_mask(grid: Any, window: Any, *, stride: Any = 1, dilation: Any = 1, is_causal: Any = False) -> Mask:
    """The neighborhoods as a mask on tokens numbered row by row.

    visible iff start(i_d) <= j_d < end(i_d) and equal residues in every dimension d.

    Args:
        grid: X, an int or up to three; the first may be None (no end) if it is causal and has stride 1.
        window: w, an int or one a dimension; w * dilation <= X unless that dimension is causal.
        stride: s, 1 <= s <= w; queries of a group of s share their window.
        dilation: d, 1 or more.
        is_causal: a bool or one a dimension. With a stride above 1, the last group of a causal dimension depends on X.

    Returns:
        A `Mask` on flat token numbers.

    Raises:
        ValueError: a parameter out of its range, with its dimension.

    Example:
        >>> gna_mask(5, 3).to_dense(1, 1, 5, 5)[0, 0].astype(int)
        array([[1, 1, 1, 0, 0],
               [1, 1, 1, 0, 0],
               [0, 1, 1, 1, 0],
               [0, 0, 1, 1, 1],
               [0, 0, 1, 1, 1]])

    Source: Generalized Neighborhood Attention (arXiv 2504.16922).
    """
    sizes = tuple(grid) if isinstance(grid, Sequence | np.ndarray) else (grid,)
    rank = len(sizes)
    if not 1 <= rank <= 3 or not all(isinstance(x, int | np.integer) and x > 0 for x in sizes[1:]):
        raise ValueError(f"grid must be one to three positive ints, got {grid!r}")
    if sizes[0] is not None and not (isinstance(sizes[0], int | np.integer) and sizes[0] > 0):
        raise ValueError(f"grid must start with a positive int or None, got {grid!r}")
    sizes = tuple(None if x is None else int(x) for x in sizes)
    options = [
        _per_dimension(n, v, rank, int) for n, v in (("window", window), ("stride", stride), ("dilation", dilation))
    ]
    causal = _per_dimension("is_causal", is_causal, rank, bool)
    for d, (size, w, s, gap, ends) in enumerate(zip(sizes, *options, causal, strict=True)):
        where = f"in dimension {d} of {rank}"
        if w < 1 or gap < 1:
            raise ValueError(f"window and dilation must be at least 1, got {w} and {gap} {where}")
        if not 1 <= s <= w:
            raise ValueError(f"stride must be between 1 and the window, {w}, got {s} {where}")
        if size is None and not (ends and s == 1):
            raise ValueError(f"grid may be None only where is_causal and stride 1, got stride {s} {where}")
        if size is not None and not ends and w * gap > size:
            raise ValueError(f"window * dilation must be at most the grid's {size}, got {w} * {gap} {where}")
    return Neighborhood(sizes, *options, causal)


@functools.lru_cache(maxsize=64)
def gna_layout(mask: Neighborhood, tile: tuple[int, ...] | None = None) -> BlockLayout:
    """Tiles that are boxes of the grid instead of runs of tokens, so that few of them touch a neighborhood.

    The tokens of a tile are t_1 x .. x t_r neighbors (of one residue, under dilation); a tile of keys is live iff it is
    so in every dimension.

    Args:
        mask: from `gna_mask`, with a finite grid.
        tile: t, tokens of a tile in each dimension; 64 in all if not given.

    Returns:
        A `BlockLayout` with the order of the tokens as its perms.

    Example:
        >>> gna_layout(gna_mask((8, 8), 3), (4, 4)).query_perm[0, 0, :6].tolist()
        [0, 1, 2, 3, 8, 9]

    Source: multi-dimensional tiling as in Generalized Neighborhood Attention (arXiv 2504.16922).
    """
    grid = [int(x) for x in mask.grid if x is not None]
    default = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}[len(grid)]
    sides = tuple(min(t, x) for t, x in zip(default if tile is None else tile, grid, strict=True))
    perm = np.zeros((1,) * (2 * len(grid)), np.int32)
    empty = np.zeros_like(perm, bool)
    live, full = np.ones((2, 1, 1), bool)
    for d, (size, side) in enumerate(zip(grid, sides, strict=True)):
        one = Neighborhood((size,), *((x[d],) for x in (mask.window, mask.stride, mask.dilation, mask.is_causal)))
        order, live_1d, full_1d = _line(one, side)
        shape = [1] * (2 * len(grid))
        shape[d], shape[len(grid) + d] = order.shape
        perm, empty = perm * size + order.reshape(shape), empty | (order.reshape(shape) < 0)
        live, full = (np.kron(x, y).astype(bool) for x, y in ((live, live_1d), (full, full_1d)))
    perm = np.where(empty, -1, perm).astype(np.int32).reshape(1, 1, -1)
    block = math.prod(sides)
    return from_block_mask(
        live,
        mask,
        query_slots=perm.size,
        key_slots=perm.size,
        query_block=block,
        key_block=block,
        full=full,
        query_perm=perm,
        key_perm=perm,
        capacity=int(live.sum(-1).max()),
    )


def _line(mask: Neighborhood, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One dimension in tiles: coordinates `[n, side]` (-1 = none), live and full tiles `[n, n]`."""
    size, window, stride, dilation, causal = mask.dimensions()[0]
    assert size is not None
    x = np.arange(size)
    order = np.lexsort((x // dilation, x % dilation))
    residue, inner = order % dilation, order // dilation
    # In this order the keys of a query are one interval of slots: its residue class begins at `offset`.
    offset = np.searchsorted(residue, residue)
    length = (size - residue + dilation - 1) // dilation
    start, end = (offset + bound for bound in window_bounds(inner, length, window, stride, causal))
    low = np.arange(0, size, side)
    high = np.minimum(low + side, size)
    touched = (start[:, None] < high) & (end[:, None] > low)
    covered = (start[:, None] <= low) & (end[:, None] >= high)
    padding = -size % side
    order = np.pad(order, (0, padding), constant_values=-1).reshape(-1, side)
    live = np.pad(touched, [(0, padding), (0, 0)]).reshape(len(low), side, -1).any(1)
    full = np.pad(covered, [(0, padding), (0, 0)], constant_values=True).reshape(len(low), side, -1).all(1)
    return order, np.asarray(live), np.asarray(full)


def _example(key, length):
    return (length, 3), {"stride": 2, "dilation": 1 if length < 6 else 2}


ENTRY = Entry(
    name="gna_mask",
    kind="mask",
    family="sparse",
    function=gna_mask,
    papers=(
        Paper(
            "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
            "2504.16922",
            2025,
        ),
    ),
    patterns=("noncausal self", "causal self"),
    cost=Cost(flops="T", memory="T"),
    decode="from positions, where causal and stride 1",
    example=_example,
    fidelity="official code",
)
