"""Retention: linear attention in which every head forgets at a fixed rate of its own.

    S_t = gamma_h S_{t-1} + k_t v_t^T,   o_t = D^-0.5 q_t^T S_t,   gamma_h = 1 - 2^(-5 - h), h = 0 .. N-1
    y = W_o concat_n(rmsnorm(o_n) * silu(x W_g)_n),   q and k rotated by their positions          (layer)

Head 0 forgets fastest. The paper also divides rows, which the norm of each head undoes. `paper_norms=True` does so:

    D_ij = gamma^(i-j) / sqrt(sum_j gamma^(i-j)),   R_ij = D^-0.5 q_i.k_j D_ij
    o_i = sum_j R_ij v_j / max(|sum_j R_ij|, 1)

with no gradient through the last divisor. Both sums are recurrences themselves, so every mode computes them, and so
does decoding. Source: Retentive Network: A Successor to Transformer for Large Language Models (arXiv 2307.08621).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.cache import RecurrentState
from jattn.layers.recurrent import GatedOutput, HeadProjection, RecurrentLayer
from jattn.layers.rope import Rope
from jattn.mechanisms.entry import Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import attention_inputs, normal
from jattn.recurrence.api import linear_recurrence
from jattn.recurrence.decay_schedules import retention_log_decay


def retention(
    query: Any,
    key: Any,
    value: Any,
    *,
    is_causal: bool = True,
    log_decay: Any = None,
    paper_norms: bool = False,
    scale: float | None = None,
    initial_state: Any = None,
    segment_ids: Any = None,
    mode: str = "chunk",
    implementation: str | None = None,
    chunk_size: int = 64,
    return_final_state: bool = False,
) -> Any:
    """Causal linear attention with a constant decay for each head.

    S_t = gamma_h S_{t-1} + k_t v_t^T, o_t = scale q_t^T S_t

    Args:
        query: `[B, T, N, D]`.
        key: `[B, T, K, D]`; K divides N.
        value: `[B, T, K, Dv]`.
        is_causal: True; a recurrence knows nothing else.
        log_decay: log gamma `[N]`, <= 0; log(1 - 2^(-5 - h)) if None.
        paper_norms: divide rows as the paper does, see the module; a norm of each head makes it superfluous.
        scale: of the queries, D^-0.5 if None.
        initial_state: what earlier tokens left behind, of the form that `return_final_state` gives.
        segment_ids: `[B, T]`; a run of equal ids is a document, negative = padding.
        mode: of `jattn.linear_recurrence`; all of them compute `paper_norms`, too.
        implementation: likewise.
        chunk_size: tokens a chunk; no effect on the result.
        return_final_state: also return the state after the last token.

    Returns:
        `[B, T, N, Dv]`; with `return_final_state` also the state, float32 `[B, N, D, Dv]`, with `paper_norms` a
        `RecurrentState` whose aux is (decayed sum of keys `[B, N, D]`, decayed number of tokens `[B, N]`).

    Raises:
        ValueError: shapes that do not fit, is_causal=False, a state of the other form.

    Example:
        >>> import jax.numpy as jnp
        >>> one = jnp.ones((1, 3, 1, 1))
        >>> [round(x, 4) for x in retention(one, one, one).ravel().tolist()]
        [1.0, 1.9688, 2.9072]

    Source: Retentive Network: A Successor to Transformer for Large Language Models (arXiv 2307.08621).
    """
    if not is_causal:
        raise ValueError("is_causal must be True: retention is a recurrence")
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [B, T, heads, size], got {list(x.shape)}")
    heads, wide = query.shape[2], jnp.promote_types(query.dtype, jnp.float32)
    log_decay = jnp.asarray(retention_log_decay(heads) if log_decay is None else log_decay, wide)
    if log_decay.shape != (heads,):
        raise ValueError(f"log_decay must be [N] = [{heads}], got {list(log_decay.shape)}")
    if initial_state is not None and isinstance(initial_state, RecurrentState) != paper_norms:
        raise ValueError(
            "initial_state must be what retention returned with the same paper_norms: a RecurrentState with it, an "
            "array [B, N, D, Dv] without"
        )
    options: dict[str, Any] = {
        "log_decay": log_decay,
        "segment_ids": segment_ids,
        "mode": mode,
        "implementation": implementation,
        "chunk_size": chunk_size,
    }
    if not paper_norms:
        return linear_recurrence(
            query,
            key,
            value,
            scale=scale,
            initial_state=initial_state,
            return_final_state=return_final_state,
            **options,
        )
    state, amount = None, None
    if initial_state is not None:
        sums, amount = initial_state.aux
        state = jnp.concatenate([initial_state.state, sums[..., None]], -1)
        amount = amount[..., None, None]
    # A column of ones makes the sum of a row's weights one more value; with nothing but ones, of its decays.
    ones = jnp.ones((*value.shape[:3], 1), wide)
    o, state = linear_recurrence(
        query.astype(wide),
        key,
        jnp.concatenate([value.astype(wide), ones], -1),
        scale=scale,
        initial_state=state,
        return_final_state=True,
        **options,
    )
    token = jnp.ones((*query.shape[:2], heads, 1), wide)
    decays, amount = linear_recurrence(
        token, token, token, scale=1.0, initial_state=amount, return_final_state=True, **options
    )
    o = o * jax.lax.rsqrt(jnp.where(decays > 0, decays, 1))
    o, rows = o[..., :-1], o[..., -1:]
    o = (o / jax.lax.stop_gradient(jnp.maximum(jnp.abs(rows), 1))).astype(query.dtype)
    if not return_final_state:
        return o
    return o, RecurrentState(state[..., :-1], (state[..., -1], amount[..., 0, 0]))


class Retention(RecurrentLayer):
    """Multi-scale retention: rotated queries and keys, a norm for each head, an output gate.

    y = W_o concat_n(norm(o_n) * silu(x W_g)_n)

    Args:
        features: M, width of x and of the output.
        num_heads: N.
        num_kv_heads: K, which divides N; N if not given.
        head_dim: D of queries and keys, even if they are rotated; features / num_heads if not given.
        value_dim: Dv; twice features / num_heads if not given.
        paper_norms: divide rows as the paper does, see `retention`.
        norm: "rmsnorm", or "layernorm", which subtracts the mean as the paper's group norm does.
        epsilon: of the norm.
        position: an object with `rotate`; `Rope()` if None.
        use_rotation: False rotates nothing.
        chunk_size: tokens a chunk; no effect on the result.
        dtype: of the computation; that of inputs and parameters if not given.
        param_dtype: of the parameters.
        rngs: for the initial values.

    Raises:
        ValueError: sizes that do not fit, a position together with use_rotation=False.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> Retention(16, 2, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 16))).output.shape
        (1, 5, 16)

    Source: Retentive Network: A Successor to Transformer for Large Language Models (arXiv 2307.08621); rotary
    positions and the norm without mean as in flash-linear-attention.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        paper_norms: bool = False,
        norm: str = "rmsnorm",
        epsilon: float = 1e-5,
        position: Any = None,
        use_rotation: bool = True,
        chunk_size: int = 64,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if position is not None and not use_rotation:
            raise ValueError("position cannot be given together with use_rotation=False")
        if position is None and use_rotation:
            position = Rope()
        super().__init__(features, num_heads, position=position)
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads, got {kv_heads} and {num_heads}")
        if (head_dim is None or value_dim is None) and features % num_heads:
            raise ValueError(
                f"num_heads must divide features unless head_dim and value_dim are given, got {num_heads}, {features}"
            )
        head_dim = features // num_heads if head_dim is None else head_dim
        value_dim = 2 * (features // num_heads) if value_dim is None else value_dim
        if isinstance(position, Rope) and position.rotary_dim is None and head_dim % 2:
            raise ValueError(f"head_dim must be even to be rotated, got {head_dim}; or give use_rotation=False")
        self.dtype, self.chunk_size, self.paper_norms = dtype, chunk_size, paper_norms
        shared: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query = HeadProjection(features, num_heads, head_dim, **shared)
        self.key = HeadProjection(features, kv_heads, head_dim, axis="kv_heads", **shared)
        self.value = HeadProjection(features, kv_heads, value_dim, axis="kv_heads", **shared)
        self.out = GatedOutput(features, num_heads, value_dim, norm=norm, epsilon=epsilon, **shared)

    def mix(
        self, x: jax.Array, *, segment_ids: Any, positions: jax.Array, state: RecurrentState | None, **options: Any
    ) -> tuple[jax.Array, RecurrentState, dict[str, Any]]:
        """See `RecurrentLayer`."""
        query, key = self.rotated(self.query(x), self.key(x), positions)
        before = state if state is None or self.paper_norms else state.state
        o, last = retention(
            query,
            key,
            self.value(x),
            paper_norms=self.paper_norms,
            initial_state=before,
            segment_ids=segment_ids,
            chunk_size=self.chunk_size,
            return_final_state=True,
        )
        return o, last if self.paper_norms else RecurrentState(last), {}

    def output(self, o: jax.Array, x: jax.Array) -> jax.Array:
        """See `RecurrentLayer`."""
        return self.out(o, x)


def _example(key, length):
    return attention_inputs(key, length)[0], {"chunk_size": 4 if length < 64 else 64}


def _layer_example(key, length):
    options = {"num_kv_heads": 2, "chunk_size": 4 if length < 64 else 64}
    return LayerExample((16, 4), options, (normal(key, 2, length, 16),), {})


_PAPER = Paper("Retentive Network: A Successor to Transformer for Large Language Models", "2307.08621", 2023)

ENTRIES = (
    Entry(
        name="retention",
        kind="recurrence",
        family="linear",
        function=retention,
        papers=(_PAPER,),
        patterns=("causal self",),
        cost=Cost(flops="T", memory="T"),
        decode="its state [B, N, D, Dv]",
        example=_example,
        fidelity="paper",
    ),
    Entry(
        name="Retention",
        kind="recurrence",
        family="linear",
        layer=Retention,
        papers=(_PAPER,),
        patterns=("causal self",),
        cost=Cost(flops="T", memory="T"),
        decode="a RecurrentState",
        example=_layer_example,
        fidelity="inferred: plain rotary positions and a norm without mean, as in flash-linear-attention",
    ),
)
