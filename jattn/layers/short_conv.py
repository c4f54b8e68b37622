"""Short causal convolution a channel: what looks at the last few tokens before a recurrence does.

    y_t = activation(sum_{w = 0..W-1} kernel_w x_{t - (W-1) + w} + bias)

Tokens before the start are 0. In a packed row nothing crosses from one run into the next, and padding is skipped: the
convolution sees the tokens of a run as if they stood side by side.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.layers.attention import LayerOutput
from jattn.layers.sharding import axes
from jattn.mechanisms.entry import Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import normal
from jattn.recurrence.segments import runs_of

ACTIVATIONS = {"silu": jax.nn.silu}


def causal_short_conv(
    x: Any, kernel: Any, bias: Any = None, *, segment_ids: Any = None, tail: Any = None
) -> tuple[jax.Array, jax.Array]:
    """Convolve every channel with a short kernel that looks back.

    y_t = sum_w kernel_w x_{t - (W-1) + w} + bias; the last entry of the kernel meets the token itself.

    Args:
        x: `[B, T, M]`.
        kernel: `[W, M]`.
        bias: `[M]` or None.
        segment_ids: integers `[B, T]`; a run of equal ids sees itself only, negative = padding, which outputs 0 and is
            not there for others.
        tail: `[B, W - 1, M]`, the inputs before the first token; zeros if None. They belong to the first run.

    Returns:
        `[B, T, M]`, and the tail for the tokens to come: the last W - 1 inputs of the last run.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> y, tail = causal_short_conv(jnp.ones((1, 3, 1)), jnp.array([[0.5], [1.0]]))
        >>> y[0, :, 0].tolist(), tail.shape
        ([1.0, 1.5, 1.5], (1, 1, 1))

    Source: as in Mamba (arXiv 2312.00752) and Zoology (arXiv 2312.04927).
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    if x.ndim != 3 or kernel.ndim != 2 or kernel.shape[1] != x.shape[2] or not kernel.shape[0]:
        raise ValueError(f"x must be [B, T, M] and kernel [W, M]; got {list(x.shape)} and {list(kernel.shape)}")
    (batch, length, channels), width = x.shape, kernel.shape[0]
    if tail is None:
        tail = jnp.zeros_like(x, shape=(batch, width - 1, channels))
    if tail.shape != (batch, width - 1, channels):
        raise ValueError(f"tail must be {[batch, width - 1, channels]}, got {list(tail.shape)}")
    if segment_ids is None:
        whole = jnp.concatenate([tail.astype(x.dtype), x], 1)
        y = sum(kernel[w] * whole[:, w : w + length] for w in range(width))
        return (y if bias is None else y + bias), whole[:, length:]
    row = pack(x, tail, segment_ids)

    def of_run(w: int) -> jax.Array:
        own = row.runs[:, w : w + length] == row.runs[:, width - 1 :]
        return jnp.where(own[..., None], row.tokens[:, w : w + length], 0)

    y = sum(kernel[w] * of_run(w) for w in range(width))
    return row.unpack(y if bias is None else y + bias), row.tail(width - 1)


class PackedRow(NamedTuple):
    """The tokens of each row without its padding, behind what came before them."""

    tokens: jax.Array
    """`[B, W - 1 + T, M]`: the tail, the real tokens, then zeros."""
    runs: jax.Array
    """int32 `[B, W - 1 + T]`; the tail belongs to the first run."""
    order: jax.Array
    """int `[B, T]`: where the tokens stood."""
    real: jax.Array
    """bool `[B, T]`: which places of the row hold a token."""

    def unpack(self, y: jax.Array) -> jax.Array:
        """`[B, T, M]` for the packed tokens to what stands at their places, 0 at padding."""
        return jnp.where(self.real[..., None], _picked(y, jnp.argsort(self.order, axis=1)), 0)

    def tail(self, count: int) -> jax.Array:
        """The last inputs of the last run, `[B, count, M]`."""
        ends = jnp.sum(self.real, axis=1, dtype=jnp.int32)[:, None] + jnp.arange(count)
        last = _picked(self.runs, ends[:, -1:]) if count else self.runs[:, :0]
        return jnp.where((_picked(self.runs, ends) == last)[..., None], _picked(self.tokens, ends), 0)


def pack(x: jax.Array, tail: jax.Array, segment_ids: Any) -> PackedRow:
    """Push the tokens of each row together, so that no padding stands between them.

    Args:
        x: `[B, T, M]`.
        tail: `[B, W - 1, M]`, what came before.
        segment_ids: integers that broadcast to `[B, T]`; negative = padding.
    """
    ids = jnp.broadcast_to(jnp.asarray(segment_ids), x.shape[:2])
    real = ids >= 0
    order = jnp.argsort(~real, axis=1, stable=True)
    tokens = jnp.concatenate([tail.astype(x.dtype), _picked(jnp.where(real[..., None], x, 0), order)], 1)
    runs = jnp.pad(_picked(runs_of(ids), order), [(0, 0), (tail.shape[1], 0)])
    return PackedRow(tokens, runs, order, real)


def _picked(array: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(array, index.reshape(*index.shape, *(1,) * (array.ndim - 2)), axis=1)


class ShortConv(nnx.Module):
    """`causal_short_conv` with its kernel: a depthwise causal convolution that decodes.

    y = activation(conv(x) + bias)

    Args:
        features: M, channels.
        width: W, tokens that a token sees, itself included.
        use_bias: whether there is a bias.
        activation: "silu" or None.
        dtype: of the computation; that of inputs and parameters if not given.
        param_dtype: of the parameters.
        rngs: for the initial values, uniform within W^-0.5.

    Raises:
        ValueError: a width below 1 or an unknown activation.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> ShortConv(8, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 8))).output.shape
        (1, 5, 8)

    Source: Zoology: Measuring and Improving Recall in Efficient Language Models (arXiv 2312.04927); as in Mamba.
    """

    def __init__(
        self,
        features: int,
        width: int = 4,
        *,
        use_bias: bool = False,
        activation: str | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        if activation is not None and activation not in ACTIVATIONS:
            raise ValueError(f"activation must be None or one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.width, self.activation, self.dtype = width, activation, dtype
        init = nnx.initializers.uniform(2 * width**-0.5)

        def centered(shape: tuple[int, ...]) -> jax.Array:
            return init(rngs.params(), shape, param_dtype) - jnp.asarray(width**-0.5, param_dtype)

        self.kernel = nnx.Param(centered((width, features)), **axes(None, "embed"))
        self.bias = nnx.Param(centered((features,)), **axes("embed")) if use_bias else None

    def __call__(self, x: Any, *, segment_ids: Any = None, cache: Any = None) -> LayerOutput:
        """Convolve.

        Args:
            x: `[B, T, M]`.
            segment_ids: `[B, T]`; negative = padding.
            cache: the tail of an earlier call, `[B, W - 1, M]`.

        Returns:
            LayerOutput(`[B, T, M]`, the new tail).
        """
        x, kernel, bias = jnp.asarray(x), self.kernel.get_value(), None if self.bias is None else self.bias.get_value()
        dtype = self.dtype or jnp.promote_types(x.dtype, kernel.dtype)
        y, tail = causal_short_conv(
            x.astype(dtype),
            kernel.astype(dtype),
            None if bias is None else bias.astype(dtype),
            segment_ids=segment_ids,
            tail=cache,
        )
        if self.activation is not None:
            y = ACTIVATIONS[self.activation](y)
        return LayerOutput(y, tail)


def _example(key, length):
    return LayerExample((8,), {"width": 3, "use_bias": True, "activation": "silu"}, (normal(key, 2, length, 8),), {})


ENTRY = Entry(
    name="ShortConv",
    kind="layer",
    family="linear",
    layer=ShortConv,
    papers=(Paper("Zoology: Measuring and Improving Recall in Efficient Language Models", "2312.04927", 2023),),
    patterns=("causal self",),
    cost=Cost(flops="T", memory="T"),
    decode="the last W - 1 inputs",
    example=_example,
    fidelity="official code",
)
