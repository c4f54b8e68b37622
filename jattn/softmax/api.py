"""The public entry point of the softmax engine."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jattn.softmax import blockwise, reference
from jattn.softmax.arguments import build_problem
from jattn.softmax.dispatch import WITHOUT_LSE, Explanation, choose, kernel_module
from jattn.softmax.merge import join_sinks
from jattn.softmax.platforms import Platform, current
from jattn.softmax.problem import Problem


def dot_product_attention(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    is_causal: bool = False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    implementation: str | None = None,
    return_residual: bool = False,
    segment_ids=None,
    query_positions=None,
    key_positions=None,
    score_mod=None,
    layout=None,
    logit_soft_cap=None,
    sinks=None,
    normalizer=None,
    dropout_rate: float = 0.0,
    dropout_key=None,
    precision=None,
    block_sizes=None,
) -> Any:
    r"""Scaled dot product attention: every argument of `jax.nn.dot_product_attention`, and more.

    logits_ij = scale * q_i . k_j -> soft cap -> score_mod -> + bias -> mask -> normalizer (sinks join here) ->
    dropout,  out_i = sum_j weights_ij v_j.  Query head n reads key and value head n // (N / K).

    Where jax.nn differs, these rules hold: a row that may attend to nothing gives 0 (jax.nn: the mean of the
    values); the residual is differentiable and float32 (jax.nn: no gradient, the key's dtype); Dv may differ from
    D; NaN or inf in keys, values or bias that no query may see reaches no output and no gradient.

    Args:
      query: `[B, T, N, D]` or `[T, N, D]`.
      key: `[B, S, K, D]`; K divides N.
      value: `[B, S, K, Dv]`.
      bias: added to the logits after cap and score_mod; broadcasts to `[B, N, T, S]`; differentiable. -inf hides.
      mask: booleans that broadcast to `[B, N, T, S]`, True = may attend; or a `Mask` of `jattn.masks`.
      scale: factor of the logits, D**-0.5 if None.
      is_causal: key position <= query position; both are counted from 0 unless given.
      query_seq_lengths: `[B]`, rows from there on are padding.
      key_value_seq_lengths: `[B]`, keys from there on are padding.
      local_window_size: (left, right) or an int for both: i - left <= j <= i + right.
      implementation: None (by platform and shape), "reference", "blockwise", "xla" (one of the two by shape),
        "triton" (one fused kernel on NVIDIA GPUs from Ampere on), "tpu" (one on TPUs), both elsewhere in Pallas'
        interpreter, for tests; "mosaic_gpu" (one for Hopper GPUs alone, bfloat16 and float16), or "cudnn" (NVIDIA's
        library through jax.nn: float16 and bfloat16, plain, causal, windowed or with key lengths).
      return_residual: also return the log-sum-exp of the visible logits (without sinks).
      segment_ids: `[B, T]`, or a pair of `[B, T]` and `[B, S]`: equal ids see each other, negative = padding.
      query_positions: `[B|1, T]` integers that is_causal, windows, masks and score mods see instead of 0..T-1.
      key_positions: `[B|1, S]` likewise.
      score_mod: a `ScoreMod`, differentiable in its operands.
      layout: a `BlockLayout`: only its live tiles are visited.
      logit_soft_cap: cap * tanh(logits / cap) on the scaled logits.
      sinks: `[N]` learned logits that take part in the softmax and carry no value (zeros: softmax off by one).
      normalizer: a `Normalizer` of `jattn.normalizers`; softmax if None.
      dropout_rate: probability of dropping a weight; kept ones are divided by 1 - rate. Which ones depends on the
        seed, batch index, query head, query row and key index only.
      dropout_key: a key of jax.random, needed for a rate above 0.
      precision: of the matrix products, as in jax.lax.dot_general.
      block_sizes: (query block, key block) of the blockwise implementation.

    Returns:
      `[B, T, N, Dv]` (or `[T, N, Dv]`) in the query's dtype; with `return_residual` also lse `[B, T, N]`, float32
      (float64 for float64 inputs), -inf for rows that see nothing.

    Raises:
      ValueError: an argument of the wrong shape, dtype or value, or a combination without meaning.
      TypeError: an argument of the wrong type.
      NotImplementedError: a kernel that was asked for does not take the problem; the message names what does.

    Example:
      >>> import jax, jax.numpy as jnp, jattn
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 5, 2, 4))
      >>> out, lse = jattn.dot_product_attention(q, k, v, mask=jattn.masks.sliding_window(2), return_residual=True)
      >>> out.shape, lse.shape
      ((1, 5, 2, 4), (1, 5, 2))
      >>> bool(jnp.allclose(out[:, 0], v[:, 0]))
      True

    Source: Attention Is All You Need (arXiv:1706.03762); order of the steps: Gemma 2 (arXiv:2408.00118) for cap before
    mask, FlexAttention (arXiv:2412.05496) for score mods.
    """
    problem, sinks = build_problem(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        segment_ids=segment_ids,
        query_positions=query_positions,
        key_positions=key_positions,
        score_mod=score_mod,
        layout=layout,
        logit_soft_cap=logit_soft_cap,
        sinks=sinks,
        normalizer=normalizer,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        precision=precision,
        block_sizes=block_sizes,
    )
    chosen = choose(problem, implementation, return_residual or sinks is not None).chosen
    out, lse = _run(problem, sinks, chosen, return_residual, current())
    if np.ndim(query) == 3:
        out, lse = out[0], None if lse is None else lse[0]
    return (out, lse) if return_residual else out


# The platform decides what is traced, so it is a part of what traces are kept under.
@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _run(problem: Problem, sinks, implementation: str, return_residual: bool, platform: Platform):
    residual = return_residual or sinks is not None
    if implementation == "reference":
        out, lse = reference.attend(problem, residual)
    elif implementation in WITHOUT_LSE:
        out, lse = kernel_module(implementation).attend(problem), None
    else:
        out, lse = blockwise.attend(problem, residual, kernel_module(implementation), narrow=sinks is None)
    if sinks is not None:
        out = join_sinks(out, lse, sinks)
    out = checkpoint_name(out.astype(problem.query.dtype), "attention_out")
    if not return_residual:
        return out, None
    return out, checkpoint_name(lse, "attention_lse")


def explain(query, key, value, bias=None, mask=None, *, implementation=None, **arguments) -> Explanation:
    """Which implementation `dot_product_attention` would run for these arguments, and why not the others.

    Args:
      query: as in `dot_product_attention`, and so all others; `jax.ShapeDtypeStruct`s serve as well as arrays.
      key: `[B, S, K, D]`.
      value: `[B, S, K, Dv]`.
      bias: see `dot_product_attention`.
      mask: see `dot_product_attention`.
      implementation: see `dot_product_attention`.
      **arguments: all other arguments of `dot_product_attention`.

    Returns:
      An `Explanation`; its str is made to be read.

    Raises:
      ValueError: what `dot_product_attention` would raise.
      TypeError: likewise.

    Example:
      >>> import jax, jattn
      >>> x = jax.ShapeDtypeStruct((1, 4096, 8, 64), "float32")
      >>> print(jattn.explain(x, x, x, is_causal=True))
      blockwise: 4096 x 4096 pairs a head: tiles keep the memory linear and skip what no query sees
        not reference: it would hold 4096 x 4096 logits a head
        not mosaic_gpu: it runs on a gpu, this is a cpu
        not triton: it runs on a gpu, this is a cpu
        not tpu: it runs on a tpu, this is a cpu
        not cudnn: it runs on a gpu, this is a cpu
    """
    residual = arguments.pop("return_residual", False) or arguments.get("sinks") is not None
    given = {"query": query, "key": key, "value": value, "bias": bias, "mask": mask, **arguments}
    leaves, structure = jax.tree.flatten(given)
    shaped = [n for n, leaf in enumerate(leaves) if isinstance(leaf, jax.ShapeDtypeStruct)]
    found = []

    def probe(arrays):
        filled = list(leaves)
        for n, array in zip(shaped, arrays, strict=True):
            filled[n] = array
        problem, _ = build_problem(**jax.tree.unflatten(structure, filled))
        found.append(choose(problem, implementation, residual))
        return problem.query

    jax.eval_shape(probe, [leaves[n] for n in shaped])
    return found[0]
