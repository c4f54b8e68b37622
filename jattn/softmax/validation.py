"""What a block layout must satisfy, checked before anything is computed with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jattn.softmax.layout import BlockLayout

__all__ = ["check_layout"]


def _check_lead(name: str, shape: tuple, batch: int | None, num_heads: int | None, num_kv_heads: int | None) -> None:
    rows, heads = shape[:2]
    if batch is not None and rows not in (1, batch):
        raise ValueError(f"layout.{name} has shape {shape}; expected a leading axis of 1 or batch {batch}")
    if num_heads is None:
        return
    fits = num_heads % heads == 0 if num_kv_heads is None else heads in (1, num_kv_heads, num_heads)
    if not fits:
        kinds = f"1, {num_kv_heads} or {num_heads}" if num_kv_heads else f"a divisor of {num_heads}"
        raise ValueError(f"layout.{name} has shape {shape}; expected a head axis of {kinds}")


def _check_perm(name: str, perm: Any, slots: int, length: int | None, every: bool, values: bool) -> None:
    from jattn.softmax.layout import is_concrete

    if perm.dtype.kind not in "iu":
        raise ValueError(f"layout.{name} must hold integers; got {perm.dtype}")
    if length is not None and every and slots < length:
        raise ValueError(f"layout.{name} has {slots} slots, too few for {length} tokens")
    if not values or not is_concrete(perm):
        return
    rows = np.asarray(perm).reshape(-1, slots)
    for row in rows:
        held = np.sort(row[row >= 0])
        if (np.diff(held) == 0).any():
            raise ValueError(f"layout.{name} puts a token into two slots")
        limit = length if length is not None else (held.size if every else None)
        if (row < -1).any() or (limit is not None and held.size and held[-1] >= limit):
            raise ValueError(f"layout.{name} must hold tokens in [0, {limit}) and -1 for empty slots")
        if every and limit is not None and held.size != limit:
            raise ValueError(f"layout.{name} must hold every one of the {limit} query tokens; it holds {held.size}")


def _check_lists(layout: BlockLayout) -> None:
    count, index, full = (np.asarray(x) for x in (layout.count, layout.index, layout.full))
    tiles, capacity = layout.num_key_tiles, index.shape[-1]
    if (count < 0).any() or (count > min(capacity, tiles)).any():
        raise ValueError(f"layout.count must lie in [0, {min(capacity, tiles)}]")
    if index.size and ((index < 0).any() or (index >= max(tiles, 1)).any()):
        raise ValueError(f"layout.index must hold tile ids in [0, {tiles})")
    inside = np.arange(capacity) < count[..., None]
    if (inside[..., 1:] & (np.diff(index, axis=-1) <= 0)).any():
        raise ValueError("layout.index must be strictly ascending in its first `count` entries")
    if index.size:
        last = np.take_along_axis(index, np.maximum(count[..., None] - 1, 0), -1)
        if (~inside & (index != np.where(count[..., None] > 0, last, 0))).any():
            raise ValueError("layout.index must repeat the last live tile (0 if there is none) after `count` entries")
    if (full & ~inside).any():
        raise ValueError("layout.full must be False after `count` entries")


def check_layout(
    layout: BlockLayout,
    batch: int | None,
    num_heads: int | None,
    num_kv_heads: int | None,
    query_length: int | None,
    key_length: int | None,
    values: bool,
) -> None:
    """Raises ValueError for a layout whose fields do not fit each other or the given sizes.

    Args:
      layout: The layout.
      batch: B or None.
      num_heads: N or None.
      num_kv_heads: K or None.
      query_length: T or None.
      key_length: S or None.
      values: Whether to look at values that are not traced.
    """
    from jattn.softmax.layout import is_concrete

    for name in ("query_block", "key_block", "query_slots", "key_slots"):
        size = getattr(layout, name)
        if not isinstance(size, int | np.integer) or size < (1 if "block" in name else 0):
            raise ValueError(f"layout.{name} must be a positive int; got {size!r}")
    if np.ndim(layout.count) != 3 or np.shape(layout.count)[2] != layout.num_query_tiles:
        raise ValueError(
            f"layout.count has shape {np.shape(layout.count)}; expected [Bb, Hb, {layout.num_query_tiles}], one count "
            f"for each tile of {layout.query_block} of the {layout.query_slots} query slots"
        )
    lead = np.shape(layout.count)
    for name in ("index", "full"):
        shape = np.shape(getattr(layout, name))
        if len(shape) != 4 or shape[:3] != lead or (name == "full" and shape != np.shape(layout.index)):
            raise ValueError(f"layout.{name} has shape {shape}; expected {[*lead, 'M']}, one M for index and full")
    for name, kind in (("count", "iu"), ("index", "iu"), ("full", "b")):
        dtype = np.dtype(getattr(layout, name).dtype)
        if dtype.kind not in kind:
            raise ValueError(f"layout.{name} has dtype {dtype}; expected {'bool' if kind == 'b' else 'int32'}")
    if layout.overflow is not None and np.shape(layout.overflow) != lead:
        raise ValueError(f"layout.overflow has shape {np.shape(layout.overflow)}; expected that of count, {lead}")
    _check_lead("count", lead, batch, num_heads, num_kv_heads)
    sides = (
        ("query", layout.query_perm, layout.query_slots, query_length),
        ("key", layout.key_perm, layout.key_slots, key_length),
    )
    for side, perm, slots, length in sides:
        if perm is None:
            if length is not None and slots != length:
                raise ValueError(
                    f"layout.{side}_slots is {slots}, but there are {length} {side} tokens and no {side}_perm to "
                    "place them"
                )
            continue
        shape = np.shape(perm)
        if len(shape) != 3 or shape[2] != slots:
            raise ValueError(f"layout.{side}_perm has shape {shape}; expected [Bp, Hp, {slots}]")
        _check_lead(f"{side}_perm", shape, batch, num_heads, num_kv_heads)
        _check_perm(f"{side}_perm", perm, slots, length, side == "query", values)
    if values and is_concrete(layout.count, layout.index, layout.full):
        _check_lists(layout)
