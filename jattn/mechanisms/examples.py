"""Small inputs for the examples of entries, drawn with numpy: jax.random would compile a program for every shape."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def normal(key: Any, *shape: int) -> np.ndarray:
    """Normal float32 numbers that depend on a key of jax.random and a shape alone.

    Args:
        key: a key of jax.random.
        *shape: of the array.

    Returns:
        The array.

    Example:
        >>> normal(jax.random.key(0), 2, 3).shape
        (2, 3)
    """
    seed = np.asarray(jax.random.key_data(key)).ravel().tolist()
    return np.random.default_rng([*seed, *shape]).standard_normal(shape, np.float32)


def normals(key: Any, *shapes: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Several independent arrays of normal float32 numbers.

    Args:
        key: a key of jax.random.
        *shapes: of the arrays.

    Returns:
        The arrays.

    Example:
        >>> [x.shape for x in normals(jax.random.key(0), (2, 3), (4,))]
        [(2, 3), (4,)]
    """
    random = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())
    return tuple(random.standard_normal(shape, np.float32) for shape in shapes)


def attention_inputs(key: Any, length: int, query_length: int | None = None) -> tuple[tuple[np.ndarray, ...], dict]:
    """Query, key and value of a small grouped-query attention: the example of most primitives.

    Args:
        key: a key of jax.random.
        length: S, and T if `query_length` is None.
        query_length: T.

    Returns:
        `((query [2, T, 4, 8], key [2, S, 2, 8], value [2, S, 2, 6]), {})`.

    Example:
        >>> [x.shape for x in attention_inputs(jax.random.key(0), 5, 3)[0]]
        [(2, 3, 4, 8), (2, 5, 2, 8), (2, 5, 2, 6)]
    """
    query = normal(key, 2, length if query_length is None else query_length, 4, 8)
    both = normal(key, 2, length, 2, 14)
    return (query, both[..., :8], both[..., 8:]), {}
