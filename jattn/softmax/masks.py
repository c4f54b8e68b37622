"""Masks as values: who may attend to whom, as a function of batch, head and positions.

A mask is a frozen pytree. It answers two questions: may this query see this key (`mask(b, h, i, j)`), and what
can be said about a whole rectangle of positions without looking at its pairs (`mask.classify`). The first makes
it exact, the second lets the engine skip dead tiles and leave full tiles unmasked. Masks combine with `&`, `|`
and `~`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DEAD, PARTIAL, FULL = 0, 1, 2


def _module_of(*arrays):
    """numpy for host values, jax.numpy as soon as one of them is a jax array, so that static masks stay static."""
    return jnp if any(isinstance(a, jax.Array) for a in arrays) else np


def _register(cls):
    """Make `cls` a frozen dataclass and a pytree: fields marked `static` are compile-time constants."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)
    meta = [f.name for f in fields if f.metadata.get("static")]
    data = [f.name for f in fields if not f.metadata.get("static")]
    return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=meta)


def _static():
    return dataclasses.field(metadata={"static": True})


class Mask:
    """Base of all masks: True means "may attend".

    A subclass defines `__call__` and, where it can tell something cheaply, `classify`.

    Example:
      >>> import jattn
      >>> mask = jattn.masks.causal() & jattn.masks.prefix(2)
      >>> mask.to_dense(1, 1, 3, 3)[0, 0].astype(int)
      array([[1, 0, 0],
             [1, 1, 0],
             [1, 1, 0]])
    """

    def __call__(self, b, h, i, j):
        """Visibility of key position `j` for query position `i` of batch row `b` and query head `h` (broadcastable)."""
        raise NotImplementedError

    def at(self, b, h, i, j, query_slot, key_slot):
        """Visibility by position, or by slot for predicates of a block layout; only the latter look at the slots."""
        return self(b, h, i, j)

    def classify(self, i_lo, i_hi, j_lo, j_hi):
        """DEAD, PARTIAL or FULL for the rectangle of positions `[i_lo, i_hi] x [j_lo, j_hi]` (ends included).

        The answer holds for every batch row and head. PARTIAL is always safe; DEAD and FULL are promises. numpy
        bounds give a numpy answer, traced bounds a traced one.
        """
        xp = _module_of(i_lo, i_hi, j_lo, j_hi)
        shape = np.broadcast_shapes(*(np.shape(x) for x in (i_lo, i_hi, j_lo, j_hi)))
        return xp.full(shape, PARTIAL, xp.int8)

    def __and__(self, other: Mask) -> Mask:
        return _And(self, _checked(other))

    def __or__(self, other: Mask) -> Mask:
        return _Or(self, _checked(other))

    def __invert__(self) -> Mask:
        return _Not(self)

    def to_dense(self, batch, num_heads, query_length, key_length, *, query_positions=None, key_positions=None):
        """Dense boolean array `[B, N, T, S]`; numpy where the mask holds no jax array.

        Args:
          batch: B.
          num_heads: N, query heads.
          query_length: T.
          key_length: S.
          query_positions: `[B|1, T]` integers, 0..T-1 if not given.
          key_positions: `[B|1, S]` integers, 0..S-1 if not given.

        Returns:
          `[B, N, T, S]` booleans.
        """
        i = np.arange(query_length)[None] if query_positions is None else query_positions
        j = np.arange(key_length)[None] if key_positions is None else key_positions
        b = np.arange(batch)[:, None, None, None]
        h = np.arange(num_heads)[None, :, None, None]
        visible = self.at(
            b,
            h,
            i[:, None, :, None],
            j[:, None, None, :],
            np.arange(query_length)[None, None, :, None],
            np.arange(key_length)[None, None, None, :],
        )
        return _module_of(visible).broadcast_to(visible, (batch, num_heads, query_length, key_length))

    def count(self, batch, num_heads, query_length, key_length, *, query_positions=None, key_positions=None):
        """Number of visible keys of each row, int32 `[B, N, T]`, in memory linear in T and S.

        Args:
          batch: B.
          num_heads: N, query heads.
          query_length: T.
          key_length: S.
          query_positions: `[B|1, T]` integers, 0..T-1 if not given.
          key_positions: `[B|1, S]` integers, 0..S-1 if not given.
        """
        i = jnp.arange(query_length)[None] if query_positions is None else jnp.asarray(query_positions)
        j = jnp.arange(key_length)[None] if key_positions is None else jnp.asarray(key_positions)
        b = jnp.arange(batch)[:, None, None]
        h = jnp.arange(num_heads)[None, :, None]
        keys = jnp.arange(key_length)[None, None]

        def row(t):
            visible = self.at(b, h, i[:, None, t, None], j[:, None, :], t, keys)
            return jnp.broadcast_to(visible, (batch, num_heads, key_length)).sum(-1, dtype=jnp.int32)

        return jnp.moveaxis(jax.lax.map(row, jnp.arange(query_length)), 0, -1)

    def plot(self, query_length=64, key_length=None, *, batch_index=0, head=0, ax=None):
        """Draw the mask with matplotlib (dark = may attend) and return the axes."""
        import matplotlib.pyplot as plt

        key_length = query_length if key_length is None else key_length
        dense = self.to_dense(batch_index + 1, head + 1, query_length, key_length)[batch_index, head]
        ax = plt.subplots(figsize=(4, 4))[1] if ax is None else ax
        ax.imshow(np.asarray(dense), cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        ax.set_xlabel("key position")
        ax.set_ylabel("query position")
        return ax


def _checked(other: Any) -> Mask:
    if not isinstance(other, Mask):
        raise TypeError(f"masks combine with masks, got {type(other).__name__}; wrap an array with masks.dense(array)")
    return other


@_register
class _And(Mask):
    left: Mask
    right: Mask

    def __call__(self, b, h, i, j):
        return self.left(b, h, i, j) & self.right(b, h, i, j)

    def at(self, *where):
        return self.left.at(*where) & self.right.at(*where)

    def classify(self, *bounds):
        left, right = self.left.classify(*bounds), self.right.classify(*bounds)
        return _module_of(left, right).minimum(left, right)


@_register
class _Or(Mask):
    left: Mask
    right: Mask

    def __call__(self, b, h, i, j):
        return self.left(b, h, i, j) | self.right(b, h, i, j)

    def at(self, *where):
        return self.left.at(*where) | self.right.at(*where)

    def classify(self, *bounds):
        left, right = self.left.classify(*bounds), self.right.classify(*bounds)
        return _module_of(left, right).maximum(left, right)


@_register
class _Not(Mask):
    inner: Mask

    def __call__(self, b, h, i, j):
        return ~self.inner(b, h, i, j)

    def at(self, *where):
        return ~self.inner.at(*where)

    def classify(self, *bounds):
        return (FULL - self.inner.classify(*bounds)).astype(np.int8)


def _verdict(dead, full):
    return (FULL * full + PARTIAL * ~(full | dead)).astype(np.int8)


@_register
class _LocalWindow(Mask):
    left: int | None = _static()
    right: int | None = _static()

    def __call__(self, b, h, i, j):
        visible = _module_of(i, j).ones(np.broadcast_shapes(np.shape(i), np.shape(j)), bool)
        if self.right is not None:
            visible = visible & (j <= i + self.right)
        if self.left is not None:
            visible = visible & (j >= i - self.left)
        return visible

    def classify(self, i_lo, i_hi, j_lo, j_hi):
        xp = _module_of(i_lo, i_hi, j_lo, j_hi)
        shape = np.broadcast_shapes(*(np.shape(x) for x in (i_lo, i_hi, j_lo, j_hi)))
        dead, full = xp.zeros(shape, bool), xp.ones(shape, bool)
        if self.right is not None:
            dead, full = dead | (j_lo > i_hi + self.right), full & (j_hi <= i_lo + self.right)
        if self.left is not None:
            dead, full = dead | (j_hi < i_lo - self.left), full & (j_lo >= i_hi - self.left)
        return _verdict(dead, full)


@_register
class _Prefix(Mask):
    length: Any

    def __call__(self, b, h, i, j):
        length = self.length if np.ndim(self.length) == 0 else self.length[b]
        return (j < length) & (i == i)

    def classify(self, i_lo, i_hi, j_lo, j_hi):
        shape = np.broadcast_shapes(*(np.shape(x) for x in (i_lo, i_hi, j_lo, j_hi)))
        xp = _module_of(self.length, j_lo, j_hi)
        dead = xp.broadcast_to(j_lo >= xp.max(self.length), shape)
        return _verdict(dead, xp.broadcast_to(j_hi < xp.min(self.length), shape))


@_register
class _FixedPrefix(Mask):
    length: int = _static()

    def __call__(self, b, h, i, j):
        return (j < self.length) & (i == i)

    def classify(self, i_lo, i_hi, j_lo, j_hi):
        return _Prefix(self.length).classify(i_lo, i_hi, j_lo, j_hi)


@_register
class _Dense(Mask):
    array: Any

    def __call__(self, b, h, i, j):
        index = (b, h, i, j)
        return self.array[tuple(x if n != 1 else 0 for x, n in zip(index, self.array.shape, strict=True))]


@_register
class _Segments(Mask):
    query_ids: Any
    key_ids: Any

    def __call__(self, b, h, i, j):
        q = self.query_ids[b if self.query_ids.shape[0] != 1 else 0, i]
        k = self.key_ids[b if self.key_ids.shape[0] != 1 else 0, j]
        return (q == k) & (q >= 0)


@_register
class _MaskMod(Mask):
    aux: Any
    function: Callable[..., Any] = _static()

    def __call__(self, b, h, i, j):
        return self.function(b, h, i, j, self.aux)


def full() -> Mask:
    """Every query sees every key.

    Example:
      >>> import jattn
      >>> bool(jattn.masks.full().to_dense(1, 1, 2, 3).all())
      True
    """
    return _LocalWindow(None, None)


def causal() -> Mask:
    """Query position i sees key positions j <= i.

    Example:
      >>> import jattn
      >>> jattn.masks.causal().to_dense(1, 1, 2, 3)[0, 0].astype(int)
      array([[1, 0, 0],
             [1, 1, 0]])
    """
    return _LocalWindow(None, 0)


def local_window(left: int | None, right: int | None) -> Mask:
    """Query position i sees i - left <= j <= i + right; None leaves that side open.

    Args:
      left: how many positions before the query are visible, >= 0 or None.
      right: how many positions after the query are visible, >= 0 or None.

    Raises:
      ValueError: a negative side.

    Example:
      >>> import jattn
      >>> jattn.masks.local_window(1, 0).to_dense(1, 1, 3, 3)[0, 0].astype(int)
      array([[1, 0, 0],
             [1, 1, 0],
             [0, 1, 1]])
    """
    for name, side in (("left", left), ("right", right)):
        if side is not None and side < 0:
            raise ValueError(f"local_window: {name} must be None or >= 0, got {side}")
    return _LocalWindow(left, right)


def sliding_window(window: int, num_sinks: int = 0) -> Mask:
    """Causal window of `window` keys, the own one included, plus the first `num_sinks` positions.

    Visible iff j <= i and (i - j < window or j < num_sinks).

    Args:
      window: keys a query sees, itself included, >= 1.
      num_sinks: leading positions that stay visible to every later query, >= 0.

    Raises:
      ValueError: window < 1 or num_sinks < 0.

    Example:
      >>> import jattn
      >>> jattn.masks.sliding_window(1, num_sinks=1).to_dense(1, 1, 3, 3)[0, 0].astype(int)
      array([[1, 0, 0],
             [1, 1, 0],
             [1, 0, 1]])

    Source: Longformer (arXiv:2004.05150), Mistral; sinks: Efficient Streaming Language Models with Attention
    Sinks (arXiv:2309.17453).
    """
    if window < 1:
        raise ValueError(f"sliding_window: window counts the query itself and must be >= 1, got {window}")
    if num_sinks < 0:
        raise ValueError(f"sliding_window: num_sinks must be >= 0, got {num_sinks}")
    recent = _LocalWindow(window - 1, 0)
    return recent if num_sinks == 0 else recent | (causal() & prefix(num_sinks))


def prefix(length) -> Mask:
    """Key positions below `length` are visible to everyone.

    Args:
      length: an int, or an integer array `[B]` with one length a batch row.

    Raises:
      ValueError: `length` is neither.

    Example:
      >>> import jattn
      >>> jattn.masks.prefix(1).to_dense(1, 1, 2, 2)[0, 0].astype(int)
      array([[1, 0],
             [1, 0]])
    """
    if np.ndim(length) > 1:
        raise ValueError(f"prefix: length must be an int or an array [B], got shape {np.shape(length)}")
    if isinstance(length, int):
        return _FixedPrefix(length)
    return _Prefix(length if isinstance(length, jax.Array) else np.asarray(length))


def prefix_lm_mask(length) -> Mask:
    """Prefix language model: causal, and the first `length` positions see each other.

    Visible iff j <= i or j < length. Combine with `segment_ids` for packing: positions, and so the prefix, then
    count from each document's start if `query_positions` and `key_positions` do.

    Example:
      >>> import jattn
      >>> jattn.masks.prefix_lm_mask(2).to_dense(1, 1, 3, 3)[0, 0].astype(int)
      array([[1, 1, 0],
             [1, 1, 0],
             [1, 1, 1]])
    """
    return causal() | prefix(length)


def dense(array) -> Mask:
    """A boolean array `[B|1, N|1, T|1, S|1]` as a mask value, read at the POSITIONS of queries and keys.

    Without `query_positions` and `key_positions` that is the ordinary mask; with them, rows are looked up by position.

    Raises:
      ValueError: not boolean or not of rank 4.

    Example:
      >>> import jattn, numpy as np
      >>> mask = jattn.masks.dense(np.array([True, False])[None, None, None]) & jattn.masks.causal()
      >>> mask.to_dense(1, 1, 2, 2)[0, 0].astype(int)
      array([[1, 0],
             [1, 0]])
    """
    array = array if isinstance(array, jax.Array) else np.asarray(array)
    if array.ndim != 4 or array.dtype != bool:
        raise ValueError(f"masks.dense: expected a boolean [B|1, N|1, T|1, S|1], got {array.dtype}{list(array.shape)}")
    return _Dense(array)


def segment_mask(query_ids, key_ids=None) -> Mask:
    """Documents packed in one row see themselves only: visible iff ids are equal and non-negative.

    Args:
      query_ids: integers `[B|1, T]`; negative = padding.
      key_ids: integers `[B|1, S]`, `query_ids` if not given.

    Raises:
      ValueError: not integer or not of rank 2.

    Example:
      >>> import jattn, numpy as np
      >>> jattn.masks.segment_mask(np.array([[0, 1, -1]])).to_dense(1, 1, 3, 3)[0, 0].astype(int)
      array([[1, 0, 0],
             [0, 1, 0],
             [0, 0, 0]])
    """
    key_ids = query_ids if key_ids is None else key_ids
    arrays = [x if isinstance(x, jax.Array) else np.asarray(x) for x in (query_ids, key_ids)]
    for name, x in zip(("query_ids", "key_ids"), arrays, strict=True):
        if x.ndim != 2 or not np.issubdtype(x.dtype, np.integer):
            raise ValueError(f"segment_mask: {name} must be integers of rank 2, got {x.dtype}{list(x.shape)}")
    return _Segments(*arrays)


def mask_mod(function: Callable[..., Any], aux: Any = ()) -> Mask:
    """Any predicate as a mask: `function(b, h, i, j, aux) -> bool` on broadcastable integer arrays.

    Args:
      function: a module-level function (a closure over arrays would be traced anew at every call).
      aux: pytree of the arrays that the function reads.

    Example:
      >>> import jattn
      >>> def even_keys(b, h, i, j, aux):
      ...     return j % 2 == 0
      >>> jattn.masks.mask_mod(even_keys).to_dense(1, 1, 1, 4)[0, 0].astype(int)
      array([[1, 0, 1, 0]])

    Source: FlexAttention (arXiv:2412.05496).
    """
    if not callable(function):
        raise TypeError(f"mask_mod: function must be callable, got {type(function).__name__}")
    return _MaskMod(aux, function)
