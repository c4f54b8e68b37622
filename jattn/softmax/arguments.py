"""From the arguments of `dot_product_attention` to a `Problem`: every check stands here, before anything is traced."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.softmax import masks
from jattn.softmax.masks import Mask
from jattn.softmax.normalizers import Normalizer, Softmax
from jattn.softmax.problem import Problem
from jattn.softmax.score_mods import ScoreMod


def _fail(name: str, got: Any, expected: str) -> ValueError:
    return ValueError(f"dot_product_attention: {name} has {got}; expected {expected}")


def _check_main(query, key, value):
    named = (("query", query), ("key", key), ("value", value))
    for name, x in named:
        if x.ndim != 4:
            raise _fail(name, f"shape {x.shape}", "rank 4 (B, T, N, D) or rank 3 (T, N, D), the same for all three")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise _fail(name, f"dtype {x.dtype}", "a floating dtype")
        if x.dtype != query.dtype:
            raise _fail(name, f"dtype {x.dtype}", f"the dtype of query, {query.dtype}")
    batch, length, num_heads, head_dim = query.shape
    if length == 0 or key.shape[1] == 0:
        raise _fail("query" if length == 0 else "key", "length 0", "at least one position")
    if key.shape[0] != batch or key.shape[3] != head_dim or num_heads % max(key.shape[2], 1):
        raise _fail("key", f"shape {key.shape}", f"({batch}, S, K, {head_dim}) with K a divisor of {num_heads}")
    if value.shape[:3] != key.shape[:3]:
        raise _fail("value", f"shape {value.shape}", f"{key.shape[:3] + ('Dv',)}")


def _four_axes(name: str, array, sizes):
    array = jnp.asarray(array)
    shape = (1,) * (4 - array.ndim) + array.shape
    if array.ndim > 4 or any(n not in (1, full) for n, full in zip(shape, sizes, strict=True)):
        raise _fail(name, f"shape {array.shape}", f"something that broadcasts to (B, N, T, S) = {sizes}")
    return array.reshape(shape)


def _rows(name: str, array, batch: int, length: int):
    array = array if isinstance(array, (np.ndarray, jax.Array)) else np.asarray(array)
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or array.shape[0] not in (1, batch) or array.shape[1] != length:
        raise _fail(name, f"shape {array.shape}", f"({batch} or 1, {length})")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise _fail(name, f"dtype {array.dtype}", "integers")
    return jnp.asarray(array)


def _lengths(name: str, lengths, batch: int):
    lengths = jnp.asarray(lengths)
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise _fail(name, f"{lengths.dtype} of shape {lengths.shape}", f"integers of shape ({batch},)")
    return lengths[:, None, None, None]


def _mask_terms(mask, is_causal, local_window_size, query_seq_lengths, key_value_seq_lengths, sizes):
    """The structured mask (or None) and the array masks."""
    batch, _, length, source = sizes
    structured, arrays = None, []
    if isinstance(mask, Mask):
        structured = mask
    elif mask is not None:
        if jnp.asarray(mask).dtype != bool:
            raise _fail("mask", f"dtype {jnp.asarray(mask).dtype}", "booleans (additive terms go to bias) or a Mask")
        arrays.append(_four_axes("mask", mask, sizes))
    extra = [masks.causal()] if is_causal else []
    if local_window_size is not None:
        window = (local_window_size,) * 2 if isinstance(local_window_size, int) else tuple(local_window_size)
        if len(window) != 2 or any(side is not None and side < 0 for side in window):
            raise _fail("local_window_size", f"value {local_window_size}", "an int >= 0 or a pair (left, right) of them")
        extra.append(masks.local_window(*window))
    for term in extra:
        structured = term if structured is None else structured & term
    if query_seq_lengths is not None:
        rows = jnp.arange(length)[None, None, :, None]
        arrays.append(rows < _lengths("query_seq_lengths", query_seq_lengths, batch))
    if key_value_seq_lengths is not None:
        columns = jnp.arange(source)[None, None, None]
        arrays.append(columns < _lengths("key_value_seq_lengths", key_value_seq_lengths, batch))
    return structured, tuple(arrays)


def _segments(segment_ids, batch, length, source):
    if segment_ids is None:
        return None, None
    if isinstance(segment_ids, (tuple, list)):
        if len(segment_ids) != 2:
            raise _fail("segment_ids", f"{len(segment_ids)} entries", "an array [B, T] or a pair (query ids, key ids)")
        query_ids, key_ids = segment_ids
    elif length != source:
        raise _fail("segment_ids", "one array", f"a pair (query ids, key ids), for T = {length} and S = {source} differ")
    else:
        query_ids = key_ids = segment_ids
    return _rows("segment_ids", query_ids, batch, length), _rows("segment_ids", key_ids, batch, source)


def _check_dropout(rate, key):
    if not 0 <= rate < 1:
        raise _fail("dropout_rate", f"value {rate}", "a probability in [0, 1)")
    if rate and key is None:
        raise ValueError("dot_product_attention: dropout_rate > 0 needs dropout_key, a key of jax.random")
    if not rate:
        return None
    return jax.random.bits(key, (2,), jnp.uint32)


def build_problem(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    segment_ids=None,
    query_positions=None,
    key_positions=None,
    score_mod=None,
    layout=None,
    logit_soft_cap=None,
    sinks=None,
    normalizer=None,
    dropout_rate=0.0,
    dropout_key=None,
    precision=None,
    block_sizes=None,
):
    """Check everything; return the `Problem` and the sinks `[N]` or None."""
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    if query.ndim == 3:
        query, key, value = (x[None] if x.ndim == 3 else x for x in (query, key, value))
    _check_main(query, key, value)
    batch, length, num_heads, head_dim = query.shape
    source, kv_heads = key.shape[1:3]
    sizes = (batch, num_heads, length, source)
    structured, arrays = _mask_terms(
        mask, is_causal, local_window_size, query_seq_lengths, key_value_seq_lengths, sizes
    )
    if isinstance(scale, jax.Array) or (scale is not None and np.ndim(scale)):
        if np.ndim(scale):
            raise _fail("scale", f"shape {np.shape(scale)}", "a scalar; fold temperatures into query")
        query, scale = query * scale.astype(query.dtype), 1.0
    if logit_soft_cap is not None and not float(logit_soft_cap) > 0:
        raise _fail("logit_soft_cap", f"value {logit_soft_cap}", "a positive number")
    operands = {}
    if score_mod is not None:
        if not isinstance(score_mod, ScoreMod):
            raise TypeError(f"dot_product_attention: score_mod must be a ScoreMod, got {type(score_mod).__name__}")
        operands = {
            name: op.broadcastable(name, batch, num_heads, length, source)
            for name, op in score_mod.flat_operands().items()
        }
        score_mod = score_mod.without_arrays()
    normalizer = Softmax() if normalizer is None else normalizer
    if not isinstance(normalizer, Normalizer):
        raise TypeError(f"dot_product_attention: normalizer must be a Normalizer, got {type(normalizer).__name__}")
    if sinks is not None:
        sinks = jnp.asarray(sinks)
        if sinks.shape != (num_heads,) or not jnp.issubdtype(sinks.dtype, jnp.floating):
            raise _fail("sinks", f"{sinks.dtype} of shape {sinks.shape}", f"floats of shape ({num_heads},)")
        if not isinstance(normalizer, Softmax):
            raise ValueError(f"dot_product_attention: sinks join a softmax; {normalizer!r} has no place for them")
    query_ids, key_ids = _segments(segment_ids, batch, length, source)
    if layout is not None:
        layout.validate(
            batch=batch, num_heads=num_heads, num_kv_heads=kv_heads, query_length=length, key_length=source
        )
    if block_sizes is not None and (len(block_sizes) != 2 or any(int(n) < 1 for n in block_sizes)):
        raise _fail("block_sizes", f"value {block_sizes}", "a pair of positive ints (query block, key block)")
    problem = Problem(
        query=query,
        key=key,
        value=value,
        bias=None if bias is None else _four_axes("bias", bias, sizes),
        operands=operands,
        mask=structured,
        mask_arrays=arrays,
        layout=layout,
        query_positions=None if query_positions is None else _rows("query_positions", query_positions, batch, length),
        key_positions=None if key_positions is None else _rows("key_positions", key_positions, batch, source),
        query_segments=query_ids,
        key_segments=key_ids,
        score_mod=score_mod,
        seed=_check_dropout(dropout_rate, dropout_key),
        normalizer=normalizer,
        scale=head_dim**-0.5 if scale is None else float(scale),
        sizes=(batch, length, source, num_heads, kv_heads),
        compute_dtype=jnp.promote_types(query.dtype, jnp.float32),
        logit_soft_cap=None if logit_soft_cap is None else float(logit_soft_cap),
        dropout_rate=float(dropout_rate),
        precision=precision,
        block_sizes=None if block_sizes is None else (int(block_sizes[0]), int(block_sizes[1])),
    )
    return problem, sinks
