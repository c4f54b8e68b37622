"""Kimi delta attention: the delta rule on a state of which every key channel decays at its own rate.

    S~_t = Diag(exp g_t) S_{t-1},   S_t = S~_t + beta_t k_t (v_t - k_t^T S~_t)^T,   o_t = D^-0.5 q_t^T S_t
    g = -exp(A_log) softplus(x W_1 W_2 + dt_bias);   beta = sigmoid(x W_beta)                    (layer)
    q, k = l2norm(silu(conv(x W)));   v = silu(conv(x W_v))
    y = W_o concat_n(rmsnorm(o_n) * sigmoid(x W_3 W_4 + b)_n)

The gated delta rule has one decay a head in place of g. Source: Kimi Linear: An Expressive, Efficient Attention
Architecture (arXiv 2510.26692).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jattn.layers.delta import DeltaLayer, SoftplusDecay
from jattn.layers.recurrent import LowRank
from jattn.mechanisms.entry import Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import normal, normals
from jattn.recurrence.delta import delta_recurrence


def kda(
    query: Any,
    key: Any,
    value: Any,
    beta: Any,
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
    """The delta rule with a decay for each token and key channel.

    S~ = Diag(exp g_t) S_{t-1}, S_t = S~ + beta_t k_t (v_t - k_t^T S~)^T, o_t = scale q_t^T S_t

    Args:
        query: `[B, T, N, D]`.
        key: `[B, T, K, D]`, of length 1; K divides the number of output heads, max(N, K').
        value: `[B, T, K', Dv]`; there may be more heads than of queries and keys, each of which then serves several.
        beta: `[B, T, H]`, how much of a key's content is replaced, 0 to 1, or to 2; H output heads or a divisor.
        log_decay: g <= 0, `[B, T, H, D]`.
        scale: of the queries, D^-0.5 if None.
        initial_state: `[B, N, D, Dv]`, what earlier tokens left behind.
        segment_ids: `[B, T]`; a run of equal ids is a document, negative = padding.
        mode: of `jattn.linear_recurrence`; "associative" cannot correct.
        implementation: likewise.
        chunk_size: tokens a chunk; no effect on the result.
        return_final_state: also return the state after the last token.

    Returns:
        `[B, T, N, Dv]`; with `return_final_state` also the state, float32 `[B, N, D, Dv]`.

    Raises:
        ValueError: shapes that do not fit, mode "associative".

    Example:
        >>> import jax.numpy as jnp
        >>> key = jnp.ones((1, 2, 1, 1))
        >>> value = jnp.array([4.0, 0.0]).reshape(1, 2, 1, 1)
        >>> half = jnp.full((1, 2, 1), 0.5)
        >>> kda(key, key, value, half, jnp.log(half)[..., None]).ravel().tolist()
        [2.0, 0.5]

    Source: Kimi Linear: An Expressive, Efficient Attention Architecture (arXiv 2510.26692).
    """
    if jnp.ndim(log_decay) != 4:
        raise ValueError(
            f"log_decay must be [B, T, heads, D], got {list(jnp.shape(log_decay))}; gated_delta_rule takes one a head"
        )
    return delta_recurrence(
        query,
        key,
        value,
        beta,
        log_decay,
        scale=scale,
        initial_state=initial_state,
        segment_ids=segment_ids,
        mode=mode,
        implementation=implementation,
        chunk_size=chunk_size,
        return_final_state=return_final_state,
    )


class Kda(DeltaLayer):
    """Kimi Linear's token mixer.

    S~ = Diag(exp g_t) S_{t-1}, S_t = S~ + beta_t k_t (v_t - k_t^T S~)^T; g = -exp(A_log) softplus(x W_1 W_2 + dt_bias);
    y = W_o concat_n(rmsnorm(D^-0.5 q_t^T S_t) * sigmoid(x W_3 W_4 + b)_n)

    Values, beta and decay have `num_v_heads` heads, each with a state of its own; v head h reads query and key head
    h // (num_v_heads / num_heads).

    Args:
        features: M, width of x and of the output.
        num_heads: N, heads of queries and keys.
        num_kv_heads: heads of keys, which divides N; N if not given.
        num_v_heads: a multiple of the heads of keys, which is what it is if not given.
        head_dim: D of queries and keys; features / num_heads if not given.
        value_dim: Dv; D if not given.
        rank: waist of the projections of decay and gate; Dv if not given.
        conv_width: tokens that the convolutions see, the current one included.
        conv_bias: whether the convolutions have biases.
        allow_neg_eigval: beta = 2 sigmoid: eigenvalues of a step in [-1, 1] instead of [0, 1] (arXiv 2411.12537).
        epsilon: of the head norm.
        position: None, or an object with `rotate`, such as `Rope`, which turns the normalized queries and keys. Kimi
            Linear has none, and where two channels of a pair decay differently, more than distances counts.
        chunk_size: tokens a chunk; no effect on the result.
        dtype: of the computation; that of inputs and parameters if not given.
        param_dtype: of the parameters; A_log and dt_bias are float32 at least.
        rngs: for the initial values.

    Raises:
        ValueError: sizes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> Kda(16, 2, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 16))).output.shape
        (1, 5, 16)

    Source: Kimi Linear: An Expressive, Efficient Attention Architecture (arXiv 2510.26692); the layer as in
    flash-linear-attention.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        num_v_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        rank: int | None = None,
        conv_width: int = 4,
        conv_bias: bool = False,
        allow_neg_eigval: bool = False,
        epsilon: float = 1e-5,
        position: Any = None,
        chunk_size: int = 64,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if head_dim is None and features % num_heads:
            raise ValueError(f"num_heads must divide features unless head_dim is given, got {num_heads}, {features}")
        head_dim = features // num_heads if head_dim is None else head_dim
        value_dim = head_dim if value_dim is None else value_dim
        rank = value_dim if rank is None else rank
        super().__init__(
            features,
            num_heads,
            num_kv_heads=num_kv_heads,
            num_v_heads=num_v_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            gate="sigmoid",
            gate_rank=rank,
            conv_width=conv_width,
            conv_bias=conv_bias,
            allow_neg_eigval=allow_neg_eigval,
            epsilon=epsilon,
            position=position,
            chunk_size=chunk_size,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.rate = LowRank(
            features,
            rank,
            self.v_heads * head_dim,
            use_bias=False,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.decay = SoftplusDecay(self.v_heads, head_dim, lowest=1.0, param_dtype=param_dtype, rngs=rngs)

    def log_decay(self, x: jax.Array) -> jax.Array:
        """g `[B, T, H, D]`, float32 at least."""
        return self.decay(self.rate(x))


def _example(key, length):
    query, keys, value, beta, decay = normals(
        key, (2, length, 4, 8), (2, length, 2, 8), (2, length, 2, 6), (2, length, 4), (2, length, 2, 8)
    )
    keys = keys / (keys**2).sum(-1, keepdims=True) ** 0.5
    return (query, keys, value, 1 / (1 + np.exp(-beta)), -abs(decay)), {"chunk_size": 4 if length < 64 else 64}


def _layer_example(key, length):
    options = {"num_v_heads": 4, "head_dim": 4, "rank": 2, "conv_width": 3, "chunk_size": 4 if length < 64 else 64}
    return LayerExample((16, 2), options, (normal(key, 2, length, 16),), {})


_PAPER = Paper("Kimi Linear: An Expressive, Efficient Attention Architecture", "2510.26692", 2025)

ENTRIES = (
    Entry(
        name="kda",
        kind="recurrence",
        family="linear",
        function=kda,
        papers=(_PAPER,),
        patterns=("causal self",),
        cost=Cost(flops="T", memory="T"),
        decode="its state [B, N, D, Dv]",
        example=_example,
        fidelity="official code",
    ),
    Entry(
        name="Kda",
        kind="recurrence",
        family="linear",
        layer=Kda,
        papers=(_PAPER,),
        patterns=("causal self",),
        cost=Cost(flops="T", memory="T"),
        decode="a RecurrentState: the state and the last inputs of the convolutions",
        example=_layer_example,
        fidelity="official code",
    ),
)
