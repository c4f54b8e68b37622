"""Counter-based dropout: whether a pair is kept depends on the seed and its indices, never on tiling or order."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, UInt32

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


# uint32 of any shape; the words of one call broadcast against each other.
Word = UInt32[Array, " ..."]


def threefry2x32(key: tuple[Word, Word], counter: tuple[Word, Word]) -> tuple[Word, Word]:
    """The 20-round Threefry-2x32 block cipher on broadcastable uint32 arrays, bit for bit the one of jax.random.

    Args:
      key: pair of uint32 arrays.
      counter: pair of uint32 arrays.

    Returns:
      Pair of uint32 arrays.

    Example:
      >>> zero = (jnp.uint32(0), jnp.uint32(0))
      >>> [hex(int(x)) for x in threefry2x32(zero, zero)]
      ['0x6b200159', '0x99ba4efe']

    Source: Parallel random numbers: as easy as 1, 2, 3 (doi:10.1145/2063384.2063405).
    """
    schedule = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    x, y = counter[0] + schedule[0], counter[1] + schedule[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = x + y
            y = ((y << np.uint32(rotation)) | (y >> np.uint32(32 - rotation))) ^ x
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return x, y


def keep_pairs(seed: Any, rate: float, b: Any, h: Any, row: Any, column: Any) -> Bool[Array, " ..."]:
    """Booleans: which (query row, key index) pairs survive dropout; the arguments broadcast.

    keep = first word of threefry(threefry(seed, (b, h)), (row, column)) >= rate * 2^32

    Args:
      seed: uint32 `[2]`, or its two words.
      rate: probability of dropping a pair.
      b: batch index.
      h: query head.
      row: query row index (not position).
      column: key index (not position).

    Returns:
      The broadcast shape of the four.

    Example:
      >>> import jax
      >>> keep = keep_pairs(jax.random.bits(jax.random.key(0), (2,)), 0.25, 0, 0, np.arange(64)[:, None], np.arange(64))
      >>> keep.shape, round(float(keep.mean()), 1)
      ((64, 64), 0.8)

    Source: own design; the cipher is that of `threefry2x32`.
    """
    as_word = lambda x: jnp.asarray(x).astype(jnp.uint32)  # noqa: E731
    key = threefry2x32((seed[0], seed[1]), (as_word(b), as_word(h)))
    bits, _ = threefry2x32(key, (as_word(row), as_word(column)))
    return bits >= np.uint32(min(round(rate * 2**32), 2**32 - 1))
