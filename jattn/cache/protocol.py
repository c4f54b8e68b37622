"""The KV-cache protocol: a pytree of static shape and policies of static numbers.

A cache holds C slots a batch row. Each slot carries the position of its token (-1 = free), and everything that is
decided at reading time is decided from positions:

    visible = (key position >= 0) & (key position <= query position) & (rule of the policy)

No roll, no sort: a token is written by a scatter into the slot that its position names, and forgetting it means
setting its position to -1 or overwriting it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.softmax.masks import Mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """What a cache policy has stored: keys (rotated at their original positions), values, and where they come from.

    Args:
        key: `[B, C, K, D]`.
        value: `[B, C, K, Dv]`.
        key_positions: int32 `[B, 1, C]`, or `[B, K, C]` for a policy that evicts per kv head; -1 marks a free slot.
        next: int32 `[B]`, the number of tokens seen, which is the position of the next one.
        aux: pytree of what else a policy keeps per slot.

    Example:
        >>> from jattn.cache import FullCache
        >>> FullCache(8).init(2, 1, 4, 4).key.shape
        (2, 8, 1, 4)
    """

    key: Any
    value: Any
    key_positions: Any
    next: Any
    aux: Any = ()


def token_positions(cache: Any, length: int, valid: Any = None) -> jax.Array:
    """Positions that the next `length` tokens of each row will get: next, next + 1, ... over the valid ones.

    Args:
        cache: the cache before these tokens, a `KVCache` or a `RecurrentState`.
        length: T.
        valid: bool `[B, T]`, all true if not given.

    Returns:
        int32 `[B, T]`; -1 for invalid tokens.

    Raises:
        ValueError: `valid` is not boolean `[B, T]`.

    Example:
        >>> import numpy as np
        >>> from jattn.cache import FullCache
        >>> token_positions(FullCache(4).init(1, 1, 2, 2), 3, np.array([[False, True, True]])).tolist()
        [[-1, 0, 1]]
    """
    batch = cache.next.shape[0]
    if valid is None:
        return cache.next[:, None] + jnp.arange(length, dtype=jnp.int32)
    valid = jnp.asarray(valid)
    if valid.shape != (batch, length) or valid.dtype != bool:
        raise ValueError(f"valid must be boolean [B, T] = {[batch, length]}, got {valid.dtype}{list(valid.shape)}")
    counted = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    return jnp.where(valid, cache.next[:, None] + counted - 1, -1)


def reorder(cache: Any, index: Any) -> Any:
    """Pick batch rows, as beam search does: the batch axis of every leaf is indexed with `index`.

    Args:
        cache: a cache, or any pytree of caches.
        index: int `[B']`, the old row of each new row.

    Returns:
        The same pytree with B' rows.

    Example:
        >>> import numpy as np
        >>> from jattn.cache import FullCache
        >>> reorder(FullCache(4).init(2, 1, 2, 2), np.array([1, 1, 0])).next.shape
        (3,)
    """
    index = jnp.asarray(index)
    return jax.tree.map(lambda leaf: jnp.take(leaf, index, axis=0), cache)


def nbytes(cache: Any) -> int:
    """Bytes that a cache occupies: the sum over its leaves.

    Args:
        cache: a cache, a pytree of caches, or a pytree of shapes and dtypes.

    Returns:
        The number of bytes.

    Example:
        >>> from jattn.cache import FullCache
        >>> nbytes(FullCache(8).init(1, 2, 4, 4)) == 2 * 8 * 2 * 4 * 4 + 8 * 4 + 4
        True
    """
    return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(cache))


def slots_for_heads(mask: Any, num_heads: int) -> jax.Array:
    """A policy's mask `[B, K|1, T, C]` for query heads: `[B, N|1, T, C]`, head n reading kv head n // (N / K)."""
    heads = mask.shape[1]
    return mask if heads == 1 else jnp.repeat(mask, num_heads // heads, axis=1)


@dataclasses.dataclass(frozen=True)
class CachePolicy:
    """Base of all policies: what they share, and the five points where they differ.

    A policy defines `capacity`, `slot_of` and `visible`; it may limit the tokens of one `append` (`chunk`), say that
    it overwrites (`forgets`), evict, or show positions to its queries other than the original ones.
    """

    @property
    def capacity(self) -> int:
        """C, the number of slots."""
        raise NotImplementedError

    @property
    def max_chunk(self) -> int | None:
        """Largest number of tokens that one `append` takes; None = any."""
        return None

    @property
    def forgets(self) -> bool:
        """Whether tokens are overwritten or evicted, so that going back is impossible."""
        return False

    @property
    def causal(self) -> bool:
        """Whether a query sees no later position; false for a cache of conditions."""
        return True

    def slot_of(self, positions: Any) -> Any:
        """Slot of a token at a position >= 0; C (or more) for one that is not stored."""
        raise NotImplementedError

    def visible(self, query_positions: Any, key_positions: Any) -> Any:
        """The policy's own rule on broadcastable positions, beside pos >= 0 and causality."""
        return True

    def parallel_mask(self) -> Mask:
        """The mask under which one parallel pass of attention sees what decoding with this policy sees.

        Raises:
            ValueError: there is no such mask, because what is kept depends on more than positions.
        """
        raise ValueError(f"what {self} keeps cannot be said by a mask on positions")

    def init(self, batch: int, kv_heads: int, head_dim: int, v_dim: int, dtype: Any = jnp.float32) -> KVCache:
        """An empty cache.

        Args:
            batch: B.
            kv_heads: K.
            head_dim: D.
            v_dim: Dv.
            dtype: of keys and values.

        Returns:
            The cache, all slots free.

        Raises:
            ValueError: a size is not positive.
        """
        for name, size in (("batch", batch), ("kv_heads", kv_heads), ("head_dim", head_dim), ("v_dim", v_dim)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        return KVCache(
            key=jnp.zeros((batch, self.capacity, kv_heads, head_dim), dtype),
            value=jnp.zeros((batch, self.capacity, kv_heads, v_dim), dtype),
            key_positions=jnp.full((batch, 1, self.capacity), -1, jnp.int32),
            next=jnp.zeros((batch,), jnp.int32),
        )

    def append(self, cache: KVCache, key: Any, value: Any, valid: Any = None) -> tuple[KVCache, jax.Array]:
        """Write the keys and values of T new tokens.

        Args:
            cache: the cache.
            key: `[B, T, K, D]`, rotated at `token_positions(cache, T, valid)`.
            value: `[B, T, K, Dv]`.
            valid: bool `[B, T]`; an invalid token gets position -1, writes nothing and does not count.

        Returns:
            The new cache and the positions of the tokens, int32 `[B, T]`.

        Raises:
            ValueError: shapes do not fit the cache, or T is larger than the chunk that the policy was made for.
        """
        key, value = jnp.asarray(key), jnp.asarray(value)
        for name, new, old in (("key", key, cache.key), ("value", value, cache.value)):
            expected = [old.shape[0], "T", *old.shape[2:]]
            if new.ndim != 4 or [new.shape[0], *new.shape[2:]] != [old.shape[0], *old.shape[2:]]:
                raise ValueError(f"{name} must be {expected} to fit the cache, got {list(new.shape)}")
        length = key.shape[1]
        if value.shape[1] != length:
            raise ValueError(f"value must have the length of key, {length}, got {list(value.shape)}")
        if self.max_chunk is not None and length > self.max_chunk:
            raise ValueError(
                f"key brings {length} tokens, but this {type(self).__name__} was made for chunks of at most "
                f"{self.max_chunk}; feed it in chunks or make it with chunk={length}"
            )
        positions = token_positions(cache, length, valid)
        slots = jnp.where(positions < 0, self.capacity, self.slot_of(jnp.maximum(positions, 0)))

        # Out-of-range slots are dropped: that is how invalid tokens and overflow write nothing. vmap keeps the batch
        # axis out of the indices, so that a sharded batch stays where it is.
        def write(old, slot, new):
            return old.at[slot].set(new.astype(old.dtype), mode="drop")

        written = KVCache(
            key=jax.vmap(write)(cache.key, slots, key),
            value=jax.vmap(write)(cache.value, slots, value),
            key_positions=jax.vmap(write)(cache.key_positions[:, 0], slots, positions)[:, None],
            next=cache.next + jnp.sum(positions >= 0, axis=1, dtype=jnp.int32),
            aux=cache.aux,
        )
        return written, positions

    def mask(self, cache: KVCache, query_positions: Any) -> jax.Array:
        """Which slots the queries see.

        Args:
            cache: the cache, after `append`.
            query_positions: int `[B, T]`, as `append` returned them; -1 sees nothing.

        Returns:
            bool `[B, K|1, T, C]`.
        """
        i = jnp.asarray(query_positions)[:, None, :, None]
        j = cache.key_positions[:, :, None, :]
        seen = (j >= 0) & (i >= 0) & self.visible(i, j)
        return seen & (j <= i) if self.causal else seen

    def evict(self, cache: KVCache, col_mass: Any = None) -> KVCache:
        """Forget tokens after the attention of a chunk. Policies that overwrite by position have nothing to do.

        Args:
            cache: the cache.
            col_mass: float `[B, K, C]`, attention mass that each slot got, for policies that ask for it.

        Returns:
            The cache.
        """
        return cache

    def read(
        self, cache: KVCache, query: Any, query_positions: Any, rotate: Callable[[Any, Any], Any]
    ) -> tuple[Any, Any, Any]:
        """Query, key and value that one call of attention takes, positions applied to the query.

        Args:
            cache: the cache, after `append`.
            query: `[B, T, N, D]`, not rotated yet.
            query_positions: int `[B, T]`.
            rotate: `rotate(x, positions) -> x`, the position transform of queries.

        Returns:
            query `[B, T, N, D']`, key `[B, C, K, D']`, value `[B, C, K, Dv]`; the scale of the logits stays that of D.
        """
        return rotate(query, jnp.maximum(query_positions, 0)), cache.key, cache.value

    def seen_positions(self, cache: KVCache, query_positions: Any) -> tuple[Any, Any]:
        """Positions as relative biases are to see them.

        Args:
            cache: the cache, after `append`.
            query_positions: int `[B, T]`.

        Returns:
            Query positions `[B, T, 1]` and key positions `[B, 1, C]`, or `[B, T, C]` where they depend on the query.

        Raises:
            ValueError: key positions differ per kv head, which one set of positions cannot say.
        """
        if cache.key_positions.shape[1] != 1:
            raise ValueError("key_positions differ per kv head; a relative bias over such a cache is not defined")
        return jnp.asarray(query_positions)[:, :, None], cache.key_positions

    def truncate(self, cache: KVCache, length: Any) -> KVCache:
        """Go back to the first `length` tokens, as after rejected speculation.

        Args:
            cache: the cache.
            length: int or int `[B]`; a row that has seen fewer tokens stays as it is.

        Returns:
            The cache, without positions >= length.

        Raises:
            ValueError: the policy overwrites or evicts, so that what was there is gone.
        """
        if self.forgets:
            raise ValueError(f"truncate needs a policy that forgets nothing, such as FullCache; got {self}")
        length = jnp.broadcast_to(jnp.asarray(length, jnp.int32), cache.next.shape)
        keep = cache.key_positions < length[:, None, None]
        return dataclasses.replace(
            cache, key_positions=jnp.where(keep, cache.key_positions, -1), next=jnp.minimum(cache.next, length)
        )


def check_sizes(owner: str, **sizes: int) -> None:
    """Raise ValueError unless every size is at least 1 (at least 0 for names that start with `num_`)."""
    for name, size in sizes.items():
        least = 0 if name.startswith("num_") else 1
        if size < least:
            raise ValueError(f"{owner}: {name} must be at least {least}, got {size}")
