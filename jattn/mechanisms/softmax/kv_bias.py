"""Key and value biases: a learned virtual position that every query sees, before all keys and without a rotation.

    "kv"   softmax over S + 1 keys, key_0 = b_k, value_0 = b_v
    "k"    the same with value_0 = 0: a place to put attention that says nothing
    "v"    no virtual key: out_i + b_v, which is b_v added to every value

The virtual key's logit is scale q_i . b_k, a sink that depends on the query. It joins what the engine returns:

    virtual weight a_i0 = sigmoid(scale q_i . b_k - lse_i),   out_i = (1 - a_i0) attention_i + a_i0 b_v
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.layers.attention import MultiHeadAttention
from jattn.layers.sharding import axes
from jattn.mechanisms.entry import PATTERNS, Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import normal
from jattn.softmax.api import dot_product_attention
from jattn.softmax.merge import merge_lse

MODES = ("k", "kv", "v")


def kv_bias(
    query: Any,
    key: Any,
    value: Any,
    *,
    key_bias: Any = None,
    value_bias: Any = None,
    bias: Any = None,
    mask: Any = None,
    is_causal: bool = False,
    segment_ids: Any = None,
    query_positions: Any = None,
    key_positions: Any = None,
    scale: Any = None,
    score_mod: Any = None,
    logit_soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    return_residual: bool = False,
    implementation: str | None = None,
) -> Any:
    r"""Softmax attention with a virtual key, a virtual value, or both.

    out_i = sum_{j=0..S} softmax_j(scale q_i . k_j) v_j with k_0 = key_bias, v_0 = value_bias or 0; without key_bias,
    out_i = value_bias + attention_i.

    The virtual key is scaled and capped like any key; masks, bias, score_mod and dropout act on the real keys only. A
    query that sees no real key returns v_0; a padding query (negative segment id) returns 0. Without key_bias there is
    no virtual key, and a row that sees nothing returns 0 as everywhere.

    Args:
        query: `[B, T, N, D]`.
        key: `[B, S, K, D]`; K divides N.
        value: `[B, S, K, Dv]`.
        key_bias: `[K, D]`, one row a kv head, or `[D]` for all.
        value_bias: `[K, Dv]` or `[Dv]`.
        bias: broadcasts to `[B, N, T, S]`.
        mask: booleans that broadcast to `[B, N, T, S]`, or a `Mask`.
        is_causal: key position <= query position.
        segment_ids: `[B, T]`, or a pair for queries and keys; negative = padding.
        query_positions: `[B|1, T]` integers, 0..T-1 if None.
        key_positions: `[B|1, S]` integers likewise.
        scale: of the logits, D^-0.5 if None.
        score_mod: a `ScoreMod`.
        logit_soft_cap: cap * tanh(logits / cap).
        dropout_rate: of the real weights.
        dropout_key: a key of jax.random, needed for a rate above 0.
        return_residual: also return the log-sum-exp, of which the virtual key is a part.
        implementation: as in `jattn.dot_product_attention`.

    Returns:
        `[B, T, N, Dv]` in the query's dtype; with `return_residual` also lse `[B, T, N]`.

    Raises:
        ValueError: neither bias given, a bias of the wrong shape, or what `jattn.dot_product_attention` refuses.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 3, 2, 4))
        >>> kv_bias(x, x, x, key_bias=jnp.ones(4), is_causal=True)[0, (0, 2), 0, 0].tolist()
        [0.5, 0.75]

    Source: When Attention Sink Emerges in Language Models: An Empirical View (arXiv 2410.10781).
    """
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [B, length, heads, width], got {list(x.shape)}")
    batch, length, num_heads, head_dim = query.shape
    kv_heads = key.shape[2]
    if key_bias is None and value_bias is None:
        raise ValueError("key_bias and value_bias are both None; kv_bias needs at least one of them")
    key_bias = _per_head("key_bias", key_bias, kv_heads, key.shape[3])
    value_bias = _per_head("value_bias", value_bias, kv_heads, value.shape[3])
    out, lse = dot_product_attention(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        implementation=implementation,
        return_residual=True,
        segment_ids=segment_ids,
        query_positions=query_positions,
        key_positions=key_positions,
        score_mod=score_mod,
        logit_soft_cap=logit_soft_cap,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
    )
    virtual = None
    if value_bias is not None:
        virtual = jnp.repeat(value_bias, num_heads // kv_heads, axis=0).astype(out.dtype)
    if key_bias is None:
        out = jnp.where(lse[..., None] > -jnp.inf, out + virtual, 0)
        return (out, lse) if return_residual else out
    valid = jnp.ones((), bool)
    if segment_ids is not None:
        ids = segment_ids[0] if isinstance(segment_ids, tuple | list) else segment_ids
        valid = jnp.reshape(jnp.asarray(ids) >= 0, (-1, length, 1))
    # Padding queries are replaced, not only masked: 0 * NaN in their product would reach the gradient of key_bias.
    grouped = jnp.where(valid[..., None], query, 0).reshape(batch, length, kv_heads, num_heads // kv_heads, head_dim)
    logits = jnp.einsum("btkgd,kd->btkg", grouped.astype(lse.dtype), key_bias.astype(lse.dtype))
    logits = logits.reshape(lse.shape) * jnp.asarray(head_dim**-0.5 if scale is None else scale, lse.dtype)
    if logit_soft_cap is not None:
        logits = logit_soft_cap * jnp.tanh(logits / logit_soft_cap)
    logits = jnp.where(valid, logits, -jnp.inf)
    virtual = jnp.zeros_like(out) if virtual is None else jnp.broadcast_to(virtual, out.shape)
    out, lse = merge_lse((out, lse), (virtual, logits))
    return (out, lse) if return_residual else out


def _per_head(name: str, x: Any, heads: int, width: int) -> jax.Array | None:
    if x is None:
        return None
    x = jnp.asarray(x)
    if x.shape not in ((width,), (heads, width)):
        raise ValueError(f"{name} must be [width] or [K, width] = {[heads, width]}, got {list(x.shape)}")
    return jnp.broadcast_to(x, (heads, width))


class KvBias(MultiHeadAttention):
    """Multi-head attention with learned virtual keys and values.

    y = kv_bias(q, k, v, key_bias=b_k, value_bias=b_v) W_o, the biases outside of rotation and qk-norm.

    Args:
        features: M, width of x and of the output.
        num_heads: N.
        mode: "kv" (virtual key and value), "k" (virtual key whose value is 0) or "v" (b_v added to the outputs).
        shared: one row for all kv heads instead of one each.
        param_dtype: of the parameters.
        rngs: for the initial values, normal with deviation 0.02.
        **options: of `MultiHeadAttention`, but `attention_fn`.

    Raises:
        ValueError: an unknown mode, or sizes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jattn
        >>> layer = KvBias(16, 4, num_kv_heads=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((1, 5, 16)), mask=jattn.masks.causal()).output.shape
        (1, 5, 16)

    Source: When Attention Sink Emerges in Language Models: An Empirical View (arXiv 2410.10781).
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        mode: str = "kv",
        shared: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        super().__init__(features, num_heads, attention_fn=kv_bias, param_dtype=param_dtype, rngs=rngs, **options)

        def virtual(width: int) -> nnx.Param:
            shape, names = (
                ((width,), ("head_dim",)) if shared else ((self.num_kv_heads, width), ("kv_heads", "head_dim"))
            )
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, param_dtype), **axes(*names))

        self.mode = mode
        self.key_bias = virtual(self.head_dim) if "k" in mode else None
        self.value_bias = virtual(self.value_dim) if "v" in mode else None

    def attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, *, inputs: jax.Array, **arguments: Any
    ) -> tuple[jax.Array, dict[str, Any]]:
        """As the base class, with the virtual key and value."""
        places = arguments.get("query_positions")
        if "segment_ids" not in arguments and places is not None:
            # Reading a cache: padding has position -1, and the mask hides only the slots from it.
            arguments["segment_ids"] = (jnp.minimum(places, 0), jnp.zeros(key.shape[:2], jnp.int32))
        for name, parameter in (("key_bias", self.key_bias), ("value_bias", self.value_bias)):
            if parameter is not None:
                arguments[name] = parameter.get_value()
        return super().attend(query, key, value, inputs=inputs, **arguments)


def _example(key, length):
    return LayerExample((16, 4), {"num_kv_heads": 2}, (normal(key, 2, length, 16),), {})


ENTRY = Entry(
    name="kv_bias",
    kind="layer",
    family="softmax",
    layer=KvBias,
    papers=(Paper("When Attention Sink Emerges in Language Models: An Empirical View", "2410.10781", 2024),),
    patterns=PATTERNS,
    cost=Cost(flops="T^2", memory="T"),
    decode="any KV cache; the virtual key is no slot of it",
    example=_example,
    fidelity="official code",
)
