"""Masks as values: who may attend to whom, as a function of batch, head and positions.

A mask is a frozen pytree. It answers two questions: may this query see this key (`mask(b, h, i, j)`), and what
can be said about a whole rectangle of positions without looking at its pairs (`mask.classify`). The first makes
it exact, the second lets the engine skip dead tiles and leave full tiles unmasked. Masks combine with `&`, `|`
and `~`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jattn.softmax.mask_type import DEAD, FULL, PARTIAL, Mask, array_module, readable, register_mask, static_field

__all__ = [
    "DEAD",
    "FULL",
    "PARTIAL",
    "Mask",
    "causal",
    "dense",
    "full",
    "local_window",
    "mask_mod",
    "prefix",
    "prefix_lm_mask",
    "segment_mask",
    "sliding_window",
]


def _verdict(dead, full):
    return (FULL * full + PARTIAL * ~(full | dead)).astype(np.int8)


def _read(array, *index):
    """The entries at `index`, entry 0 on axes of length 1; a numpy array may be read at traced places, too."""
    places = tuple(0 if n == 1 else x for n, x in zip(array.shape, index, strict=True))
    return readable(array, *places)[places]


def _check_lead(what: str, shape, **expected: int) -> None:
    """ValueError unless the leading axes are 1 or as expected."""
    if any(size not in (1, want) for size, want in zip(shape, expected.values(), strict=False)):
        axes = ", ".join(f"{name} {size}" for name, size in expected.items())
        raise ValueError(f"mask: {what} has shape {tuple(shape)}; expected leading axes of 1 or {axes}")


def _check_table(what: str, shape, axis: int, length: int | None) -> None:
    """ValueError unless positions below `length` (None: any positions) can be read on the axis."""
    if length is not None and shape[axis] != 1 and shape[axis] < length:
        raise ValueError(f"mask: {what} has shape {tuple(shape)}; expected 1 or at least {length} on axis {axis}")


@register_mask
class _LocalWindow(Mask):
    left: int | None = static_field()
    right: int | None = static_field()

    def __call__(self, b, h, i, j):
        visible = array_module(i, j).ones(np.broadcast_shapes(np.shape(i), np.shape(j)), bool)
        if self.right is not None:
            visible = visible & (j <= i + self.right)
        if self.left is not None:
            visible = visible & (j >= i - self.left)
        return visible

    def classify(self, i_lo, i_hi, j_lo, j_hi):
        xp = array_module(i_lo, i_hi, j_lo, j_hi)
        shape = np.broadcast_shapes(*(np.shape(x) for x in (i_lo, i_hi, j_lo, j_hi)))
        dead, full = xp.zeros(shape, bool), xp.ones(shape, bool)
        if self.right is not None:
            dead, full = dead | (j_lo > i_hi + self.right), full & (j_hi <= i_lo + self.right)
        if self.left is not None:
            dead, full = dead | (j_hi < i_lo - self.left), full & (j_lo >= i_hi - self.left)
        return _verdict(dead, full)


@register_mask
class _Prefix(Mask):
    length: Any

    def __call__(self, b, h, i, j):
        length = self.length if np.ndim(self.length) == 0 else _read(self.length, b)
        return (j < length) & (i == i)

    def check(self, batch, num_heads, query_length, key_length):
        if np.ndim(self.length):
            _check_lead("prefix length", self.length.shape, batch=batch)

    def classify(self, i_lo, i_hi, j_lo, j_hi):
        shape = np.broadcast_shapes(*(np.shape(x) for x in (i_lo, i_hi, j_lo, j_hi)))
        xp = array_module(self.length, j_lo, j_hi)
        dead = xp.broadcast_to(j_lo >= xp.max(self.length), shape)
        return _verdict(dead, xp.broadcast_to(j_hi < xp.min(self.length), shape))


@register_mask
class _FixedPrefix(Mask):
    length: int = static_field()

    def __call__(self, b, h, i, j):
        return (j < self.length) & (i == i)

    def classify(self, i_lo, i_hi, j_lo, j_hi):
        return _Prefix(self.length).classify(i_lo, i_hi, j_lo, j_hi)


@register_mask
class _Dense(Mask):
    array: Any

    def __call__(self, b, h, i, j):
        return _read(self.array, b, h, i, j)

    def check(self, batch, num_heads, query_length, key_length):
        _check_lead("dense array", self.array.shape, batch=batch, heads=num_heads)
        _check_table("dense array", self.array.shape, 2, query_length)
        _check_table("dense array", self.array.shape, 3, key_length)


@register_mask
class _Segments(Mask):
    query_ids: Any
    key_ids: Any

    def __call__(self, b, h, i, j):
        query_ids, key_ids = _read(self.query_ids, b, i), _read(self.key_ids, b, j)
        return (query_ids == key_ids) & (query_ids >= 0)

    def check(self, batch, num_heads, query_length, key_length):
        sides = (("query_ids", self.query_ids, query_length), ("key_ids", self.key_ids, key_length))
        for name, ids, length in sides:
            _check_lead(f"segment {name}", ids.shape, batch=batch)
            _check_table(f"segment {name}", ids.shape, 1, length)


@register_mask
class _MaskMod(Mask):
    aux: Any
    function: Callable[..., Any] = static_field()

    def __call__(self, b, h, i, j):
        visible = self.function(b, h, i, j, self.aux)
        visible = visible if isinstance(visible, jax.Array) else np.asarray(visible)
        if visible.dtype != bool:
            raise TypeError(f"mask_mod: {self.function} must return booleans, got {visible.dtype}")
        return visible


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be an int >= {least}, got {value!r}")
    return int(value)


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
    sides = (("left", left), ("right", right))
    return _LocalWindow(
        *(None if n is None else _whole(f"local_window: {name} (if not None)", n, 0) for name, n in sides)
    )


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
    window = _whole("sliding_window: window counts the query itself and", window, 1)
    num_sinks = _whole("sliding_window: num_sinks", num_sinks, 0)
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
    if isinstance(length, int | np.integer) and not isinstance(length, bool):
        return _FixedPrefix(int(length))
    length = length if isinstance(length, jax.Array) else np.asarray(length)
    if length.ndim > 1 or not np.issubdtype(length.dtype, np.integer):
        raise ValueError(f"prefix: length must be an int or integers [B], got {length.dtype} of shape {length.shape}")
    return _Prefix(length)


def prefix_lm_mask(length) -> Mask:
    """Prefix language model: causal, and the first `length` positions see each other.

    Visible iff j <= i or j < length. Combine with `segment_ids` for packing: positions, and so the prefix, then
    count from each document's start if `query_positions` and `key_positions` do.

    Args:
      length: an int, or an integer array `[B]` with one length a batch row.

    Returns:
      The mask.

    Raises:
      ValueError: `length` is neither.

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

    Returns:
      The mask. Nothing is known about its tiles before they are looked at: a layout from `jattn.layouts.from_mask_mod`
      finds the dead ones once.

    Raises:
      TypeError: `function` is not callable, or (when called) returns something else than booleans.

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
