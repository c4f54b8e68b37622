"""The gated delta rule: the state decays as a whole, then a token replaces what is left of its key's content.

    S~_t = exp(g_t) S_{t-1},   S_t = S~_t + beta_t k_t (v_t - k_t^T S~_t)^T,   o_t = D^-0.5 q_t^T S_t
    g = -exp(A_log) softplus(x W_a + dt_bias);   beta = sigmoid(x W_beta)                        (layer)
    q, k = l2norm(silu(conv(x W)));   v = silu(conv(x W_v));   y = W_o concat_n(rmsnorm(o_n) * silu(x W_g)_n)

The prediction k^T S~ reads the decayed state. Decay clears the whole state at once, the delta rule one key; together
they do both. Source: Gated Delta Networks: Improving Mamba2 with Delta Rule (arXiv 2412.06464).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jattn.layers.delta import DeltaLayer, SoftplusDecay
from jattn.layers.sharding import axes
from jattn.mechanisms.entry import Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import normal, normals
from jattn.recurrence.delta import delta_recurrence


def gated_delta_rule(
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
    """The delta rule with a decay for each token and head.

    S~ = exp(g_t) S_{t-1}, S_t = S~ + beta_t k_t (v_t - k_t^T S~)^T, o_t = scale q_t^T S_t

    Args:
        query: `[B, T, N, D]`.
        key: `[B, T, K, D]`, of length 1; K divides the number of output heads, max(N, K').
        value: `[B, T, K', Dv]`; there may be more heads than of queries and keys, each of which then serves several.
        beta: `[B, T, H]`, how much of a key's content is replaced, 0 to 1, or to 2; H output heads or a divisor.
        log_decay: g <= 0, `[B, T, H]`.
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
        >>> gated_delta_rule(key, key, value, half, jnp.log(half)).ravel().tolist()
        [2.0, 0.5]

    Source: Gated Delta Networks: Improving Mamba2 with Delta Rule (arXiv 2412.06464).
    """
    if jnp.ndim(log_decay) != 3:
        raise ValueError(f"log_decay must be [B, T, heads], got {list(jnp.shape(log_decay))}; kda takes one a channel")
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


class GatedDeltaRule(DeltaLayer):
    """Gated DeltaNet's token mixer.

    S~ = exp(g_t) S_{t-1}, S_t = S~ + beta_t k_t (v_t - k_t^T S~)^T; g = -exp(A_log) softplus(x W_a + dt_bias);
    y = W_o concat_n(rmsnorm(D^-0.5 q_t^T S_t) * silu(x W_g)_n)

    Values, beta and decay have `num_v_heads` heads, each with a state of its own; v head h reads query and key head
    h // (num_v_heads / num_heads).

    Args:
        features: M, width of x and of the output.
        num_heads: N, heads of queries and keys.
        num_kv_heads: heads of keys, which divides N; N if not given.
        num_v_heads: a multiple of the heads of keys, which is what it is if not given.
        head_dim: D of queries and keys; if not given, the even number at or below 0.75 features / num_heads, as in the
            published sizes (256 for 2048 features and 6 heads).
        value_dim: Dv; 2 D if not given.
        conv_width: tokens that the convolutions see, the current one included.
        conv_bias: whether the convolutions have biases.
        allow_neg_eigval: beta = 2 sigmoid: eigenvalues of a step in [-1, 1] instead of [0, 1] (arXiv 2411.12537).
        use_gate: whether the heads are gated by silu(x W_g).
        epsilon: of the head norm.
        position: None, or an object with `rotate`, such as `Rope`, which turns the normalized queries and keys.
        chunk_size: tokens a chunk; no effect on the result.
        dtype: of the computation; that of inputs and parameters if not given.
        param_dtype: of the parameters; A_log and dt_bias are float32 at least.
        rngs: for the initial values.

    Raises:
        ValueError: sizes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> layer = GatedDeltaRule(16, 2, num_v_heads=4, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((1, 5, 16))).output.shape
        (1, 5, 16)

    Source: Gated Delta Networks: Improving Mamba2 with Delta Rule (arXiv 2412.06464), published code.
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
        conv_width: int = 4,
        conv_bias: bool = False,
        allow_neg_eigval: bool = False,
        use_gate: bool = True,
        epsilon: float = 1e-5,
        position: Any = None,
        chunk_size: int = 64,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        head_dim = max(features * 3 // (8 * num_heads) * 2, 2) if head_dim is None else head_dim
        super().__init__(
            features,
            num_heads,
            num_kv_heads=num_kv_heads,
            num_v_heads=num_v_heads,
            head_dim=head_dim,
            value_dim=2 * head_dim if value_dim is None else value_dim,
            gate="silu" if use_gate else None,
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
        self.rate = nnx.Linear(
            features,
            self.v_heads,
            use_bias=False,
            kernel_metadata=axes("embed", "kv_heads"),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.decay = SoftplusDecay(self.v_heads, lowest=0.0, param_dtype=param_dtype, rngs=rngs)

    def log_decay(self, x: jax.Array) -> jax.Array:
        """g `[B, T, H]`, float32 at least."""
        return self.decay(self.rate(x))


def _example(key, length):
    query, keys, value, beta, decay = normals(
        key, (2, length, 4, 8), (2, length, 2, 8), (2, length, 2, 6), (2, length, 4), (2, length, 2)
    )
    keys = keys / (keys**2).sum(-1, keepdims=True) ** 0.5
    return (query, keys, value, 1 / (1 + np.exp(-beta)), -abs(decay)), {"chunk_size": 4 if length < 64 else 64}


def _layer_example(key, length):
    options = {"num_v_heads": 4, "head_dim": 4, "conv_width": 3, "chunk_size": 4 if length < 64 else 64}
    return LayerExample((16, 2), options, (normal(key, 2, length, 16),), {})


_PAPER = Paper("Gated Delta Networks: Improving Mamba2 with Delta Rule", "2412.06464", 2024)

ENTRIES = (
    Entry(
        name="gated_delta_rule",
        kind="recurrence",
        family="linear",
        function=gated_delta_rule,
        papers=(_PAPER,),
        patterns=("causal self",),
        cost=Cost(flops="T", memory="T"),
        decode="its state [B, N, D, Dv]",
        example=_example,
        fidelity="official code",
    ),
    Entry(
        name="GatedDeltaRule",
        kind="recurrence",
        family="linear",
        layer=GatedDeltaRule,
        papers=(_PAPER,),
        patterns=("causal self",),
        cost=Cost(flops="T", memory="T"),
        decode="a RecurrentState: the state and the last inputs of the convolutions",
        example=_layer_example,
        fidelity="official code",
    ),
)
