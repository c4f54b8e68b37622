"""The reweighting stage without a kernel of its own: as a bias, as widened values, or on materialized weights.

Widened values: one call on V'_j = concat_g 1[groups_j = g] [e^{log_factor_j} v_j, e^{log_factor_j}, 1] returns all
partial outputs o_g and both masses, and o_i = sum_g c_ig o_ig. It works in every implementation, and so do gradients.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.probes.call import Call
from jattn.probes.dense import Selection
from jattn.probes.hook import Reweight


def checked(reweight: Reweight, call: Call) -> Reweight:
    """The reweighting with log_factor on four axes `[B|1, N|1, T|1, S]` and groups on three, `[B|1, N|1, S]`.

    Raises:
      ValueError: a shape or a dtype that does not fit, or group ids out of range.
    """
    batch, length, source, num_heads, _ = call.sizes
    factor, groups = reweight.log_factor, reweight.groups
    if factor is not None:
        pairs = (batch, num_heads, length, source)
        factor = _broadcastable("log_factor", factor, jnp.floating, pairs, "floats that broadcast to (B, N, T, S)")
        factor = factor.astype(jnp.promote_types(call.query.dtype, jnp.float32))
        factor = jnp.broadcast_to(factor, (*factor.shape[:3], source))
    if groups is not None:
        keys = (batch, num_heads, source)
        groups = _broadcastable("groups", groups, jnp.integer, keys, "integers that broadcast to (B, N, S)")
        groups = jnp.broadcast_to(groups, (*groups.shape[:2], source))
        if not isinstance(reweight.groups, jax.core.Tracer):
            low, high = np.min(reweight.groups), np.max(reweight.groups)
            if low < 0 or high >= reweight.num_groups:
                raise ValueError(f"Reweight: groups holds ids {low} to {high}, num_groups is {reweight.num_groups}")
    elif reweight.num_groups != 1:
        raise ValueError(f"Reweight: num_groups is {reweight.num_groups}, but groups is None")
    return dataclasses.replace(reweight, log_factor=factor, groups=groups)


def _broadcastable(name: str, value: Any, kind: Any, sizes: tuple[int, ...], expected: str) -> Any:
    array = jnp.asarray(value)
    shape = (1,) * (len(sizes) - array.ndim) + array.shape
    fits = array.ndim <= len(sizes) and all(n in (1, full) for n, full in zip(shape, sizes, strict=True))
    if not fits or not jnp.issubdtype(array.dtype, kind):
        raise ValueError(f"Reweight: {name} has {array.dtype}{list(array.shape)}; expected {expected} = {list(sizes)}")
    return array.reshape(shape)


def one_hot_groups(reweight: Reweight) -> Any:
    """1[groups_j = g] as booleans `[B|1, N|1, S|1, G]`."""
    if reweight.groups is None:
        return jnp.ones((1, 1, 1, 1), bool)
    return reweight.groups[..., None] == np.arange(reweight.num_groups)


def coefficients(reweight: Reweight, mass: Any, scaled_mass: Any, params: Any) -> Any:
    """coef(mass, mass~, params) as `[B, N, T, G]`.

    Raises:
      ValueError: coef returns another shape.
    """
    assert reweight.coef is not None
    found = jnp.asarray(reweight.coef(mass, scaled_mass, params))
    try:
        return jnp.broadcast_to(found, mass.shape)
    except ValueError as error:
        expected = f"what broadcasts to {list(mass.shape)}"
        raise ValueError(f"Reweight: coef returned the shape {list(found.shape)}; expected {expected}") from error


def is_bias(reweight: Reweight, call: Call) -> bool:
    """Whether the reweighting is a bias: a softmax that is scaled and renormalized is the softmax of shifted logits."""
    return reweight.log_factor is not None and reweight.is_renormalizing and call.is_softmax


def with_bias(reweight: Reweight, call: Call, selection: Selection) -> Call:
    """The call with log_factor as a bias; one with a query axis at the selected rows and heads only."""
    _, length, _, num_heads, _ = call.sizes
    factor = reweight.log_factor
    if reweight.has_query_axis and not selection.is_all:
        factor = jnp.where(selection.marks(length, num_heads), factor, 0)
    own = call.arguments.get("bias")
    return call.with_arguments(bias=factor if own is None else jnp.asarray(own) + factor)


def group_mass(reweight: Reweight, call: Call) -> Any:
    """mass_ig = sum of the weights over the keys of group g, `[B, N, T, G]`."""
    call = call.statistic()
    one_hot = one_hot_groups(reweight)
    if one_hot.shape[1] > 1:
        call = call.per_query_head()
    batch, _, source, _, kv_heads = call.sizes
    value = jnp.swapaxes(one_hot, 1, 2).astype(call.value.dtype)
    mass = call.run(jnp.broadcast_to(value, (batch, source, kv_heads, reweight.num_groups)))
    return jnp.swapaxes(mass, 1, 2)


def widened(reweight: Reweight, call: Call, params: Any) -> tuple[Any, Any]:
    """The output from widened values, for a log_factor without a query axis.

    Returns:
      output `[B, T, N, Dv]` in the query's dtype, and the coefficients `[B, N, T, G]`, None without coef.
    """
    dtype = call.query.dtype
    factor, one_hot = reweight.log_factor, one_hot_groups(reweight)
    by_head = (factor is not None and factor.shape[1] > 1) or (reweight.coef is not None and one_hot.shape[1] > 1)
    dropping = call.drops
    plain = call.statistic()
    # Statistics are float32 at least and undropped; the outputs carry the call's dropout.
    wide = dataclasses.replace(plain, arguments=call.arguments)
    if by_head:
        plain, wide = plain.per_query_head(), wide.per_query_head()
    batch, length, source, num_heads, kv_heads = plain.sizes
    scale = jnp.ones((1, source, 1, 1), plain.value.dtype)
    if factor is not None:
        scale = jnp.exp(jnp.swapaxes(factor[:, :, 0], 1, 2))[..., None].astype(plain.value.dtype)
    value = plain.value * scale
    if reweight.coef is None:
        return wide.run(value).astype(dtype), None
    groups = jnp.swapaxes(one_hot, 1, 2)[..., None]
    ones = jnp.ones_like(scale[..., None])
    masses = [scale[..., None], ones] if factor is not None else [ones]

    def columns(*parts: Any) -> Any:
        width = sum(part.shape[-1] for part in parts)
        shaped = [jnp.broadcast_to(p, (batch, source, kv_heads, 1, p.shape[-1])) for p in parts]
        filled = jnp.where(groups, jnp.concatenate(shaped, -1), 0)
        return jnp.broadcast_to(filled, (batch, source, kv_heads, reweight.num_groups, width)).reshape(
            batch, source, kv_heads, -1
        )

    def split(found: Any) -> Any:
        return found.reshape(batch, length, num_heads, reweight.num_groups, -1)

    depth = value.shape[-1]
    if dropping:
        outputs, found = split(wide.run(columns(value[..., None, :]))), split(plain.run(columns(*masses)))
    else:
        both = split(plain.run(columns(value[..., None, :], *masses)))
        outputs, found = both[..., :depth], both[..., depth:]
    scaled_mass, mass = (jnp.swapaxes(found[..., column], 1, 2) for column in (0, -1))
    coef = coefficients(reweight, mass, scaled_mass, params)
    output = jnp.einsum("bntg,btngd->btnd", coef, outputs, precision=jax.lax.Precision.HIGHEST)
    return output.astype(dtype), coef


def reweighted(reweight: Reweight, weights: Any, selection: Selection, call: Call, coef: Any, params: Any) -> Any:
    """w' of the selected rows and heads, from their materialized weights `[B, H, R, S]`.

    Args:
      reweight: checked.
      weights: before the reweighting.
      selection: of rows and heads.
      call: gives the masses of rows that are not selected, so that coef sees all of them.
      coef: `[B, N, T, G]` if it is known already.
      params: of the hook.
    """
    scaled = weights
    if reweight.log_factor is not None:
        scaled = weights * jnp.exp(selection.of(reweight.log_factor)).astype(weights.dtype)
    if reweight.coef is None:
        return scaled
    member = selection.of(one_hot_groups(reweight)[:, :, None])[:, :, 0].astype(weights.dtype)
    member = jnp.broadcast_to(member, (*weights.shape[:2], weights.shape[3], reweight.num_groups))
    exact = {"precision": jax.lax.Precision.HIGHEST}
    if coef is None:
        mass, scaled_mass = (jnp.einsum("bhrs,bhsg->bhrg", w, member, **exact) for w in (weights, scaled))
        if not selection.is_all:
            whole = group_mass(reweight, call)
            mass, scaled_mass = selection.put(whole, mass), selection.put(whole, scaled_mass)
        coef = coefficients(reweight, mass, scaled_mass, params)
    return scaled * jnp.einsum("bhrg,bhsg->bhrs", selection.of(coef), member, **exact)
