"""Attention weights of some query rows and heads as an array: what cannot be had from fused calls."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jattn.probes.call import Call
from jattn.softmax.arguments import build_problem
from jattn.softmax.merge import join_sinks
from jattn.softmax.problem import Problem, drop_pairs, modify_logits, positions


@dataclasses.dataclass(frozen=True)
class Selection:
    """Some rows and heads of `[B, N, T, ...]`: rows int32 `[B, R]` or None for all, heads int `[H]` or None for all."""

    rows: Any
    heads: np.ndarray | None

    @property
    def is_all(self) -> bool:
        """Whether nothing is left out."""
        return self.rows is None and self.heads is None

    def of(self, array: Any) -> Any:
        """The rows and heads of `[B|1, N|1, T|1, ...]`; axes of 1 stay."""
        if self.heads is not None and array.shape[1] > 1:
            array = array[:, self.heads]
        if self.rows is not None and array.shape[2] > 1:
            index = self.rows.reshape(self.rows.shape[0], 1, -1, *(1,) * (array.ndim - 3))
            array = jnp.take_along_axis(jnp.asarray(array), index, axis=2)
        return array

    def of_rows(self, array: Any) -> Any:
        """The rows of `[B|1, T, ...]`."""
        return array if self.rows is None else self.of(jnp.asarray(array)[:, None])[:, 0]

    def put(self, whole: Any, part: Any) -> Any:
        """`whole` `[B, N, T, ...]` with `part` `[B, H, R, ...]` in the place of the selected entries."""
        if self.is_all:
            return part
        batch, num_heads, length = whole.shape[:3]
        heads = np.arange(num_heads) if self.heads is None else self.heads
        rows = np.arange(length)[None] if self.rows is None else self.rows
        return whole.at[np.arange(batch)[:, None, None], heads[:, None], rows[:, None]].set(part.astype(whole.dtype))

    def marks(self, length: int, num_heads: int) -> Any:
        """Booleans `[B|1, N|1, T|1, 1]`, True for what is selected."""
        heads = np.ones(1, bool) if self.heads is None else np.isin(np.arange(num_heads), self.heads)
        marked = jnp.asarray(heads)[None, :, None, None]
        if self.rows is not None:
            marked = marked & (self.rows[:, :, None] == np.arange(length)).any(1)[:, None, :, None]
        return marked


def weights_of(call: Call, selection: Selection) -> Any:
    """Weights `[B, H, R, S]` before dropout, float32 at least.

    Of the plain engine only the selected rows are computed. Any other function, which must be linear in its values, is
    called on one-hot values for all rows.
    """
    call = call.statistic()
    if call.is_engine:
        return _engine_weights(*_problem(call), selection)
    batch, _, source, _, kv_heads = call.sizes
    one_hot = jnp.broadcast_to(jnp.eye(source, dtype=call.value.dtype)[:, None], (batch, source, kv_heads, source))
    return selection.of(jnp.swapaxes(call.run(one_hot), 1, 2))


def dropped(call: Call, weights: Any, selection: Selection) -> Any:
    """The weights after the call's own dropout."""
    if not call.drops:
        return weights
    if not call.is_engine:
        raise ValueError(
            "AttnHook: weights that a hook changes can be dropped after it in jattn.dot_product_attention only; "
            "pass dropout_rate=0, or that function"
        )
    problem, _ = _problem(call)
    _, length, source, num_heads, _ = call.sizes
    rows = np.arange(length)[None] if selection.rows is None else selection.rows
    b, h = _heads(problem, selection)
    return drop_pairs(problem, weights, b, h, rows[:, None, :, None], np.arange(source))


def _problem(call: Call) -> tuple[Problem, Any]:
    arguments = {n: a for n, a in call.arguments.items() if n not in ("implementation", "return_residual")}
    return build_problem(call.query, call.key, call.value, **arguments)


def _heads(problem: Problem, selection: Selection) -> tuple[Any, Any]:
    heads = np.arange(problem.sizes[3]) if selection.heads is None else selection.heads
    return np.arange(problem.sizes[0]).reshape(-1, 1, 1, 1), heads.reshape(1, -1, 1, 1)


def _engine_weights(problem: Problem, sinks: Any, selection: Selection) -> Any:
    _, _, source, num_heads, kv_heads = problem.sizes
    b, h = _heads(problem, selection)
    i, j = positions(problem)
    i, j = selection.of_rows(i)[:, None, :, None], j[:, None, None, :]
    visible = _visibility(problem, selection, b, h, i, j)

    # 0 * NaN is NaN: what no selected row sees, and rows that see nothing, do not enter the products.
    query = jnp.swapaxes(problem.query, 1, 2)
    key = jnp.swapaxes(problem.key, 1, 2)[:, h.ravel() // (num_heads // kv_heads)]
    query = jnp.where(visible.any(3, keepdims=True), selection.of(query), 0)
    key = jnp.where(jnp.swapaxes(visible.any(2, keepdims=True), 2, 3), key, 0)
    how = {"precision": problem.precision, "preferred_element_type": problem.compute_dtype}
    logits = jnp.einsum("bhrd,bhsd->bhrs", query, key, **how) * jnp.asarray(problem.scale, problem.compute_dtype)

    logits = jnp.where(visible, logits, 0)
    tiles = {name: _operand(problem, name, x, selection, i, j) for name, x in problem.operands.items()}
    bias = None if problem.bias is None else selection.of(problem.bias)
    logits = jnp.where(visible, modify_logits(problem, logits, tiles, bias, b, h, i, j), -jnp.inf)
    count = jnp.broadcast_to(visible, logits.shape).sum(-1, keepdims=True)
    weights = problem.normalizer.weights(logits, visible, count)
    if sinks is None:
        return weights
    alive = logits.max(-1) != -jnp.inf
    exact = jnp.where(alive[..., None], logits, 0)
    top = exact.max(-1)
    lse = jnp.where(alive, top + jnp.log(jnp.exp(exact - top[..., None]).sum(-1)), -jnp.inf)
    joined = join_sinks(jnp.swapaxes(weights, 1, 2), jnp.swapaxes(lse, 1, 2), sinks[h.ravel()])
    return jnp.swapaxes(joined, 1, 2)


def _visibility(problem: Problem, selection: Selection, b: Any, h: Any, i: Any, j: Any) -> Any:
    """All mask terms of the selected rows and heads as booleans that broadcast to `[B, H, R, S]`, S in full."""
    batch, length, source, num_heads, _ = problem.sizes
    visible = jnp.ones((1, 1, 1, source), bool)
    for array in problem.mask_arrays:
        visible = visible & selection.of(array)
    if problem.query_segments is not None:
        ids = selection.of_rows(problem.query_segments)[:, None, :, None]
        visible = visible & (ids == problem.key_segments[:, None, None, :]) & (ids >= 0)
    if problem.mask is not None:
        visible = visible & jnp.asarray(problem.mask(b, h, i, j))
    if problem.layout is not None:
        places = {"query_positions": problem.query_positions, "key_positions": problem.key_positions}
        visible = visible & selection.of(problem.layout.to_dense(batch, num_heads, length, source, **places))
    return visible


def _operand(problem: Problem, name: str, array: Any, selection: Selection, i: Any, j: Any) -> Any:
    assert problem.score_mod is not None
    operand = problem.score_mod.flat_operands()[name]
    if operand.kind != "offset":
        return selection.of(array)
    table = (array if selection.heads is None or array.shape[1] == 1 else array[:, selection.heads])[:, :, None]
    index = jnp.clip(j - i + operand.offset_center(), 0, array.shape[-1] - 1)
    return jnp.take_along_axis(table, index, axis=-1)
