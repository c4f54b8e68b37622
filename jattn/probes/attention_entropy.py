"""Entropy of attention rows: how many keys a query spreads over.

H = -sum_j a_j ln a_j,   0 ln 0 = 0
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jattn.mechanisms.entry import Cost, Entry, Paper
from jattn.mechanisms.examples import normal


def attention_entropy(weights: Any, *, renormalize: bool = False) -> Any:
    """Entropy of each row of attention weights, in nats.

    H = -sum_j a_j ln a_j

    It is ln n for n equal weights, and 0 for a row with all its weight on one key or with no weight at all. On a slice
    of the keys (the image tokens, say) it matters whether the slice is made to sum to 1 first:
    H(c a) = c H(a) - c ln c for a that sums to 1.

    Args:
      weights: `[..., S]`, not negative.
      renormalize: whether rows are divided by their sums first.

    Returns:
      `[...]`, float32 at least; differentiable (a weight that is exactly 0 gets the gradient 0).

    Example:
      >>> attention_entropy(np.array([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])).round(3).tolist()
      [0.693..., 0.0]

    Source: Focusing by Contrastive Attention (arXiv 2509.06461, equation 3.3); Active-Dormant Attention Heads
    (arXiv 2410.13835, code).
    """
    weights = jnp.asarray(weights)
    weights = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
    if renormalize:
        total = weights.sum(-1, keepdims=True)
        weights = weights / jnp.where(total == 0, 1, total)
    positive = weights > 0
    # The sum starts from 0, not from -0.
    return jnp.where(positive, -weights * jnp.log(jnp.where(positive, weights, 1)), 0).sum(-1)


def _example(key: Any, length: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    raw = np.exp(normal(key, 2, 3, length))
    return (raw / raw.sum(-1, keepdims=True),), {}


ENTRY = Entry(
    name="attention_entropy",
    kind="probe",
    family="probes",
    function=attention_entropy,
    papers=(
        Paper("Focusing by Contrastive Attention: Enhancing VLMs' Visual Reasoning", "2509.06461", 2025),
        Paper(
            "Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs",
            "2410.13835",
            2024,
        ),
    ),
    cost=Cost(flops="T", memory="T"),
    decode="row by row",
    example=_example,
    fidelity="official code",
)
