"""Absolute positions that are added to the embeddings: sinusoids, and a learned table.

PE[p, 2m] = sin(p * 10000^(-2m / M)),   PE[p, 2m + 1] = cos(p * 10000^(-2m / M))
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from jattn.layers.rope_scaling import plain_frequencies
from jattn.layers.sharding import axes
from jattn.mechanisms.entry import Cost, Entry, LayerExample, Paper


def sinusoidal(positions: ArrayLike, features: int, *, base: float | int = 10000.0) -> jax.Array:
    """Sinusoidal position embedding, sines and cosines interleaved.

    PE[p, 2m] = sin(p * base^(-2m / M)), PE[p, 2m + 1] = cos(p * base^(-2m / M)), M = features.

    Args:
        positions: ints or floats of any shape.
        features: M, even.
        base: of the frequencies.

    Returns:
        float32 (float64 for float64 positions), the shape of `positions` with `[M]` appended.

    Raises:
        ValueError: `features` is odd.

    Example:
        >>> sinusoidal(0, 4).tolist()
        [0.0, 1.0, 0.0, 1.0]

    Source: Attention Is All You Need (arXiv 1706.03762).
    """
    if features < 2 or features % 2:
        raise ValueError(f"features must be even and at least 2, got {features}")
    positions = jnp.asarray(positions)
    dtype = jnp.promote_types(positions.dtype, jnp.float32)
    angles = positions.astype(dtype)[..., None] * jnp.asarray(plain_frequencies(features, base), dtype)
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions.shape, features)


class LearnedAbs(nnx.Module):
    """A learned vector for every position 0 .. max_length - 1.

    y = table[position]

    Args:
        max_length: number of positions.
        features: M.
        dtype: of the result; that of the parameters if not given.
        param_dtype: of the table.
        std: deviation of the initial table, which is normal.
        rngs: for the initial table.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> LearnedAbs(8, 4, rngs=nnx.Rngs(0))(jnp.arange(3)).shape
        (3, 4)

    Source: Convolutional Sequence to Sequence Learning (arXiv 1705.03122); GPT, BERT.
    """

    def __init__(
        self,
        max_length: int,
        features: int,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        std: float | int = 0.02,
        rngs: nnx.Rngs,
    ):
        self.max_length = max_length
        self.table = nnx.Embed(
            max_length,
            features,
            dtype=dtype,
            param_dtype=param_dtype,
            embedding_init=nnx.initializers.normal(std),
            embedding_metadata=axes("positions", "embed"),
            rngs=rngs,
        )

    def __call__(self, positions: ArrayLike) -> jax.Array:
        """Look positions up.

        Args:
            positions: integers of any shape; one outside of the table gives NaN, since there is nothing learned there.

        Returns:
            The shape of `positions` with `[M]` appended.

        Raises:
            ValueError: positions that are known before tracing lie outside of the table.
        """
        if not isinstance(positions, jax.core.Tracer):
            known = np.asarray(positions)
            if known.size and not 0 <= known.min() <= known.max() < self.max_length:
                raise ValueError(
                    f"positions must lie in 0 .. {self.max_length - 1}, the table of LearnedAbs; got "
                    f"{known.min()} .. {known.max()}"
                )
        positions = jnp.asarray(positions)
        inside = (positions >= 0) & (positions < self.max_length)
        found = self.table(jnp.clip(positions, 0, self.max_length - 1))
        return jnp.where(inside[..., None], found, jnp.nan)


def _example_sinusoidal(key, length):
    return (np.arange(length), 8), {}


def _example_learned(key, length):
    return LayerExample((length, 8), {}, (np.arange(length),), {})


_ALL = ("noncausal self", "causal self", "noncausal cross", "causal cross")
ENTRIES = (
    Entry(
        name="sinusoidal",
        kind="position",
        family="layers",
        function=sinusoidal,
        papers=(Paper("Attention Is All You Need", "1706.03762", 2017),),
        patterns=_ALL,
        cost=Cost(flops="T", memory="T"),
        decode="by position",
        example=_example_sinusoidal,
        fidelity="paper",
    ),
    Entry(
        name="learned_abs",
        kind="position",
        family="layers",
        layer=LearnedAbs,
        papers=(Paper("Convolutional Sequence to Sequence Learning", "1705.03122", 2017),),
        patterns=_ALL,
        cost=Cost(flops="T", memory="T"),
        decode="by position, up to max_length",
        example=_example_learned,
        fidelity="paper",
    ),
)
