"""Where the keys of a row lie: in a cache of its own, or in pages of a pool that all rows share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LEAST_BLOCK = 16
"""Keys of a tile that matrix units take at least."""


@dataclasses.dataclass(frozen=True)
class Pages:
    """How tokens are spread over pages.

    Args:
        count: pages of the pool.
        size: tokens of a page.
        shared: whether a table says which page holds which tokens. If not, row b has page b and no other.
    """

    count: int
    size: int
    shared: bool

    def tile(self, b: Any, j: Any, block: int, read: Callable[[Any], Any]) -> tuple[Any, Any]:
        """Page of tile `j` of row `b`, and which tile of the page it is.

        `read(n)` is entry n of the row's table. Entries that name no page of the pool are moved to the nearest one.
        """
        if not self.shared:
            return b, j
        # Not `//` and `%`: kernels would look at the signs.
        tiles = jnp.asarray(self.size // block, j.dtype)
        page = jnp.clip(read(jax.lax.div(j, tiles)), 0, self.count - 1)
        return page, jax.lax.rem(j, tiles)


def pages_of(pool: Any, block_table: Any) -> tuple[Pages, int]:
    """How keys `[B, S, K, D]`, or `[P, page, K, D]` with a table `[B, M]`, are spread; and tokens a row at most."""
    count, size = pool.shape[:2]
    return Pages(count, size, block_table is not None), size * (1 if block_table is None else block_table.shape[1])


def block_of_page(page: int, wanted: int) -> int:
    """Keys of a tile so that no tile reaches over two pages, `wanted` at most.

    Raises:
        ValueError: the page is too short for a matrix unit, or no multiple of what one takes.

    Example:
        >>> block_of_page(16, 64), block_of_page(48, 64), block_of_page(1024, 64)
        (16, 16, 64)
    """
    block = math.gcd(page, wanted)
    if block < LEAST_BLOCK:
        raise ValueError(
            f"pages of {page} tokens cannot be cut into tiles of {LEAST_BLOCK} keys or more for a matrix unit; "
            f"multiples of {LEAST_BLOCK} can"
        )
    return block


def check_block(pages: Pages, block: int) -> None:
    """ValueError where a tile would reach over two pages."""
    if pages.shared and pages.size % block:
        raise ValueError(f"tiles of {block} keys do not divide pages of {pages.size}; take a divisor of the page")
