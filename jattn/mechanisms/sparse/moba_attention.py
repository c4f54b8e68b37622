"""Mixture of block attention: every query chooses a few chunks of keys by their means, and attends to these alone.

    kbar_c = mean of the keys of chunk c,   gate_tc = q_t . kbar_c in float32, unscaled
    chosen_t = own chunk (always), and the best topk - 1 earlier chunks by gate (equal gates: the earlier chunk)
    out_t = softmax(scale q_t . k_j over the j <= t of the chosen chunks) v

Each query head chooses for itself, each segment has chunks of its own. The choice carries no gradient. It looks at
complete earlier chunks only, so it never depends on later tokens. Source: arXiv 2502.13189 and its reference program.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jattn.mechanisms.entry import Cost, Entry, Paper
from jattn.mechanisms.examples import normals
from jattn.mechanisms.sparse.moba_chunks import OwnChunk, chunk_means, gates, live_tiles, order_by_chunks
from jattn.softmax import masks
from jattn.softmax.api import dot_product_attention
from jattn.softmax.block_masks import from_block_mask
from jattn.softmax.layout import BlockLayout
from jattn.softmax.predicates import token_selection
from jattn.softmax.selections import from_token_selection
from jattn.softmax.topk import topk_mask

_QUERY_BLOCK = 64


def moba_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    chunk_size: int = 64,
    topk: int = 3,
    bias: Any = None,
    mask: Any = None,
    is_causal: bool = True,
    segment_ids: Any = None,
    query_positions: Any = None,
    key_positions: Any = None,
    scale: Any = None,
    score_mod: Any = None,
    logit_soft_cap: float | None = None,
    sinks: Any = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """Causal attention to the own chunk and the topk - 1 best earlier ones.

    out_t = softmax_j(scale q_t . k_j) v_j over j <= t in the chosen chunks; chosen by q_t . mean of a chunk's keys.

    Args:
        query: `[B, T, N, D]`.
        key: `[B, S, K, D]`; K divides N.
        value: `[B, S, K, Dv]`.
        chunk_size: C, keys a chunk; chunks are counted among the visible keys of a segment, in the order of positions.
        topk: chunks a query attends to, its own included.
        bias: broadcasts to `[B, N, T, S]`; added to logits, not to gates. So is `score_mod`.
        mask: booleans that broadcast to `[B, 1, T, S]`, or `masks.causal()`. A key that no query sees is not there;
            what else the mask hides is hidden after the choice.
        is_causal: must be true.
        segment_ids: `[B, T]`, or a pair for queries and keys: equal ids see each other; negative = padding.
        query_positions: `[B|1, T]` integers, 0..T-1 if None.
        key_positions: `[B|1, S]` integers, distinct where visible; all keys of the sequence up to there must be given.
        scale: of the logits, D^-0.5 if None.
        score_mod: a `ScoreMod`.
        logit_soft_cap: cap * tanh(logits / cap).
        sinks: `[N]` logits that take part in the softmax and carry no value.
        dropout_rate: of the weights.
        dropout_key: a key of jax.random, needed for a rate above 0.
        implementation: as in `jattn.dot_product_attention`.
        return_residual: also return the log-sum-exp `[B, T, N]`.

    Returns:
        `[B, T, N, Dv]` in the query's dtype; with `return_residual` also lse, float32.

    Raises:
        ValueError: chunk_size or topk below 1, is_causal=False, a mask that differs between heads, or what
            `jattn.dot_product_attention` refuses.

    Example:
        >>> import jax
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 12, 2, 4))
        >>> moba_attention(q, k, v, chunk_size=4, topk=2).shape
        (1, 12, 2, 4)

    Source: MoBA: Mixture of Block Attention for Long-Context LLMs (arXiv 2502.13189).
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    _check(query, key, chunk_size, topk)
    if not is_causal:
        raise ValueError(
            "moba_attention is causal: a query's own chunk is read up to the query; softmax_attention is not"
        )
    (batch, length), source = query.shape[:2], key.shape[1]
    seen, mask = _key_mask(mask, batch, length, source)
    positions = {
        "query_positions": _rows("query_positions", query_positions, batch, length),
        "key_positions": _rows("key_positions", key_positions, batch, source),
    }
    if seen is None and segment_ids is None and key_positions is None:
        layout = _plain_layout(query, key, positions["query_positions"], chunk_size, topk)
    else:
        ids = _segments(segment_ids, batch, length, source)
        valid = ids[1] >= 0 if seen is None else (ids[1] >= 0) & seen
        layout = _ordered_layout(query, key, *ids, *positions.values(), valid, chunk_size, topk)
    return dot_product_attention(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        layout=layout,
        score_mod=score_mod,
        logit_soft_cap=logit_soft_cap,
        sinks=sinks,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        implementation=implementation,
        return_residual=return_residual,
        **positions,
    )


def moba_selection(query: Any, key: Any, *, chunk_size: int, topk: int, query_positions: Any = None) -> jax.Array:
    """The chunks that each query attends to, for keys 0..S-1 of one sequence.

    chosen_t = own chunk and the topk - 1 largest q_t . kbar_c among the earlier c; min(topk, t // C + 1) in all.

    Args:
        query: `[B, T, N, D]`.
        key: `[B, S, K, D]`.
        chunk_size: C.
        topk: chunks a query, its own included.
        query_positions: `[B|1, T]` integers, 0..T-1 if None; when decoding, the number of keys before the query.

    Returns:
        bool `[B, N, T, ceil(S / C)]`; no gradient.

    Raises:
        ValueError: shapes that do not fit, chunk_size or topk below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([1.0, 1.0, 3.0, 3.0, 2.0, 2.0, 1.0, 1.0]).reshape(1, 8, 1, 1)
        >>> moba_selection(x, x, chunk_size=2, topk=2)[0, 0, ::2].astype(int).tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]]

    Source: MoBA: Mixture of Block Attention for Long-Context LLMs (arXiv 2502.13189).
    """
    query, key = jnp.asarray(query), jnp.asarray(key)
    _check(query, key, chunk_size, topk)
    (batch, length), source = query.shape[:2], key.shape[1]
    query_positions = _rows("query_positions", query_positions, batch, length)
    positions = jnp.arange(length)[None] if query_positions is None else query_positions
    chunks = -(-source // chunk_size)
    own = jnp.minimum(positions, source - 1)[:, None, :, None] // chunk_size
    number = jnp.arange(chunks)
    padded = jnp.pad(key, [(0, 0), (0, chunks * chunk_size - source), (0, 0), (0, 0)])
    gate = gates(query, chunk_means(padded, chunk_size))
    return topk_mask(gate, topk, forced=number == own, allowed=number <= own)


def _key_block(chunk_size: int) -> int:
    """Keys a tile: whole chunks, or an even part of one."""
    if chunk_size < 64:
        return chunk_size * -(-64 // chunk_size)
    return max(n for n in range(1, 129) if chunk_size % n == 0)


@functools.partial(jax.jit, static_argnames=("chunk_size", "topk"))
def _plain_layout(query: Any, key: Any, query_positions: Any, chunk_size: int, topk: int) -> BlockLayout:
    """One sequence with all of its keys in order: chunks are runs of keys."""
    chosen = moba_selection(query, key, chunk_size=chunk_size, topk=topk, query_positions=query_positions)
    return from_token_selection(
        chosen,
        1,
        chunk_size,
        masks.causal(),
        query_slots=query.shape[1],
        key_slots=key.shape[1],
        query_block=min(_QUERY_BLOCK, query.shape[1]),
        key_block=_key_block(chunk_size),
        query_positions=query_positions,
        exact=False,
    )


@functools.partial(jax.jit, static_argnames=("chunk_size", "topk"))
def _ordered_layout(
    query: Any,
    key: Any,
    query_ids: Any,
    key_ids: Any,
    query_positions: Any,
    key_positions: Any,
    valid: Any,
    chunk_size: int,
    topk: int,
) -> BlockLayout:
    """Segments, padding and caches: keys are put in order so that complete chunks are runs of slots."""
    length, source = query.shape[1], key.shape[1]
    places = [
        jnp.broadcast_to(jnp.arange(ids.shape[1])[None] if x is None else x, ids.shape)
        for x, ids in ((query_positions, query_ids), (key_positions, key_ids))
    ]
    order = order_by_chunks(query_ids, key_ids, *places, valid, chunk_size)
    ordered = jnp.take_along_axis(key, jnp.maximum(order.perm, 0)[..., None, None], axis=1)
    ordered = jnp.where((order.perm >= 0)[..., None, None], ordered, 0)
    chunks = order.block_start.shape[1]
    padded = jnp.pad(ordered, [(0, 0), (0, chunks * chunk_size - source), (0, 0), (0, 0)])
    allowed = (order.block_segment[:, None] == order.query_segment[:, :, None]) & (
        order.block_start[:, None] < order.query_own[:, :, None]
    )
    chosen = topk_mask(gates(query, chunk_means(padded, chunk_size)), topk - 1, allowed=allowed[:, None])
    query_block, key_block = min(_QUERY_BLOCK, length), _key_block(chunk_size)
    live, full = live_tiles(chosen, order, chunk_size, query_block, key_block)
    return from_block_mask(
        live,
        token_selection(chosen, 1, chunk_size) | OwnChunk(order.query_own, order.limit, order.key_own, order.rank),
        query_slots=length,
        key_slots=source,
        query_block=query_block,
        key_block=key_block,
        full=full,
        key_perm=order.perm[:, None],
    )


def _check(query: jax.Array, key: jax.Array, chunk_size: int, topk: int) -> None:
    for name, x in (("query", query), ("key", key)):
        if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating) or not x.shape[1]:
            raise ValueError(f"{name} must be floats [B, length, heads, D], got {x.dtype}{list(x.shape)}")
    if key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3] or query.shape[2] % key.shape[2]:
        raise ValueError(f"key must be [B, S, K, D], K a divisor of N, for query {query.shape}; got {list(key.shape)}")
    if chunk_size < 1 or topk < 1:
        raise ValueError(f"chunk_size and topk must be at least 1, got {chunk_size} and {topk}")


def _key_mask(mask: Any, batch: int, length: int, source: int) -> tuple[Any, Any]:
    """Keys that some query sees `[B, S]`, or None, and the mask where it differs between queries."""
    if mask is None or (isinstance(mask, masks.Mask) and mask == masks.causal()):
        return None, None
    if isinstance(mask, masks.Mask):
        raise ValueError(f"mask must be booleans or causal(), got {mask}; softmax_attention takes any mask")
    mask = jnp.asarray(mask)
    shape = (1,) * (4 - mask.ndim) + mask.shape
    fits = len(shape) == 4 and all(n in (1, m) for n, m in zip(shape, (batch, 1, length, source), strict=True))
    if mask.dtype != bool or not fits:
        raise ValueError(
            f"mask must be booleans that broadcast to {[batch, 1, length, source]}, alike for all heads; got "
            f"{mask.dtype}{list(mask.shape)}"
        )
    mask = mask.reshape(shape)
    return jnp.broadcast_to(mask[:, 0].any(1), (batch, source)), mask if shape[2] > 1 else None


def _segments(segment_ids: Any, batch: int, length: int, source: int) -> list[jax.Array]:
    pair = segment_ids if isinstance(segment_ids, tuple | list) else (segment_ids, segment_ids)
    if len(pair) != 2 or (segment_ids is not None and pair is not segment_ids and length != source):
        raise ValueError(f"segment_ids must be [B, T], or a pair for T = {length} queries and S = {source} keys")
    rows = [_rows("segment_ids", x, batch, n) for x, n in zip(pair, (length, source), strict=True)]
    return [
        jnp.broadcast_to(jnp.zeros((1, n), jnp.int32) if x is None else x, (batch, n))
        for x, n in zip(rows, (length, source), strict=True)
    ]


def _rows(name: str, array: Any, batch: int, length: int) -> Any:
    if array is None:
        return None
    array = jnp.atleast_2d(jnp.asarray(array))
    if array.ndim != 2 or array.shape[0] not in (1, batch) or array.shape[1] != length or array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers [{batch} or 1, {length}], got {array.dtype}{list(array.shape)}")
    return array


def _example(key, length):
    small = length < 64
    shapes = ((2, length, 4, 8), (2, length, 2, 8), (2, length, 2, 8)) if small else ((1, length, 1, 8),) * 3
    return normals(key, *shapes), {"chunk_size": 3, "topk": 2} if small else {"chunk_size": 64, "topk": 8}


ENTRY = Entry(
    name="moba_attention",
    kind="selector",
    family="sparse",
    function=moba_attention,
    papers=(Paper("MoBA: Mixture of Block Attention for Long-Context LLMs", "2502.13189", 2025),),
    patterns=("causal self",),
    cost=Cost(flops="T^2", memory="T^2"),
    decode="a full KV cache: a new token chooses among the means of the complete chunks by the same rule",
    example=_example,
    fidelity="official code",
)
