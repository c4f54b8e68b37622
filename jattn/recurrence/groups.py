"""Tokens in groups, such as the documents of a packed row: what is shown of them, and sums over all of a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jattn.recurrence.segments import running_logsumexp, running_sum


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
    return _over_groups(running_logsumexp, x, ids, -jnp.inf)


def group_sum(x: Any, ids: Any = None) -> jax.Array:
    """Sums over all tokens of the same id, wherever they stand.

    s_t = sum over s of x_s, id_s = id_t

    Args:
        x: `[B, T, ...]`.
        ids: int `[B, T]`; None for a single group.

    Returns:
        `[B, T, ...]`, or `[B, 1, ...]` for a single group.

    Example:
        >>> group_sum(jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[7, 2, 7]])).tolist()
        [[5.0, 2.0, 5.0]]
    """
    x = jnp.asarray(x)
    return jnp.sum(x, axis=1, keepdims=True) if ids is None else _over_groups(running_sum, x, ids, 0)


def _over_groups(running: Callable[..., jax.Array], x: jax.Array, ids: Any, nothing: float | int) -> jax.Array:
    """What stands up to a token and what stands behind it, joined: scans alone, so that gradients need no atomics."""
    ids = jnp.asarray(ids)
    order = jnp.argsort(ids, axis=1, stable=True)

    def moved(x: jax.Array, places: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, places.reshape(*places.shape, *(1,) * (x.ndim - 2)), axis=1)

    x, ids = moved(x, order), moved(ids, order)
    before = running(x, ids)
    after = jnp.flip(running(jnp.flip(x, 1), jnp.flip(ids, 1)), 1)
    goes_on = jnp.pad(ids[:, :-1] == ids[:, 1:], [(0, 0), (0, 1)]).reshape(*ids.shape, *(1,) * (x.ndim - 2))
    behind = jnp.where(goes_on, jnp.roll(after, -1, axis=1), nothing)
    both = running(jnp.stack([before, behind], axis=1))[:, 1]
    return moved(both, jnp.argsort(order, axis=1))


def shown(x: jax.Array, valid: Any, hidden: float | int = 0) -> jax.Array:
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
