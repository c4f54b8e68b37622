"""Attention with a kernel phi(q) . phi(k) by sums over the keys, chunk by chunk: memory linear in T, states in float32.

    num_i = sum_j phi(q_i).phi(k_j) v_j,   den_i = sum_j phi(q_i).phi(k_j),   out_i = num_i / (den_i + eps)

The sum below the line is one more column of values, so there is one state [F, Dv + 1] a head. Features are computed
inside the loops, so those of the whole sequence never exist at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jattn.recurrence.chunk import run_chunks
from jattn.recurrence.feature_maps import apply_feature_map, num_features
from jattn.recurrence.problem import Problem, varying_like
from jattn.recurrence.segments import runs_of


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What is computed, beside the arrays.

    Args:
        phi: the feature map.
        scale: factor of phi(q).
        normalize: whether to divide by the sum of the weights.
        eps: added to that sum.
        chunk_size: tokens a step.
        dtype: of sums and states.
    """

    phi: Callable[..., Any]
    scale: Any
    normalize: bool
    eps: float
    chunk_size: int
    dtype: Any

    def rows(self, query: jax.Array, positions: jax.Array, kv_heads: int) -> jax.Array:
        """Features of queries, scaled: `[B, C, N, D]` -> `[B, C, K, N / K, F]`."""
        features = apply_feature_map(self.phi, query.astype(self.dtype), positions) * self.scale
        return features.reshape(*query.shape[:2], kv_heads, -1, features.shape[-1])

    def columns(self, key: jax.Array, positions: jax.Array, valid: jax.Array | None) -> jax.Array:
        """Features of keys, 0 where invalid: `[B, C, K, D]` -> `[B, C, K, F]`."""
        features = apply_feature_map(self.phi, key.astype(self.dtype), positions)
        return features if valid is None else jnp.where(valid[..., None, None], features, 0)

    def values(self, value: jax.Array) -> jax.Array:
        """Values with a column of ones, `[B, C, K, Dv + 1]`; without it if not `normalize`."""
        value = value.astype(self.dtype)
        return jnp.concatenate([value, jnp.ones_like(value[..., :1])], -1) if self.normalize else value

    def of_chunks(
        self, query: jax.Array, key: jax.Array, value: jax.Array, extras: tuple[Any, ...]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Features as the recurrence wants them, query `[B, K, n, G, C, D]`, key and value `[B, K, n, C, D]`."""
        positions, valid = extras

        def features(x: jax.Array) -> jax.Array:
            if not getattr(self.phi, "uses_positions", False):
                return self.phi(x)
            # Maps with positions want tokens before heads.
            to, back = ((0, 2, 4, 1, 3, 5), (0, 3, 1, 4, 2, 5)) if x.ndim == 6 else ((0, 2, 3, 1, 4), (0, 3, 1, 2, 4))
            moved = x.transpose(to)
            tokens = moved.reshape(x.shape[0], positions[0].size, -1, x.shape[-1])
            found = self.phi(tokens, positions.reshape(x.shape[0], -1))
            return found.reshape(*moved.shape[:-1], found.shape[-1]).transpose(back)

        keys = features(key)
        keys = keys if valid is None else jnp.where(valid[:, None, :, :, None], keys, 0)
        return features(query), keys, self.values(value)

    def divided(self, sums: jax.Array) -> jax.Array:
        """Sums over their last column: `[B, C, K, G, Dv + 1]` -> `[B, C, N, Dv]`."""
        if self.normalize:
            sums = sums[..., :-1] / (sums[..., -1:] + self.eps)
        return sums.reshape(*sums.shape[:2], -1, sums.shape[-1])

    def zero_state(self, key: jax.Array, value: jax.Array) -> jax.Array:
        """Zeros `[B, K, F, Dv + 1]` (Dv without `normalize`), varying where the keys vary in a shard_map."""
        batch, _, kv_heads, head_dim = key.shape
        shape = (batch, kv_heads, num_features(self.phi, head_dim), value.shape[-1] + self.normalize)
        return varying_like(jnp.zeros(shape, self.dtype), key, value)


def _chunks(x: Any, size: int, mode: str = "constant") -> Any:
    """`[B, T, ...]` -> `[ceil(T / size), B, size, ...]`, filled up with zeros (or the last entry, `mode="edge"`)."""
    extra = -x.shape[1] % size
    if extra:
        x = jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2), mode=mode)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _joined(chunks: jax.Array, length: int) -> jax.Array:
    return jnp.moveaxis(chunks, 0, 1).reshape(chunks.shape[1], -1, *chunks.shape[3:])[:, :length]


def _hidden(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    """Zeros where invalid, before anything is computed from it: 0 * NaN would be NaN."""
    return x if valid is None else jnp.where(valid[..., None, None], x, 0)


def _inside(valid: jax.Array | None, length: int, size: int) -> jax.Array | None:
    """`valid` `[B|1, T]`, made explicit where chunks are filled up: features of zeros need not be zero."""
    if valid is None and length % size:
        return jnp.ones((1, length), bool)
    return valid


def attend_all(
    kernel: Kernel,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    valid: jax.Array | None,
    query_positions: jax.Array,
    key_positions: jax.Array,
) -> jax.Array:
    """Every query sees every valid key.

    Args:
        kernel: the kernel.
        query: `[B, T, N, D]`.
        key: `[B, S, K, D]`.
        value: `[B, S, K, Dv]`.
        valid: bool `[B, S]` or None.
        query_positions: `[B|1, T]`.
        key_positions: `[B|1, S]`.

    Returns:
        `[B, T, N, Dv]` in the kernel's dtype.
    """
    (length, source), kv_heads = (query.shape[1], key.shape[1]), key.shape[2]
    key, value = _hidden(key, valid), _hidden(value, valid)
    write, read = min(kernel.chunk_size, source), min(kernel.chunk_size, length)
    valid = _inside(valid, source, write)

    @jax.checkpoint
    def add(state: Any, chunk: Any) -> Any:
        k, v, positions, ok = chunk
        return state + jnp.einsum("bjkf,bjkv->bkfv", kernel.columns(k, positions, ok), kernel.values(v)), None

    def chunked(x: Any, size: int) -> Any:
        return None if x is None else _chunks(x, size)

    state, _ = jax.lax.scan(
        add, kernel.zero_state(key, value), [chunked(x, write) for x in (key, value, key_positions, valid)]
    )

    @jax.checkpoint
    def look_up(chunk: Any) -> jax.Array:
        return kernel.divided(jnp.einsum("bikgf,bkfv->bikgv", kernel.rows(*chunk, kv_heads), state))

    return _joined(jax.lax.map(look_up, (chunked(query, read), chunked(query_positions, read))), length)


def attend_causally(
    kernel: Kernel,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    valid: jax.Array | None,
    runs: jax.Array | None,
    positions: jax.Array,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Query i sees the valid keys j <= i of its own run.

    Args:
        kernel: the kernel.
        query: `[B, T, N, D]`.
        key: `[B, T, K, D]`.
        value: `[B, T, K, Dv]`.
        valid: bool `[B, T]`, of the keys, or None.
        runs: int `[B, T]`, not decreasing, or None for one run; run 0 continues from `state`.
        positions: `[B|1, T]`.
        state: `[B, K, F, Dv + 1]`, what was before.

    Returns:
        `[B, T, N, Dv]` in the kernel's dtype, and the state of the last token's run.
    """
    key, value = _hidden(key, valid), _hidden(value, valid)
    batch, length, kv_heads, width = key.shape
    problem = Problem(
        query=query.reshape(batch, length, kv_heads, -1, width),
        key=key,
        value=value,
        log_decay=None,
        a=None,
        b=None,
        state=varying_like(state.astype(kernel.dtype), query, key, value),
        runs=runs,
        scale=kernel.scale,
        features=kernel.of_chunks,
        extras=(jnp.broadcast_to(positions, (batch, length)), valid),
    )
    sums, state, _ = run_chunks(problem, kernel.chunk_size)
    return kernel.divided(sums), state


def attend_in_order(
    kernel: Kernel,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    valid: jax.Array | None,
    ids: tuple[jax.Array, jax.Array],
    positions: tuple[jax.Array, jax.Array],
    *,
    is_causal: bool,
) -> jax.Array:
    """Queries see the keys of their own segment, all of them or those at no later position; any T and S.

    Keys and queries are sorted into one sequence of runs in which every query stands behind the keys that it sees; that
    makes all of them causal.

    Args:
        kernel: the kernel.
        query: `[B, T, N, D]`.
        key: `[B, S, K, D]`.
        value: `[B, S, K, Dv]`.
        valid: bool `[B, S]` or None.
        ids: segments `[B, T]` and `[B, S]`; negative = padding.
        positions: `[B, T]` and `[B, S]`.
        is_causal: whether a key must stand at no later position than the query.

    Returns:
        `[B, T, N, Dv]` in the kernel's dtype, 0 for padding.
    """
    length, source = query.shape[1], key.shape[1]
    both_ids = jnp.concatenate([ids[1], ids[0]], 1)
    both_positions = jnp.concatenate([positions[1], positions[0]], 1)
    is_query = jnp.broadcast_to(jnp.arange(source + length) >= source, both_ids.shape)
    ranks = (is_query, both_positions, both_ids) if is_causal else (is_query, both_ids)
    order = jnp.lexsort(ranks, axis=-1)

    def sort(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)

    is_query, both_ids = sort(is_query), sort(both_ids)
    runs = runs_of(both_ids)
    key_ok = ids[1] >= 0 if valid is None else (ids[1] >= 0) & valid
    key_ok = sort(jnp.pad(key_ok, [(0, 0), (0, length)]))
    # A key without a query behind it in its run is seen by nobody; NaN in it must reach nobody.
    end = jnp.iinfo(jnp.int32).max
    next_run = jax.lax.cummin(jnp.where(is_query & (both_ids >= 0), runs, end), axis=1, reverse=True)
    key_ok &= next_run == runs
    query = jnp.where((ids[0] >= 0)[..., None, None], query, 0)
    padded = [
        sort(jnp.pad(x, [(0, 0), before, (0, 0), (0, 0)]))
        for x, before in ((query, (source, 0)), (key, (0, length)), (value, (0, length)))
    ]
    out, _ = attend_causally(kernel, *padded, key_ok, runs, sort(both_positions), kernel.zero_state(key, value))
    place = jnp.argsort(order, axis=-1)[:, source:]
    out = jnp.take_along_axis(out, place[..., None, None], axis=1)
    return jnp.where((ids[0] >= 0)[..., None, None], out, 0)
