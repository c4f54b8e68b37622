"""Compilers of block layouts: from masks, block masks, scores, probabilities and per-query selections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jattn.softmax.block_masks import check_sizes, from_block_mask, make_layout
from jattn.softmax.layout import BlockLayout, is_concrete
from jattn.softmax.masks import FULL, PARTIAL, Mask, mask_mod
from jattn.softmax.predicates import TileBits, pack_bits
from jattn.softmax.selections import from_cumulative, from_token_selection, from_topk
from jattn.softmax.tiling import PAIRS_AT_A_TIME, make_grid, over_shared_heads, pairs_of_tiles, tile_classes

__all__ = ["from_block_mask", "from_cumulative", "from_mask_mod", "from_token_selection", "from_topk", "tile_bits"]


def _mask_value(mask: Mask | Callable[..., Any]) -> Mask:
    return mask if isinstance(mask, Mask) else mask_mod(mask)


def from_mask_mod(
    mask: Mask | Callable[..., Any],
    B: int,
    H: int,
    T: int,
    S: int,
    query_block: int = 128,
    key_block: int = 128,
    *,
    num_heads: int | None = None,
    query_positions: Any = None,
    key_positions: Any = None,
    query_perm: Any = None,
    key_perm: Any = None,
    capacity: int | None = None,
    exact: bool = True,
) -> BlockLayout:
    """Compiles a mask into a block layout: every tile is dead, full, or partial with the mask as its predicate.

    live(t) = some logical pair of t is visible,  full(t) = every logical pair is visible

    Tiles are asked for their class first; only the ones it leaves open have their pairs evaluated, a bounded number
    at a time, so T S is never stored. Edge tiles are judged by their logical pairs. A mask without traced arrays
    compiles to numpy constants, with lists as long as the longest row needs.

    Args:
      mask: A Mask, or a module-level function (b, h, i, j, aux) -> bool.
      B: Batch rows that the lists distinguish: 1 if the mask does not depend on the row.
      H: Heads that the lists distinguish: 1, K or N.
      T: Query slots (tokens, if there is no query_perm).
      S: Key slots.
      query_block: Queries a tile.
      key_block: Keys a tile.
      num_heads: N; the query heads over which a list of H < N heads is the union. H if not given.
      query_positions: [1|B, T] that the mask sees; 0..T-1 by default.
      key_positions: [1|B, S] that the mask sees; 0..S-1 by default.
      query_perm: int32 [Bp, Hp, T] token of each slot, -1 = empty.
      key_perm: int32 [Bp, Hp, S].
      capacity: Length M of the lists; the default holds every live tile.
      exact: If False, tiles that the mask cannot classify are called partial without looking at their pairs.

    Returns:
      A BlockLayout with lists [B, H, nQ, M].

    Raises:
      ValueError: If sizes do not fit or (outside jit) a row has more live tiles than `capacity`.

    Example:
      >>> from jattn.softmax import masks
      >>> layout = from_mask_mod(masks.causal(), 1, 1, 24, 24, 8, 8)
      >>> layout.count.tolist(), layout.full[0, 0, 2].tolist()
      ([[[1, 2, 3]]], [True, True, False])

    Source: FlexAttention (arXiv 2412.05496), create_block_mask.
    """
    check_sizes(query_block, key_block, B=B, H=H, T=T, S=S)
    num_heads = H if num_heads is None else num_heads
    if num_heads % H:
        raise ValueError(f"H = {H} must divide num_heads = {num_heads}")
    mask = _mask_value(mask)
    blocks, slots, perms = (query_block, key_block), (T, S), (query_perm, key_perm)
    grid = make_grid(blocks, slots, (query_positions, key_positions), perms, B, num_heads)
    live, full = over_shared_heads(tile_classes(mask, grid, exact=exact), B, H, num_heads)
    if isinstance(live, np.ndarray) and capacity is None:
        capacity = max(1, int(live.sum(-1).max(initial=0)))
    return make_layout(live, full, mask, blocks, slots, perms, capacity)


def tile_bits(
    mask: Mask | Callable[..., Any],
    B: int,
    H: int,
    T: int,
    S: int,
    query_block: int = 128,
    key_block: int = 128,
    *,
    num_heads: int | None = None,
) -> TileBits:
    """Stores the partial tiles of a static mask as packed bits, equal tiles once.

    allowed(p, r) = bit r % Bk of table[tile_id[b, h, p // Bq, r // Bk], p % Bq]

    Worth it for masks that are dear to evaluate. `from_mask_mod(tile_bits(mask, ...), ...)` is the layout.

    Args:
      mask: A Mask without traced arrays, or a function.
      B: Batch rows to distinguish.
      H: Heads to distinguish, 1, K or N.
      T: Query slots.
      S: Key slots.
      query_block: Queries a tile.
      key_block: Keys a tile.
      num_heads: N, needed where H is neither 1 nor N; the mask is asked for the first query head of each group.

    Returns:
      A Mask over slots.

    Raises:
      ValueError: If the mask holds traced arrays.

    Example:
      >>> from jattn.softmax import masks
      >>> bits = tile_bits(masks.causal(), 1, 1, 24, 24, 8, 8)
      >>> bits.table.shape, bits.tile_id[0, 0].tolist()
      ((2, 8, 1), [[1, -1, -1], [0, 1, -1], [0, 0, 1]])

    Source: own design; FlashMask (arXiv 2410.01359) stores irregular masks compactly, too.
    """
    check_sizes(query_block, key_block, B=B, H=H, T=T, S=S)
    if not is_concrete(mask):
        raise ValueError("tile_bits needs a static mask; it holds traced arrays")
    mask = jax.tree.map(np.asarray, _mask_value(mask))
    assert isinstance(mask, Mask)
    if num_heads is not None and num_heads % H:
        raise ValueError(f"H = {H} must divide num_heads = {num_heads}")
    group = 1 if num_heads is None else num_heads // H
    heads = H * group
    grid = make_grid((query_block, key_block), (T, S), (None, None), (None, None), B, heads)
    with jax.ensure_compile_time_eval():
        code = np.broadcast_to(tile_classes(mask, grid), (B, heads, grid.query.tiles, grid.key.tiles))[:, ::group]
        ids = np.where(code == FULL, 0, -1).astype(np.int32)
        query_tile, key_tile = np.nonzero((code == PARTIAL).any((0, 1)))
        words = -(-key_block // 32)
        rows = [np.full((1, query_block * words), np.iinfo(np.uint32).max, np.uint32)]
        step = max(1, PAIRS_AT_A_TIME // (B * heads * query_block * key_block))
        for n in range(0, query_tile.size, step):
            visible, logical = pairs_of_tiles(mask, grid, query_tile[n : n + step], key_tile[n : n + step])
            shape = (B, heads, len(query_tile[n : n + step]), query_block, key_block)
            bits = pack_bits(np.broadcast_to(np.asarray(visible) & logical, shape)[:, ::group])
            rows.append(bits.reshape(-1, query_block * words))
    table, entry = np.unique(np.concatenate(rows[1:]), axis=0, return_inverse=True) if rows[1:] else (rows[0][:0], [])
    entry = np.asarray(entry, np.int32).reshape(-1) + 1
    start = 0
    for n in range(0, query_tile.size, step):
        where = (slice(None), slice(None), query_tile[n : n + step], key_tile[n : n + step])
        size = B * H * len(where[2])
        found = entry[start : start + size].reshape(B, H, -1)
        ids[where] = np.where(code[where] == PARTIAL, found, ids[where])
        start += size
    table = np.concatenate([rows[0], table]).reshape(-1, query_block, words)
    return TileBits(table, ids, query_block, key_block, num_heads)
