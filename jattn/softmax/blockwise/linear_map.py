"""A linear map with a hand-written transpose that can itself be differentiated, batched and exported.

`jax.custom_vjp` would refuse forward mode, and `jax.custom_derivatives.linear_call` cannot be differentiated with
respect to its residuals or batched. This primitive carries three programs for one map y = A(residuals) x: a fast one
for A, a fast one for its transpose, and a plain one that JAX can differentiate any number of times; the plain one
serves derivatives with respect to the residuals, that is, second derivatives of what A is the derivative of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


class Programs(NamedTuple):
    """Functions of (residuals, x), both flat lists, that return flat lists; `plain` equals `forward`."""

    forward: Callable[..., Any]
    transpose: Callable[..., Any]
    plain: Callable[..., Any]


_linear_p = Primitive("jattn_linear_map")
_linear_p.multiple_results = True


def linear_map(programs: Programs, residuals: Any, linear: Any, like: Any) -> Any:
    """Apply the map to the pytree `linear`; the result has the structure and the types of the pytree `like`.

    `programs` take and return pytrees: forward and plain (residuals, linear) -> like, transpose
    (residuals, like) -> linear.
    """
    residual_leaves, residual_tree = jax.tree.flatten(residuals)
    linear_leaves, linear_tree = jax.tree.flatten(linear)
    like_leaves, like_tree = jax.tree.flatten(like)

    def flat(program, in_tree, out_tree):
        def run(residual_leaves, leaves):
            residual_leaves = [jnp.asarray(x) for x in residual_leaves]
            result = program(jax.tree.unflatten(residual_tree, residual_leaves), jax.tree.unflatten(in_tree, leaves))
            assert jax.tree.structure(result) == out_tree
            return jax.tree.leaves(result)

        return run

    flat_programs = Programs(
        flat(programs.forward, linear_tree, like_tree),
        flat(programs.transpose, like_tree, linear_tree),
        flat(programs.plain, linear_tree, like_tree),
    )
    out = _linear_p.bind(
        *residual_leaves,
        *linear_leaves,
        programs=flat_programs,
        num_residuals=len(residual_leaves),
        out_types=tuple(jax.typeof(x) for x in like_leaves),
    )
    return jax.tree.unflatten(like_tree, out)


def _run(*args, programs: Programs, num_residuals: int, out_types):
    return programs.forward(list(args[:num_residuals]), list(args[num_residuals:]))


def _jvp(primals, tangents, *, programs: Programs, num_residuals: int, out_types):
    residuals, linear = list(primals[:num_residuals]), list(primals[num_residuals:])
    params = {"programs": programs, "num_residuals": num_residuals, "out_types": out_types}
    out = _linear_p.bind(*residuals, *linear, **params)
    moved_linear = tangents[num_residuals:]
    parts = []
    if any(type(t) is not ad.Zero for t in moved_linear):
        dots = [ad.instantiate_zeros(t) for t in moved_linear]
        parts.append(_linear_p.bind(*residuals, *dots, **params))
    moving = [n for n, t in enumerate(tangents[:num_residuals]) if type(t) is not ad.Zero and _is_float(residuals[n])]
    if moving:

        def of_moving(*values):
            current = list(residuals)
            for n, value in zip(moving, values, strict=True):
                current[n] = value
            return tuple(programs.plain(current, linear))

        _, dots = jax.jvp(of_moving, tuple(residuals[n] for n in moving), tuple(tangents[n] for n in moving))
        parts.append(dots)
    if not parts:
        return out, [ad.Zero(x.to_tangent_aval()) for x in out_types]
    return out, list(parts[0]) if len(parts) == 1 else [a + b for a, b in zip(*parts, strict=True)]


def _is_float(x) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _transpose(cotangents, *args, programs: Programs, num_residuals: int, out_types):
    residuals, linear = list(args[:num_residuals]), args[num_residuals:]
    cotangents = [ad.instantiate_zeros(ct) for ct in cotangents]
    types = tuple(x.aval if ad.is_undefined_primal(x) else jax.typeof(x) for x in linear)

    def plain(residuals, cotangents):
        def forward(*values):
            return tuple(programs.plain(residuals, list(values)))

        return list(jax.linear_transpose(forward, *types)(tuple(cotangents)))

    swapped = Programs(programs.transpose, programs.forward, plain)
    out = _linear_p.bind(*residuals, *cotangents, programs=swapped, num_residuals=num_residuals, out_types=types)
    pulled = [x if ad.is_undefined_primal(a) else None for x, a in zip(out, linear, strict=True)]
    return [None] * num_residuals + pulled


def _batch(args, dims, *, programs: Programs, num_residuals: int, out_types):
    size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    residual_dims = list(dims[:num_residuals])
    # Every linear input gets the batch axis: only then is the transpose of the batched map the batched transpose.
    linear = [
        jnp.broadcast_to(x, (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
        for x, d in zip(args[num_residuals:], dims[num_residuals:], strict=True)
    ]

    def batched(program):
        return lambda residuals, leaves: jax.vmap(program, in_axes=(residual_dims, 0), axis_size=size)(
            residuals, leaves
        )

    new = Programs(*(batched(program) for program in programs))
    residuals = list(args[:num_residuals])
    types = jax.make_jaxpr(new.forward)(residuals, linear).out_avals
    out = _linear_p.bind(*residuals, *linear, programs=new, num_residuals=num_residuals, out_types=tuple(types))
    return out, [0] * len(out)


_linear_p.def_impl(_run)
_linear_p.def_abstract_eval(lambda *_, out_types, **__: out_types)
ad.primitive_jvps[_linear_p] = _jvp
ad.primitive_transposes[_linear_p] = _transpose
batching.primitive_batchers[_linear_p] = _batch
mlir.register_lowering(_linear_p, mlir.lower_fun(_run, multiple_results=True))
