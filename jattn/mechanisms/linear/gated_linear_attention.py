"""Gated linear attention: a linear recurrence whose state forgets each key channel at a rate that the token chooses.

    S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T,   o_t = D^-0.5 q_t^T S_t
    g = logsigmoid(x W_1 W_2 + b) / 16                     (layer; low rank 16)
    y = W_o concat_n(rmsnorm(o_n) * silu(x W_g)_n)

The division by 16 keeps the decay near 1: without it everything is forgotten within a few tokens. Source: Gated Linear
Attention Transformers with Hardware-Efficient Training (arXiv 2312.06635).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.cache import RecurrentState
from jattn.layers.recurrent import GatedOutput, HeadProjection, LowRank, RecurrentLayer
from jattn.mechanisms.entry import Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import normal, normals
from jattn.recurrence.api import linear_recurrence


def gated_linear_attention(
    query: Any,
    key: Any,
    value: Any,
    log_decay: Any,
    *,
    scale: float | None = None,
    initial_state: Any = None,
    segment_ids: Any = None,
    mode: str = "chunk",
    implementation: str | None = None,
    chunk_size: int = 64,
    return_final_state: bool = False,
) -> Any:
    """Causal linear attention with a decay for each token and key channel.

    S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T, o_t = scale q_t^T S_t

    Args:
        query: `[B, T, N, D]`.
        key: `[B, T, K, D]`; K divides N.
        value: `[B, T, K, Dv]`.
        log_decay: g <= 0, `[B, T, N, D]` or `[B, T, K, D]`; a decay a token `[B, T, N]` or a head `[N]` will do, too.
        scale: of the queries, D^-0.5 if None.
        initial_state: `[B, N, D, Dv]`, what earlier tokens left behind.
        segment_ids: `[B, T]`; a run of equal ids is a document, negative = padding.
        mode: of `jattn.linear_recurrence`.
        implementation: likewise.
        chunk_size: tokens a chunk; no effect on the result.
        return_final_state: also return the state after the last token.

    Returns:
        `[B, T, N, Dv]`; with `return_final_state` also the state, float32 `[B, N, D, Dv]`.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> one = jnp.ones((1, 3, 1, 1))
        >>> out = gated_linear_attention(one, one, one, jnp.log(0.5) * one)
        >>> [round(x, 4) for x in out.ravel().tolist()]
        [1.0, 1.5, 1.75]

    Source: Gated Linear Attention Transformers with Hardware-Efficient Training (arXiv 2312.06635).
    """
    return linear_recurrence(
        query,
        key,
        value,
        log_decay=log_decay,
        scale=scale,
        initial_state=initial_state,
        segment_ids=segment_ids,
        mode=mode,
        implementation=implementation,
        chunk_size=chunk_size,
        return_final_state=return_final_state,
    )


class GatedLinearAttention(RecurrentLayer):
    """Multi-head gated linear attention with its gate, head norm and output gate.

    g = logsigmoid(x W_1 W_2 + b) / gate_normalizer; y = W_o concat_n(rmsnorm(o_n) * silu(x W_g)_n)

    Args:
        features: M, width of x and of the output.
        num_heads: N.
        num_kv_heads: K, which divides N; N if not given.
        head_dim: D of queries and keys; half of features / num_heads if not given.
        value_dim: Dv; features / num_heads if not given.
        gate_rank: width between W_1 and W_2.
        gate_normalizer: what log decays are divided by.
        min_log_decay: log decays below are raised to it; None for no bound.
        epsilon: of the head norm.
        position: None, or an object with `rotate`, such as `Rope`.
        chunk_size: tokens a chunk; no effect on the result.
        dtype: of the computation; that of inputs and parameters if not given.
        param_dtype: of the parameters.
        rngs: for the initial values.

    Raises:
        ValueError: sizes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> GatedLinearAttention(16, 2, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 16))).output.shape
        (1, 5, 16)

    Source: Gated Linear Attention Transformers with Hardware-Efficient Training (arXiv 2312.06635), published code.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        gate_rank: int = 16,
        gate_normalizer: float = 16.0,
        min_log_decay: float | None = None,
        epsilon: float = 1e-5,
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
        if value_dim is None and features % num_heads:
            raise ValueError(f"num_heads must divide features unless value_dim is given, got {num_heads}, {features}")
        value_dim = features // num_heads if value_dim is None else value_dim
        head_dim = max(features // num_heads // 2, 1) if head_dim is None else head_dim
        self.dtype, self.chunk_size = dtype, chunk_size
        self.gate_normalizer, self.min_log_decay = gate_normalizer, min_log_decay
        shared: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query = HeadProjection(features, num_heads, head_dim, **shared)
        self.key = HeadProjection(features, kv_heads, head_dim, axis="kv_heads", **shared)
        self.value = HeadProjection(features, kv_heads, value_dim, axis="kv_heads", **shared)
        self.decay = LowRank(features, gate_rank, kv_heads * head_dim, **shared)
        self.out = GatedOutput(features, num_heads, value_dim, epsilon=epsilon, **shared)

    def log_decay(self, x: jax.Array) -> jax.Array:
        """g `[B, T, K, D]`, float32 at least."""
        logits = self.decay(x)
        gates = jax.nn.log_sigmoid(logits.astype(jnp.promote_types(logits.dtype, jnp.float32))) / self.gate_normalizer
        gates = gates if self.min_log_decay is None else jnp.maximum(gates, self.min_log_decay)
        return gates.reshape(*x.shape[:2], self.key.out_features[0], -1)

    def mix(
        self, x: jax.Array, *, segment_ids: Any, positions: jax.Array, state: RecurrentState | None, **options: Any
    ) -> tuple[jax.Array, RecurrentState, dict[str, Any]]:
        """See `RecurrentLayer`."""
        query, key = self.rotated(self.query(x), self.key(x), positions)
        o, last = gated_linear_attention(
            query,
            key,
            self.value(x),
            self.log_decay(x),
            initial_state=None if state is None else state.state,
            segment_ids=segment_ids,
            chunk_size=self.chunk_size,
            return_final_state=True,
        )
        return o, RecurrentState(last), {}

    def output(self, o: jax.Array, x: jax.Array) -> jax.Array:
        """See `RecurrentLayer`."""
        return self.out(o, x)


def _example(key, length):
    query, *rest = normals(key, (2, length, 4, 8), (2, length, 2, 8), (2, length, 2, 6), (2, length, 2, 8))
    return (query, *rest[:2], -abs(rest[2])), {"chunk_size": 4 if length < 64 else 64}


def _layer_example(key, length):
    options = {"num_kv_heads": 2, "gate_rank": 2, "chunk_size": 4 if length < 64 else 64}
    return LayerExample((16, 4), options, (normal(key, 2, length, 16),), {})


_PAPER = Paper("Gated Linear Attention Transformers with Hardware-Efficient Training", "2312.06635", 2023)

ENTRIES = (
    Entry(
        name="gated_linear_attention",
        kind="recurrence",
        family="linear",
        function=gated_linear_attention,
        papers=(_PAPER,),
        patterns=("causal self",),
        cost=Cost(flops="T", memory="T"),
        decode="its state [B, N, D, Dv]",
        example=_example,
        fidelity="official code",
    ),
    Entry(
        name="GatedLinearAttention",
        kind="recurrence",
        family="linear",
        layer=GatedLinearAttention,
        papers=(_PAPER,),
        patterns=("causal self",),
        cost=Cost(flops="T", memory="T"),
        decode="a RecurrentState",
        example=_layer_example,
        fidelity="official code",
    ),
)
