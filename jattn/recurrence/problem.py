"""A recurrence in the form that all modes compute: heads in groups, runs numbered, padding made harmless, float32.

Every head of the state has G queries: keys, values and gates that several query heads share are kept once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.recurrence.segments import runs_of

FORGOTTEN = -1e5
"""Log decays below this are raised to it: exp of either is 0, and finite numbers can be summed."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
    """S_t = Diag(exp g_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,  o_t = scale q_t^T S_t.

    Args:
        query: `[B, T, H, G, D]`; H heads of the state, G queries for each.
        key: `[B, T, H, D]`.
        value: `[B, T, H, Dv]`.
        log_decay: None, `[H]`, `[B, T, H]` or `[B, T, H, D]`.
        a: `[B, T, H, D]` or None.
        b: likewise.
        state: `[B, H, D, Dv]`, in the dtype of sums.
        runs: int32 `[B, T]`, not decreasing, starting with 0; None for a single run.
        scale: of the queries.
        read: "post" or "pre".
        bonus: `[H, G, D]` or None.
        features: None, or `(query, key, value, extras) -> features of each`, applied chunk by chunk, so that those of
            the whole sequence never exist at once; `run_chunks` alone knows it.
        extras: what `features` is given beside, a tuple of `[B, T]` arrays or None.
    """

    query: Any
    key: Any
    value: Any
    log_decay: Any
    a: Any
    b: Any
    state: Any
    runs: Any
    scale: Any
    read: str = dataclasses.field(default="post", metadata={"static": True})
    bonus: Any = None
    features: Any = dataclasses.field(default=None, metadata={"static": True})
    extras: tuple[Any, ...] = ()

    @property
    def kind(self) -> str:
        """Of the decay: "none", "head", "token" or "channel"."""
        return "none" if self.log_decay is None else {1: "head", 3: "token", 4: "channel"}[self.log_decay.ndim]

    @property
    def dtype(self) -> Any:
        """Of sums and states."""
        return self.state.dtype


def varying_like(x: jax.Array, *sources: Any) -> jax.Array:
    """Mark x as varying over the mesh axes of the sources, as the carry of a loop in a shard_map must be."""
    return x + sum(jnp.zeros_like(source, shape=(), dtype=x.dtype) for source in sources if source is not None)


def make_problem(
    query: Any,
    key: Any,
    value: Any,
    *,
    log_decay: Any = None,
    a: Any = None,
    b: Any = None,
    scale: Any = None,
    initial_state: Any = None,
    segment_ids: Any = None,
    read: str = "post",
    bonus: Any = None,
) -> Problem:
    """Check the arguments of `linear_recurrence` and bring them into form.

    Raises:
        ValueError: shapes that do not fit, each named with what was expected.
    """
    query, key, value = (_floats(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
    batch, length, num_queries, width = query.shape
    if key.shape[:2] != (batch, length) or key.shape[3] != width:
        raise ValueError(f"key must be [{batch}, {length}, heads, {width}] to fit the query; got {list(key.shape)}")
    if value.shape[:2] != (batch, length):
        raise ValueError(f"value must be [{batch}, {length}, heads, Dv] to fit the query; got {list(value.shape)}")
    if (a is None) != (b is None):
        raise ValueError("a and b must be given both or not at all")
    if read not in ("post", "pre"):
        raise ValueError(f"read must be post or pre, got {read!r}")
    if bonus is not None and read != "pre":
        raise ValueError("bonus belongs to read='pre'; with read='post' a token sees itself anyway")
    heads = max(num_queries, value.shape[2])
    for name, x in (("query", query), ("key", key), ("value", value)):
        if heads % x.shape[2]:
            raise ValueError(f"the heads of {name} must divide {heads}, the number of output heads; got {x.shape[2]}")
    a, b = (_vectors(name, x, batch, length, heads, width) for name, x in (("a", a), ("b", b)))
    log_decay = _decay(log_decay, batch, length, heads, width)
    if initial_state is not None:
        initial_state = jnp.asarray(initial_state)
        if (
            initial_state.ndim != 4
            or initial_state.shape[0] != batch
            or initial_state.shape[2:]
            != (
                width,
                value.shape[3],
            )
        ):
            raise ValueError(
                f"initial_state must be [{batch}, {heads}, {width}, {value.shape[3]}], got {list(initial_state.shape)}"
            )
        if heads % initial_state.shape[1]:
            raise ValueError(f"initial_state must have {heads} heads, got {initial_state.shape[1]}")
    decays = None if log_decay is None else log_decay.shape[0 if log_decay.ndim == 1 else 2]
    counts = [key.shape[2], value.shape[2], decays, *(None if x is None else x.shape[2] for x in (a, b))]
    counts.append(None if initial_state is None else initial_state.shape[1])
    shared = int(np.lcm.reduce([count for count in counts if count is not None]))
    groups = num_queries // shared if num_queries % shared == 0 and num_queries >= shared else None
    if groups is None:
        query, shared, groups = jnp.repeat(query, heads // num_queries, axis=2), heads, 1

    def spread(x: Any, axis: int) -> Any:
        return x if x is None or x.shape[axis] == shared else jnp.repeat(x, shared // x.shape[axis], axis=axis)

    dtype = jnp.promote_types(query.dtype, jnp.float32)
    if initial_state is None:
        state = jnp.zeros((batch, shared, width, value.shape[3]), dtype)
    else:
        state = spread(initial_state, 1).astype(dtype)
    key, value, a, b = (spread(x, 2) for x in (key, value, a, b))
    if log_decay is not None:
        log_decay = spread(log_decay, 0 if log_decay.ndim == 1 else 2)
        log_decay = jnp.maximum(log_decay.astype(dtype), FORGOTTEN)
    query = query.reshape(batch, length, shared, groups, width)
    if bonus is not None:
        bonus = _bonus(bonus, heads, width).reshape(shared, groups, width).astype(dtype)
    runs = None
    if segment_ids is not None:
        ids = _segments(segment_ids, batch, length)
        real, runs = ids >= 0, runs_of(ids)
        if log_decay is not None and log_decay.ndim == 1:
            log_decay = jnp.broadcast_to(log_decay, (batch, length, shared))

        def shown(x: Any) -> Any:
            return x if x is None else jnp.where(real.reshape(*real.shape, *(1,) * (x.ndim - 2)), x, 0)

        query, key, value, a, b = map(shown, (query, key, value, a, b))
        log_decay = shown(log_decay)
    state = varying_like(state, query, key, value, log_decay, a, b, runs)
    factor = width**-0.5 if scale is None else scale
    return Problem(query, key, value, log_decay, a, b, state, runs, factor, read, bonus)


def flipped(x: Any) -> Any:
    """An array with a time axis, the second, the other way round; None and arrays of one axis stay."""
    return x if x is None or jnp.ndim(x) < 2 else jnp.flip(jnp.asarray(x), 1)


def _floats(name: str, x: Any) -> jax.Array:
    x = jnp.asarray(x)
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating) or not x.size:
        raise ValueError(f"{name} must be floats [B, T, heads, size], none of them 0; got {x.dtype}{list(x.shape)}")
    return x


def _vectors(name: str, x: Any, batch: int, length: int, heads: int, width: int) -> jax.Array | None:
    if x is None:
        return None
    x = jnp.asarray(x)
    if x.ndim != 4 or x.shape[:2] != (batch, length) or x.shape[3] != width or heads % x.shape[2]:
        raise ValueError(f"{name} must be [{batch}, {length}, {heads}, {width}], got {list(x.shape)}")
    return x


def _decay(log_decay: Any, batch: int, length: int, heads: int, width: int) -> jax.Array | None:
    if log_decay is None:
        return None
    log_decay = jnp.asarray(log_decay)
    shape = log_decay.shape
    count = shape[0] if len(shape) == 1 else shape[2] if len(shape) in (3, 4) else 0
    rest = shape[:2] + shape[3:]
    fits = rest in ((), (batch, length), (batch, length, width)) or len(shape) == 1
    if not count or heads % count or not fits or not jnp.issubdtype(log_decay.dtype, jnp.floating):
        raise ValueError(
            f"log_decay must be floats [{heads}], [{batch}, {length}, {heads}] or [{batch}, {length}, {heads}, "
            f"{width}], natural logarithms; got {log_decay.dtype}{list(shape)}"
        )
    return log_decay


def _bonus(bonus: Any, heads: int, width: int) -> jax.Array:
    bonus = jnp.asarray(bonus)
    if bonus.shape != (heads, width):
        raise ValueError(f"bonus must be [{heads}, {width}], got {list(bonus.shape)}")
    return bonus


def _segments(segment_ids: Any, batch: int, length: int) -> jax.Array:
    ids = jnp.asarray(segment_ids)
    if ids.shape not in ((batch, length), (length,), (1, length)) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids must be integers [{batch}, {length}], got {ids.dtype}{list(ids.shape)}")
    return jnp.broadcast_to(ids, (batch, length))
