"""A recurrence token by token: its definition, the truth that all other modes are tested against, and decoding.

S_t = Diag(exp g_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T
o_t = scale q_t^T S_t,   or with read="pre":  scale q_t^T (S_{t-1} + Diag(bonus) k_t v_t^T)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.recurrence.decay import HIGHEST
from jattn.recurrence.problem import Problem


def run_tokens(problem: Problem, numbers: Any = None, count: int = 0) -> tuple[jax.Array, jax.Array, Any]:
    """Outputs, the final state, and the states after segments if they are asked for.

    Args:
        problem: what to compute.
        numbers: int32 `[B, T]`, the segment of each token; None if no states of segments are asked for.
        count: M, of how many segments, 0 to M - 1.

    Returns:
        `[B, T, H, G, Dv]` in the dtype of sums, `[B, H, D, Dv]`, and `[B, M, H, D, Dv]` or None.
    """
    per_token = [problem.query, problem.key, problem.value, problem.a, problem.b, problem.runs]
    gates = problem.log_decay
    per_token.append(None if problem.kind in ("none", "head") else gates)
    batch, *rest = problem.state.shape
    first = jnp.zeros_like(problem.state, shape=(batch,), dtype=jnp.int32)
    ends = None if numbers is None else jnp.zeros_like(problem.state, shape=(batch, count, *rest))

    def step(carry: Any, token: Any) -> Any:
        (carried, ends), (arrays, number) = carry, token
        carried, out = _step(problem, carried, *arrays)
        if ends is not None:
            # Each token overwrites what the one before it left, so that no more than M states are held.
            ends = ends.at[np.arange(batch), number].set(carried[0], mode="drop", unique_indices=True)
        return (carried, ends), out

    start = (problem.state, first), ends
    if problem.query.shape[1] == 1:
        ((state, _), ends), out = step(start, jax.tree.map(lambda x: x[:, 0], (per_token, numbers)))
        return out[:, None], state, ends
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (per_token, numbers))
    ((state, _), ends), out = jax.lax.scan(step, start, tokens)
    return jnp.moveaxis(out, 0, 1), state, ends


def _step(problem: Problem, carry: Any, q: Any, k: Any, v: Any, a: Any, b: Any, own: Any, gate: Any) -> Any:
    dtype = problem.dtype
    q, k, v, a, b = (None if x is None else x.astype(dtype) for x in (q, k, v, a, b))
    state, run = carry
    if own is not None:
        state, run = jnp.where((own == run)[:, None, None, None], state, 0), own
    before = state
    if problem.kind == "head":
        state = state * jnp.exp(problem.log_decay)[:, None, None]
    elif problem.kind != "none":
        state = state * jnp.exp(gate)[(...,) + (None,) * (4 - gate.ndim)]
    if a is not None:
        state = state + b[..., None] * _dot("bhd,bhdv->bhv", a, before)[:, :, None]
    state = state + k[..., None] * v[:, :, None]
    q = q * problem.scale
    out = _dot("bhgd,bhdv->bhgv", q, before if problem.read == "pre" else state)
    if problem.bonus is not None:
        out = out + _dot("bhgd,bhd->bhg", q * problem.bonus, k)[..., None] * v[:, :, None]
    return (state, run), out


def _dot(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, precision=HIGHEST)
