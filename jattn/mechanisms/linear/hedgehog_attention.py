"""Multi-head linear attention under Hedgehog maps, and the way in which its maps learn from softmax attention.

    out_i = sum_j phi(q_i).psi(k_j) v_j / (sum_j phi(q_i).psi(k_j) + eps)

phi and psi are maps of a head's own, for queries and for keys, after positions have been applied. There are three ways
to use it: trained from scratch; in place of the attention of a finetuned model; in place of that of a pretrained one
(`convert_to_linear`). While a converted layer learns (`is_distilling`), it gives out what softmax attention gives, and
reports how far its own weights are from that. Source: The Hedgehog & the Porcupine (arXiv 2402.04347).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.cache import CachePolicy, KVCache, RecurrentState
from jattn.layers.attention import MultiHeadAttention
from jattn.layers.cached import on_state
from jattn.mechanisms.entry import Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import normal
from jattn.mechanisms.linear.attention_distill_loss import attention_distill_loss
from jattn.mechanisms.linear.linear_attention import linear_attention, linear_attention_state
from jattn.recurrence.hedgehog import HedgehogFeatureMap
from jattn.softmax.api import dot_product_attention

_OF_SOFTMAX = ("mask", "is_causal", "segment_ids", "query_positions", "key_positions", "scale")


class HedgehogAttention(MultiHeadAttention):
    """Multi-head linear attention with learned feature maps, for queries and keys each its own.

    y = concat_n(linear_attention(phi(q), psi(k), v)_n) W_o, phi, psi: hedgehog_feature_map

    Args:
        features: M.
        num_heads: N.
        num_features: F, half of the features of a map; head_dim if not given.
        variant: of `hedgehog_feature_map`.
        skip: likewise.
        map_bias: whether maps have a bias.
        shared_maps: one W for all heads, instead of one a head.
        eps: added to the divisor.
        chunk_size: tokens a chunk; no effect on the result.
        rngs: for the initial values.
        **options: num_kv_heads, head_dim, position, qk_norm, scale (of the softmax that it learns from), use_bias,
            context_features, value_dim, kernel_init, dtype and param_dtype of `MultiHeadAttention`.

    Raises:
        ValueError: sizes that do not fit, or an option that needs logits: a relative position, logit_soft_cap, sinks
            or dropout of weights.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jattn
        >>> layer = HedgehogAttention(16, 4, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((1, 5, 16)), mask=jattn.masks.causal()).output.shape
        (1, 5, 16)

    Source: The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry (arXiv 2402.04347).
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        num_features: int | None = None,
        variant: str = "softmax_dim",
        skip: bool = False,
        map_bias: bool = False,
        shared_maps: bool = False,
        eps: float = 1e-12,
        chunk_size: int = 64,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        if "attention_fn" in options:
            raise ValueError("HedgehogAttention has an attention_fn of its own, linear_attention")
        function = functools.partial(linear_attention, feature_map="identity", eps=eps, chunk_size=chunk_size)
        super().__init__(features, num_heads, attention_fn=function, rngs=rngs, **options)
        needing_logits = {
            f"the position {type(self.position).__name__}": hasattr(self.position, "score_mod"),
            "logit_soft_cap": self.logit_soft_cap is not None,
            "use_sinks": self.sinks is not None,
            "dropout_rate": bool(self.dropout_rate),
        }
        if any(needing_logits.values()):
            asked = ", ".join(name for name, is_asked in needing_logits.items() if is_asked)
            raise ValueError(f"linear attention has neither logits nor weights that {asked} could act on")
        shared: dict[str, Any] = {
            "num_features": num_features,
            "variant": variant,
            "skip": skip,
            "use_bias": map_bias,
            "shared": shared_maps,
            "param_dtype": self.query.kernel.get_value().dtype,
        }
        self.query_map = HedgehogFeatureMap(num_heads, self.head_dim, **shared)
        self.key_map = HedgehogFeatureMap(self.num_kv_heads, self.head_dim, **shared)
        self.is_distilling = False

    def init_cache(self, policy: CachePolicy, batch: int, dtype: Any = None) -> KVCache | RecurrentState:
        """The state before any token, or a cache of keys where the policy forgets or is not causal."""
        if not on_state(self.attention_fn, policy):
            return super().init_cache(policy, batch, dtype)
        dtype = self.dtype or self.key.kernel.get_value().dtype if dtype is None else dtype
        features = 2 * self.key_map.weight.get_value().shape[-1]
        state = linear_attention_state(
            batch,
            self.num_kv_heads,
            features,
            self.value_dim,
            feature_map="identity",
            dtype=jnp.promote_types(dtype, jnp.float32),
        )
        return RecurrentState(state, next=jnp.zeros((batch,), jnp.int32))

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
        """Per-head outputs `[B, T, N, Dv]`; while distilling those of softmax attention, and aux["distill_loss"]."""
        dtype = jnp.promote_types(query.dtype, jnp.float32)
        if self.is_distilling:
            return self._teach(query, key, value, dtype, arguments)
        # The scale is that of logits; the kernel has none.
        arguments["scale"] = None
        rows, columns = self.query_map(query.astype(dtype)), self.key_map(key.astype(dtype))
        o, aux = super().attend(
            rows, columns, value, inputs=inputs, deterministic=deterministic, rngs=rngs, **arguments
        )
        return o.astype(query.dtype), aux

    def _teach(
        self, query: jax.Array, key: jax.Array, value: jax.Array, dtype: Any, arguments: dict[str, Any]
    ) -> tuple[jax.Array, dict[str, Any]]:
        asked = [name for name in ("initial_state", "hook", "bias") if arguments.get(name) is not None]
        if asked:
            raise ValueError(f"a layer that is distilling takes neither a cache nor a hook; got {', '.join(asked)}")
        arguments = {name: arguments.get(name) for name in _OF_SOFTMAX}
        arguments["is_causal"] = bool(arguments["is_causal"])
        o = dot_product_attention(query, key, value, **arguments)
        query, key = (jax.lax.stop_gradient(x.astype(dtype)) for x in (query, key))
        loss = attention_distill_loss(query, key, self.query_map(query), self.key_map(key), **arguments)
        return o, {"distill_loss": loss}


def _example(key, length):
    options = {"num_kv_heads": 2, "chunk_size": 4 if length < 64 else 64}
    return LayerExample((16, 4), options, (normal(key, 2, length, 16),), {})


ENTRY = Entry(
    name="HedgehogAttention",
    kind="recurrence",
    family="linear",
    layer=HedgehogAttention,
    papers=(
        Paper(
            "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
            "2402.04347",
            2024,
        ),
    ),
    patterns=("noncausal self", "causal self", "noncausal cross"),
    cost=Cost(flops="T", memory="T"),
    decode="a RecurrentState (S, z) of fixed size, or a cache of keys where the policy forgets",
    example=_example,
    fidelity="inferred: which variant the paper's results have, from later programs of the same group",
)
