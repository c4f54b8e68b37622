"""What a traced program says about itself: how much it computes, and in which precision.

XLA's own cost analysis counts the body of a loop once; here a scan counts as often as it runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jattn.testing.compiling import quick_jit

_MOVES = frozenset(
    {"broadcast_in_dim", "reshape", "transpose", "squeeze", "expand_dims", "rev", "slice", "dynamic_slice", "split"}
    | {"dynamic_update_slice", "concatenate", "pad", "gather", "scatter", "select_n", "copy", "copy_p", "iota", "name"}
    | {"convert_element_type", "bitcast_convert_type", "reduce_precision", "stop_gradient", "optimization_barrier"}
    | {"device_put", "sharding_constraint", "pvary", "pcast"}
)
# Calls of jit, of checkpoints, of functions with a rule for derivatives: what they compute is the program inside.
_CALLS = ("jit", "pjit", "checkpoint", "remat", "custom_jvp_call", "custom_vjp_call", "closed_call", "core_call")
_SUMS = frozenset({"exp", "exp2", "expm1", "log", "log1p", "reduce_sum", "cumsum", "cumprod", "cumlogsumexp"})


def _inner(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _children(equation: Any) -> Iterator[Any]:
    """The programs inside an equation."""
    for parameter in equation.params.values():
        for item in parameter if isinstance(parameter, tuple | list) else (parameter,):
            if isinstance(item, core.Jaxpr | core.ClosedJaxpr):
                yield _inner(item)


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)


def _is_float(variable: Any) -> bool:
    return hasattr(variable.aval, "dtype") and jnp.issubdtype(variable.aval.dtype, jnp.floating)


def primitives(program: Any) -> set[str]:
    """The names of all primitives in a traced program.

    Args:
        program: what `jax.make_jaxpr(f)(...)` returns.

    Returns:
        The names.

    Example:
        >>> import jax
        >>> sorted(primitives(jax.make_jaxpr(jax.jit(lambda x: x + x))(1.0)))
        ['add', 'jit']
    """
    inside = (name for equation in _inner(program).eqns for child in _children(equation) for name in primitives(child))
    return {equation.primitive.name for equation in _inner(program).eqns} | set(inside)


def count_work(function: Callable[..., Any], *args: Any) -> float:
    """Count the floating-point operations that a function does on its arguments.

    Matrix products count 2 a multiply-add, everything else that computes floats 1 an element; moving data is free. A
    scan counts as often as it runs. Where the program decides by itself what it does (loops over live tiles, skipped
    branches), the part that decides is run, and only what is taken counts.

    Args:
        function: of arrays, traceable.
        *args: its arguments.

    Returns:
        The number of operations.

    Example:
        >>> import jax.numpy as jnp
        >>> count_work(jnp.dot, jnp.ones((2, 3)), jnp.ones((3, 5)))
        60.0
        >>> count_work(lambda n, x: jax.lax.fori_loop(0, n, lambda _, x: x + 1, x), 5, jnp.ones(10))
        50.0
    """
    return count_program(jax.make_jaxpr(function)(*args), *args)


def count_program(program: Any, *args: Any) -> float:
    """`count_work` of a function that is traced already: its closed jaxpr, and the arguments it was traced with."""
    if not _decides(program.jaxpr):
        return _static_work(program.jaxpr)

    # What the counter does not depend on is never compiled: XLA drops dead code, also out of the carries of loops.
    def counter(*leaves: Any) -> Any:
        return _counted(program.jaxpr, program.consts, leaves)[1]

    return float(quick_jit(counter)(*jax.tree.leaves(args)))


def _decides(jaxpr: Any) -> bool:
    """Whether how much a program computes is known only when it runs."""
    return any(
        equation.primitive.name in ("while", "cond") or any(map(_decides, _children(equation)))
        for equation in jaxpr.eqns
    )


def _static_work(jaxpr: Any) -> float:
    return float(sum(_equation_work(equation) for equation in jaxpr.eqns))


def _equation_work(equation: Any) -> float:
    name = equation.primitive.name
    inside = sum(map(_static_work, _children(equation)))
    if name == "scan":
        return equation.params["length"] * inside
    if name == "pallas_call":
        return math.prod(equation.params["grid_mapping"].grid) * inside
    if inside:
        return inside
    outputs = [variable for variable in equation.outvars if _is_float(variable)]
    if name == "dot_general":
        contracted = equation.params["dimension_numbers"][0][0]
        return 2.0 * _size(outputs[0]) * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * _size(outputs[0]) * math.prod(kernel) / features
    if name in _MOVES or not outputs:
        return 0.0
    if name.startswith(("reduce", "arg", "cum", "sort", "top_k")):
        return float(max(_size(variable) for variable in equation.invars))
    return float(sum(map(_size, outputs)))


def _counted(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> tuple[list[Any], Any]:
    """Run a program, and count beside it."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    total = jnp.float32(0)
    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        outputs, work = _counted_equation(equation, inputs)
        values.update(zip(equation.outvars, outputs, strict=True))
        total = total + work
    return [read(atom) for atom in jaxpr.outvars], total


def _counted_equation(equation: Any, inputs: list[Any]) -> tuple[list[Any], Any]:
    name, parameters, children = equation.primitive.name, equation.params, list(_children(equation))
    if name == "while":
        return _counted_while(parameters, inputs)
    if name == "cond":
        branches = [functools.partial(_branch, branch) for branch in parameters["branches"]]
        outputs, work = jax.lax.switch(inputs[0], branches, *inputs[1:])
        return list(outputs), work
    if name == "scan" and any(map(_decides, children)):
        return _counted_scan(parameters, inputs)
    if name.startswith(_CALLS):
        return _counted(children[0], _consts(parameters), inputs)
    outputs = equation.primitive.bind(*inputs, **parameters)
    outputs = outputs if equation.primitive.multiple_results else [outputs]
    return list(outputs), jnp.float32(_equation_work(equation))


def _consts(parameters: Any) -> list[Any]:
    closed = [item for item in parameters.values() if isinstance(item, core.ClosedJaxpr)]
    return list(closed[0].consts) if closed else []


def _branch(branch: Any, *operands: Any) -> tuple[list[Any], Any]:
    return _counted(branch.jaxpr, branch.consts, operands)


def _counted_while(parameters: Any, inputs: list[Any]) -> tuple[list[Any], Any]:
    split = parameters["cond_nconsts"], parameters["cond_nconsts"] + parameters["body_nconsts"]
    for_cond, for_body, state = inputs[: split[0]], inputs[split[0] : split[1]], inputs[split[1] :]
    test, body = parameters["cond_jaxpr"], parameters["body_jaxpr"]

    def go_on(carry: Any) -> Any:
        return _counted(test.jaxpr, test.consts, [*for_cond, *carry[0]])[0][0]

    def step(carry: Any) -> Any:
        outputs, work = _counted(body.jaxpr, body.consts, [*for_body, *carry[0]])
        return outputs, carry[1] + work

    return jax.lax.while_loop(go_on, step, (state, jnp.float32(0)))


def _counted_scan(parameters: Any, inputs: list[Any]) -> tuple[list[Any], Any]:
    split = parameters["num_consts"], parameters["num_consts"] + parameters["num_carry"]
    fixed, state, stacked = inputs[: split[0]], inputs[split[0] : split[1]], inputs[split[1] :]
    body = parameters["jaxpr"]

    def step(carry: Any, slices: Any) -> Any:
        outputs, work = _counted(body.jaxpr, body.consts, [*fixed, *carry[0], *slices])
        return (outputs[: len(state)], carry[1] + work), outputs[len(state) :]

    (state, work), stacked = jax.lax.scan(
        step, (state, jnp.float32(0)), stacked, length=parameters["length"], reverse=parameters["reverse"]
    )
    return [*state, *stacked], work


def narrow_operations(program: Any) -> set[str]:
    """Find what is computed in less than float32 and should not be: exponentials, logarithms, sums, and logits.

    Logits are what a batched matrix product gives and an exponential takes, with no other product between the two; they
    are narrow if the product is, even if they are widened later.

    Args:
        program: what `jax.make_jaxpr(f)(...)` returns.

    Returns:
        What was found, such as `"exp in bfloat16"`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> sorted(narrow_operations(jax.make_jaxpr(jnp.exp)(jnp.ones(3, jnp.bfloat16))))
        ['exp in bfloat16']
    """
    return _narrow(_inner(program), set())[0]


def _narrow(jaxpr: Any, inputs: set[int]) -> tuple[set[str], set[int]]:
    """What was found, and which outputs come from a narrow product; `inputs` says the same of the inputs."""
    products = {variable for index, variable in enumerate(jaxpr.invars) if index in inputs}
    found: set[str] = set()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        tainted = {
            i for i, atom in enumerate(equation.invars) if not isinstance(atom, core.Literal) and atom in products
        }
        dtypes = [v.aval.dtype for v in equation.outvars if _is_float(v) and jnp.finfo(v.aval.dtype).bits < 32]
        children = list(_children(equation))
        for child in children:
            same = len(child.invars) == len(equation.invars)
            below, outputs = _narrow(child, tainted if same else set())
            found |= below
            products |= {v for i, v in enumerate(equation.outvars) if i in outputs and same}
        if children:
            continue
        if name in _SUMS and dtypes:
            found.add(f"{name} in {dtypes[0]}")
        if name == "dot_general":
            if dtypes and equation.params["dimension_numbers"][1][0]:
                products |= set(equation.outvars)
        elif name in ("exp", "exp2") and tainted:
            found.add("logits in less than float32")
        elif tainted:
            products |= set(equation.outvars)
    return found, {index for index, variable in enumerate(jaxpr.outvars) if variable in products}
