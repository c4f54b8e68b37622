"""Predicates of a block layout that look at slots: per-query block selections, and packed bits of odd tiles."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.softmax.mask_type import Mask, readable

__all__ = ["TileBits", "TokenSelection", "head_entry", "pack_bits", "token_selection", "unpack_bits"]


def _module_of(*arrays: Any) -> Any:
    return jnp if any(isinstance(x, jax.Array) for x in arrays) else np


def head_entry(head: Any, num_heads: int | None, entries: int) -> Any:
    """Entry of a per-head array that query head `head` reads: head // (N / entries).

    Args:
      head: Query head, an integer or an array of them.
      num_heads: N; None stands for `entries`.
      entries: Length of the array's head axis: 1, K or N.

    Returns:
      The entry, of the shape of `head`; the plain 0 if there is one entry.

    Raises:
      ValueError: If `entries` does not divide N.

    Example:
      >>> import numpy as np
      >>> head_entry(np.arange(4), 4, 2).tolist()
      [0, 0, 1, 1]

    Source: the head order of grouped-query attention (arXiv 2305.13245).
    """
    if entries == 1:
        return 0
    num_heads = entries if num_heads is None else num_heads
    if num_heads % entries:
        raise ValueError(f"an array with {entries} heads does not fit {num_heads} query heads")
    return head // (num_heads // entries)


def pack_bits(array: Any) -> Any:
    """Packs booleans [..., n] into uint32 [..., ceil(n / 32)], the first in the lowest bit.

    Example:
      >>> import numpy as np
      >>> pack_bits(np.array([True, False, True])).tolist()
      [5]

    Source: plain bit packing.
    """
    xp = _module_of(array)
    array = xp.asarray(array)
    extra = -array.shape[-1] % 32
    array = xp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, extra)])
    words = array.reshape(*array.shape[:-1], -1, 32).astype(np.uint32) << np.arange(32, dtype=np.uint32)
    return xp.sum(words, axis=-1, dtype=np.uint32)


def unpack_bits(words: Any, size: int) -> Any:
    """Inverse of `pack_bits`: uint32 [..., ceil(size / 32)] to booleans [..., size].

    Example:
      >>> import numpy as np
      >>> unpack_bits(np.array([5], np.uint32), 3).tolist()
      [True, False, True]

    Source: plain bit packing.
    """
    bits = (words[..., None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    return bits.reshape(*words.shape[:-1], -1)[..., :size].astype(bool)


def _bit(word: Any, position: Any, xp: Any) -> Any:
    return ((word >> xp.asarray(position % 32, np.uint32)) & np.uint32(1)).astype(bool)


def _batch_entry(b: Any, entries: int) -> Any:
    return b if entries > 1 else 0


def _static(**options: Any) -> Any:
    return dataclasses.field(metadata={"static": True}, **options)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenSelection(Mask):
    """Selected blocks of keys for every query, or for every few queries, by slot.

    allowed(p, r) = sel[b, h, p // sel_q, r // sel_block]

    Built by `token_selection`, which packs the booleans.

    Attributes:
      bits: uint32 [Bs, Hs, ceil(T / sel_q), ceil(nC / 32)], Bs in {1, B}, Hs in {1, K, N}.
      sel_q: Queries that share a choice.
      sel_block: Keys a selected block.
      num_blocks: nC.
      num_heads: N; needed where Hs is neither 1 nor N.

    Source: MoBA (arXiv 2502.13189), native sparse attention (arXiv 2502.11089) and others select per query.
    """

    bits: Any
    sel_q: int = _static(default=1)
    sel_block: int = _static(default=1)
    num_blocks: int = _static(default=0)
    num_heads: int | None = _static(default=None)

    def __call__(self, b: Any, h: Any, i: Any, j: Any) -> Any:
        """Visibility where slots are positions."""
        return self.at(b, h, i, j, i, j)

    def at(self, b: Any, h: Any, i: Any, j: Any, query_slot: Any, key_slot: Any) -> Any:
        """Visibility by slot."""
        xp = _module_of(self.bits, b, h, query_slot, key_slot)
        bits = readable(self.bits, b, h, query_slot, key_slot)
        rows, heads, groups, words = bits.shape
        # Slots of a tile may run past the end; whoever masks the padding hides what is read there.
        group = xp.minimum(query_slot // self.sel_q, groups - 1)
        block = xp.minimum(key_slot // self.sel_block, words * 32 - 1)
        word = bits[_batch_entry(b, rows), head_entry(h, self.num_heads, heads), group, block // 32]
        return _bit(word, block, xp)

    def dense(self) -> Any:
        """The selection as booleans [Bs, Hs, ceil(T / sel_q), nC]."""
        return unpack_bits(self.bits, self.num_blocks)


def token_selection(sel: Any, sel_q: int = 1, sel_block: int = 1, *, num_heads: int | None = None) -> TokenSelection:
    """Packs a selection of key blocks per query into a predicate for a block layout.

    allowed(p, r) = sel[b, h, p // sel_q, r // sel_block]

    Args:
      sel: Booleans [Bs, Hs, ceil(T / sel_q), ceil(S / sel_block)], Bs in {1, B}, Hs in {1, K, N}.
      sel_q: Queries that share a choice.
      sel_block: Keys a block.
      num_heads: N, needed where Hs is neither 1 nor N.

    Returns:
      A Mask over slots.

    Raises:
      ValueError: If sel is not boolean of rank 4 or a size is not positive.

    Example:
      >>> import numpy as np
      >>> mask = token_selection(np.array([[[[True, False], [False, True]]]]), sel_block=2)
      >>> mask.to_dense(1, 1, 2, 4)[0, 0].astype(int).tolist()
      [[1, 1, 0, 0], [0, 0, 1, 1]]

    Source: MoBA (arXiv 2502.13189), native sparse attention (arXiv 2502.11089) and others select per query.
    """
    sel = sel if isinstance(sel, jax.Array) else np.asarray(sel)
    if sel.ndim != 4 or sel.dtype != bool or 0 in sel.shape:
        raise ValueError(
            f"sel must be boolean [Bs, Hs, ceil(T/sel_q), nC], none of them 0; got {sel.dtype}, {sel.shape}"
        )
    if sel_q < 1 or sel_block < 1:
        raise ValueError(f"sel_q and sel_block must be positive; got {sel_q} and {sel_block}")
    head_entry(0, num_heads, sel.shape[1])
    return TokenSelection(pack_bits(sel), sel_q, sel_block, sel.shape[3], num_heads)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileBits(Mask):
    """Partial tiles of a static mask as a table of bits, equal tiles stored once.

    allowed(p, r) = bit r % Bk of table[tile_id[b, h, p // Bq, r // Bk], p % Bq]

    Built by `tile_bits`. Entry 0 of the table is all ones, so that a full tile may be read as a partial one.

    Attributes:
      table: uint32 [U, Bq, ceil(Bk / 32)].
      tile_id: int32 [Bs, Hs, nQ, nK], entry of the table, -1 = nothing allowed.
      query_block: Bq.
      key_block: Bk.
      num_heads: N; needed where Hs is neither 1 nor N.

    Source: FlashMask-like packed masks; own design.
    """

    table: Any
    tile_id: Any
    query_block: int = _static(default=128)
    key_block: int = _static(default=128)
    num_heads: int | None = _static(default=None)

    def __call__(self, b: Any, h: Any, i: Any, j: Any) -> Any:
        """Visibility where slots are positions."""
        return self.at(b, h, i, j, i, j)

    def at(self, b: Any, h: Any, i: Any, j: Any, query_slot: Any, key_slot: Any) -> Any:
        """Visibility by slot."""
        arrays = (self.table, self.tile_id, b, h, query_slot, key_slot)
        xp = _module_of(*arrays)
        table, tile_id = (readable(x, *arrays) for x in (self.table, self.tile_id))
        rows, heads, query_tiles, key_tiles = tile_id.shape
        tile = tile_id[
            _batch_entry(b, rows),
            head_entry(h, self.num_heads, heads),
            xp.minimum(query_slot // self.query_block, query_tiles - 1),
            xp.minimum(key_slot // self.key_block, key_tiles - 1),
        ]
        column = key_slot % self.key_block
        word = table[xp.maximum(tile, 0), query_slot % self.query_block, column // 32]
        return _bit(word, column, xp) & (tile >= 0)
