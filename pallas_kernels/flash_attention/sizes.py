"""Tile sizes: a table of measured choices, and a rule from the size of shared memory for everything else."""

from __future__ import annotations

import dataclasses

# Shared memory a block may ask for, in bytes, by compute capability.
SHARED_MEMORY = {"8.0": 166912, "8.6": 101376, "8.9": 101376, "9.0": 232448, "10.0": 232448, "12.0": 101376}


@dataclasses.dataclass(frozen=True)
class TileSizes:
    """Rows of queries and of keys in a tile, warps of a program, and stages of the software pipeline."""

    block_q: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 2


def padded(width: int) -> int:
    """The next power of two that a matrix unit takes, 16 at least."""
    return max(16, 1 << (width - 1).bit_length())


def shared_bytes(sizes: TileSizes, head_dim: int, value_dim: int, itemsize: int, backward: bool) -> int:
    """Shared memory that a program with these tiles needs, an upper estimate.

    The side that stays is held once (queries of the forward pass also as partial tiles see them), the side that is
    walked along once a stage (backward: once more, turned); the tile of weights passes through shared memory between
    the two products (backward: weights and their cotangents).
    """
    width = padded(head_dim) + padded(value_dim)
    stays, walks = sizes.block_q, sizes.block_k
    tile = sizes.block_q * sizes.block_k * (2 if backward else 1)
    held = stays * (width if backward else 2 * padded(head_dim))
    copies = sizes.num_stages + (1 if backward else 0)
    return itemsize * (held + walks * width * copies + tile)


def choose(head_dim: int, value_dim: int, itemsize: int, backward: bool, capability: str = "8.0") -> TileSizes:
    """Tile sizes that fit the shared memory of a device.

    Args:
        head_dim: D.
        value_dim: Dv.
        itemsize: bytes of an element.
        backward: whether for the backward kernels.
        capability: compute capability, as "9.0"; an unknown one is treated as the smallest known.

    Returns:
        The first choice that fits, from large to small.

    Raises:
        ValueError: not even the smallest tile fits.

    Example:
        >>> choose(128, 128, 2, False, "9.0")
        TileSizes(block_q=128, block_k=64, num_warps=8, num_stages=2)
    """
    available = SHARED_MEMORY.get(capability, min(SHARED_MEMORY.values()))
    wide = max(head_dim, value_dim) > 64
    warps = 8 if wide and itemsize < 4 else 4
    candidates = (
        [(64, 64), (32, 64), (32, 32), (16, 16)] if backward else [(128, 64), (64, 64), (64, 32), (32, 32), (16, 16)]
    )
    if itemsize >= 4:
        candidates = [pair for pair in candidates if pair[0] * pair[1] <= 64 * 32] or candidates[-1:]
    for block_q, block_k in candidates:
        for stages in (2, 1):
            sizes = TileSizes(block_q, block_k, warps if block_q * block_k >= 64 * 64 else 4, stages)
            if shared_bytes(sizes, head_dim, value_dim, itemsize, backward) <= available:
                return sizes
    raise ValueError(
        f"no tile fits: head dims {head_dim} and {value_dim} at {itemsize} bytes, {available} bytes a block"
    )


def check(sizes: TileSizes, head_dim: int, value_dim: int, itemsize: int, backward: bool, capability: str) -> None:
    """Refuse tiles that do not fit, before anything is launched.

    Raises:
        ValueError: with the bytes asked for, the bytes there are, and a choice that works.
    """
    for name in ("block_q", "block_k"):
        size = getattr(sizes, name)
        if size < 16 or size & (size - 1):
            raise ValueError(f"{name} must be a power of two and at least 16, got {size}")
    asked = shared_bytes(sizes, head_dim, value_dim, itemsize, backward)
    available = SHARED_MEMORY.get(capability, min(SHARED_MEMORY.values()))
    if asked > available:
        working = choose(head_dim, value_dim, itemsize, backward, capability)
        raise ValueError(
            f"tiles of {sizes.block_q} x {sizes.block_k} with {sizes.num_stages} stages ask for {asked} bytes of "
            f"shared memory, a block of compute capability {capability} has {available}; {working} fits"
        )
