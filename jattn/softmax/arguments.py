"""From the arguments of `dot_product_attention` to a `Problem`: every check stands here, before anything is traced."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.softmax import masks
from jattn.softmax.layout import BlockLayout
from jattn.softmax.masks import Mask
from jattn.softmax.normalizers import Normalizer, Softmax
from jattn.softmax.problem import Problem
from jattn.softmax.score_mods import Operand, ScoreMod


def _fail(name: str, got: Any, expected: str) -> ValueError:
    return ValueError(f"dot_product_attention: {name} has {got}; expected {expected}")


def _wrong_type(name: str, value: Any, expected: str) -> TypeError:
    return TypeError(f"dot_product_attention: {name} is {type(value).__name__}; expected {expected}")


def _array(name: str, value: Any, kind: Any, expected: str) -> Any:
    """The array-like as an array of a dtype below `kind` (a numpy scalar type)."""
    try:
        array = value if isinstance(value, np.ndarray | jax.Array) else jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise _wrong_type(name, value, expected) from error
    if not jnp.issubdtype(array.dtype, kind):
        raise _fail(name, f"dtype {array.dtype} (shape {array.shape})", expected)
    return jnp.asarray(array)


def _number(name: str, value: Any, expected: str) -> float:
    """A Python float; only what is known while tracing will do."""
    if isinstance(value, jax.core.Tracer):
        raise _wrong_type(name, value, f"{expected}, known while tracing (no traced array)")
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise _wrong_type(name, value, expected) from error


def _main(query, key, value):
    """The three arrays as `[B, T, N, D]`, `[B, S, K, D]` and `[B, S, K, Dv]`."""
    names = ("query", "key", "value")
    arrays = [_array(n, x, jnp.floating, "floats") for n, x in zip(names, (query, key, value), strict=True)]
    ranks = "rank 4 (B, T, N, D) or rank 3 (T, N, D), the same for all three"
    for name, x in zip(names, arrays, strict=True):
        if x.ndim not in (3, 4) or x.ndim != arrays[0].ndim:
            raise _fail(name, f"shape {x.shape}", ranks)
        if x.dtype != arrays[0].dtype:
            raise _fail(name, f"dtype {x.dtype}", f"the dtype of query, {arrays[0].dtype}")
    query, key, value = (x if x.ndim == 4 else x[None] for x in arrays)
    batch, length, num_heads, head_dim = query.shape
    for name, x in zip(names, (query, key, value), strict=True):
        if 0 in x.shape[1:]:
            raise _fail(name, f"shape {x.shape}", "at least one position, head and channel")
    if key.shape[0] != batch or key.shape[3] != head_dim or num_heads % key.shape[2]:
        raise _fail("key", f"shape {key.shape}", f"({batch}, S, K, {head_dim}) with K a divisor of {num_heads}")
    if value.shape[:3] != key.shape[:3]:
        raise _fail("value", f"shape {value.shape}", f"({', '.join(str(n) for n in key.shape[:3])}, Dv)")
    return query, key, value


def _four_axes(name: str, array, sizes):
    shape = (1,) * (4 - array.ndim) + array.shape
    if array.ndim > 4 or any(n not in (1, full) for n, full in zip(shape, sizes, strict=True)):
        raise _fail(name, f"shape {array.shape}", f"something that broadcasts to (B, N, T, S) = {sizes}")
    return array.reshape(shape)


def _rows(name: str, array, batch: int, length: int):
    array = _array(name, array, jnp.integer, f"integers ({batch} or 1, {length})")
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or array.shape[0] not in (1, batch) or array.shape[1] != length:
        raise _fail(name, f"shape {array.shape}", f"({batch} or 1, {length})")
    # Differences of unsigned or narrow integers would wrap around.
    return array.astype(jnp.int32)


def _lengths(name: str, lengths, batch: int):
    lengths = _array(name, lengths, jnp.integer, f"integers of shape ({batch},)")
    if lengths.shape != (batch,):
        raise _fail(name, f"shape {lengths.shape}", f"integers of shape ({batch},)")
    return lengths[:, None, None, None]


def _window(size) -> Mask:
    sides = size if isinstance(size, tuple | list) else (size, size)
    whole = [side is None or (isinstance(side, int | np.integer) and not isinstance(side, bool)) for side in sides]
    if len(sides) != 2 or not all(whole) or any(side is not None and side < 0 for side in sides):
        raise _fail("local_window_size", f"value {size!r}", "an int >= 0 or a pair (left, right) of them")
    return masks.local_window(*sides)


def _mask_terms(mask, is_causal, local_window_size, query_seq_lengths, key_value_seq_lengths, sizes, placed):
    """The structured mask (or None) and the array masks; `placed` tells which sides have positions of their own."""
    batch, num_heads, length, source = sizes
    structured, arrays = None, []
    if isinstance(mask, Mask):
        structured = mask
        mask.check(batch, num_heads, None if placed[0] else length, None if placed[1] else source)
    elif mask is not None:
        expected = "booleans that broadcast to (B, N, T, S) (additive terms go to bias), or a Mask"
        arrays.append(_four_axes("mask", _array("mask", mask, jnp.bool_, expected), sizes))
    if not isinstance(is_causal, bool | np.bool_):
        raise _wrong_type("is_causal", is_causal, "True or False")
    extra = [masks.causal()] if is_causal else []
    if local_window_size is not None:
        extra.append(_window(local_window_size))
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
    # Only a tuple is a pair: a list of two lists is the array of a batch of two.
    if isinstance(segment_ids, tuple):
        if len(segment_ids) != 2:
            raise _fail("segment_ids", f"{len(segment_ids)} entries", "an array [B, T] or a pair (query ids, key ids)")
        query_ids, key_ids = segment_ids
    elif length != source:
        raise _fail(
            "segment_ids", "one array", f"a pair (query ids, key ids), for T = {length} and S = {source} differ"
        )
    else:
        query_ids = key_ids = segment_ids
    return (
        _rows("segment_ids (of queries)", query_ids, batch, length),
        _rows("segment_ids (of keys)", key_ids, batch, source),
    )


def _score_mod(score_mod, sizes):
    """The score mod without its arrays, and these by name, each on four (offsets: three) axes."""
    if score_mod is None:
        return None, {}
    if not isinstance(score_mod, ScoreMod):
        raise _wrong_type("score_mod", score_mod, "a ScoreMod")
    operands = {}
    for name, operand in score_mod.flat_operands().items():
        if not isinstance(operand, Operand):
            raise _wrong_type(f"score_mod operand {name!r}", operand, "an Operand(array, kind)")
        operands[name] = operand.broadcastable(name, *sizes)
    return score_mod.without_arrays(), operands


def _sinks(sinks, num_heads: int, normalizer: Normalizer):
    if sinks is None:
        return None
    sinks = _array("sinks", sinks, jnp.floating, f"floats of shape ({num_heads},)")
    if sinks.shape != (num_heads,):
        raise _fail("sinks", f"shape {sinks.shape}", f"floats of shape ({num_heads},)")
    if not isinstance(normalizer, Softmax):
        raise ValueError(f"dot_product_attention: sinks join a softmax; {normalizer!r} has no place for them")
    return sinks


def _dropout(rate, key):
    """The rate and the seed, None without dropout."""
    rate = _number("dropout_rate", rate, "a probability in [0, 1)")
    if not 0 <= rate < 1:
        raise _fail("dropout_rate", f"value {rate}", "a probability in [0, 1)")
    if not rate:
        return 0.0, None
    if key is None:
        raise ValueError("dot_product_attention: dropout_rate > 0 needs dropout_key, a key of jax.random")
    try:
        return rate, jax.random.bits(key, (2,), jnp.uint32)
    except (TypeError, ValueError) as error:
        raise _wrong_type("dropout_key", key, "one key of jax.random") from error


def _block_sizes(sizes):
    if sizes is None:
        return None
    pair = isinstance(sizes, tuple | list) and len(sizes) == 2
    if not pair or not all(isinstance(n, int | np.integer) and n >= 1 for n in sizes):
        raise _fail("block_sizes", f"value {sizes!r}", "a pair of positive ints (query block, key block)")
    return int(sizes[0]), int(sizes[1])


def _precision(precision):
    """The precision as jax.lax.dot_general takes it, hashable."""
    if precision is None:
        return None
    precision = tuple(precision) if isinstance(precision, list) else precision
    one = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    try:
        jax.eval_shape(lambda x: jnp.matmul(x, x, precision=precision), one)
    except (TypeError, ValueError) as error:
        raise _fail("precision", f"value {precision!r}", "what jax.lax.dot_general takes as precision") from error
    return precision


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
    query, key, value = _main(query, key, value)
    batch, length, num_heads, head_dim = query.shape
    source, kv_heads = key.shape[1:3]
    sizes = (batch, num_heads, length, source)
    placed = (query_positions is not None, key_positions is not None)
    structured, arrays = _mask_terms(
        mask, is_causal, local_window_size, query_seq_lengths, key_value_seq_lengths, sizes, placed
    )
    if np.ndim(scale):
        raise _fail("scale", f"shape {np.shape(scale)}", "a scalar; fold temperatures into query")
    if isinstance(scale, jax.Array):
        # It may be traced and carry a gradient; as a part of the query it needs no rule of its own.
        query, scale = query * scale.astype(query.dtype), 1.0
    scale = head_dim**-0.5 if scale is None else _number("scale", scale, "a number")
    if logit_soft_cap is not None:
        logit_soft_cap = _number("logit_soft_cap", logit_soft_cap, "a positive number")
        if not 0 < logit_soft_cap < float("inf"):
            raise _fail("logit_soft_cap", f"value {logit_soft_cap}", "a positive number")
    score_mod, operands = _score_mod(score_mod, sizes)
    normalizer = Softmax() if normalizer is None else normalizer
    if not isinstance(normalizer, Normalizer):
        raise _wrong_type("normalizer", normalizer, "a Normalizer, one of jattn.normalizers")
    if bias is not None:
        bias = _four_axes("bias", _array("bias", bias, jnp.floating, "floats (booleans go to mask)"), sizes)
    query_ids, key_ids = _segments(segment_ids, batch, length, source)
    if layout is not None:
        if not isinstance(layout, BlockLayout):
            raise _wrong_type("layout", layout, "a BlockLayout")
        layout.validate(batch=batch, num_heads=num_heads, num_kv_heads=kv_heads, query_length=length, key_length=source)
    dropout_rate, seed = _dropout(dropout_rate, dropout_key)
    problem = Problem(
        query=query,
        key=key,
        value=value,
        bias=bias,
        operands=operands,
        mask=structured,
        mask_arrays=arrays,
        layout=layout,
        query_positions=_rows("query_positions", query_positions, batch, length) if placed[0] else None,
        key_positions=_rows("key_positions", key_positions, batch, source) if placed[1] else None,
        query_segments=query_ids,
        key_segments=key_ids,
        self_segments=segment_ids is not None and not isinstance(segment_ids, tuple),
        score_mod=score_mod,
        seed=seed,
        normalizer=normalizer,
        scale=scale,
        sizes=(batch, length, source, num_heads, kv_heads),
        compute_dtype=jnp.promote_types(query.dtype, jnp.float32),
        logit_soft_cap=logit_soft_cap,
        dropout_rate=dropout_rate,
        precision=_precision(precision),
        block_sizes=_block_sizes(block_sizes),
        key_lengths=None if key_value_seq_lengths is None else jnp.asarray(key_value_seq_lengths),
    )
    return problem, _sinks(sinks, num_heads, normalizer)
