"""The linear memory of Titans: one matrix, learned by gradient descent with momentum and forgetting while it is read.

    S_t = eta_t S_{t-1} - 2 theta_t k_t (k_t^T W_c - v_t)^T,   W_t = (1 - alpha_t) W_{t-1} + S_t,   y_t = q_t^T W_t

W_c is the memory at the last chunk border, c = b floor(t / b) tokens after the start: b = 1 is the exact recurrence, a
larger b another model, whose chunks are computed in parallel. There is no official code; the equations are the paper's,
with the factor 2 of a squared error that is summed over features. Source: Titans: Learning to Memorize at Test Time
(arXiv 2501.00663).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jattn.cache import RecurrentState
from jattn.mechanisms.entry import Cost, Entry, Paper
from jattn.mechanisms.examples import normals
from jattn.recurrence.arguments import check_arrays, check_rows
from jattn.recurrence.learning_memory import MemoryState, log_gates, run_memory


def titans_linear_memory(
    query: Any,
    key: Any,
    value: Any,
    alpha: Any,
    theta: Any,
    eta: Any,
    *,
    chunk_size: int,
    initial_memory: Any = None,
    initial_state: RecurrentState | None = None,
    segment_ids: Any = None,
    return_final_state: bool = False,
) -> Any:
    """Read a linear memory that each token trains on its own key and value.

    S_t = eta_t S_{t-1} - 2 theta_t k_t (k_t^T W_c - v_t)^T, W_t = (1 - alpha_t) W_{t-1} + S_t, y_t = q_t^T W_t

    For keys of length 1, theta = 1/2 overwrites what the key had stored, and theta > 1 diverges.

    Args:
        query: `[B, T, N, D]`; it is not scaled.
        key: `[B, T, K, D]`; K divides N.
        value: `[B, T, K, Dv]`.
        alpha: how much is forgotten, in [0, 1]; `[B, T, K]` or what broadcasts to it, as the other two.
        theta: step size, >= 0.
        eta: momentum, in [0, 1].
        chunk_size: b, tokens whose gradients are taken at the same memory. Unlike that of other recurrences it is a
            part of the definition. Borders are counted from the start of a run, also from a state on.
        initial_memory: W at the start of every run, `[K, D, Dv]` or `[B, K, D, Dv]`; zeros if None.
        initial_state: what an earlier call returned. It belongs to the first run.
        segment_ids: `[B, T]`; a run of equal ids is a document, negative = padding, which is skipped.
        return_final_state: also return the state after the last token.

    Returns:
        `[B, T, N, Dv]`; with `return_final_state` also a `RecurrentState`: W `[B, K, D, Dv]` as `state`, and as `aux`
        (W at the last border, S, tokens since the border `[B]`).

    Raises:
        ValueError: shapes that do not fit, or a chunk_size below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> one = jnp.ones((1, 3, 1, 1))
        >>> values = jnp.array([1.0, 5.0, 2.0]).reshape(1, 3, 1, 1)
        >>> titans_linear_memory(one, one, values, 0.0, 0.5, 0.0, chunk_size=1).ravel().tolist()
        [1.0, 5.0, 2.0]

    Source: Titans: Learning to Memorize at Test Time (arXiv 2501.00663).
    """
    query, key, value = check_arrays(query, key, value)
    batch, length, heads, width = key.shape
    if query.shape[1] != length:
        raise ValueError(f"query must have the length of key, {length}, got {list(query.shape)}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    gates = {"alpha": alpha, "theta": theta, "eta": eta}
    forget, step, momentum = (_gate(name, gate, query.dtype, key.shape[:3]) for name, gate in gates.items())
    shape = (heads, width, value.shape[3])
    first = jnp.zeros(shape, query.dtype) if initial_memory is None else jnp.asarray(initial_memory)
    if first.shape not in (shape, (batch, *shape)):
        raise ValueError(f"initial_memory must be {list(shape)} or {[batch, *shape]}, got {list(first.shape)}")
    ids = check_rows("segment_ids", segment_ids, batch, length)
    if ids is not None:
        # Before the logarithms, whose derivative at NaN is NaN.
        forget, momentum = (jnp.where((ids >= 0)[..., None], gate, 0) for gate in (forget, momentum))
    log_keep, log_momentum = log_gates(forget, momentum)
    state = None if initial_state is None else _state(initial_state, (batch, *shape))
    out, after = run_memory(
        query,
        key,
        value,
        log_keep,
        log_momentum,
        step,
        (first,),
        chunk_size=chunk_size,
        state=state,
        segment_ids=ids,
    )
    out = out.astype(query.dtype)
    if not return_final_state:
        return out
    return out, RecurrentState(after.weights[0], (after.held[0], after.momentum[0], after.position))


def _gate(name: str, gate: Any, dtype: Any, shape: tuple[int, ...]) -> Any:
    gate = jnp.asarray(gate)
    try:
        return jnp.broadcast_to(gate, shape).astype(jnp.promote_types(dtype, jnp.float32))
    except ValueError as error:
        raise ValueError(f"{name} must broadcast to {list(shape)}, got {list(gate.shape)}") from error


def _state(state: RecurrentState, shape: tuple[int, ...]) -> MemoryState:
    border, momentum, position = state.aux
    for name, x in (("state", state.state), ("aux[0]", border), ("aux[1]", momentum)):
        if jnp.shape(x) != shape:
            raise ValueError(f"initial_state: {name} must be {list(shape)}, got {list(jnp.shape(x))}")
    return MemoryState((state.state,), (momentum,), (border,), (), position)


def _example(key, length):
    query, keys, value, *gates = normals(key, (2, length, 4, 6), *[(2, length, 2, n) for n in (6, 5, 1, 1, 1)])
    alpha, theta, eta = (1 / (1 + np.exp(-gate[..., 0])) for gate in gates)
    unit = keys / (1e-6 + (keys**2).sum(-1, keepdims=True)) ** 0.5
    options = {"chunk_size": 4 if length < 64 else 64}
    return (query, unit, value, 0.2 * alpha, 0.3 * theta, eta), options


ENTRY = Entry(
    name="titans_linear_memory",
    kind="recurrence",
    family="memory",
    function=titans_linear_memory,
    papers=(Paper("Titans: Learning to Memorize at Test Time", "2501.00663", 2024),),
    patterns=("causal self",),
    cost=Cost(flops="T", memory="T"),
    decode="W, W at the last chunk border, S, tokens since the border",
    example=_example,
    fidelity="paper",
)
