"""The TPU kernel behind the softmax engine: what it takes, and how a `Problem` becomes its arguments."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jattn.softmax import platforms
from jattn.softmax.blockwise import schedule
from jattn.softmax.decoding import evaluated_mask, live_tiles
from jattn.softmax.kernel_arguments import (
    gather_reason,
    gathers,
    gathers_pairs,
    make_backward,
    make_inputs,
    make_pipeline,
    make_tiling,
    named_cotangents,
)
from jattn.softmax.normalizers import Pointwise, Softmax
from jattn.softmax.packed_visibility import with_packed_visibility
from jattn.softmax.problem import Problem, slot_tokens
from pallas_kernels.flash_attention import tpu as kernel
from pallas_kernels.flash_attention import tpu_backward as backward_kernel
from pallas_kernels.flash_attention import tpu_sizes
from pallas_kernels.flash_attention.steps import make_steps
from pallas_kernels.flash_decode import tpu as decode_kernel

DTYPES = ("float32", "bfloat16", "float64")


def unsupported(problem: Problem) -> str:
    """Why the kernel cannot take a problem, with who can; empty if it can."""
    dtypes = {str(x.dtype) for x in (problem.query, problem.key, problem.value)}
    reason = ""
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        reason = f"queries, keys and values of {', '.join(sorted(dtypes))}; it takes one of {', '.join(DTYPES)}"
    elif dtypes == {"float64"} and not interpreted():
        reason = "float64 outside of the interpreter"
    elif problem.sizes[2] == 1 and not interpreted():
        reason = "a single key, whose products Mosaic does not compile,"
    elif gathers_pairs(problem, (problem.bias, *problem.operands.values())):
        reason = "a bias or operand of pairs beside a layout that permutes tokens"
    elif found := gather_reason(problem):
        reason = found
    elif not isinstance(problem.normalizer, Softmax | Pointwise):
        reason = f"the normalizer {type(problem.normalizer).__name__}, which needs two passes"
    elif _tables(problem) and any(x is not None for x in _moved(problem)):
        reason = "a table of offsets beside explicit positions or a layout that permutes tokens"
    else:
        reason = _layout_reason(problem) or _lists_reason(problem)
    return reason and f"it does not take {reason}; 'blockwise' does"


def remark(problem: Problem) -> str:
    """What does not go through the kernel although the problem does: nothing."""
    return ""


def _tables(problem: Problem) -> bool:
    return any(x.ndim == 3 for x in problem.operands.values())


def _moved(problem: Problem) -> tuple[Any, ...]:
    """What makes a token's position another one than its place."""
    return (problem.query_positions, problem.key_positions, *slot_tokens(problem))


def _layout_reason(problem: Problem) -> str:
    if problem.layout is None:
        return ""
    try:
        for backward in (False, True):
            _sizes(problem, {"query": problem.query, "value": problem.value}, backward)
    except ValueError as error:
        return f"a block layout with these tiles ({error})"
    return ""


def _lists_reason(problem: Problem) -> str:
    sizes = [_sizes(problem, {"query": problem.query, "value": problem.value}, backward) for backward in (False, True)]
    count = _list_bytes if problem.layout is not None else _joined_bytes
    asked = max(count(problem, x) for x in sizes)
    if asked <= tpu_sizes.SCALAR_MEMORY:
        return ""
    return (
        f"{'' if problem.layout is None else 'a block layout of '}so many tiles: their list may take {asked} bytes of "
        f"scalar memory, there are {tpu_sizes.SCALAR_MEMORY}; larger tiles make it shorter"
    )


def _joined_bytes(problem: Problem, sizes: tpu_sizes.TpuTiles) -> int:
    """Of the longest list that is needed where no layout says what is live, and batch rows and heads share it."""
    asked = _list_bytes(problem, sizes) // (problem.sizes[0] * problem.sizes[3])
    pairs = [x for x in (problem.bias, *problem.operands.values()) if x is not None and min(x.shape[2:]) > 1]
    if asked <= tpu_sizes.SCALAR_MEMORY or pairs:
        return asked
    # Static masks may leave few of so many tiles; gradients of pairs walk over all.
    code = _code(problem, sizes)
    return 4 * max(make_steps(x).size for x in (code, code.swapaxes(2, 3)))


def _list_bytes(problem: Problem, sizes: tpu_sizes.TpuTiles) -> int:
    """Of the longest list of tiles that may be needed: one for every batch row and head."""
    batch, length, source, num_heads, _ = problem.sizes
    if problem.layout is not None:
        length, source = problem.layout.query_slots, problem.layout.key_slots
    return 4 * batch * num_heads * -(-length // sizes.block_q) * -(-source // sizes.block_k)


def _sizes(problem: Problem, sources: dict[str, Any], backward: bool) -> tpu_sizes.TpuTiles:
    query, value = sources["query"], sources["value"]
    widths = (query.shape[-1], value.shape[-1], query.dtype.itemsize)
    blocks = problem.block_sizes
    if problem.layout is not None:
        blocks = (problem.layout.query_block, problem.layout.key_block)
    if blocks is None:
        return tpu_sizes.choose(*widths, backward)
    sizes = tpu_sizes.TpuTiles(*blocks)
    tpu_sizes.check(sizes, *widths, backward)
    return sizes


def _code(problem: Problem, sizes: tpu_sizes.TpuTiles) -> Any:
    """Class of every tile; of all batch rows and heads together where scalar memory could not hold a list for each."""
    code = make_tiling(problem, sizes.block_q, sizes.block_k).code
    if problem.layout is not None or _list_bytes(problem, sizes) <= tpu_sizes.SCALAR_MEMORY:
        return code
    # Masks are evaluated in partial tiles, so what is dead for one head only is masked there.
    return schedule.joined_code(code)


def interpreted() -> bool:
    """Whether the kernel runs in Pallas' interpreter: where there is no TPU, so that it can be tested."""
    return platforms.current().name != "tpu"


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


def _in_tiles(problem: Problem, sources: dict[str, Any], sizes: tpu_sizes.TpuTiles, code: Any) -> dict[str, Any]:
    """The arguments of kernels that go through tiles, with packed bits where masks hold arrays."""
    arguments = _arguments(problem, sources)
    predicate = None if problem.layout is None else problem.layout.predicate
    if gathers(problem) or jax.tree.leaves((problem.mask, predicate)):
        blocks = (min(sizes.block_q, sources["query"].shape[1]), min(sizes.block_k, sources["key"].shape[1]))
        found = with_packed_visibility(problem, arguments["inputs"], arguments["pipeline"], code, *blocks)
        arguments["inputs"], arguments["pipeline"] = found
    return {**arguments, "sizes": sizes}


def forward(problem: Problem, sources: dict[str, Any], dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Output `[B, T, N, Dv]` in `dtype`, lse `[B, T, N]`; pointwise: unscaled sums, and sums of weights."""
    if problem.sizes[1] == 1 and problem.layout is None:
        key, value = sources["key"], sources["value"]
        block = decode_kernel.tile_keys(key.shape[2], key.shape[3], value.shape[3], key.dtype.itemsize)
        block = block if problem.block_sizes is None else problem.block_sizes[1]
        arguments, live = _arguments(evaluated_mask(problem), sources), live_tiles(problem, block)
        out, lse = decode_kernel.forward(**arguments, live=live, block_k=block)
    else:
        sizes = _sizes(problem, sources, False)
        code = _code(problem, sizes)
        out, lse = kernel.forward(**_in_tiles(problem, sources, sizes, code), code=code, out_dtype=dtype)
    return out.astype(dtype), jnp.swapaxes(lse, 1, 2)


def pull_back(problem: Problem, sources: dict[str, Any], cotangents: Any, like: dict[str, Any]) -> dict[str, Any]:
    """Transpose of the tangent of the sums: cotangents of both sums in, those of the sources named in `like` out."""
    sizes = _sizes(problem, sources, True)
    code = _code(problem, sizes)
    given, wanted = make_backward(sources, cotangents, code, like)
    found = backward_kernel.backward(**_in_tiles(problem, sources, sizes, code), given=given, wanted=wanted)
    return named_cotangents(problem, sources, found, like)


def pulls(problem: Problem, like: dict[str, Any]) -> bool:
    """Whether the kernel has all of these gradients: it has none of what rows carry."""
    return "rows" not in like
