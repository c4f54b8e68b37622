"""Joining attention over disjoint sets of keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def merge_lse(*parts):
    r"""Join partial attentions over disjoint keys, as if one softmax had seen all of them.

    lse = log(sum_p exp(lse_p)),  out = sum_p exp(lse_p - lse) out_p.  Differentiable through every out_p and lse_p.

    Args:
      *parts: pairs (out `[..., N, Dv]`, lse `[..., N]`) as `dot_product_attention(..., return_residual=True)` gives
        them; lse = -inf means that the part has seen nothing.

    Returns:
      (out, lse) in the same shapes; out 0 and lse -inf where no part has seen anything.

    Raises:
      ValueError: no parts, or shapes that differ between parts or do not fit together.

    Example:
      >>> import jax.numpy as jnp, jattn
      >>> x = jnp.arange(24.0).reshape(1, 6, 2, 2)
      >>> halves = [jattn.dot_product_attention(x, k, k, return_residual=True) for k in (x[:, :3], x[:, 3:])]
      >>> out, lse = jattn.merge_lse(*halves)
      >>> bool(jnp.allclose(out, jattn.dot_product_attention(x, x, x), atol=1e-5))
      True

    Source: Online normalizer calculation for softmax (arXiv:1805.02867).
    """
    if not parts:
        raise ValueError("merge_lse: expected at least one (out, lse) pair, got none")
    for n, (out, lse) in enumerate(parts):
        if out.shape != parts[0][0].shape or lse.shape != parts[0][1].shape or out.shape[:-1] != lse.shape:
            raise ValueError(
                f"merge_lse: part {n} has out {out.shape} and lse {lse.shape}; expected out {parts[0][0].shape} "
                f"and lse {parts[0][0].shape[:-1]}"
            )
    out, lse = parts[0]
    for other_out, other_lse in parts[1:]:
        out, lse = _merge_two(out, lse, other_out, other_lse)
    return out, lse


def _merge_two(out1, lse1, out2, lse2):
    alive1, alive2 = lse1 > -jnp.inf, lse2 > -jnp.inf
    both = alive1 & alive2
    # The differences of infinite values are replaced before they are formed: their gradient would be NaN.
    gap = jnp.where(both, lse2, 0) - jnp.where(both, lse1, 0)
    share2 = jnp.where(both, jax.nn.sigmoid(gap), jnp.where(alive2, 1.0, 0.0))[..., None].astype(lse1.dtype)
    dtype = out1.dtype
    out1 = jnp.where(alive1[..., None], out1, 0).astype(lse1.dtype)
    out2 = jnp.where(alive2[..., None], out2, 0).astype(lse1.dtype)
    lse = jnp.where(both, jnp.where(both, lse1, 0) + jax.nn.softplus(gap), jnp.where(alive1, lse1, lse2))
    return (out1 - share2 * (out1 - out2)).astype(dtype), lse


def join_sinks(out, lse, sinks):
    """Let learned per-head sink logits take their share: out * sigmoid(lse - sink); sinks `[N]`, out `[B, T, N, Dv]`."""
    alive = (lse > -jnp.inf) & (sinks > -jnp.inf)
    gap = jnp.where(alive, lse, 0) - jnp.where(alive, sinks, 0).astype(lse.dtype)
    share = jnp.where(alive, jax.nn.sigmoid(gap), jnp.where(lse > -jnp.inf, 1.0, 0.0)).astype(lse.dtype)
    return out * share[..., None].astype(out.dtype)
