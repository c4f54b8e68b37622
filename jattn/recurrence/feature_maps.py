"""Feature maps phi: linear attention replaces exp(q . k) by phi(q) . phi(k).

    identity  phi(x) = x
    relu      phi(x) = max(x, 0)
    elu1      phi(x) = elu(x) + 1
    taylor2   phi(q) . phi(k) = 1 + u + u^2 / 2,  u = q . k / sqrt(D)
    dpfp      phi(x) = concat_{j = 1..nu} z * roll(z, j),  z = [relu(x), relu(-x)]
    cosine    phi(x, t) = relu(x) [cos(pi t / 2M), sin(pi t / 2M)], so that
              phi(q, i) . phi(k, j) = relu(q) . relu(k) cos(pi (i - j) / 2M)

A feature map is any function `[..., D] -> [..., F]`; one that depends on the position, as `Cosine` does, has the
attribute `uses_positions = True` and takes the positions as its second argument.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def identity(x: Float[Array | np.ndarray, "... D"]) -> Float[Array, "... D"]:
    """The plain dot product as the kernel.

    phi(x) = x. Weights may be negative, so divide by their sum with care.

    Args:
        x: `[..., D]`.

    Returns:
        `[..., D]`.

    Example:
        >>> identity(jnp.array([-1.0, 2.0])).tolist()
        [-1.0, 2.0]

    Source: Linear Transformers Are Secretly Fast Weight Programmers (arXiv 2102.11174).
    """
    return x


def relu(x: Float[Array | np.ndarray, "... D"]) -> Float[Array, "... D"]:
    """Positive part.

    phi(x) = max(x, 0).

    Args:
        x: `[..., D]`.

    Returns:
        `[..., D]`.

    Example:
        >>> relu(jnp.array([-1.0, 2.0])).tolist()
        [0.0, 2.0]

    Source: Transformers are RNNs (arXiv 2006.16236) names it as the alternative to elu + 1.
    """
    return jax.nn.relu(x)


def elu1(x: Float[Array | np.ndarray, "... D"]) -> Float[Array, "... D"]:
    """Positive and smooth.

    phi(x) = elu(x) + 1 = x + 1 for x > 0, exp(x) otherwise.

    Args:
        x: `[..., D]`.

    Returns:
        `[..., D]`.

    Example:
        >>> elu1(jnp.array([0.0, 2.0])).tolist()
        [1.0, 3.0]

    Source: Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention (arXiv 2006.16236).
    """
    # The exponential of a large x would be inf in the branch that is not taken, and its gradient NaN; and at 0, where
    # jnp.minimum(x, 0) shares the gradient between its arguments, the slope is 1.
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.where(wide > 0, wide + 1, jnp.exp(jnp.where(wide > 0, 0, wide))).astype(x.dtype)


def taylor2(x: Float[Array | np.ndarray, "... D"]) -> Float[Array, "... F"]:
    """Second-order expansion of the exponential.

    phi(q) . phi(k) = 1 + u + u^2 / 2 with u = q . k / sqrt(D).

    Only the upper triangle of x x^T is kept, off-diagonal products times sqrt(2): the same kernel with
    F = 1 + D + D (D + 1) / 2 features.

    Args:
        x: `[..., D]`.

    Returns:
        `[..., F]`.

    Example:
        >>> q, k = jnp.array([1.0, 0.0, 0.0, 0.0]), jnp.array([4.0, 1.0, 0.0, 0.0])
        >>> round(float(taylor2(q) @ taylor2(k)), 5)  # u = 2
        5.0

    Source: Zoology: Measuring and Improving Recall in Efficient Language Models (arXiv 2312.04927).
    """
    size = x.shape[-1]
    row, column = np.triu_indices(size)
    factor = np.where(row == column, 0.5**0.5, 1.0).astype(x.dtype) / size**0.5
    products = x[..., row] * x[..., column] * factor.astype(x.dtype)
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x * size**-0.25, products], axis=-1)


def dpfp(x: Float[Array | np.ndarray, "... D"], nu: int = 4) -> Float[Array, "... F"]:
    """Deterministic parameter-free projection: products of neighboring rectified coordinates.

    phi(x) = concat_{j = 1..nu} z * roll(z, j),  z = [relu(x), relu(-x)].

    Args:
        x: `[..., D]`.
        nu: number of rolls; F = 2 D nu. For another one than 4 give `functools.partial(dpfp, nu=nu)` as feature map.

    Returns:
        `[..., F]`.

    Example:
        >>> dpfp(jnp.array([1.0, -2.0]), nu=1).tolist()
        [2.0, 0.0, 0.0, 0.0]

    Source: Linear Transformers Are Secretly Fast Weight Programmers (arXiv 2102.11174).
    """
    z = jnp.concatenate([jax.nn.relu(x), jax.nn.relu(-x)], axis=-1)
    return jnp.concatenate([z * jnp.roll(z, j, axis=-1) for j in range(1, nu + 1)], axis=-1)


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Positive part, reweighted by the cosine of the distance.

    phi(x, t) = relu(x) [cos(pi t / 2M), sin(pi t / 2M)].

    Args:
        max_length: M; weights stay non-negative while distances are at most M.

    Raises:
        ValueError: M is not positive.

    Example:
        >>> Cosine(8)(jnp.ones((1, 3, 2, 4)), jnp.arange(3)[None]).shape
        (1, 3, 2, 8)

    Source: cosFormer: Rethinking Softmax in Attention (arXiv 2202.08791).
    """

    max_length: int
    uses_positions: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {self.max_length}")

    def __call__(self, x: Any, positions: Any) -> Any:
        """Features of x `[B, T, heads, D]` at integer positions `[B|1, T]`: `[B, T, heads, 2 D]`."""
        angle = (np.pi / 2 / self.max_length) * positions.astype(x.dtype)[..., None, None]
        x = jax.nn.relu(x)
        return jnp.concatenate([x * jnp.cos(angle), x * jnp.sin(angle)], axis=-1)


FEATURE_MAPS: dict[str, Callable[..., Any]] = {
    "identity": identity,
    "relu": relu,
    "elu1": elu1,
    "taylor2": taylor2,
    "dpfp": dpfp,
    "cosine": Cosine,
}
"""The feature maps that have a name; `"cosine"` stands for `Cosine(length of the call)`."""


def get_feature_map(feature_map: str | Callable[..., Any], length: int | None = None) -> Callable[..., Any]:
    """A feature map by its name, or itself.

    Args:
        feature_map: a name of `FEATURE_MAPS`, or a function `[..., D] -> [..., F]`.
        length: M of `"cosine"`.

    Returns:
        The function.

    Raises:
        ValueError: an unknown name, or `"cosine"` where no length is known.
        TypeError: neither a name nor callable.

    Example:
        >>> get_feature_map("elu1") is elu1
        True
    """
    if isinstance(feature_map, str):
        if feature_map not in FEATURE_MAPS:
            near = difflib.get_close_matches(feature_map, FEATURE_MAPS, n=2)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ValueError(f"unknown feature_map {feature_map!r}; {hint}There are: {', '.join(FEATURE_MAPS)}")
        if feature_map == "cosine":
            if length is None:
                raise ValueError("feature_map 'cosine' needs a fixed length to keep a state: give Cosine(max_length)")
            return Cosine(length)
        return FEATURE_MAPS[feature_map]
    if not callable(feature_map):
        raise TypeError(f"feature_map must be a name or a function, got {type(feature_map).__name__}")
    return feature_map


def apply_feature_map(feature_map: Callable[..., Any], x: Any, positions: Any) -> Any:
    """Features of x `[B, T, heads, D]`; positions `[B|1, T]` reach the maps that use them."""
    return feature_map(x, positions) if getattr(feature_map, "uses_positions", False) else feature_map(x)


def num_features(feature_map: Callable[..., Any], head_dim: int) -> int:
    """F, the number of features of a head of size D.

    Example:
        >>> num_features(taylor2, 4)
        15
    """
    x, positions = jax.ShapeDtypeStruct((1, 1, 1, head_dim), "float32"), jax.ShapeDtypeStruct((1, 1), "int32")
    return jax.eval_shape(lambda x, p: apply_feature_map(feature_map, x, p), x, positions).shape[-1]
