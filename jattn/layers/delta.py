"""What layers around the delta rule share: convolved and normalized queries, keys and values, the strength of writing.

    q, k = l2norm(silu(conv(x W_q))), l2norm(silu(conv(x W_k))),   v = silu(conv(x W_v)),   beta = sigmoid(x W_beta)
    S~ = Diag(exp g_t) S_{t-1},   S_t = S~ + beta_t k_t (v_t - k_t^T S~)^T,   o_t = D^-0.5 q_t^T S_t
    y = W_o concat_n(rmsnorm(o_n) [* act(gate(x))_n])

A subclass says what the decay g is. The last inputs of the convolutions are kept beside the state for decoding.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.cache import RecurrentState
from jattn.layers.norms import l2_normalize
from jattn.layers.recurrent import GatedOutput, HeadProjection, RecurrentLayer
from jattn.layers.sharding import axes
from jattn.layers.short_conv import ShortConv
from jattn.recurrence.delta import delta_recurrence
from jattn.recurrence.feature_maps import elu1

QK_NORMS = ("l2", "sum")
EPSILON = 1e-6
"""Inside the root of the l2 norm, and the least sum that features are divided by."""


class DeltaLayer(RecurrentLayer):
    """Base of layers around the delta rule; without decay it is the plain one.

    Args:
        features: M, width of x and of the output.
        num_heads: N, heads of queries.
        num_kv_heads: K, heads of keys, which divides N; N if not given.
        num_v_heads: heads of values, beta and the state, a multiple of K; K if not given. The output has as many as
            queries or values, whichever are more.
        head_dim: D of queries and keys.
        value_dim: Dv.
        conv_width: tokens that the convolutions see, the current one included.
        conv_bias: whether the convolutions have biases.
        qk_norm: "l2": silu, then vectors of length 1; "sum": elu + 1, then features that add up to 1.
        allow_neg_eigval: beta up to 2 instead of 1, so that a key's content can be negated.
        gate: of the output, "silu", "sigmoid" or None.
        gate_rank: waist of the gate's projection, full rank if None.
        epsilon: of the head norm.
        position: None, or an object with `rotate`.
        chunk_size: tokens a chunk; no effect on the result.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: for the initial values.

    Raises:
        ValueError: sizes that do not fit, an unknown norm.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        num_kv_heads: int | None,
        num_v_heads: int | None = None,
        head_dim: int,
        value_dim: int,
        conv_width: int,
        conv_bias: bool,
        qk_norm: str = "l2",
        allow_neg_eigval: bool,
        gate: str | None,
        gate_rank: int | None = None,
        epsilon: float | int,
        position: Any,
        chunk_size: int,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        super().__init__(features, num_heads, position=position)
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        v_heads = kv_heads if num_v_heads is None else num_v_heads
        outputs = max(num_heads, v_heads)
        if min(num_heads, kv_heads, v_heads) < 1 or num_heads % kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads, got {kv_heads} and {num_heads}")
        if v_heads % kv_heads or outputs % num_heads or outputs % v_heads:
            raise ValueError(
                f"num_v_heads must be a multiple of the {kv_heads} heads of keys, and divide or be divided by the "
                f"{num_heads} of queries; got {v_heads}"
            )
        if min(head_dim, value_dim) < 1:
            raise ValueError(f"head_dim and value_dim must be at least 1, got {head_dim} and {value_dim}")
        if qk_norm not in QK_NORMS:
            raise ValueError(f"qk_norm must be one of {', '.join(QK_NORMS)}, got {qk_norm!r}")
        self.kv_heads, self.v_heads, self.head_dim = kv_heads, v_heads, head_dim
        self.qk_norm, self.allow_neg_eigval = qk_norm, allow_neg_eigval
        self.dtype, self.chunk_size = dtype, chunk_size
        shared: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        conv = {"width": conv_width, "use_bias": conv_bias, **shared}
        activation = "silu" if qk_norm == "l2" else None
        self.query = ConvolvedHeads(features, num_heads, head_dim, activation=activation, **conv)
        self.key = ConvolvedHeads(features, kv_heads, head_dim, axis="kv_heads", activation=activation, **conv)
        self.value = ConvolvedHeads(features, v_heads, value_dim, axis="kv_heads", activation="silu", **conv)
        self.beta = nnx.Linear(features, v_heads, use_bias=False, kernel_metadata=axes("embed", "kv_heads"), **shared)
        self.out = GatedOutput(features, outputs, value_dim, gate=gate, gate_rank=gate_rank, epsilon=epsilon, **shared)

    def log_decay(self, x: jax.Array) -> jax.Array | None:
        """g `[B, T, H]` or `[B, T, H, D]` of the input `[B, T, M]`, float32 at least; None for no decay."""
        return None

    def strength(self, x: jax.Array) -> jax.Array:
        """Beta `[B, T, H]`, float32 at least."""
        beta = jax.nn.sigmoid(widened(self.beta(x)))
        return 2 * beta if self.allow_neg_eigval else beta

    def normalized(self, x: jax.Array) -> jax.Array:
        """Queries or keys `[..., D]` as the recurrence wants them."""
        if self.qk_norm == "l2":
            return l2_normalize(x, epsilon=EPSILON, rule="inside")
        positive = elu1(widened(x))
        return (positive / jnp.maximum(positive.sum(-1, keepdims=True), EPSILON)).astype(x.dtype)

    def mix(
        self, x: jax.Array, *, segment_ids: Any, positions: jax.Array, state: RecurrentState | None, **options: Any
    ) -> tuple[jax.Array, RecurrentState, dict[str, Any]]:
        """See `RecurrentLayer`."""
        before: dict[str, Any] = {} if state is None else state.conv
        found, tails = {}, {}
        for name in ("query", "key", "value"):
            found[name], tails[name] = getattr(self, name)(x, segment_ids, before.get(name))
        query, key = self.rotated(self.normalized(found["query"]), self.normalized(found["key"]), positions)
        o, last = delta_recurrence(
            query,
            key,
            found["value"],
            self.strength(x),
            self.log_decay(x),
            initial_state=None if state is None else state.state,
            segment_ids=segment_ids,
            chunk_size=self.chunk_size,
            return_final_state=True,
        )
        return o, RecurrentState(last, conv=tails), {}

    def output(self, o: jax.Array, x: jax.Array) -> jax.Array:
        """See `RecurrentLayer`."""
        return self.out(o, x)


class ConvolvedHeads(HeadProjection):
    """A projection to heads behind which every channel has a short convolution: act(conv(x W)).

    Args:
        features: M.
        heads: number of heads.
        head_dim: width of a head.
        width: tokens that the convolution sees, the current one included.
        use_bias: whether the convolution has a bias.
        activation: "silu" or None.
        axis: logical name of the axis of heads, for sharding.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: for the initial values.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        head_dim: int,
        *,
        width: int,
        use_bias: bool = False,
        activation: str | None = "silu",
        axis: str = "heads",
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shared: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        super().__init__(features, heads, head_dim, axis=axis, **shared)
        self.conv = ShortConv(heads * head_dim, width, use_bias=use_bias, activation=activation, **shared)

    def __call__(self, x: jax.Array, segment_ids: Any = None, tail: Any = None) -> tuple[jax.Array, jax.Array]:
        """`[B, T, M]` and the tail of earlier tokens to `[B, T, heads, head_dim]` and the new tail."""
        heads = super().__call__(x)
        done = self.conv(heads.reshape(*heads.shape[:2], -1), segment_ids=segment_ids, cache=tail)
        return done.output.reshape(heads.shape), done.cache


class SoftplusDecay(nnx.Module):
    """Log decays as Mamba-2 and Gated DeltaNet have them: g = -exp(A_log) softplus(logits + dt_bias) <= 0.

    A is drawn uniformly and dt_bias so that softplus(dt_bias) is log-uniform in [1e-3, 1e-1]. Both are kept as vectors
    in float32 at least; weight decay, which would pull every head to the same rate, leaves vectors alone.

    Args:
        heads: H.
        channels: D, decays a head; None for one.
        lowest: least initial A.
        highest: largest initial A.
        param_dtype: of the parameters, where it is wider than float32.
        rngs: for the initial values.
    """

    def __init__(
        self,
        heads: int,
        channels: int | None = None,
        *,
        lowest: float | int,
        highest: float | int = 16.0,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        dtype = jnp.promote_types(param_dtype, jnp.float32)
        self.shape = (heads,) if channels is None else (heads, channels)
        rates = jax.random.uniform(rngs.params(), (heads,), dtype, lowest, highest)
        # A draw may be 0, of which there is no logarithm.
        self.A_log = nnx.Param(jnp.log(jnp.maximum(rates, jnp.finfo(dtype).tiny)), **axes("kv_heads"))
        steps = jax.random.uniform(rngs.params(), (math.prod(self.shape),), dtype, math.log(1e-3), math.log(1e-1))
        steps = jnp.maximum(jnp.exp(steps), 1e-4)
        self.dt_bias = nnx.Param(steps + jnp.log(-jnp.expm1(-steps)), **axes("kv_heads"))

    def __call__(self, logits: jax.Array) -> jax.Array:
        """Logits `[B, T, H]` or `[B, T, H * D]` to log decays `[B, T, H]` or `[B, T, H, D]`, float32 at least."""
        rates = jnp.exp(self.A_log.get_value())
        steps = jax.nn.softplus(widened(logits) + self.dt_bias.get_value()).reshape(*logits.shape[:2], *self.shape)
        return -steps * (rates if len(self.shape) == 1 else rates[:, None])


def widened(x: jax.Array) -> jax.Array:
    """An array in float32 at least, as gates are computed."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
