"""Joining attention over disjoint sets of keys."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def merge_lse(*parts: Any) -> tuple[jax.Array, jax.Array]:
    r"""Join partial attentions over disjoint keys, as if one softmax had seen all of them.

    lse = log(sum_p exp(lse_p)),  out = sum_p exp(lse_p - lse) out_p.  Differentiable through every out_p and lse_p.

    Args:
      *parts: pairs (out `[..., Dv]`, lse `[...]`) as `dot_product_attention(..., return_residual=True)` gives them;
        lse = -inf means that the part has seen nothing.

    Returns:
      (out, lse) in the same shapes; out 0 and lse -inf where no part has seen anything. out is joined in lse's
      precision and has the dtype of the first part's.

    Raises:
      ValueError: no parts, something else than pairs, or shapes that differ between parts or do not fit together.

    Example:
      >>> import jax.numpy as jnp, jattn
      >>> x = jnp.arange(24.0).reshape(1, 6, 2, 2)
      >>> halves = [jattn.dot_product_attention(x, k, k, return_residual=True) for k in (x[:, :3], x[:, 3:])]
      >>> out, lse = jattn.merge_lse(*halves)
      >>> bool(jnp.allclose(out, jattn.dot_product_attention(x, x, x), atol=1e-5))
      True

    Source: Online normalizer calculation for softmax (arXiv:1805.02867).
    """
    if not parts or any(not isinstance(part, tuple | list) or len(part) != 2 for part in parts):
        raise ValueError(
            f"merge_lse: expected one (out, lse) pair or more, got {len(parts)} parts that are not all pairs"
        )
    pairs = [(jnp.asarray(out), jnp.asarray(lse)) for out, lse in parts]
    shape, dtype = pairs[0][0].shape, pairs[0][0].dtype
    for n, (out, lse) in enumerate(pairs):
        if out.shape != shape or out.shape[:-1] != lse.shape:
            raise ValueError(
                f"merge_lse: part {n} has out {out.shape} and lse {lse.shape}; expected {shape} and {shape[:-1]}"
            )
    wide = jnp.result_type(*(x for pair in pairs for x in pair))
    out, lse = functools.reduce(_merge_two, [(out.astype(wide), lse.astype(wide)) for out, lse in pairs])
    out = jnp.where((lse == -jnp.inf)[..., None], 0, out)
    return out.astype(dtype), lse.astype(jnp.result_type(*(part_lse for _, part_lse in pairs)))


_Part = tuple[Float[Array, "*rows Dv"], Float[Array, "*rows"]]


def _merge_two(first: _Part, second: _Part) -> _Part:
    (out1, lse1), (out2, lse2) = first, second
    alive1, alive2 = lse1 != -jnp.inf, lse2 != -jnp.inf
    both = alive1 & alive2
    # The differences of infinite values are replaced before they are formed: their gradient would be NaN.
    low, high = jnp.where(both, lse1, 0), jnp.where(both, lse2, 0)
    gap = high - low
    share2 = jnp.where(both, jax.nn.sigmoid(gap), jnp.where(alive2, 1.0, 0.0))[..., None]
    out1, out2 = jnp.where(alive1[..., None], out1, 0), jnp.where(alive2[..., None], out2, 0)
    lse = jnp.where(both, low + jax.nn.softplus(gap), jnp.where(alive1, lse1, lse2))
    return out1 - share2 * (out1 - out2), lse


def join_sinks(
    out: Float[Array, "B T N Dv"], lse: Float[Array, "B T N"], sinks: Float[Array, " N"]
) -> Float[Array, "B T N Dv"]:
    """Let learned per-head sink logits take their share of the softmax: out * sigmoid(lse - sink).

    Args:
      out: the output without sinks.
      lse: its log-sum-exp.
      sinks: one logit a query head, -inf for none.

    Returns:
      The output with sinks, in the dtype of `out`.

    Example:
      >>> import jax.numpy as jnp
      >>> join_sinks(jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1, 1)), jnp.zeros(1)).item()
      0.5

    Source: gpt-oss-120b & gpt-oss-20b Model Card (arXiv:2508.10925).
    """
    alive = (lse != -jnp.inf) & (sinks != -jnp.inf)
    gap = jnp.where(alive, lse, 0) - jnp.where(alive, sinks, 0).astype(lse.dtype)
    share = jnp.where(alive, jax.nn.sigmoid(gap), jnp.where(lse != -jnp.inf, 1.0, 0.0)).astype(lse.dtype)
    return out * share[..., None].astype(out.dtype)
