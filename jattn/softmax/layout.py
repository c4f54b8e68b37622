"""The one block-sparse representation: which tiles of the score matrix are live, and what is allowed inside them."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jattn.softmax.masks import Mask
from jattn.softmax.predicates import TileBits, head_entry

__all__ = ["BlockLayout", "TransposedLists", "is_concrete", "lists_from_live"]


def is_concrete(*arrays: Any) -> bool:
    """Says whether no array is being traced, so that its values may be looked at."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arrays))


def _module_of(*arrays: Any) -> Any:
    return jnp if any(isinstance(x, jax.Array) for x in arrays) else np


def lists_from_live(live: Any, full: Any, capacity: int) -> tuple[Any, Any, Any]:
    """Turns maps of live and full tiles into padded lists.

    count[r] = sum_k live[r, k];  index[r, :count] = the live k, ascending;  the tail repeats the last live id

    Args:
      live: Booleans [..., nQ, nK].
      full: Booleans [..., nQ, nK]; looked at where live.
      capacity: Length M of every list; no row may hold more live tiles.

    Returns:
      count int32 [..., nQ], index int32 [..., nQ, M], full bool [..., nQ, M]; numpy from numpy.

    Example:
      >>> import numpy as np
      >>> live = np.array([[True, False, True], [False, False, False]])
      >>> count, index, full = lists_from_live(live, live, 3)
      >>> count.tolist(), index.tolist()
      ([2, 0], [[0, 2, 2], [0, 0, 0]])

    Source: FlexAttention (arXiv 2412.05496) stores its block masks the same way.
    """
    xp = _module_of(live, full)
    count = xp.sum(live, axis=-1, dtype=np.int32)
    order = xp.argsort(~live, axis=-1, stable=True)[..., :capacity].astype(np.int32)
    last = xp.take_along_axis(order, xp.maximum(count[..., None] - 1, 0), axis=-1)
    inside = np.arange(capacity, dtype=np.int32) < count[..., None]
    index = xp.where(inside, order, xp.where(count[..., None] > 0, last, 0))
    return count, index, xp.take_along_axis(full, index, axis=-1) & inside


class TransposedLists(NamedTuple):
    """The lists of a layout seen from the keys: for every kv tile the q tiles that look at it.

    Attributes:
      t_count: int32 [Bb, Hb, nK], number of q tiles.
      t_index: int32 [Bb, Hb, nK, nQ], ascending, the tail repeats the last id.
      t_full: bool [Bb, Hb, nK, nQ].
      t_tile_id: int32 [B', H', nK, nQ], the entries of a `TileBits` predicate in the order of t_index; None for
        other predicates.
    """

    t_count: Any
    t_index: Any
    t_full: Any
    t_tile_id: Any = None


def _static(**options: Any) -> Any:
    return dataclasses.field(metadata={"static": True}, **options)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """Lists of live tiles, the tiles that need no look at their pairs, and a predicate for the others.

    allowed(p, r) = tile(p, r) is live and (tile is full or predicate(p, r)) and both slots hold a token

    Leading axes: Bb in {1, B}, Hb in {1, K, N}; the perms and the predicate have their own; query head n reads entry
    n // (N/H). A slot is a token unless a perm says which token it holds. Layouts go through jit, scan and vmap as
    arguments; the block sizes and numbers of slots are static. They carry no gradient.

    Attributes:
      count: int32 [Bb, Hb, nQ], number of live kv tiles of each q tile.
      index: int32 [Bb, Hb, nQ, M], first `count` entries strictly ascending ids; the tail repeats the last one (0 if
        there is none).
      full: bool [Bb, Hb, nQ, M], every pair of occupied slots is allowed; False in the tail.
      predicate: A Mask for the live tiles that are not full; None allows all their pairs.
      query_perm: int32 [Bp, Hp, query_slots], token of each slot, -1 = empty; every query token in exactly one slot.
      key_perm: int32 [Bp, Hp, key_slots]; every key token in at most one slot.
      overflow: int32 [Bb, Hb, nQ], live tiles that did not fit into M; None where nothing can be missing.
      query_block: Queries a tile.
      key_block: Keys a tile.
      query_slots: Number of query slots; nQ = ceil(query_slots / query_block).
      key_slots: Number of key slots; nK = ceil(key_slots / key_block).

    Example:
      >>> import numpy as np
      >>> layout = BlockLayout(
      ...     count=np.array([[[1, 2]]], np.int32), index=np.array([[[[0, 0], [0, 1]]]], np.int32),
      ...     full=np.array([[[[True, False], [True, True]]]]), query_block=1, key_block=1, query_slots=2, key_slots=2)
      >>> layout.validate().to_dense(1, 1, 2, 2)[0, 0].astype(int).tolist()
      [[1, 0], [1, 1]]
      >>> layout.density
      0.75

    Source: own design, after the block masks of FlexAttention (arXiv 2412.05496) and splash attention.
    """

    count: Any
    index: Any
    full: Any
    predicate: Mask | None = None
    query_perm: Any = None
    key_perm: Any = None
    overflow: Any = None
    query_block: int = _static(default=128)
    key_block: int = _static(default=128)
    query_slots: int = _static()
    key_slots: int = _static()

    @property
    def num_query_tiles(self) -> int:
        """Number nQ of q tiles."""
        return -(-self.query_slots // self.query_block)

    @property
    def num_key_tiles(self) -> int:
        """Number nK of kv tiles."""
        return -(-self.key_slots // self.key_block)

    @property
    def density(self) -> Any:
        """Live share of the tiles: sum(count) / (nQ nK), averaged over the lists; a float outside jit."""
        total = float(np.prod(np.shape(self.count))) * self.num_key_tiles
        if is_concrete(self.count):
            return float(np.sum(np.asarray(self.count), dtype=np.int64) / total) if total else 0.0
        return jnp.sum(self.count) / max(total, 1.0)

    def live_tiles(self, batch: int, num_heads: int) -> Any:
        """Number of tiles that are visited for `batch` rows and `num_heads` query heads; an int outside jit."""
        rows, heads = np.shape(self.count)[:2]
        share = (batch // rows) * (num_heads // heads)
        if is_concrete(self.count):
            return int(np.sum(np.asarray(self.count), dtype=np.int64)) * share
        return jnp.sum(self.count) * share

    def flops(self, batch: int, num_heads: int, head_dim: int, value_dim: int | None = None) -> Any:
        """Floating-point operations of the forward pass: 2 (D + Dv) Bq Bk times the live tiles."""
        width = head_dim + (head_dim if value_dim is None else value_dim)
        return 2 * width * self.query_block * self.key_block * self.live_tiles(batch, num_heads)

    def _map(self, values: Any) -> Any:
        # One column more than there are tiles takes what the tail would write.
        inside = np.arange(np.shape(self.index)[-1]) < self.count[..., None]
        xp = _module_of(self.count, self.index, values)
        target = xp.where(inside, self.index, self.num_key_tiles)
        out = xp.zeros((*np.shape(self.count), self.num_key_tiles + 1), bool)
        if xp is np:
            np.put_along_axis(out, target, values, axis=-1)
        else:
            out = jnp.put_along_axis(out, target, values, axis=-1, inplace=False)
        return out[..., :-1]

    def live_map(self) -> Any:
        """Map of the live tiles, bool [Bb, Hb, nQ, nK]; numpy where the lists are."""
        return self._map(_module_of(self.index).ones(np.shape(self.index), bool))

    def full_map(self) -> Any:
        """Map of the full tiles, bool [Bb, Hb, nQ, nK]; numpy where the lists are."""
        return self._map(self.full)

    def transposed(self) -> TransposedLists:
        """The lists per kv tile, rebuilt from the (possibly truncated) forward lists, never truncated themselves."""
        live = self.live_map().swapaxes(-1, -2)
        lists = lists_from_live(live, self.full_map().swapaxes(-1, -2), self.num_query_tiles)
        tile_id = None
        if isinstance(self.predicate, TileBits):
            ids = self.predicate.tile_id.swapaxes(-1, -2)
            index = lists[1]
            if ids.shape[1] != index.shape[1] and 1 not in (ids.shape[1], index.shape[1]):
                index = index.repeat(ids.shape[1] // index.shape[1], axis=1)
            shape = np.broadcast_shapes(ids.shape[:2], index.shape[:2])
            xp = _module_of(ids, index)
            ids, index = (xp.broadcast_to(x, shape + x.shape[2:]) for x in (ids, index))
            tile_id = xp.take_along_axis(ids, index, axis=-1)
        return TransposedLists(*lists, tile_id)

    def to_dense(
        self,
        batch: int,
        num_heads: int,
        query_length: int,
        key_length: int,
        *,
        query_positions: Any = None,
        key_positions: Any = None,
    ) -> jax.Array:
        """The mask that the layout stands for, in the original order of the tokens.

        Args:
          batch: B.
          num_heads: N, query heads.
          query_length: T, tokens.
          key_length: S, tokens.
          query_positions: [B|1, T], what the predicate sees as i; 0..T-1 if not given.
          key_positions: [B|1, S], what the predicate sees as j; 0..S-1 if not given.

        Returns:
          bool [B, N, T, S].

        Raises:
          ValueError: If the layout does not fit these sizes.
        """
        self.validate(batch=batch, num_heads=num_heads, query_length=query_length, key_length=key_length, values=False)
        heads = np.arange(num_heads)

        def tiles(array: Any) -> jax.Array:
            array = jnp.asarray(array)
            if array.shape[1] > 1:
                array = array[:, head_entry(heads, num_heads, array.shape[1])]
            array = jnp.repeat(jnp.repeat(array, self.query_block, axis=-2), self.key_block, axis=-1)
            return array[..., : self.query_slots, : self.key_slots]

        query_token = _tokens(self.query_perm, num_heads, self.query_slots)
        key_token = _tokens(self.key_perm, num_heads, self.key_slots)
        allowed = tiles(self.live_map())
        if self.predicate is not None:
            rows = np.arange(batch)[:, None, None, None]
            visible = jax.tree.map(jnp.asarray, self.predicate).at(
                jnp.asarray(rows),
                jnp.asarray(heads)[None, :, None, None],
                _positions(query_positions, query_token)[..., :, None],
                _positions(key_positions, key_token)[..., None, :],
                jnp.arange(self.query_slots)[None, None, :, None],
                jnp.arange(self.key_slots)[None, None, None, :],
            )
            allowed = allowed & (tiles(self.full_map()) | visible)
        allowed = jnp.broadcast_to(allowed, (batch, num_heads, self.query_slots, self.key_slots))
        allowed = _unpermute(allowed, self.query_perm, query_token, query_length, 2)
        allowed = _unpermute(allowed, self.key_perm, key_token, key_length, 3)
        return jnp.broadcast_to(allowed, (batch, num_heads, query_length, key_length))

    def validate(
        self,
        *,
        batch: int | None = None,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        query_length: int | None = None,
        key_length: int | None = None,
        values: bool = True,
    ) -> BlockLayout:
        """Checks shapes and, where nothing is traced, values; returns the layout itself.

        Args:
          batch: B that the leading axes must be 1 or.
          num_heads: N; leading head axes must divide it.
          num_kv_heads: K; leading head axes must be 1, K or N.
          query_length: T; the number of query slots where there is no perm.
          key_length: S; the number of key slots where there is no perm.
          values: Whether to look at concrete values, too (needs them on the host).

        Raises:
          ValueError: Names the field, its shape and what was expected.
        """
        from jattn.softmax.validation import check_layout

        check_layout(self, batch, num_heads, num_kv_heads, query_length, key_length, values)
        return self

    def plot(self, *, batch_index: int = 0, head: int = 0, ax: Any = None) -> Any:
        """Draws the tiles with matplotlib (light = partial, dark = full) and returns the axes."""
        import matplotlib.pyplot as plt

        row, entry = (min(n, size - 1) for n, size in zip((batch_index, head), self.count.shape[:2], strict=True))
        picture = np.asarray(self.live_map())[row, entry] + 1.0 * np.asarray(self.full_map())[row, entry]
        ax = plt.subplots(figsize=(4, 4))[1] if ax is None else ax
        ax.imshow(picture, cmap="Blues", vmin=0, vmax=2, interpolation="nearest", aspect="auto")
        ax.set_xlabel(f"kv tile ({self.key_block} keys)")
        ax.set_ylabel(f"q tile ({self.query_block} queries)")
        return ax


def _tokens(perm: Any, num_heads: int, slots: int) -> Any:
    """Token of every slot, [B|1, N|1, slots]; -1 = empty."""
    if perm is None:
        return np.arange(slots)[None, None]
    perm = jnp.asarray(perm)
    return perm if perm.shape[1] == 1 else perm[:, head_entry(np.arange(num_heads), num_heads, perm.shape[1])]


def _positions(positions: Any, token: Any) -> jax.Array:
    token = jnp.maximum(token, 0)
    if positions is None:
        return token
    positions = jnp.asarray(positions)[:, None]
    batch = np.broadcast_shapes(positions.shape[:1], token.shape[:1])
    return jnp.take_along_axis(
        jnp.broadcast_to(positions, batch + (token.shape[1], positions.shape[2])),
        jnp.broadcast_to(token, batch + token.shape[1:]),
        -1,
    )


def _unpermute(allowed: jax.Array, perm: Any, token: Any, length: int, axis: int) -> jax.Array:
    """Brings slots back to the order of the tokens; tokens without a slot see nothing and are not seen."""
    if perm is None:
        return allowed
    batch, heads, slots = token.shape
    # The slot of each token, found by writing slot numbers to tokens; empty slots write into one column too many.
    slot = jnp.full((batch, heads, length + 1), slots)
    target = jnp.where(token < 0, length, token)
    slot = jnp.put_along_axis(slot, target, jnp.arange(slots), axis=-1, inplace=False)[..., :-1]
    slot = jnp.expand_dims(slot, 5 - axis)
    found = jnp.take_along_axis(allowed, jnp.minimum(slot, slots - 1), axis=axis)
    return found & (slot < slots)
