"""T5's relative bias: a learned number for every bucket of relative distance and every head.

    rel = j - i
    causal:         n = max(-rel, 0)
    bidirectional:  half of the buckets each way; n = |rel|, and rel > 0 uses the second half
    bucket(n) = n for n < nb / 2, else min(nb - 1, nb / 2 + floor(ln(n / (nb / 2)) / ln(max / (nb / 2)) * nb / 2))
    s_ij += table[bucket, head]

Buckets are found by integer edges, derived in exact arithmetic: a logarithm rounded down at 16, 32 or 64 moves a
bucket.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jattn.mechanisms.entry import Cost, Entry, Paper
from jattn.mechanisms.examples import normals
from jattn.softmax.score_mods import Operand, ScoreMod


@functools.lru_cache
def t5_edges(num_buckets: int = 32, max_distance: int = 128) -> tuple[int, ...]:
    """The distances at which the bucket of one direction goes up by one.

    The bucket of distance n is the number of edges <= n.

    Args:
        num_buckets: of this direction (half of all for a bidirectional bias).
        max_distance: distances from here on share the last bucket.

    Returns:
        `num_buckets - 1` increasing integers.

    Raises:
        ValueError: fewer than 2 buckets, or `max_distance` not beyond the exact half.

    Example:
        >>> t5_edges(16)[8:]
        (12, 16, 23, 32, 46, 64, 91)

    Source: T5 (arXiv 1910.10683), published code.
    """
    exact = num_buckets // 2
    if num_buckets < 2:
        raise ValueError(f"num_buckets must be at least 2 in each direction, got {num_buckets}")
    if max_distance <= exact:
        raise ValueError(f"max_distance must exceed {exact}, the distances with buckets of their own")
    edges = list(range(1, exact + 1))
    wide = num_buckets - exact
    for step in range(1, wide):
        # The smallest n with (n / exact)^wide >= (max / exact)^step, in integers.
        bound = max_distance**step * exact ** (wide - step)
        n = max(1, int(exact * (max_distance / exact) ** (step / wide)) - 1)
        while n**wide < bound:
            n += 1
        edges.append(n)
    return tuple(edges)


def t5_bucket(relative: Any, *, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = False) -> Any:
    """Bucket of a relative position key - query.

    Args:
        relative: integers of any shape, key position - query position.
        num_buckets: in all.
        max_distance: distances from here on share a bucket.
        bidirectional: two directions, or the past alone.

    Returns:
        int32, the shape of `relative`.

    Raises:
        ValueError: see `t5_edges`.

    Example:
        >>> t5_bucket(np.array([0, -16, -128, 5])).tolist()
        [0, 16, 31, 0]

    Source: T5 (arXiv 1910.10683), published code.
    """
    relative = jnp.asarray(relative)
    directed = num_buckets // 2 if bidirectional else num_buckets
    distance = jnp.abs(relative) if bidirectional else jnp.maximum(-relative, 0)
    edges = jnp.asarray(t5_edges(directed, max_distance))
    bucket = jnp.searchsorted(edges, distance, side="right").astype(jnp.int32)
    return bucket + directed * (relative > 0) if bidirectional else bucket


def _add(logit, b, h, i, j, table):
    return logit + table


def t5_bias(table: Any, *, max_distance: int = 128, bidirectional: bool = False) -> ScoreMod:
    """T5's relative bias as a score mod.

    s_ij -> s_ij + table[bucket(j - i), n]

    Args:
        table: `[num_buckets, N]`; gradients flow to it.
        max_distance: distances from here on share a bucket.
        bidirectional: two directions, or the past alone.

    Returns:
        A `ScoreMod` for `jattn.dot_product_attention(score_mod=...)`. T5 uses it with `scale=1`.

    Raises:
        ValueError: the table is not of rank 2 with an even number of buckets.

    Example:
        >>> import jax.numpy as jnp
        >>> import jattn
        >>> x = jnp.ones((1, 3, 2, 4))
        >>> mod = t5_bias(jnp.zeros((32, 2)))
        >>> jattn.dot_product_attention(x, x, x, scale=1.0, is_causal=True, score_mod=mod).shape
        (1, 3, 2, 4)

    Source: Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer (arXiv 1910.10683).
    """
    table = jnp.asarray(table)
    if table.ndim != 2 or table.shape[0] % 2:
        raise ValueError(f"table must be [num_buckets, N] with an even number of buckets, got {list(table.shape)}")
    num_buckets = table.shape[0]
    # Beyond the last edge nothing changes any more, and the engine clips offsets to the ends of the table.
    far = t5_edges(num_buckets // 2 if bidirectional else num_buckets, max_distance)[-1]
    buckets = t5_bucket(
        np.arange(-far, far + 1), num_buckets=num_buckets, max_distance=max_distance, bidirectional=bidirectional
    )
    return ScoreMod(_add, {"table": Operand(table[buckets].T, "offset", center=far)})


class T5Bias(nnx.Module):
    """T5's table as the position option of a layer; one module given to all layers is T5's sharing.

    s_ij -> s_ij + table[bucket(j - i), n]

    Args:
        num_heads: N.
        num_buckets: in all, even.
        max_distance: distances from here on share a bucket.
        bidirectional: two directions, or the past alone.
        param_dtype: of the table.
        rngs: for the first values, normal with deviation 0.02.

    Example:
        >>> from flax import nnx
        >>> T5Bias(4, rngs=nnx.Rngs(0)).table.shape
        (32, 4)

    Source: Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer (arXiv 1910.10683).
    """

    def __init__(
        self,
        num_heads: int,
        *,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.max_distance, self.bidirectional = max_distance, bidirectional
        values = 0.02 * jax.random.normal(rngs.params(), (num_buckets, num_heads), param_dtype)
        self.table = nnx.Param(values, out_sharding=(None, "heads"), eager_sharding=False)

    def score_mod(self, num_heads: int) -> ScoreMod:
        """The score mod of `t5_bias`."""
        return t5_bias(self.table.get_value(), max_distance=self.max_distance, bidirectional=self.bidirectional)

    def bias(self, num_heads: int, query_positions: Any, key_positions: Any) -> Any:
        """The same as an array.

        Args:
            num_heads: N.
            query_positions: broadcastable, such as `[B, T, 1]`.
            key_positions: broadcastable, such as `[B, 1, S]`.

        Returns:
            The broadcast shape with an axis of N heads before the last two: `[B, N, T, S]`.
        """
        table = self.table.get_value()
        buckets = t5_bucket(
            jnp.asarray(key_positions) - jnp.asarray(query_positions),
            num_buckets=table.shape[0],
            max_distance=self.max_distance,
            bidirectional=self.bidirectional,
        )
        return jnp.moveaxis(table[buckets], -1, -3)


def _example(key, length):
    return normals(key, (32, 4)), {}


ENTRY = Entry(
    name="t5_bias",
    kind="score_mod",
    family="softmax",
    function=t5_bias,
    papers=(
        Paper("Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", "1910.10683", 2019),
    ),
    patterns=("noncausal self", "causal self", "noncausal cross", "causal cross"),
    cost=Cost(flops="T^2", memory="T"),
    decode="from positions",
    example=_example,
    fidelity="official code",
)
