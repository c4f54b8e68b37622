"""Adapters to other libraries: any attention function as the `attention_fn` of `flax.nnx.MultiHeadAttention`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jaxtyping import Array, Shaped

from jattn.softmax.calling import accepts, call_attention, name_of


def as_flax_attention_fn(function: Callable[..., Any], **options: Any) -> Callable[..., jax.Array]:
    """Make `function` fit `flax.nnx.MultiHeadAttention(attention_fn=...)`.

    Every argument that flax passes is honored or refused: bias, mask (boolean or 0/1), is_causal, dropout_rng,
    dropout_rate, deterministic, broadcast_dropout (one pattern for all batch rows and heads, by calling the function
    head by head), dtype, promote_dtype, precision, any number of batch axes, grouped heads, and `module` (weights are
    sown as flax does, computed by a second call on one-hot values, which presumes a function linear in the values).
    One difference stays: a row that may attend to nothing gives 0, where flax gives the mean of the values.

    Args:
        function: `(query, key, value, *, bias, mask, is_causal, ...) -> [B, T, N, Dv]`, such as
            `jattn.dot_product_attention` or a catalogued mechanism.
        **options: hyper-parameters that go to every call of `function`.

    Returns:
        A function with the signature of `flax.nnx.dot_product_attention`.

    Raises:
        ValueError: `function` has no argument of an option's name. When called: flax asks for something that
            `function` has no argument for, a dropout without `dropout_rng`, or `broadcast_dropout` together with an
            array among the options, which may have a head axis.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jattn
        >>> attention_fn = as_flax_attention_fn(jattn.dot_product_attention, logit_soft_cap=30.0)
        >>> layer = nnx.MultiHeadAttention(2, 8, attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((1, 3, 8)), is_causal=True).shape
        (1, 3, 8)
    """
    for name in options:
        if not accepts(function, name):
            raise ValueError(f"{name_of(function)} does not take {name}")

    def attention_fn(
        query: Any,
        key: Any,
        value: Any,
        bias: Any = None,
        mask: Any = None,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float | int = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: nnx.Module | None = None,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        is_causal: bool = False,
    ) -> jax.Array:
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.ndim < 3 or x.ndim != query.ndim or x.shape[:-3] != query.shape[:-3]:
                raise ValueError(f"{name} must be [*batch, length, heads, dim] like query, got {list(x.shape)}")
        batch_shape = query.shape[:-3]
        if mask is not None:
            mask = jnp.asarray(mask)
            mask = _one_batch_axis(mask if mask.dtype == bool else mask != 0, batch_shape)
        if bias is not None:
            bias = _one_batch_axis(jnp.asarray(bias), batch_shape)
        query, key, value = (x.reshape(math.prod(batch_shape), *x.shape[-3:]) for x in (query, key, value))
        arguments: dict[str, Any] = {"is_causal": is_causal, "precision": precision, **options}
        if module is not None:
            one_hot = jnp.eye(key.shape[1], dtype=jnp.promote_types(query.dtype, jnp.float32))[:, None]
            one_hot = jnp.broadcast_to(one_hot, (*key.shape[:3], key.shape[1]))
            weights = call_attention(function, query, key, one_hot, {**arguments, "bias": bias, "mask": mask})
            weights = jnp.swapaxes(weights, 1, 2).astype(query.dtype)
            module.sow(nnx.Intermediate, "attention_weights", weights.reshape(*batch_shape, *weights.shape[1:]))
        if dropout_rate > 0.0 and not deterministic:
            if dropout_rng is None:
                raise ValueError("dropout_rng must be given when dropout_rate > 0 and deterministic=False")
            arguments |= {"dropout_rate": dropout_rate, "dropout_key": dropout_rng}
            if broadcast_dropout:
                if any(jnp.ndim(leaf) for leaf in jax.tree.leaves(options)):
                    raise ValueError(
                        "broadcast_dropout=True calls the function head by head, which arrays among the options "
                        f"({', '.join(options)}) do not allow; pass broadcast_dropout=False to the layer"
                    )
                out = _head_by_head(function, query, key, value, bias, mask, arguments)
                return out.reshape(*batch_shape, *out.shape[1:])
        out = call_attention(function, query, key, value, {**arguments, "bias": bias, "mask": mask})
        return out.reshape(*batch_shape, *out.shape[1:])

    return attention_fn


def _one_batch_axis(x: Shaped[Array, "*shape"], batch_shape: tuple[int, ...]) -> Shaped[Array, "B N T S"]:
    """`[*batch, N, T, S]`, or what broadcasts to it, as `[B|1, N, T, S]` with the batch axes merged."""
    rank = len(batch_shape) + 3
    x = x.reshape((1,) * (rank - x.ndim) + x.shape)
    if all(size == 1 for size in x.shape[:-3]):
        return x.reshape(1, *x.shape[-3:])
    return jnp.broadcast_to(x, batch_shape + x.shape[-3:]).reshape(math.prod(batch_shape), *x.shape[-3:])


def _head_by_head(
    function: Callable[..., Any], query: Any, key: Any, value: Any, bias: Any, mask: Any, arguments: dict[str, Any]
) -> Shaped[Array, "B T N Dv"]:
    """Every (batch row, head) is a call of its own, so that dropout, counted from 0 in each, repeats its pattern."""
    repeats = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))

    def one(q: Any, k: Any, v: Any, b: Any, m: Any) -> Any:
        extra = {"bias": None if b is None else b[None, None], "mask": None if m is None else m[None, None]}
        q, k, v = (x[None, :, None] for x in (q, k, v))
        return call_attention(function, q, k, v, {**arguments, **extra})[0, :, 0]

    extras, over_heads, over_rows = [], [], []
    for x in (bias, mask):
        if x is not None:
            x = jnp.broadcast_to(x, (*x.shape[:2], query.shape[1], key.shape[1]))
        over_rows.append(0 if x is not None and x.shape[0] > 1 else None)
        over_heads.append(0 if x is not None and x.shape[1] > 1 else None)
        if x is not None:
            x = x[0] if x.shape[0] == 1 else x
            x = jnp.squeeze(x, axis=-3) if x.shape[-3] == 1 else x
        extras.append(x)
    heads = jax.vmap(one, (1, 1, 1, *over_heads), 1)
    return jax.vmap(heads, (0, 0, 0, *over_rows))(query, key, value, *extras)
