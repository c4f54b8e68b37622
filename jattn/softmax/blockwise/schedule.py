"""Which tiles are visited: lists of full and of partial tiles for each tile of queries."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.softmax import masks
from jattn.softmax.layout import lists_from_live
from jattn.softmax.masks import DEAD, FULL, PARTIAL
from jattn.softmax.predicates import head_entry
from jattn.softmax.problem import Problem
from jattn.softmax.tiling import Grid, make_axis, tile_classes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """Lists `[Bb, Hb, nQ(, M)]` of key tiles by query tile; `code` `[Bb, Hb, nQ, nK]` is what they were made from.

    `any_full` and `any_partial` are False only if no such tile can exist, so that no program is built for it. `guard`
    says how a partial tile finds what nobody may see: "none" (everybody sees itself), "segments" (all but padding
    sees itself) or "tile" (by the tile's own pairs).
    """

    full_count: Any
    full_index: Any
    partial_count: Any
    partial_index: Any
    code: Any
    query_block: int = dataclasses.field(metadata={"static": True})
    key_block: int = dataclasses.field(metadata={"static": True})
    any_full: bool = dataclasses.field(metadata={"static": True})
    any_partial: bool = dataclasses.field(metadata={"static": True})
    guard: str = dataclasses.field(metadata={"static": True})


def default_blocks(length: int, source: int) -> tuple[int, int]:
    """Tile sizes for a problem without a layout: 512, or shorter so that the last tile is no small rest."""
    return tuple(min(n, -(-n // (8 * -(-n // 512))) * 8) for n in (length, source))  # type: ignore[return-value]


def make_schedule(problem: Problem, one_head: bool) -> Schedule:
    """The schedule of a problem.

    Args:
      problem: the problem.
      one_head: whether heads run one after the other, so that each may have lists of its own. If not, all heads share
        one list, made only from what is static and from the layout: joining others would talk between devices.
    """
    code, blocks = tile_code(problem, one_head)
    if not one_head:
        code = joined_code(code)
    lists, exists = tile_lists(code)
    return Schedule(*lists, jnp.asarray(code), *blocks, *exists, guard=find_guard(problem))


def joined_code(code):
    """Class of every tile for all batch rows and heads together, `[1, 1, nQ, nK]`."""
    xp = np if isinstance(code, np.ndarray) else jnp
    live, full = xp.any(code != DEAD, (0, 1), keepdims=True), xp.all(code == FULL, (0, 1), keepdims=True)
    return xp.where(full, np.int8(FULL), xp.where(live, np.int8(PARTIAL), np.int8(DEAD)))


def tile_lists(code) -> tuple[list[Any], list[bool]]:
    """Counts and indices of full tiles, then of partial ones, by row of `code`; and whether there can be such tiles."""
    nothing = np.zeros(code.shape, bool)
    lists, exists = [], []
    for wanted in (FULL, PARTIAL):
        count, index, _ = lists_from_live(code == wanted, nothing, code.shape[-1])
        lists += [jnp.asarray(count), jnp.asarray(index)]
        exists.append(bool((code == wanted).any()) if isinstance(code, np.ndarray) else True)
    return lists, exists


def find_guard(problem: Problem) -> str:
    """How partial tiles find what nobody may see; see `Schedule`."""
    _, length, source, _, _ = problem.sizes
    other = problem.layout is not None or problem.mask_arrays or jax.tree.leaves(problem.mask)
    if other or length != source or problem.query_positions is not None or problem.key_positions is not None:
        return "tile"
    own = np.arange(length)
    if problem.mask is not None and not np.all(problem.mask(0, 0, own, own)):
        return "tile"
    if problem.query_segments is None:
        return "none"
    return "segments" if problem.self_segments else "tile"


def tile_code(problem: Problem, one_head: bool):
    """Class of every tile, int8 `[1|B, 1|N, nQ, nK]`, numpy if it is known while tracing; and the tile sizes."""
    batch, length, source, num_heads, _ = problem.sizes
    layout = problem.layout
    slots = (length, source) if layout is None else (layout.query_slots, layout.key_slots)
    blocks = problem.block_sizes or default_blocks(length, source)
    if layout is not None:
        blocks = (layout.query_block, layout.key_block)
    perms = (None, None) if layout is None else (layout.query_perm, layout.key_perm)
    query_block, key_block = (min(block, size) for block, size in zip(blocks, slots, strict=True))
    tiles = (-(-slots[0] // query_block), -(-slots[1] // key_block))
    code = np.full((1, 1, *tiles), FULL, np.int8)
    # Tiles at a ragged end overlap their neighbor and must be told which of their rows and columns they own.
    if slots[0] % query_block:
        code[:, :, -1] = PARTIAL
    if slots[1] % key_block:
        code[:, :, :, -1] = PARTIAL
    terms = [code]
    if layout is not None:
        live, full = layout.live_map(), layout.full_map()
        owned = perms == (None, None)
        own = jnp.where(live, jnp.where(full & owned, FULL, PARTIAL), DEAD).astype(jnp.int8)
        terms.append(own[:, head_entry(np.arange(num_heads), num_heads, own.shape[1])] if own.shape[1] != 1 else own)
    permuted = perms != (None, None)

    def classes(mask, query_positions, key_positions):
        axes = [
            make_axis(*args, num_heads)
            for args in zip(slots, (query_block, key_block), (query_positions, key_positions), perms, strict=True)
        ]
        return tile_classes(mask, Grid(*axes, batch, num_heads), exact=False)

    if problem.mask is not None:
        static = not jax.tree.leaves((problem.mask, problem.query_positions, problem.key_positions, perms))
        if static or one_head:
            terms.append(classes(problem.mask, problem.query_positions, problem.key_positions))
        else:
            terms.append(np.full((1, 1, *tiles), PARTIAL, np.int8))
    if problem.query_segments is not None:
        mask = masks.segment_mask(problem.query_segments, problem.key_segments)
        terms.append(classes(mask, None, None) if one_head else np.full((1, 1, *tiles), PARTIAL, np.int8))
    for array in problem.mask_arrays:
        known = one_head and not permuted
        terms.append(
            _array_code(array, slots, (query_block, key_block)) if known else np.full((1, 1, *tiles), PARTIAL, np.int8)
        )
    for term in terms[1:]:
        code = (np if isinstance(term, np.ndarray) and isinstance(code, np.ndarray) else jnp).minimum(code, term)
    return code, (query_block, key_block)


def _array_code(array, slots, blocks):
    """Class of every tile of a boolean array `[B|1, N|1, T|1, S|1]`."""
    tiles = [-(-size // block) for size, block in zip(slots, blocks, strict=True)]
    ragged = any(n != 1 and size % block for n, size, block in zip(array.shape[2:], slots, blocks, strict=True))
    if ragged and min(array.shape[2:]) > 1:
        # Cutting a full array into ragged tiles would copy it; its tiles look at their pairs instead.
        return np.full((1, 1, *tiles), PARTIAL, np.int8)
    every, some = array, array
    for axis, (block, count) in enumerate(zip(blocks, tiles, strict=True), start=2):
        if array.shape[axis] == 1:
            continue
        every, some = (
            _cut_axis(every, axis, block, count, True).all(axis + 1),
            _cut_axis(some, axis, block, count, False).any(axis + 1),
        )
    code = jnp.where(every, FULL, jnp.where(some, PARTIAL, DEAD)).astype(jnp.int8)
    return jnp.broadcast_to(code, (*code.shape[:2], *tiles))


def _cut_axis(array, axis: int, block: int, count: int, fill: bool):
    """An axis as `[count, block]`, filled up at the end."""
    pad = [(0, 0)] * array.ndim
    pad[axis] = (0, count * block - array.shape[axis])
    padded = jnp.pad(array, pad, constant_values=fill)
    return padded.reshape(*array.shape[:axis], count, block, *array.shape[axis + 1 :])
