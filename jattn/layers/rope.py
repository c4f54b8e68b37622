"""Rotary position embedding: pairs of channels turn by an angle that grows with the position.

    theta_m = base^(-2m / d);   (x_a, x_b) -> (x_a cos - x_b sin, x_a sin + x_b cos),   angle = position * theta_m

so that <R_i q, R_j k> depends on i - j only. Two layouts of the pairs are in use: `"half"` (a = m, b = m + d/2) and
`"interleaved"` (a = 2m, b = 2m + 1); they differ by a fixed permutation of channels.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jattn.layers.rope_scaling import RopeScaling
from jattn.mechanisms.entry import Cost, Entry, Paper
from jattn.mechanisms.examples import normals

LAYOUTS = ("half", "interleaved")


def rope(
    x: ArrayLike,
    positions: ArrayLike,
    *,
    base: float | int = 10000.0,
    layout: str = "half",
    rotary_dim: int | None = None,
    scaling: RopeScaling | None = None,
) -> jax.Array:
    """Rotate the channels of `x` by their positions.

    (x_a, x_b) -> c (x_a cos - x_b sin, x_a sin + x_b cos), angle = position * base^(-2m / d), d = rotary_dim.

    Args:
        x: `[B, T, N, D]`.
        positions: ints or floats `[T]` or `[B, T]`.
        base: of the frequencies.
        layout: `"half"` (Llama, NeoX) or `"interleaved"` (GPT-J).
        rotary_dim: d, how many leading channels turn; all of them if not given.
        scaling: a rule of `jattn.layers.rope_scaling` that stretches the frequencies and gives c.

    Returns:
        `[B, T, N, D]` in the dtype of `x`; the angles are float32 at least.

    Raises:
        ValueError: a shape, the layout or the rotary dimension does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
        >>> abs(rope(x, jnp.array([jnp.pi / 2]))).round(3).ravel().tolist()
        [0.0, 1.0]

    Source: RoFormer: Enhanced Transformer with Rotary Position Embedding (arXiv 2104.09864).
    """
    x, positions = jnp.asarray(x), jnp.asarray(positions)
    if x.ndim != 4:
        raise ValueError(f"x must be [B, T, N, D], got {list(x.shape)}")
    batch, length, _, width = x.shape
    if positions.shape not in ((length,), (1, length), (batch, length)):
        raise ValueError(f"positions must be [T] or [B, T] = {[batch, length]}, got {list(positions.shape)}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    dim = width if rotary_dim is None else rotary_dim
    if dim % 2 or not 0 < dim <= width:
        raise ValueError(f"rotary_dim must be even and between 2 and the head dimension {width}, got {dim}")

    frequencies, factor = (scaling or RopeScaling()).frequencies(dim, base)
    dtype = jnp.promote_types(jnp.promote_types(x.dtype, positions.dtype), jnp.float32)
    angles = positions.astype(dtype)[..., None] * jnp.asarray(frequencies, dtype)
    cos, sin = (jnp.asarray(factor, dtype) * f(angles)[..., None, :] for f in (jnp.cos, jnp.sin))
    turned, rest = x[..., :dim].astype(dtype), x[..., dim:]
    if layout == "half":
        first, second = jnp.split(turned, 2, axis=-1)
        turned = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    else:
        first, second = turned[..., 0::2], turned[..., 1::2]
        turned = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=-1)
        turned = turned.reshape(*x.shape[:-1], dim)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions as the position option of a layer; see `rope` for the arguments.

    Example:
        >>> import jax.numpy as jnp
        >>> q = k = jnp.ones((1, 3, 2, 4))
        >>> Rope(base=100.0).rotate(q, k, jnp.arange(3), jnp.arange(3))[0].shape
        (1, 3, 2, 4)

    Source: RoFormer: Enhanced Transformer with Rotary Position Embedding (arXiv 2104.09864).
    """

    base: float | int = 10000.0
    layout: str = "half"
    rotary_dim: int | None = None
    scaling: RopeScaling | None = None

    def apply(self, x: ArrayLike, positions: ArrayLike) -> jax.Array:
        """Rotate one array `[B, T, N, D]` at `positions`, `[T]` or `[B, T]`."""
        return rope(x, positions, base=self.base, layout=self.layout, rotary_dim=self.rotary_dim, scaling=self.scaling)

    def rotate(
        self, query: ArrayLike, key: ArrayLike, query_positions: ArrayLike, key_positions: ArrayLike
    ) -> tuple[jax.Array, jax.Array]:
        """Rotate queries and keys at their positions.

        Args:
            query: `[B, T, N, D]`.
            key: `[B, S, K, D]`.
            query_positions: `[T]` or `[B, T]`.
            key_positions: `[S]` or `[B, S]`.

        Returns:
            The rotated query and key.
        """
        return self.apply(query, query_positions), self.apply(key, key_positions)


def _example(key, length):
    return (*normals(key, (1, length, 2, 8)), np.arange(length)), {}


ENTRY = Entry(
    name="rope",
    kind="position",
    family="layers",
    function=rope,
    papers=(Paper("RoFormer: Enhanced Transformer with Rotary Position Embedding", "2104.09864", 2021),),
    patterns=("noncausal self", "causal self", "noncausal cross", "causal cross"),
    cost=Cost(flops="T", memory="T"),
    decode="keys are cached rotated at their positions",
    example=_example,
    fidelity="paper",
)
