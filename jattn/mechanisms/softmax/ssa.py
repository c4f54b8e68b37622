"""Selective Self-Attention: each query has its own inverse temperature, each value its own weight.

    tau_tok(x_i) = tanh(f_q(x_i))                                   in (-1, 1), one number a token
    tau_pos(i)   = 1 + sigmoid(alpha) log(n_i)                      form "paper"
                 = 1 + exp(-exp(alpha)) log(n_i)                    form "code" (the published code's beta)
                 = 1 + alpha log(n_i)                               form "no_func"
    tau_q(i) = tau_tok(x_i) + tau_pos(i),   tau_v(j) = 1 + tanh(f_v(x_j))
    out_i = sum_j softmax_j(tau_q(i) scale q_i . k_j) tau_v(j) v_j

n_i is the number of keys that query i sees: padding, other documents and hidden keys do not count. f_q and f_v reuse
the layer's own projections, f_q(x) = w_q . gelu(W_q x) and f_v(x) = w_v . gelu(W_v x), so that only w_q and w_v are
new; or they are two-layer MLPs of their own. Zero w_q and w_v give f = 0, the start.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jattn.layers.attention import MultiHeadAttention
from jattn.layers.sharding import axes
from jattn.mechanisms.entry import PATTERNS, Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import attention_inputs, normal
from jattn.softmax.api import dot_product_attention
from jattn.softmax.counts import visible_counts

# The first value of alpha: where the published code starts when it trains from scratch (its beta), and the same
# temperature, 0.011 log(n), in the paper's form.
FORMS = {"paper": -4.5, "code": 1.5, "no_func": 1e-5}


def ssa(
    query: Any,
    key: Any,
    value: Any,
    *,
    alpha: Any = FORMS["paper"],
    form: str = "paper",
    token_temperature: Any = None,
    value_temperature: Any = None,
    bias: Any = None,
    mask: Any = None,
    is_causal: bool = False,
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
) -> jax.Array:
    r"""Attention with a temperature for every query and a weight for every value.

    out_i = sum_j softmax_j((tau_tok_i + tau_pos_i) scale q_i . k_j) tau_v_j v_j,
    tau_pos_i = 1 + gate(alpha) log(n_i).

    Args:
        query: `[B, T, N, D]`.
        key: `[B, S, K, D]`; K divides N.
        value: `[B, S, K, Dv]`.
        alpha: scalar, or `[N]` for a gate a head.
        form: of the gate: "paper" sigmoid(alpha), "code" exp(-exp(alpha)), "no_func" alpha itself.
        token_temperature: tau_tok, `[B, T]`; 0 if None.
        value_temperature: tau_v, `[B, S]`; 1 if None.
        bias: broadcasts to `[B, N, T, S]`; what it hides still counts in n_i.
        mask: booleans that broadcast to `[B, N, T, S]`, or a `Mask`.
        is_causal: key position <= query position.
        segment_ids: `[B, T]`, or a pair for queries and keys; negative = padding.
        query_positions: `[B|1, T]` integers, 0..T-1 if None.
        key_positions: `[B|1, S]` integers likewise.
        scale: of the logits, D^-0.5 if None.
        score_mod: a `ScoreMod`; it sees the tempered logits.
        logit_soft_cap: cap * tanh(logits / cap), after the temperature.
        sinks: `[N]` logits that take part in the softmax and carry no value.
        dropout_rate: of the weights.
        dropout_key: a key of jax.random, needed for a rate above 0.
        implementation: as in `jattn.dot_product_attention`.

    Returns:
        `[B, T, N, Dv]` in the query's dtype.

    Raises:
        ValueError: an unknown form, a temperature of the wrong shape, or what `jattn.dot_product_attention` refuses.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 5, 2, 4))
        >>> ssa(x, x, x, is_causal=True, value_temperature=jnp.full((1, 5), 0.5))[0, 0, 0].tolist()
        [0.5, 0.5, 0.5, 0.5]

    Source: Selective Attention: Enhancing Transformer through Principled Context Control (arXiv 2411.12892).
    """
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [B, length, heads, width], got {list(x.shape)}")
    batch, length, num_heads, _ = query.shape
    source = value.shape[1]
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    alpha = jnp.asarray(alpha, jnp.promote_types(query.dtype, jnp.float32))
    if alpha.shape not in ((), (num_heads,)):
        raise ValueError(f"alpha must be a scalar or [N] = [{num_heads}], got {list(alpha.shape)}")
    counts = visible_counts(
        batch,
        num_heads,
        length,
        source,
        mask=mask,
        is_causal=is_causal,
        segment_ids=segment_ids,
        query_positions=query_positions,
        key_positions=key_positions,
    )
    gate = {"paper": jax.nn.sigmoid, "code": lambda a: jnp.exp(-jnp.exp(a)), "no_func": lambda a: a}[form](alpha)
    temperature = 1 + gate * jnp.log(jnp.maximum(counts.astype(alpha.dtype), 1))
    if token_temperature is not None:
        temperature = temperature + _per_token("token_temperature", token_temperature, (batch, length))
    query = _scaled(query, temperature[..., None])
    if value_temperature is not None:
        value = _scaled(value, _per_token("value_temperature", value_temperature, (batch, source))[..., None])
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
        sinks=sinks,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
    )


def ssa_position_only(
    query: Any,
    key: Any,
    value: Any,
    *,
    alpha: Any = FORMS["paper"],
    form: str = "paper",
    bias: Any = None,
    mask: Any = None,
    is_causal: bool = False,
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
) -> jax.Array:
    r"""The part of `ssa` that knows positions and no contents, which is all that the published code contains.

    out_i = sum_j softmax_j((1 + gate(alpha) log(n_i)) scale q_i . k_j) v_j.

    Args:
        query: `[B, T, N, D]`.
        key: `[B, S, K, D]`; K divides N.
        value: `[B, S, K, Dv]`.
        alpha: scalar or `[N]`; see `ssa`.
        form: "paper", "code" or "no_func"; see `ssa`.
        bias: broadcasts to `[B, N, T, S]`.
        mask: booleans that broadcast to `[B, N, T, S]`, or a `Mask`.
        is_causal: key position <= query position.
        segment_ids: `[B, T]`, or a pair for queries and keys; negative = padding.
        query_positions: `[B|1, T]` integers, 0..T-1 if None.
        key_positions: `[B|1, S]` integers likewise.
        scale: of the logits, D^-0.5 if None.
        score_mod: a `ScoreMod`.
        logit_soft_cap: cap * tanh(logits / cap), after the temperature.
        sinks: `[N]` logits that take part in the softmax and carry no value.
        dropout_rate: of the weights.
        dropout_key: a key of jax.random, needed for a rate above 0.
        implementation: as in `jattn.dot_product_attention`.

    Returns:
        `[B, T, N, Dv]` in the query's dtype.

    Raises:
        ValueError: what `ssa` refuses.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 5, 2, 4))
        >>> ssa_position_only(x, x, x, is_causal=True, alpha=1.0).shape
        (1, 5, 2, 4)

    Source: Selective Attention: Enhancing Transformer through Principled Context Control (arXiv 2411.12892).
    """
    return ssa(
        query,
        key,
        value,
        alpha=alpha,
        form=form,
        bias=bias,
        mask=mask,
        is_causal=is_causal,
        segment_ids=segment_ids,
        query_positions=query_positions,
        key_positions=key_positions,
        scale=scale,
        score_mod=score_mod,
        logit_soft_cap=logit_soft_cap,
        sinks=sinks,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        implementation=implementation,
    )


def _per_token(name: str, x: Any, shape: tuple[int, int]) -> jax.Array:
    x = jnp.asarray(x)
    if x.shape != shape:
        raise ValueError(f"{name} must be [B, length] = {list(shape)}, got {list(x.shape)}")
    return x[..., None].astype(jnp.promote_types(x.dtype, jnp.float32))


def _scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Multiply, so that a NaN that the engine will hide costs neither a gradient: 0 * NaN would be NaN."""
    finite = jnp.isfinite(x) & jnp.isfinite(factor)
    product = jnp.where(finite, x, 0) * jnp.where(finite, factor, 0)
    return jnp.where(finite, product, jax.lax.stop_gradient(x * factor)).astype(x.dtype)


class Ssa(MultiHeadAttention):
    """Multi-head attention with the temperatures of `ssa`, one of each a token, shared by the heads.

    tau_q = tanh(f_q(x_i)) + 1 + gate(alpha) log(n_i), tau_v = 1 + tanh(f_v(c_j)), c = context or x.

    The value temperature multiplies what a cache stores, so decoding needs nothing else. alpha wants a learning rate of
    its own (1e-2 with Adam in the published code) and no weight decay.

    Args:
        features: M, width of x and of the output.
        num_heads: N.
        form: of the gate, "paper", "code" or "no_func".
        token: "shared" (f reuses W_q and W_v), "mlp" (own two-layer MLPs) or "none" (position part alone).
        alpha: its first value; -4.5, 1.5 and 1e-5 for the three forms if None.
        per_head: an alpha for each head instead of one for the layer.
        hidden: width of the MLPs, M if None.
        param_dtype: of the parameters.
        rngs: for the initial values.
        **options: of `MultiHeadAttention`, but `attention_fn`.

    Raises:
        ValueError: an unknown form or token option, or sizes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jattn
        >>> layer = Ssa(16, 4, num_kv_heads=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((1, 5, 16)), mask=jattn.masks.causal()).output.shape
        (1, 5, 16)

    Source: Selective Attention: Enhancing Transformer through Principled Context Control (arXiv 2411.12892); the shared
    form of f, the exact GELU, the value temperature without position part and alpha's first value are inferred.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        form: str = "paper",
        token: str = "shared",
        alpha: float | None = None,
        per_head: bool = False,
        hidden: int | None = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        if token not in ("shared", "mlp", "none"):
            raise ValueError(f"token must be shared, mlp or none, got {token!r}")
        super().__init__(features, num_heads, attention_fn=ssa, param_dtype=param_dtype, rngs=rngs, **options)
        self.form, self.token = form, token
        first = FORMS[form] if alpha is None else alpha
        self.alpha = nnx.Param(jnp.full((num_heads,) if per_head else (), first, param_dtype))
        if token == "shared":
            shapes = ((num_heads, self.head_dim), (self.num_kv_heads, self.value_dim))
            tokens = [
                nnx.Param(jnp.zeros(shape, param_dtype), **axes(heads, "head_dim"))
                for shape, heads in zip(shapes, ("heads", "kv_heads"), strict=True)
            ]
        elif token == "mlp":
            widths = (features, options.get("context_features") or features)
            tokens = [_token_mlp(width, hidden or features, param_dtype, rngs) for width in widths]
        else:
            tokens = [None, None]
        self.query_token, self.value_token = tokens

    def _temperature(self, x: jax.Array, token: Any, projection: nnx.Module) -> jax.Array:
        """tanh(f(x)), `[B, length]`."""
        if self.token == "mlp":
            return jnp.tanh(token(x)[..., 0])
        hidden = _gelu(projection(x))
        return jnp.tanh(jnp.einsum("blhd,hd->bl", hidden, token.get_value().astype(hidden.dtype)))

    def project(self, x: jax.Array, context: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As the base class, with tau_v in the values."""
        query, key, value = super().project(x, context)
        if self.token != "none":
            value = _scaled(value, 1 + self._temperature(context, self.value_token, self.value)[..., None, None])
        return query, key, value

    def attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, *, inputs: jax.Array, **arguments: Any
    ) -> tuple[jax.Array, dict[str, Any]]:
        """As the base class, with tau_q."""
        if self.token != "none":
            arguments["token_temperature"] = self._temperature(inputs, self.query_token, self.query)
        alpha = self.alpha.get_value()
        return super().attend(query, key, value, inputs=inputs, alpha=alpha, form=self.form, **arguments)


def _token_mlp(features: int, hidden: int, param_dtype: Any, rngs: nnx.Rngs) -> nnx.Sequential:
    """Two layers whose last one starts at zero, so that f starts at 0."""
    zeros = nnx.initializers.zeros_init()
    last = nnx.Linear(hidden, 1, use_bias=False, kernel_init=zeros, param_dtype=param_dtype, rngs=rngs)
    return nnx.Sequential(nnx.Linear(features, hidden, param_dtype=param_dtype, rngs=rngs), _gelu, last)


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _layer_example(key, length):
    return LayerExample((16, 4), {"num_kv_heads": 2, "alpha": 0.5}, (normal(key, 2, length, 16),), {})


def _example(key, length, query_length=None):
    arrays, _ = attention_inputs(key, length, query_length)
    return arrays, {"alpha": np.array(0.5, np.float32)}


_PAPERS = (Paper("Selective Attention: Enhancing Transformer through Principled Context Control", "2411.12892", 2024),)
ENTRIES = (
    Entry(
        name="ssa",
        kind="layer",
        family="softmax",
        layer=Ssa,
        papers=_PAPERS,
        patterns=PATTERNS,
        cost=Cost(flops="T^2", memory="T"),
        decode="any KV cache: it stores tempered values, and n_i counts the slots that are seen",
        example=_layer_example,
        fidelity="inferred: the token part's f and alpha's first value; position part: official code",
    ),
    Entry(
        name="ssa_position_only",
        kind="primitive",
        family="softmax",
        function=ssa_position_only,
        papers=_PAPERS,
        patterns=PATTERNS,
        cost=Cost(flops="T^2", memory="T"),
        decode="any KV cache: n_i counts the slots that are seen",
        example=_example,
        fidelity="official code",
    ),
)
