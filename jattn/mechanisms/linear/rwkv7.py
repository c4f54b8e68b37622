"""RWKV-7 time mixing: every key channel decays, and the state is reduced along one key and written along another.

    S_t = Diag(exp g_t) S_{t-1} - (kk_t * a_t) (kk_t^T S_{t-1}) + k_t v_t^T,   o_t = r_t^T S_t

    x_* = x + (x_{t-1} - x) mu_*                                              for * in r, w, k, v, a, g (layer)
    r, k, v = x_r W_r, x_k W_k, x_v W_v;   g = -e^-0.5 sigmoid(w_0 + tanh(x_w W_1) W_2)
    a = sigmoid(a_0 + x_a A_1 A_2)
    v = v + (v_first - v) sigmoid(v_0 + x_v V_1 V_2)                          not in the first layer
    kk = l2norm(k * k_k);   k = k * (1 + (a - 1) * k_a)
    o = groupnorm(o) + (sum_d r k r_k) v;   y = W_o (o * (sigmoid(x_g G_1) G_2))

The delta rule is the case g = 0, a = 1, kk = k of length 1. What is removed is read from the undecayed state. Source:
RWKV-7 "Goose" with Expressive Dynamic State Evolution (arXiv 2503.14456) and its published code.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jattn.cache import RecurrentState
from jattn.layers.norms import l2_normalize
from jattn.layers.recurrent import HeadProjection, LowRank, RecurrentLayer
from jattn.layers.sharding import axes
from jattn.layers.short_conv import causal_short_conv
from jattn.mechanisms.entry import Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import normal, normals
from jattn.recurrence.api import linear_recurrence
from jattn.recurrence.delta import check_gates, check_heads, repeated
from jattn.recurrence.segments import without_padding

MIXES = {"query": 0.2, "decay": 0.9, "key": 0.7, "value": 0.7, "rate": 0.9, "gate": 0.2}
"""What is computed from a mix of a token and the one before, and the exponent of the initial mix."""


def rwkv7(
    query: Any,
    key: Any,
    value: Any,
    removal_key: Any,
    rate: Any,
    log_decay: Any,
    *,
    scale: float = 1.0,
    initial_state: Any = None,
    segment_ids: Any = None,
    mode: str = "chunk",
    implementation: str | None = None,
    chunk_size: int = 64,
    return_final_state: bool = False,
) -> Any:
    """The recurrence of RWKV-7.

    S_t = Diag(exp g_t) S_{t-1} - (kk_t * a_t) (kk_t^T S_{t-1}) + k_t v_t^T, o_t = scale r_t^T S_t

    Args:
        query: r, `[B, T, N, D]`.
        key: k, `[B, T, K, D]`, what is written; K divides N.
        value: `[B, T, K, Dv]`.
        removal_key: kk, `[B, T, K, D]` of length 1, along which the state is read and reduced.
        rate: a, `[B, T, K, D]` in [0, 1], how much of it a channel loses.
        log_decay: g <= 0, `[B, T, K, D]`.
        scale: of r; 1, as the paper has it.
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
        >>> one = jnp.ones((1, 2, 1, 1))
        >>> value = jnp.array([4.0, 8.0]).reshape(1, 2, 1, 1)
        >>> rwkv7(one, one, value, one, 0.5 * one, 0 * one).ravel().tolist()
        [4.0, 10.0]

    Source: RWKV-7 "Goose" with Expressive Dynamic State Evolution (arXiv 2503.14456).
    """
    query, key, value = (check_heads(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
    rows, heads, width = query.shape[:2], max(query.shape[2], value.shape[2]), query.shape[3:]
    removal_key = check_gates("removal_key", removal_key, rows, heads, width)
    rate = check_gates("rate", rate, rows, heads, width)
    log_decay = check_gates("log_decay", log_decay, rows, heads, width)
    removal_key, rate = without_padding(segment_ids, removal_key, rate)
    together = math.lcm(removal_key.shape[2], rate.shape[2])
    wide = jnp.promote_types(query.dtype, jnp.float32)
    removed = repeated(removal_key, together).astype(wide)
    return linear_recurrence(
        query,
        key,
        value,
        log_decay=log_decay,
        a=-removed,
        b=removed * repeated(rate, together).astype(wide),
        scale=scale,
        initial_state=initial_state,
        segment_ids=segment_ids,
        mode=mode,
        implementation=implementation,
        chunk_size=chunk_size,
        return_final_state=return_final_state,
    )


class Rwkv7(RecurrentLayer):
    """RWKV-7's time mixing, with token shift, low-rank gates, value residual, head norm, bonus and output gate.

    S_t = Diag(exp g_t) S_{t-1} - (kk_t * a_t) (kk_t^T S_{t-1}) + k_t v_t^T;
    y = W_o ((groupnorm(r_t^T S_t) + (sum_d r k r_k) v) * gate)

    Layers after the first mix the values of the first layer into their own. A layer alone is a first one: it takes
    nothing beside x. In a stack, layer 0 of `num_layers` > 1 returns its values as `aux["v_first"]`, and every later
    one wants them as the argument `v_first` of its call, with a cache too, since they belong to the tokens of the call:

        first = layers[0](x);   y = layers[1](x1, v_first=first.aux["v_first"])

    `jattn.models` number the layers and hand the values on, unless layers share their weights.

    Args:
        features: M, width of x and of the output.
        num_heads: N.
        num_kv_heads: N or not given; every head has its own key and value.
        head_dim: D; features / num_heads if not given.
        layer: number of the layer among those of its kind, from 0: where initial values start, and whether `v_first`
            is wanted.
        num_layers: how many these are.
        decay_rank: waist of the network of g; if not given, 2.5 M^0.5 in multiples of 32, at least 32, as published.
        rate_rank: that of a; likewise.
        value_rank: that of the value residual; 1.7 M^0.5 likewise.
        gate_rank: that of the gate; 5 M^0.5 likewise.
        epsilon: of the head norm, times D.
        position: None, or an object with `rotate`, such as `Rope`, which turns r, k and kk. RWKV-7 itself has none, and
            where two channels of a pair decay differently, more than distances counts.
        chunk_size: tokens a chunk; no effect on the result.
        dtype: of the computation; that of inputs and parameters if not given.
        param_dtype: of the parameters.
        rngs: for the initial values.

    Raises:
        ValueError: sizes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> Rwkv7(16, 2, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 16))).output.shape
        (1, 5, 16)

    Source: RWKV-7 "Goose" with Expressive Dynamic State Evolution (arXiv 2503.14456), published code.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        layer: int = 0,
        num_layers: int = 1,
        decay_rank: int | None = None,
        rate_rank: int | None = None,
        value_rank: int | None = None,
        gate_rank: int | None = None,
        epsilon: float = 1e-5,
        position: Any = None,
        chunk_size: int = 64,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(features, num_heads, position=position)
        if num_kv_heads not in (None, num_heads):
            raise ValueError(f"num_kv_heads must be num_heads = {num_heads} or None, got {num_kv_heads}")
        if head_dim is None and features % num_heads:
            raise ValueError(f"num_heads must divide features unless head_dim is given, got {num_heads}, {features}")
        if not 0 <= layer < num_layers:
            raise ValueError(f"layer must be in 0 .. num_layers - 1, got {layer} of {num_layers}")
        head_dim = features // num_heads if head_dim is None else head_dim
        self.head_dim, self.dtype, self.chunk_size = head_dim, dtype, chunk_size
        self.epsilon = head_dim * epsilon
        self.hands_on = ("v_first",) if layer == 0 and num_layers > 1 else ()
        self.beside = ("v_first",) if layer else ()
        wide, start = num_heads * head_dim, _Start(features, num_heads, head_dim, layer, num_layers)
        shared: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        def vector(values: Any, name: str = "heads") -> nnx.Param:
            return nnx.Param(jnp.asarray(values, param_dtype), **axes(name))

        def projection(size: float) -> HeadProjection:
            made = HeadProjection(features, num_heads, head_dim, **shared)
            bound = size / features**0.5
            made.kernel[...] = jax.random.uniform(rngs.params(), made.kernel.shape, param_dtype, -bound, bound)
            return made

        def network(rank: int | None, factor: float, bias: Any, activation: Any = None) -> LowRank:
            rank = max(32, round(factor * features**0.5 / 32) * 32) if rank is None else rank
            made = LowRank(features, rank, wide, activation=activation, use_bias=bias is not None, **shared)
            made.down.kernel[...] = jnp.zeros_like(made.down.kernel[...])
            # Only float32 and wider have a QR decomposition.
            up = nnx.initializers.orthogonal(0.1 * max(1.0, (rank / wide) ** 0.5))
            made.up.kernel[...] = up(rngs.params(), (rank, wide), jnp.float32).astype(param_dtype)
            if bias is not None:
                made.up.bias[...] = jnp.asarray(bias, param_dtype)
            return made

        for name in MIXES:
            setattr(self, f"mix_{name}", vector(start.mix(name), "embed"))
        self.query, self.key, self.value = projection(0.5), projection(0.05), projection(0.5)
        self.decay = network(decay_rank, 2.5, start.decay, jnp.tanh)
        self.rate = network(rate_rank, 2.5, start.rate)
        self.residual = network(value_rank, 1.7, start.residual) if layer else None
        self.gate = network(gate_rank, 5.0, None, jax.nn.sigmoid)
        self.removal_scale, self.rate_scale = vector(start.removal_scale), vector(np.full(wide, 1.02))
        self.bonus = vector(np.full(wide, -0.04))
        self.norm_scale, self.norm_bias = vector(np.full(wide, start.norm_scale)), vector(np.zeros(wide))
        self.out = nnx.LinearGeneral(
            (num_heads, head_dim),
            features,
            axis=(-2, -1),
            use_bias=False,
            kernel_init=nnx.initializers.zeros,
            kernel_metadata=axes("heads", "head_dim", "embed"),
            **shared,
        )

    def mix(
        self,
        x: jax.Array,
        *,
        segment_ids: Any,
        positions: jax.Array,
        state: RecurrentState | None,
        v_first: Any = None,
        **options: Any,
    ) -> tuple[jax.Array, RecurrentState, dict[str, Any]]:
        """See `RecurrentLayer`; the per-head outputs are normed and gated already."""
        x = x.astype(self.dtype or jnp.promote_types(x.dtype, self.bonus.get_value().dtype))
        wide = jnp.promote_types(x.dtype, jnp.float32)
        look_back = jnp.broadcast_to(jnp.array([[1], [0]], x.dtype), (2, x.shape[-1]))
        tail = None if state is None else state.conv
        before, tail = causal_short_conv(x, look_back, segment_ids=segment_ids, tail=tail)

        def mixed(name: str) -> jax.Array:
            return x + (before - x) * getattr(self, f"mix_{name}").get_value().astype(x.dtype)

        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(*x.shape[:2], self.num_heads, self.head_dim).astype(wide)

        def of_heads(parameter: nnx.Param) -> jax.Array:
            return parameter.get_value().reshape(self.num_heads, self.head_dim).astype(wide)

        query, key = self.query(mixed("query")), self.key(mixed("key")).astype(wide)
        own = value = self.value(mixed("value"))
        if self.residual is not None and v_first is not None:
            if v_first.shape != value.shape:
                raise ValueError(f"v_first must be {list(value.shape)}, got {list(v_first.shape)}")
            share = jax.nn.sigmoid(heads(self.residual(mixed("value"))))
            value = (value + (v_first - value) * share).astype(value.dtype)
        log_decay = -math.exp(-0.5) * jax.nn.sigmoid(heads(self.decay(mixed("decay"))))
        rate = jax.nn.sigmoid(heads(self.rate(mixed("rate"))))
        removal_key = l2_normalize(key * of_heads(self.removal_scale))
        key = key * (1 + (rate - 1) * of_heads(self.rate_scale))
        turned, keys = self.rotated(query, jnp.concatenate([key, removal_key], 2), positions)
        o, last = rwkv7(
            turned,
            keys[:, :, : self.num_heads],
            value,
            keys[:, :, self.num_heads :],
            rate,
            log_decay,
            initial_state=None if state is None else state.state,
            segment_ids=segment_ids,
            chunk_size=self.chunk_size,
            return_final_state=True,
        )
        o = o.astype(wide) - o.astype(wide).mean(-1, keepdims=True)
        o = o * jax.lax.rsqrt((o * o).mean(-1, keepdims=True) + self.epsilon)
        o = o * of_heads(self.norm_scale) + of_heads(self.norm_bias)
        o = o + (query * key * of_heads(self.bonus)).sum(-1, keepdims=True) * value
        o = (o * heads(self.gate(mixed("gate")))).astype(x.dtype)
        return o, RecurrentState(last, conv=tail), {"v_first": own} if self.hands_on else {}

    def output(self, o: jax.Array, x: jax.Array) -> jax.Array:
        """See `RecurrentLayer`."""
        return self.out(o)


class _Start:
    """Initial values as in the published code, functions of the channel and of the depth of the layer."""

    def __init__(self, features: int, num_heads: int, head_dim: int, layer: int, num_layers: int):
        wide = num_heads * head_dim
        depth = layer / max(num_layers - 1, 1)
        along = np.arange(wide) / max(wide - 1, 1)
        across = 2 * (np.arange(wide) % head_dim) / max(head_dim - 1, 1) - 1 if head_dim > 1 else np.zeros(wide)
        zigzag = across * np.abs(across)
        self._places, self._left = np.arange(features) / features, 1 - layer / num_layers
        self.decay = -6 + 6 * along ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag
        self.rate = -0.19 + 0.3 * zigzag + 0.4 * (along - 0.5)
        self.residual = 0.73 - 0.4 * (along - 0.5)
        self.removal_scale = 0.71 - 0.1 * (along - 0.5)
        self.norm_scale = ((1 + layer) / num_layers) ** 0.7

    def mix(self, name: str) -> np.ndarray:
        """Share of the token before, a channel."""
        return 1 - self._places ** (MIXES[name] * self._left)


def _example(key, length):
    query, keys, removal, *gates = normals(key, *((2, length, 2, 8),) * 5)
    value = normal(key, 2, length, 2, 6)
    removal = removal / (removal**2).sum(-1, keepdims=True) ** 0.5
    rate, decay = (1 / (1 + np.exp(-x)) for x in gates)
    return (query, keys, value, removal, rate, -0.6 * decay), {"chunk_size": 4 if length < 64 else 64}


def _layer_example(key, length):
    ranks = {f"{name}_rank": 2 for name in ("decay", "rate", "gate")}
    return LayerExample((16, 2), {**ranks, "chunk_size": 4 if length < 64 else 64}, (normal(key, 2, length, 16),), {})


_PAPER = Paper('RWKV-7 "Goose" with Expressive Dynamic State Evolution', "2503.14456", 2025)

ENTRIES = (
    Entry(
        name="rwkv7",
        kind="recurrence",
        family="linear",
        function=rwkv7,
        papers=(_PAPER,),
        patterns=("causal self",),
        cost=Cost(flops="T", memory="T"),
        decode="its state [B, N, D, Dv]",
        example=_example,
        fidelity="official code",
    ),
    Entry(
        name="Rwkv7",
        kind="recurrence",
        family="linear",
        layer=Rwkv7,
        papers=(_PAPER,),
        patterns=("causal self",),
        cost=Cost(flops="T", memory="T"),
        decode="a RecurrentState: the state and the last token",
        example=_layer_example,
        fidelity="official code",
    ),
)
