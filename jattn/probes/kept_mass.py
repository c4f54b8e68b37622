"""Kept mass: how much of full attention stands on the pairs that a sparser mechanism keeps."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def kept_mass(weights: Any, support: Any) -> Any:
    """Share of full attention's mass on the pairs that another mechanism keeps.

    share = sum_ij w_ij [support_ij] / sum_ij w_ij, which for rows that sum to 1 is the mean over the rows

    Args:
      weights: `[..., T, S]` of full attention.
      support: booleans that broadcast to it, or weights of the other mechanism: it keeps pairs of a weight above 0.

    Returns:
      `[...]` in [0, 1], float32 at least; 0 where there is no mass.

    Example:
      >>> kept_mass(jnp.array([[0.75, 0.25], [0.5, 0.5]]), jnp.array([True, False])).item()
      0.625

    Source: own definition.
    """
    weights, support = jnp.asarray(weights), jnp.asarray(support)
    weights = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
    kept = jnp.where(support if support.dtype == bool else support > 0, weights, 0).sum((-1, -2))
    total = weights.sum((-1, -2))
    return kept / jnp.where(total == 0, 1, total)


def kept_mass_of_lse(kept: Any, full: Any) -> Any:
    """The same for each row of a softmax, from its log-sum-exp with and without the sparser mask, in memory O(T).

    share_i = exp(lse_kept_i - lse_full_i)

    Args:
      kept: lse over the pairs that are kept, of any shape; -inf where a row keeps nothing.
      full: lse over all pairs, of the same shape.

    Returns:
      Of the same shape, in [0, 1]; 0 where a row has no mass.

    Example:
      >>> kept_mass_of_lse(jnp.log(jnp.array([1.0, 0.0])), jnp.log(jnp.array([4.0, 2.0]))).tolist()
      [0.25, 0.0]

    Source: own definition.
    """
    kept, full = jnp.asarray(kept), jnp.asarray(full)
    alive = (kept != -jnp.inf) & (full != -jnp.inf)
    return jnp.where(alive, jnp.exp(jnp.where(alive, kept, 0) - jnp.where(alive, full, 0)), 0)
