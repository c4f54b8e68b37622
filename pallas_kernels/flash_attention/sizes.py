"""Tile sizes: a table of measured choices, and a rule from the size of shared memory for everything else.

The table is `tiles_triton.json` beside this file, which `python -m experiments.tune` writes on the device it measures:

    {"schema": "pallas_kernels.tiles/1", "devices": {
        DEVICE KIND: {"capability": "9.0", "tiles": [
            {"pass": "forward" | "backward", "itemsize": 2, "head_dim": 128, "value_dim": 128,
             "block_q": 128, "block_k": 64, "num_warps": 8, "num_stages": 2}, ...]}}}
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Mapping

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


def shared_bytes(
    sizes: TileSizes, head_dim: int, value_dim: int, itemsize: int, backward: bool, capability: str = "8.0"
) -> int:
    """Shared memory that a program with these tiles needs, an upper estimate.

    The side that stays is held once (queries of the forward pass also as partial tiles see them), the side that is
    walked along once a stage (backward: once more, turned; once more a stage where the tensor cores read both operands
    from shared memory); the tile of weights passes through shared memory between the two products (backward: weights
    and their cotangents).
    """
    width = padded(head_dim) + padded(value_dim)
    stays, walks = sizes.block_q, sizes.block_k
    tile = sizes.block_q * sizes.block_k * (2 if backward else 1)
    held = stays * (width if backward else 2 * padded(head_dim))
    turned = sizes.num_stages if capability.startswith("10.") else 1
    copies = sizes.num_stages + (turned if backward else 0)
    return itemsize * (held + walks * width * copies + tile)


Key = tuple[str, bool, int, int, int]
"""Device kind, whether backward, bytes of an element, D, Dv."""
SCHEMA = "pallas_kernels.tiles/1"
TABLE = "tiles_triton.json"


def read_table(text: str) -> dict[Key, TileSizes]:
    """The measured tile sizes in a JSON text.

    Raises:
        ValueError: another schema, or an entry that does not fit the device it is for.

    Example:
        >>> read_table('{"schema": "pallas_kernels.tiles/1", "devices": {}}')
        {}
    """
    content = json.loads(text)
    if content["schema"] != SCHEMA:
        raise ValueError(f"a table of tile sizes has schema {SCHEMA!r}, this one {content['schema']!r}")
    table = {}
    for kind, device in content["devices"].items():
        for entry in device["tiles"]:
            sizes = TileSizes(*(entry[field.name] for field in dataclasses.fields(TileSizes)))
            widths, backward = (entry["head_dim"], entry["value_dim"], entry["itemsize"]), entry["pass"] == "backward"
            try:
                check(sizes, *widths, backward, device["capability"])
            except ValueError as error:
                raise ValueError(f"the table of tile sizes has an entry that {kind} cannot run: {entry}") from error
            table[kind, backward, entry["itemsize"], entry["head_dim"], entry["value_dim"]] = sizes
    return table


@functools.cache
def shipped_table() -> Mapping[Key, TileSizes]:
    """The table that comes with this package."""
    return read_table(importlib.resources.files(__package__).joinpath(TABLE).read_text(encoding="utf-8"))


def choose(
    head_dim: int,
    value_dim: int,
    itemsize: int,
    backward: bool,
    capability: str = "8.0",
    device_kind: str = "",
    table: Mapping[Key, TileSizes] | None = None,
) -> TileSizes:
    """Tile sizes for a device: the measured ones where there are some, else what fits its shared memory.

    Args:
        head_dim: D.
        value_dim: Dv.
        itemsize: bytes of an element.
        backward: whether for the backward kernels.
        capability: compute capability, as "9.0"; an unknown one is treated as the smallest known.
        device_kind: what the maker calls the device, as "NVIDIA H200".
        table: measured tile sizes; the shipped ones if None.

    Returns:
        The entry of the table, or the first choice that fits, from large to small.

    Raises:
        ValueError: not even the smallest tile fits.

    Example:
        >>> choose(128, 128, 2, False, "9.0")
        TileSizes(block_q=128, block_k=64, num_warps=8, num_stages=2)
    """
    measured = shipped_table() if table is None else table
    return measured.get((device_kind, backward, itemsize, head_dim, value_dim)) or by_rule(
        head_dim, value_dim, itemsize, backward, capability
    )


def by_rule(head_dim: int, value_dim: int, itemsize: int, backward: bool, capability: str) -> TileSizes:
    """Tile sizes from the shared memory of a device alone, the first that fit from large to small.

    Raises:
        ValueError: not even the smallest tile fits.
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
            if shared_bytes(sizes, head_dim, value_dim, itemsize, backward, capability) <= available:
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
    asked = shared_bytes(sizes, head_dim, value_dim, itemsize, backward, capability)
    available = SHARED_MEMORY.get(capability, min(SHARED_MEMORY.values()))
    if asked > available:
        working = by_rule(head_dim, value_dim, itemsize, backward, capability)
        raise ValueError(
            f"tiles of {sizes.block_q} x {sizes.block_k} with {sizes.num_stages} stages ask for {asked} bytes of "
            f"shared memory, a block of compute capability {capability} has {available}; {working} fits"
        )
