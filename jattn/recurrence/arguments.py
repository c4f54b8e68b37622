"""Arguments that the front ends of the recurrence engine share: shapes, key masks, segments."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jattn.softmax import masks


def check_arrays(query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    """Query `[B, T, N, D]`, key `[B, S, K, D]` and value `[B, S, K, Dv]` as arrays; ValueError if they do not fit."""
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating) or not x.size:
            raise ValueError(
                f"{name} must be floats [B, length, heads, size], none of them 0; got {x.dtype}{list(x.shape)}"
            )
    batch, _, num_heads, head_dim = query.shape
    if key.shape[0] != batch or key.shape[3] != head_dim or num_heads % key.shape[2]:
        raise ValueError(f"key must be [{batch}, S, K, {head_dim}], K a divisor of {num_heads}; got {list(key.shape)}")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value must be {[*key.shape[:3], 'Dv']} to fit the key; got {list(value.shape)}")
    return query, key, value


def key_mask(mask: Any, is_causal: bool, batch: int, source: int) -> tuple[Any, bool]:
    """Which keys are visible `[B, S]`, or None, and whether attention is causal."""
    if isinstance(mask, masks.Mask):
        if mask != masks.causal():
            raise ValueError(f"mask must be causal() or a key mask, got {mask}; softmax_attention takes any mask")
        return None, True
    if mask is None:
        return None, is_causal
    mask = jnp.asarray(mask)
    shape = (1,) * (4 - mask.ndim) + mask.shape
    fits = len(shape) == 4 and shape[0] in (1, batch) and shape[1:3] == (1, 1) and shape[3] in (1, source)
    if mask.dtype != bool or not fits:
        raise ValueError(
            f"mask must be a key mask, booleans that broadcast to [{batch}, 1, 1, {source}]; got {mask.dtype}"
            f"{list(mask.shape)}. softmax_attention takes any mask"
        )
    return jnp.broadcast_to(mask.reshape(shape)[:, 0, 0], (batch, source)), is_causal


def check_segments(segment_ids: Any, batch: int, length: int, source: int) -> tuple[Any, bool]:
    """Ids of queries and keys, or None, and whether they came as a pair."""
    if segment_ids is None:
        return None, False
    is_pair = isinstance(segment_ids, tuple | list)
    if not is_pair and length != source:
        raise ValueError(f"segment_ids must be a pair (queries, keys) where T = {length} and S = {source} differ")
    pair = tuple(segment_ids) if is_pair else (segment_ids, segment_ids)
    if len(pair) != 2:
        raise ValueError(f"segment_ids must be an array [B, T] or a pair (queries, keys); got {len(pair)} arrays")
    rows = [check_rows("segment_ids", ids, batch, n) for ids, n in zip(pair, (length, source), strict=True)]
    return tuple(jnp.broadcast_to(x, (batch, x.shape[1])) for x in rows), is_pair


def check_rows(name: str, array: Any, batch: int, length: int) -> Any:
    """Integers `[B|1, length]`, or None."""
    if array is None:
        return None
    array = jnp.atleast_2d(jnp.asarray(array))
    if array.ndim != 2 or array.shape[0] not in (1, batch) or array.shape[1] != length or array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers [{batch} or 1, {length}], got {array.dtype}{list(array.shape)}")
    return array
