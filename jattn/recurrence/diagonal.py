"""A recurrence of numbers instead of matrices: every channel forgets and adds for itself.

    h_t = exp(g_t) h_{t-1} + x_t          elementwise

The engine would spend C products on a token and channel inside a chunk of C tokens; here a step is one product, and a
scan over pairs (log decay, state) has logarithmic depth. Log decays are summed, never their exponentials multiplied.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jattn.recurrence.problem import FORGOTTEN, varying_like
from jattn.recurrence.segments import runs_of

MODES = ("recurrent", "chunk", "parallel", "associative")


def diagonal_recurrence(
    x: Any,
    log_decay: Any,
    *,
    initial_state: Any = None,
    segment_ids: Any = None,
    mode: str = "chunk",
    chunk_size: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """Run h_t = exp(g_t) h_{t-1} + x_t along the second axis.

    Args:
        x: `[B, T, ...]`.
        log_decay: g <= 0, `[B, T, ...]`; values below -1e5 forget everything.
        initial_state: `[B, ...]`; zeros if None. It belongs to the first run.
        segment_ids: integers `[B, T]`; a run of equal ids is a document, negative = padding: its h is 0, and it leaves
            the state alone.
        mode: "recurrent", token by token; "chunk", chunk by chunk, so that the backward pass keeps the states between
            chunks only; "associative" or "parallel", all at once.
        chunk_size: tokens a chunk; no effect on the result.

    Returns:
        h `[B, T, ...]` and the last state `[B, ...]`, float32 at least.

    Raises:
        ValueError: shapes that do not fit, or an unknown mode.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 3, 1))
        >>> h, last = diagonal_recurrence(x, jnp.log(0.5) * x)
        >>> h.ravel().tolist(), last.tolist()
        ([1.0, 1.5, 1.75], [[1.75]])

    Source: the scan of qLSTM (arXiv 2405.15731), as in S4D and LRU.
    """
    x, log_decay = jnp.asarray(x), jnp.asarray(log_decay)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if x.ndim < 2 or x.shape != log_decay.shape or not x.shape[1] or chunk_size < 1:
        raise ValueError(
            f"x and log_decay must both be [B, T, ...] and chunk_size at least 1; got {list(x.shape)}, "
            f"{list(log_decay.shape)} and {chunk_size}"
        )
    dtype, batch, length = jnp.promote_types(x.dtype, jnp.float32), x.shape[0], x.shape[1]
    state = jnp.zeros((batch, *x.shape[2:]), dtype) if initial_state is None else jnp.asarray(initial_state, dtype)
    if state.shape != (batch, *x.shape[2:]):
        raise ValueError(f"initial_state must be {[batch, *x.shape[2:]]}, got {list(state.shape)}")
    x, g = x.astype(dtype), jnp.maximum(log_decay.astype(dtype), FORGOTTEN)
    if segment_ids is None:
        runs, real = jnp.zeros((batch, length), jnp.int32), None
    else:
        ids = jnp.broadcast_to(jnp.asarray(segment_ids), (batch, length))
        runs, real = runs_of(ids), _wide(ids >= 0, x)
        x, g = jnp.where(real, x, 0), jnp.where(real, g, 0)
    state, first = varying_like(state, x, g, runs), jnp.zeros_like(runs[:, 0])
    size = {"recurrent": 1, "chunk": chunk_size}.get(mode, length)
    h, last = _in_chunks(x, g, runs, state, first, min(size, length))
    return (h if real is None else jnp.where(real, h, 0)), last


def _in_chunks(x: Any, g: Any, runs: Any, state: Any, first: Any, size: int) -> tuple[jax.Array, jax.Array]:
    length = x.shape[1]
    count = -(-length // size)
    extra = count * size - length

    def cut(array: jax.Array, mode: str) -> jax.Array:
        filled = jnp.pad(array, [(0, 0), (0, extra)] + [(0, 0)] * (array.ndim - 2), mode=mode)
        return jnp.moveaxis(filled.reshape(array.shape[0], count, size, *array.shape[2:]), 1, 0)

    # Filling adds nothing and decays nothing, so the last state is that of the last token.
    parts = cut(x, "constant"), cut(g, "constant"), cut(runs, "edge")

    def step(carry: Any, part: Any) -> Any:
        h = _chunk(*part, *carry)
        return (h[:, -1], part[2][:, -1]), h

    if count == 1:
        (last, _), h = step((state, first), tuple(part[0] for part in parts))
        return h, last
    body = jax.checkpoint(step, prevent_cse=False) if size > 1 else step
    (last, _), h = jax.lax.scan(body, (state, first), parts)
    return jnp.moveaxis(h, 0, 1).reshape(x.shape[0], count * size, *x.shape[2:])[:, :length], last


def _chunk(x: jax.Array, g: jax.Array, runs: jax.Array, state: jax.Array, run: jax.Array) -> jax.Array:
    def with_first(first: jax.Array, rest: jax.Array) -> jax.Array:
        return jnp.concatenate([first[:, None], rest], 1)

    owner = _wide(with_first(run, runs), x)
    elements = with_first(jnp.zeros_like(g[:, 0]), g), with_first(state, x), owner
    return jax.lax.associative_scan(_then, elements, axis=1)[1][:, 1:]


def _then(left: Any, right: Any) -> Any:
    kept = jnp.where(left[2] == right[2], jnp.exp(right[0]) * left[1], 0)
    return left[0] + right[0], kept + right[1], right[2]


def _wide(rows: jax.Array, like: jax.Array) -> jax.Array:
    return rows.reshape(*rows.shape, *(1,) * (like.ndim - 2))
