"""The Mosaic GPU kernel behind the softmax engine: what it takes, and how a `Problem` becomes its arguments."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jattn.softmax import platforms
from jattn.softmax.kernel_arguments import make_backward, make_inputs, make_pipeline, make_tiling
from jattn.softmax.normalizers import Pointwise, Softmax
from jattn.softmax.problem import Problem
from pallas_kernels.flash_attention import mosaic_gpu as kernel
from pallas_kernels.flash_attention import mosaic_gpu_backward as backward_kernel
from pallas_kernels.flash_attention import mosaic_gpu_sizes as tile_sizes

DTYPES = ("bfloat16", "float16")
MAX_HEAD_DIM = 256
INTERPRET = False
"""Whether the kernels run in JAX's GPU interpreter, which is private and incomplete: for tests."""


def unsupported(problem: Problem) -> str:
    """Why the kernel cannot take a problem, with who can; empty if it can."""
    platform = platforms.current()
    if not INTERPRET and platform.name != "gpu":
        return f"it runs on NVIDIA Hopper GPUs, this is a {platform.name}; 'blockwise' runs here"
    if not INTERPRET and not platform.capability.startswith("9."):
        return (
            f"it is written for Hopper (compute capability 9.0), this GPU has {platform.capability}; 'triton' runs here"
        )
    dtypes = {str(x.dtype) for x in (problem.query, problem.key, problem.value)}
    widths = (problem.query.shape[-1], problem.value.shape[-1])
    reason, other = "", "triton"
    if len(dtypes) > 1 or not dtypes <= {*DTYPES, *(("float32",) if INTERPRET else ())}:
        reason = f"queries, keys and values of {', '.join(sorted(dtypes))}; it takes one of {', '.join(DTYPES)}"
    elif max(widths) > MAX_HEAD_DIM:
        reason, other = f"head dims {widths[0]} and {widths[1]}; its tiles reach to {MAX_HEAD_DIM}", "blockwise"
    elif problem.layout is not None:
        reason = "a block layout"
    elif any(x.ndim == 3 for x in problem.operands.values()):
        reason = "an offset table among the operands"
    elif jax.tree.leaves(problem.mask):
        reason = "a mask that holds arrays"
    elif not isinstance(problem.normalizer, Softmax | Pointwise):
        reason, other = f"the normalizer {type(problem.normalizer).__name__}, which needs two passes", "blockwise"
    else:
        try:
            for of in tile_sizes.PASSES:
                _sizes(problem, problem.query, problem.value, of)
        except ValueError as error:
            reason = f"these tiles ({error})"
    return reason and f"it does not take {reason}; {other!r} does"


def remark(problem: Problem) -> str:
    """What does not go through the kernel although the problem does, to be put behind a reason."""
    if problem.bias is not None or problem.operands:
        return "; if the bias or operands are differentiated, the backward pass is that of 'blockwise'"
    return ""


def _sizes(problem: Problem, query: Any, value: Any, of: str) -> tile_sizes.MosaicSizes:
    softmax = isinstance(problem.normalizer, Softmax)
    widths = (query.shape[-1], value.shape[-1], query.dtype.itemsize)
    found = tile_sizes.choose(*widths, of, not softmax)
    if problem.block_sizes is not None and of != "key":
        found = tile_sizes.MosaicSizes(*problem.block_sizes)
        tile_sizes.check(found, *widths, of, not softmax)
    return found


def _arguments(problem: Problem, sources: dict[str, Any]) -> dict[str, Any]:
    """What all kernels are given, by name."""
    return {
        "query": sources["query"],
        "key": sources["key"],
        "value": sources["value"],
        "inputs": make_inputs(problem, sources),
        "pipeline": make_pipeline(problem, "bias" in sources),
        "scale": problem.scale,
        "interpret": INTERPRET,
    }


def forward(problem: Problem, sources: dict[str, Any], dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Output `[B, T, N, Dv]` in `dtype`, lse `[B, T, N]`; pointwise: unscaled sums, and sums of weights."""
    sizes = _sizes(problem, sources["query"], sources["value"], "forward")
    tiling = make_tiling(problem, sizes.block_q, sizes.block_k)
    out, lse = kernel.forward(**_arguments(problem, sources), lists=tiling.rows, sizes=sizes)
    return out.astype(dtype), jnp.swapaxes(lse, 1, 2)


def pull_back(problem: Problem, sources: dict[str, Any], cotangents: Any, like: dict[str, Any]) -> dict[str, Any]:
    """Transpose of the tangent of the sums: cotangents of both sums in, those of the sources named in `like` out."""
    given, _ = make_backward(sources, cotangents, None, like)
    arguments = _arguments(problem, sources)
    found: dict[str, Any] = {}
    if "query" in like:
        sizes = _sizes(problem, sources["query"], sources["value"], "query")
        lists = make_tiling(problem, sizes.block_q, sizes.block_k).rows
        found["query"] = backward_kernel.backward_query(**arguments, lists=lists, sizes=sizes, given=given)
    if "key" in like or "value" in like:
        sizes = _sizes(problem, sources["query"], sources["value"], "key")
        lists = make_tiling(problem, sizes.block_q, sizes.block_k).columns
        both = backward_kernel.backward_key(**arguments, columns=lists, sizes=sizes, given=given)
        found["key"], found["value"] = both
    return {name: found[name].astype(x.dtype) for name, x in like.items()}


def pulls(problem: Problem, like: dict[str, Any]) -> bool:
    """Whether the kernel has all of these gradients: it has those of queries, keys and values."""
    return like.keys() <= {"query", "key", "value"}
