"""Convolution over neighbors on both sides, a few numbers a channel, with a norm: what conditions Orchid's kernels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.layers.norms import make_norm
from jattn.layers.sharding import axes

PADDINGS = ("zeros", "circular")


class NeighborConv(nnx.Module):
    """Convolution over a few neighbors on both sides, channel by channel, and a LayerNorm over the channels.

    y_n = LayerNorm(sum_w x_{n + w - W // 2} K_w + b), K_w from i numbers a channel to o

    Args:
        features: M, channels.
        inputs: i, numbers a channel has in x.
        outputs: o, numbers it has in y.
        width: W, odd.
        padding: what stands beyond the ends: "zeros", or "circular".
        param_dtype: of the parameters.
        rngs: for the initial values, uniform within (i W)^-0.5.

    Raises:
        ValueError: an even width or an unknown padding.

    Example:
        >>> from flax import nnx
        >>> NeighborConv(4, inputs=1, outputs=2, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 4, 1))).shape
        (1, 5, 4, 2)

    Source: the conditioning network of Orchid (arXiv 2402.18508), published code.
    """

    def __init__(
        self,
        features: int,
        *,
        inputs: int = 1,
        outputs: int = 1,
        width: int = 3,
        padding: str = "zeros",
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if padding not in PADDINGS:
            raise ValueError(f"padding must be one of {', '.join(PADDINGS)}, got {padding!r}")
        if width < 1 or width % 2 == 0:
            raise ValueError(f"width must be odd, so that a token has as many neighbors on either side; got {width}")
        self.width, self.mode = width, "wrap" if padding == "circular" else "constant"
        bound = (inputs * width) ** -0.5

        def drawn(shape: tuple[int, ...]) -> jax.Array:
            return nnx.initializers.uniform(2 * bound)(rngs.params(), shape, param_dtype) - bound

        self.kernel = nnx.Param(drawn((width, features, inputs, outputs)), **axes(None, "embed", None, None))
        self.bias = nnx.Param(drawn((features, outputs)), **axes("embed", None))
        self.norm = make_norm("layernorm", features * outputs, epsilon=1e-5, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, M, i]` -> `[B, T, M, o]`, float32 at least."""
        kernel = self.kernel.get_value()
        dtype = jnp.promote_types(jnp.promote_types(x.dtype, kernel.dtype), jnp.float32)
        side, length = self.width // 2, x.shape[1]
        # A row may be shorter than what wraps around.
        reach = jnp.arange(-side, length + side)
        around = x[:, reach % length]
        if self.mode == "constant":
            inside = (reach >= 0) & (reach < length)
            around = jnp.where(inside[:, None, None], around, 0)
        around = around.astype(dtype)
        y = sum(
            jnp.einsum("btmi,mio->btmo", around[:, w : w + length], kernel[w].astype(dtype)) for w in range(self.width)
        )
        y = y + self.bias.get_value().astype(dtype)
        return self.norm(y.reshape(*y.shape[:2], -1)).reshape(y.shape)
