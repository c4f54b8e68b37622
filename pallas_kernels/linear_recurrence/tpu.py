"""Linear recurrences between chunks on TPUs: the grid walks along the chunks, the state stays in scratch memory."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention.pipeline import result_shape
from pallas_kernels.linear_recurrence.parts import MULTIPLIED, Parts, backward_step, forward_step, narrowed

FILLS = False
"""Whether sizes must be powers of two."""


def dot(precision: Any, x, y, trans_a: bool = False, trans_b: bool = False):
    """The product of two matrices, summed in float32 at least."""
    contracted = ((0 if trans_a else 1,), (1 if trans_b else 0,))
    dtype = jnp.promote_types(jnp.promote_types(x.dtype, y.dtype), jnp.float32)
    x, y = narrowed(x, y)
    return jax.lax.dot_general(x, y, (contracted, ((), ())), precision=precision, preferred_element_type=dtype)


def _parts(names, refs) -> Parts:
    return Parts(**dict.fromkeys(Parts._fields) | {name: ref[0, 0] for name, ref in zip(names, refs, strict=True)})


def _forward_kernel(precision: Any, names, *refs):
    *inputs, first_ref, out_ref, starts_ref, last_ref, state_ref = refs
    chunk = pl.program_id(1)

    @pl.when(chunk == 0)
    def _():
        state_ref[...] = first_ref[0]

    state = state_ref[...]
    starts_ref[0, 0] = state
    out_ref[0, 0], new = forward_step(functools.partial(dot, precision), state, _parts(names, inputs))
    state_ref[...] = new

    @pl.when(chunk == pl.num_programs(1) - 1)
    def _():
        last_ref[0] = new


def _backward_kernel(precision: Any, names, *refs):
    *inputs, d_out_ref, d_last_ref, d_news_ref, d_first_ref, d_state_ref = refs
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        d_state_ref[...] = d_last_ref[0]

    d_new = d_state_ref[...]
    d_news_ref[0, 0] = d_new
    d_state = backward_step(functools.partial(dot, precision), _parts(names, inputs), d_out_ref[0, 0], d_new)
    d_state_ref[...] = d_state

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        d_first_ref[0] = d_state


def _call(kernel, name: str, arrays, states, outputs, ends, *, turned: bool, interpret: Any):
    """Run a kernel over the grid (P, n).

    Args:
        kernel: the kernel.
        name: of the kernel.
        arrays: `[P, n, rows, columns]` each.
        states: `[P, D, Dv]` each.
        outputs: shapes and dtypes of results a chunk.
        ends: likewise of results a row.
        turned: whether the last chunk comes first.
        interpret: whether to run in Pallas' interpreter.
    """
    rows, count = arrays[0].shape[:2]

    def of_chunk(shape):
        return pl.BlockSpec((1, 1, *shape[2:]), lambda p, c: (p, count - 1 - c if turned else c, 0, 0))

    def of_row(shape):
        return pl.BlockSpec((1, *shape[1:]), lambda p, c: (p, 0, 0))

    inputs = [*arrays, *states]
    state = states[0]
    return pl.pallas_call(
        kernel,
        grid=(rows, count),
        in_specs=[of_chunk(x.shape) for x in arrays] + [of_row(x.shape) for x in states],
        out_specs=[of_chunk(shape) for shape, _ in outputs] + [of_row(shape) for shape, _ in ends],
        out_shape=[result_shape(shape, dtype, inputs) for shape, dtype in (*outputs, *ends)],
        scratch_shapes=[pltpu.VMEM(state.shape[1:], state.dtype)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name=name,
    )(*inputs)


def inside_params(width: int) -> Any:
    """Of the kernels that make the matrices of chunks, for D channels."""
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel"))


def forward(state, parts: Parts, *, precision: Any = None, interpret: Any = False) -> tuple[Any, Any, Any]:
    """Walk along the chunks.

    Args:
        state: `[P, D, Dv]`, in the dtype of sums.
        parts: `[P, n, rows, columns]`.
        precision: of the products of float32.
        interpret: whether to run in Pallas' interpreter.

    Returns:
        Outputs `[P, n, M, Dv]`, the last state, and the states before each chunk `[P, n, D, Dv]`.
    """
    names = tuple(name for name, x in parts._asdict().items() if x is not None)
    arrays = [getattr(parts, name) for name in names]
    (rows, width, v_dim), count = state.shape, parts.rows.shape[1]
    out, starts, last = _call(
        functools.partial(_forward_kernel, precision, names),
        "linear_recurrence_forward",
        arrays,
        [state],
        [((*parts.rows.shape[:3], v_dim), state.dtype), ((rows, count, width, v_dim), state.dtype)],
        [(state.shape, state.dtype)],
        turned=False,
        interpret=interpret,
    )
    return out, last, starts


def backward(parts: Parts, d_out, d_last, *, precision: Any = None, interpret: Any = False) -> tuple[Any, Any]:
    """Walk back along the chunks.

    Args:
        parts: as for `forward`.
        d_out: cotangent of the outputs.
        d_last: cotangent of the last state.
        precision: of the products of float32.
        interpret: whether to run in Pallas' interpreter.

    Returns:
        Cotangents of the states after each chunk `[P, n, D, Dv]`, and of the first state.
    """
    names = tuple(name for name in MULTIPLIED if getattr(parts, name) is not None)
    count = parts.rows.shape[1]
    d_news, d_first = _call(
        functools.partial(_backward_kernel, precision, names),
        "linear_recurrence_backward",
        [*(getattr(parts, name) for name in names), d_out],
        [d_last],
        [((len(d_last), count, *d_last.shape[1:]), d_last.dtype)],
        [(d_last.shape, d_last.dtype)],
        turned=True,
        interpret=interpret,
    )
    return d_news, d_first
