"""Flow attention: linear attention whose queries and keys conserve what flows between them, so that keys compete.

    Q = phi(q), K = phi(k), phi = sigmoid;  a . b = sum_d (a_d + eps) (b_d + eps)
    I_i = Q_i . sum_j K_j                   what sink i takes in       O_j = K_j . sum_i Q_i    what source j gives
    I^_i = Q_i . sum_j K_j / O_j            with all outflows 1        O^_j = K_j . sum_i Q_i / I_i
    c_j = S softmax_j(O^_j),  s_i = sigmoid(I^_i T / S)
    out_i = s_i (Q_i / I_i)^T sum_j K_j (c_j v_j)^T

The causal form replaces every sum by one over the tokens so far, n_i their number:

    I^_i = Q_i . sum_{j<=i} K_j n_j / O_j / n_i,   O^_j likewise
    c_j = n_j exp(O^_j) / sum_{l<=j} exp(O^_l),   s_i = sigmoid(I^_i)

All of it is sums of vectors and one of matrices [D, Dv]: linear in T, and constant in T for a decoding step. Source:
Flowformer: Linearizing Transformers with Conservation Flows (arXiv 2202.06258), the core module of its program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jattn.cache import RecurrentState
from jattn.mechanisms.entry import Cost, Entry, Paper
from jattn.mechanisms.examples import attention_inputs
from jattn.mechanisms.linear.linear_attention import linear_attention
from jattn.recurrence.additive import finite
from jattn.recurrence.api import linear_recurrence
from jattn.recurrence.arguments import check_arrays, check_segments, key_mask
from jattn.recurrence.groups import among, group_logsumexp, group_sum, shown
from jattn.recurrence.segments import running_logsumexp, running_sum, runs_of

Clip = tuple[float, float] | None


def flow_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: Any = None,
    segment_ids: Any = None,
    feature_map: Callable[[jax.Array], jax.Array] = jax.nn.sigmoid,
    clip: Clip = (-1.0, 1.0),
    competition: bool = True,
    allocation: bool = True,
    eps: float = 1e-6,
    chunk_size: int = 64,
) -> jax.Array:
    """Attention of all queries to all keys as a flow network, in time linear in T and S.

    out_i = s_i (Q_i / I_i)^T sum_j K_j (c_j v_j)^T; see the module for I, c and s

    Every source divides what it gives among all queries, so an output depends on the other queries, too. There is no
    scale of logits. A query without visible keys gives 0.

    Args:
        query: `[B, T, N, D]`.
        key: `[B, S, K, D]`; K divides N.
        value: `[B, S, K, Dv]`.
        mask: a key mask, booleans that broadcast to `[B, 1, 1, S]`.
        segment_ids: `[B, T]`, or a pair for queries and keys; negative = padding. Each segment is a network of its own,
            with its own T and S. In one array an id that returns after another one is a new segment.
        feature_map: phi, `[..., D] -> [..., F]`, positive.
        clip: bounds of O^ before the softmax, None for none. O^ is T / S on average, so with T >= S and these bounds
            most sources stand at the upper one and hardly compete.
        competition: whether sources compete; c = 1 if not.
        allocation: whether sinks are gated; s = 1 if not.
        eps: added to every feature and sum in the flows.
        chunk_size: tokens a step; no effect on the result.

    Returns:
        `[B, T, N, Dv]` in the query's dtype; all flows are float32 at least.

    Raises:
        ValueError: shapes that do not fit, or a mask that is not of keys.

    Example:
        >>> import jax.numpy as jnp
        >>> x, v = jnp.ones((1, 4, 1, 2)), jnp.arange(4.0).reshape(1, 4, 1, 1)
        >>> out = flow_attention(x, x, v)  # sigmoid(1) times the mean of v
        >>> [round(x, 4) for x in out.ravel().tolist()]
        [1.0966, 1.0966, 1.0966, 1.0966]

    Source: Flowformer: Linearizing Transformers with Conservation Flows (arXiv 2202.06258).
    """
    query, key, value = check_arrays(query, key, value)
    _check(clip, eps)
    (batch, length), source = query.shape[:2], key.shape[1]
    valid, is_causal = key_mask(mask, False, batch, source)
    if is_causal:
        raise ValueError("mask must be a key mask; causal_flow_attention is the causal form")
    ids, is_pair = check_segments(segment_ids, batch, length, source)
    real = None
    if ids is not None:
        if not is_pair:
            own = jnp.where(ids[0] >= 0, runs_of(ids[0]), -1)
            ids = (own, own)
        real, shows = ids[0] >= 0, (ids[1] >= 0) & among(ids[1], ids[0])
        valid = shows if valid is None else shows & valid
    sinks, sources, value = _features(query, key, value, real, valid, feature_map)

    def to_sinks(x: jax.Array) -> jax.Array:
        return _across(x, None if ids is None else (ids[1], ids[0]))

    def to_sources(x: jax.Array) -> jax.Array:
        return _across(x, None if ids is None else ids)

    inflow = _flow(sinks, to_sinks(sources), eps)
    outflow = _flow(sources, to_sources(sinks), eps)
    ones = jnp.ones((batch, source, 1), sinks.dtype)
    visible = ones if valid is None else shown(ones, valid)
    if competition:
        kept = _clipped(_flow(sources, to_sources(sinks / inflow[..., None]), eps), clip)
        logits = kept if valid is None else shown(kept, valid, -jnp.inf)
        own_ids = None if ids is None else ids[1]
        weights = jnp.exp(logits - finite(group_logsumexp(logits, own_ids))) * group_sum(visible, own_ids)
        value = value * weights[..., None]
    rows = sinks / inflow[..., None]
    if allocation:
        queries = jnp.ones((batch, length, 1), sinks.dtype)
        queries = queries if real is None else shown(queries, real)
        ratio = group_sum(queries, None if ids is None else ids[0]) / jnp.maximum(to_sinks(visible), 1)
        taken = _flow(sinks, to_sinks(sources / outflow[..., None]), eps)
        rows = rows * jax.nn.sigmoid(taken * ratio)[..., None]
    out = linear_attention(
        rows, sources, value, segment_ids=ids, feature_map="identity", normalize=False, chunk_size=chunk_size
    )
    return out.astype(query.dtype)


def causal_flow_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    is_causal: bool = True,
    segment_ids: Any = None,
    feature_map: Callable[[jax.Array], jax.Array] = jax.nn.sigmoid,
    clip: Clip = (-1.0, 1.0),
    competition: bool = True,
    allocation: bool = True,
    eps: float = 1e-6,
    initial_state: RecurrentState | None = None,
    mode: str = "chunk",
    implementation: str | None = None,
    chunk_size: int = 64,
    return_final_state: bool = False,
) -> Any:
    """Flow attention whose flows are those among the tokens so far.

    out_i = s_i (Q_i / I_i)^T sum_{j<=i} K_j (c_j v_j)^T; see the module for I, c and s

    Later tokens do not renormalize earlier ones, so the last row is not that of `flow_attention`. There is no scale.

    Args:
        query: `[B, T, N, D]`.
        key: `[B, T, K, D]`; K divides N.
        value: `[B, T, K, Dv]`.
        is_causal: True; `flow_attention` is the other form.
        segment_ids: `[B, T]`; a run of equal ids is a document, negative = padding, which is not counted.
        feature_map: phi, `[..., D] -> [..., F]`, positive.
        clip: bounds of O^ before the softmax, None for none; (-5, 5) in the authors' language models.
        competition: whether sources compete; c = 1 if not.
        allocation: whether sinks are gated; s = 1 if not.
        eps: added to every feature and sum in the flows.
        initial_state: what earlier tokens left behind; it belongs to the first segment.
        mode: of `jattn.linear_recurrence`.
        implementation: likewise.
        chunk_size: tokens a chunk; no effect on the result.
        return_final_state: also return the state after the last token.

    Returns:
        `[B, T, N, Dv]` in the query's dtype; with `return_final_state` also a `RecurrentState`: `state` is
        sum K (c v)^T `[B, N, F, Dv]`, and `aux` holds the other sums: of keys, queries, keys / outflow and queries /
        inflow `[B, N, F]`, the log-sum-exp of O^ `[B, N]` and the number of tokens `[B]`.

    Raises:
        ValueError: shapes that do not fit, is_causal=False.

    Example:
        >>> import jax.numpy as jnp
        >>> x, v = jnp.ones((1, 3, 1, 2)), jnp.arange(3.0).reshape(1, 3, 1, 1)
        >>> out = causal_flow_attention(x, x, v)  # sigmoid(1) times the running mean of v
        >>> [round(x, 4) for x in out.ravel().tolist()]
        [0.0, 0.3655, 0.7311]

    Source: Flowformer: Linearizing Transformers with Conservation Flows (arXiv 2202.06258).
    """
    query, key, value = check_arrays(query, key, value)
    _check(clip, eps)
    batch, length = query.shape[:2]
    if not is_causal or key.shape[1] != length:
        raise ValueError(
            f"causal_flow_attention is causal self attention; got is_causal={is_causal}, T = {length}, S = "
            f"{key.shape[1]}. flow_attention is the other form"
        )
    ids, is_pair = check_segments(segment_ids, batch, length, length)
    if is_pair:
        raise ValueError("segment_ids must be one array [B, T]; a pair belongs to cross attention")
    ids = None if ids is None else ids[0]
    real = None if ids is None else ids >= 0
    sinks, sources, value = _features(query, key, value, real, real, feature_map)
    before = _before(sinks)
    if initial_state is not None:
        expected, given = (jax.tree.map(jnp.shape, x) for x in (before, initial_state.aux))
        if given != expected:
            raise ValueError(f"the aux of initial_state must have the shapes {expected}, got {given}")
        before = initial_state.aux
    runs = None if ids is None else jnp.pad(runs_of(ids), [(0, 0), (1, 0)])
    last: dict[str, Any] = {}

    def through(name: str, x: jax.Array, running: Callable[..., jax.Array] = running_sum) -> jax.Array:
        """Over the tokens so far, those of the state too."""
        found = running(jnp.concatenate([before[name][:, None].astype(x.dtype), x], axis=1), runs)
        last[name] = found[:, -1]
        return found[:, 1:]

    ones = jnp.ones((batch, length), sinks.dtype)
    count = through("count", ones if real is None else shown(ones, real))[..., None]
    least = jnp.maximum(count, 1)
    inflow = _flow(sinks, through("keys", sources), eps)
    outflow = _flow(sources, through("queries", sinks), eps)
    taken = _flow(sinks, through("given", sources * (count / outflow)[..., None]), eps) / least
    kept = _flow(sources, through("taken", sinks * (count / inflow)[..., None]), eps) / least
    logits = _clipped(kept, clip)
    total = through("competition", logits if real is None else shown(logits, real, -jnp.inf), running_logsumexp)
    if competition:
        weights = jnp.exp(logits - finite(total)) * count
        value = value * weights[..., None]
    rows = sinks / inflow[..., None]
    rows = rows * jax.nn.sigmoid(taken)[..., None] if allocation else rows
    out, state = linear_recurrence(
        rows,
        sources,
        value,
        scale=1.0,
        initial_state=None if initial_state is None else initial_state.state,
        segment_ids=ids,
        mode=mode,
        implementation=implementation,
        chunk_size=chunk_size,
        return_final_state=True,
    )
    if not return_final_state:
        return out.astype(query.dtype)
    new = jnp.full((batch,), length, jnp.int32) if real is None else jnp.sum(real, axis=1, dtype=jnp.int32)
    seen = new if initial_state is None else initial_state.next + new
    return out.astype(query.dtype), RecurrentState(state, last, next=seen)


def _check(clip: Clip, eps: float) -> None:
    if clip is not None and (len(clip) != 2 or not clip[0] < clip[1]):
        raise ValueError(f"clip must be None or (low, high), got {clip}")
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")


def _features(
    query: jax.Array, key: jax.Array, value: jax.Array, real: Any, valid: Any, feature_map: Callable[..., Any]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Q, K and values, all with N heads, 0 where hidden, in the dtype of sums."""
    dtype, group = jnp.promote_types(query.dtype, jnp.float32), query.shape[2] // key.shape[2]
    query, key, value = shown(query, real), shown(key, valid), shown(value, valid)
    # Sources are the heads of keys as one head of queries sees them.
    key, value = (jnp.repeat(x, group, axis=2).astype(dtype) for x in (key, value))
    return shown(feature_map(query.astype(dtype)), real), shown(feature_map(key), valid), value


def _flow(features: jax.Array, total: jax.Array, eps: float) -> jax.Array:
    """(x + eps) . (sum + eps), `[B, T, N]`."""
    return jnp.sum((features + eps) * (total + eps), axis=-1)


def _clipped(kept: jax.Array, clip: Clip) -> jax.Array:
    return kept if clip is None else jnp.clip(kept, *clip)


def _across(x: jax.Array, ids: Any) -> jax.Array:
    """Sums of x `[B, S, ...]` over the tokens of the same segment, for tokens of the other side: ids = (from, to)."""
    if ids is None or ids[0] is ids[1]:
        return group_sum(x, None if ids is None else ids[0])
    others = jnp.zeros_like(x, shape=(x.shape[0], ids[1].shape[1], *x.shape[2:]))
    joined = group_sum(jnp.concatenate([x, others], axis=1), jnp.concatenate(ids, axis=1))
    return joined[:, x.shape[1] :]


def _before(sinks: jax.Array) -> dict[str, jax.Array]:
    """All sums before the first token."""
    zeros = jnp.zeros_like(sinks[:, 0])
    nothing = dict.fromkeys(("keys", "queries", "given", "taken"), zeros)
    return nothing | {"competition": jnp.full_like(zeros[..., 0], -jnp.inf), "count": zeros[:, 0, 0]}


def _example(key, length, query_length=None):
    inputs, _ = attention_inputs(key, length, query_length)
    return inputs, {"chunk_size": 4 if length < 64 else 64}


_PAPER = Paper("Flowformer: Linearizing Transformers with Conservation Flows", "2202.06258", 2022)

ENTRIES = (
    Entry(
        name="flow_attention",
        kind="primitive",
        family="linear",
        function=flow_attention,
        papers=(_PAPER,),
        patterns=("noncausal self", "noncausal cross"),
        cost=Cost(flops="T", memory="T"),
        decode="no: every source divides what it gives among all queries",
        example=_example,
        fidelity="official code",
        exempt={"truncation": "every source divides what it gives among all queries, the later ones too"},
    ),
    Entry(
        name="causal_flow_attention",
        kind="recurrence",
        family="linear",
        function=causal_flow_attention,
        papers=(_PAPER,),
        patterns=("causal self",),
        cost=Cost(flops="T", memory="T"),
        decode="a RecurrentState of all its sums",
        example=_example,
        fidelity="official code",
    ),
)
