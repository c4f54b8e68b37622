"""Decay inside a chunk, so that nothing overflows and nothing cancels.

Every exponent is the plain sum of the log decays of its own interval: all terms are <= 0, so it never overflows, and a
strong gate leaves the digits of mild ones alone. A difference of long prefix sums would not: after a gate of -1e4 only
its absolute rounding is left. Masks act before exp, or gradients would be NaN.

    scores(x, y)_ij = sum_d x_id y_jd exp(sum of g_d over (j, i])        j <= i
    exclusive:        sum_d x_id y_jd exp(sum of g_d over (j, i - 1])    j <  i

Shapes: x `[B, H, n, G, C, D]`, y `[B, H, n, C, D]`, scores `[B, H, n, G, C, C]`, for n chunks of C tokens. What scores
hold above the diagonal has no meaning; the caller masks it, together with other documents.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

HIGHEST = jax.lax.Precision.HIGHEST


def segsum(g: jax.Array, *, axis: int) -> jax.Array:
    """Sums of log decays over intervals: s_ij = sum of g over (j, i], -inf for j > i.

    Args:
        g: `[..., C, ...]`.
        axis: of the C tokens, negative.

    Returns:
        `[..., C, C, ...]`, i before j.

    Example:
        >>> segsum(jnp.array([-1.0, -2.0]), axis=-1).tolist()
        [[0.0, -inf], [-2.0, 0.0]]
    """
    size, rest = g.shape[axis], (1,) * (-1 - axis)
    later, seen = (np.tri(size, k=k, dtype=bool).reshape(size, size, *rest) for k in (-1, 0))
    terms = jnp.where(later, jnp.expand_dims(g, axis), 0)
    return jnp.where(seen, jnp.cumsum(terms, axis=axis - 1), -jnp.inf)


def products(x: jax.Array, y: jax.Array) -> jax.Array:
    """Products of all rows `[B, H, n, G, C, D]` with all columns `[B, H, n, C, D]`."""
    return jnp.einsum("bhngid,bhnjd->bhngij", x, y, precision=HIGHEST)


class NoDecay:
    """Decay 1 everywhere."""

    def scores(self, x: jax.Array, y: jax.Array, *, exclusive: bool = False) -> jax.Array:
        """See the module."""
        return products(x, y)

    def since_start(self, x: jax.Array, *, exclusive: bool = False) -> jax.Array:
        """Rows x `[B, H, n, G, C, D]` times the decay from the start of the chunk through (or up to) their token."""
        return x

    def until_end(self, y: jax.Array) -> jax.Array:
        """Columns y `[B, H, n, C, D]` times the decay after their token to the end of the chunk."""
        return y

    def whole(self) -> Any:
        """Decay of the state over each chunk, `[B|1, H|1, n, D|1, 1]`."""
        return jnp.ones((1, 1, 1, 1, 1))


class HeadDecay:
    """A constant decay a head, `[H]`; only `valid` tokens `[n]` of a chunk decay the state, the rest is filling."""

    def __init__(self, log_decay: jax.Array, size: int, valid: jax.Array):
        steps = np.arange(size)
        self._g = log_decay
        self._distance = steps[:, None] - steps
        self._left = jnp.maximum(valid[:, None] - 1 - steps, 0)
        self._valid = valid

    def _exp(self, steps: Any) -> jax.Array:
        """exp(g steps), `[H, *steps]`."""
        steps = jnp.asarray(steps, self._g.dtype)
        return jnp.exp(self._g.reshape(-1, *(1,) * steps.ndim) * steps)

    def scores(self, x: jax.Array, y: jax.Array, *, exclusive: bool = False) -> jax.Array:
        """See the module."""
        distance = np.maximum(self._distance - int(exclusive), 0)
        return products(x, y) * self._exp(distance)[:, None, None]

    def since_start(self, x: jax.Array, *, exclusive: bool = False) -> jax.Array:
        """See `NoDecay`."""
        return x * self._exp(np.arange(x.shape[-2]) + int(not exclusive))[:, None, None, :, None]

    def until_end(self, y: jax.Array) -> jax.Array:
        """See `NoDecay`."""
        return y * self._exp(self._left)[..., None]

    def whole(self) -> Any:
        """See `NoDecay`."""
        return self._exp(self._valid)[None, :, :, None, None]


class TokenDecay:
    """A decay a token and head, `[B, H, n, C]`."""

    def __init__(self, log_decay: jax.Array):
        self._g = log_decay
        self._sums = segsum(log_decay, axis=-1)

    def scores(self, x: jax.Array, y: jax.Array, *, exclusive: bool = False) -> jax.Array:
        """See the module."""
        decay = jnp.exp(self._sums)
        return products(x, y) * (_later(decay) if exclusive else decay)[:, :, :, None]

    def since_start(self, x: jax.Array, *, exclusive: bool = False) -> jax.Array:
        """See `NoDecay`."""
        sums = jnp.cumsum(self._g, -1)[..., None]
        return x * jnp.exp(_later(sums) if exclusive else sums)[:, :, :, None]

    def until_end(self, y: jax.Array) -> jax.Array:
        """See `NoDecay`."""
        return y * jnp.exp(self._sums[..., -1, :, None])

    def whole(self) -> Any:
        """See `NoDecay`."""
        return jnp.exp(self._g.sum(-1))[..., None, None]


class Level(NamedTuple):
    """Factors at the borders in the middle of m blocks of 2 h tokens, `[B, H, n, m, h, D]`."""

    before: jax.Array
    """Of rows in the last half: the decay from the border up to their token."""
    through: jax.Array
    """The same, through their token."""
    after: jax.Array
    """Of columns in the first half: the decay after their token up to the border."""


class ChannelDecay:
    """A decay a token, head and key channel, `[B, H, n, C, D]`: every pair at the border that parts it first.

    The decay of a pair, a vector over d, has safe factors only where a border lies between both tokens: rows carry the
    decay from the border on, columns that up to it. So a chunk is halved again and again, down to single tokens; the
    pairs of a level are the products of last halves with first ones. The sums of a level are those of the level below,
    plus the total of the other half.
    """

    def __init__(self, log_decay: jax.Array):
        self._size = log_decay.shape[-2]
        g = _filled(log_decay)
        before, through, after = jnp.zeros_like(g), g, jnp.zeros_like(g)
        self._levels: list[Level] = []
        half = 1
        while half < g.shape[-2]:
            before, through, after = (_halves(x, half) for x in (before, through, after))
            rows = (jnp.exp(x[..., 1, :, :]) for x in (before, through))
            self._levels.append(Level(*rows, jnp.exp(after[..., 0, :, :])))
            first, last = through[..., :1, -1:, :], through[..., 1:, -1:, :]
            earlier = jnp.concatenate([jnp.zeros_like(first), first], -3)
            later = jnp.concatenate([last, jnp.zeros_like(last)], -3)
            before, through, after = (x.reshape(g.shape) for x in (before + earlier, through + earlier, after + later))
            half *= 2
        self._before, self._through, self._after = (x[..., : self._size, :] for x in (before, through, after))

    def scores(self, x: jax.Array, y: jax.Array, *, exclusive: bool = False) -> jax.Array:
        """See the module."""
        x, y = _filled(x), _filled(y)
        own = jnp.einsum("bhngid,bhnid->bhngi", x, y, precision=HIGHEST)
        blocks = (jnp.zeros_like(own) if exclusive else own)[..., None, None]
        for level in self._levels:
            half = level.after.shape[-2]
            rows = (level.before if exclusive else level.through)[:, :, :, None]
            corner = jnp.einsum(
                "bhngmid,bhnmjd->bhngmij",
                _halves(x, half)[..., 1, :, :] * rows,
                _halves(y, half)[..., 0, :, :] * level.after,
                precision=HIGHEST,
            )
            blocks = lower_blocks(blocks[..., 0::2, :, :], corner, blocks[..., 1::2, :, :])
        return blocks[..., 0, : self._size, : self._size]

    def since_start(self, x: jax.Array, *, exclusive: bool = False) -> jax.Array:
        """See `NoDecay`."""
        return x * jnp.exp(self._before if exclusive else self._through)[:, :, :, None]

    def until_end(self, y: jax.Array) -> jax.Array:
        """See `NoDecay`."""
        return y * jnp.exp(self._after)

    def whole(self) -> Any:
        """See `NoDecay`."""
        return jnp.exp(self._through[..., -1, :])[..., None]


def lower_blocks(first: jax.Array, corner: jax.Array, last: jax.Array) -> jax.Array:
    """[[first, 0], [corner, last]], blocks `[..., h, h]` of a lower triangular `[..., 2 h, 2 h]`."""
    upper = jnp.concatenate([first, jnp.zeros_like(first)], -1)
    return jnp.concatenate([upper, jnp.concatenate([corner, last], -1)], -2)


def _filled(x: jax.Array) -> jax.Array:
    """`[..., C, D]` filled up with zeros to a power of two tokens."""
    size = x.shape[-2]
    extra = (1 << (size - 1).bit_length()) - size
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, extra), (0, 0)]) if extra else x


def _halves(x: jax.Array, half: int) -> jax.Array:
    """`[..., C, D]` -> `[..., C / 2 h, 2, h, D]`."""
    return x.reshape(*x.shape[:-2], -1, 2, half, x.shape[-1])


def _later(x: jax.Array) -> jax.Array:
    """`[..., C, D]` moved on by one token: row i holds what row i - 1 held, the first one zeros."""
    return jnp.pad(x[..., :-1, :], [(0, 0)] * (x.ndim - 2) + [(1, 0), (0, 0)])
