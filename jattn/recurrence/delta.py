"""The delta rule on the engine: a token replaces what the state holds for its key, instead of adding to it.

    S~_t = Diag(exp g_t) S_{t-1},   S_t = S~_t + beta_t k_t (v_t - k_t^T S~_t)^T,   o_t = scale q_t^T S_t

In terms of the engine: k = beta k, a = -exp(g) k, b = beta k. The prediction k^T S~ reads the decayed state, and the
engine's a the undecayed one: that is where exp(g) comes from.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.recurrence.api import linear_recurrence
from jattn.recurrence.segments import without_padding


def delta_recurrence(
    query: Any, key: Any, value: Any, beta: Any, log_decay: Any = None, *, segment_ids: Any = None, **options: Any
) -> Any:
    """The delta rule without decay, with one a token, or with one a token and key channel.

    S~ = Diag(exp g_t) S_{t-1}, S_t = S~ + beta_t k_t (v_t - k_t^T S~)^T, o_t = scale q_t^T S_t

    Args:
        query: `[B, T, N, D]`.
        key: `[B, T, K, D]`; heads are repeated as `linear_recurrence` does.
        value: `[B, T, K', Dv]`.
        beta: `[B, T, H]`, H a divisor of the output heads.
        log_decay: g <= 0, `[B, T, H]` or `[B, T, H, D]`; None for no decay.
        segment_ids: `[B, T]`; a run of equal ids is a document, negative = padding.
        **options: of `linear_recurrence`.

    Returns:
        As `linear_recurrence`.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> one = jnp.ones((1, 2, 1, 1))
        >>> delta_recurrence(one, one, jnp.array([2.0, 3.0]).reshape(1, 2, 1, 1), one[..., 0]).ravel().tolist()
        [2.0, 3.0]
    """
    query, key, value = (check_heads(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
    outputs = max(query.shape[2], value.shape[2])
    beta = check_gates("beta", beta, query.shape[:2], outputs)
    if log_decay is not None:
        width = query.shape[3:] if jnp.ndim(log_decay) == 4 else ()
        log_decay = check_gates("log_decay", log_decay, query.shape[:2], outputs, width)
    key, beta, log_decay = without_padding(segment_ids, key, beta, log_decay)
    wide = jnp.promote_types(key.dtype, jnp.float32)
    # Products of key, beta and decay have as many heads as all of these together need.
    heads = int(np.lcm.reduce([x.shape[2] for x in (key, beta, log_decay) if x is not None]))
    keys = repeated(key, heads).astype(wide)
    write = repeated(beta, heads).astype(wide)[..., None] * keys
    read = -keys
    if log_decay is not None:
        kept = jnp.exp(repeated(log_decay, heads).astype(wide))
        read = read * (kept if kept.ndim == 4 else kept[..., None])
    return linear_recurrence(
        query, write, value, log_decay=log_decay, a=read, b=write, segment_ids=segment_ids, **options
    )


def check_heads(name: str, x: Any) -> jax.Array:
    """An array of floats `[B, T, heads, size]`; ValueError if it is not."""
    x = jnp.asarray(x)
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating) or not x.size:
        raise ValueError(f"{name} must be floats [B, T, heads, size], none of them 0; got {x.dtype}{list(x.shape)}")
    return x


def check_gates(name: str, x: Any, rows: tuple[int, ...], heads: int, width: tuple[int, ...] = ()) -> jax.Array:
    """An array of floats `[B, T, H]` or `[B, T, H, D]` with H a divisor of `heads`; ValueError if it is not."""
    x = jnp.asarray(x)
    fits = x.ndim == 3 + len(width) and x.shape[:2] == rows and x.shape[3:] == width
    if not fits or not x.shape[2] or heads % x.shape[2] or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name} must be floats {[*rows, heads, *width]}, or with a divisor of {heads} heads; got {x.dtype}"
            f"{list(x.shape)}"
        )
    return x


def repeated(x: jax.Array, heads: int) -> jax.Array:
    """`[B, T, H, ...]` with every head repeated, so that there are `heads` of them."""
    return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)
