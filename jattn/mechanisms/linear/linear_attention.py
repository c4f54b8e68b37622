"""Linear attention: a feature map in place of the softmax, so that keys and values shrink into a state of fixed size.

    S_i = sum_j phi(k_j) v_j^T,   z_i = sum_j phi(k_j)     over the keys j that query i sees
    out_i = phi(q_i)^T S_i / (phi(q_i)^T z_i + eps)

Noncausal attention has one (S, z) for all queries; causal attention carries it along the sequence, a chunk at a time:
inside a chunk as masked products, between chunks as the state. Time and memory are linear in T, a decoding step is
constant in T. Source: Transformers are RNNs (arXiv 2006.16236).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jattn.cache.recurrent import RecurrentState
from jattn.mechanisms.entry import PATTERNS, Cost, Entry, Paper
from jattn.mechanisms.examples import normals
from jattn.recurrence.arguments import check_arrays, check_rows, check_segments, key_mask
from jattn.recurrence.feature_maps import get_feature_map, num_features
from jattn.recurrence.kernel_sums import Kernel, attend_all, attend_causally, attend_in_order
from jattn.recurrence.segments import runs_of


def linear_attention(
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
    scale: float | None = None,
    feature_map: Any = "elu1",
    normalize: bool = True,
    eps: float = 1e-6,
    chunk_size: int = 64,
    initial_state: RecurrentState | None = None,
    return_final_state: bool = False,
) -> Any:
    """Attention with the kernel phi(q) . phi(k), in time and memory linear in T and S.

    out_i = sum_j phi(q_i).phi(k_j) v_j / (sum_j phi(q_i).phi(k_j) + eps) over the visible j; a query without
    visible keys gives 0. Sums are float32 at least.

    Args:
        query: `[B, T, N, D]`.
        key: `[B, S, K, D]`; K divides N.
        value: `[B, S, K, Dv]`.
        bias: refused: there are no logits.
        mask: a key mask, booleans that broadcast to `[B, 1, 1, S]`, or `masks.causal()`.
        is_causal: key position <= query position, also for T != S.
        segment_ids: `[B, T]`, or a pair for queries and keys; negative = padding. In one array an id that returns after
            another one is a new segment; the ids of a pair are compared.
        query_positions: `[B|1, T]` integers that is_causal and `Cosine` see, 0..T-1 if None.
        key_positions: `[B|1, S]` integers likewise.
        scale: factor of phi(q), 1 if None; with `normalize` it cancels but for eps.
        feature_map: "elu1", "identity", "relu", "taylor2", "dpfp", "cosine", or a function `[..., D] -> [..., F]`.
        normalize: whether to divide.
        eps: added to the divisor.
        chunk_size: tokens a chunk; no effect on the result.
        initial_state: of causal self attention, what earlier tokens left behind; it belongs to the first segment.
        return_final_state: also return the state after the last token.

    Returns:
        `[B, T, N, Dv]` in the query's dtype; with `return_final_state` also a `RecurrentState` whose `state` is S
        `[B, K, F, Dv]` and whose `aux` is z `[B, K, F]` (empty without `normalize`).

    Raises:
        ValueError: shapes that do not fit, a bias, a mask that is not of keys, a state outside causal self attention.

    Example:
        >>> import jax.numpy as jnp
        >>> x, v = jnp.ones((1, 3, 1, 2)), jnp.arange(3.0).reshape(1, 3, 1, 1)
        >>> linear_attention(x, x, v, is_causal=True)[0, :, 0, 0].round(4).tolist()
        [0.0, 0.5, 1.0]

    Source: Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention (arXiv 2006.16236).
    """
    query, key, value = check_arrays(query, key, value)
    if bias is not None:
        raise ValueError("linear_attention has no logits that a bias could be added to; softmax_attention takes a bias")
    if chunk_size < 1 or not eps >= 0:
        raise ValueError(f"chunk_size must be at least 1 and eps at least 0, got {chunk_size} and {eps}")
    (batch, length), source = query.shape[:2], key.shape[1]
    valid, is_causal = key_mask(mask, is_causal, batch, source)
    ids, is_pair = check_segments(segment_ids, batch, length, source)
    positions = [
        check_rows("query_positions", query_positions, batch, length),
        check_rows("key_positions", key_positions, batch, source),
    ]
    is_plain = length == source and positions == [None, None] and not is_pair
    keeps_state = initial_state is not None or return_final_state
    if keeps_state and not (is_causal and is_plain):
        raise ValueError(
            "initial_state and return_final_state need causal self attention: is_causal, as many keys as queries, no "
            f"positions, segment_ids in one array; got is_causal={is_causal}, T = {length}, S = {source}"
        )
    kernel = Kernel(
        get_feature_map(feature_map, None if keeps_state else max(length, source)),
        1.0 if scale is None else scale,
        normalize,
        eps,
        chunk_size,
        jnp.promote_types(query.dtype, jnp.float32),
    )
    if is_causal and is_plain:
        out, state = _causal_self(kernel, query, key, value, valid, None if ids is None else ids[0], initial_state)
        return (out, state) if return_final_state else out
    places = [jnp.arange(n)[None] if p is None else p for n, p in zip((length, source), positions, strict=True)]
    if ids is None and not is_causal:
        return attend_all(kernel, query, key, value, valid, *places).astype(query.dtype)
    if ids is None:
        ids = jnp.zeros((batch, length), jnp.int32), jnp.zeros((batch, source), jnp.int32)
    elif not is_pair:
        ids = (jnp.where(ids[0] >= 0, runs_of(ids[0]), -1),) * 2
    places = [jnp.broadcast_to(p, (batch, p.shape[1])) for p in places]
    out = attend_in_order(kernel, query, key, value, valid, ids, tuple(places), is_causal=is_causal)
    return out.astype(query.dtype)


def _causal_self(
    kernel: Kernel, query: Any, key: Any, value: Any, valid: Any, ids: Any, initial_state: RecurrentState | None
) -> tuple[jax.Array, RecurrentState]:
    batch, length = query.shape[:2]
    state = _first_state(kernel, key, value, initial_state)
    places = state.next[:, None] + jnp.arange(length, dtype=jnp.int32)
    runs = None
    if ids is not None:
        real = ids >= 0
        valid = real if valid is None else real & valid
        query, runs = jnp.where(real[..., None, None], query, 0), runs_of(ids)
        places = state.next[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
    joined = jnp.concatenate([state.state, state.aux[..., None]], -1) if kernel.normalize else state.state
    out, last = attend_causally(kernel, query, key, value, valid, runs, places, joined)
    if ids is not None:
        out = jnp.where(real[..., None, None], out, 0)
    seen = length if ids is None else jnp.sum(real, axis=1, dtype=jnp.int32)
    final = RecurrentState(
        state=last[..., :-1] if kernel.normalize else last,
        aux=last[..., -1] if kernel.normalize else (),
        next=state.next + seen,
    )
    return out.astype(query.dtype), final


def linear_attention_state(
    batch: int,
    kv_heads: int,
    head_dim: int,
    v_dim: int,
    *,
    feature_map: Any = "elu1",
    normalize: bool = True,
    dtype: Any = jnp.float32,
) -> RecurrentState:
    """The state before any token, (S, z) = 0: what decoding keeps instead of keys and values.

    Args:
        batch: B.
        kv_heads: K.
        head_dim: D.
        v_dim: Dv.
        feature_map: as in `linear_attention`.
        normalize: as in `linear_attention`.
        dtype: float32, or float64 for float64 inputs.

    Returns:
        A `RecurrentState`; its size does not depend on the number of tokens.

    Raises:
        ValueError: a size that is not positive, or an unknown feature map.

    Example:
        >>> linear_attention_state(1, 2, 4, 8).state.shape
        (1, 2, 4, 8)

    Source: Transformers are RNNs (arXiv 2006.16236), section 3.4.
    """
    features = num_features(get_feature_map(feature_map), head_dim)
    return RecurrentState.init(batch, kv_heads, features, v_dim, dtype, has_normalizer=normalize)


def linear_attention_step(
    query: Any, key: Any, value: Any, state: RecurrentState, *, valid: Any = None, **options: Any
) -> tuple[jax.Array, RecurrentState]:
    """Decode: add the new tokens to the state, and read it.

    S += phi(k) v^T, z += phi(k), out = phi(q)^T S / (phi(q)^T z + eps): constant in the number of tokens seen.

    Args:
        query: `[B, T, N, D]`, T new tokens, mostly 1.
        key: `[B, T, K, D]`.
        value: `[B, T, K, Dv]`.
        state: of the tokens before.
        valid: bool `[B, T]`; an invalid token gives 0 and leaves the state as it is.
        **options: scale, feature_map, normalize, eps and chunk_size of `linear_attention`.

    Returns:
        The output `[B, T, N, Dv]` and the new state.

    Raises:
        ValueError: as `linear_attention`, or a state that does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 1, 2, 4))
        >>> out, state = linear_attention_step(x, x, x, linear_attention_state(1, 2, 4, 4))
        >>> out.shape, state.next.tolist()
        ((1, 1, 2, 4), [1])

    Source: Transformers are RNNs (arXiv 2006.16236), section 3.4.
    """
    ids = None
    if valid is not None:
        valid = jnp.asarray(valid)
        if valid.dtype != bool or valid.shape != jnp.shape(query)[:2]:
            raise ValueError(
                f"valid must be boolean {list(jnp.shape(query)[:2])}, got {valid.dtype}{list(valid.shape)}"
            )
        ids = jnp.where(valid, 0, -1)
    return linear_attention(
        query, key, value, is_causal=True, segment_ids=ids, initial_state=state, return_final_state=True, **options
    )


def _first_state(kernel: Kernel, key: Any, value: Any, given: RecurrentState | None) -> RecurrentState:
    """The given state, checked, or zeros."""
    batch, _, kv_heads, head_dim = key.shape
    shape = (batch, kv_heads, num_features(kernel.phi, head_dim), value.shape[3])
    if given is None:
        return RecurrentState.init(*shape, kernel.dtype, has_normalizer=kernel.normalize)
    aux = jnp.shape(given.aux) if kernel.normalize else shape[:3]
    if jnp.shape(given.state) != shape or aux != shape[:3]:
        raise ValueError(
            f"initial_state has a state of shape {jnp.shape(given.state)} and an aux of shape {aux}; expected {shape} "
            f"and {shape[:3]}: make it with linear_attention_state"
        )
    return given


def _example(key, length, query_length=None):
    shapes = ((2, query_length or length, 4, 4), (2, length, 2, 4), (2, length, 2, 4))
    return normals(key, *shapes), {"chunk_size": 8 if length < 64 else 64}


ENTRY = Entry(
    name="linear_attention",
    kind="recurrence",
    family="linear",
    function=linear_attention,
    papers=(
        Paper(
            "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
            "2006.16236",
            2020,
        ),
    ),
    patterns=PATTERNS,
    cost=Cost(flops="T", memory="T"),
    decode="linear_attention_step on a RecurrentState (S, z) of fixed size; token by token on any KV cache, too",
    example=_example,
    fidelity="official code",
)
