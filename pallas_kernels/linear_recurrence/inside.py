"""The matrices of one chunk, from its queries, keys, values and gates: what a program of the kernels computes.

    scores(x, y)_ij = sum_d x_id y_jd exp(sum of g_d over (j, i])        exclusive: over (j, i - 1]
    rows  = q exp(g up to i),  inside = scores(q, k),  also = scores(q, b)
    keys  = k exp(g after j),  write  = b exp(g after j),  T = (I - scores(a, b))^-1
    seen  = T scores(a, k),    carry  = T (a exp(g before i))

Every exponent is the plain sum of the gates of its own interval. A chunk is halved down to single tokens: for decays a
channel every pair is taken at the border that parts it first, and inverses are merged along the same borders. All
arrays have two axes; what runs over tokens and is needed along both comes twice, as a column and as a row.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Chunk(NamedTuple):
    """What a chunk is computed from; absent arrays are None."""

    q: Any = None
    """Of one head that shares the state, `[C, D]`."""
    k: Any = None
    a: Any = None
    b: Any = None
    gates: Any = None
    """Log decays, `[C, D]` or `[C, 1]`."""
    gate_row: Any = None
    """Those of `[C, 1]` as a row, `[1, C]`."""
    bonus: Any = None
    """What a token sees of itself, `[1, D]`."""


class Runs(NamedTuple):
    """Numbers of runs: of tokens as a column and as a row, of the state that comes by, of the last token."""

    column: Any
    row: Any
    carried: Any
    last: Any


class Products(NamedTuple):
    """Products of matrices on one backend, `dot(x, y, trans_a=False, trans_b=False)`."""

    coarse: Any
    """In the precision of the inputs."""
    exact: Any
    """Of float32."""
    narrow: Any
    """Of bfloat16, summed in float32."""


BEFORE, THROUGH, AFTER, SAME = operator.gt, operator.ge, operator.lt, operator.eq
"""Tokens j before i, through i, after i, and i itself, as `interval(i, j)`."""
FORMS = {
    # z = x y, x y^T, x^T y: the form and factors of the cotangents of x and of y, where z is that of the product.
    "nn": (("nt", "z", "y"), ("tn", "x", "z")),
    "nt": (("nn", "z", "y"), ("tn", "z", "x")),
    "tn": (("nt", "y", "z"), ("nn", "x", "z")),
}


def _multiplied(dot: Any, form: str, x: Any, y: Any) -> Any:
    return dot(x, y, trans_a=form == "tn", trans_b=form == "nt")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(dot: Any, form: str, x: Any, y: Any) -> Any:
    """x y ("nn"), x y^T ("nt") or x^T y ("tn"), whose derivatives are products of the same backend."""
    return _multiplied(dot, form, x, y)


def _product_forward(dot: Any, form: str, x: Any, y: Any) -> Any:
    return _multiplied(dot, form, x, y), (x, y)


def _product_backward(dot: Any, form: str, kept: Any, z: Any) -> Any:
    given = {"x": kept[0], "y": kept[1], "z": z}
    return tuple(_multiplied(dot, kind, given[first], given[second]) for kind, first, second in FORMS[form])


product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sums(products: Products, interval: Any, g: Any) -> Any:
    """Sums of gates: row i is that of all rows l with `interval(i, l)`, in full precision."""
    return _summed(products, _where(interval, len(g)), g)


def _where(interval: Any, size: int) -> Any:
    return interval(*(jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1)))


def _summed(products: Products, chosen: Any, g: Any, transposed: bool = False, start: Any = 0) -> Any:
    if g.dtype != jnp.float32:
        return start + products.exact(chosen.astype(g.dtype), g, trans_a=transposed)
    # Products with 0 and 1 are exact for numbers of 8 bits, which three of float32's 24 bits are.
    chosen = chosen.astype(jnp.bfloat16)
    for _ in range(3):
        piece = g.astype(jnp.bfloat16)
        start = start + products.narrow(chosen, piece, trans_a=transposed)
        g = g - piece.astype(jnp.float32)
    return start


def _sums_backward(products: Products, interval: Any, size: int, d: Any) -> Any:
    return (_summed(products, _where(interval, size), d, transposed=True),)


sums.defvjp(
    lambda products, interval, g: (_summed(products, _where(interval, len(g)), g), len(g)),
    _sums_backward,
)


def _parted(level: Any):
    """Whether a border between halves, in blocks of 2^(level + 1) tokens, lies between rows i and columns j."""
    return lambda i, j: ((i >> level) == (j >> level) + 1) & ((j >> level) & 1 == 0)


def _within(level: Any, interval: Any):
    """The interval, cut off at the ends of the half of 2^level tokens that token i is in."""
    return lambda i, j: (i >> level == j >> level) & interval(i, j)


def _levels(size: int) -> int:
    return (size - 1).bit_length()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def parted_scores(products: Products, dot: Any, exclusive: bool, x: Any, y: Any, g: Any) -> Any:
    """Scores with a decay a channel, every pair at the border that parts it first; zeros on the diagonal and above."""
    return _parted_scores(products, dot, exclusive, x, y, g)


def _factors(products: Products, exclusive: bool, level: Any, g: Any) -> tuple[Any, Any]:
    """Of rows, from the border before their half, and of columns, up to the one behind theirs."""
    intervals = (BEFORE if exclusive else THROUGH, AFTER)
    return tuple(jnp.exp(_summed(products, _where(_within(level, one), len(g)), g)) for one in intervals)


def _parted_scores(products: Products, dot: Any, exclusive: bool, x: Any, y: Any, g: Any) -> Any:
    size = len(x)

    def add(level: Any, found: Any) -> Any:
        rows, columns = _factors(products, exclusive, level, g)
        return jnp.where(_where(_parted(level), size), _multiplied(dot, "nt", x * rows, y * columns), found)

    return jax.lax.fori_loop(0, _levels(size), add, jnp.zeros((size, size), x.dtype))


def _parted_forward(products: Products, dot: Any, exclusive: bool, *given: Any) -> Any:
    return _parted_scores(products, dot, exclusive, *given), given


def _parted_backward(products: Products, dot: Any, exclusive: bool, given: Any, d: Any) -> Any:
    x, y, g = given
    size = len(x)

    def add(level: Any, found: Any) -> Any:
        dx, dy, dg = found
        rows, columns = _factors(products, exclusive, level, g)
        here = jnp.where(_where(_parted(level), size), d, 0)
        d_rows = _multiplied(dot, "nn", here, y * columns) * rows
        d_columns = _multiplied(dot, "tn", here, x * rows) * columns
        # The derivative of exp is exp.
        for interval, change in ((BEFORE if exclusive else THROUGH, d_rows * x), (AFTER, d_columns * y)):
            dg = _summed(products, _where(_within(level, interval), size), change, transposed=True, start=dg)
        return dx + d_rows, dy + d_columns, dg

    return jax.lax.fori_loop(0, _levels(size), add, jax.tree.map(jnp.zeros_like, given))


parted_scores.defvjp(_parted_forward, _parted_backward)


class _Decay:
    """Factors and scores of one chunk; see the module."""

    def __init__(self, products: Products, chunk: Chunk):
        self._products, self._g, self._row = products, chunk.gates, chunk.gate_row
        self._size = len(chunk.k)

    def _exp(self, interval: Any) -> Any:
        """exp of the sum of gates over `interval(i, l)`, `[C, D]` or `[C, 1]`."""
        if self._row is not None:
            return jnp.exp(jnp.sum(jnp.where(_where(interval, self._size), self._row, 0), axis=1, keepdims=True))
        return jnp.exp(sums(self._products, interval, self._g))

    def since_start(self, x: Any, exclusive: bool) -> Any:
        return x if self._g is None else x * self._exp(BEFORE if exclusive else THROUGH)

    def until_end(self, y: Any) -> Any:
        return y if self._g is None else y * self._exp(AFTER)

    def whole(self, width: int, dtype: Any) -> Any:
        """Of the state over the chunk, `[1, D]`."""
        if self._g is None:
            return jnp.ones((1, width), dtype)
        if self._row is not None:
            return jnp.broadcast_to(jnp.exp(jnp.sum(self._row, axis=1, keepdims=True)), (1, width))
        return jnp.exp(jnp.sum(self._g, axis=0, keepdims=True))

    def scores(self, dot: Any, x: Any, y: Any, exclusive: bool) -> Any:
        """`[C, C]`, zeros above the diagonal, and on it if exclusive."""
        interval = BEFORE if exclusive else THROUGH
        seen = _where(interval, self._size)
        if self._g is None:
            return jnp.where(seen, product(dot, "nt", x, y), 0)
        if self._row is not None:
            # [l, j]: the gate of token l where it comes after j.
            after = jnp.where(_where(BEFORE, self._size), self._g, 0)
            decay = jnp.exp(jnp.where(seen, sums(self._products, interval, after), 0))
            return jnp.where(seen, product(dot, "nt", x, y) * decay, 0)
        found = parted_scores(self._products, dot, exclusive, x, y, self._g)
        if exclusive:
            return found
        return jnp.where(_where(SAME, self._size), jnp.sum(x * y, axis=1, keepdims=True), found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def unit_lower_inverse(dot: Any, lower: Any) -> Any:
    """(I - L)^-1 of a strictly lower triangular L, merged half by half: [[T, 0], [U B T, U]] for [[T, 0], [B, U]]."""
    return _inverted(dot, lower)


def _inverted(dot: Any, lower: Any) -> Any:
    size = len(lower)

    def merge(level: Any, inverse: Any) -> Any:
        below = jnp.where(_where(_parted(level), size), lower, 0)
        return inverse + dot(dot(inverse, below), inverse)

    return jax.lax.fori_loop(0, _levels(size), merge, _where(SAME, size).astype(lower.dtype))


def _inverse_forward(dot: Any, lower: Any) -> Any:
    inverse = _inverted(dot, lower)
    return inverse, inverse


def _inverse_backward(dot: Any, inverse: Any, d: Any) -> Any:
    return (dot(dot(inverse, d, trans_a=True), inverse, trans_b=True),)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)


def _only(x: Any, tokens: Any) -> Any:
    return x if tokens is None else jnp.where(tokens, x, 0)


def query_side(products: Products, chunk: Chunk, runs: Runs | None, *, exclusive: bool) -> tuple[Any, ...]:
    """What one query head makes of a chunk.

    Args:
        products: of the backend.
        chunk: q, k, b, gates and bonus are read.
        runs: of a packed row.
        exclusive: whether tokens do not see themselves (but for the bonus).

    Returns:
        rows `[C, D]`, inside `[C, C]` and, with b, also `[C, C]`.
    """
    decay, q = _Decay(products, chunk), chunk.q
    same = None if runs is None else runs.column == runs.row
    inside = _only(decay.scores(products.coarse, q, chunk.k, exclusive), same)
    if chunk.bonus is not None:
        own = jnp.sum(q * chunk.bonus * chunk.k, axis=1, keepdims=True)
        inside = inside + jnp.where(_where(SAME, len(q)), own, 0)
    rows = _only(decay.since_start(q, exclusive), None if runs is None else runs.column == runs.carried)
    if chunk.b is None:
        return rows, inside
    return rows, inside, _only(decay.scores(products.coarse, q, chunk.b, exclusive), same)


def key_side(products: Products, chunk: Chunk, runs: Runs | None) -> tuple[Any, ...]:
    """What all query heads share of a chunk.

    Args:
        products: of the backend.
        chunk: all but q and bonus are read.
        runs: of a packed row.

    Returns:
        keys `[C, D]`, decay `[1, D]` and, with a and b, seen `[C, C]`, carry `[C, D]`, write `[C, D]`.
    """
    decay, k = _Decay(products, chunk), chunk.k
    at_end = None if runs is None else runs.column == runs.last
    whole = _only(decay.whole(k.shape[1], k.dtype), None if runs is None else runs.carried == runs.last)
    keys = _only(decay.until_end(k), at_end)
    if chunk.a is None:
        return keys, whole
    exact, same = products.exact, None if runs is None else runs.column == runs.row
    inverse = unit_lower_inverse(exact, _only(decay.scores(products.coarse, chunk.a, chunk.b, True), same))
    seen = _only(decay.scores(products.coarse, chunk.a, chunk.k, True), same)
    start = _only(decay.since_start(chunk.a, True), None if runs is None else runs.column == runs.carried)
    return (
        keys,
        whole,
        product(exact, "nn", inverse, seen),
        product(products.coarse, "nn", inverse, start),
        _only(decay.until_end(chunk.b), at_end),
    )
