"""A recurrence token by token: its definition, the truth that all other modes are tested against, and decoding.

S_t = Diag(exp g_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T
o_t = scale q_t^T S_t,   or with read="pre":  scale q_t^T (S_{t-1} + Diag(bonus) k_t v_t^T)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jattn.recurrence.decay import HIGHEST
from jattn.recurrence.problem import Problem


def run_tokens(problem: Problem) -> tuple[jax.Array, jax.Array]:
    """Outputs `[B, T, H, G, Dv]` in the dtype of sums, and the final state `[B, H, D, Dv]`."""
    per_token = [problem.query, problem.key, problem.value, problem.a, problem.b, problem.runs]
    gates = problem.log_decay
    per_token.append(None if problem.kind in ("none", "head") else gates)
    first = jnp.zeros_like(problem.state, shape=(problem.state.shape[0],), dtype=jnp.int32)

    def step(carry: Any, token: Any) -> Any:
        return _step(problem, carry, *token)

    if problem.query.shape[1] == 1:
        (state, _), out = step((problem.state, first), jax.tree.map(lambda x: x[:, 0], per_token))
        return out[:, None], state
    (state, _), out = jax.lax.scan(
        step, (problem.state, first), jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), per_token)
    )
    return jnp.moveaxis(out, 0, 1), state


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
