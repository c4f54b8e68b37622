"""Runs of a packed row, as recurrences see them, and running sums that start again with each run."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jattn.recurrence.arguments import check_rows
from jattn.softmax.segments import renumber_segments


def runs_of(ids: jax.Array) -> jax.Array:
    """Number the runs of equal ids from 0; padding (negative) neither ends nor starts one.

    Args:
        ids: int `[B, T]`.

    Returns:
        int32 `[B, T]`; padding has the number of the run before it, 0 before the first.

    Example:
        >>> runs_of(jnp.array([[5, -1, 5, 2, 5]])).tolist()
        [[0, 0, 0, 1, 2]]
    """
    return jnp.maximum(jax.lax.cummax(jnp.asarray(renumber_segments(ids)), axis=1), 0)


def without_padding(segment_ids: Any, *arrays: Any) -> tuple[Any, ...]:
    """Arrays `[B, T, ...]` with zeros at padding, for front ends that multiply before the engine hides it.

    Args:
        segment_ids: integers `[B, T]`, negative = padding; None for no padding.
        *arrays: the arrays; None stays.

    Returns:
        The arrays.

    Raises:
        ValueError: ids that do not fit.

    Example:
        >>> without_padding(jnp.array([[0, -1]]), jnp.array([[2.0, jnp.nan]]))[0].tolist()
        [[2.0, 0.0]]
    """
    if segment_ids is None:
        return arrays
    batch, length = next(x for x in arrays if x is not None).shape[:2]
    real = check_rows("segment_ids", segment_ids, batch, length) >= 0
    return tuple(x if x is None else jnp.where(real.reshape(*real.shape, *(1,) * (x.ndim - 2)), x, 0) for x in arrays)


def running_sum(x: Any, runs: Any = None) -> jax.Array:
    """Sums from the start of each run to every token.

    s_t = sum of x over the tokens of t's run up to t

    Args:
        x: `[B, T, ...]`.
        runs: int `[B, T]`, not decreasing; None for a single run.

    Returns:
        `[B, T, ...]`.

    Example:
        >>> running_sum(jnp.ones((1, 4)), jnp.array([[0, 0, 1, 1]])).tolist()
        [[1.0, 2.0, 1.0, 2.0]]
    """
    return _scanned(jnp.add, x, runs)


def running_logsumexp(x: Any, runs: Any = None) -> jax.Array:
    """Logarithms of sums of exponentials from the start of each run to every token.

    z_t = log sum exp(x) over the tokens of t's run up to t; -inf contributes nothing

    Args:
        x: `[B, T, ...]`.
        runs: int `[B, T]`, not decreasing; None for a single run.

    Returns:
        `[B, T, ...]`.

    Example:
        >>> [round(x, 4) for x in running_logsumexp(jnp.zeros((1, 2)))[0].tolist()]
        [0.0, 0.6931]
    """
    return _scanned(_logaddexp, x, runs)


def _logaddexp(x: jax.Array, y: jax.Array) -> jax.Array:
    # jnp.logaddexp has the derivative NaN where both are -inf.
    top = jnp.maximum(x, y)
    safe = jnp.where(jnp.isfinite(top), top, 0)
    total = jnp.exp(x - safe) + jnp.exp(y - safe)
    return jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1)) + safe, -jnp.inf)


def _scanned(combine: Any, x: Any, runs: Any) -> jax.Array:
    x = jnp.asarray(x)
    if runs is None:
        return jax.lax.associative_scan(combine, x, axis=1)
    owner = jnp.broadcast_to(jnp.asarray(runs).reshape(*runs.shape, *(1,) * (x.ndim - 2)), x.shape)

    def joined(left: Any, right: Any) -> Any:
        return jnp.where(left[1] == right[1], combine(left[0], right[0]), right[0]), right[1]

    return jax.lax.associative_scan(joined, (x, owner), axis=1)[0]
