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

from typing import Any

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
        return products(x, y) * (_later(decay, 1) if exclusive else decay)[:, :, :, None]

    def since_start(self, x: jax.Array, *, exclusive: bool = False) -> jax.Array:
        """See `NoDecay`."""
        sums = jnp.cumsum(self._g, -1)[..., None]
        return x * jnp.exp(_later(sums, 1) if exclusive else sums)[:, :, :, None]

    def until_end(self, y: jax.Array) -> jax.Array:
        """See `NoDecay`."""
        return y * jnp.exp(self._sums[..., -1, :, None])

    def whole(self) -> Any:
        """See `NoDecay`."""
        return jnp.exp(self._g.sum(-1))[..., None, None]


class ChannelDecay:
    """A decay a token, head and key channel, `[B, H, n, C, D]`: near pairs one by one, the others on two levels.

    The decay of a pair has no factors that are safe, so pairs closer than c tokens are taken distance by distance, each
    an explicit sum over d: the exponent of distance m is that of m - 1 plus one gate. For far pairs a border between
    sub-blocks of c tokens lies between i and j: rows carry the decay from the border before i's sub-block, columns that
    after j to the end of its sub-block and of the whole ones between; their product is one of matrices.
    """

    def __init__(self, log_decay: jax.Array, sub_chunk: int):
        self._g, self._size = log_decay, log_decay.shape[-2]
        self._sub = min(sub_chunk, self._size)
        sums = [jnp.zeros_like(log_decay)]
        for distance in range(1, self._sub):
            sums.append(sums[-1] + _later(log_decay, distance - 1))
        self._near = [jnp.exp(x) for x in sums]
        if self._sub < self._size:
            self._from_border, self._to_border = self._borders()

    def _borders(self) -> tuple[jax.Array, jax.Array]:
        blocks = self._blocks(self._g)
        order = np.arange(blocks.shape[-3])
        # [I, J, L]: whether sub-block L lies between J and I.
        between = (order[:, None] < order) & (order < order[:, None, None])
        totals = jnp.einsum("ijl,...ld->...ijd", between.astype(blocks.dtype), blocks.sum(-2), precision=HIGHEST)
        sums = _after(blocks)[..., None, :, :, :] + totals[..., None, :]
        earlier = (order[:, None] > order)[:, :, None, None]
        return jnp.exp(jnp.cumsum(blocks, -2)), jnp.exp(jnp.where(earlier, sums, -jnp.inf))

    def _blocks(self, x: jax.Array) -> jax.Array:
        """`[..., C, D]` -> `[..., C / c, c, D]`, filled up with zeros."""
        extra = -self._size % self._sub
        if extra:
            x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, extra), (0, 0)])
        return x.reshape(*x.shape[:-2], -1, self._sub, x.shape[-1])

    def scores(self, x: jax.Array, y: jax.Array, *, exclusive: bool = False) -> jax.Array:
        """See the module."""
        if exclusive:
            # Row i decays as row i - 1 does.
            moved = jnp.concatenate([x[..., 1:, :], jnp.zeros_like(x[..., :1, :])], -2)
            return _later(self.scores(moved, y), 1)
        distances = [
            jnp.einsum("bhngid,bhnid->bhngi", x * decay[:, :, :, None], _later(y, distance), precision=HIGHEST)
            for distance, decay in enumerate(self._near)
        ]
        near = _on_diagonals(jnp.stack(distances[::-1], -1))
        if self._sub == self._size:
            return near
        far = jnp.einsum(
            "bhngIid,bhnIJjd->bhngIiJj",
            self._blocks(x) * self._from_border[:, :, :, None],
            self._blocks(y)[:, :, :, None] * self._to_border,
            precision=HIGHEST,
        )
        count = far.shape[4] * self._sub
        far = far.reshape(*far.shape[:4], count, count)[..., : self._size, : self._size]
        return jnp.where(np.tri(self._size, k=-self._sub, dtype=bool), far, near)

    def since_start(self, x: jax.Array, *, exclusive: bool = False) -> jax.Array:
        """See `NoDecay`."""
        sums = jnp.cumsum(self._g, -2)
        return x * jnp.exp(_later(sums, 1) if exclusive else sums)[:, :, :, None]

    def until_end(self, y: jax.Array) -> jax.Array:
        """See `NoDecay`."""
        return y * jnp.exp(_after(self._g))

    def whole(self) -> Any:
        """See `NoDecay`."""
        return jnp.exp(self._g.sum(-2))[..., None]


def _later(x: jax.Array, steps: int) -> jax.Array:
    """`[..., C, D]` moved on by some tokens: row i holds what row i - steps held, the first ones zeros."""
    if not steps:
        return x
    return jnp.pad(x[..., : x.shape[-2] - steps, :], [(0, 0)] * (x.ndim - 2) + [(steps, 0), (0, 0)])


def _after(g: jax.Array) -> jax.Array:
    """Sums of log decays `[..., C, D]` after each token."""
    sums = jax.lax.cumsum(g[..., 1:, :], axis=g.ndim - 2, reverse=True)
    return jnp.pad(sums, [(0, 0)] * (g.ndim - 2) + [(0, 1), (0, 0)])


def _on_diagonals(x: jax.Array) -> jax.Array:
    """`[..., C, c]` -> `[..., C, C]`: entry m of row i stands in column i - (c - 1) + m, zeros elsewhere."""
    *lead, size, width = x.shape
    # A row of C + c entries, read as rows of C + c - 1, starts one column later each time.
    wide = jnp.pad(x, [(0, 0)] * (len(lead) + 1) + [(0, size)])
    wide = wide.reshape(*lead, -1)[..., : size * (size + width - 1)].reshape(*lead, size, size + width - 1)
    return wide[..., width - 1 :]
