"""Forward values with their differentiation rules, for the softmax and for pointwise normalizers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jattn.softmax.blockwise import loops, tiles
from jattn.softmax.blockwise.linear_map import Programs, linear_map
from jattn.softmax.blockwise.schedule import Schedule, make_schedule
from jattn.softmax.blockwise.tiles import Slots, View
from jattn.softmax.masks import DEAD
from jattn.softmax.normalizers import Normalizer, Reweighted, Softmax
from jattn.softmax.problem import Problem, slot_tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Setting:
    """Everything a pass over the tiles needs that carries no gradient; `stage` says what phi is.

    With `kernel`, forward and backward passes are the kernel's; tangents, and derivatives of derivatives, are not.
    `narrow` has its softmax return the output in the queries' dtype, since nothing is done to it afterwards.
    """

    problem: Problem
    slots: Slots
    schedule: Schedule
    stage: Any = dataclasses.field(metadata={"static": True})
    kernel: Any = dataclasses.field(default=None, metadata={"static": True})
    narrow: bool = dataclasses.field(default=False, metadata={"static": True})

    def phi(self, logits, visible, rows):
        """Unnormalized weights of a tile."""
        if isinstance(self.stage, Softmax):
            masked = logits if visible is None else jnp.where(visible, logits, -jnp.inf)
            return jnp.exp(masked - rows["lse"])
        safe = logits if visible is None else jnp.where(visible, logits, 0)
        if isinstance(self.stage, Reweighted):
            raw = _second_pass(self.stage, safe, rows)
        else:
            raw = self.stage.phi(safe)
        return raw if visible is None else jnp.where(visible, raw, 0)


def _second_pass(stage: Reweighted, logits, rows):
    """The re-weighted, unnormalized weights, from what the first pass has left in `rows`."""
    if isinstance(stage.base, Softmax):
        base = jnp.exp(logits - rows["lse"])
    else:
        base = stage.base.phi(logits) * rows["scale"]
    return stage.sharpen(stage.excess(base, rows["count"]), rows["largest"])


def _programs(setting: Setting, names) -> Programs:
    def forward(residuals, moving):
        setting, sources = residuals
        return loops.sums(setting.problem, setting.slots, setting.schedule, setting.phi, sources, moving)

    def transpose(residuals, cotangents):
        setting, sources = residuals
        like = _named(sources, names)
        staged = dataclasses.replace(setting.problem, normalizer=setting.stage)
        if setting.kernel is not None and setting.kernel.pulls(staged, like):
            return setting.kernel.pull_back(staged, sources, cotangents, like)
        return loops.pull_back(setting.problem, setting.slots, setting.schedule, setting.phi, sources, cotangents, like)

    return Programs(forward, transpose, lambda residuals, moving: _plain_sums(*residuals, moving))


def _named(sources, names):
    """The part of nested sources that `names`, a tuple of (name, subnames or None), lists."""
    return {n: sources[n] if sub is None else {m: sources[n][m] for m in sub} for n, sub in names}


def _plain_sums(setting: Setting, sources, moving):
    """The tangent of `loops.sums` as a checkpointed scan over all tiles: differentiable any number of times."""
    problem, slots, schedule = setting.problem, setting.slots, setting.schedule
    batch, _, _, num_heads, kv_heads = problem.sizes
    view = View(0, 0, batch, num_heads, kv_heads, num_heads // kv_heads)
    live = (schedule.code != DEAD).any((0, 1))
    local, local_moving = (loops.localize(problem, schedule, view, x) for x in (sources, moving))
    query, value = sources["query"], sources["value"]
    dtype = problem.compute_dtype
    zeros = (loops.rows_like(query, 0, dtype, value.shape[3]), loops.rows_like(query, 0, dtype))
    zeros = loops.varying_like(zeros, sources, moving, setting)

    @jax.checkpoint
    def tile_sums(i, j, local, local_moving):
        tile = tiles.make_tile(problem, slots, schedule, view, i, j, True)
        return loops.tile_sums(problem, slots, schedule, view, tile, setting.phi, local, local_moving)

    def query_tile(carry, i):
        rows = loops.query_rows(problem, slots, schedule, view, query, i)
        state = (loops.rows_like(rows, 0, dtype, value.shape[3]), loops.rows_like(rows, 0, dtype))
        state = loops.varying_like(state, carry)

        def key_tile(state, j):
            add = lambda: jax.tree.map(jnp.add, state, tile_sums(i, j, local, local_moving))  # noqa: E731
            return jax.lax.cond(live[i, j], add, lambda: state), None

        state, _ = jax.lax.scan(key_tile, state, jnp.arange(live.shape[1]))
        start = tiles.tile_start(i, schedule.query_block, carry[0].shape[1])
        # Rows that belong to the neighbor are masked, so adding leaves them alone.
        return tuple(_add_rows(x, y, start) for x, y in zip(carry, state, strict=True)), None

    return jax.lax.scan(query_tile, zeros, jnp.arange(live.shape[0]))[0]


def _add_rows(array, update, start):
    update = jnp.swapaxes(update, 1, 2)
    old = jax.lax.dynamic_slice_in_dim(array, start, update.shape[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(array, old + update, start, axis=1)


def _moving(tangents):
    """Tangents that are not symbolically zero, and their names."""
    found: dict[str, Any] = {}
    names: list[tuple[str, Any]] = []
    for name, tangent in tangents.items():
        if isinstance(tangent, dict):
            inner = {n: t for n, t in tangent.items() if not isinstance(t, SymbolicZero)}
            if inner:
                found[name], names = inner, [*names, (name, tuple(inner))]
        elif not isinstance(tangent, SymbolicZero):
            found[name], names = tangent, [*names, (name, None)]
    return found, tuple(names)


def _tangent(setting: Setting, sources, tangents, like):
    moving, names = _moving(tangents)
    residuals = loops.varying_like((setting, sources), setting, sources, moving)
    moving = loops.varying_like(moving, setting, sources)
    return linear_map(_programs(setting, names), residuals, moving, like)


@jax.custom_jvp
def softmax_core(setting: Setting, sources):
    """Output and lse of the softmax, in slot space: `[B, slots, N, Dv]`, `[B, slots, N]`."""
    if setting.kernel is not None:
        dtype = sources["query"].dtype if setting.narrow else setting.problem.compute_dtype
        return setting.kernel.forward(dataclasses.replace(setting.problem, normalizer=Softmax()), sources, dtype)
    return loops.online_softmax(setting.problem, setting.slots, setting.schedule, sources)


def _softmax_rule(primals, tangents):
    setting, sources = primals
    out, lse = softmax_core(setting, sources)
    if not _moving(tangents[1])[0]:
        return (out, lse), (jnp.zeros_like(out), jnp.zeros_like(lse))
    held = {**sources, "rows": {"lse": jnp.where(lse == -jnp.inf, 0, lse)}}
    wide = out.astype(lse.dtype)
    weighted, total = _tangent(setting, held, tangents[1], (wide, lse))
    # A cotangent that is NaN in a row whose keys a bias of -inf hides stops here.
    alive = lse != -jnp.inf
    # As a dot: the transpose of a plain product, a sum of products over the last axis, is fifty times slower on CPUs.
    shifted = jnp.einsum("btn,btnd->btnd", total, wide, precision=jax.lax.Precision.HIGHEST)
    moved = jnp.where(alive[..., None], weighted - shifted, 0).astype(out.dtype)
    return (out, lse), (moved, jnp.where(alive, total, 0))


softmax_core.defjvp(_softmax_rule, symbolic_zeros=True)


@jax.custom_jvp
def pointwise_core(setting: Setting, sources):
    """sum_j phi_ij v_j and sum_j phi_ij, in slot space."""
    if setting.kernel is not None:
        staged = dataclasses.replace(setting.problem, normalizer=setting.stage)
        return setting.kernel.forward(staged, sources, setting.problem.compute_dtype)
    return loops.sums(setting.problem, setting.slots, setting.schedule, setting.phi, sources)


def _pointwise_rule(primals, tangents):
    setting, sources = primals
    out = pointwise_core(setting, sources)
    if not _moving(tangents[1])[0]:
        return out, jax.tree.map(jnp.zeros_like, out)
    return out, _tangent(setting, sources, tangents[1], out)


pointwise_core.defjvp(_pointwise_rule, symbolic_zeros=True)


def attend(problem: Problem, return_residual: bool, kernel: Any = None, narrow: bool = False):
    """Output `[B, T, N, Dv]` in the computing dtype, and lse `[B, T, N]` (None unless `return_residual`).

    `kernel` is a module with `forward`, `pull_back` and `pulls` that stands in for the loops over tiles; with `narrow`
    its output is in the queries' dtype, which saves writing and keeping it in float32.
    """
    # Block sizes that were asked for are the kernel's.
    own = problem if kernel is None else dataclasses.replace(problem, block_sizes=None)
    schedule = make_schedule(own, loops.one_head_at_a_time())
    sources: dict[str, Any] = {"query": problem.query, "key": problem.key, "value": problem.value}
    if problem.bias is not None:
        sources["bias"] = problem.bias
    if problem.operands:
        sources["operands"] = problem.operands
    problem, slots, sources = _to_slots(problem, sources)
    aux = dataclasses.replace(problem, query=None, key=None, value=None, bias=None, operands={})
    setting = Setting(aux, slots, schedule, Softmax(), kernel, narrow and kernel is not None)
    lse = None
    if return_residual or isinstance(problem.normalizer, Softmax):
        out, lse = softmax_core(setting, sources)
    if isinstance(problem.normalizer, Reweighted):
        out = _reweighted(setting, sources, problem.normalizer)
    elif not isinstance(problem.normalizer, Softmax):
        out, _ = _pointwise(setting, sources, problem.normalizer)
    out = _from_slots(problem, slots, out, 0)
    return out, _from_slots(problem, slots, lse, -jnp.inf) if return_residual else None


def _pointwise(setting: Setting, sources, normalizer: Normalizer):
    """Output of a one-pass pointwise normalizer, and the factor of each row."""
    weighted, total = pointwise_core(dataclasses.replace(setting, stage=normalizer), sources)
    scale = normalizer.scale(total, _counts(setting, sources) if normalizer.needs_count else None)
    return weighted * scale[..., None], scale


def _counts(setting: Setting, sources):
    """Visible keys of each row."""

    def of_tile(view, tile, values):
        size = (view.rows, view.heads, setting.schedule.query_block, setting.schedule.key_block)
        visible = True if tile.visible is None else tile.visible
        return jnp.broadcast_to(visible, size).sum(-1, dtype=jnp.int32)

    fixed = jax.lax.stop_gradient(sources)
    return loops.reduce_rows(
        setting.problem, setting.slots, setting.schedule, fixed, of_tile, jnp.zeros((), jnp.int32), jnp.add
    )


def _reweighted(setting: Setting, sources, stage: Reweighted):
    """Output of the two-pass normalizer: the base's rows first, then the sharpened weights."""
    dtype = setting.problem.compute_dtype
    rows = {"count": _counts(setting, sources).astype(dtype)}
    base = dataclasses.replace(setting, stage=stage.base)
    if isinstance(stage.base, Softmax):
        lse = softmax_core(base, sources)[1]
        rows["lse"] = jnp.where(lse == -jnp.inf, 0, lse)
    else:
        rows["scale"] = _pointwise(setting, sources, stage.base)[1]
    fixed = jax.lax.stop_gradient({**sources, "rows": rows})

    def of_tile(view, tile, values):
        logits, _ = tiles.tile_logits(setting.problem, view, tile, values)
        return (base.phi(logits, tile.visible, values["rows"]) * values["rows"].get("scale", 1)).max(-1)

    largest = loops.reduce_rows(
        setting.problem, setting.slots, setting.schedule, fixed, of_tile, jnp.zeros((), dtype), jnp.maximum
    )
    rows["largest"] = stage.excess(largest, fixed["rows"]["count"])
    weighted, total = pointwise_core(dataclasses.replace(setting, stage=stage), {**sources, "rows": rows})
    return weighted / jnp.where(total == 0, 1, total)[..., None]


def _to_slots(problem: Problem, sources):
    """Gather queries, keys and values into the slots of a layout's perms."""
    tokens = slot_tokens(problem)
    batch, length, source, num_heads, kv_heads = problem.sizes
    sources = dict(sources)
    if tokens[0] is not None:
        sources["query"] = _gather(sources["query"], tokens[0])
    if tokens[1] is not None:
        entries = key_perm = problem.layout.key_perm
        if key_perm.shape[1] not in (1, kv_heads):
            sources.update({n: jnp.repeat(sources[n], num_heads // kv_heads, axis=2) for n in ("key", "value")})
            problem = dataclasses.replace(problem, sizes=(batch, length, source, num_heads, num_heads))
            entries = tokens[1]
        sources.update({n: _gather(sources[n], entries) for n in ("key", "value")})
    return problem, Slots(*tokens), sources


def _gather(array, tokens):
    """`[B, T, N, D]` at tokens `[B|1, N|1, slots]`."""
    index = jnp.swapaxes(jnp.maximum(tokens, 0), 1, 2)[..., None]
    index = jnp.broadcast_to(index, (array.shape[0], index.shape[1], array.shape[2], 1))
    return jnp.take_along_axis(array, index, axis=1)


def _from_slots(problem: Problem, slots: Slots, array, fill):
    """Bring rows `[B, slots, N, ...]` back to the order of the tokens."""
    if slots.query_tokens is None:
        return array
    batch, length, _, num_heads, _ = problem.sizes
    tokens = jnp.broadcast_to(slots.query_tokens, (batch, num_heads, slots.query_tokens.shape[2]))
    target = jnp.swapaxes(jnp.where(tokens < 0, length, tokens), 1, 2)
    out = jnp.full((batch, length + 1, *array.shape[2:]), fill, array.dtype)
    place = (jnp.arange(batch)[:, None, None], target, jnp.arange(num_heads))
    return out.at[place].set(array)[:, :length]
