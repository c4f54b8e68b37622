"""Hedgehog feature maps: learned exponentials, so that linear attention can be as spiky and monotone as softmax.

    y = x W (+ x) (+ b), a head its own W
    exp_raw      [exp(y), exp(-y)]                                 the map of the paper
    exp          [exp(y - max y), exp(min y - y)]                  max and min over features
    softmax_dim  [softmax(y), softmax(-y)]                         over features
    fla          softmax([2 y, -2 y])

Maps for queries and keys have weights of their own and start from W = 1. The last three are other maps than the first,
not other ways to compute it: what divides a key's features reweighs that key.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.mechanisms.entry import PATTERNS, Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import normal, normals

VARIANTS = ("softmax_dim", "exp", "exp_raw", "fla")
LEAST = 1e-12
"""Features below are raised to it, in all variants but "fla"."""


def hedgehog_feature_map(
    x: Any, weight: Any, bias: Any = None, *, variant: str = "softmax_dim", skip: bool = False
) -> jax.Array:
    """Positive features whose products can imitate the weights of softmax attention.

    phi(x) = [softmax(y), softmax(-y)], y = x W (+ x) (+ b); see the module for the other variants

    Args:
        x: `[..., N, D]`, queries or keys with their positions applied, N heads before the last axis.
        weight: W `[N, D, F]`, or `[D, F]` for all heads.
        bias: broadcasts to `[N, F]`; none if not given.
        variant: "softmax_dim", "exp", "exp_raw" or "fla"; "exp_raw" overflows where |y| does.
        skip: whether x is added to x W, which needs F = D.

    Returns:
        `[..., N, 2F]` in the dtype of x, computed in float32 at least.

    Raises:
        ValueError: shapes that do not fit, or an unknown variant.

    Example:
        >>> x = jnp.array([[[1.0, -1.0]]])
        >>> [round(x, 4) for x in hedgehog_feature_map(x, jnp.eye(2)[None]).ravel().tolist()]
        [0.8808, 0.1192, 0.1192, 0.8808]

    Source: The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry (arXiv 2402.04347); the
    variants from the programs of LoLCATs (arXiv 2410.10254) and flash-linear-attention.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    x, weight = jnp.asarray(x), jnp.asarray(weight)
    heads, width = x.shape[-2:] if x.ndim > 1 else (0, 0)
    if weight.ndim not in (2, 3) or weight.shape[-2] != width or weight.ndim == 3 and weight.shape[0] != heads:
        raise ValueError(
            f"weight must be [{heads}, {width}, F] or [{width}, F] for x {list(x.shape)}, got {list(weight.shape)}"
        )
    if skip and weight.shape[-1] != width:
        raise ValueError(f"skip needs as many features as channels, {width}; got {weight.shape[-1]}")
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    wide = x.astype(dtype)
    y = jnp.einsum("...nd,ndf->...nf" if weight.ndim == 3 else "...nd,df->...nf", wide, weight.astype(dtype))
    y = y + wide if skip else y
    y = y if bias is None else y + jnp.asarray(bias).astype(dtype)
    if variant == "fla":
        return jax.nn.softmax(jnp.concatenate([2 * y, -2 * y], axis=-1)).astype(x.dtype)
    if variant == "exp_raw":
        halves = [jnp.exp(y), jnp.exp(-y)]
    elif variant == "exp":
        halves = [jnp.exp(y - y.max(-1, keepdims=True)), jnp.exp(y.min(-1, keepdims=True) - y)]
    else:
        halves = [jax.nn.softmax(y), jax.nn.softmax(-y)]
    return jnp.maximum(jnp.concatenate(halves, axis=-1), LEAST).astype(x.dtype)


class HedgehogFeatureMap(nnx.Module):
    """A Hedgehog feature map with its weights, for the queries or for the keys of a layer.

    phi(x) = hedgehog_feature_map(x, W, b), W = 1 and b = 0 at first (W = 0 with `skip`)

    Args:
        heads: N.
        head_dim: D.
        num_features: F, half of the features; D if not given.
        variant: of `hedgehog_feature_map`.
        skip: likewise.
        use_bias: whether there is a bias `[N, F]`.
        shared: one W for all heads, as in flash-linear-attention.
        param_dtype: of the parameters.

    Raises:
        ValueError: an unknown variant, or skip with another number of features.

    Example:
        >>> HedgehogFeatureMap(2, 4)(jnp.ones((1, 3, 2, 4))).shape
        (1, 3, 2, 8)

    Source: The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry (arXiv 2402.04347).
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        num_features: int | None = None,
        variant: str = "softmax_dim",
        skip: bool = False,
        use_bias: bool = False,
        shared: bool = False,
        param_dtype: Any = jnp.float32,
    ):
        count = head_dim if num_features is None else num_features
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        if skip and count != head_dim:
            raise ValueError(f"skip needs as many features as channels, {head_dim}; got {count}")
        self.variant, self.skip = variant, skip
        first = jnp.zeros((head_dim, count), param_dtype) if skip else jnp.eye(head_dim, count, dtype=param_dtype)
        weight = first if shared else jnp.tile(first, (heads, 1, 1))
        # Logical names of axes, as jattn.layers.axes gives them; engines know no layers.
        names = (None, None) if shared else ("heads", "head_dim", None)
        self.weight = nnx.Param(weight, out_sharding=names, eager_sharding=False)
        bias = None
        if use_bias:
            lead, lead_name = ((), ()) if shared else ((heads,), ("heads",))
            zeros = jnp.zeros((*lead, count), param_dtype)
            bias = nnx.Param(zeros, out_sharding=(*lead_name, None), eager_sharding=False)
        self.bias = bias

    def __call__(self, x: Any) -> jax.Array:
        """Features `[..., N, 2F]` of x `[..., N, D]`."""
        bias = None if self.bias is None else self.bias.get_value()
        return hedgehog_feature_map(x, self.weight.get_value(), bias, variant=self.variant, skip=self.skip)


def _example(key, length):
    return normals(key, (2, length, 2, 4), (2, 4, 3), (2, 3)), {}


def _module_example(key, length):
    return LayerExample((2, 4), {"use_bias": True}, (normal(key, 2, length, 2, 4),), {})


_SHARED: dict[str, Any] = {
    "kind": "feature_map",
    "family": "engine",
    "papers": (
        Paper(
            "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
            "2402.04347",
            2024,
        ),
    ),
    "patterns": tuple(pattern for pattern in PATTERNS if pattern != "causal cross"),
    "cost": Cost(flops="T", memory="T"),
    "decode": "as linear_attention",
    "fidelity": "inferred: which variant the paper's results have, from later programs of the same group",
}

ENTRIES = (
    Entry("hedgehog_feature_map", function=hedgehog_feature_map, example=_example, **_SHARED),
    Entry("HedgehogFeatureMap", layer=HedgehogFeatureMap, example=_module_example, **_SHARED),
)
