"""State space duality, the recurrence of Mamba-2: a token chooses the length of its step, what it adds and forgets.

    S_t = exp(dt_t A_h) S_{t-1} + B_t (dt_t x_t)^T,   y_t = C_t^T S_t + D_h x_t

In the terms of the engine C is the query, B the key, x the value. The value that enters the state carries dt, the skip
D x does not. Layer, with z, xBC, dt = u W_in:

    xBC = silu(conv(xBC)),   dt = clip(softplus(dt + dt_bias)),   A = -exp(A_log)
    out = W_o rmsnorm_groups(y * silu(z))

The gate comes before the norm, which is over a group's share of all channels, and not over a head.
Source: Transformers are SSMs (arXiv 2405.21060).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.cache import RecurrentState
from jattn.layers.recurrent import RecurrentLayer
from jattn.layers.sharding import axes
from jattn.layers.short_conv import ShortConv
from jattn.layers.simple_rms_norm import simple_rms_norm
from jattn.mechanisms.entry import Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import normal, normals
from jattn.recurrence.api import linear_recurrence


def ssd(
    query: Any,
    key: Any,
    value: Any,
    time_step: Any,
    decay_rate: Any,
    skip: Any = None,
    *,
    scale: float | None = None,
    initial_state: Any = None,
    segment_ids: Any = None,
    mode: str = "chunk",
    implementation: str | None = None,
    chunk_size: int = 256,
    return_final_state: bool = False,
) -> Any:
    """The selective recurrence of Mamba-2.

    S_t = exp(dt_t A_h) S_{t-1} + B_t (dt_t x_t)^T, y_t = scale C_t^T S_t + D_h x_t

    Args:
        query: C, `[B, T, G, D]`; head h reads group h // (N / G), here and below. D is the size of Mamba's state.
        key: B, `[B, T, G', D]`.
        value: x, `[B, T, N, Dv]`, as it is: dt multiplies it inside.
        time_step: dt >= 0, `[B, T, N]`, after softplus and clipping.
        decay_rate: A <= 0, `[N]`.
        skip: D, `[N]`, what a token adds of its own x; nothing if None.
        scale: of the queries, 1 if None.
        initial_state: `[B, N, D, Dv]`, what earlier tokens left behind.
        segment_ids: `[B, T]`; a run of equal ids is a document, negative = padding.
        mode: of `jattn.linear_recurrence`.
        implementation: likewise.
        chunk_size: tokens a chunk; no effect on the result.
        return_final_state: also return the state after the last token.

    Returns:
        `[B, T, N, Dv]` in the query's dtype; with `return_final_state` also the state, float32 `[B, N, D, Dv]` (the
        transpose of the published code's).

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> one = jnp.ones((1, 3, 1, 1))
        >>> y = ssd(one, one, one, one[..., 0], -jnp.log(2.0) * jnp.ones(1))
        >>> [round(x, 4) for x in y.ravel().tolist()]
        [1.0, 1.5, 1.75]

    Source: Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality
    (arXiv 2405.21060).
    """
    query, value, time_step, decay_rate = (jnp.asarray(x) for x in (query, value, time_step, decay_rate))
    if query.ndim != 4 or value.ndim != 4:
        raise ValueError(f"query and value must be [B, T, heads, size], got {list(query.shape)}, {list(value.shape)}")
    batch, length, heads, _ = value.shape
    if time_step.shape != (batch, length, heads):
        raise ValueError(f"time_step must be [B, T, N] = {[batch, length, heads]}, got {list(time_step.shape)}")
    if heads % query.shape[2]:
        raise ValueError(f"the heads of query must divide {heads}, those of value, got {query.shape[2]}")
    for name, x in (("decay_rate", decay_rate), ("skip", skip)):
        if x is not None and jnp.shape(x) != (heads,):
            raise ValueError(f"{name} must be [N] = [{heads}], got {list(jnp.shape(x))}")
    wide = jnp.promote_types(query.dtype, jnp.float32)
    step, x = time_step.astype(wide), value.astype(wide)
    if segment_ids is not None:
        real = jnp.asarray(segment_ids) >= 0
        step, x = jnp.where(real[..., None], step, 0), jnp.where(real[..., None, None], x, 0)
    o, state = linear_recurrence(
        query.astype(wide),
        key,
        step[..., None] * x,
        log_decay=step * decay_rate.astype(wide),
        scale=1.0 if scale is None else scale,
        initial_state=initial_state,
        segment_ids=segment_ids,
        mode=mode,
        implementation=implementation,
        chunk_size=chunk_size,
        return_final_state=True,
    )
    if skip is not None:
        o = o + jnp.asarray(skip, wide)[:, None] * x
    o = o.astype(query.dtype)
    return (o, state) if return_final_state else o


class Ssd(RecurrentLayer):
    """The mixer of Mamba-2: short convolution, selective recurrence, gated norm.

    out = W_o rmsnorm_groups(ssd(C, B, x, dt, A, D) * silu(z)), [x, B, C] = silu(conv(u W))

    Args:
        features: M, width of the input and of the output.
        num_heads: N.
        num_kv_heads: N or None; what heads share are groups.
        head_dim: Dv, channels of a head of x; expand * features / num_heads if not given. N * Dv is the inner width.
        state_dim: D, of B and C.
        num_groups: G, which divides N: groups of heads that share B and C.
        expand: inner width over features where head_dim is not given.
        conv_width: W, tokens that the convolution sees.
        dt_limit: least and largest time step.
        dt_range: initial time steps are between these, uniform in their logarithm.
        epsilon: of the norm.
        position: None, or an object with `rotate`, applied to C and B; Mamba-2 has none.
        chunk_size: tokens a chunk; no effect on the result.
        dtype: of the computation; that of inputs and parameters if not given.
        param_dtype: of the parameters.
        rngs: for the initial values: A in -U(1, 16), D 1.

    Raises:
        ValueError: sizes or limits that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> Ssd(16, 4, state_dim=8, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 16))).output.shape
        (1, 5, 16)

    Source: Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality
    (arXiv 2405.21060); published code.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        state_dim: int = 128,
        num_groups: int = 1,
        expand: int = 2,
        conv_width: int = 4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        dt_range: tuple[float, float] = (1e-3, 1e-1),
        epsilon: float = 1e-5,
        position: Any = None,
        chunk_size: int = 256,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(features, num_heads, position=position)
        if num_kv_heads not in (None, num_heads):
            raise ValueError(
                f"num_kv_heads must be num_heads = {num_heads} or None, got {num_kv_heads}: see num_groups"
            )
        if num_groups < 1 or num_heads % num_groups:
            raise ValueError(f"num_groups must divide num_heads, got {num_groups} and {num_heads}")
        if head_dim is None and expand * features % num_heads:
            width = expand * features
            raise ValueError(f"num_heads must divide expand * features unless head_dim is given: {num_heads}, {width}")
        if not 0 <= dt_limit[0] <= dt_limit[1]:
            raise ValueError(f"dt_limit must be two numbers >= 0, the smaller one first, got {dt_limit}")
        if not 0 < dt_range[0] <= dt_range[1] < math.inf:
            raise ValueError(f"dt_range must be two finite numbers > 0, the smaller one first, got {dt_range}")
        head_dim = expand * features // num_heads if head_dim is None else head_dim
        inner, shared_width = num_heads * head_dim, num_groups * state_dim
        self.widths = (inner, inner + shared_width)
        self.num_groups, self.dt_limit, self.epsilon = num_groups, dt_limit, epsilon
        self.chunk_size, self.dtype = chunk_size, dtype
        shared: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        def linear(source: int, target: int, *names: str | None) -> nnx.Linear:
            return nnx.Linear(source, target, use_bias=False, kernel_metadata=axes(*names), **shared)

        self.gate = linear(features, inner, "embed", "heads")
        self.inputs = linear(features, inner + 2 * shared_width, "embed", None)
        self.steps = linear(features, num_heads, "embed", "heads")
        self.conv = ShortConv(inner + 2 * shared_width, conv_width, use_bias=True, activation="silu", **shared)
        low, high = (math.log(x) for x in dt_range)
        wide = jnp.promote_types(param_dtype, jnp.float32)
        step = jnp.exp(low + (high - low) * jax.random.uniform(rngs.params(), (num_heads,), wide))
        # The inverse of softplus, without the cancellation of log(exp(step) - 1).
        self.step_bias = nnx.Param((step + jnp.log(-jnp.expm1(-step))).astype(param_dtype), **axes("heads"))
        rates = jax.random.uniform(rngs.params(), (num_heads,), wide, 1.0, 16.0)
        self.log_rate = nnx.Param(jnp.log(rates).astype(param_dtype), **axes("heads"))
        self.skip = nnx.Param(jnp.ones((num_heads,), param_dtype), **axes("heads"))
        self.norm_scale = nnx.Param(jnp.ones((inner,), param_dtype), **axes("heads"))
        self.out = linear(inner, features, "heads", "embed")

    def time_step(self, x: jax.Array) -> jax.Array:
        """Dt `[B, T, N]`, float32 at least."""
        logits = self.steps(x)
        wide = jnp.promote_types(logits.dtype, jnp.float32)
        steps = jax.nn.softplus(logits.astype(wide) + self.step_bias.get_value().astype(wide))
        return jnp.clip(steps, *self.dt_limit)

    def mix(
        self, x: jax.Array, *, segment_ids: Any, positions: jax.Array, state: RecurrentState | None, **options: Any
    ) -> tuple[jax.Array, RecurrentState, dict[str, Any]]:
        """See `RecurrentLayer`."""
        mixed, tail = self.conv(self.inputs(x), segment_ids=segment_ids, cache=None if state is None else state.conv)[
            :2
        ]
        values, keys, queries = jnp.split(mixed, self.widths, axis=-1)
        groups = (*x.shape[:2], self.num_groups, -1)
        query, key = self.rotated(queries.reshape(groups), keys.reshape(groups), positions)
        step = self.time_step(x)
        log_rate = self.log_rate.get_value()
        o, last = ssd(
            query,
            key,
            values.reshape(*x.shape[:2], self.num_heads, -1),
            step,
            -jnp.exp(log_rate.astype(step.dtype)),
            self.skip.get_value(),
            initial_state=None if state is None else state.state,
            segment_ids=segment_ids,
            chunk_size=self.chunk_size,
            return_final_state=True,
        )
        return o, RecurrentState(last, conv=tail), {}

    def output(self, o: jax.Array, x: jax.Array) -> jax.Array:
        """See `RecurrentLayer`."""
        wide, flat = jnp.promote_types(o.dtype, jnp.float32), (*o.shape[:2], -1)
        gated = o.reshape(flat).astype(wide) * jax.nn.silu(self.gate(x).astype(wide))
        normed = simple_rms_norm(gated.reshape(*flat[:2], self.num_groups, -1), self.epsilon).reshape(flat)
        return self.out((normed * self.norm_scale.get_value().astype(wide)).astype(o.dtype))


def _example(key, length):
    shapes = ((2, length, 4, 8), (2, length, 2, 8), (2, length, 4, 6), (2, length, 4), (4,), (4,))
    query, keys, value, step, rate, skip = normals(key, *shapes)
    return (query, keys, value, abs(step), -abs(rate), skip), {"chunk_size": 4 if length < 64 else 64}


def _layer_example(key, length):
    options = {"state_dim": 6, "num_groups": 2, "chunk_size": 4 if length < 64 else 64}
    return LayerExample((16, 4), options, (normal(key, 2, length, 16),), {})


_PAPER = Paper(
    "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
    "2405.21060",
    2024,
)

ENTRIES = (
    Entry(
        name="ssd",
        kind="recurrence",
        family="linear",
        function=ssd,
        papers=(_PAPER,),
        patterns=("causal self",),
        cost=Cost(flops="T", memory="T"),
        decode="its state [B, N, D, Dv]",
        example=_example,
        fidelity="official code",
    ),
    Entry(
        name="Ssd",
        kind="recurrence",
        family="linear",
        layer=Ssd,
        papers=(_PAPER,),
        patterns=("causal self",),
        cost=Cost(flops="T", memory="T"),
        decode="a RecurrentState with the last inputs of the convolution",
        example=_layer_example,
        fidelity="official code",
    ),
)
