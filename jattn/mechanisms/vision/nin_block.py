"""NiNformer's block: a network in a network, an MLP-Mixer that makes the gate of every token.

    Mixer(v):   v1 = v + Tok(LN(v)),   v2 = v1 + Ch(LN(v1))        Tok mixes the T tokens, Ch the M channels
    Gate(x)     = (x W_p + b) * Mixer(x)
    x = x + Gate(LN(x)),   x = x + Ffn(LN(x))                      both LN are one and the same

Tok, Ch and Ffn are Linear, GELU, Linear, with dropout after GELU and at the end. Tok has weights for every place, so
the number of tokens is fixed. Source: NiNformer: A Network in Network Transformer with Token Mixing Generated Gating
Function (arXiv 2403.02411) and its code.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.layers.attention import LayerOutput
from jattn.layers.norms import make_norm
from jattn.layers.sharding import axes
from jattn.mechanisms.entry import Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import normal


class FeedForward(nnx.Module):
    """Dropout(Dropout(gelu(x W_1 + b_1)) W_2 + b_2), over the last axis.

    Args:
        size: of the axis.
        hidden: width between.
        dropout_rate: after GELU, and at the end.
        axis_name: logical name of the axis, for sharding.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: for the initial values.
    """

    def __init__(
        self,
        size: int,
        hidden: int,
        *,
        dropout_rate: float | int = 0.0,
        axis_name: str = "embed",
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def linear(source: int, target: int, *names: str) -> nnx.Linear:
            metadata = {"kernel_metadata": axes(*names), "bias_metadata": axes(names[1])}
            return nnx.Linear(source, target, dtype=dtype, param_dtype=param_dtype, rngs=rngs, **metadata)

        self.up = linear(size, hidden, axis_name, "mlp")
        self.down = linear(hidden, size, "mlp", axis_name)
        self.dropout = nnx.Dropout(dropout_rate)

    def __call__(self, x: jax.Array, *, deterministic: bool = True, rngs: Any = None) -> jax.Array:
        """`[..., size]` -> `[..., size]`."""
        options = {"deterministic": deterministic, "rngs": rngs}
        x = self.dropout(jax.nn.gelu(self.up(x), approximate=False), **options)
        return self.dropout(self.down(x), **options)


class NiNBlock(nnx.Module):
    """A block of NiNformer: a gate made by an MLP-Mixer, and a feed-forward half, both added to the stream.

    x = x + (LN(x) W_p + b) * Mixer(LN(x));   x = x + Ffn(LN(x)), with one LN for both

    Args:
        features: M.
        length: T, which is fixed.
        hidden: width of the three MLPs, 2 M if not given.
        token_hidden: width of the one over tokens, if another.
        channel_hidden: width of the one over channels inside the mixer, if another.
        dropout_rate: of all MLPs.
        epsilon: of the norms.
        dtype: of the computation; that of inputs and parameters if not given.
        param_dtype: of the parameters.
        rngs: for the initial values.

    Raises:
        ValueError: a size below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> NiNBlock(8, 16, rngs=nnx.Rngs(0))(jnp.ones((2, 16, 8))).output.shape
        (2, 16, 8)

    Source: NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function (arXiv 2403.02411),
    published code.
    """

    def __init__(
        self,
        features: int,
        length: int,
        *,
        hidden: int | None = None,
        token_hidden: int | None = None,
        channel_hidden: int | None = None,
        dropout_rate: float | int = 0.0,
        epsilon: float | int = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        hidden = 2 * features if hidden is None else hidden
        token_hidden = hidden if token_hidden is None else token_hidden
        channel_hidden = hidden if channel_hidden is None else channel_hidden
        sizes = {"features": features, "length": length, "hidden": hidden}
        for name, size in {**sizes, "token_hidden": token_hidden, "channel_hidden": channel_hidden}.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.features, self.length = features, length
        shared: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        mlp: dict[str, Any] = {"dropout_rate": dropout_rate, **shared}
        self.norm = make_norm("layernorm", features, epsilon=epsilon, **shared)
        self.project = nnx.Linear(
            features, features, kernel_metadata=axes("embed", None), bias_metadata=axes(None), **shared
        )
        self.token_norm = make_norm("layernorm", features, epsilon=epsilon, **shared)
        self.token_mix = FeedForward(length, token_hidden, axis_name="positions", **mlp)
        self.channel_norm = make_norm("layernorm", features, epsilon=epsilon, **shared)
        self.channel_mix = FeedForward(features, channel_hidden, **mlp)
        self.feed_forward = FeedForward(features, hidden, **mlp)

    def mixer(self, v: jax.Array, **options: Any) -> jax.Array:
        """MLP-Mixer: v1 = v + Tok(LN(v)), then v1 + Ch(LN(v1)), `[B, T, M]`."""
        turned = jnp.swapaxes(self.token_norm(v), 1, 2)
        v = v + jnp.swapaxes(self.token_mix(turned, **options), 1, 2)
        return v + self.channel_mix(self.channel_norm(v), **options)

    def __call__(self, x: Any, *, deterministic: bool = True, rngs: Any = None) -> LayerOutput:
        """Run the block.

        Args:
            x: `[B, T, features]`.
            deterministic: no dropout.
            rngs: an `nnx.Rngs` or a key, for dropout.

        Returns:
            LayerOutput(`[B, T, features]`).

        Raises:
            ValueError: another number of tokens or channels, or dropout without rngs.
        """
        x = jnp.asarray(x)
        if x.ndim != 3 or x.shape[1:] != (self.length, self.features):
            raise ValueError(f"x must be [B, {self.length}, {self.features}], got {list(x.shape)}")
        if isinstance(rngs, jax.Array):
            rngs = nnx.Rngs(rngs)  # A stream, so that every dropout draws numbers of its own.
        if rngs is None and not deterministic and self.feed_forward.dropout.rate:
            raise ValueError("rngs must be given when dropout_rate > 0 and deterministic=False")
        options = {"deterministic": deterministic, "rngs": rngs}
        inner = self.norm(x)
        x = x + self.project(inner) * self.mixer(inner, **options)
        return LayerOutput(x + self.feed_forward(self.norm(x), **options))


def _example(key, length):
    return LayerExample((8, length), {"hidden": 12}, (normal(key, 2, length, 8),), {})


ENTRY = Entry(
    name="NiNBlock",
    kind="block",
    family="vision",
    layer=NiNBlock,
    papers=(
        Paper(
            "NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function",
            "2403.02411",
            2024,
        ),
    ),
    patterns=("noncausal self",),
    cost=Cost(flops="T", memory="T"),
    decode="no: every token is mixed with all others, whose number is fixed",
    example=_example,
    fidelity="official code",
)
