"""The type of masks and what combines them: classification, dense form, counting, drawing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "DEAD",
    "FULL",
    "PARTIAL",
    "Entries",
    "Mask",
    "array_module",
    "readable",
    "register_mask",
    "static_field",
]

DEAD, PARTIAL, FULL = 0, 1, 2

_Class = TypeVar("_Class")


def array_module(*arrays: Any) -> Any:
    """Numpy for host values, jax.numpy as soon as one of them is a jax array, so that static masks stay static."""
    return jnp if any(isinstance(a, jax.Array) for a in arrays) else np


class Entries:
    """Stands for an array of a mask where only single entries can be read, as inside a kernel.

    It is indexed with one integer or integer array an axis; negative indices count from the end, others beyond it are
    moved to it, as in jax.numpy. Everything else that can be done with an array raises.

    Args:
      shape: of the array.
      dtype: of the array.
      read: `read(*index) -> entries`, given non-negative int32 indices that broadcast against each other.

    Example:
      >>> import jax.numpy as jnp
      >>> table = jnp.array([3, 4, 5])
      >>> Entries(table.shape, table.dtype, lambda i: table[i])[jnp.array([-1, 0])].tolist()
      [5, 3]
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, read: Callable[..., Any]):
        self.shape, self.dtype, self.ndim, self._read = shape, dtype, len(shape), read

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        index = index if isinstance(index, tuple) else (index,)
        whole = [np.issubdtype(getattr(x, "dtype", type(x)), np.integer) for x in index]
        if len(index) != self.ndim or not all(whole):
            raise TypeError(f"it reads {index} of an array of rank {self.ndim}, not one integer an axis")
        # A typed index: Pallas knows what to do with a traced zero, and not with a plain one.
        places = [jnp.asarray(x, jnp.int32) for x in index]
        moved = [jnp.where(x < 0, x + size, x) for x, size in zip(places, self.shape, strict=True)]
        return self._read(*(jnp.clip(x, 0, size - 1) for x, size in zip(moved, self.shape, strict=True)))

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("it does something else with an array than reading entries")

    # What would be answered wrongly, by identity or entry by entry, instead of not at all.
    __eq__ = __ne__ = __bool__ = __iter__ = __array__ = _refuse
    __hash__ = object.__hash__


def readable(array: Any, *places: Any) -> Any:
    """The array as one that can be indexed at `places`: numpy's only if these are numpy's, too."""
    return array if isinstance(array, Entries) else array_module(array, *places).asarray(array)


def static_field() -> Any:
    """A dataclass field that is a compile-time constant of the pytree."""
    return dataclasses.field(metadata={"static": True})


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, static_field))
def register_mask(cls: type[_Class]) -> type[_Class]:
    """Make `cls` a frozen dataclass and a pytree: fields marked as static are compile-time constants."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


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
        xp = array_module(i_lo, i_hi, j_lo, j_hi)
        shape = np.broadcast_shapes(*(np.shape(x) for x in (i_lo, i_hi, j_lo, j_hi)))
        return xp.full(shape, PARTIAL, xp.int8)

    def __and__(self, other: Mask) -> Mask:
        return _And(self, _checked(other))

    def __or__(self, other: Mask) -> Mask:
        return _Or(self, _checked(other))

    def __invert__(self) -> Mask:
        return _Not(self)

    def check(self, batch, num_heads, query_length, key_length):
        """ValueError where an array of the mask does not fit; None stands for a length that positions replace."""

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

        Raises:
          ValueError: positions of another shape, or an array of the mask that does not fit.
        """
        i, j = self._positions(batch, num_heads, query_length, key_length, query_positions, key_positions)
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
        return array_module(visible).broadcast_to(visible, (batch, num_heads, query_length, key_length))

    def count(self, batch, num_heads, query_length, key_length, *, query_positions=None, key_positions=None):
        """Number of visible keys of each row, int32 `[B, N, T]`, in memory linear in T and S.

        Args:
          batch: B.
          num_heads: N, query heads.
          query_length: T.
          key_length: S.
          query_positions: `[B|1, T]` integers, 0..T-1 if not given.
          key_positions: `[B|1, S]` integers, 0..S-1 if not given.

        Returns:
          `[B, N, T]` int32.

        Raises:
          ValueError: positions of another shape, or an array of the mask that does not fit.
        """
        i, j = self._positions(batch, num_heads, query_length, key_length, query_positions, key_positions)
        i, j, mask = jax.tree.map(jnp.asarray, (i, j, self))
        b, h = jnp.arange(batch)[:, None, None], jnp.arange(num_heads)[None, :, None]
        keys = jnp.arange(key_length)[None, None]

        def row(t):
            visible = mask.at(b, h, i[:, None, t, None], j[:, None, :], t, keys)
            return jnp.broadcast_to(visible, (batch, num_heads, key_length)).sum(-1, dtype=jnp.int32)

        return jnp.moveaxis(jax.lax.map(row, jnp.arange(query_length)), 0, -1)

    def _positions(self, batch, num_heads, query_length, key_length, query_positions, key_positions):
        """Checked positions `[B|1, T]` and `[B|1, S]`, counted from 0 where they are not given."""
        free = (query_positions is None, key_positions is None)
        self.check(batch, num_heads, query_length if free[0] else None, key_length if free[1] else None)
        found = []
        named = (("query", query_positions, query_length), ("key", key_positions, key_length))
        for name, given, length in named:
            given = np.arange(length)[None] if given is None else given
            given = given if isinstance(given, jax.Array) else np.asarray(given)
            integers = np.issubdtype(given.dtype, np.integer)
            if given.ndim != 2 or given.shape[0] not in (1, batch) or given.shape[1] != length or not integers:
                raise ValueError(
                    f"{name}_positions: {given.dtype} {given.shape}; expected integers ({batch} or 1, {length})"
                )
            found.append(given)
        return found

    def plot(self, query_length=64, key_length=None, *, batch_index=0, head=0, ax=None):
        """Draw the mask with matplotlib (dark = may attend).

        Args:
          query_length: T, number of query positions to draw.
          key_length: S, T if not given.
          batch_index: the batch row to draw.
          head: the query head to draw.
          ax: matplotlib axes to draw on, new ones if not given.

        Returns:
          The axes.
        """
        import matplotlib.pyplot as plt

        key_length = query_length if key_length is None else key_length
        b, h = (np.full((1,) * 4, n) for n in (batch_index, head))
        rows, columns = np.arange(query_length)[None, None, :, None], np.arange(key_length)[None, None, None]
        dense = np.broadcast_to(self.at(b, h, rows, columns, rows, columns), (1, 1, query_length, key_length))[0, 0]
        ax = plt.subplots(figsize=(4, 4))[1] if ax is None else ax
        ax.imshow(np.asarray(dense), cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        ax.set_xlabel("key position")
        ax.set_ylabel("query position")
        return ax


def _checked(other: Any) -> Mask:
    if not isinstance(other, Mask):
        raise TypeError(f"masks combine with masks, got {type(other).__name__}; wrap an array with masks.dense(array)")
    return other


@register_mask
class _And(Mask):
    """Visible in both masks."""

    left: Mask
    right: Mask

    def check(self, *sizes):
        self.left.check(*sizes)
        self.right.check(*sizes)

    def __call__(self, b, h, i, j):
        return self.left(b, h, i, j) & self.right(b, h, i, j)

    def at(self, *where: Any):
        return self.left.at(*where) & self.right.at(*where)

    def classify(self, *bounds: Any):
        left, right = self.left.classify(*bounds), self.right.classify(*bounds)
        return array_module(left, right).minimum(left, right)


@register_mask
class _Or(Mask):
    """Visible in either mask."""

    left: Mask
    right: Mask

    def check(self, *sizes):
        self.left.check(*sizes)
        self.right.check(*sizes)

    def __call__(self, b, h, i, j):
        return self.left(b, h, i, j) | self.right(b, h, i, j)

    def at(self, *where: Any):
        return self.left.at(*where) | self.right.at(*where)

    def classify(self, *bounds: Any):
        left, right = self.left.classify(*bounds), self.right.classify(*bounds)
        return array_module(left, right).maximum(left, right)


@register_mask
class _Not(Mask):
    """Visible where the other mask is not."""

    inner: Mask

    def check(self, *sizes):
        self.inner.check(*sizes)

    def __call__(self, b, h, i, j):
        return ~self.inner(b, h, i, j)

    def at(self, *where: Any):
        return ~self.inner.at(*where)

    def classify(self, *bounds: Any):
        return (FULL - self.inner.classify(*bounds)).astype(np.int8)
