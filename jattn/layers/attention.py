"""Multi-head attention as a Flax NNX layer: self and cross, grouped queries, positions, decoding on a cache.

    q, k, v = x W_q, c W_k, c W_v  (c = context or x)   ->  qk-norm  ->  positions  ->  attention_fn  ->  W_o

`MultiHeadAttention` is also the base of mechanisms with parameters: they override `project`, `attend` or `output` and
keep the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from jattn.cache import CachePolicy, KVCache, RecurrentState
from jattn.layers.cached import CachedAttention
from jattn.layers.norms import QkNorm
from jattn.layers.sharding import axes
from jattn.probes import AttnHook, attention
from jattn.softmax import masks
from jattn.softmax.api import dot_product_attention
from jattn.softmax.calling import accepts, call_attention, name_of
from jattn.softmax.masks import Mask


class LayerOutput(NamedTuple):
    """What every layer returns.

    Example:
        >>> LayerOutput(1.0).aux
        {}
    """

    output: Any
    """`[B, T, features]`."""
    cache: Any = None
    """The cache after this call; None without one."""
    aux: dict[str, Any] = {}
    """Losses (names that end with `_loss`, times their coefficients) and statistics of this call."""


class MultiHeadAttention(CachedAttention):
    """Multi-head attention with any attention function of (query, key, value) form.

    y = concat_n(attention_fn(R(norm(x W_q)), R(norm(c W_k)), c W_v)_n) W_o, c = context or x; query head n reads kv
    head n // (N / K).

    Args:
        features: M, width of x and of the output.
        num_heads: N.
        num_kv_heads: K, which divides N; N if not given.
        head_dim: D; features / N if not given.
        attention_fn: a function `(query, key, value, *, mask, is_causal, ...) -> [B, T, N, Dv]`. What a call asks for
            and the function has no argument for is refused, never dropped.
        position: None, or an object with `rotate(q, k, query_positions, key_positions)` (such as `Rope`), with
            `score_mod(num_heads)` and `bias(num_heads, i, j)` (such as `Alibi`), or all of them.
        qk_norm: None or a mode of `QkNorm`.
        qk_norm_length: training length for the first gain of `qk_norm="l2"`.
        scale: of the logits; D^-0.5 if not given.
        logit_soft_cap: cap * tanh(logit / cap), for functions that take it.
        use_sinks: one learned logit a query head that joins the softmax, zero at first.
        dropout_rate: of attention weights, active when a call is not deterministic.
        use_bias: whether the four projections have biases.
        context_features: width of the context; `features` if not given.
        value_dim: Dv; D if not given.
        kernel_init: of the four projections.
        dtype: of the computation; that of inputs and parameters if not given.
        param_dtype: of the parameters.
        rngs: for the initial values.

    Raises:
        ValueError: sizes that do not fit each other.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jattn
        >>> layer = MultiHeadAttention(16, 4, num_kv_heads=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((1, 5, 16)), mask=jattn.masks.causal()).output.shape
        (1, 5, 16)

    Source: Attention Is All You Need (arXiv 1706.03762); GQA (arXiv 2305.13245).
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        attention_fn: Callable[..., Any] = dot_product_attention,
        position: Any = None,
        qk_norm: str | None = None,
        qk_norm_length: int = 1024,
        scale: float | int | None = None,
        logit_soft_cap: float | int | None = None,
        use_sinks: bool = False,
        dropout_rate: float | int = 0.0,
        use_bias: bool = False,
        context_features: int | None = None,
        value_dim: int | None = None,
        kernel_init: Callable[..., Any] | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads, got {kv_heads} and {num_heads}")
        if head_dim is None and features % num_heads:
            raise ValueError(f"num_heads must divide features unless head_dim is given, got {num_heads} and {features}")
        if not 0.0 <= dropout_rate < 1.0:
            raise ValueError(f"dropout_rate must be in [0, 1), got {dropout_rate}")
        self.features, self.num_heads, self.num_kv_heads = features, num_heads, kv_heads
        self.head_dim = features // num_heads if head_dim is None else head_dim
        self.value_dim = self.head_dim if value_dim is None else value_dim
        self.attention_fn = attention_fn
        self.position = position
        self.logit_soft_cap, self.dropout_rate = logit_soft_cap, dropout_rate
        self.dtype = dtype
        context_features = features if context_features is None else context_features
        init = nnx.initializers.lecun_normal() if kernel_init is None else kernel_init

        def projection(source: int, heads: int, width: int, axis: str) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                source,
                (heads, width),
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=init,
                kernel_metadata=axes("embed", axis, "head_dim"),
                bias_metadata=axes(axis, "head_dim"),
                rngs=rngs,
            )

        self.query = projection(features, num_heads, self.head_dim, "heads")
        self.key = projection(context_features, kv_heads, self.head_dim, "kv_heads")
        self.value = projection(context_features, kv_heads, self.value_dim, "kv_heads")
        self.out = nnx.LinearGeneral(
            (num_heads, self.value_dim),
            features,
            axis=(-2, -1),
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=init,
            kernel_metadata=axes("heads", "head_dim", "embed"),
            bias_metadata=axes("embed"),
            rngs=rngs,
        )
        norm = None
        if qk_norm is not None:
            norm = QkNorm(
                qk_norm,
                num_heads,
                kv_heads,
                self.head_dim,
                length=qk_norm_length,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )
        self.qk_norm = norm
        self.scale = scale if scale is not None or norm is None else norm.scale
        self.sinks = nnx.Param(jnp.zeros((num_heads,), param_dtype), **axes("heads")) if use_sinks else None

    def project(self, x: jax.Array, context: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries of x, keys and values of the context (x itself in self attention), normalized but not rotated.

        Args:
            x: `[B, T, features]`.
            context: `[B, S, context_features]`.

        Returns:
            query `[B, T, N, D]`, key `[B, S, K, D]`, value `[B, S, K, Dv]`. Keys and values are what a cache stores
            (keys rotated), so what a mechanism does to them here needs no repetition when decoding.
        """
        query, key, value = self.query(x), self.key(context), self.value(context)
        if self.qk_norm is not None:
            query, key = self.qk_norm(query, key)
        return query, key, value

    def attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        inputs: jax.Array,
        deterministic: bool = True,
        rngs: Any = None,
        **arguments: Any,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Per-head outputs. Mechanisms override this, change what they must, and call it.

        Args:
            query: `[B, T, N, D]`, positions applied.
            key: `[B, S, K, D]`; when decoding, the slots of the cache.
            value: `[B, S, K, Dv]`.
            inputs: x `[B, T, features]`, the layer's input.
            deterministic: no dropout.
            rngs: an `nnx.Rngs` with a dropout stream, or a key.
            **arguments: of the attention function: mask (an array or a Mask), is_causal, segment_ids, query_positions,
                key_positions, bias, score_mod, scale, and a hook; None or False where the call has none.

        Returns:
            `[B, T, N, Dv]`, and losses and statistics by name.
        """
        arguments["logit_soft_cap"] = self.logit_soft_cap
        arguments["sinks"] = None if self.sinks is None else self.sinks.get_value()
        if self.dropout_rate and not deterministic:
            if rngs is None:
                raise ValueError("rngs must be given when dropout_rate > 0 and deterministic=False")
            arguments["dropout_rate"] = self.dropout_rate
            arguments["dropout_key"] = rngs if isinstance(rngs, jax.Array) else rngs.dropout()
        hook = arguments.pop("hook", None)
        if hook is None:
            o = call_attention(self.attention_fn, query, key, value, arguments)
            return (o[0], {"state": o[1]}) if arguments.get("return_final_state") else (o, {})
        o, seen = attention(query, key, value, hook=hook, attention_fn=self.attention_fn, **arguments)
        return o, {"hook": seen} if seen else {}

    def output(self, o: jax.Array) -> jax.Array:
        """Mix the heads: `[B, T, N, Dv]` -> `[B, T, features]`."""
        return self.out(o)

    def __call__(
        self,
        x: ArrayLike,
        context: ArrayLike | None = None,
        *,
        mask: Any = None,
        positions: Any = None,
        segment_ids: Any = None,
        cache: tuple[CachePolicy, KVCache | RecurrentState] | None = None,
        deterministic: bool = True,
        rngs: Any = None,
        tap: Callable[[str, Any], Any] | None = None,
        hook: AttnHook | None = None,
    ) -> LayerOutput:
        """Attend.

        Args:
            x: `[B, T, features]`.
            context: `[B, S, context_features]` for cross attention; x itself if not given.
            mask: boolean array that broadcasts to `[B, N, T, S]`, or a Mask such as `masks.causal()`.
            positions: of x, `[T]` or `[B, T]`; 0 .. T-1 if not given. Masks and relative positions see them.
            segment_ids: `[B, T]`, or a pair for x and context; negative = padding. With a cache only the sign counts:
                padding is not stored.
            cache: (policy, what `init_cache` made). New tokens get the next positions, are stored, and see what the
                policy shows; the mask is the policy's. A policy that is not causal holds a context: it is stored when
                `context` is given and read alone when not.
            deterministic: no dropout.
            rngs: an `nnx.Rngs` or a key, for dropout.
            tap: `tap("head_out", o) -> o` sees, and may replace, the per-head outputs before they are mixed.
            hook: what to do and to observe inside the attention call.

        Returns:
            LayerOutput(output `[B, T, features]`, cache, aux); what the hook observed is aux["hook"].

        Raises:
            ValueError: shapes that do not fit, or a combination that the attention function or the cache cannot serve.
        """
        x = jnp.asarray(x)
        if x.ndim != 3 or x.shape[-1] != self.features:
            raise ValueError(f"x must be [B, T, {self.features}], got {list(x.shape)}")
        source = x if context is None else jnp.asarray(context)
        if source.ndim != 3 or source.shape[0] != x.shape[0]:
            raise ValueError(f"context must be [B, S, features] with B = {x.shape[0]}, got {list(source.shape)}")
        if cache is None:
            query, key, value = self.project(x, source)
            arguments = self._arguments(query, key, mask, positions, segment_ids, is_cross=context is not None)
            query, key = self._rotate(query, key, arguments)
            new_cache = None
        else:
            if mask is not None and not _is_causal(mask):
                raise ValueError("mask cannot be given together with a cache, whose policy says what is visible")
            query, key, value, arguments, new_cache = self._arguments_of_cache(
                x, context, positions, segment_ids, *cache
            )
        if hook is not None:
            arguments["hook"] = hook
        o, aux = self.attend(query, key, value, inputs=x, deterministic=deterministic, rngs=rngs, **arguments)
        if isinstance(new_cache, RecurrentState):
            new_cache = dataclasses.replace(new_cache, state=aux.pop("state"))
        elif new_cache is not None and cache is not None:
            new_cache = cache[0].evict(new_cache, None)
        if tap is not None:
            o = tap("head_out", o)
        return LayerOutput(self.output(o), new_cache, aux)

    def _arguments(
        self, query: jax.Array, key: jax.Array, mask: Any, positions: Any, segment_ids: Any, *, is_cross: bool
    ) -> dict[str, Any]:
        if positions is not None:
            positions = jnp.atleast_2d(jnp.asarray(positions))
        arguments = {
            "is_causal": _is_causal(mask),
            "mask": None if _is_causal(mask) else mask,
            "segment_ids": segment_ids,
            "query_positions": positions,
            "key_positions": None if is_cross else positions,
            "bias": None,
            "score_mod": None,
            "scale": self.scale,
        }
        if hasattr(self.position, "score_mod"):
            if accepts(self.attention_fn, "score_mod"):
                arguments["score_mod"] = self.position.score_mod(self.num_heads)
            else:
                i, j = _both(arguments, query, key)
                arguments["bias"] = self._dense_bias(i[:, :, None], j[:, None, :])
        return arguments

    def _dense_bias(self, i: jax.Array, j: jax.Array) -> jax.Array:
        """A relative bias as an array `[B, N, T, S]`, for functions that take a bias and no score mod."""
        if not hasattr(self.position, "bias"):
            raise ValueError(
                f"position {type(self.position).__name__} has only a score_mod, which {name_of(self.attention_fn)} "
                "does not take; jattn.dot_product_attention does"
            )
        return self.position.bias(self.num_heads, i, j)

    def _rotate(self, query: jax.Array, key: jax.Array, arguments: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        if not hasattr(self.position, "rotate"):
            return query, key
        i, j = _both(arguments, query, key)
        return self.position.rotate(query, key, i, j)


def _is_causal(mask: Any) -> bool:
    # Mechanisms without a mask argument know causality by its own name.
    return isinstance(mask, Mask) and type(mask) is type(masks.causal()) and mask == masks.causal()


def _both(arguments: dict[str, Any], query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positions of queries `[B|1, T]` and keys `[B|1, S]`, counted from 0 where they are not given."""
    i, j = arguments["query_positions"], arguments["key_positions"]
    return (
        jnp.arange(query.shape[1])[None] if i is None else i,
        jnp.arange(key.shape[1])[None] if j is None else j,
    )
