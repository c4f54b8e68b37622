"""Tile sizes for TPUs: what the vector memory holds, and what its layout asks for."""

from __future__ import annotations

import dataclasses

LANES = 128
VECTOR_MEMORY = 16 * 2**20
"""Bytes that a kernel may use by default on every generation; the compiler refuses more."""
SCALAR_MEMORY = 2**18
"""Bytes of it that a list of steps may take."""


@dataclasses.dataclass(frozen=True)
class TpuTiles:
    """Rows of queries and of keys in a tile: multiples of 128; an axis that is not longer is one tile."""

    block_q: int
    block_k: int


def _wide(width: int) -> int:
    return -(-width // LANES) * LANES


def vector_bytes(tiles: TpuTiles, head_dim: int, value_dim: int, itemsize: int, backward: bool) -> int:
    """Vector memory that a kernel needs, an upper estimate.

    Blocks are held twice, so that the next ones arrive while the present ones are used: queries, keys and values, in
    the backward pass cotangents of the output too, and results in float32; then the tile of logits in float32 and what
    is computed from it, one array of pairs that tiles read (a bias), and its cotangent.
    """
    block_q, block_k = tiles.block_q, tiles.block_k
    widths = _wide(head_dim) + _wide(value_dim)
    blocks = itemsize * (block_q * (widths if backward else _wide(head_dim)) + block_k * widths)
    results = 4 * (max(block_q, block_k) * widths if backward else block_q * _wide(value_dim))
    pairs = 4 * block_q * block_k
    return 2 * (blocks + results) + pairs * (8 if backward else 5)


def choose(head_dim: int, value_dim: int, itemsize: int, backward: bool) -> TpuTiles:
    """The largest tiles that fit the vector memory.

    Args:
        head_dim: D.
        value_dim: Dv.
        itemsize: bytes of an element.
        backward: whether for the backward kernels.

    Returns:
        Tile sizes.

    Raises:
        ValueError: not even the smallest tile fits.

    Example:
        >>> choose(128, 128, 2, False)
        TpuTiles(block_q=512, block_k=512)
    """
    for block_q, block_k in ((512, 512), (256, 512), (256, 256), (128, 256), (128, 128)):
        tiles = TpuTiles(block_q, block_k)
        if vector_bytes(tiles, head_dim, value_dim, itemsize, backward) <= VECTOR_MEMORY:
            return tiles
    raise ValueError(
        f"no tile fits: head dims {head_dim} and {value_dim} at {itemsize} bytes, "
        f"{VECTOR_MEMORY} bytes of vector memory"
    )


def check(tiles: TpuTiles, head_dim: int, value_dim: int, itemsize: int, backward: bool) -> None:
    """Refuse tiles that do not fit, before anything is compiled.

    Raises:
        ValueError: with the bytes asked for, the bytes there are, and a choice that works.
    """
    for name in ("block_q", "block_k"):
        size = getattr(tiles, name)
        if size < LANES or size % LANES:
            raise ValueError(f"{name} must be a multiple of {LANES} on TPUs, got {size}")
    asked = vector_bytes(tiles, head_dim, value_dim, itemsize, backward)
    if asked > VECTOR_MEMORY:
        working = choose(head_dim, value_dim, itemsize, backward)
        raise ValueError(
            f"tiles of {tiles.block_q} x {tiles.block_k} ask for {asked} bytes of vector memory, a kernel has "
            f"{VECTOR_MEMORY}; {working} fits"
        )
