"""Attention with a hook: interventions and diagnostics inside one call, on the plain engine or any other function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.probes import observing, reweighting
from jattn.probes.call import Call, make_call, needs
from jattn.probes.dense import Selection, dropped, weights_of
from jattn.probes.hook import INPUTS, AttnHook, Reweight
from jattn.softmax.api import dot_product_attention
from jattn.softmax.calling import call_attention


def attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    hook: AttnHook | None = None,
    attention_fn: Callable[..., Any] = dot_product_attention,
    **arguments: Any,
) -> tuple[Any, dict[str, Any]]:
    r"""Attention with a hook.

    qkv -> logits -> soft cap -> score_mod -> + bias -> mask -> normalizer -> reweight -> weights -> dropout -> values
    -> out.  Observations are of the weights before reweight and weights, without dropout, float32 at least, and
    differentiable.

    There is no kernel behind it: reweight widens the values of an ordinary call (or is a bias, where it renormalizes a
    softmax), 'col_mass' is the gradient of one, 'entropy' comes from lse. Only `weights`, 'row_weights', a log_factor
    with a query axis, and 'entropy' where a row's sum of products does not tell it (bias, score_mod, soft cap, sinks,
    another normalizer or function) materialize weights. Without a hook, or with a hook of nothing, it is the plain
    call.

    Any other `attention_fn` must be linear in its values. It takes what its signature lists; its weights are read by
    calling it on one-hot values (T * S * S work), and 'entropy' presumes weights that are not negative. A mechanism
    that only prepares a call of the engine says so in an attribute `engine_call`, as `softmax_attention` does, and is
    then treated like the engine.

    Args:
      query: `[B, T, N, D]`.
      key: `[B, S, K, D]`.
      value: `[B, S, K, Dv]`.
      bias: as in `jattn.dot_product_attention`, and so all further arguments.
      mask: booleans that broadcast to `[B, N, T, S]`, or a `Mask`.
      hook: an `AttnHook`.
      attention_fn: a function `(query, key, value, **arguments) -> [B, T, N, Dv]`.
      **arguments: its other arguments. `implementation` holds for the calls that statistics are read from, too, which
        are float32 at least.

    Returns:
      output `[B, T, N, Dv]`, and a dictionary of what was observed: 'query', 'key' and 'value' as the function gets
      them, after `qkv`, in their own dtype; 'lse' and 'entropy' `[B, T, N]`, 'group_mass'
      `[B, N, T, G]`, 'col_mass' `[B, S, K]` (sums over the heads of a group; `[B, S, N]` with qkv=per_query_head),
      'row_weights' `[B, heads, rows, S]`; 'out' is the extra of the hook's `out`. A row that sees nothing has lse -inf,
      all other statistics 0.

    Raises:
      ValueError: a request that cannot be served, with the reason; a field of a shape that does not fit.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (1, 5, 2, 4))
      >>> hook = AttnHook(rows=np.array([-1]), observe={"row_weights", "entropy"})
      >>> output, aux = attention(x, x, x, is_causal=True, hook=hook)
      >>> aux["row_weights"].shape, aux["entropy"].shape
      ((1, 2, 1, 5), (1, 5, 2))

    Source: own design.
    """
    if hook is not None and not isinstance(hook, AttnHook):
        raise ValueError(f"attention: hook must be an AttnHook or None, got {type(hook).__name__}")
    if arguments.get("return_residual"):
        raise ValueError("attention: return_residual is not an argument here; a hook with observe={'lse'} gives lse")
    arguments = {"bias": bias, "mask": mask, **arguments}
    if hook is None or hook.is_nothing:
        return call_attention(attention_fn, query, key, value, arguments), {}
    original = make_call(attention_fn, query, key, value, arguments)
    call = original.hooked(hook)
    selection = _selection(hook, call)
    reweight = None if hook.reweight is None else reweighting.checked(hook.reweight, call)
    plain, aux = _observed(hook, call, selection, reweight)
    output = _output(hook, call, selection, reweight, plain).astype(original.query.dtype)
    if hook.out is not None:
        found = hook.out(output, call.value, hook.params)
        if not isinstance(found, tuple | list) or len(found) != 2 or jnp.shape(found[0]) != output.shape:
            raise ValueError(f"AttnHook: out must return (output of shape {list(output.shape)}, extra)")
        output, extra = found
        if extra is not None:
            aux["out"] = extra
    return output, aux


def _observed(
    hook: AttnHook, call: Call, selection: Selection, reweight: Reweight | None
) -> tuple[Any, dict[str, Any]]:
    """The output of the call as it is, where it came along, and what is observed."""
    plain: Any = None
    aux: dict[str, Any] = {n: getattr(call, n) for n in INPUTS if n in hook.observe}
    if "lse" in hook.observe:
        needs(call, "return_residual", "'lse'")
        plain, aux["lse"] = call.run(residual=True)
    if "entropy" in hook.observe:
        aux["entropy"] = observing.entropy(call)
    if "group_mass" in hook.observe:
        if reweight is None:
            raise ValueError(
                "AttnHook: observe names group_mass, which needs reweight=Reweight(groups=..., num_groups=...)"
            )
        aux["group_mass"] = reweighting.group_mass(reweight, call)
    if "col_mass" in hook.observe:
        aux["col_mass"] = observing.col_mass(call, _row_weight(hook, call))
    if "row_weights" in hook.observe:
        aux["row_weights"] = weights_of(call, selection)
    return plain, aux


def _output(hook: AttnHook, call: Call, selection: Selection, reweight: Reweight | None, plain: Any) -> Any:
    if reweight is not None and reweighting.is_bias(reweight, call):
        call, reweight, plain = reweighting.with_bias(reweight, call, selection), None, None
    if reweight is not None and reweight.is_nothing:
        reweight = None
    coef = None
    dense = reweight is not None and reweight.has_query_axis
    edits = dense or hook.weights is not None
    if edits and selection.is_all:
        output = None
    elif reweight is None or dense:
        output = call.run() if plain is None else plain
    else:
        output, coef = reweighting.widened(reweight, call, hook.params)
    if not edits:
        return output
    weights = before = weights_of(call, selection)
    if reweight is not None:
        weights = reweighting.reweighted(reweight, weights, selection, call, coef, hook.params)
    if hook.weights is not None:
        weights = hook.weights(weights, hook.params)
        if jnp.shape(weights) != before.shape:
            raise ValueError(
                f"AttnHook: weights returned the shape {list(jnp.shape(weights))}; expected {list(before.shape)}"
            )
    mixed = _mix(call, dropped(call, weights, selection), before, selection)
    if output is None:
        return mixed
    return jnp.swapaxes(selection.put(jnp.swapaxes(output, 1, 2), jnp.swapaxes(mixed, 1, 2)), 1, 2)


def _mix(call: Call, weights: Any, before: Any, selection: Selection) -> Any:
    """sum_j w_ij v_j of the selected rows, `[B, R, H, Dv]`."""
    _, _, _, num_heads, kv_heads = call.sizes
    heads = np.arange(num_heads) if selection.heads is None else selection.heads
    value = jnp.swapaxes(call.value, 1, 2)[:, heads // (num_heads // kv_heads)].astype(weights.dtype)
    # Values that are not finite may stand where nobody looks, and 0 * NaN is NaN.
    unseen = ~(before != 0).any(2)[..., None]
    value = jnp.where(unseen & ~jnp.isfinite(value), 0, value)
    mixed = jnp.einsum("bhrs,bhsd->brhd", weights, value, precision=call.arguments.get("precision"))
    return mixed.astype(call.query.dtype)


def _selection(hook: AttnHook, call: Call) -> Selection:
    batch, length, _, num_heads, _ = call.sizes
    heads = None if hook.heads is None or not hook.selects else np.asarray(hook.heads)
    if heads is not None and heads.max() >= num_heads:
        raise ValueError(f"AttnHook: heads are {hook.heads}, the call has {num_heads}")
    if hook.rows is None or not hook.selects:
        return Selection(None, heads)
    rows = hook.rows if isinstance(hook.rows, jax.Array) else np.asarray(hook.rows)
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or rows.shape[0] not in (1, batch) or not jnp.issubdtype(rows.dtype, jnp.integer):
        raise ValueError(f"AttnHook: rows must be integers [{batch} or 1, R], got {rows.dtype}{list(rows.shape)}")
    if not isinstance(rows, jax.core.Tracer):
        values = np.asarray(rows)
        if values.size == 0 or values.min() < -length or values.max() >= length:
            raise ValueError(f"AttnHook: rows must lie in [-{length}, {length}), at least one, got {values.tolist()}")
        if (np.diff(np.sort(values % length, axis=1)) == 0).any():
            raise ValueError(f"AttnHook: rows must be distinct, got {values.tolist()} of {length}")
    rows = jnp.where(rows < 0, rows + length, rows).astype(jnp.int32)
    return Selection(jnp.broadcast_to(rows, (batch, rows.shape[1])), heads)


def _row_weight(hook: AttnHook, call: Call) -> Any:
    if hook.row_weight is None:
        return None
    batch, length, *_ = call.sizes
    weight = jnp.asarray(hook.row_weight)
    weight = weight[None] if weight.ndim == 1 else weight
    if weight.ndim != 2 or weight.shape[0] not in (1, batch) or weight.shape[1] != length:
        raise ValueError(f"AttnHook: row_weight must be [{batch} or 1, {length}], got {list(weight.shape)}")
    return weight
