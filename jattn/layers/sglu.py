"""Simple gated linear unit: the product of two projections, without any other nonlinearity.

y = (x W_1 * x W_2) W_3
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from jattn.layers.sharding import axes
from jattn.mechanisms.entry import Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import normal


class Sglu(nnx.Module):
    """A feed-forward layer whose gate is the other projection itself.

    y = (x W_1 * x W_2) W_3; quadratic in x, no activation, no bias.

    Args:
        features: M, width of x and of the output.
        hidden: width between; 8 M / 3, as for other gated layers, if not given.
        dtype: of the computation; that of inputs and parameters if not given.
        param_dtype: of the parameters.
        rngs: for the initial values.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> Sglu(8, rngs=nnx.Rngs(0))(jnp.ones((1, 3, 8))).shape
        (1, 3, 8)

    Source: Scaling TransNormer to 175 Billion Parameters (arXiv 2307.14995).
    """

    def __init__(
        self,
        features: int,
        hidden: int | None = None,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        hidden = max(8 * features // 3, 1) if hidden is None else hidden

        def linear(source: int, target: int, *names: str) -> nnx.Linear:
            return nnx.Linear(
                source,
                target,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_metadata=axes(*names),
                rngs=rngs,
            )

        self.gate = linear(features, hidden, "embed", "mlp")
        self.up = linear(features, hidden, "embed", "mlp")
        self.down = linear(hidden, features, "mlp", "embed")

    def __call__(self, x: ArrayLike) -> jax.Array:
        """`[..., M]` -> `[..., M]`."""
        return self.down(self.gate(x) * self.up(x))


def _example(key, length):
    return LayerExample((8,), {"hidden": 12}, (normal(key, 2, length, 8),), {})


ENTRY = Entry(
    name="Sglu",
    kind="layer",
    family="layers",
    layer=Sglu,
    papers=(Paper("Scaling TransNormer to 175 Billion Parameters", "2307.14995", 2023),),
    cost=Cost(flops="T", memory="T"),
    decode="a token at a time",
    example=_example,
    fidelity="official code",
)
