"""The matrices of chunks, and what all backends compute with them.

    R  = read + carry S
    O  = rows S + inside value + also R
    S' = decay S + keys^T value + write^T R

Without a rank-1 term there are no read, carry, write and also, and no R.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp


class Parts(NamedTuple):
    """What is computed of each chunk before the state comes by; `[..., n, rows, columns]` for n chunks."""

    rows: Any
    """What reads the state, `[..., n, M, D]`."""
    inside: Any
    """What reads the values of the chunk itself, `[..., n, M, C]`."""
    value: Any
    """`[..., n, C, Dv]`."""
    keys: Any
    """What writes values into the state, `[..., n, C, D]`."""
    decay: Any
    """Of the state's rows over the chunk, `[..., n, D, 1]`."""
    read: Any = None
    """What the rank-1 term reads of the chunk itself, `[..., n, C, Dv]`."""
    carry: Any = None
    """What it reads of the state, `[..., n, C, D]`."""
    write: Any = None
    """Where it writes, `[..., n, C, D]`."""
    also: Any = None
    """How outputs see what it read, `[..., n, M, C]`."""


def forward_step(dot: Any, state: Any, parts: Parts) -> tuple[Any, Any]:
    """One chunk: outputs `[M, Dv]` and the new state `[D, Dv]`.

    Args:
        dot: `dot(x, y, trans_a=False, trans_b=False)`, products summed in float32 at least.
        state: `[D, Dv]`.
        parts: of one chunk.
    """
    out = dot(parts.rows, state) + dot(parts.inside, parts.value)
    new = parts.decay * state + dot(parts.keys, parts.value, trans_a=True)
    if parts.read is None:
        return out, new
    read = parts.read + dot(parts.carry, state)
    return out + dot(parts.also, read), new + dot(parts.write, read, trans_a=True)


def backward_step(dot: Any, state: Any, parts: Parts, d_out: Any, d_new: Any) -> tuple[Parts, Any]:
    """Cotangents of the parts of one chunk and of the state before it.

    Args:
        dot: as for `forward_step`.
        state: before the chunk, `[D, Dv]`.
        parts: of one chunk.
        d_out: cotangent of the outputs, `[M, Dv]`.
        d_new: cotangent of the state after the chunk.
    """
    d_parts = Parts(
        rows=dot(d_out, state, trans_b=True),
        inside=dot(d_out, parts.value, trans_b=True),
        value=dot(parts.inside, d_out, trans_a=True) + dot(parts.keys, d_new),
        keys=dot(parts.value, d_new, trans_b=True),
        decay=jnp.sum(state * d_new, axis=1, keepdims=True),
    )
    d_state = parts.decay * d_new + dot(parts.rows, d_out, trans_a=True)
    if parts.read is None:
        return d_parts, d_state
    read = parts.read + dot(parts.carry, state)
    d_read = dot(parts.also, d_out, trans_a=True) + dot(parts.write, d_new)
    d_parts = d_parts._replace(
        read=d_read,
        carry=dot(d_read, state, trans_b=True),
        write=dot(read, d_new, trans_b=True),
        also=dot(d_out, read, trans_b=True),
    )
    return d_parts, d_state + dot(parts.carry, d_read, trans_a=True)
