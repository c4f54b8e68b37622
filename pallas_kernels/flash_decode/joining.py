"""Joining what the parts of the keys have left."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def join(out, lse, softmax: bool) -> tuple[jax.Array, jax.Array]:
    """Partial outputs `[B, K, parts, group, Dv]` and log-sum-exps `[B, K, parts, group]` as those of all keys."""
    if not softmax:
        return out.sum(2), lse.sum(2)
    largest = lse.max(2, keepdims=True)
    shift = jnp.where(largest == -jnp.inf, 0, largest)
    share = jnp.exp(lse - shift)
    total = share.sum(2)
    alive = total != 0
    joined = (share[..., None] * out).sum(2) / jnp.where(alive, total, 1)[..., None]
    return joined, jnp.where(alive, shift[:, :, 0] + jnp.log(jnp.where(alive, total, 1)), -jnp.inf)
