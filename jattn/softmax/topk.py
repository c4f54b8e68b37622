"""The one rule by which anything in the library is selected: highest scores, ties to the smaller index."""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

__all__ = ["topk_mask"]


def _is_static(*arrays: Any) -> bool:
    """Says whether every given array is numpy (or absent), so that the answer may be a compile-time constant."""
    return all(x is None or isinstance(x, (np.ndarray, np.generic, bool, int, float, list, tuple)) for x in arrays)


def _broadcast(name: str, array: ArrayLike | None, shape: tuple[int, ...], xp: Any) -> Any:
    if array is None:
        return None
    array = xp.asarray(array)
    if array.dtype != bool:
        raise ValueError(
            f"{name} must be boolean and broadcast to {shape}; got dtype {array.dtype}, shape {array.shape}"
        )
    try:
        return xp.broadcast_to(array, shape)
    except ValueError as error:
        raise ValueError(f"{name} must broadcast to the scores' shape {shape}; got shape {array.shape}") from error


def _highest(key: Any, eligible: Any, number: Any, xp: Any) -> Any:
    """Marks the `number` highest eligible keys of each row; `number` is an int or an array [..., 1]."""
    size = key.shape[-1]
    if isinstance(number, int):
        if number <= 0 or size == 0:
            return xp.zeros(eligible.shape, bool)
        number = min(number, size)
        if xp is np:
            threshold = np.partition(key, size - number, axis=-1)[..., size - number, None]
        else:
            threshold = jax.lax.top_k(key, number)[0][..., -1:]
    else:
        position = xp.clip(size - number, 0, size - 1)
        threshold = xp.take_along_axis(xp.sort(key, axis=-1), position, axis=-1)
    above = eligible & (key > threshold)
    # Among keys equal to the threshold the smaller indices win: count them from the left until the row is full.
    level = eligible & (key == threshold)
    room = number - xp.sum(above, axis=-1, keepdims=True, dtype=np.int32)
    return above | (level & (xp.cumsum(level, axis=-1, dtype=np.int32) <= room))


def topk_mask(
    scores: ArrayLike, k: int | ArrayLike, *, forced: ArrayLike | None = None, allowed: ArrayLike | None = None
) -> Any:
    """Marks the k highest scores of each row, equal scores going to the smaller index.

    chosen = forced & allowed, plus the best (k - their number) of the other allowed entries

    Not-allowed entries are never marked, not even when forced. An entry whose score is NaN or -inf is never marked for
    its score (it may still be forced). Forced entries count towards k and are all kept if they exceed it. Carries no
    gradient. With numpy arguments the result is a numpy array, also while tracing, so that static choices stay
    constants.

    Args:
      scores: Real scores [..., n].
      k: Number of entries to mark in a row: an int, or integers that broadcast to [...].
      forced: Booleans that broadcast to [..., n]: entries that are in whatever their score.
      allowed: Booleans that broadcast to [..., n]: entries that may be marked; all by default.

    Returns:
      Booleans [..., n]; a row holds min(k, eligible entries) marks, or all its allowed forced ones if these are more.

    Raises:
      ValueError: If the scores are a scalar, boolean or complex, a mask does not broadcast or is not boolean, or k is
        negative.

    Example:
      >>> import numpy as np
      >>> topk_mask(np.array([1.0, 3.0, 3.0, np.nan]), 2).astype(int).tolist()
      [0, 1, 1, 0]
      >>> topk_mask(np.array([1.0, 3.0, 3.0, 0.0]), 2, forced=np.array([0, 0, 0, 1], bool)).astype(int).tolist()
      [0, 1, 0, 1]

    Source: the selection rule of the block-sparse selectors (MoBA, arXiv 2502.13189, and its relatives), with ties made
    deterministic.
    """
    static = _is_static(scores, k, forced, allowed)
    xp = np if static else jnp
    scores = xp.asarray(scores)
    if scores.ndim == 0 or scores.dtype == bool or jnp.issubdtype(scores.dtype, jnp.complexfloating):
        raise ValueError(f"scores must be real numbers of shape [..., n]; got shape {scores.shape}, {scores.dtype}")
    forced = _broadcast("forced", forced, scores.shape, xp)
    allowed = _broadcast("allowed", allowed, scores.shape, xp)
    try:
        k = operator.index(k)
    except TypeError:
        k = xp.asarray(k)
        if not jnp.issubdtype(k.dtype, jnp.integer) or k.ndim >= scores.ndim:
            raise ValueError(
                f"k must be an int or integers that broadcast to {scores.shape[:-1]}; got {k.dtype}, shape {k.shape}"
            ) from None
        k = xp.broadcast_to(k, scores.shape[:-1])[..., None]
    else:
        if k < 0:
            raise ValueError(f"k must not be negative; got {k}")

    if jnp.issubdtype(scores.dtype, jnp.floating):
        scores = scores if static else jax.lax.stop_gradient(scores)
        eligible = scores > -np.inf  # False for NaN, too
        lowest: Any = -np.inf
    else:
        eligible = xp.ones(scores.shape, bool)
        lowest = np.iinfo(scores.dtype).min
    if allowed is not None:
        eligible = eligible & allowed
    if forced is None:
        return _highest(xp.where(eligible, scores, xp.asarray(lowest, scores.dtype)), eligible, k, xp)
    if allowed is not None:
        forced = forced & allowed
    eligible = eligible & ~forced
    number = xp.maximum(k - xp.sum(forced, axis=-1, keepdims=True, dtype=np.int32), 0)
    key = xp.where(eligible, scores, xp.asarray(lowest, scores.dtype))
    return forced | _highest(key, eligible, number, xp)
