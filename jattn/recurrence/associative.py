"""A recurrence without a rank-1 term as an associative scan over (log decay, state): logarithmic depth, every state.

    (g1, S1) then (g2, S2)  =  (g1 + g2, exp(g2) S1 + S2)

Log decays are summed, never their exponentials multiplied, so that nothing underflows on the way.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jattn.recurrence.decay import HIGHEST
from jattn.recurrence.problem import Problem


def run_associative(problem: Problem) -> tuple[jax.Array, jax.Array]:
    """Outputs `[B, T, H, G, Dv]` in the dtype of sums, and all states `[B, T + 1, H, D, Dv]`, the initial one first.

    Raises:
        ValueError: a problem with a rank-1 term, whose steps are no pairs (decay, state).
    """
    if problem.a is not None:
        raise ValueError("mode='associative' has no form with a and b; mode='chunk' has")
    dtype, state = problem.dtype, problem.state
    q, k, v = (x.astype(dtype) for x in (problem.query, problem.key, problem.value))
    batch, length, heads = k.shape[:3]
    gates = jnp.zeros((), dtype) if problem.log_decay is None else problem.log_decay.astype(dtype)
    if problem.kind != "channel":
        gates = gates[..., None]
    gates = jnp.broadcast_to(gates, (batch, length, heads, gates.shape[-1]))[..., None]
    runs = jnp.zeros((batch, length), jnp.int32) if problem.runs is None else problem.runs
    own = jnp.einsum("bthd,bthv->bthdv", k, v, precision=HIGHEST)

    def with_first(first: jax.Array, rest: jax.Array) -> jax.Array:
        return jnp.concatenate([first[:, None], rest], 1)

    elements = (
        with_first(jnp.zeros_like(gates[:, 0]), gates),
        with_first(state, own),
        with_first(jnp.zeros_like(runs[:, 0]), runs)[..., None, None, None],
    )
    _, states, _ = jax.lax.associative_scan(_then, elements, axis=1)
    q = q * problem.scale
    if problem.read == "post":
        out = jnp.einsum("bthgd,bthdv->bthgv", q, states[:, 1:], precision=HIGHEST)
    else:
        carried = jnp.concatenate([jnp.zeros_like(runs[:, :1]), runs[:, :-1]], 1) == runs
        before = jnp.where(carried[..., None, None, None], states[:, :-1], 0)
        out = jnp.einsum("bthgd,bthdv->bthgv", q, before, precision=HIGHEST)
    if problem.bonus is not None:
        weight = jnp.einsum("bthgd,hgd,bthd->bthg", q, problem.bonus, k, precision=HIGHEST)
        out = out + weight[..., None] * v[:, :, :, None]
    return out, states


def _then(left: Any, right: Any) -> Any:
    same = left[2] == right[2]
    state = jnp.where(same, jnp.exp(right[0]) * left[1], 0) + right[1]
    return left[0] + right[0], state, right[2]
