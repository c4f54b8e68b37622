"""Attention with linear biases: the logit falls with the distance, at a fixed slope a head.

    s_ij += -slope_n * |i - j|

    slopes, N a power of two: 2^(-8 n / N), n = 1 .. N
    otherwise, P the largest power of two <= N: the slopes of P, then entries 0, 2, 4, ... of the slopes of 2P

Added after scale and soft cap. For causal attention |i - j| = i - j; encoders use the symmetric form.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jattn.mechanisms.entry import Cost, Entry, Paper
from jattn.recurrence.decay_schedules import alibi_slopes
from jattn.softmax.score_mods import Operand, ScoreMod


def _subtract_distance(logit, b, h, i, j, slopes):
    return logit - slopes * abs(i - j)


def alibi(num_heads: int, *, slopes: Any = None) -> ScoreMod:
    """The linear bias as a score mod.

    s_ij -> s_ij - slope_n |i - j|, positions as the engine sees them.

    Args:
        num_heads: N.
        slopes: `[N]`, those of `alibi_slopes` if not given; gradients flow to them.

    Returns:
        A `ScoreMod` for `jattn.dot_product_attention(score_mod=...)`.

    Raises:
        ValueError: the number of slopes is not N.

    Example:
        >>> import jax.numpy as jnp
        >>> import jattn
        >>> x = jnp.ones((1, 3, 2, 4))
        >>> jattn.dot_product_attention(x, x, x, is_causal=True, score_mod=alibi(2)).shape
        (1, 3, 2, 4)

    Source: Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation (arXiv 2108.12409).
    """
    slopes = jnp.asarray(alibi_slopes(num_heads)) if slopes is None else jnp.asarray(slopes)
    if slopes.shape != (num_heads,):
        raise ValueError(f"slopes must be [N] = [{num_heads}], got {list(slopes.shape)}")
    return ScoreMod(_subtract_distance, {"slopes": Operand(slopes, "head")})


@dataclasses.dataclass(frozen=True)
class Alibi:
    """ALiBi as the position option of a layer.

    Example:
        >>> Alibi().bias(2, 1, 0).shape
        (2,)
    """

    def score_mod(self, num_heads: int) -> ScoreMod:
        """The score mod of `alibi`."""
        return alibi(num_heads)

    def bias(self, num_heads: int, query_positions: Any, key_positions: Any) -> Any:
        """The same as an array.

        Args:
            num_heads: N.
            query_positions: broadcastable, such as `[B, T, 1]`.
            key_positions: broadcastable, such as `[B, 1, S]`.

        Returns:
            The broadcast shape with an axis of N heads before the last two: `[B, N, T, S]`.
        """
        distance = jnp.abs(jnp.asarray(query_positions) - jnp.asarray(key_positions))
        slopes = jnp.asarray(alibi_slopes(num_heads))
        if distance.ndim < 2:
            return -slopes * distance
        return -slopes[:, None, None] * distance[..., None, :, :]


def _example(key, length):
    return (4,), {}


ENTRY = Entry(
    name="alibi",
    kind="score_mod",
    family="softmax",
    function=alibi,
    papers=(
        Paper(
            "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation",
            "2108.12409",
            2021,
        ),
    ),
    patterns=("noncausal self", "causal self"),
    cost=Cost(flops="T^2", memory="T"),
    decode="from positions",
    example=_example,
    fidelity="official code",
)
