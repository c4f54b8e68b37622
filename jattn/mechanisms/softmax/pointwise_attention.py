"""Pointwise attention: the softmax is replaced by a similarity of each logit alone, with or without a sum below it.

    w_ij = sim(s_ij),  s_ij = scale q_i . k_j        sim: sigmoid(s), elu(s) + 1, relu(s), softplus(s), 1 + s + s^2 / 2
    a_ij = w_ij                                      normalize=False: keys do not compete
         = w_ij / (sum_j w_ij + eps)                 normalize=True
         = w_ij / n_i, n_i visible keys of the row   normalize="count"
    out_i = sum_j a_ij v_j over the visible j

Without a sum there is nothing that a head must put somewhere: attention sinks do not form. `sim="relu",
normalize="count"` is ReLU attention; the sigmoid has no -log(n) bias.
"""

from __future__ import annotations

from typing import Any

import jax

from jattn.mechanisms.entry import PATTERNS, Cost, Entry, Paper
from jattn.mechanisms.examples import attention_inputs
from jattn.softmax.api import dot_product_attention
from jattn.softmax.normalizers import Pointwise

SIMILARITIES = ("sigmoid", "elu1", "relu", "softplus", "taylor2")


def pointwise_attention(
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
    sim: str = "sigmoid",
    normalize: bool | str = False,
    eps: float = 1e-8,
    score_mod: Any = None,
    logit_soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention whose weights are a pointwise function of the logits.

    out_i = sum_j a_ij v_j,  a_ij = sim(s_ij), or that over (sum_j sim(s_ij) + eps), or that over n_i.

    Args:
        query: `[B, T, N, D]`.
        key: `[B, S, K, D]`; K divides N.
        value: `[B, S, K, Dv]`.
        bias: broadcasts to `[B, N, T, S]`; -inf gives weight 0 under every similarity.
        mask: booleans that broadcast to `[B, N, T, S]`, or a `Mask`.
        is_causal: key position <= query position.
        segment_ids: `[B, T]`, or a pair for queries and keys; negative = padding.
        query_positions: `[B|1, T]` integers, 0..T-1 if None.
        key_positions: `[B|1, S]` integers likewise.
        scale: of the logits, D^-0.5 if None.
        sim: "sigmoid", "elu1", "relu", "softplus" or "taylor2".
        normalize: False, True (divide by the sum + eps) or "count" (divide by the number of visible keys).
        eps: added to the sum.
        score_mod: a `ScoreMod`.
        logit_soft_cap: cap * tanh(logits / cap).
        dropout_rate: of the weights.
        dropout_key: a key of jax.random, needed for a rate above 0.
        implementation: as in `jattn.dot_product_attention`.

    Returns:
        `[B, T, N, Dv]` in the query's dtype.

    Raises:
        ValueError: an unknown similarity or normalization, or what `jattn.dot_product_attention` refuses.

    Example:
        >>> import jax.numpy as jnp
        >>> x, v = jnp.zeros((1, 4, 1, 2)), jnp.ones((1, 4, 1, 2))
        >>> pointwise_attention(x, x, v, is_causal=True)[0, :, 0, 0].tolist()
        [0.5, 1.0, 1.5, 2.0]

    Source: When Attention Sink Emerges in Language Models: An Empirical View (arXiv 2410.10781); ReLU over n:
    Active-Dormant Attention Heads (arXiv 2410.13835).
    """
    if sim not in SIMILARITIES:
        raise ValueError(f"sim must be one of {', '.join(SIMILARITIES)}, got {sim!r}")
    if not (isinstance(normalize, bool) or normalize == "count"):
        raise ValueError(f"normalize must be False, True or 'count', got {normalize!r}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    norm = normalize if isinstance(normalize, str) else ("sum" if normalize else "none")
    return dot_product_attention(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        implementation=implementation,
        segment_ids=segment_ids,
        query_positions=query_positions,
        key_positions=key_positions,
        score_mod=score_mod,
        logit_soft_cap=logit_soft_cap,
        normalizer=Pointwise(sim, norm, float(eps)),
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
    )


ENTRY = Entry(
    name="pointwise_attention",
    kind="primitive",
    family="softmax",
    function=pointwise_attention,
    papers=(
        Paper("When Attention Sink Emerges in Language Models: An Empirical View", "2410.10781", 2024),
        Paper(
            "Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs",
            "2410.13835",
            2024,
        ),
    ),
    patterns=PATTERNS,
    cost=Cost(flops="T^2", memory="T"),
    decode="any KV cache: a row depends on its own keys only",
    example=attention_inputs,
    fidelity="official code",
)
