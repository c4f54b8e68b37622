"""Linear recurrences between chunks on NVIDIA GPUs: a program a row and block of value columns, the state in registers.

Columns of the state never meet, so blocks of them are walked along independently, without atomics. All sizes are
filled up to powers of two. Matrices of a chunk pass through shared memory: in float32, GPUs that have 99 KiB of it take
chunks of 32 tokens, not of 64.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.flash_attention.pipeline import result_shape
from pallas_kernels.flash_attention.sizes import padded
from pallas_kernels.linear_recurrence.parts import MULTIPLIED, Parts, backward_step, forward_step, narrowed

FILLS = True
"""Whether sizes must be powers of two."""
OF_COLUMNS = ("value", "read")
"""Parts that have value columns; each program reads its own."""


def dot(precision: Any, x, y, trans_a: bool = False, trans_b: bool = False):
    """The product of two matrices, summed in float32 at least."""
    x, y = narrowed(x, y)
    return plgpu.dot(x, y, trans_a=trans_a, trans_b=trans_b, precision=precision)


def _parts(names, refs, chunk) -> Parts:
    loaded = {name: plgpu.load(ref.at[chunk]) for name, ref in zip(names, refs, strict=True)}
    return Parts(**dict.fromkeys(Parts._fields) | loaded)


def _forward_kernel(precision: Any, names, count: int, *refs):
    *inputs, first_ref, out_ref, starts_ref, last_ref = refs

    def step(chunk, state):
        plgpu.store(starts_ref.at[chunk], state)
        out, new = forward_step(functools.partial(dot, precision), state, _parts(names, inputs, chunk))
        plgpu.store(out_ref.at[chunk], out)
        return new

    plgpu.store(last_ref, jax.lax.fori_loop(0, count, step, plgpu.load(first_ref)))


def _backward_kernel(precision: Any, names, count: int, *refs):
    *inputs, d_out_ref, d_last_ref, d_news_ref, d_first_ref = refs

    def step(index, d_new):
        chunk = count - 1 - index
        plgpu.store(d_news_ref.at[chunk], d_new)
        parts = _parts(names, inputs, chunk)
        return backward_step(functools.partial(dot, precision), parts, plgpu.load(d_out_ref.at[chunk]), d_new)

    plgpu.store(d_first_ref, jax.lax.fori_loop(0, count, step, plgpu.load(d_last_ref)))


def _filled(x, *, columns: bool = True):
    """The last two axes filled up to powers of two, or the rows alone."""
    rows, width = x.shape[-2:]
    width = padded(width) - width if columns else 0
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, padded(rows) - rows), (0, width)])


def _columns(width: int, v_dim: int, itemsize: int) -> int:
    """Columns of values that a program takes: few where rows are long, for products pass through shared memory."""
    most = 64 if itemsize * padded(width) <= 256 else 32 if itemsize * padded(width) <= 512 else 16
    return min(most, padded(v_dim))


def _spec(shape, block: int | None):
    """All of a row, or one block of its columns."""
    if block is None:
        return pl.BlockSpec((None, *shape[1:]), lambda p, j: (p,) + (0,) * (len(shape) - 1))
    return pl.BlockSpec((None, *shape[1:-1], block), lambda p, j: (p,) + (0,) * (len(shape) - 2) + (j,))


def _prepare(parts: Parts, v_dim: int, wanted=Parts._fields):
    names = tuple(name for name in wanted if getattr(parts, name) is not None)
    arrays = [_filled(getattr(parts, name), columns=name != "decay") for name in names]
    block = _columns(parts.rows.shape[-1], v_dim, parts.rows.dtype.itemsize)
    specs = [_spec(x.shape, block if name in OF_COLUMNS else None) for name, x in zip(names, arrays, strict=True)]
    return names, arrays, specs, block, padded(v_dim) // block


def _compiler_params() -> Any:
    return plgpu.CompilerParams(num_warps=4, num_stages=1)


def inside_params(width: int) -> Any:
    """Of the kernels that make the matrices of chunks, for D channels."""
    # With fewer warps Blackwell keeps sums of 128 channels in its tensor memory, which is too small for all of them,
    # and programs in float32 take minutes to compile.
    return plgpu.CompilerParams(num_warps=8 if width <= 64 else 16, num_stages=1)


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
    (rows, width, v_dim), (count, size) = state.shape, parts.rows.shape[1:3]
    names, arrays, specs, block, blocks = _prepare(parts, v_dim)
    first = _filled(state)
    inputs = [*arrays, first]
    tall = (rows, count, *first.shape[1:])
    shapes = [(rows, count, padded(size), first.shape[-1]), tall, first.shape]
    out, starts, last = pl.pallas_call(
        functools.partial(_forward_kernel, precision, names, count),
        grid=(rows, blocks),
        in_specs=[*specs, _spec(first.shape, block)],
        out_specs=[_spec(shape, block) for shape in shapes],
        out_shape=[result_shape(shape, state.dtype, inputs) for shape in shapes],
        compiler_params=_compiler_params(),
        interpret=interpret,
        name="linear_recurrence_forward",
    )(*inputs)
    return out[:, :, :size, :v_dim], last[:, :width, :v_dim], starts[:, :, :width, :v_dim]


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
    (rows, width, v_dim), count = d_last.shape, parts.rows.shape[1]
    names, arrays, specs, block, blocks = _prepare(parts, v_dim, MULTIPLIED)
    columns = [_filled(d_out), _filled(d_last)]
    inputs = [*arrays, *columns]
    last = columns[-1].shape
    shapes = [(rows, count, *last[1:]), last]
    d_news, d_first = pl.pallas_call(
        functools.partial(_backward_kernel, precision, names, count),
        grid=(rows, blocks),
        in_specs=[*specs, *(_spec(x.shape, block) for x in columns)],
        out_specs=[_spec(shape, block) for shape in shapes],
        out_shape=[result_shape(shape, d_last.dtype, inputs) for shape in shapes],
        compiler_params=_compiler_params(),
        interpret=interpret,
        name="linear_recurrence_backward",
    )(*inputs)
    return d_news[:, :, :width, :v_dim], d_first[:, :width, :v_dim]
