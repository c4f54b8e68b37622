"""Additive linear recurrence (LightNet): the decay is a quotient of sums, so all tokens together need no scan.

    z_t = log sum_{s<=t} exp(k_s)                                        a key channel
    S_t = Diag(exp(z_{t-1} - z_t)) S_{t-1} + exp(k_t - z_t) v_t^T,   o_t = silu(q_t)^T S_t

Unrolled, o_t = silu(q_t)^T softmax_{s<=t}(k_s)^T v_s with a softmax over time for each channel. Without a direction the
softmax runs over all tokens, o = silu(q)^T softmax(k)^T v: one pass for a flattened image or video, where a product of
gates would have to be scanned once a direction.

    y = W_o (rmsnorm(o) * silu(x W_1 W_2))     (layer; or rmsnorm(o * sigmoid(x W_1 W_2)), the author's later order)

Source: You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet (arXiv 2405.21022); the details
that it leaves open as in flash-linear-attention's layer and the first author's later program (xmixers).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.cache import RecurrentState
from jattn.layers.attention import LayerOutput
from jattn.layers.norms import make_norm
from jattn.layers.recurrent import HeadProjection, LowRank, RecurrentLayer
from jattn.layers.sharding import axes
from jattn.mechanisms.entry import Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import normal, normals
from jattn.mechanisms.linear.linear_attention import linear_attention
from jattn.recurrence.additive import additive_gates, finite
from jattn.recurrence.api import linear_recurrence
from jattn.recurrence.arguments import check_arrays, check_rows, check_segments, key_mask
from jattn.recurrence.groups import among, group_logsumexp, shown
from jattn.recurrence.segments import runs_of
from jattn.softmax import masks

GATE_ORDERS = ("norm_first", "gate_first")


def additive_linear_recurrence(
    query: Any,
    key: Any,
    value: Any,
    *,
    is_causal: bool = False,
    log_weights: Any = None,
    input_gate: bool = True,
    mask: Any = None,
    segment_ids: Any = None,
    position: Any = None,
    query_positions: Any = None,
    key_positions: Any = None,
    scale: float | None = None,
    zero_sink: bool = False,
    initial_state: RecurrentState | None = None,
    mode: str = "chunk",
    implementation: str | None = None,
    chunk_size: int = 64,
    return_final_state: bool = False,
) -> Any:
    """Linear attention whose weights are a softmax over the tokens, one for each key channel.

    o_i = scale sum_d silu(q_id) sum_j softmax_j(k_jd) v_j over the visible j, those up to i if causal

    Args:
        query: `[B, T, N, D]`.
        key: `[B, S, K, D]`, logits; K divides N.
        value: `[B, S, K, Dv]`.
        is_causal: tokens in their order; without it all tokens see all, in one pass.
        log_weights: `[B, S, K]`, logits of the softmax instead of the key, which is then a plain one: o_i = scale
            sum_j softmax_j(log_weights_j) (silu(q_i) . k_j) v_j, a decay a token.
        input_gate: with log_weights, whether a key is written by its own weight, 1 - decay; without, by 1, and only
            the state decays, which needs a direction.
        mask: a key mask, booleans that broadcast to `[B, 1, 1, S]`, or `masks.causal()`.
        segment_ids: `[B, T]`, or a pair for queries and keys if not causal; negative = padding. In one array an id that
            returns after another one is a new segment; the ids of a pair are compared.
        position: None, or an object with `rotate`, applied to silu(q) and to the exponentials of k; it may double D.
        query_positions: `[B|1, T]` integers that `position` sees, counted through if None.
        key_positions: `[B|1, S]` integers likewise.
        scale: of the queries, 1 if None.
        zero_sink: one more key of logit 0 and value 0 before each document, so that weights sum to less than 1.
        initial_state: what earlier tokens left behind, if causal; it belongs to the first segment.
        mode: of `jattn.linear_recurrence`, if causal.
        implementation: likewise.
        chunk_size: tokens a chunk; no effect on the result.
        return_final_state: also return the state after the last token, if causal.

    Returns:
        `[B, T, N, Dv]` in the query's dtype; with `return_final_state` also a `RecurrentState` whose `state` is S
        `[B, K, D, Dv]` and whose `aux` is z `[B, K, D]` (`[B, K]` with log_weights), float32 at least.

    Raises:
        ValueError: shapes that do not fit, a mask that is not of keys, causal cross attention, a state without causal.

    Example:
        >>> import jax.numpy as jnp
        >>> q, k, v = jnp.ones((1, 3, 1, 1)), jnp.zeros((1, 3, 1, 1)), jnp.arange(3.0).reshape(1, 3, 1, 1)
        >>> out = additive_linear_recurrence(q, k, v, is_causal=True)  # silu(1) = 0.7311
        >>> [round(x, 4) for x in out.ravel().tolist()]
        [0.0, 0.3655, 0.7311]

    Source: You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet (arXiv 2405.21022).
    """
    query, key, value = check_arrays(query, key, value)
    (batch, length), source = query.shape[:2], key.shape[1]
    valid, is_causal = key_mask(mask, is_causal, batch, source)
    ids, is_pair = check_segments(segment_ids, batch, length, source)
    places = (
        check_rows("query_positions", query_positions, batch, length),
        check_rows("key_positions", key_positions, batch, source),
    )
    if log_weights is not None and jnp.shape(log_weights) != key.shape[:3]:
        raise ValueError(f"log_weights must be {list(key.shape[:3])}, got {list(jnp.shape(log_weights))}")
    if is_causal and (length != source or is_pair):
        raise ValueError(
            f"is_causal needs as many keys as queries and segment_ids in one array; got T = {length}, S = {source}"
        )
    if not is_causal and (initial_state is not None or return_final_state):
        raise ValueError("initial_state and return_final_state need is_causal=True")
    if not input_gate and (log_weights is None or not is_causal):
        raise ValueError("input_gate=False needs log_weights, and is_causal=True: it makes the order of tokens matter")
    if position is not None and not hasattr(position, "rotate"):
        raise ValueError(f"position must have rotate, which {type(position).__name__} lacks")
    dtype, wide = query.dtype, jnp.promote_types(query.dtype, jnp.float32)
    if ids is not None:
        valid = ids[1] >= 0 if valid is None else (ids[1] >= 0) & valid
        valid = valid & among(ids[1], ids[0]) if is_pair else valid
        query = shown(query, ids[0] >= 0)
    query = jax.nn.silu(query.astype(wide)) * (1.0 if scale is None else scale)
    logits = shown(jnp.asarray(key if log_weights is None else log_weights).astype(wide), valid, -jnp.inf)
    plain = None if log_weights is None else shown(key.astype(wide), valid)
    value = shown(value, valid).astype(wide)
    if not is_causal:
        if ids is not None and not is_pair:
            ids = (jnp.where(ids[0] >= 0, runs_of(ids[0]), -1),) * 2
        total = group_logsumexp(logits, None if ids is None else ids[1])
        keys = _columns(jnp.exp(logits - finite(jnp.logaddexp(total, 0) if zero_sink else total)), plain)
        if position is not None:
            counted = (jnp.arange(length)[None], jnp.arange(source)[None])
            given = (own if p is None else p for own, p in zip(counted, places, strict=True))
            query, keys = position.rotate(query, keys, *given)
        visible = None if valid is None else valid[:, None, None]
        options = {"feature_map": "identity", "normalize": False, "chunk_size": chunk_size}
        return linear_attention(query, keys, value, mask=visible, segment_ids=ids, **options).astype(dtype)
    ids = None if ids is None else ids[0]
    gates = additive_gates(logits, ids, None if initial_state is None else initial_state.aux, zero_sink=zero_sink)
    keys, decay = _columns(gates.weight, plain) if input_gate else plain, gates.log_decay
    real = jnp.ones((batch, length), jnp.int32) if ids is None else (ids >= 0).astype(jnp.int32)
    before = jnp.zeros((batch,), jnp.int32) if initial_state is None else initial_state.next
    if position is not None:
        counted = jnp.maximum(before[:, None] + jnp.cumsum(real, axis=1) - 1, 0)
        query, keys = position.rotate(query, keys, *(counted if p is None else p for p in places))
        if decay.ndim == 4:
            # A rotation that doubles the channels lays both halves out one after the other.
            decay = jnp.concatenate([decay] * (keys.shape[3] // key.shape[3]), axis=-1)
    out, last = linear_recurrence(
        query,
        keys,
        value,
        log_decay=decay,
        scale=1.0,
        initial_state=None if initial_state is None else initial_state.state,
        segment_ids=ids,
        mode=mode,
        implementation=implementation,
        chunk_size=chunk_size,
        return_final_state=True,
    )
    if not return_final_state:
        return out.astype(dtype)
    state = last[:, :: query.shape[2] // key.shape[2]]
    return out.astype(dtype), RecurrentState(state, gates.last, next=before + jnp.sum(real, axis=1, dtype=jnp.int32))


def _columns(weights: jax.Array, plain: jax.Array | None) -> jax.Array:
    """Keys of the recurrence: weights of channels, or plain keys times the weight of their token."""
    return weights if plain is None else plain * weights[..., None]


class LightNetAttention(RecurrentLayer):
    """Multi-head LightNet attention: causal under `masks.causal()` or with a cache, else one pass over all tokens.

    o = additive_linear_recurrence(x W_q, c W_k, c W_v), c = context or x; y = W_o (rmsnorm(o) * silu(x W_1 W_2))

    A grid of any number of axes is given flattened, `[B, h w, M]`: without a mask its tokens have no order, and
    `position=MdLrpe((h, w))` tells their places. The mask of a call is None, `masks.causal()` or, if not causal, a key
    mask; segment_ids may be a pair for x and context.

    Args:
        features: M, width of x and of the output.
        num_heads: N.
        num_kv_heads: K, which divides N; N if not given.
        head_dim: D of queries and keys, features / num_heads if not given; the published layers have 128.
        value_dim: Dv; features / num_heads if not given.
        gate_rank: width between W_1 and W_2, head_dim if not given; N in the author's later program.
        gate_order: "norm_first" as above, or "gate_first": rmsnorm(o * sigmoid(x W_1 W_2)), the author's later order.
        scalar_decay: one decay a head, from x W_f, and silu(x W_k) as plain keys: log_weights of the function.
        input_gate: of the function, with scalar_decay.
        zero_sink: of the function.
        context_features: width of the context; `features` if not given.
        epsilon: of the norm over all heads.
        position: None, or an object with `rotate`, applied after silu and exp. One that mixes channels, such as `Rope`,
            makes causal rows depend on the order of decay and rotation; one that doubles them does not.
        chunk_size: tokens a chunk; no effect on the result.
        dtype: of the computation; that of inputs and parameters if not given.
        param_dtype: of the parameters.
        rngs: for the initial values.

    Raises:
        ValueError: sizes that do not fit, an unknown gate order.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> layer = LightNetAttention(16, 2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((1, 4 * 6, 16))).output.shape
        (1, 24, 16)

    Source: You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet (arXiv 2405.21022).
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        gate_rank: int | None = None,
        gate_order: str = "norm_first",
        scalar_decay: bool = False,
        input_gate: bool = True,
        zero_sink: bool = False,
        context_features: int | None = None,
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
        if None in (head_dim, value_dim) and features % num_heads:
            raise ValueError(f"num_heads must divide features unless head_dim and value_dim are given, got {num_heads}")
        if gate_order not in GATE_ORDERS:
            raise ValueError(f"gate_order must be one of {', '.join(GATE_ORDERS)}, got {gate_order!r}")
        if not input_gate and not scalar_decay:
            raise ValueError("input_gate=False needs scalar_decay=True")
        head_dim = features // num_heads if head_dim is None else head_dim
        value_dim = features // num_heads if value_dim is None else value_dim
        source = features if context_features is None else context_features
        self.dtype, self.chunk_size = dtype, chunk_size
        self.gate_order, self.input_gate, self.zero_sink = gate_order, input_gate, zero_sink
        shared: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query = HeadProjection(features, num_heads, head_dim, **shared)
        self.key = HeadProjection(source, kv_heads, head_dim, axis="kv_heads", **shared)
        self.value = HeadProjection(source, kv_heads, value_dim, axis="kv_heads", **shared)
        self.log_weights = HeadProjection(source, kv_heads, 1, axis="kv_heads", **shared) if scalar_decay else None
        rank = head_dim if gate_rank is None else gate_rank
        self.gate = LowRank(features, rank, num_heads * value_dim, use_bias=False, **shared)
        self.norm = make_norm("rmsnorm", num_heads * value_dim, epsilon=epsilon, axis_name="heads", **shared)
        self.out = nnx.LinearGeneral(
            (num_heads, value_dim),
            features,
            axis=(-2, -1),
            use_bias=False,
            kernel_metadata=axes("heads", "head_dim", "embed"),
            bias_metadata=axes("embed"),
            **shared,
        )

    def _attend(self, x: jax.Array, source: jax.Array, **options: Any) -> Any:
        key, log_weights = self.key(source), None
        if self.log_weights is not None:
            key, log_weights = jax.nn.silu(key), self.log_weights(source)[..., 0]
        options |= {"log_weights": log_weights, "input_gate": self.input_gate, "zero_sink": self.zero_sink}
        options |= {"position": self.position, "chunk_size": self.chunk_size}
        return additive_linear_recurrence(self.query(x), key, self.value(source), **options)

    def mix(
        self, x: jax.Array, *, segment_ids: Any, positions: jax.Array, state: RecurrentState | None, **options: Any
    ) -> tuple[jax.Array, RecurrentState, dict[str, Any]]:
        """See `RecurrentLayer`."""
        o, last = self._attend(
            x,
            x,
            is_causal=True,
            segment_ids=segment_ids,
            query_positions=positions,
            key_positions=positions,
            initial_state=state,
            return_final_state=True,
        )
        return o, RecurrentState(last.state, last.aux), {}

    def output(self, o: jax.Array, x: jax.Array) -> jax.Array:
        """See `RecurrentLayer`."""
        gate, flat = self.gate(x), o.reshape(*o.shape[:2], -1)
        if self.gate_order == "norm_first":
            flat = self.norm(flat) * jax.nn.silu(gate)
        else:
            flat = self.norm(flat * jax.nn.sigmoid(gate))
        return self.out(flat.reshape(o.shape))

    def __call__(self, x: Any, context: Any = None, *, mask: Any = None, cache: Any = None, **call: Any) -> LayerOutput:
        """Mix tokens: with a cache or under `masks.causal()` as `RecurrentLayer` does, else each with all.

        Args:
            x: `[B, T, features]`.
            context: `[B, S, context_features]` for cross attention, which is not causal.
            mask: None, `masks.causal()`, or booleans that broadcast to `[B, 1, 1, S]`.
            cache: (policy, RecurrentState) of causal attention.
            **call: of `RecurrentLayer`; segment_ids may be a pair for x and context.

        Returns:
            LayerOutput(output `[B, T, features]`, the new state if there was a cache, aux).

        Raises:
            ValueError: shapes that do not fit, a causal context, a hook.
        """
        if cache is not None or (isinstance(mask, masks.Mask) and mask == masks.causal()):
            return super().__call__(x, context, mask=mask, cache=cache, **call)
        return self._over_all(jnp.asarray(x), context, mask, **call)

    def _over_all(
        self,
        x: jax.Array,
        context: Any,
        mask: Any,
        *,
        positions: Any = None,
        segment_ids: Any = None,
        tap: Any = None,
        hook: Any = None,
        deterministic: bool = True,
        rngs: Any = None,
    ) -> LayerOutput:
        if x.ndim != 3 or x.shape[-1] != self.features:
            raise ValueError(f"x must be [B, T, {self.features}], got {list(x.shape)}")
        source = x if context is None else jnp.asarray(context)
        width = self.key.in_features[0]
        if source.ndim != 3 or source.shape[0] != x.shape[0] or source.shape[2] != width:
            raise ValueError(f"context must be [{x.shape[0]}, S, {width}], got {list(source.shape)}")
        if hook is not None:
            raise ValueError("LightNetAttention has no attention weights that a hook could see; sites see its heads")
        ids, _ = check_segments(segment_ids, *x.shape[:2], source.shape[1])
        if ids is not None:
            # Padding may hold anything, NaN too; it must not reach weights through 0 * NaN.
            x, source = shown(x, ids[0] >= 0), shown(source, ids[1] >= 0)
        places = None if positions is None else jnp.atleast_2d(jnp.asarray(positions))
        key_places = places if context is None else None
        o = self._attend(
            x, source, mask=mask, segment_ids=segment_ids, query_positions=places, key_positions=key_places
        )
        o = o if tap is None else tap("head_out", o)
        y = self.output(o, x)
        return LayerOutput(y if ids is None else shown(y, ids[0] >= 0), None, {})


def _example(key, length, query_length=None):
    shapes = ((2, query_length or length, 4, 8), (2, length, 2, 8), (2, length, 2, 6))
    return normals(key, *shapes), {"chunk_size": 4 if length < 64 else 64}


def _layer_example(key, length):
    options = {"num_kv_heads": 2, "gate_rank": 2, "chunk_size": 4 if length < 64 else 64}
    return LayerExample((16, 4), options, (normal(key, 2, length, 16),), {})


_SHARED: dict[str, Any] = {
    "kind": "recurrence",
    "family": "linear",
    "papers": (
        Paper(
            "You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet",
            "2405.21022",
            2024,
        ),
    ),
    "patterns": ("noncausal self", "causal self", "noncausal cross"),
    "cost": Cost(flops="T", memory="T"),
    "decode": "a RecurrentState (S, z)",
    "fidelity": "inferred: the gate and its order, from later programs of others and of the first author",
}

ENTRIES = (
    Entry("additive_linear_recurrence", function=additive_linear_recurrence, example=_example, **_SHARED),
    Entry("LightNetAttention", layer=LightNetAttention, example=_layer_example, **_SHARED),
)
