"""The matrices of chunks, and what all backends compute with them.

    R  = read + carry S
    O  = rows S + inside value + also R
    S' = decay S + keys^T value + write^T R

Without a rank-1 term there are no read, carry, write and also, and no R.
"""

from __future__ import annotations

import functools
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


MULTIPLIED = ("rows", "decay", "carry", "write", "also")
"""The parts that cotangents of states are multiplied with on their way back."""


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


def _cotangent_read(dot: Any, parts: Parts, d_out: Any, d_new: Any) -> Any:
    return dot(parts.also, d_out, trans_a=True) + dot(parts.write, d_new)


def backward_step(dot: Any, parts: Parts, d_out: Any, d_new: Any) -> Any:
    """Cotangent of the state before a chunk, `[D, Dv]`.

    Args:
        dot: as for `forward_step`.
        parts: of one chunk; what is not multiplied with a state may be absent.
        d_out: cotangent of the outputs, `[M, Dv]`.
        d_new: cotangent of the state after the chunk.
    """
    d_state = parts.decay * d_new + dot(parts.rows, d_out, trans_a=True)
    if parts.carry is None:
        return d_state
    return d_state + dot(parts.carry, _cotangent_read(dot, parts, d_out, d_new), trans_a=True)


def cotangents(parts: Parts, states: Any, d_out: Any, d_new: Any, *, precision: Any = None) -> Parts:
    """Cotangents of the parts, of all chunks at once: the states being known, no chunk waits for another.

    Args:
        parts: `[..., n, rows, columns]`.
        states: before each chunk, `[..., n, D, Dv]`.
        d_out: cotangent of the outputs, `[..., n, M, Dv]`.
        d_new: cotangents of the states after each chunk, `[..., n, D, Dv]`.
        precision: of the products of float32.
    """
    dot = functools.partial(_batched_dot, precision)
    found = Parts(
        rows=dot(d_out, states, trans_b=True),
        inside=dot(d_out, parts.value, trans_b=True),
        value=dot(parts.inside, d_out, trans_a=True) + dot(parts.keys, d_new),
        keys=dot(parts.value, d_new, trans_b=True),
        decay=jnp.sum(states * d_new, axis=-1, keepdims=True),
    )
    if parts.read is None:
        return found
    read = parts.read + dot(parts.carry, states)
    d_read = _cotangent_read(dot, parts, d_out, d_new)
    return found._replace(
        read=d_read,
        carry=dot(d_read, states, trans_b=True),
        write=dot(read, d_new, trans_b=True),
        also=dot(d_out, read, trans_b=True),
    )


def narrowed(x: Any, y: Any) -> tuple[Any, Any]:
    """Both factors of a product in bfloat16 where one of them is."""
    if jnp.bfloat16 in (x.dtype, y.dtype):
        return x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    return x, y


def _batched_dot(precision: Any, x: Any, y: Any, trans_a: bool = False, trans_b: bool = False) -> Any:
    dtype = jnp.promote_types(jnp.promote_types(x.dtype, y.dtype), jnp.float32)
    spelled = f"...{'ji' if trans_a else 'ij'},...{'kj' if trans_b else 'jk'}->...ik"
    return jnp.einsum(spelled, *narrowed(x, y), precision=precision, preferred_element_type=dtype)
