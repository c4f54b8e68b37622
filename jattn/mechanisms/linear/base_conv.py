"""Gated convolution in its simplest form: a projection of the token times a convolution of what came before it.

    y = (x W + b) * conv(x) + x

The convolution is a depthwise causal one over a few tokens, or one as long as the sequence whose kernel a small network
makes from its places. It is the simplest member of the family of Hyena and RWKV, and what associative recall costs that
family is measured on it. Layers alternate short and long kernels, 3 and the whole sequence. Source: Zoology: Measuring
and Improving Recall in Efficient Language Models (arXiv 2312.04927) and its code.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.cache import RecurrentState
from jattn.layers.attention import LayerOutput
from jattn.layers.long_conv import ImplicitFilterRelu, causal_long_conv
from jattn.layers.recurrent import RecurrentLayer
from jattn.layers.sharding import axes
from jattn.layers.short_conv import ShortConv
from jattn.mechanisms.entry import Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import normal

ACTIVATIONS = {"silu": jax.nn.silu}


class ImplicitLongConv(nnx.Module):
    """A causal convolution as long as the sequence, whose kernel a small network makes, and the input added.

    y_t = sum_{w < L} h_w x_{t-w} + x_t,   h = W_2 relu(W_1 [t, cos(f w), -sin(f w)] + b_1) + b_2

    Args:
        features: M, channels.
        max_length: L, taps of the kernel; what lies further back is not seen.
        emb_dim: features of a place, see `filter_features`.
        hidden: width of the network.
        dtype: of the input and output; that of inputs and parameters if not given. Sums are float32 at least.
        param_dtype: of the parameters.
        rngs: for the initial values.

    Raises:
        ValueError: a length below 1 or an even emb_dim.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> ImplicitLongConv(8, max_length=16, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 8))).output.shape
        (1, 5, 8)

    Source: Zoology: Measuring and Improving Recall in Efficient Language Models (arXiv 2312.04927), published code.
    """

    def __init__(
        self,
        features: int,
        *,
        max_length: int = 1024,
        emb_dim: int = 3,
        hidden: int = 16,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.max_length, self.dtype = max_length, dtype
        self.filter = ImplicitFilterRelu(
            features, max_length=max_length, emb_dim=emb_dim, hidden=hidden, param_dtype=param_dtype, rngs=rngs
        )

    def __call__(self, x: Any, *, segment_ids: Any = None, cache: Any = None) -> LayerOutput:
        """Convolve.

        Args:
            x: `[B, T, M]`.
            segment_ids: `[B, T]`; a run of equal ids sees itself only, negative = padding.
            cache: the tail of an earlier call, `[B, L - 1, M]`.

        Returns:
            LayerOutput(`[B, T, M]`, the new tail). A step of decoding takes L M products and keeps L - 1 inputs: the
            kernel is no recurrence, so nothing smaller continues it exactly.
        """
        x = jnp.asarray(x)
        x = x.astype(self.dtype or jnp.promote_types(x.dtype, self.filter.down.kernel.get_value().dtype))
        y, tail = causal_long_conv(x, self.filter(self.max_length), segment_ids=segment_ids, tail=cache)
        if segment_ids is not None:
            x = jnp.where((jnp.asarray(segment_ids) >= 0)[..., None], x, 0)
        return LayerOutput(y + x, tail)


class BaseConv(RecurrentLayer):
    """Gated causal convolution with its own residual: y = act(x W + b) * act(conv(x)) + x.

    Args:
        features: M.
        num_heads: N; a convolution has no heads, they cut the channels into groups for `tap` only.
        num_kv_heads: none but N.
        head_dim: none but M / N.
        width: tokens that a short convolution sees; None for `ImplicitLongConv`.
        max_length: taps of the long one.
        filter_dim: width of the network that makes its kernel.
        activation: "silu" on both factors, or None.
        use_bias: of the projection.
        position: refused: there are no queries and keys to rotate.
        dtype: of the computation; that of inputs and parameters if not given.
        param_dtype: of the parameters.
        rngs: for the initial values.

    Raises:
        ValueError: sizes that do not fit, a position, or an unknown activation.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> BaseConv(16, 1, width=None, max_length=32, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 16))).output.shape
        (1, 5, 16)

    Source: Zoology: Measuring and Improving Recall in Efficient Language Models (arXiv 2312.04927), published code.
    """

    def __init__(
        self,
        features: int,
        num_heads: int = 1,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        width: int | None = 3,
        max_length: int = 1024,
        filter_dim: int = 16,
        activation: str | None = None,
        use_bias: bool = True,
        position: Any = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(features, num_heads)
        if position is not None:
            raise ValueError("BaseConv has no queries and keys, so it takes no position; it tells places by itself")
        check_groups(type(self).__name__, features, num_heads, num_kv_heads, head_dim)
        if activation is not None and activation not in ACTIVATIONS:
            raise ValueError(f"activation must be None or one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.activation, self.dtype = activation, dtype
        shared: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.projection = nnx.Linear(
            features,
            features,
            use_bias=use_bias,
            kernel_metadata=axes("embed", None),
            bias_metadata=axes(None),
            **shared,
        )
        if width is None:
            self.conv: Any = ImplicitLongConv(features, max_length=max_length, hidden=filter_dim, **shared)
        else:
            self.conv = ShortConv(features, width, use_bias=True, **shared)

    def mix(
        self, x: jax.Array, *, segment_ids: Any, positions: jax.Array, state: RecurrentState | None, **options: Any
    ) -> tuple[jax.Array, RecurrentState, dict[str, Any]]:
        """See `RecurrentLayer`."""
        y, tail = self.conv(x, segment_ids=segment_ids, cache=None if state is None else state.conv)[:2]
        gate = self.projection(x)
        if self.activation is not None:
            y, gate = ACTIVATIONS[self.activation](y), ACTIVATIONS[self.activation](gate)
        y = (y * gate).reshape(*y.shape[:2], self.num_heads, -1)
        return y, RecurrentState((), conv=tail), {}

    def output(self, o: jax.Array, x: jax.Array) -> jax.Array:
        """See `RecurrentLayer`."""
        y = o.reshape(*o.shape[:2], -1)
        return y + x.astype(y.dtype)


def check_groups(name: str, features: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None) -> None:
    """Refuse head sizes that a mixer of channels cannot have.

    Raises:
        ValueError: they are not groups of all channels.
    """
    if features % num_heads or num_kv_heads not in (None, num_heads) or head_dim not in (None, features // num_heads):
        raise ValueError(
            f"{name} mixes tokens channel by channel: num_heads must divide features, num_kv_heads and head_dim follow "
            f"from them; got {features}, {num_heads}, {num_kv_heads} and {head_dim}"
        )


_PAPER = Paper("Zoology: Measuring and Improving Recall in Efficient Language Models", "2312.04927", 2023)


def _example(key, length):
    return LayerExample((8, 2), {"width": 3, "activation": "silu"}, (normal(key, 2, length, 8),), {})


def _long_example(key, length):
    return LayerExample((8,), {"max_length": max(length, 2), "hidden": 4}, (normal(key, 2, length, 8),), {})


ENTRIES = (
    Entry(
        name="BaseConv",
        kind="layer",
        family="linear",
        layer=BaseConv,
        papers=(_PAPER,),
        patterns=("causal self",),
        cost=Cost(flops="T", memory="T"),
        decode="the last inputs of its convolution: width - 1, or max_length - 1 for a long kernel",
        example=_example,
        fidelity="official code",
    ),
    Entry(
        name="ImplicitLongConv",
        kind="layer",
        family="linear",
        layer=ImplicitLongConv,
        papers=(_PAPER,),
        patterns=("causal self",),
        # Each of the log(T) levels transforms the row; the count takes a transform for one operation an entry.
        cost=Cost(flops="T*log(T)", memory="T"),
        decode="the last max_length - 1 inputs",
        example=_long_example,
        fidelity="official code",
    ),
)
