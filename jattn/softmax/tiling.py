"""What a mask says about tiles: dead, partial or full, looking at pairs only where nothing cheaper can tell."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jattn.softmax.mask_type import DEAD, FULL, PARTIAL, Mask, _And, _Not, _Or
from jattn.softmax.masks import _Segments
from jattn.softmax.predicates import TileBits, TokenSelection, head_entry

__all__ = ["Axis", "Grid", "make_axis", "make_grid", "over_shared_heads", "pairs_of_tiles", "tile_classes"]

# A tile whose class is not known yet. DEAD, PARTIAL and FULL are promises.
UNSURE = 3
# Pairs evaluated at a time: bounds the memory of compiling a mask, whatever T and S.
PAIRS_AT_A_TIME = 1 << 20


def _module_of(*arrays: Any) -> Any:
    return jnp if any(isinstance(x, jax.Array) for x in arrays) else np


@dataclasses.dataclass(frozen=True)
class Axis:
    """One side of the grid of tiles.

    Attributes:
      slots: Number of slots.
      block: Slots a tile.
      position: [b, h, n, block], the position that a mask sees for each slot (0 for empty ones), b in {1, B} and
        h in {1, H}.
      occupied: Booleans of the same rank, False for empty slots and for those past the end.
      permuted: Whether there may be empty slots.
    """

    slots: int
    block: int
    position: Any
    occupied: Any
    permuted: bool

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return self.position.shape[-2]

    @functools.cached_property
    def slot(self) -> np.ndarray:
        """Slot numbers [n, block]."""
        return np.arange(self.tiles * self.block).reshape(self.tiles, self.block)

    @functools.cached_property
    def bounds(self) -> tuple[Any, Any]:
        """Smallest and largest position of each tile, [b, h, n]; (0, 0) where it is empty."""
        xp = _module_of(self.position, self.occupied)
        top = np.iinfo(np.int32).max
        lo = xp.min(xp.where(self.occupied, self.position, top), axis=-1)
        hi = xp.max(xp.where(self.occupied, self.position, -top), axis=-1)
        empty = ~xp.any(self.occupied, axis=-1)
        return xp.where(empty, 0, lo), xp.where(empty, 0, hi)


def make_axis(slots: int, block: int, positions: Any, perm: Any, num_heads: int) -> Axis:
    """Lays `slots` out in tiles of `block`.

    Args:
      slots: Number of slots.
      block: Slots a tile.
      positions: [1|B, tokens], what the mask sees; None counts from 0.
      perm: [Bp, Hp, slots] token of each slot, or None.
      num_heads: Heads for which the mask is evaluated.

    Returns:
      The axis, in numpy where positions and perm are.
    """
    positions, perm = (
        np.asarray(x) if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) else x
        for x in (positions, perm)
    )
    xp = _module_of(positions, perm)
    tiles = max(1, -(-slots // block))
    if perm is None:
        token = np.arange(slots)[None, None]
    else:
        token = xp.asarray(perm)
        if token.shape[1] > 1:
            token = token[:, head_entry(np.arange(num_heads), num_heads, token.shape[1])]
    occupied = token >= 0
    token = xp.maximum(token, 0)
    if positions is None:
        position = token
    else:
        positions = xp.asarray(positions)[:, None]
        batch = np.broadcast_shapes(positions.shape[:1], token.shape[:1])
        source = xp.broadcast_to(positions, (*batch, token.shape[1], positions.shape[-1]))
        position = xp.take_along_axis(source, xp.broadcast_to(token, (*batch, *token.shape[1:])), axis=-1)
    widths = [(0, 0), (0, 0), (0, tiles * block - slots)]
    position = xp.pad(position, widths).reshape(*position.shape[:2], tiles, block)
    occupied = xp.pad(occupied, widths).reshape(*occupied.shape[:2], tiles, block)
    return Axis(slots, block, position, occupied, perm is not None)


class Grid(NamedTuple):
    """The tiles of a score matrix and the heads for which a mask is asked.

    Attributes:
      query: The side of the queries.
      key: The side of the keys.
      batch: Batch rows.
      num_heads: Heads.
    """

    query: Axis
    key: Axis
    batch: int
    num_heads: int


class _Classes(NamedTuple):
    """Classes of tiles, int8 [b, h, nQ, nK], and where UNSURE may stand, bool [nQ, nK], known while tracing."""

    code: Any
    unsure: np.ndarray


def _always(classes: _Classes, value: int, every: bool) -> Any:
    """Where the class is `value` for every (or for some) batch row and head; False where only run time knows."""
    if not isinstance(classes.code, np.ndarray):
        return np.zeros(classes.unsure.shape, bool)
    same = classes.code == value
    return np.broadcast_to(same.all((0, 1)) if every else same.any((0, 1)), classes.unsure.shape)


def _known(code: Any, grid: Grid) -> _Classes:
    """Wraps classes that are not UNSURE, or are so only where they are numpy."""
    shape = (grid.query.tiles, grid.key.tiles)
    code = code.reshape((1,) * (4 - code.ndim) + code.shape) if code.ndim < 4 else code
    if isinstance(code, np.ndarray):
        return _Classes(code, np.broadcast_to((code == UNSURE).any((0, 1)), shape))
    return _Classes(code, np.ones(shape, bool))


@functools.singledispatch
def _classes(mask: Any, grid: Grid) -> _Classes:
    (i_lo, i_hi), (j_lo, j_hi) = grid.query.bounds, grid.key.bounds
    code = mask.classify(i_lo[..., :, None], i_hi[..., :, None], j_lo[..., None, :], j_hi[..., None, :])
    xp = _module_of(code)
    return _known(xp.where(code == PARTIAL, np.int8(UNSURE), code), grid)


@_classes.register
def _(mask: _Not, grid: Grid) -> _Classes:
    inner = _classes(mask.inner, grid)
    xp = _module_of(inner.code)
    flipped = xp.where((inner.code == DEAD) | (inner.code == FULL), FULL - inner.code, inner.code)
    return _Classes(flipped, inner.unsure)


def _joined(mask: Any, grid: Grid, absorbing: int, neutral: int) -> _Classes:
    left, right = _classes(mask.left, grid), _classes(mask.right, grid)
    xp = _module_of(left.code, right.code)
    # Two partial tiles may meet in any pairs or in none; otherwise the classes decide.
    other = xp.where(left.code == neutral, right.code, xp.where(right.code == neutral, left.code, np.int8(UNSURE)))
    code = xp.where((left.code == absorbing) | (right.code == absorbing), np.int8(absorbing), other)
    if isinstance(code, np.ndarray):
        return _known(code, grid)
    settled = _always(left, absorbing, True) | _always(right, absorbing, True)
    settled |= _always(left, neutral, True) & ~right.unsure
    settled |= _always(right, neutral, True) & ~left.unsure
    return _Classes(code, ~settled)


@_classes.register
def _(mask: _And, grid: Grid) -> _Classes:
    return _joined(mask, grid, DEAD, FULL)


@_classes.register
def _(mask: _Or, grid: Grid) -> _Classes:
    return _joined(mask, grid, FULL, DEAD)


def _segment_bounds(ids: Any, axis: Axis) -> tuple[Any, Any, Any]:
    """Smallest and largest id of each tile without padding, and whether there is no padding in it."""
    xp = _module_of(ids, axis.position)
    ids = xp.asarray(ids)
    rows = np.arange(ids.shape[0])[:, None, None, None] if ids.shape[0] > 1 else 0
    ids = ids[rows, axis.position]
    real = axis.occupied & (ids >= 0)
    lo = xp.min(xp.where(real, ids, np.iinfo(np.int32).max), axis=-1)
    hi = xp.max(xp.where(real, ids, -1), axis=-1)
    return lo, hi, xp.all(real | ~axis.occupied, axis=-1)


@_classes.register
def _(mask: _Segments, grid: Grid) -> _Classes:
    i_lo, i_hi, i_clean = (x[..., :, None] for x in _segment_bounds(mask.query_ids, grid.query))
    j_lo, j_hi, j_clean = (x[..., None, :] for x in _segment_bounds(mask.key_ids, grid.key))
    xp = _module_of(i_lo, j_lo)
    meet = (i_lo <= j_hi) & (j_lo <= i_hi) & (i_hi >= 0) & (j_hi >= 0)
    same = i_clean & j_clean & (i_lo == i_hi) & (j_lo == j_hi) & (i_lo == j_lo)
    return _known(xp.where(meet, xp.where(same & meet, np.int8(FULL), np.int8(UNSURE)), np.int8(DEAD)), grid)


def _cells(axis: Axis, width: int) -> np.ndarray:
    """The cells of `width` slots that each tile touches, [n, w]; the last one repeated."""
    first = axis.slot[:, 0] // width
    last = (np.minimum(axis.slot[:, -1], axis.slots - 1)) // width
    return np.minimum(first[:, None] + np.arange((axis.block - 1) // width + 2), np.maximum(last, first)[:, None])


def _lead(array: Any, grid: Grid, num_heads: int | None) -> Any:
    """Brings the head axis of [Bs, Hs, ...] to 1 or to the heads of the grid."""
    if array.shape[1] in (1, grid.num_heads):
        return array
    return array[:, head_entry(np.arange(grid.num_heads), grid.num_heads, array.shape[1])]


@_classes.register
def _(mask: TokenSelection, grid: Grid) -> _Classes:
    sel = mask.dense()
    rows, columns = _cells(grid.query, mask.sel_q), _cells(grid.key, mask.sel_block)
    if rows.max() >= sel.shape[2] or columns.max() >= sel.shape[3]:
        raise ValueError(
            f"sel has shape {sel.shape}; expected at least {rows.max() + 1} groups of {mask.sel_q} queries and "
            f"{columns.max() + 1} blocks of {mask.sel_block} keys"
        )
    xp = _module_of(sel)

    def tiles(reduce: Any) -> Any:
        return reduce(reduce(sel[:, :, rows], axis=3)[..., columns], axis=-1)

    # With empty slots a chosen cell may hold no pair at all.
    between = UNSURE if grid.query.permuted or grid.key.permuted else PARTIAL
    code = xp.where(tiles(xp.all), np.int8(FULL), xp.where(tiles(xp.any), np.int8(between), np.int8(DEAD)))
    code = _lead(code, grid, mask.num_heads)
    return _known(code, grid) if between == UNSURE else _Classes(code, np.zeros(code.shape[2:], bool))


@_classes.register
def _(mask: TileBits, grid: Grid) -> _Classes:
    ids = mask.tile_id
    shape = (grid.query.tiles, grid.key.tiles)
    if (mask.query_block, mask.key_block, ids.shape[2:]) != (grid.query.block, grid.key.block, shape):
        return _known(np.full((1, 1, *shape), UNSURE, np.int8), grid)
    xp = _module_of(ids)
    code = xp.where(ids < 0, np.int8(DEAD), xp.where(ids == 0, np.int8(FULL), np.int8(UNSURE)))
    return _known(_lead(code, grid, mask.num_heads), grid)


def pairs_of_tiles(mask: Mask, grid: Grid, query_tile: Any, key_tile: Any) -> tuple[Any, Any]:
    """Visibility of every pair of some tiles.

    Args:
      mask: The mask.
      grid: The grid.
      query_tile: Tile numbers [u].
      key_tile: Tile numbers [u].

    Returns:
      visible and logical, booleans that broadcast to [B, H, u, Bq, Bk]; logical tells pairs of tokens from padding.
    """
    query, key = grid.query, grid.key
    xp = _module_of(query_tile, query.position, key.position)
    visible = mask.at(
        xp.arange(grid.batch).reshape(-1, 1, 1, 1, 1),
        xp.arange(grid.num_heads).reshape(1, -1, 1, 1, 1),
        xp.asarray(query.position)[:, :, query_tile][..., :, None],
        xp.asarray(key.position)[:, :, key_tile][..., None, :],
        xp.asarray(query.slot)[query_tile][:, :, None],
        xp.asarray(key.slot)[key_tile][:, None, :],
    )
    logical = (
        xp.asarray(query.occupied)[:, :, query_tile][..., :, None]
        & xp.asarray(key.occupied)[:, :, key_tile][..., None, :]
    )
    return visible, logical


def _exact(mask: Mask, grid: Grid, query_tile: Any, key_tile: Any) -> Any:
    """Class of some tiles by looking at their pairs, int8 broadcastable to [B, H, u]."""
    visible, logical = pairs_of_tiles(mask, grid, query_tile, key_tile)
    xp = _module_of(visible, logical)
    visible = visible.reshape((1,) * (5 - visible.ndim) + visible.shape)
    live = xp.any(visible & logical, axis=(-2, -1))
    full = live & xp.all(visible | ~logical, axis=(-2, -1))
    return live.astype(np.int8) + full.astype(np.int8)


def _fill(code: Any, exact: Any, query_tile: np.ndarray, key_tile: np.ndarray, grid: Grid) -> Any:
    """Puts exact classes where the code is UNSURE."""
    lead = np.broadcast_shapes(code.shape[:2], exact.shape[:2])
    xp = _module_of(code, exact)
    code = xp.broadcast_to(code, (*lead, grid.query.tiles, grid.key.tiles))
    exact = xp.broadcast_to(exact, (*lead, exact.shape[2]))
    here = code[:, :, query_tile, key_tile]
    here = xp.where(here == UNSURE, exact, here)
    if xp is np:
        code = np.array(code)
        code[:, :, query_tile, key_tile] = here
        return code
    return code.at[:, :, query_tile, key_tile].set(here)


def tile_classes(mask: Mask, grid: Grid, *, exact: bool = True) -> Any:
    """Class of every tile, int8 [1|B, 1|H, nQ, nK]: DEAD, PARTIAL or FULL.

    Edge tiles are judged by their logical pairs. With `exact`, tiles that classification leaves open are decided by
    their pairs, a bounded number at a time; without, they are called PARTIAL. numpy masks give numpy classes, also
    while tracing.

    Args:
      mask: The mask.
      grid: The grid.
      exact: Whether to look at pairs.

    Returns:
      The classes.
    """
    # What is not traced stays numpy: only then can it settle tiles before run time.
    mask = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.core.Tracer) else np.asarray(leaf), mask)
    static = not any(
        isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((mask, grid.query.position, grid.key.position))
    )
    if not static:
        return _tile_classes(mask, grid, exact, False)
    # A bare function may use jax.numpy on constants: compute now, even while something else is being traced.
    with jax.ensure_compile_time_eval():
        return _tile_classes(mask, grid, exact, True)


def _decide(mask: Mask, grid: Grid, query_tile: np.ndarray, key_tile: np.ndarray, static: bool) -> Any:
    """Exact class of the given tiles, int8 broadcastable to [B, H, u], a bounded number of pairs at a time."""
    step = max(1, PAIRS_AT_A_TIME // (grid.batch * grid.num_heads * grid.query.block * grid.key.block))
    if static:
        starts = range(0, query_tile.size, step)
        parts = [_exact(mask, grid, query_tile[n : n + step], key_tile[n : n + step]) for n in starts]
        decided = _module_of(*parts).concatenate(parts, axis=-1)
        return decided if isinstance(decided, jax.core.Tracer) else np.asarray(decided)
    mask = jax.tree.map(jnp.asarray, mask)
    # Repeating the last tile fills the last step.
    step = min(step, query_tile.size)
    order = np.minimum(np.arange(-(-query_tile.size // step) * step), query_tile.size - 1).reshape(-1, step)
    tiles = (jnp.asarray(query_tile[order]), jnp.asarray(key_tile[order]))
    decided = jax.lax.map(lambda pair: _exact(mask, grid, *pair), tiles)
    return jnp.moveaxis(decided, 0, 2).reshape(*decided.shape[1:3], -1)[..., : query_tile.size]


def _tile_classes(mask: Mask, grid: Grid, exact: bool, static: bool) -> Any:
    code, unsure = _classes(mask, grid)
    if exact and unsure.any():
        query_tile, key_tile = np.nonzero(unsure)
        code = _fill(code, _decide(mask, grid, query_tile, key_tile, static), query_tile, key_tile, grid)
    xp = _module_of(code, grid.query.occupied, grid.key.occupied)
    code = xp.where(code == UNSURE, np.int8(PARTIAL), code)
    some = xp.any(grid.query.occupied, axis=-1)[..., :, None] & xp.any(grid.key.occupied, axis=-1)[..., None, :]
    return xp.where(some, code, np.int8(DEAD))


def over_shared_heads(code: Any, batch: int, heads: int, num_heads: int) -> tuple[Any, Any]:
    """Live and full over the heads that share a list, [B, H, nQ, nK]."""
    xp = _module_of(code)
    code = xp.broadcast_to(code, (batch, num_heads, *code.shape[2:]))
    code = code.reshape(batch, heads, num_heads // heads, *code.shape[2:])
    return xp.any(code != DEAD, axis=2), xp.all(code == FULL, axis=2)


def make_grid(blocks: Any, slots: Any, positions: Any, perms: Any, batch: int, num_heads: int) -> Grid:
    """The grid of tiles; every argument but the last two is a pair (query, key)."""
    axes = [make_axis(*args, num_heads) for args in zip(slots, blocks, positions, perms, strict=True)]
    return Grid(axes[0], axes[1], batch, num_heads)
