"""Tokens in groups, such as the documents of a packed row: what is shown of them, and sums over all of a group."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jattn.recurrence.segments import running_logsumexp


def group_logsumexp(x: Any, ids: Any = None) -> jax.Array:
    """Logarithms of sums of exponentials over all tokens of the same id, wherever they stand.

    z_t = log sum over s of exp(x_s), id_s = id_t; -inf contributes nothing, and a group of nothing else has -inf

    Args:
        x: `[B, T, ...]`.
        ids: int `[B, T]`; None for a single group.

    Returns:
        `[B, T, ...]`, or `[B, 1, ...]` for a single group.

    Example:
        >>> [round(x, 4) for x in group_logsumexp(jnp.zeros((1, 3)), jnp.array([[7, 2, 7]]))[0].tolist()]
        [0.6931, 0.0, 0.6931]
    """
    x = jnp.asarray(x)
    if ids is None:
        top = jax.lax.stop_gradient(jnp.max(x, axis=1, keepdims=True))
        top = jnp.where(jnp.isfinite(top), top, 0)
        total = jnp.sum(jnp.exp(x - top), axis=1, keepdims=True)
        return jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1)) + top, -jnp.inf)
    ids = jnp.asarray(ids)
    order = jnp.argsort(ids, axis=1, stable=True)

    def moved(x: jax.Array, places: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, places.reshape(*places.shape, *(1,) * (x.ndim - 2)), axis=1)

    x, ids = moved(x, order), moved(ids, order)
    before = running_logsumexp(x, ids)
    after = jnp.flip(running_logsumexp(jnp.flip(x, 1), jnp.flip(ids, 1)), 1)
    goes_on = jnp.pad(ids[:, :-1] == ids[:, 1:], [(0, 0), (0, 1)]).reshape(*ids.shape, *(1,) * (x.ndim - 2))
    behind = jnp.where(goes_on, jnp.roll(after, -1, axis=1), -jnp.inf)
    # Two tokens, so to speak: what stands up to here, and what stands behind.
    both = running_logsumexp(jnp.stack([before, behind], axis=1))[:, 1]
    return moved(both, jnp.argsort(order, axis=1))


def shown(x: jax.Array, valid: Any, hidden: float = 0.0) -> jax.Array:
    """x `[B, T, ...]` where valid `[B, T]`, something harmless elsewhere: padding may hold anything, NaN too.

    Example:
        >>> shown(jnp.array([[1.0, jnp.nan]]), jnp.array([[True, False]])).tolist()
        [[1.0, 0.0]]
    """
    return x if valid is None else jnp.where(valid.reshape(*valid.shape, *(1,) * (x.ndim - 2)), x, hidden)


def among(ids: jax.Array, others: jax.Array) -> jax.Array:
    """Whether each id of a row `[B, S]` is among the ids of the same row of others `[B, T]`.

    Example:
        >>> among(jnp.array([[1, 2, 3]]), jnp.array([[3, 1]])).tolist()
        [[True, False, True]]
    """
    others = jnp.sort(others, axis=1)
    places = jax.vmap(jnp.searchsorted)(others, ids)
    return jnp.take_along_axis(others, jnp.minimum(places, others.shape[1] - 1), axis=1) == ids
