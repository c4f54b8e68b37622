"""What a hook sees of one attention call, from fused calls where these can tell it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jattn.probes.attention_entropy import attention_entropy
from jattn.probes.call import Call
from jattn.probes.dense import Selection, weights_of


def col_mass(call: Call, row_weight: Any) -> Any:
    """sum_i row_weight_i w_ij, summed over the query heads of a key head, `[B, S, K]`.

    It is the gradient of the output with respect to values of one channel: memory O(T + S).
    """
    call = call.statistic()
    batch, length, source, num_heads, kv_heads = call.sizes
    ones = jnp.ones((batch, source, kv_heads, 1), call.value.dtype)
    cotangent = jnp.ones((batch, length, num_heads, 1), call.value.dtype)
    if row_weight is not None:
        cotangent = cotangent * row_weight[:, :, None, None].astype(cotangent.dtype)
    return jax.vjp(call.run, ones)[1](cotangent)[0][..., 0]


def entropy(call: Call) -> Any:
    """H_i = -sum_j w_ij ln w_ij, `[B, T, N]`; 0 for a row that sees nothing.

    = lse_i - scale <q_i, sum_j w_ij k_j> where the weights are a softmax of the scaled products alone: one call with
    the keys as values. Otherwise from materialized weights.
    """
    altered = any(call.arguments.get(name) is not None for name in ("bias", "score_mod", "logit_soft_cap"))
    if not call.is_softmax or altered:
        return jnp.swapaxes(attention_entropy(weights_of(call, Selection(None, None))), 1, 2)
    call = call.statistic()
    mean_key, total = call.run(call.key, residual=True)
    scale = call.arguments.get("scale")
    scale = call.query.shape[-1] ** -0.5 if scale is None else scale
    expected = scale * jnp.einsum("btnd,btnd->btn", call.query, mean_key, precision=jax.lax.Precision.HIGHEST)
    alive = total != -jnp.inf
    return jnp.where(alive, jnp.where(alive, total, 0) - expected, 0)
