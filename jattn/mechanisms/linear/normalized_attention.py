"""Normalized attention: linear attention without a feature map, divided by what the token itself says.

    o_i = sum_{j <= i} (q_i . k_j) v_j / exp(n_i),   n = x W_n + b, one number a head

Softmax attention divides by a sum over all keys, state space models by nothing; here the token learns its divisor. The
framework that it comes from sees all of these as one recurrence: `jattn.probes.to_dsf`. Source: Understanding the
differences in Foundation Models: Attention, State Space Models, and Recurrent Neural Networks (arXiv 2405.15731) and
its code; softplus and sigmoid of n are divisors that the paper tried, too; exp was best.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.cache import RecurrentState
from jattn.layers.recurrent import HeadProjection, RecurrentLayer
from jattn.layers.sharding import axes
from jattn.mechanisms.entry import Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import normal, normals
from jattn.recurrence.api import linear_recurrence

NORMALIZERS = {
    "exp": lambda n: jnp.exp(-n),
    "softplus": lambda n: 1 / jax.nn.softplus(n),
    "sigmoid": lambda n: 1 + jnp.exp(-n),
}
"""What a token's output is multiplied by: one over exp, softplus and sigmoid of n."""


def normalized_attention(
    query: Any,
    key: Any,
    value: Any,
    normalizer_logits: Any,
    *,
    normalizer: str = "exp",
    scale: float | None = None,
    initial_state: Any = None,
    segment_ids: Any = None,
    mode: str = "chunk",
    implementation: str | None = None,
    chunk_size: int = 64,
    return_final_state: bool = False,
) -> Any:
    """Causal linear attention with a divisor for each token.

    S_t = S_{t-1} + k_t v_t^T, o_t = scale q_t^T S_t / exp(n_t)

    Args:
        query: `[B, T, N, D]`.
        key: `[B, T, K, D]`; K divides N.
        value: `[B, T, K, Dv]`.
        normalizer_logits: n, `[B, T, N]`.
        normalizer: what is divided by: "exp", "softplus" or "sigmoid" of n.
        scale: of the queries, 1 if None.
        initial_state: `[B, N, D, Dv]`, what earlier tokens left behind.
        segment_ids: `[B, T]`; a run of equal ids is a document, negative = padding.
        mode: of `jattn.linear_recurrence`.
        implementation: likewise.
        chunk_size: tokens a chunk; no effect on the result.
        return_final_state: also return the state after the last token.

    Returns:
        `[B, T, N, Dv]`; with `return_final_state` also the state, float32 `[B, N, D, Dv]`.

    Raises:
        ValueError: shapes that do not fit, or an unknown normalizer.

    Example:
        >>> import jax.numpy as jnp
        >>> one = jnp.ones((1, 3, 1, 1))
        >>> out = normalized_attention(one, one, one, jnp.log(jnp.arange(1.0, 4.0)).reshape(1, 3, 1))
        >>> out.ravel().round(4).tolist()
        [1.0, 1.0, 1.0]

    Source: Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural
    Networks (arXiv 2405.15731), published code.
    """
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer must be one of {', '.join(NORMALIZERS)}, got {normalizer!r}")
    query, logits = jnp.asarray(query), jnp.asarray(normalizer_logits)
    if query.ndim != 4 or logits.shape != query.shape[:3]:
        raise ValueError(f"normalizer_logits must be [B, T, N] for query [B, T, N, D]; got {list(logits.shape)}")
    if jnp.ndim(value) == 4 and jnp.shape(value)[2] > query.shape[2]:
        raise ValueError("value must not have more heads than query, whose heads have the divisors")
    logits = logits.astype(jnp.promote_types(query.dtype, jnp.float32))
    if segment_ids is not None:
        real = jnp.broadcast_to(jnp.asarray(segment_ids) >= 0, query.shape[:2])
        logits = jnp.where(real[..., None], logits, 0)
    out, state = linear_recurrence(
        # The sum and its divisor may both be large: the quotient alone is rounded.
        query.astype(logits.dtype),
        key,
        value,
        scale=1.0 if scale is None else scale,
        initial_state=initial_state,
        segment_ids=segment_ids,
        mode=mode,
        implementation=implementation,
        chunk_size=chunk_size,
        return_final_state=True,
    )
    out = (out * NORMALIZERS[normalizer](logits)[..., None]).astype(query.dtype)
    return (out, state) if return_final_state else out


class NormalizedAttention(RecurrentLayer):
    """Multi-head normalized attention.

    y = W_o concat_n(o_n) + b_o, q, k, v = x W + b, n = x W_n + b_n

    Args:
        features: M.
        num_heads: N.
        num_kv_heads: K, which divides N; N if not given.
        head_dim: D of queries and keys, the state expansion; features / num_heads if not given.
        value_dim: Dv; features / num_heads if not given.
        normalizer: "exp", "softplus" or "sigmoid".
        use_bias: of the projections to queries, keys, values and divisors; the last one always has a bias.
        position: None, or an object with `rotate`, such as `Rope`.
        chunk_size: tokens a chunk; no effect on the result.
        dtype: of the computation; that of inputs and parameters if not given.
        param_dtype: of the parameters.
        rngs: for the initial values.

    Raises:
        ValueError: sizes that do not fit, or an unknown normalizer.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> NormalizedAttention(16, 2, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 16))).output.shape
        (1, 5, 16)

    Source: Understanding the differences in Foundation Models (arXiv 2405.15731), published code.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        normalizer: str = "exp",
        use_bias: bool = True,
        position: Any = None,
        chunk_size: int = 64,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(features, num_heads, position=position)
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads, got {kv_heads} and {num_heads}")
        if features % num_heads and None in (head_dim, value_dim):
            raise ValueError(
                "num_heads must divide features unless head_dim and value_dim are given, got "
                f"{num_heads} and {features}"
            )
        if normalizer not in NORMALIZERS:
            raise ValueError(f"normalizer must be one of {', '.join(NORMALIZERS)}, got {normalizer!r}")
        head_dim = features // num_heads if head_dim is None else head_dim
        value_dim = features // num_heads if value_dim is None else value_dim
        self.normalizer, self.dtype, self.chunk_size = normalizer, dtype, chunk_size
        shared: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        heads: dict[str, Any] = {"use_bias": use_bias, **shared}
        self.query = HeadProjection(features, num_heads, head_dim, **heads)
        self.key = HeadProjection(features, kv_heads, head_dim, axis="kv_heads", **heads)
        self.value = HeadProjection(features, kv_heads, value_dim, axis="kv_heads", **heads)
        self.divisor = nnx.Linear(
            features,
            num_heads,
            use_bias=use_bias,
            kernel_metadata=axes("embed", "heads"),
            bias_metadata=axes("heads"),
            **shared,
        )
        self.out = nnx.LinearGeneral(
            (num_heads, value_dim),
            features,
            axis=(-2, -1),
            kernel_metadata=axes("heads", "head_dim", "embed"),
            bias_metadata=axes("embed"),
            **shared,
        )

    def mix(
        self, x: jax.Array, *, segment_ids: Any, positions: jax.Array, state: RecurrentState | None, **options: Any
    ) -> tuple[jax.Array, RecurrentState, dict[str, Any]]:
        """See `RecurrentLayer`."""
        query, key = self.rotated(self.query(x), self.key(x), positions)
        o, last = normalized_attention(
            query,
            key,
            self.value(x),
            self.divisor(x),
            normalizer=self.normalizer,
            initial_state=None if state is None else state.state,
            segment_ids=segment_ids,
            chunk_size=self.chunk_size,
            return_final_state=True,
        )
        return o, RecurrentState(last), {}

    def output(self, o: jax.Array, x: jax.Array) -> jax.Array:
        """See `RecurrentLayer`."""
        return self.out(o)


def _example(key, length):
    arrays = normals(key, (2, length, 4, 8), (2, length, 2, 8), (2, length, 2, 6), (2, length, 4))
    return arrays, {"chunk_size": 4 if length < 64 else 64}


def _layer_example(key, length):
    options = {"num_kv_heads": 2, "chunk_size": 4 if length < 64 else 64}
    return LayerExample((16, 4), options, (normal(key, 2, length, 16),), {})


_PAPER = Paper(
    "Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural Networks",
    "2405.15731",
    2024,
)

ENTRIES = (
    Entry(
        name="normalized_attention",
        kind="recurrence",
        family="linear",
        function=normalized_attention,
        papers=(_PAPER,),
        patterns=("causal self",),
        cost=Cost(flops="T", memory="T"),
        decode="its state [B, N, D, Dv]",
        example=_example,
        fidelity="official code",
    ),
    Entry(
        name="NormalizedAttention",
        kind="recurrence",
        family="linear",
        layer=NormalizedAttention,
        papers=(_PAPER,),
        patterns=("causal self",),
        cost=Cost(flops="T", memory="T"),
        decode="a RecurrentState",
        example=_layer_example,
        fidelity="official code",
    ),
)
