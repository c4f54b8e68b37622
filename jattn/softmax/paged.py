"""Attention over keys and values that lie in pages of a pool that all rows of a batch share."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.softmax.api import dot_product_attention
from jattn.softmax.arguments import build_problem
from jattn.softmax.decoding import evaluated_mask, live_tiles
from jattn.softmax.dispatch import IMPLEMENTATIONS
from jattn.softmax.kernel_arguments import make_inputs, make_pipeline
from jattn.softmax.merge import join_sinks
from jattn.softmax.normalizers import Normalizer, Pointwise, Softmax
from jattn.softmax.platforms import Platform, current
from jattn.softmax.problem import Problem, dense_visibility
from pallas_kernels.flash_decode.pages import block_of_page

KERNELS = {"triton": "gpu", "tpu": "tpu"}
"""Platform of each kernel that reads pages; elsewhere it runs in the interpreter of Pallas."""
GATHERED = tuple(name for name in (None, "xla", *IMPLEMENTATIONS) if name not in KERNELS)
"""Implementations of `dot_product_attention` that get the pages of a row put together."""
MAX_HEAD_DIM = 256
TRITON_KEYS = 64
"""Keys of a tile on GPUs, at most."""

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _How:
    """What is known while tracing; the platform is a part of it because it decides what is traced."""

    implementation: str | None
    scale: float | None
    logit_soft_cap: float | None
    normalizer: Normalizer | None
    precision: Any
    return_residual: bool
    platform: Platform


def paged_attention(
    query,
    key_pool,
    value_pool,
    block_table,
    lengths,
    *,
    mask=None,
    scale=None,
    logit_soft_cap=None,
    sinks=None,
    score_mod=None,
    bias=None,
    normalizer=None,
    query_positions=None,
    key_positions=None,
    precision=None,
    return_residual: bool = False,
    implementation: str | None = None,
) -> Any:
    r"""Attention of the newest tokens of each row over a key-value cache in pages.

    Token t of row b lies at pool[block_table[b, t // page], t % page]; with k and v so put together, the output is that
    of `dot_product_attention` over the first lengths[b] tokens. Masks, score mods and biases see tokens, not pages.

    Entries of the table from a row's length on are not read, and may hold anything. Pages may be shared between rows.
    Gradients, and tangents, are those of the pages put together, whatever the implementation; a call that is
    differentiated takes that way forward, too.

    Args:
      query: `[B, T, N, D]`, the last T of lengths[b] tokens; T = 1 in decoding.
      key_pool: `[P, page, K, D]`; K divides N.
      value_pool: `[P, page, K, Dv]`.
      block_table: integers `[B, M]`, in 0..P-1.
      lengths: integers `[B]`, tokens of each row, M * page at most; 0: a row that sees nothing.
      mask: booleans that broadcast to `[B, N, T, M * page]`, or a `Mask` of `jattn.masks`. With T > 1 the causal mask
        has to be given.
      scale: factor of the logits, D**-0.5 if None.
      logit_soft_cap: cap * tanh(logits / cap) on the scaled logits.
      sinks: `[N]` learned logits that take part in the softmax and carry no value.
      score_mod: a `ScoreMod`, with operands for M * page keys.
      bias: added to the logits, broadcasts to `[B, N, T, M * page]`; -inf hides.
      normalizer: a `Normalizer` of `jattn.normalizers`; softmax if None.
      query_positions: `[B|1, T]` integers that masks and score mods see; lengths - T + t if None.
      key_positions: `[B|1, M * page]` integers that they see; the token's index if None.
      precision: of the matrix products, as in jax.lax.dot_general.
      return_residual: also return the log-sum-exp of the visible logits (without sinks).
      implementation: None, "xla", "reference" or "blockwise": pages are put together for `dot_product_attention`; or
        "triton" (NVIDIA GPUs from Ampere on) or "tpu", kernels for T = 1 that read them where they lie, which no run on
        such a device has verified yet. On other platforms these run in the interpreter of Pallas, for tests.

    Returns:
      `[B, T, N, Dv]` in the query's dtype, 0 for rows that see nothing; with `return_residual` also lse `[B, T, N]`,
      float32 (float64 for float64 inputs), -inf for such rows.

    Raises:
      ValueError: an argument of the wrong shape, dtype or value; pages that a kernel cannot cut into tiles.
      TypeError: an argument of the wrong type.
      NotImplementedError: a kernel that was asked for does not take this; the message says what does.

    Example:
      >>> import jax, jax.numpy as jnp, jattn
      >>> pool = jax.random.normal(jax.random.key(0), (3, 2, 1, 4))  # 3 pages of 2 tokens, one head
      >>> query = jnp.ones((1, 1, 1, 4))
      >>> table, lengths = jnp.array([[2, 0]]), jnp.array([3])
      >>> out = jattn.paged_attention(query, pool, pool, table, lengths)
      >>> tokens = jnp.concatenate([pool[2], pool[0, :1]])[None]
      >>> bool(jnp.allclose(out, jattn.dot_product_attention(query, tokens, tokens)))
      True

    Source: Efficient Memory Management for Large Language Model Serving with PagedAttention (arXiv:2309.06180).
    """
    query, key_pool, value_pool, block_table, lengths = _check(query, key_pool, value_pool, block_table, lengths)
    if implementation not in (*GATHERED, *KERNELS):
        raise ValueError(
            f"paged_attention: unknown implementation {implementation!r}; this version has "
            f"{', '.join(str(name) for name in (*GATHERED, *KERNELS))}"
        )
    if isinstance(scale, jax.Array) and not scale.ndim:
        # It may be traced and carry a gradient; as a part of the query it needs no rule of its own.
        query, scale = query * scale.astype(query.dtype), 1.0
    scale = scale.item() if isinstance(scale, np.ndarray) and not scale.ndim else scale
    precision = tuple(precision) if isinstance(precision, list) else precision
    how = _How(implementation, scale, logit_soft_cap, normalizer, precision, return_residual, current())
    try:
        hash(how)
    except TypeError as error:
        raise TypeError(
            f"paged_attention: scale, logit_soft_cap, normalizer, precision and return_residual must be known while "
            f"tracing, got {how}"
        ) from error
    arrays = {
        "query": query,
        "key": key_pool,
        "value": value_pool,
        "block_table": block_table,
        "lengths": lengths,
        "mask": mask,
        "bias": bias,
        "sinks": sinks,
        "score_mod": score_mod,
        "query_positions": query_positions,
        "key_positions": key_positions,
    }
    try:
        out, lse = _run(how, arrays)
    except (ValueError, TypeError) as error:
        if "dot_product_attention:" not in str(error):
            raise
        raise type(error)(str(error).replace("dot_product_attention:", "paged_attention:")) from None
    return (out, lse) if return_residual else out


def _check(query, key_pool, value_pool, block_table, lengths) -> tuple[jax.Array, ...]:
    """The five arrays, of shapes that fit together; what else there is `build_problem` checks."""
    query, key_pool, value_pool, block_table, lengths = (
        jnp.asarray(x) for x in (query, key_pool, value_pool, block_table, lengths)
    )
    batch, pool = query.shape[:1], key_pool.shape[:3]
    rules = (
        ("query", query, query.ndim == 4, "[B, T, N, D]"),
        ("key_pool", key_pool, key_pool.ndim == 4 and 0 not in pool, "[P, page, K, D]"),
        ("value_pool", value_pool, value_pool.ndim == 4 and value_pool.shape[:3] == pool, f"({pool}, Dv)"),
        ("block_table", block_table, block_table.ndim == 2 and block_table.shape[:1] == batch, f"({batch}, M)"),
        ("lengths", lengths, lengths.shape == batch, f"{batch}"),
    )
    for name, array, fits, expected in rules:
        if not fits:
            raise ValueError(f"paged_attention: {name} has shape {array.shape}; expected {expected}")
    for name, array in (("block_table", block_table), ("lengths", lengths)):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"paged_attention: {name} has dtype {array.dtype}; expected integers")
    return query, key_pool, value_pool, block_table.astype(jnp.int32), lengths.astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def _run(how: _How, arrays: Arrays):
    if arrays["query_positions"] is None:
        length = arrays["query"].shape[1]
        arrays = {**arrays, "query_positions": arrays["lengths"][:, None] - length + np.arange(length)}
    return _with_kernel(how, arrays) if how.implementation in KERNELS else _put_together(how, arrays)


def _arguments(how: _How, arrays: Arrays) -> dict[str, Any]:
    """The arguments that `dot_product_attention` has as well."""
    names = ("bias", "mask", "sinks", "score_mod", "query_positions", "key_positions")
    return {name: arrays[name] for name in names} | {
        "key_value_seq_lengths": arrays["lengths"],
        "scale": how.scale,
        "logit_soft_cap": how.logit_soft_cap,
        "normalizer": how.normalizer,
        "precision": how.precision,
    }


def _put_together(how: _How, arrays: Arrays):
    """Output and lse (None unless wanted) over the pages put together as a cache `[B, M * page, K, D]`."""
    count, page = arrays["key"].shape[:2]
    table = jnp.clip(arrays["block_table"], 0, count - 1)
    held = np.arange(table.shape[1]) * page < arrays["lengths"][:, None]
    # What is not held is read from the first page, whatever the table says, and hidden by the lengths.
    table = jnp.where(held, table, 0)
    key, value = (arrays[name][table] for name in ("key", "value"))
    key, value = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (key, value))
    found = dot_product_attention(
        arrays["query"],
        key,
        value,
        **_arguments(how, arrays),
        return_residual=how.return_residual,
        implementation=None if how.implementation in KERNELS else how.implementation,
    )
    return found if how.return_residual else (found, None)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _with_kernel(how: _How, arrays: Arrays):
    problem, sinks = _problem(how, arrays)
    softmax = isinstance(problem.normalizer, Softmax)
    lse = None
    if softmax or how.return_residual:
        out, lse = _launch(how, dataclasses.replace(problem, normalizer=Softmax()), arrays)
    if isinstance(problem.normalizer, Pointwise):
        out, total = _launch(how, problem, arrays)
        count = dense_visibility(problem)[:, :, 0].sum(-1)[:, None] if problem.normalizer.needs_count else None
        out = out * problem.normalizer.scale(total, count)[..., None]
    if sinks is not None:
        out = join_sinks(out, lse, sinks)
    return out.astype(problem.query.dtype), lse if how.return_residual else None


@_with_kernel.defjvp
def _tangent(how: _How, primals, tangents):
    return jax.jvp(functools.partial(_put_together, how), primals, tangents)


def _problem(how: _How, arrays: Arrays) -> tuple[Problem, Any]:
    """The problem with pools in place of keys and values, and the sinks; masks that hold arrays are evaluated."""
    key, value = arrays["key"], arrays["value"]
    rows = (arrays["block_table"].shape[0], arrays["block_table"].shape[1] * key.shape[1])
    # Only their shapes and dtypes matter, so that the compiler never makes them.
    like = [jnp.broadcast_to(jnp.zeros((), x.dtype), (*rows, *x.shape[2:])) for x in (key, value)]
    problem, sinks = build_problem(arrays["query"], *like, **_arguments(how, arrays))
    reason = _unsupported(how, problem)
    if reason:
        raise NotImplementedError(
            f"paged_attention: implementation {how.implementation!r} does not take {reason}; 'blockwise' does"
        )
    return dataclasses.replace(evaluated_mask(problem), key=key, value=value), sinks


def _unsupported(how: _How, problem: Problem) -> str:
    """What a kernel does not take of a problem; empty if it takes it."""
    dtype, widths = problem.query.dtype, (problem.query.shape[-1], problem.value.shape[-1])
    interpreted = how.platform.name != KERNELS[str(how.implementation)]
    if problem.sizes[1] != 1:
        return f"{problem.sizes[1]} queries a row (T = 1 it does)"
    if dtype == jnp.float64 and not interpreted:
        return "float64 outside of the interpreter"
    if dtype == jnp.float16 and how.implementation == "tpu":
        return "float16"
    if max(widths) > MAX_HEAD_DIM:
        return f"head dims {widths[0]} and {widths[1]} (up to {MAX_HEAD_DIM} it does)"
    if not isinstance(problem.normalizer, Softmax | Pointwise):
        return f"the normalizer {type(problem.normalizer).__name__}, which needs two passes"
    return ""


def _launch(how: _How, problem: Problem, arrays: Arrays):
    """Output `[B, 1, N, Dv]` and lse `[B, 1, N]`; for pointwise normalizers unscaled sums and sums of weights."""
    # Pallas takes as long to import as the rest of the library, and most programs on CPUs never need it.
    kernel = importlib.import_module(f"pallas_kernels.flash_decode.{how.implementation}")
    key, value = problem.key, problem.value
    wanted = TRITON_KEYS
    if how.implementation == "tpu":
        wanted = kernel.tile_keys(key.shape[2], key.shape[3], value.shape[3], key.dtype.itemsize)
    block = block_of_page(key.shape[1], wanted)
    sources = {"operands": problem.operands} | ({} if problem.bias is None else {"bias": problem.bias})
    out, lse = kernel.forward(
        problem.query,
        key,
        value,
        live_tiles(problem, block),
        make_inputs(problem, sources),
        make_pipeline(problem, problem.bias is not None),
        block,
        scale=problem.scale,
        block_table=arrays["block_table"],
        precision=problem.precision,
        interpret=how.platform.name != KERNELS[str(how.implementation)],
    )
    return out, jnp.swapaxes(lse, 1, 2)
