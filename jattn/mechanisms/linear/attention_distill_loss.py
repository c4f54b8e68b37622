"""The distance between the weights of softmax attention and those of linear attention, for the feature maps to learn.

    L = - 1 / rows sum_i sum_j a_ij log p_ij
    a_ij = softmax_j(scale q_i . k_j),   p_ij = phi(q_i).psi(k_j) / sum_m phi(q_i).psi(k_m)    over the visible j, m

The weights a are the teacher's and are not differentiated. L is their entropy plus the divergence KL(a || p), so it is
least where p = a. Both matrices are formed: training costs T S, once, for a model that is linear afterwards. Source:
The Hedgehog & the Porcupine (arXiv 2402.04347).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.mechanisms.entry import Cost, Entry, Paper
from jattn.mechanisms.examples import normals
from jattn.softmax.arguments import build_problem
from jattn.softmax.problem import dense_visibility

LEAST = 1e-12
"""Predicted weights below are raised to it before the logarithm."""


def attention_distill_loss(
    query: Any,
    key: Any,
    query_features: Any,
    key_features: Any,
    *,
    mask: Any = None,
    is_causal: bool = False,
    segment_ids: Any = None,
    query_positions: Any = None,
    key_positions: Any = None,
    scale: float | None = None,
) -> jax.Array:
    """Cross entropy of the implied weights of linear attention under those of softmax attention.

    L = - 1/rows sum_ij softmax_j(scale q_i.k_j) log(phi(q_i).psi(k_j) / sum_m phi(q_i).psi(k_m))

    Args:
        query: of the teacher, `[B, T, N, D]`.
        key: `[B, S, K, D]`; K divides N.
        query_features: phi of the same queries, `[B, T, N, F]`, positive.
        key_features: psi of the same keys, `[B, S, K, F]`.
        mask: booleans that broadcast to `[B, N, T, S]`, or a `Mask`.
        is_causal: key position <= query position.
        segment_ids: `[B, T]`, or a pair for queries and keys; negative = padding.
        query_positions: `[B|1, T]` integers that masks see, 0..T-1 if None.
        key_positions: `[B|1, S]` integers likewise.
        scale: of the teacher's logits, D^-0.5 if None.

    Returns:
        The mean over batch, heads and the queries that see any key, float32 at least; 0 if there is none.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 2, 1, 4))
        >>> loss = attention_distill_loss(x, x, x, x)  # uniform weights: log 2
        >>> round(float(loss), 4)
        0.6931

    Source: The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry (arXiv 2402.04347).
    """
    query, key, query_features, key_features = (jnp.asarray(x) for x in (query, key, query_features, key_features))
    problem, _ = build_problem(
        query,
        key,
        key,
        mask=mask,
        is_causal=is_causal,
        segment_ids=segment_ids,
        query_positions=query_positions,
        key_positions=key_positions,
        scale=scale,
    )
    count = query_features.shape[-1:]
    for name, features, x in (("query_features", query_features, query), ("key_features", key_features, key)):
        if features.shape != (*x.shape[:3], *count):
            raise ValueError(f"{name} must be {[*x.shape[:3], *count]}, got {list(features.shape)}")
    batch, length, _, num_heads, kv_heads = problem.sizes
    found = dense_visibility(problem)
    # In numpy as long as it is: compilers take their time over a constant of T S.
    visible = np.ones((1, 1, 1, 1), bool) if found is None else found
    alive, seen = visible.any(3, keepdims=True), jnp.asarray(visible.any(2, keepdims=True)).swapaxes(2, 3)
    dtype = jnp.promote_types(query.dtype, jnp.float32)

    def products(rows: jax.Array, columns: jax.Array) -> jax.Array:
        # 0 * NaN is NaN: what nobody sees, and rows that see nothing, do not enter.
        columns = jnp.repeat(columns, num_heads // kv_heads, axis=2)
        rows = jnp.where(alive, jnp.swapaxes(rows, 1, 2), 0).astype(dtype)
        columns = jnp.where(seen, jnp.swapaxes(columns, 1, 2), 0).astype(dtype)
        return jnp.einsum("bntd,bnsd->bnts", rows, columns, precision=jax.lax.Precision.HIGHEST)

    logits = jax.lax.stop_gradient(products(problem.query, problem.key)) * problem.scale
    teacher = jax.nn.softmax(jnp.where(alive, jnp.where(visible, logits, -jnp.inf), 0), axis=-1)
    scores = jnp.where(visible, products(query_features, key_features), 0)
    total = jnp.maximum(jnp.sum(scores, axis=-1, keepdims=True), jnp.finfo(dtype).tiny)
    surprise = -jnp.log(jnp.maximum(scores / total, LEAST))
    rows = jnp.sum(jnp.broadcast_to(alive, (batch, num_heads, length, 1)))
    return jnp.sum(jnp.where(visible, teacher * surprise, 0)) / jnp.maximum(rows, 1)


def _example(key, length):
    query, keys, *features = normals(key, *[(2, length, n, d) for d in (4, 6) for n in (4, 2)])
    return (query, keys, *map(abs, features)), {"is_causal": True}


ENTRY = Entry(
    name="attention_distill_loss",
    kind="recipe",
    family="linear",
    function=attention_distill_loss,
    papers=(
        Paper(
            "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
            "2402.04347",
            2024,
        ),
    ),
    patterns=("noncausal self", "causal self"),
    cost=Cost(flops="T^2", memory="T^2"),
    example=_example,
    fidelity="inferred: details of the average, from a later program of the same group",
    exempt={"derivative": "the teacher is frozen: its query and key get no gradient, though they move the loss"},
)
