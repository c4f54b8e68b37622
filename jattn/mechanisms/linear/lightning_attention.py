"""Lightning attention: causal linear attention without any divisor, with an optional constant decay for each head.

    S_t = exp(-slope_h) S_{t-1} + k_t v_t^T,   o_t = q_t^T S_t

The decay is what the papers' kernels call slope; `jattn.recurrence.decay_schedules.tnl_decay_slopes` has the published
ones. They cut a sequence into blocks: the masked products of a block, and what it sees of the state before it. That is
mode "chunk" of the engine; their kernel holds the state with one more step of decay, exp(-slope) S.

Of two forms that are equal in exact arithmetic this is the safe one. The other, o_t = exp(-slope t) q_t^T sum_s
exp(slope s) k_s v_s^T, overflows as soon as slope t > 88.

Sources: Various Lengths, Constant Speed (arXiv 2405.17381), Lightning Attention-2 (arXiv 2401.04658).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jattn.mechanisms.entry import Cost, Entry, Paper
from jattn.mechanisms.examples import attention_inputs
from jattn.recurrence.api import linear_recurrence
from jattn.recurrence.decay_schedules import tnl_decay_slopes


def lightning_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    is_causal: bool = True,
    log_decay: Any = None,
    scale: float | None = None,
    initial_state: Any = None,
    segment_ids: Any = None,
    mode: str = "chunk",
    implementation: str | None = None,
    chunk_size: int = 256,
    return_final_state: bool = False,
) -> Any:
    """Causal linear attention in blocks.

    o_t = scale sum_{s <= t} exp(g_h (t - s)) (q_t . k_s) v_s

    Args:
        query: `[B, T, N, D]`.
        key: `[B, T, K, D]`; K divides N.
        value: `[B, T, K, Dv]`.
        is_causal: True; a recurrence knows nothing else.
        log_decay: g `[N]`, <= 0, such as -tnl_decay_slopes(N, layer, L); no decay if None.
        scale: of the queries, 1 if None.
        initial_state: `[B, N, D, Dv]`, what earlier tokens left behind.
        segment_ids: `[B, T]`; a run of equal ids is a document, negative = padding.
        mode: of `jattn.linear_recurrence`.
        implementation: likewise.
        chunk_size: tokens a block; no effect on the result.
        return_final_state: also return the state after the last token.

    Returns:
        `[B, T, N, Dv]`; with `return_final_state` also the state, float32 `[B, N, D, Dv]`.

    Raises:
        ValueError: shapes that do not fit, is_causal=False.

    Example:
        >>> import jax.numpy as jnp
        >>> one = jnp.ones((1, 3, 1, 1))
        >>> lightning_attention(one, one, one).ravel().tolist()
        [1.0, 2.0, 3.0]

    Source: Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention (arXiv 2405.17381);
    Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models (2401.04658).
    """
    if not is_causal:
        raise ValueError("is_causal must be True: lightning attention is a recurrence")
    if log_decay is not None:
        log_decay = jnp.asarray(log_decay)
        if jnp.ndim(query) == 4 and log_decay.shape != (jnp.shape(query)[2],):
            raise ValueError(f"log_decay must be [N] = [{jnp.shape(query)[2]}], got {list(log_decay.shape)}")
    return linear_recurrence(
        query,
        key,
        value,
        log_decay=log_decay,
        scale=1.0 if scale is None else scale,
        initial_state=initial_state,
        segment_ids=segment_ids,
        mode=mode,
        implementation=implementation,
        chunk_size=chunk_size,
        return_final_state=return_final_state,
    )


def _example(key, length):
    decay = -tnl_decay_slopes(4, 0, 2).astype("float32")
    return attention_inputs(key, length)[0], {"log_decay": decay, "chunk_size": 4 if length < 64 else 64}


ENTRY = Entry(
    name="lightning_attention",
    kind="recurrence",
    family="linear",
    function=lightning_attention,
    papers=(
        Paper(
            "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention", "2405.17381", 2024
        ),
        Paper(
            "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models",
            "2401.04658",
            2024,
        ),
    ),
    patterns=("causal self",),
    cost=Cost(flops="T", memory="T"),
    decode="its state [B, N, D, Dv]",
    example=_example,
    fidelity="official code",
)
