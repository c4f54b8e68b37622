"""Decoding of multi-head attention: keys and values in a cache with a policy, or the state of a recurrence."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.cache import CachePolicy, KVCache, RecurrentState, slots_for_heads, token_positions
from jattn.cache.recurrent import state_before
from jattn.softmax.calling import accepts, names_argument


def on_state(function: Any, policy: CachePolicy) -> bool:
    """Whether an attention function decodes on a state: a recurrence, under a policy that lets all of it be seen."""
    keeps = names_argument(function, "initial_state") and names_argument(function, "return_final_state")
    return keeps and policy.causal and not policy.forgets


class CachedAttention(nnx.Module):
    """What `MultiHeadAttention` does when it is given a cache."""

    def init_cache(self, policy: CachePolicy, batch: int, dtype: Any = None) -> KVCache | RecurrentState:
        """An empty cache for this layer; its dtype is that of the keys unless given.

        A recurrence as the attention function keeps its state instead, unless the policy forgets or is not causal.
        """
        dtype = self.dtype or self.key.kernel.get_value().dtype if dtype is None else dtype
        heads, widths = (self.num_heads, *(self.num_kv_heads,) * 2), (*(self.head_dim,) * 2, self.value_dim)
        if not on_state(self.attention_fn, policy):
            return policy.init(batch, self.num_kv_heads, self.head_dim, self.value_dim, dtype)
        token = [jnp.zeros((batch, 1, count, width), dtype) for count, width in zip(heads, widths, strict=True)]

        def last_state(ids: jax.Array) -> RecurrentState:
            return RecurrentState(
                self.attention_fn(*token, is_causal=True, segment_ids=ids, return_final_state=True)[1]
            )

        return state_before(last_state, batch)

    def _arguments_of_cache(
        self, x: jax.Array, context: jax.Array | None, positions: Any, segment_ids: Any, policy: Any, cache: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array, dict[str, Any], Any]:
        """Query, key, value, what else the attention function is given, and the cache with the new tokens in it."""
        if policy.causal:
            if context is not None:
                raise ValueError("context needs a cache policy that is not causal, such as FullCache(n, causal=False)")
            if positions is not None:
                raise ValueError("positions cannot be given together with a cache, which counts them itself")
        parts = self._on_state if isinstance(cache, RecurrentState) else self._on_keys
        return parts(x, context, positions, segment_ids, policy, cache)

    def _on_state(
        self, x: jax.Array, context: Any, positions: Any, segment_ids: Any, policy: Any, cache: RecurrentState
    ) -> tuple[jax.Array, jax.Array, jax.Array, dict[str, Any], RecurrentState]:
        query, key, value = self.project(x, x)
        ids = None
        places = token_positions(cache, x.shape[1], None if segment_ids is None else jnp.asarray(segment_ids) >= 0)
        if segment_ids is not None:
            ids = jnp.where(places >= 0, 0, -1)
        real = jnp.maximum(places, 0)
        arguments = {
            "is_causal": True,
            "segment_ids": ids,
            "scale": self.scale,
            "initial_state": cache.state,
            "return_final_state": True,
        }
        if hasattr(self.position, "score_mod"):
            raise ValueError(f"a recurrence has no logits that {type(self.position).__name__} could bias")
        seen = cache.next + jnp.sum(places >= 0, axis=1, dtype=jnp.int32)
        cache = dataclasses.replace(cache, next=seen)
        return self._rotated_queries(query, real), self._rotated_keys(key, real), value, arguments, cache

    def _on_keys(
        self, x: jax.Array, context: jax.Array | None, positions: Any, segment_ids: Any, policy: Any, cache: KVCache
    ) -> tuple[jax.Array, jax.Array, jax.Array, dict[str, Any], KVCache]:
        query_ids, key_ids = segment_ids if isinstance(segment_ids, tuple | list) else (segment_ids, segment_ids)
        query, key, value = self.project(x, x if context is None else context)
        if policy.causal or context is not None:
            valid = None if key_ids is None else jnp.asarray(key_ids) >= 0
            places = jnp.maximum(token_positions(cache, key.shape[1], valid), 0)
            cache, appended = policy.append(cache, self._rotated_keys(key, places), value, valid)
        if policy.causal:
            query_positions = appended
        else:
            base = jnp.arange(x.shape[1]) if positions is None else jnp.asarray(positions)
            query_positions = jnp.broadcast_to(base, x.shape[:2])
            if query_ids is not None:
                query_positions = jnp.where(jnp.asarray(query_ids) >= 0, query_positions, -1)
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        query, key, value = policy.read(cache, query, query_positions, self._rotated_queries)
        arguments: dict[str, Any] = {
            "mask": slots_for_heads(policy.mask(cache, query_positions), self.num_heads),
            "scale": scale if self.scale is not None or query.shape[-1] != self.head_dim else None,
        }
        if cache.key_positions.shape[1] == 1:
            for name, places in (("query_positions", query_positions), ("key_positions", cache.key_positions[:, 0])):
                if accepts(self.attention_fn, name):
                    arguments[name] = places
            # The mask says it already; a function with patterns of its own must choose the causal one by itself.
            if policy.causal and accepts(self.attention_fn, "is_causal"):
                arguments["is_causal"] = True
        if hasattr(self.position, "score_mod"):
            i, j = policy.seen_positions(cache, query_positions)
            if j.shape[1] == 1 and accepts(self.attention_fn, "score_mod"):
                arguments["score_mod"] = self.position.score_mod(self.num_heads)
                arguments["key_positions"] = j[:, 0]
            else:
                arguments["bias"] = self._dense_bias(i, j)
        return query, key, value, arguments, cache

    def _rotated_queries(self, query: jax.Array, positions: jax.Array) -> jax.Array:
        if not hasattr(self.position, "rotate"):
            return query
        return self.position.rotate(query, query, positions, positions)[0]

    def _rotated_keys(self, key: jax.Array, positions: jax.Array) -> jax.Array:
        if not hasattr(self.position, "rotate"):
            return key
        return self.position.rotate(key, key, positions, positions)[1]
