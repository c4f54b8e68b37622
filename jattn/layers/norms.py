"""Norms: flax's own RMSNorm and LayerNorm by name, and the three definitions of query-key norm."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jattn.layers.sharding import axes

NORMS = ("rmsnorm", "layernorm")
L2_RULES = {"max": 1e-12, "inside": 1e-6, "added": 1e-8}
"""Where a small number stands that keeps a vector of zeros from being divided by zero, and which one by default."""
QK_NORMS = ("l2", "layernorm", "rmsnorm", "rmsnorm_full")


def make_norm(
    kind: str,
    features: int,
    *,
    epsilon: float | int = 1e-6,
    axis_name: str | None = None,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Make a norm over the last axis by name.

    Args:
        kind: `"rmsnorm"` or `"layernorm"`.
        features: size of the axis.
        epsilon: inside the root.
        axis_name: logical name of the axis, for sharding; `"embed"` if not given.
        dtype: of the result.
        param_dtype: of the weights.
        rngs: for flax.

    Returns:
        An `nnx.RMSNorm` or `nnx.LayerNorm`.

    Raises:
        ValueError: an unknown kind.

    Example:
        >>> from flax import nnx
        >>> type(make_norm("rmsnorm", 4, rngs=nnx.Rngs(0))).__name__
        'RMSNorm'
    """
    if kind not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {kind!r}")
    name = "embed" if axis_name is None else axis_name
    if kind == "rmsnorm":
        return nnx.RMSNorm(
            features, epsilon=epsilon, dtype=dtype, param_dtype=param_dtype, scale_metadata=axes(name), rngs=rngs
        )
    return nnx.LayerNorm(
        features,
        epsilon=epsilon,
        dtype=dtype,
        param_dtype=param_dtype,
        # The plain two-pass variance: the fast one cancels for inputs with a large mean.
        use_fast_variance=False,
        scale_metadata=axes(name),
        bias_metadata=axes(name),
        rngs=rngs,
    )


def l2_normalize(x: ArrayLike, *, epsilon: float | int | None = None, rule: str = "max") -> jax.Array:
    """Vectors of length 1.

    max:     x / max(|x|, eps)           eps = 1e-12 if not given
    inside:  x / sqrt(|x|^2 + eps)       eps = 1e-6
    added:   x / (|x| + eps)             eps = 1e-8

    Args:
        x: `[..., D]`.
        epsilon: eps.
        rule: where eps stands.

    Returns:
        `[..., D]` in the dtype of x, computed in float32 at least.

    Raises:
        ValueError: an unknown rule.

    Example:
        >>> [round(x, 4) for x in l2_normalize(jnp.array([3.0, 4.0])).tolist()]
        [0.6, 0.8]

    Source: "max" as in Query-Key Normalization (arXiv 2010.04245), "inside" as in DeltaNet (arXiv 2406.06484).
    """
    if rule not in L2_RULES:
        raise ValueError(f"rule must be one of {', '.join(L2_RULES)}, got {rule!r}")
    x = jnp.asarray(x)
    epsilon = L2_RULES[rule] if epsilon is None else epsilon
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squared = jnp.sum(wide * wide, axis=-1, keepdims=True)
    if rule == "inside":
        return (wide * jax.lax.rsqrt(squared + epsilon)).astype(x.dtype)
    # The root is taken of a value that is never 0: its derivative there is infinite.
    least = jnp.finfo(wide.dtype).tiny
    if rule == "max":
        return (wide * jax.lax.rsqrt(jnp.maximum(squared, max(epsilon**2, least)))).astype(x.dtype)
    return (wide / (jnp.sqrt(jnp.maximum(squared, least)) + epsilon)).astype(x.dtype)


class QkNorm(nnx.Module):
    """Normalize queries and keys before positions are applied.

    l2:            q / max(|q|, eps) * g, k / max(|k|, eps); logits g * cos, so the layer's scale is 1
    layernorm:     LayerNorm over D, per head
    rmsnorm:       RMSNorm over D, per head, weight (D,)
    rmsnorm_full:  RMSNorm over the whole projected width N * D, before heads are split

    Args:
        mode: one of the four.
        num_heads: N.
        num_kv_heads: K.
        head_dim: D.
        length: training length L (97.5th percentile) for the first value of g, log2(L^2 - L); `"l2"` only.
        epsilon: 1e-12 for `"l2"` and 1e-6 inside the root for the others, if not given.
        dtype: of the result.
        param_dtype: of the weights.
        rngs: for flax.

    Raises:
        ValueError: an unknown mode.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> norm = QkNorm("rmsnorm", 4, 2, 8, rngs=nnx.Rngs(0))
        >>> q, k = norm(jnp.ones((1, 3, 4, 8)), jnp.ones((1, 3, 2, 8)))
        >>> q.shape, k.shape
        ((1, 3, 4, 8), (1, 3, 2, 8))

    Source: Query-Key Normalization for Transformers (arXiv 2010.04245); Scaling Vision Transformers to 22 Billion
    Parameters (arXiv 2302.05442); Qwen3 (arXiv 2505.09388); 2 OLMo 2 Furious (arXiv 2501.00656).
    """

    def __init__(
        self,
        mode: str,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        length: int = 1024,
        epsilon: float | int | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if mode not in QK_NORMS:
            raise ValueError(f"qk_norm must be one of {', '.join(QK_NORMS)}, got {mode!r}")
        self.mode = mode
        self.epsilon = (1e-12 if mode == "l2" else 1e-6) if epsilon is None else epsilon
        if mode == "l2":
            if length < 2:
                raise ValueError(f"length must be at least 2, got {length}")
            self.gain = nnx.Param(jnp.asarray(math.log2(length**2 - length), param_dtype), **axes())
            return
        kind = "layernorm" if mode == "layernorm" else "rmsnorm"
        full = mode == "rmsnorm_full"
        for stream, heads, axis in (("query_norm", num_heads, "heads"), ("key_norm", num_kv_heads, "kv_heads")):
            norm = make_norm(
                kind,
                heads * head_dim if full else head_dim,
                epsilon=self.epsilon,
                axis_name=axis if full else "head_dim",
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )
            setattr(self, stream, norm)

    @property
    def scale(self) -> float | None:
        """The scale of the logits that goes with the mode; None = D^-0.5."""
        return 1.0 if self.mode == "l2" else None

    def __call__(
        self, query: Float[Array, "B T N D"], key: Float[Array, "B S K D"]
    ) -> tuple[Float[Array, "B T N D"], Float[Array, "B S K D"]]:
        """Normalize both."""
        if self.mode == "l2":
            gain = self.gain.get_value().astype(jnp.promote_types(query.dtype, jnp.float32))
            unit = l2_normalize(query.astype(gain.dtype), epsilon=self.epsilon)
            return (gain * unit).astype(query.dtype), l2_normalize(key, epsilon=self.epsilon)
        if self.mode == "rmsnorm_full":
            return (
                self.query_norm(query.reshape(*query.shape[:2], -1)).reshape(query.shape),
                self.key_norm(key.reshape(*key.shape[:2], -1)).reshape(key.shape),
            )
        return self.query_norm(query), self.key_norm(key)
