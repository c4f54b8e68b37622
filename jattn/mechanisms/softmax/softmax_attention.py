"""Softmax attention: the plain engine as a catalogued mechanism, with rotary, ALiBi and T5 positions as options.

    s_ij = scale <R_i q_i, R_j k_j>  ->  soft cap  ->  score_mod  ->  + position bias  ->  + bias  ->  mask
    a_i = softmax(s_i) (learned sinks join here)  ->  dropout  ->  out_i = sum_j a_ij v_j

R is the rotation of RoPE; the position bias is -slope_n |i - j| (ALiBi) or table[bucket(j - i), n] (T5).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jattn.layers.rope import Rope
from jattn.mechanisms.entry import PATTERNS, Cost, Entry, Paper
from jattn.mechanisms.examples import attention_inputs
from jattn.mechanisms.softmax.alibi import alibi
from jattn.mechanisms.softmax.t5_bias import t5_bias
from jattn.softmax.api import dot_product_attention

POSITIONS = ("none", "rope", "alibi", "t5")


def softmax_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    bias: Any = None,
    mask: Any = None,
    is_causal: bool = False,
    segment_ids: Any = None,
    query_positions: Any = None,
    key_positions: Any = None,
    scale: Any = None,
    position: Any = "none",
    alibi_slopes: Any = None,
    t5_table: Any = None,
    t5_max_distance: int = 128,
    t5_bidirectional: bool = False,
    score_mod: Any = None,
    logit_soft_cap: float | None = None,
    sinks: Any = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    local_window_size: Any = None,
    return_residual: bool = False,
    implementation: str | None = None,
    precision: Any = None,
    block_sizes: tuple[int, int] | None = None,
) -> Any:
    r"""Softmax attention with a choice of position information.

    out_i = sum_j softmax_j(scale <R_i q_i, R_j k_j> + position bias_ij + bias_ij) v_j over the visible j.

    Args:
        query: `[B, T, N, D]`.
        key: `[B, S, K, D]`; K divides N.
        value: `[B, S, K, Dv]`.
        bias: broadcasts to `[B, N, T, S]`.
        mask: booleans that broadcast to `[B, N, T, S]`, or a `Mask`.
        is_causal: key position <= query position.
        segment_ids: `[B, T]`, or a pair for queries and keys; negative = padding.
        query_positions: `[B|1, T]` integers, 0..T-1 if None; every position option sees them.
        key_positions: `[B|1, S]` integers likewise.
        scale: of the logits, D^-0.5 if None (T5 itself uses 1).
        position: "none", "rope", "alibi", "t5"; or an object with `rotate` or `score_mod`, such as `Rope(base=5e5)`.
            A model applies the position of its own configuration in the layer: leave this at "none" there.
        alibi_slopes: `[N]` for "alibi", the published ones if None; differentiable.
        t5_table: `[num_buckets, N]` for "t5"; differentiable.
        t5_max_distance: distances from here on share a bucket.
        t5_bidirectional: buckets for both directions; with the default, all later keys share the bucket of offset 0.
        score_mod: a `ScoreMod`, before the position bias.
        logit_soft_cap: cap * tanh(logits / cap).
        sinks: `[N]` logits that take part in the softmax and carry no value.
        dropout_rate: of the weights.
        dropout_key: a key of jax.random, needed for a rate above 0.
        local_window_size: (left, right) or an int for both.
        return_residual: also return the log-sum-exp `[B, T, N]`.
        implementation: as in `jattn.dot_product_attention`.
        precision: of the matrix products.
        block_sizes: of the blockwise implementation.

    Returns:
        `[B, T, N, Dv]` in the query's dtype; with `return_residual` also lse, float32.

    Raises:
        ValueError: an unknown position, one without what it needs, or what `jattn.dot_product_attention` refuses.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 5, 2, 4))
        >>> softmax_attention(x, x, x, is_causal=True, position="rope").shape
        (1, 5, 2, 4)

    Source: Attention Is All You Need (arXiv 1706.03762); RoFormer (arXiv 2104.09864); ALiBi (arXiv 2108.12409); T5
    (arXiv 1910.10683).
    """
    query, key, value, arguments = engine_call(
        query,
        key,
        value,
        position=position,
        alibi_slopes=alibi_slopes,
        t5_table=t5_table,
        t5_max_distance=t5_max_distance,
        t5_bidirectional=t5_bidirectional,
        score_mod=score_mod,
        query_positions=query_positions,
        key_positions=key_positions,
        bias=bias,
        mask=mask,
        scale=scale,
        is_causal=is_causal,
        local_window_size=local_window_size,
        implementation=implementation,
        return_residual=return_residual,
        segment_ids=segment_ids,
        logit_soft_cap=logit_soft_cap,
        sinks=sinks,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        precision=precision,
        block_sizes=block_sizes,
    )
    return dot_product_attention(query, key, value, **arguments)


def engine_call(
    query: Any,
    key: Any,
    value: Any,
    *,
    position: Any = "none",
    alibi_slopes: Any = None,
    t5_table: Any = None,
    t5_max_distance: int = 128,
    t5_bidirectional: bool = False,
    score_mod: Any = None,
    query_positions: Any = None,
    key_positions: Any = None,
    **arguments: Any,
) -> tuple[Any, Any, Any, dict[str, Any]]:
    """The call of `jattn.dot_product_attention` that `softmax_attention` makes, for who wants to add to it.

    Args:
        query: as in `softmax_attention`, and so all others.
        key: see `softmax_attention`.
        value: see `softmax_attention`.
        position: see `softmax_attention`.
        alibi_slopes: see `softmax_attention`.
        t5_table: see `softmax_attention`.
        t5_max_distance: see `softmax_attention`.
        t5_bidirectional: see `softmax_attention`.
        score_mod: see `softmax_attention`.
        query_positions: see `softmax_attention`.
        key_positions: see `softmax_attention`.
        **arguments: of the engine, which are handed on.

    Returns:
        query, key, value and the keyword arguments.

    Raises:
        ValueError: an unknown position, or one without what it needs.

    Example:
        >>> x = jnp.ones((1, 5, 2, 4))
        >>> sorted(engine_call(x, x, x, position="rope", is_causal=True)[3])
        ['is_causal', 'key_positions', 'query_positions', 'score_mod']
    """
    for name, array, wanted in (("alibi_slopes", alibi_slopes, "alibi"), ("t5_table", t5_table, "t5")):
        if array is not None and position != wanted:
            raise ValueError(f"{name} of shape {jnp.shape(array)} needs position={wanted!r}, got position={position!r}")
    if isinstance(position, str) and position not in POSITIONS:
        raise ValueError(
            f"position must be one of {', '.join(POSITIONS)} or an object such as Rope(), got {position!r}"
        )
    num_heads = jnp.shape(query)[-2] if jnp.ndim(query) >= 2 else 0
    rotation, addition = None, None
    if position == "rope":
        rotation = Rope()
    elif position == "alibi":
        addition = alibi(num_heads, slopes=alibi_slopes)
    elif position == "t5":
        if t5_table is None:
            raise ValueError("position='t5' needs t5_table of shape [num_buckets, N], got None")
        if jnp.ndim(t5_table) != 2 or jnp.shape(t5_table)[1] != num_heads:
            raise ValueError(f"t5_table must be [num_buckets, N] with N = {num_heads}, got {list(jnp.shape(t5_table))}")
        addition = t5_bias(t5_table, max_distance=t5_max_distance, bidirectional=t5_bidirectional)
    elif not isinstance(position, str):
        if not hasattr(position, "rotate") and not hasattr(position, "score_mod"):
            raise ValueError(f"position must have rotate or score_mod, got {type(position).__name__}")
        rotation = position if hasattr(position, "rotate") else None
        addition = position.score_mod(num_heads) if hasattr(position, "score_mod") else None
    if rotation is not None:
        query, key = _rotated(rotation, query, key, query_positions, key_positions)
    if addition is not None:
        score_mod = addition if score_mod is None else score_mod >> addition
    arguments |= {"score_mod": score_mod, "query_positions": query_positions, "key_positions": key_positions}
    return query, key, value, arguments


def _rotated(
    rotation: Any, query: Any, key: Any, query_positions: Any, key_positions: Any
) -> tuple[jax.Array, jax.Array]:
    query, key = jnp.asarray(query), jnp.asarray(key)
    for name, x in (("query", query), ("key", key)):
        if x.ndim not in (3, 4) or x.shape[-1] != query.shape[-1]:
            raise ValueError(f"{name} must be [B, length, heads, D] or [length, heads, D], got {list(x.shape)}")
    i = jnp.arange(query.shape[-3]) if query_positions is None else query_positions
    j = jnp.arange(key.shape[-3]) if key_positions is None else key_positions
    lifted = (x[None] if x.ndim == 3 else x for x in (query, key))
    new_query, new_key = rotation.rotate(*lifted, i, j)
    return new_query.reshape(query.shape), new_key.reshape(key.shape)


# What looks into a call from outside, such as a probe, sees the engine's pipeline through this.
softmax_attention.engine_call = engine_call  # type: ignore[attr-defined]

ENTRY = Entry(
    name="softmax_attention",
    kind="primitive",
    family="softmax",
    function=softmax_attention,
    papers=(Paper("Attention Is All You Need", "1706.03762", 2017),),
    patterns=PATTERNS,
    cost=Cost(flops="T^2", memory="T"),
    decode="any KV cache: a row depends on its own keys only",
    example=attention_inputs,
    fidelity="paper",
)
