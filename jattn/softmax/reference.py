"""The reference: quadratic, exact, and as short as the definition. Everything else is tested against it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from jattn.softmax.normalizers import Softmax
from jattn.softmax.problem import Problem, dense_visibility, drop_pairs, modify_logits, offset_tile, positions


def attend(problem: Problem, return_residual: bool) -> tuple[Float[Array, "B T N Dv"], Float[Array, "B T N"] | None]:
    """Output `[B, T, N, Dv]` in the computing dtype, and lse `[B, T, N]` (None unless `return_residual`)."""
    visible = dense_visibility(problem)
    query, value, seen, seeing = _without_unseen(problem, visible)
    logits = _masked_logits(problem, query, problem.key, seen, visible)
    weights, lse = _normalize(problem, logits, visible, return_residual)
    _, length, source, _, _ = problem.sizes
    rows, columns = np.arange(length)[:, None], np.arange(source)
    weights = drop_pairs(problem, weights, *_heads(problem), rows, columns)
    out = _mix(problem, weights, value)
    # Also a cotangent that is NaN in a row that sees nothing stops here.
    out = out if seeing is None else jnp.where(seeing, out, 0)
    return out, None if lse is None else jnp.swapaxes(lse, 1, 2)


def _without_unseen(problem: Problem, visible):
    """Zero the values that nobody sees and the queries that see nothing: 0 * NaN would be NaN.

    Returns:
      query and value; which keys are seen `[B|1, S, K|1, 1]`, and which queries see something, `[B|1, T, N|1, 1]`;
      None if known to be all.
    """
    query, value, seen = problem.query, problem.value, None
    if visible is None:
        return query, value, None, None
    batch, length, source, num_heads, kv_heads = problem.sizes
    xp = np if isinstance(visible, np.ndarray) else jnp
    seen_key = xp.broadcast_to(visible.any(2), (*visible.shape[:2], source))
    if seen_key.shape[1] != 1:
        seen_key = seen_key.reshape(-1, kv_heads, num_heads // kv_heads, source).any(2)
    seeing_query = xp.broadcast_to(visible.any(3), (*visible.shape[:2], length))
    if xp is jnp or not seen_key.all():
        seen = jnp.swapaxes(jnp.asarray(seen_key), 1, 2)[..., None]
        value = jnp.where(seen, value, 0)
    # A mask without a query axis hides all keys of a row or none: with the values zero, such rows are 0 by themselves,
    # unless another head of the group sees those keys.
    by_itself = visible.shape[2] == 1 and (visible.shape[1] == 1 or num_heads == kv_heads)
    if not by_itself and (xp is jnp or not seeing_query.all()):
        seeing = jnp.swapaxes(jnp.asarray(seeing_query), 1, 2)[..., None]
        return jnp.where(seeing, query, 0), value, seen, seeing
    return query, value, seen, None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _products_of_seen(multiply: Callable[[Any, Any], Any], seen: Any, query: Any, key: Any) -> Any:
    """multiply(query, key), with a derivative that unseen keys do not reach; their logits are hidden anyway."""
    return multiply(query, key)


@_products_of_seen.defjvp
def _products_of_seen_tangent(multiply: Callable[[Any, Any], Any], primals: Any, tangents: Any) -> Any:
    seen, query, key = primals
    moved = multiply(tangents[1], jnp.where(seen, key, 0)) + multiply(query, tangents[2])
    return _products_of_seen(multiply, *primals), moved


def _masked_logits(
    problem: Problem, query: Float[Array, "B T N D"], key: Float[Array, "B S K D"], seen: Any, visible: Any
) -> Float[Array, "B N T S"]:
    batch, length, source, num_heads, kv_heads = problem.sizes
    dtype = problem.compute_dtype
    how = {"precision": problem.precision, "preferred_element_type": dtype}

    def multiply(query: Any, key: Any) -> Any:
        if num_heads == kv_heads:
            return jnp.einsum("btnd,bsnd->bnts", query, key, **how)
        grouped = query.reshape(batch, length, kv_heads, num_heads // kv_heads, -1)
        logits = jnp.einsum("btkgd,bskd->bkgts", grouped, key, **how)
        return logits.reshape(batch, num_heads, length, source)

    logits = multiply(query, key) if seen is None else _products_of_seen(multiply, seen, query, key)
    logits = logits * jnp.asarray(problem.scale, dtype)
    modified = problem.logit_soft_cap is not None or problem.score_mod is not None
    if visible is not None and modified:
        logits = jnp.where(visible, logits, 0)
    i, j = (x[:, None] for x in positions(problem))
    i, j = i[..., :, None], j[..., None, :]
    tiles = problem.operands
    if problem.score_mod is not None:
        offsets = {n: o for n, o in problem.score_mod.flat_operands().items() if o.kind == "offset"}
        tiles = {n: _offsets(x, offsets[n].offset_center(), i, j) if n in offsets else x for n, x in tiles.items()}
    return modify_logits(problem, logits, tiles, problem.bias, *_heads(problem), i, j)


def _heads(problem: Problem):
    """Batch rows and query heads, `[B, 1, 1, 1]` and `[1, N, 1, 1]`."""
    batch, _, _, num_heads, _ = problem.sizes
    return jnp.arange(batch).reshape(-1, 1, 1, 1), np.arange(num_heads).reshape(1, -1, 1, 1)


def _offsets(table: Num[Array, "b n R"], center: int, i: Any, j: Any) -> Num[Array, "_ n T S"]:
    """An offset table `[B|1, N|1, R]` read at the positions, `[B|1, N|1, T, S]`."""
    if i.shape[0] == j.shape[0] == 1:
        return offset_tile(table, center, i[0, 0], j[0, 0])
    rows = jnp.broadcast_to(table, (max(i.shape[0], j.shape[0]), *table.shape[1:]))
    return jax.vmap(
        lambda t, q, k: offset_tile(t, center, q[0], k[0]), (0, 0 if len(i) > 1 else None, 0 if len(j) > 1 else None)
    )(rows, i if len(i) > 1 else i[0], j if len(j) > 1 else j[0])


def _normalize(
    problem: Problem, logits: Float[Array, "B N T S"], visible: Any, return_residual: bool
) -> tuple[Float[Array, "B N T S"], Float[Array, "B N T"] | None]:
    shown = np.ones((1,) * 4, bool) if visible is None else visible
    count = None
    if problem.normalizer.needs_count:
        count = jnp.broadcast_to(shown, (*shown.shape[:3], logits.shape[3])).sum(-1, keepdims=True)
    if isinstance(problem.normalizer, Softmax) and problem.bias is None and problem.score_mod is None:
        weights = _finite_softmax(logits, visible)
    else:
        weights = problem.normalizer.weights(logits, shown, count)
    if not return_residual:
        return weights, None
    masked = jnp.where(shown, logits, -jnp.inf)
    alive = masked.max(-1) != -jnp.inf
    lse = jax.nn.logsumexp(jnp.where(alive[..., None], masked, 0), -1)
    return weights, jnp.where(alive, lse, -jnp.inf)


def _finite_softmax(logits: Float[Array, "B N T S"], visible: Any) -> Float[Array, "B N T S"]:
    """Softmax of finite logits: hidden ones get a value that is finite too, and far below.

    A row that sees nothing then holds equal weights instead of NaN; its output is zeroed at the end, which is cheaper
    than guarding all weights. A bias or a score mod may hide visible keys with -inf and takes the general way.
    """
    if visible is None:
        return _softmax(logits)
    return _softmax(jnp.where(visible, logits, -0.7 * jnp.finfo(logits.dtype).max))


@jax.custom_jvp
def _softmax(logits: Float[Array, "B N T S"]) -> Float[Array, "B N T S"]:
    return jax.nn.softmax(logits)


@_softmax.defjvp
def _softmax_tangent(primals: Any, tangents: Any) -> Any:
    """w' = w x' - w sum_j w_j x'_j, both sums as dots: XLA's CPU backend takes fifty times longer otherwise."""
    weights, moving = _softmax(*primals), tangents[0]
    how = {"precision": jax.lax.Precision.HIGHEST}
    mean = jnp.einsum("bnts,bnts->bnt", weights, moving, **how)
    return weights, weights * moving - jnp.einsum("bnts,bnt->bnts", weights, mean, **how)


def _mix(
    problem: Problem, weights: Float[Array, "B N T S"], value: Float[Array, "B S K Dv"]
) -> Float[Array, "B T N Dv"]:
    batch, length, source, num_heads, kv_heads = problem.sizes
    weights = weights.astype(value.dtype)
    how = {"precision": problem.precision, "preferred_element_type": problem.compute_dtype}
    if num_heads == kv_heads:
        return jnp.einsum("bnts,bsnd->btnd", weights, value, **how)
    grouped = weights.reshape(batch, kv_heads, num_heads // kv_heads, length, source)
    return jnp.einsum("bkgts,bskd->btkgd", grouped, value, **how).reshape(batch, length, num_heads, -1)
