"""Attention over a list of keys for each query: for choices too scattered for tiles."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jattn.softmax.arguments import build_problem
from jattn.softmax.layout import is_concrete
from jattn.softmax.problem import Problem, modify_logits

__all__ = ["gather_attention"]

# Gathered numbers that a chunk may always hold; small calls run in one piece.
LEAST_BUDGET = 1 << 20


def _fail(name: str, got: Any, expected: str) -> ValueError:
    return ValueError(f"gather_attention: {name} has {got}; expected {expected}")


def _check_index(index: Any, valid: Any, sizes: tuple, query_block: int) -> tuple[jax.Array, jax.Array]:
    batch, length, source, num_heads, kv_heads = sizes
    index, valid = (x if isinstance(x, jax.Array) else np.asarray(x) for x in (index, valid))
    groups = -(-length // query_block)
    fits = index.ndim == 4 and index.shape[0] in (1, batch) and index.shape[1] in (1, kv_heads, num_heads)
    if not fits or index.shape[2] != groups or index.shape[3] == 0 or not jnp.issubdtype(index.dtype, jnp.integer):
        expected = f"integers [1 or {batch}, 1, {kv_heads} or {num_heads}, {groups}, k]"
        raise _fail("index", f"{index.dtype} of shape {index.shape}", expected)
    if valid.dtype != bool or valid.shape != index.shape:
        raise _fail("valid", f"{valid.dtype} of shape {valid.shape}", f"booleans of the shape of index, {index.shape}")
    if is_concrete(index, valid):
        ids, real = np.asarray(index), np.asarray(valid)
        if (real & ((ids < 0) | (ids >= source))).any():
            raise _fail("index", "valid entries out of range", f"keys in [0, {source})")
        # Entries that are not valid get numbers of their own, so that only true repeats are equal.
        ordered = np.sort(np.where(real, ids, -1 - np.arange(ids.shape[-1])), axis=-1)
        if (np.diff(ordered, axis=-1) == 0).any():
            raise _fail("index", "a key twice among the valid entries of a row", "distinct keys")
    index, valid = jnp.asarray(index), jnp.asarray(valid)
    valid = valid & (index >= 0) & (index < source)
    # Invalid entries point at a key that is read anyway: what they would read elsewhere could be NaN.
    first = jnp.take_along_axis(index, jnp.argmax(valid, axis=-1, keepdims=True), axis=-1)
    index = jnp.clip(jnp.where(valid, index, first), 0, source - 1)
    return index.astype(jnp.int32), valid


def _split_heads(array: jax.Array, kv_heads: int) -> jax.Array:
    """Splits the head axis [b, n, ...] of 1, K or N into [b, 1|K, 1|G, ...]."""
    heads = array.shape[1]
    split = (1, 1) if heads == 1 else (kv_heads, heads // kv_heads)
    return array.reshape(array.shape[0], *split, *array.shape[2:])


def _chunk(array: jax.Array, axis: int, chunks: int, groups: int) -> jax.Array:
    """Splits an axis of groups into [chunks, groups], padded, the chunks in front."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, chunks * groups - array.shape[axis])
    array = jnp.pad(array, widths)
    return jnp.moveaxis(array.reshape(*array.shape[:axis], chunks, groups, *array.shape[axis + 1 :]), axis, 0)


def _rows(array: jax.Array, axis: int, groups: int, query_block: int) -> jax.Array:
    """Splits an axis of T queries into [groups, query_block], padded."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, groups * query_block - array.shape[axis])
    array = jnp.pad(array, widths)
    return array.reshape(*array.shape[:axis], groups, query_block, *array.shape[axis + 1 :])


def _take(array: jax.Array, index: jax.Array) -> jax.Array:
    """Reads the last axis, where it has one entry a key; everything else broadcasts."""
    return array if array.shape[-1] == 1 else jnp.take_along_axis(array, index, axis=-1, mode="promise_in_bounds")


def _take_keys(array: jax.Array, index: jax.Array) -> jax.Array:
    """Rows [B, K, x, c, k, D] of array [B, S, K, D] at index [b, 1|K, x, c, k]."""
    flat = index.reshape(*index.shape[:3], -1, 1)
    rows = jnp.swapaxes(array, 1, 2)[:, :, None]
    taken = jnp.take_along_axis(rows, flat, axis=3, mode="promise_in_bounds")
    return taken.reshape(*taken.shape[:3], *index.shape[3:], array.shape[-1])


def _attend_chunk(problem: Problem, key: jax.Array, value: jax.Array, whole: dict, parts: dict) -> tuple:
    """Output [B, K, G, c, t, Dv] and lse [B, K, G, c, t] of some groups of queries."""
    batch, _, source, num_heads, kv_heads = problem.sizes
    query, index = parts["query"], parts["index"]
    groups, block = query.shape[3:5]
    group = num_heads // kv_heads
    read = index[:, :, :, :, None]
    pairs = {name: _take(x, read) for name, x in (whole["pairs"] | parts["pairs"]).items()}
    weight = pairs.pop("key_log_weight", None)
    bias = pairs.pop("bias", None)
    visible = parts["valid"][:, :, :, :, None]
    for term in (bias, weight):
        if term is not None:
            visible = visible & (term > -jnp.inf)
    shape = (batch, kv_heads, group, groups, block, index.shape[-1])
    visible = jnp.broadcast_to(visible, shape)

    # What nobody sees here may be NaN, and 0 * NaN is NaN: it is replaced before it enters a product.
    query = jnp.where(visible.any(-1, keepdims=True), query, 0)
    share = index.shape[2]
    seen = visible.reshape(batch, kv_heads, share, group // share, *shape[3:]).any((3, 5))[..., None]
    key, value = (jnp.where(seen, _take_keys(x, index), 0) for x in (key, value))
    split = query.reshape(batch, kv_heads, share, group // share, groups, block, -1)
    options = {"precision": problem.precision, "preferred_element_type": problem.compute_dtype}
    logits = jnp.einsum("bkxyctd,bkxcsd->bkxycts", split, key, **options).reshape(shape)
    logits = logits * jnp.asarray(problem.scale, logits.dtype)

    b = jnp.arange(batch).reshape(-1, 1, 1, 1, 1, 1)
    h = jnp.arange(num_heads).reshape(1, kv_heads, group, 1, 1, 1)
    i, j = parts["i"], _take(whole["j"], read)
    if problem.score_mod is not None:
        logits = jnp.where(visible, logits, 0)
        for name, table in whole["offsets"].items():
            center = problem.score_mod.flat_operands()[name].offset_center()
            pairs[name] = jnp.take_along_axis(table, jnp.clip(j - i + center, 0, table.shape[-1] - 1), axis=-1)
    logits = modify_logits(problem, logits, pairs, bias, b, h, i, j)
    if weight is not None:
        logits = logits + weight.astype(logits.dtype)
    logits = jnp.where(visible, logits, -jnp.inf)
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    top = jnp.where(top > -jnp.inf, top, 0)
    weights = jnp.exp(jnp.where(visible, logits - top, -jnp.inf))
    total = weights.sum(-1, keepdims=True)
    alive = total > 0
    total = jnp.where(alive, total, 1)
    split = (weights / total).astype(value.dtype).reshape(batch, kv_heads, share, group // share, *shape[3:])
    out = jnp.einsum("bkxycts,bkxcsd->bkxyctd", split, value, **options).reshape(*shape[:-1], -1)
    lse = jnp.where(alive, jnp.log(total) + top, -jnp.inf)[..., 0]
    return out, lse


def _lay_out(problem: Problem, index: jax.Array, valid: jax.Array, key_log_weight: Any, query_block: int) -> tuple:
    """What the chunks share, and what each chunk has of its own (groups in front)."""
    batch, length, source, num_heads, kv_heads = problem.sizes
    groups, entries = index.shape[2:]
    offsets: set[str] = set()
    if problem.score_mod is not None:
        offsets = {n for n, o in problem.score_mod.flat_operands().items() if o.kind == "offset"}
    tables = dict(problem.operands)
    if problem.bias is not None:
        tables["bias"] = problem.bias
    if key_log_weight is not None:
        tables["key_log_weight"] = key_log_weight
    whole: dict[str, Any] = {"pairs": {}, "offsets": {}}
    parts: dict[str, Any] = {"pairs": {}}
    for name, table in tables.items():
        table = _split_heads(table, kv_heads)
        if name in offsets:
            whole["offsets"][name] = table[:, :, :, None, None]
        elif table.shape[3] == 1:
            whole["pairs"][name] = table[:, :, :, :, None]
        else:
            parts["pairs"][name] = _rows(table, 3, groups, query_block)
    i = jnp.arange(length)[None] if problem.query_positions is None else problem.query_positions
    j = jnp.arange(source)[None] if problem.key_positions is None else problem.key_positions
    whole["j"] = j[:, None, None, None, None]
    query = jnp.moveaxis(problem.query.reshape(batch, length, kv_heads, -1, problem.query.shape[-1]), 1, 3)
    parts |= {
        "i": _rows(i, 1, groups, query_block)[:, None, None, :, :, None],
        "query": _rows(query, 3, groups, query_block),
        "index": _split_heads(index, kv_heads),
        "valid": _split_heads(valid, kv_heads),
    }
    # The gathered rows of a chunk take as much memory as key and value do: then adding up their gradients over the
    # chunks costs no more than computing them, and memory stays linear in T and S.
    share = batch * kv_heads * parts["index"].shape[2] * entries * (problem.query.shape[-1] + problem.value.shape[-1])
    budget = max(problem.key.size + problem.value.size, LEAST_BUDGET)
    size = int(np.clip(budget // share, 1, groups))
    chunks = -(-groups // size)
    size = -(-groups // chunks)

    def split(array: jax.Array) -> jax.Array:
        return _chunk(array, 3, chunks, size)

    return whole, jax.tree.map(split, parts)


@functools.partial(jax.jit, static_argnums=(4,), inline=True)
def _run(problem: Problem, index: jax.Array, valid: jax.Array, key_log_weight: Any, query_block: int) -> tuple:
    batch, length, _, num_heads, _ = problem.sizes
    whole, parts = _lay_out(problem, index, valid, key_log_weight, query_block)

    # The backward pass computes a chunk again instead of keeping the rows it gathered.
    @jax.checkpoint
    def step(part: dict) -> tuple:
        return _attend_chunk(problem, problem.key, problem.value, whole, part)

    out, lse = jax.lax.map(step, parts)
    out = jnp.moveaxis(out, 0, 3).reshape(batch, num_heads, -1, out.shape[-1])[:, :, :length]
    lse = jnp.moveaxis(lse, 0, 3).reshape(batch, num_heads, -1)[:, :, :length]
    out = checkpoint_name(jnp.swapaxes(out, 1, 2).astype(problem.query.dtype), "attention_out")
    return out, checkpoint_name(jnp.swapaxes(lse, 1, 2), "attention_lse")


def gather_attention(
    query: Any,
    key: Any,
    value: Any,
    index: Any,
    valid: Any,
    *,
    query_block: int = 1,
    scale: Any = None,
    bias: Any = None,
    score_mod: Any = None,
    logit_soft_cap: Any = None,
    key_log_weight: Any = None,
    query_positions: Any = None,
    key_positions: Any = None,
    precision: Any = None,
    return_residual: bool = False,
) -> Any:
    """Softmax attention of every query, or block of queries, over its own list of keys.

    out_i = sum_n softmax_n(logits(i, index[i // query_block, n])) v_{index[i // query_block, n]}, n over valid entries

    The logits go through the engine's pipeline: scale, soft cap, score mod, bias, key_log_weight. Memory grows with
    T k + S D, not with T S, forward and backward. Index and valid carry no gradient; everything else does.

    Args:
      query: [B, T, N, D].
      key: [B, S, K, D], K divides N.
      value: [B, S, K, Dv].
      index: Integers [B or 1, N, K or 1, ceil(T / query_block), k], keys of each block of queries.
      valid: Booleans of the same shape; False entries are left out. Valid entries of a row must be distinct; traced
        ones out of range are left out, others are refused.
      query_block: Queries that share a list.
      scale: Factor of the logits, D^-0.5 by default.
      bias: Added to the logits, broadcasts to [B, N, T, S]; -inf hides.
      score_mod: A ScoreMod.
      logit_soft_cap: cap * tanh(logits / cap) on the scaled logits.
      key_log_weight: [1 or B, 1, K or N, S], log of the multiplicity of each key, added after the cap; -inf hides.
      query_positions: [1 or B, T] that the score mod sees.
      key_positions: [1 or B, S] that the score mod sees.
      precision: Of the matrix products, as in jax.lax.dot_general.
      return_residual: Whether to return the log-sum-exp, too.

    Returns:
      [B, T, N, Dv] in the query's dtype, 0 for queries without keys; with `return_residual` also lse [B, T, N], float32
      (float64 for float64 inputs), -inf for such queries, differentiable.

    Raises:
      ValueError: If a shape, a dtype or (outside jit) an index is wrong.

    Example:
      >>> import jax.numpy as jnp
      >>> q = k = jnp.ones((1, 2, 1, 4))
      >>> v = jnp.array([1.0, 2.0]).reshape(1, 2, 1, 1)
      >>> index = jnp.array([[[[0, 1], [1, 0]]]])
      >>> gather_attention(q, k, v, index, jnp.array([[[[True, True], [True, False]]]]))[0, :, 0, 0].tolist()
      [1.5, 2.0]

    Source: token selection of DeepSeek sparse attention (DeepSeek-V3.2, arXiv 2512.02556), HiP (arXiv 2406.09827).
    """
    try:
        problem, _ = build_problem(
            query,
            key,
            value,
            bias,
            scale=scale,
            score_mod=score_mod,
            logit_soft_cap=logit_soft_cap,
            query_positions=query_positions,
            key_positions=key_positions,
            precision=precision,
        )
    except ValueError as error:
        raise ValueError(str(error).replace("dot_product_attention", "gather_attention")) from None
    if jnp.ndim(query) != 4:
        raise _fail("query", f"shape {jnp.shape(query)}", "[B, T, N, D]")
    if query_block < 1:
        raise _fail("query_block", f"value {query_block}", "at least 1")
    batch, _, source, num_heads, kv_heads = problem.sizes
    index, valid = _check_index(index, valid, problem.sizes, query_block)
    if key_log_weight is not None:
        key_log_weight = jnp.asarray(key_log_weight)
        shape = key_log_weight.shape
        fits = len(shape) == 3 and shape[0] in (1, batch) and shape[1] in (1, kv_heads, num_heads)
        if not fits or shape[2] != source:
            expected = f"[1 or {batch}, 1, {kv_heads} or {num_heads}, {source}]"
            raise _fail("key_log_weight", f"shape {shape}", expected)
        key_log_weight = key_log_weight[:, :, None]
    out, lse = _run(problem, index, valid, key_log_weight, query_block)
    return (out, lse) if return_residual else out
