"""Loops over heads and over live tiles, and the three programs made of them: forward, tangent and transpose."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jattn.softmax.blockwise import tiles
from jattn.softmax.blockwise.schedule import Schedule
from jattn.softmax.blockwise.tiles import Phi, Slots, Tile, View, cut, cut_rows, put_rows, starts32
from jattn.softmax.platforms import current
from jattn.softmax.problem import Problem

Sources = dict[str, Any]


def one_head_at_a_time() -> bool:
    """Heads go one after the other only on a single CPU device: elsewhere a loop over them would serialize devices."""
    return current().name == "cpu" and jax.device_count() == 1


def varying_like(tree: Any, *sources: Any) -> Any:
    """Mark the arrays of `tree` as varying over every mesh axis that `sources` vary over (shard_map's check_vma)."""
    zeros = [jnp.zeros_like(x, shape=(), dtype=jnp.int32) for x in jax.tree.leaves((tree, sources))]
    joined = sum(zeros)

    def mark(x):
        if jax.typeof(jnp.zeros_like(x, shape=(), dtype=jnp.int32)) == jax.typeof(joined):
            return x
        return x | (joined != 0) if x.dtype == bool else x + joined.astype(x.dtype)

    return jax.tree.map(lambda x: mark(jnp.asarray(x)), tree)


def rows_like(array, fill, dtype, width: int | None = None):
    """`fill` for every row of `[..., D]`: `[...]`, or `[..., width]`, sharded and varying as the array is."""
    if width is None:
        return jnp.full_like(array[..., 0], fill, dtype)
    return jnp.broadcast_to(jnp.full_like(array[..., :1], fill, dtype), (*array.shape[:-1], width))


def over_heads(problem: Problem, schedule: Schedule, carry, body):
    """`carry = body(view, lists, carry)` for every head, one at a time or all at once; lists are those of the view."""
    batch, _, _, num_heads, kv_heads = problem.sizes
    lists = (schedule.full_count, schedule.full_index, schedule.partial_count, schedule.partial_index)
    if not one_head_at_a_time():
        view = View(0, 0, batch, num_heads, kv_heads, num_heads // kv_heads)
        return body(view, [x[0, 0] for x in lists], carry)

    def step(n, carry):
        b, h = n // num_heads, n % num_heads
        own = [x[b if x.shape[0] != 1 else 0, h if x.shape[1] != 1 else 0] for x in lists]
        return body(View(b, h, 1, 1, 1, 1), own, carry)

    return jax.lax.fori_loop(0, batch * num_heads, step, carry)


def visit(schedule: Schedule, lists, i, state, body):
    """`state = body(j, partial, state)` for the live key tiles of query tile `i`: full ones, then partial ones."""
    full_count, full_index, partial_count, partial_index = lists
    for exists, count, index, partial in (
        (schedule.any_full, full_count, full_index, False),
        (schedule.any_partial, partial_count, partial_index, True),
    ):
        if exists:
            state = jax.lax.fori_loop(
                0, count[i], lambda m, state, index=index, partial=partial: body(index[i, m], partial, state), state
            )
    return state


def kv_head(problem: Problem, view: View):
    """First kv head of the view."""
    return view.h // (problem.sizes[3] // problem.sizes[4])


def local_keys(problem: Problem, view: View, array):
    """`[B, S, K, D]` of the view's kv heads as contiguous `[nb, nk, S, D]` in the computing dtype."""
    begin = (view.b, 0, kv_head(problem, view), 0)
    part = jax.lax.dynamic_slice(array, starts32(begin), (view.rows, array.shape[1], view.kv_heads, array.shape[3]))
    return jnp.swapaxes(part, 1, 2).astype(problem.compute_dtype)


def localize(problem: Problem, schedule: Schedule, view: View, sources: Sources) -> Sources:
    """The sources with keys and values replaced by the view's own, as they are and turned."""
    local: Sources = {n: local_keys(problem, view, sources[n]) for n in ("key", "value") if n in sources}
    if schedule.guard == "segments":
        ids = cut(problem.key_segments[:, None, :, None], view, (0, 0), (problem.sizes[2], 1))
        local = {n: jnp.where(ids >= 0, x, 0) for n, x in local.items()}
    return {**sources, **local, **{f"{n}_turned": jnp.swapaxes(x, 2, 3) for n, x in local.items()}}


def read_values(
    problem: Problem, slots: Slots, schedule: Schedule, view: View, tile: Tile, sources: Sources
) -> Sources:
    """The parts of (localized) sources that a tile reads."""
    blocks = (schedule.query_block, schedule.key_block)
    dtype = problem.compute_dtype
    values: Sources = {}
    for name, source in sources.items():
        if name == "query":
            values[name] = cut_rows(source, view, tile.row, blocks[0]).astype(dtype)
        elif name in tiles.KEY_NAMES:
            axis = 3 if name.endswith("_turned") else 2
            values[name] = jax.lax.dynamic_slice_in_dim(source, tile.column, blocks[1], axis=axis)
        elif name == "bias":
            values[name] = tiles.read(source, view, tile, slots, blocks).astype(dtype)
        elif name == "rows":
            values[name] = {n: cut_rows(x, view, tile.row, blocks[0])[..., None] for n, x in source.items()}
        else:
            values[name] = {
                n: cut(x, view, (0,), (x.shape[2],)) if x.ndim == 3 else tiles.read(x, view, tile, slots, blocks)
                for n, x in source.items()
            }
    return values


def owned_from(problem: Problem, slots: Slots, schedule: Schedule, i):
    """First row that query tile `i` owns, None if it owns all of its rows."""
    length = problem.sizes[1] if slots.query_tokens is None else slots.query_tokens.shape[2]
    return i * schedule.query_block if length % schedule.query_block else None


def online_softmax(problem: Problem, slots: Slots, schedule: Schedule, sources: Sources):
    """Output `[B, slots, N, Dv]` and lse `[B, slots, N]` of the softmax, one pass over the live tiles."""
    dtype, query, value = problem.compute_dtype, sources["query"], sources["value"]
    carry = (rows_like(query, 0, dtype, value.shape[3]), rows_like(query, -jnp.inf, dtype))
    carry = varying_like(carry, sources, problem, slots, schedule)

    def head(view: View, lists, carry):
        local = localize(problem, schedule, view, sources)

        def query_tile(i, carry):
            rows = query_rows(problem, slots, schedule, view, query, i)
            state = (
                rows_like(rows, -jnp.inf, dtype),
                rows_like(rows, 0, dtype),
                rows_like(rows, 0, dtype, value.shape[3]),
            )
            state = varying_like(state, carry)

            def key_tile(j, partial: bool, state):
                tile = tiles.make_tile(problem, slots, schedule, view, i, j, partial)
                values = read_values(problem, slots, schedule, view, tile, local)
                logits, value = tiles.tile_logits(problem, view, tile, values)
                if tile.visible is not None:
                    logits = jnp.where(tile.visible, logits, -jnp.inf)
                return _online_step(problem, view, tile, logits, value, state)

            maximum, total, weighted = visit(schedule, lists, i, state, key_tile)
            alive = total != 0  # NaN that somebody may see stays NaN
            lse = jnp.where(alive, maximum + jnp.log(jnp.where(alive, total, 1)), -jnp.inf)
            out = weighted / jnp.where(alive, total, 1)[..., None]
            tile = _row_tile(problem, slots, schedule, i)
            border = owned_from(problem, slots, schedule, i)
            return put_rows(carry[0], view, tile, out, border), put_rows(carry[1], view, tile, lse, border)

        return jax.lax.fori_loop(0, schedule.code.shape[2], query_tile, carry)

    return over_heads(problem, schedule, carry, head)


def _online_step(problem: Problem, view: View, tile: Tile, logits, value, state):
    maximum, total, weighted = state
    new = jnp.maximum(maximum, logits.max(-1))
    shift = jnp.where(new == -jnp.inf, 0, new)
    raw, decay = jnp.exp(logits - shift[..., None]), jnp.exp(maximum - shift)
    return (
        new,
        total * decay + raw.sum(-1),
        weighted * decay[..., None] + tiles.mix(problem, view, tiles.dropped(problem, view, tile, raw), value),
    )


def query_rows(problem: Problem, slots: Slots, schedule: Schedule, view: View, query, i):
    """The queries `[nb, nh, Bq, D]` of query tile `i`."""
    return cut_rows(query, view, _row_tile(problem, slots, schedule, i).row, schedule.query_block)


def _row_tile(problem: Problem, slots: Slots, schedule: Schedule, i) -> Tile:
    length = problem.sizes[1] if slots.query_tokens is None else slots.query_tokens.shape[2]
    return Tile(tiles.tile_start(i, schedule.query_block, length), None, None, None, None, None, None)


def sums(problem: Problem, slots: Slots, schedule: Schedule, phi: Phi, sources: Sources, moving: Sources | None = None):
    """sum_j phi_ij v_j `[B, slots, N, Dv]` and sum_j phi_ij `[B, slots, N]`, or their tangents along `moving`."""
    dtype, query, value = problem.compute_dtype, sources["query"], sources["value"]
    carry = (rows_like(query, 0, dtype, value.shape[3]), rows_like(query, 0, dtype))
    carry = varying_like(carry, sources, moving, problem, slots, schedule)

    def head(view: View, lists, carry):
        local = localize(problem, schedule, view, sources)
        local_moving = None if moving is None else localize(problem, schedule, view, moving)

        def query_tile(i, carry):
            rows = query_rows(problem, slots, schedule, view, query, i)
            state = varying_like((rows_like(rows, 0, dtype, value.shape[3]), rows_like(rows, 0, dtype)), carry)

            def key_tile(j, partial: bool, state):
                tile = tiles.make_tile(problem, slots, schedule, view, i, j, partial)
                added = tile_sums(problem, slots, schedule, view, tile, phi, local, local_moving)
                return jax.tree.map(jnp.add, state, added)

            state = visit(schedule, lists, i, state, key_tile)
            tile, border = _row_tile(problem, slots, schedule, i), owned_from(problem, slots, schedule, i)
            return tuple(put_rows(x, view, tile, y, border) for x, y in zip(carry, state, strict=True))

        return jax.lax.fori_loop(0, schedule.code.shape[2], query_tile, carry)

    return over_heads(problem, schedule, carry, head)


def reduce_rows(problem: Problem, slots: Slots, schedule: Schedule, sources: Sources, of_tile, start, join):
    """`join` over the live tiles of `of_tile(view, tile, values) -> [nb, nh, Bq]`, from `start`: `[B, slots, N]`."""
    carry = rows_like(sources["query"], start, start.dtype)
    carry = varying_like(carry, sources, problem, slots, schedule)

    def head(view: View, lists, carry):
        local = localize(problem, schedule, view, sources)

        def query_tile(i, carry):
            rows = query_rows(problem, slots, schedule, view, sources["query"], i)
            state = varying_like(rows_like(rows, start, start.dtype), carry)

            def key_tile(j, partial: bool, state):
                tile = tiles.make_tile(problem, slots, schedule, view, i, j, partial)
                values = read_values(problem, slots, schedule, view, tile, local)
                return join(state, of_tile(view, tile, values))

            state = visit(schedule, lists, i, state, key_tile)
            border = owned_from(problem, slots, schedule, i)
            return put_rows(carry, view, _row_tile(problem, slots, schedule, i), state, border)

        return jax.lax.fori_loop(0, schedule.code.shape[2], query_tile, carry)

    return over_heads(problem, schedule, carry, head)


def tile_sums(problem, slots, schedule, view, tile, phi, sources, moving):
    """What a tile adds to `sums`; with `moving`, the tangent of that."""
    values = read_values(problem, slots, schedule, view, tile, sources)
    if moving is None:
        return tiles.tile_terms(problem, view, tile, phi, values)
    dots = read_values(problem, slots, schedule, view, tile, moving)
    terms = lambda free: tiles.tile_terms(problem, view, tile, phi, tiles.replaced(values, free))  # noqa: E731
    return jax.jvp(terms, (tiles.named_in(dots, values),), (dots,))[1]


def pull_back(
    problem: Problem, slots: Slots, schedule: Schedule, phi: Phi, sources: Sources, cotangents, like: Sources
):
    """Transpose of the tangent of `sums`: cotangents of the two sums in, those of the sources named in `like` out.

    One pass over the live tiles: the rows' cotangents stay with their query tile, those of keys and values in one
    buffer a head, those of bias and operands in one buffer in all; nothing is added concurrently.
    """
    dtype = problem.compute_dtype
    carry = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.promote_types(x.dtype, dtype)), like)
    carry = varying_like(carry, sources, cotangents, problem, slots, schedule)
    blocks = (schedule.query_block, schedule.key_block)
    row_names, key_names = [n for n in like if n in ("query", "rows")], [n for n in like if n in ("key", "value")]

    def head(view: View, lists, carry):
        local = localize(problem, schedule, view, sources)
        keys = {n: _turned_zeros(local[f"{n}_turned"]) for n in key_names}
        keys = varying_like(keys, carry)
        rest = {n: x for n, x in carry.items() if n not in key_names}

        def query_tile(i, state):
            keys, rest = state
            start = _row_tile(problem, slots, schedule, i)
            incoming = tuple(cut_rows(x, view, start.row, blocks[0]).astype(dtype) for x in cotangents)
            rows = {n: _row_zeros(like[n], view, start.row, blocks[0], dtype) for n in row_names}
            rows = varying_like(rows, carry)

            def key_tile(j, partial: bool, state):
                rows, keys, rest = state
                tile = tiles.make_tile(problem, slots, schedule, view, i, j, partial)
                values = read_values(problem, slots, schedule, view, tile, local)
                added = tiles.pull_terms(problem, view, tile, phi, values, like, incoming)
                rows = {n: jax.tree.map(jnp.add, rows[n], added[n]) for n in rows}
                keys = {n: _add_slice(keys[n], added[n], tile.column) for n in keys}
                rest = _add_rest(rest, added, view, tile, slots)
                return rows, keys, rest

            rows, keys, rest = visit(schedule, lists, i, (rows, keys, rest), key_tile)
            border = owned_from(problem, slots, schedule, i)
            for n in row_names:
                put = lambda x, y: put_rows(x, view, start, y if n == "query" else y[..., 0], border)  # noqa: B023, E731
                rest = {**rest, n: jax.tree.map(put, rest[n], rows[n])}
            return keys, rest

        keys, rest = jax.lax.fori_loop(0, schedule.code.shape[2], query_tile, (keys, rest))
        return {n: _put_keys(problem, view, carry[n], keys[n]) if n in keys else rest[n] for n in carry}

    out = over_heads(problem, schedule, carry, head)
    return jax.tree.map(lambda x, y: x.astype(y.dtype), out, like)


def _row_zeros(like, view: View, row, block: int, dtype):
    def zeros(x):
        rows = cut_rows(x, view, row, block)
        return jnp.zeros_like(rows if x.ndim == 4 else rows[..., None], dtype)

    return jax.tree.map(zeros, like)


def _turned_zeros(turned):
    # Rows a power of two apart fall into the same lines of a processor's cache; turning them back takes thrice as long.
    return jnp.pad(jnp.zeros_like(turned), [(0, 0), (0, 0), (0, 0), (0, 16)])


def _add_slice(buffer, added, column):
    old = jax.lax.dynamic_slice_in_dim(buffer, column, added.shape[3], axis=3)
    return jax.lax.dynamic_update_slice_in_dim(buffer, old + added, column, axis=3)


def _put_keys(problem: Problem, view: View, buffer, local):
    """Put turned cotangents `[nb, nk, D, S]` into `[B, S, K, D]`."""
    begin = starts32((view.b, 0, kv_head(problem, view), 0))
    update = jnp.transpose(local, (0, 3, 1, 2))[:, : buffer.shape[1]].astype(buffer.dtype)
    if problem.sizes[3] != problem.sizes[4]:  # Heads of a group add to the same keys.
        update = update + jax.lax.dynamic_slice(buffer, begin, update.shape)
    return jax.lax.dynamic_update_slice(buffer, update, begin)


def _add_rest(rest: Sources, added: Sources, view: View, tile: Tile, slots: Slots) -> Sources:
    """Add a tile's cotangents of bias and operands where the tile has read them."""
    new = dict(rest)
    if "bias" in rest:
        new["bias"] = _add_at(rest["bias"], added["bias"], view, tile, slots)
    if "operands" in rest:
        new["operands"] = {n: _add_at(x, added["operands"][n], view, tile, slots) for n, x in rest["operands"].items()}
    return new


def _add_at(buffer, added, view: View, tile: Tile, slots: Slots):
    if buffer.ndim == 4 and (slots.query_tokens is not None or slots.key_tokens is not None):
        return buffer.at[tiles.token_index(buffer, view, tile)].add(added)
    begin = [view.b, view.h, tile.row, tile.column] if buffer.ndim == 4 else [view.b, view.h, 0]
    begin = [start if n != 1 else 0 for start, n in zip(begin, buffer.shape, strict=True)]
    old = jax.lax.dynamic_slice(buffer, starts32(begin), added.shape)
    return jax.lax.dynamic_update_slice(buffer, old + added, starts32(begin))
