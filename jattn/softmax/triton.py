"""The Triton kernel behind the softmax engine: what it takes, and how a `Problem` becomes its arguments."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jattn.softmax import platforms
from jattn.softmax.decoding import live_tiles
from jattn.softmax.kernel_arguments import (
    gather_reason,
    gathers_pairs,
    make_backward,
    make_inputs,
    make_pipeline,
    make_tiling,
    named_cotangents,
)
from jattn.softmax.normalizers import Pointwise, Softmax
from jattn.softmax.problem import Problem, slot_tokens
from pallas_kernels.flash_attention import sizes as tile_sizes
from pallas_kernels.flash_attention import triton as kernel
from pallas_kernels.flash_attention import triton_backward as backward_kernel
from pallas_kernels.flash_decode import triton as decode_kernel

DTYPES = ("float32", "bfloat16", "float16", "float64")
MAX_HEAD_DIM = 256
DECODE_BLOCK = 64
"""Keys of a tile where there is a single query."""


def unsupported(problem: Problem) -> str:
    """Why the kernel cannot take a problem, with who can; empty if it can."""
    dtypes = {str(x.dtype) for x in (problem.query, problem.key, problem.value)}
    widths = (problem.query.shape[-1], problem.value.shape[-1])
    reason = ""
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        reason = f"queries, keys and values of {', '.join(sorted(dtypes))}; it takes one of {', '.join(DTYPES)}"
    elif dtypes == {"float64"} and not interpreted():
        reason = "float64 outside of the interpreter"
    elif max(widths) > MAX_HEAD_DIM:
        reason = f"head dims {widths[0]} and {widths[1]}; its tiles reach to {MAX_HEAD_DIM}"
    elif (found := _layout_reason(problem)) or (found := gather_reason(problem)):
        reason = found
    elif not isinstance(problem.normalizer, Softmax | Pointwise):
        reason = f"the normalizer {type(problem.normalizer).__name__}, which needs two passes"
    return reason and f"it does not take {reason}; 'blockwise' does"


def remark(problem: Problem) -> str:
    """What does not go through the kernel although the problem does, to be put behind a reason."""
    found = _not_pulled(problem, problem.bias, problem.operands)
    return found and f"; with {found} the backward pass is that of 'blockwise'"


def _layout_reason(problem: Problem) -> str:
    layout = problem.layout
    if layout is None:
        return ""
    try:
        for backward in (False, True):
            _sizes(problem, {"query": problem.query, "value": problem.value}, backward)
    except ValueError as error:
        return f"a block layout with these tiles ({error})"
    return ""


def _sizes(problem: Problem, sources: dict[str, Any], backward: bool) -> tile_sizes.TileSizes:
    query, value = sources["query"], sources["value"]
    widths = (query.shape[-1], value.shape[-1], query.dtype.itemsize)
    platform = platforms.current()
    capability = platform.capability or "9.0"
    if problem.layout is not None:
        blocks = (problem.layout.query_block, problem.layout.key_block)
        warps = 8 if blocks[0] * blocks[1] > 64 * 64 else 4
        # One stage takes less memory; what is wrong with it is the more telling complaint.
        for stages in (2, 1):
            sizes = tile_sizes.TileSizes(*blocks, warps, stages)
            with contextlib.suppress(ValueError):
                tile_sizes.check(sizes, *widths, backward, capability)
                return sizes
        tile_sizes.check(sizes, *widths, backward, capability)
    if problem.block_sizes is not None:
        sizes = tile_sizes.TileSizes(*problem.block_sizes)
        tile_sizes.check(sizes, *widths, backward, capability)
        return sizes
    return tile_sizes.choose(*widths, backward, capability, platform.kind)


def interpreted() -> bool:
    """Whether the kernel runs in Pallas' interpreter: where there is no GPU, so that it can be tested."""
    return platforms.current().name != "gpu"


def _arguments(problem: Problem, sources: dict[str, Any]) -> dict[str, Any]:
    """What all kernels are given, by name."""
    return {
        "query": sources["query"],
        "key": sources["key"],
        "value": sources["value"],
        "inputs": make_inputs(problem, sources),
        "pipeline": make_pipeline(problem, "bias" in sources),
        "scale": problem.scale,
        "precision": problem.precision,
        "interpret": interpreted(),
    }


def forward(problem: Problem, sources: dict[str, Any], dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Output `[B, T, N, Dv]` in `dtype`, lse `[B, T, N]`; pointwise: unscaled sums, and sums of weights."""
    arguments = _arguments(problem, sources)
    length = problem.sizes[1]
    if length == 1 and problem.layout is None:
        block = DECODE_BLOCK if problem.block_sizes is None else problem.block_sizes[1]
        out, lse = decode_kernel.forward(**arguments, live=live_tiles(problem, block), block_k=block)
    else:
        sizes = _sizes(problem, sources, False)
        tiling = make_tiling(problem, sizes.block_q, sizes.block_k)
        out, lse = kernel.forward(**arguments, lists=tiling.rows, sizes=sizes, out_dtype=dtype)
    return out.astype(dtype), jnp.swapaxes(lse, 1, 2)


def pull_back(problem: Problem, sources: dict[str, Any], cotangents: Any, like: dict[str, Any]) -> dict[str, Any]:
    """Transpose of the tangent of the sums: cotangents of both sums in, those of the sources named in `like` out."""
    sizes = _sizes(problem, sources, True)
    tiling = make_tiling(problem, sizes.block_q, sizes.block_k)
    given, wanted = make_backward(sources, cotangents, jnp.asarray(tiling.code, jnp.int32), like)
    given = dataclasses.replace(given, columns=tiling.columns)
    arguments = _arguments(problem, sources)
    found = backward_kernel.backward(**arguments, lists=tiling.rows, sizes=sizes, given=given, wanted=wanted)
    return named_cotangents(problem, sources, found, like)


def pulls(problem: Problem, like: dict[str, Any]) -> bool:
    """Whether the kernel has all of these gradients; it has none of what rows carry."""
    return "rows" not in like and not _not_pulled(problem, like.get("bias"), like.get("operands", {}))


def _not_pulled(problem: Problem, bias: Any, operands: dict[str, Any]) -> str:
    """What among these has no gradient in the kernel, for a message; empty if everything has."""
    moved = any(x is not None for x in (problem.query_positions, problem.key_positions, *slot_tokens(problem)))
    if moved and any(x.ndim == 3 for x in operands.values()):
        return "an offset table, and positions or a layout that permutes tokens,"
    if gathers_pairs(problem, (bias, *operands.values())):
        return "a bias or operand of pairs, and a layout that permutes tokens,"
    return ""
