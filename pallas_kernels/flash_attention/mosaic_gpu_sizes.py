"""Tile sizes of the attention kernel for Hopper: from the shared memory and the registers that each pass holds."""

from __future__ import annotations

import dataclasses

ROWS = 64
"""Rows that one warpgroup multiplies at a time."""
CONSUMERS = 2
"""Warpgroups that compute; one more loads."""
AVAILABLE = 232448
"""Bytes of shared memory that a program may ask for."""
RESERVED = 1024
"""Bytes set aside for barriers, and for what filling up to whole lines costs."""
MAX_STAGES = 4
WALKED = (64, 128, 192, 256)
"""Lengths of a tile along the side that is walked along: what one product takes, in chunks of `ROWS`."""
PASSES = ("forward", "query", "key")
"""The forward pass, the one for dQ, and the one for dK and dV."""


@dataclasses.dataclass(frozen=True)
class MosaicSizes:
    """Rows of queries and of keys in a tile, and how many tiles of the side that is walked along are held at once."""

    block_q: int
    block_k: int
    stages: int = 2


def rounded(size: int, block: int) -> int:
    """The next multiple of a block."""
    return -(-size // block) * block


def shared_bytes(sizes: MosaicSizes, head_dim: int, value_dim: int, itemsize: int, of: str, wide: bool = False) -> int:
    """Shared memory of a program.

    The side that stays is held once, the other once a stage; outputs pass through what the side that stays has left,
    except in the forward pass where that has another width or (`wide`) is put out in float32.
    """
    head_dim, value_dim = rounded(head_dim, 16), rounded(value_dim, 16)
    rows, width = CONSUMERS * ROWS, head_dim + value_dim
    if of == "forward":
        out = rows * value_dim * (4 if wide else itemsize) if wide or head_dim != value_dim else 0
        return RESERVED + rows * (head_dim * itemsize + 4) + out + sizes.stages * sizes.block_k * width * itemsize
    walks = sizes.block_k * width * itemsize if of == "query" else sizes.block_q * (width * itemsize + 8)
    return RESERVED + rows * width * itemsize + sizes.stages * walks


def _candidates(head_dim: int, value_dim: int, of: str) -> list[tuple[int, int]]:
    """Tiles that leave sums and products in registers, best first."""
    rows = CONSUMERS * ROWS
    if of == "key":
        return [(64, rows)]
    held = value_dim if of == "forward" else head_dim
    return [(rows, block_k) for block_k in (128, 64) if block_k == 64 or held <= 128]


def choose(head_dim: int, value_dim: int, itemsize: int, of: str, wide: bool = False) -> MosaicSizes:
    """Tile sizes that fit a Hopper GPU.

    Args:
        head_dim: D.
        value_dim: Dv.
        itemsize: bytes of an element.
        of: one of `PASSES`.
        wide: whether the forward pass puts out float32, as for pointwise normalizers.

    Returns:
        The largest tiles that fit twice, with as many stages as fit (4 at most); one stage where nothing fits twice.

    Raises:
        ValueError: not even the smallest tile fits once.

    Example:
        >>> choose(128, 128, 2, "forward")
        MosaicSizes(block_q=128, block_k=128, stages=3)
    """
    for least in (2, 1):
        for blocks in _candidates(head_dim, value_dim, of):
            for stages in range(MAX_STAGES, least - 1, -1):
                sizes = MosaicSizes(*blocks, stages)
                if shared_bytes(sizes, head_dim, value_dim, itemsize, of, wide) <= AVAILABLE:
                    return sizes
    raise ValueError(
        f"no tile fits: head dims {head_dim} and {value_dim} at {itemsize} bytes, {AVAILABLE} bytes a block"
    )


def check(sizes: MosaicSizes, head_dim: int, value_dim: int, itemsize: int, of: str, wide: bool = False) -> None:
    """Refuse tiles that do not fit, before anything is launched.

    Raises:
        ValueError: the shape is not one that two warpgroups can work on, or it asks for too much shared memory; with
            the bytes asked for, the bytes there are, and a choice that works.
    """
    working = choose(head_dim, value_dim, itemsize, of, wide)
    stays, walks = ("block_k", "block_q") if of == "key" else ("block_q", "block_k")
    if getattr(sizes, stays) != CONSUMERS * ROWS or getattr(sizes, walks) not in WALKED:
        raise ValueError(
            f"{stays} must be {CONSUMERS * ROWS} and {walks} one of 64, 128, 192 and 256, got tiles of {sizes.block_q} "
            f"x {sizes.block_k}; {working} fits"
        )
    asked = shared_bytes(sizes, head_dim, value_dim, itemsize, of, wide)
    if asked > AVAILABLE:
        raise ValueError(
            f"tiles of {sizes.block_q} x {sizes.block_k} with {sizes.stages} stages ask for {asked} bytes of shared "
            f"memory, a block of a Hopper GPU has {AVAILABLE}; {working} fits"
        )
