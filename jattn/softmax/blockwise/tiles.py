"""One tile of the score matrix: where it lies, what it reads, who sees whom in it, and what it adds to its rows.

Heads come in views of `[nb, nh]` at an offset: one head at a time on a single CPU device, all at once elsewhere.
Everything here works on `[nb, nh, Bq, Bk]`, so both are one program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jattn.softmax.blockwise.schedule import Schedule
from jattn.softmax.problem import Problem, drop_pairs, modify_logits, offset_tile


class View(NamedTuple):
    """Heads under work: `rows` x `heads` of them from batch row `b` and query head `h` on; `kv_heads` of their keys."""

    b: Any
    h: Any
    rows: int
    heads: int
    kv_heads: int
    group: int


class Tile(NamedTuple):
    """Place of a tile: first row and column, tokens and positions of its slots, visibility (None: all visible).

    `seeing` `[nb|1, nh|1, Bq, 1]` and `seen` `[nb|1, nk|1, Bk, 1]` tell which queries see something and which keys are
    seen by somebody; None where nothing needs to be hidden from a product, or is hidden already.
    """

    row: Any
    column: Any
    query_token: Any
    key_token: Any
    query_position: Any
    key_position: Any
    visible: Any
    seeing: Any = None
    seen: Any = None


@dataclasses.dataclass(frozen=True)
class Slots:
    """Problem in slot space: tokens `[B|1, N|1, slots]` of permuted queries and keys, None where slots are tokens."""

    query_tokens: Any
    key_tokens: Any


jax.tree_util.register_dataclass(Slots, data_fields=["query_tokens", "key_tokens"], meta_fields=[])


def starts32(starts):
    """Slice starts as int32, whatever mixture of ints and traced integers they are."""
    return [jnp.asarray(x, jnp.int32) for x in starts]


def cut(array, view: View, starts, sizes):
    """The part `[nb|1, nh|1, ...]` of `[B|1, N|1, ...]` at `starts`, `sizes` long on the other axes that are not 1."""
    places = zip(array.shape, (view.b, view.h, *starts), (view.rows, view.heads, *sizes), strict=True)
    begin, length = zip(*((0, 1) if n == 1 else (start, size) for n, start, size in places), strict=True)
    return jax.lax.dynamic_slice(array, starts32(begin), length)


def cut_rows(array, view: View, start, size: int):
    """The rows `[nb, nh, size, ...]` of `[B, T, N, ...]`."""
    begin = [view.b, start, view.h] + [0] * (array.ndim - 3)
    part = jax.lax.dynamic_slice(array, starts32(begin), [view.rows, size, view.heads, *array.shape[3:]])
    return jnp.swapaxes(part, 1, 2)


def put_rows(array, view: View, tile: Tile, update, owned_from):
    """Write rows `[nb, nh, size, ...]` into `[B, T, N, ...]`, except those above `owned_from`, the neighbor's."""
    begin = [view.b, tile.row, view.h] + [0] * (array.ndim - 3)
    update = jnp.swapaxes(update, 1, 2).astype(array.dtype)
    old = jax.lax.dynamic_slice(array, starts32(begin), update.shape)
    if owned_from is not None:
        owned = tile.row + jnp.arange(update.shape[1]) >= owned_from
        update = jnp.where(owned.reshape(1, -1, *[1] * (update.ndim - 2)), update, old)
    return jax.lax.dynamic_update_slice(array, update, starts32(begin))


def tile_start(tile, block: int, size: int):
    """First slot of a tile: the last one of a ragged axis is moved back, so that no axis needs padding."""
    return jnp.minimum(tile * block, size - block)


def make_tile(problem: Problem, slots: Slots, schedule: Schedule, view: View, i, j, partial: bool) -> Tile:
    """The tile of query tile `i` and key tile `j`."""
    length, source = _slot_counts(problem, slots)
    blocks = (schedule.query_block, schedule.key_block)
    row, column = tile_start(i, blocks[0], length), tile_start(j, blocks[1], source)
    rows = (row + jnp.arange(blocks[0], dtype=jnp.int32))[None, None, :, None]
    columns = (column + jnp.arange(blocks[1], dtype=jnp.int32))[None, None, None, :]
    query_token, query_position = _tokens(slots.query_tokens, problem.query_positions, view, rows, row, blocks[0], 2)
    key_token, key_position = _tokens(slots.key_tokens, problem.key_positions, view, columns, column, blocks[1], 3)
    tile = Tile(row, column, query_token, key_token, query_position, key_position, None)
    if not partial:
        return tile
    visible = _visible(problem, slots, schedule, view, tile, i, j, rows, columns)
    if schedule.guard == "none":
        return tile._replace(visible=visible)
    if schedule.guard == "segments":
        # Keys that nobody sees are padding, and were hidden when the head's keys were cut out.
        query_ids, _ = _segments(problem, view, tile, slots, blocks)
        return tile._replace(visible=visible, seeing=query_ids >= 0)
    seen = visible.any(-2)[..., None]
    if seen.shape[1] != 1:
        seen = seen.reshape(seen.shape[0], view.kv_heads, view.group, -1, 1).any(2)
    return tile._replace(visible=visible, seeing=visible.any(-1, keepdims=True), seen=seen)


def _segments(problem: Problem, view: View, tile: Tile, slots: Slots, blocks):
    """Segment ids of the tile's queries `[nb|1, 1, Bq, 1]` and keys `[nb|1, 1, 1, Bk]`."""
    query_ids = read(problem.query_segments[:, None, :, None], view, tile, slots, blocks)
    return query_ids, read(problem.key_segments[:, None, None, :], view, tile, slots, blocks)


def _slot_counts(problem: Problem, slots: Slots) -> tuple[int, int]:
    _, length, source, _, _ = problem.sizes
    length = length if slots.query_tokens is None else slots.query_tokens.shape[2]
    return length, source if slots.key_tokens is None else slots.key_tokens.shape[2]


def _tokens(tokens, given, view: View, slot, start, block: int, axis: int):
    """Token and position of every slot, `[nb|1, nh|1, Bq, 1]` or `[nb|1, nh|1, 1, Bk]`."""
    expand = (lambda x: x[..., :, None]) if axis == 2 else (lambda x: x[..., None, :])
    token = slot if tokens is None else expand(cut(tokens, view, (start,), (block,)))
    if given is None:
        return token, token
    if tokens is None:
        return token, expand(cut(given[:, None], view, (start,), (block,)))
    b = 0 if given.shape[0] == 1 else view.b + jnp.arange(view.rows).reshape(-1, 1, 1, 1)
    return token, given[b, jnp.maximum(token, 0)]


def _visible(problem: Problem, slots: Slots, schedule: Schedule, view: View, tile: Tile, i, j, rows, columns):
    sizes = _slot_counts(problem, slots)
    blocks = (schedule.query_block, schedule.key_block)
    heads = (view.b + jnp.arange(view.rows).reshape(-1, 1, 1, 1), view.h + jnp.arange(view.heads).reshape(1, -1, 1, 1))
    terms = []
    if sizes[0] % blocks[0]:
        terms.append(rows >= i * blocks[0])
    if sizes[1] % blocks[1]:
        terms.append(columns >= j * blocks[1])
    if slots.query_tokens is not None:
        terms.append(tile.query_token >= 0)
    if slots.key_tokens is not None:
        terms.append(tile.key_token >= 0)
    if problem.mask is not None:
        terms.append(problem.mask(*heads, tile.query_position, tile.key_position))
    if problem.query_segments is not None:
        query_ids, key_ids = _segments(problem, view, tile, slots, blocks)
        terms.append((query_ids == key_ids) & (query_ids >= 0))
    terms += [read(array, view, tile, slots, blocks) for array in problem.mask_arrays]
    if problem.layout is not None:
        terms.append(_in_layout(problem, view, tile, heads, i, j, rows, columns))
    visible = jnp.ones((1, 1, *blocks), bool)
    for term in terms:
        visible = visible & term
    return visible


def _in_layout(problem: Problem, view: View, tile: Tile, heads, i, j, rows, columns):
    """What the layout says: the tile is live for the head, and full or allowed by the predicate."""

    def bit(tile_map):
        entry = heads[1] // (problem.sizes[3] // tile_map.shape[1])
        return tile_map[heads[0] if tile_map.shape[0] != 1 else 0, entry, i, j]

    allowed = bit(problem.layout.live_map())
    predicate = problem.layout.predicate
    if predicate is None:
        return allowed
    position = (jnp.maximum(tile.query_position, 0), jnp.maximum(tile.key_position, 0))
    return allowed & (bit(problem.layout.full_map()) | predicate.at(*heads, *position, rows, columns))


def read(array, view: View, tile: Tile, slots: Slots, blocks):
    """The part of `[B|1, N|1, T|1, S|1]` that a tile reads, by slice or, where slots are permuted, by token."""
    if slots.query_tokens is None and slots.key_tokens is None:
        return cut(array, view, (tile.row, tile.column), blocks)
    return array[token_index(array, view, tile)]


def token_index(array, view: View, tile: Tile):
    """Index arrays of a tile in `[B|1, N|1, T|1, S|1]`; empty slots read token 0."""
    index = (
        view.b + jnp.arange(view.rows).reshape(-1, 1, 1, 1),
        view.h + jnp.arange(view.heads).reshape(1, -1, 1, 1),
        jnp.maximum(tile.query_token, 0),
        jnp.maximum(tile.key_token, 0),
    )
    return tuple(x if n != 1 else jnp.zeros((1,) * 4, jnp.int32) for x, n in zip(index, array.shape, strict=True))


# Keys and values are also kept turned, `[nb, nk, D, S]`, once a head: turning them tile by tile costs a tenth of it.
KEY_NAMES = ("key", "key_turned", "value", "value_turned")


class Sides(NamedTuple):
    """Scaled queries `[nb, nk, group, Bq, D]`, keys and values `[nb, nk, Bk, ...]` of a tile, these also turned.

    What nobody in the tile may see is zero already: 0 * NaN is NaN, so it must be gone before any product.
    """

    query: Any
    key: Any
    key_turned: Any
    value: Any
    value_turned: Any


def tile_sides(problem: Problem, view: View, tile: Tile, values: dict[str, Any]) -> Sides:
    """Both sides of a tile, ready for the products."""
    query, keys = values["query"], [values[n] for n in KEY_NAMES]
    if tile.seeing is not None:
        query = jnp.where(tile.seeing, query, 0)
    if tile.seen is not None:
        seen = (tile.seen, jnp.swapaxes(tile.seen, 2, 3))
        keys = [jnp.where(there, x, 0) for there, x in zip(seen * 2, keys, strict=True)]
    return Sides(grouped(view, query * problem.scale), *keys)


def products(problem: Problem, view: View, sides: Sides):
    """scale * q . k, `[nb, nh, Bq, Bk]`."""
    logits = jnp.einsum("bkgtd,bkds->bkgts", sides.query, sides.key_turned, precision=problem.precision)
    return logits.reshape(view.rows, view.heads, *logits.shape[3:])


def modified(problem: Problem, view: View, tile: Tile, logits, values: dict[str, Any]):
    """The logits after cap, score mod and bias; not masked, but free of what nobody may see."""
    if tile.visible is not None and (problem.score_mod is not None or problem.logit_soft_cap is not None):
        logits = jnp.where(tile.visible, logits, 0)
    place = (tile.query_position, tile.key_position)
    operands = values.get("operands", {})
    if problem.score_mod is not None:
        centers = {n: o.offset_center() for n, o in problem.score_mod.flat_operands().items() if o.kind == "offset"}
        operands = {n: _offsets(x, centers[n], *place) if n in centers else x for n, x in operands.items()}
    heads = (view.b + jnp.arange(view.rows).reshape(-1, 1, 1, 1), view.h + jnp.arange(view.heads).reshape(1, -1, 1, 1))
    return modify_logits(problem, logits, operands, values.get("bias"), *heads, *place)


def tile_logits(problem: Problem, view: View, tile: Tile, values: dict[str, Any]):
    """Modified, unmasked logits `[nb, nh, Bq, Bk]` and the values `[nb, nk, Bk, Dv]` to mix."""
    sides = tile_sides(problem, view, tile, values)
    return modified(problem, view, tile, products(problem, view, sides), values), sides.value


def _offsets(table, center: int, i, j):
    shared = i.shape[:2] == j.shape[:2] == (1, 1)
    if shared:
        return offset_tile(table, center, i[0, 0], j[0, 0])
    index = jnp.clip(j - i + center, 0, table.shape[-1] - 1)
    shape = jnp.broadcast_shapes(table.shape[:2], index.shape[:2])
    flat = jnp.broadcast_to(index, (*shape, *index.shape[2:])).reshape(*shape, -1)
    found = jnp.take_along_axis(jnp.broadcast_to(table, (*shape, table.shape[-1])), flat, axis=-1)
    return found.reshape(*shape, *index.shape[2:])


def dropped(problem: Problem, view: View, tile: Tile, raw):
    """Weights `[nb, nh, Bq, Bk]` after dropout."""
    heads = (view.b + jnp.arange(view.rows).reshape(-1, 1, 1, 1), view.h + jnp.arange(view.heads).reshape(1, -1, 1, 1))
    return drop_pairs(problem, raw, *heads, tile.query_token, tile.key_token)


def grouped(view: View, array):
    """`[nb, nh, ...]` as `[nb, nk, group, ...]`."""
    return array.reshape(view.rows, view.kv_heads, view.group, *array.shape[2:])


def mix(problem: Problem, view: View, weights, value):
    """Weights `[nb, nh, Bq, Bk]` times values, `[nb, nh, Bq, Dv]`."""
    out = jnp.einsum("bkgts,bksd->bkgtd", grouped(view, weights), value, precision=problem.precision)
    return out.reshape(view.rows, view.heads, *out.shape[3:])


# phi(logits, visible, rows) -> unnormalized weights `[nb, nh, Bq, Bk]`, 0 where not visible.
Phi = Callable[[Any, Any, dict[str, Any]], Any]


def named_in(names: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The entries of (nested) `values` that `names` has too."""
    return {n: {m: values[n][m] for m in x} if isinstance(x, dict) else values[n] for n, x in names.items()}


def replaced(values: dict[str, Any], free: dict[str, Any]) -> dict[str, Any]:
    """`values` with the entries of (nested) `free` in place of its own."""
    return {**values, **{n: {**values[n], **x} if isinstance(x, dict) else x for n, x in free.items()}}


def tile_weights(problem: Problem, view: View, tile: Tile, phi: Phi, logits, values: dict[str, Any]):
    """Weights `[nb, nh, Bq, Bk]` after dropout, and the sums `[nb, nh, Bq]` of those before it."""
    raw = phi(modified(problem, view, tile, logits, values), tile.visible, values.get("rows", {}))
    return dropped(problem, view, tile, raw), raw.sum(-1)


def of_seeing(tile: Tile, weighted, total):
    """What belongs to rows `[nb, nh, Bq, Dv]` and `[nb, nh, Bq]`, 0 for those that see nothing in the tile."""
    if tile.seeing is None:
        return weighted, total
    return jnp.where(tile.seeing, weighted, 0), jnp.where(tile.seeing[..., 0], total, 0)


def tile_terms(problem: Problem, view: View, tile: Tile, phi: Phi, values: dict[str, Any]):
    """What a tile adds to its rows: sum_j phi_ij v_j `[nb, nh, Bq, Dv]` and sum_j phi_ij `[nb, nh, Bq]`."""
    sides = tile_sides(problem, view, tile, values)
    weights, total = tile_weights(problem, view, tile, phi, products(problem, view, sides), values)
    return of_seeing(tile, mix(problem, view, weights, sides.value), total)


def pull_terms(problem: Problem, view: View, tile: Tile, phi: Phi, values, names, cotangents):
    """Transpose of the derivative of `tile_terms` in the entries of `values` that (nested) `names` lists.

    The cotangents of keys and values come out turned, `[nb, nk, D, Bk]`: as products that leave the `[Bq, Bk]` factor
    as it lies. (Turning it, as the derivative of the product would, costs as much as a product.)
    """
    sides = tile_sides(problem, view, tile, values)
    rest = {n: x for n, x in names.items() if n not in ("query", "key", "value")}

    def weigh(logits, free):
        return tile_weights(problem, view, tile, phi, logits, replaced(values, free))

    (weights, _), pull = jax.vjp(weigh, products(problem, view, sides), named_in(rest, values))
    # Also a cotangent that is NaN in a row that sees nothing stops here.
    weighted, total = of_seeing(tile, *cotangents)
    weighted = grouped(view, weighted)
    pulled = jnp.einsum("bkgtd,bkds->bkgts", weighted, sides.value_turned, precision=problem.precision)
    pulled, added = pull((pulled.reshape(weights.shape), total))
    pulled = grouped(view, pulled)
    over_rows = (((2, 3), (2, 3)), ((0, 1), (0, 1)))
    if "query" in names:
        query = jnp.einsum("bkgts,bksd->bkgtd", pulled, sides.key, precision=problem.precision) * problem.scale
        added["query"] = query.reshape(view.rows, view.heads, *query.shape[3:])
    if "key" in names:
        added["key"] = jax.lax.dot_general(sides.query, pulled, over_rows, precision=problem.precision)
    if "value" in names:
        value = jax.lax.dot_general(weighted, grouped(view, weights), over_rows, precision=problem.precision)
        added["value"] = value if tile.seen is None else jnp.where(jnp.swapaxes(tile.seen, 2, 3), value, 0)
    return added
