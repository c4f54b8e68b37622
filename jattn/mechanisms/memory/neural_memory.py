"""Neural memory: a small MLP a head that is trained on the sequence while it is read.

    M(x; W) = x + LN(gelu(x W_1) W_2)                      residual; otherwise gelu(x W_1) W_2
    S_t = eta_t S_{t-1} - theta_t grad |M(k_t; W_c) - v_t|^2,   W_t = (1 - alpha_t) W_{t-1} + S_t
    y = W_o concat_n(rmsnorm(M(q; W_t)_n) * silu(x W_g)_n)
    q, k = l2norm(silu(conv(x W))),   v = silu(conv(x W_v))
    alpha, eta = sigmoid(x w + b),   theta = c sigmoid(x w + b)

W_c is the memory at the last chunk border; borders stand at multiples of b tokens from the start of a document. No W_t
is computed: see `jattn.recurrence.learning_memory`. There is no official code. The equations, the convolutions, the
norms and the gated output are the paper's; chosen here are how gates are made, c = 0.1, and their initial biases.
Source: Titans: Learning to Memorize at Test Time (arXiv 2501.00663), the wrapper from its NeurIPS 2025 version;
`update="chunk"` follows the unofficial lucidrains/titans-pytorch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.cache import RecurrentState
from jattn.layers.norms import l2_normalize
from jattn.layers.recurrent import GatedOutput, HeadProjection, RecurrentLayer
from jattn.layers.sharding import axes
from jattn.layers.short_conv import ShortConv
from jattn.mechanisms.entry import Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import normal
from jattn.recurrence.learning_memory import MemoryState, apply_memory, run_memory, start_state
from jattn.recurrence.memory_blocks import places_in_runs
from jattn.recurrence.memory_plans import PLANS


class MemoryInputs(NamedTuple):
    """What a memory is written with: arrays `[B, T, K, ...]`."""

    key: Any
    value: Any
    log_keep: Any
    log_momentum: Any
    step: Any


class NeuralMemory(RecurrentLayer):
    """Memory whose weights are its state: written by gradient descent with momentum and forgetting, read at each token.

    S_t = eta_t S_{t-1} - theta_t grad_W |M(k_t; W_c) - v_t|^2, W_t = (1 - alpha_t) W_{t-1} + S_t, y_t = M(q_t; W_t)

    Args:
        features: M, width of x and of the output.
        num_heads: N.
        num_kv_heads: K memories, which divides N; N if not given. Query head n reads memory n // (N / K).
        head_dim: D of queries and keys; features / num_heads if not given.
        value_dim: Dv; D if not given, and with `residual` always.
        depth: L, matrices of a memory.
        expansion: width of hidden layers over D.
        residual: M(x) = x + LN(MLP(x)); otherwise the bare MLP.
        linear: the linear memory, as depth=1 and residual=False. It starts at zero.
        chunk_size: b, tokens whose gradients are taken at the same weights: a part of the definition.
        update: "token": W moves at every token. "chunk": once a chunk, by the sum of its gradients and with the means
            of its alpha and eta; the last token of a chunk is the first to see it, an unfinished chunk does nothing.
        theta_max: c, the largest step. For a linear memory 1/2 overwrites what a key had stored, more than 1 diverges.
        forget_bias: initial bias of alpha's logit. At 0 half of the memory would be gone with every token.
        conv_width: tokens that the short convolutions of queries, keys and values see.
        epsilon: of the head norm.
        position: None, or an object with `rotate`, applied to q and k. Only the linear memory makes of it something
            that depends on distances alone.
        dtype: of the computation; that of inputs and parameters if not given. The memory itself is float32 at least.
        param_dtype: of the parameters.
        rngs: for the initial values.

    Raises:
        ValueError: sizes that do not fit, or an unknown update.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> NeuralMemory(16, 2, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 16))).output.shape
        (1, 5, 16)

    Source: Titans: Learning to Memorize at Test Time (arXiv 2501.00663).
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        depth: int = 2,
        expansion: int = 4,
        residual: bool = True,
        linear: bool = False,
        chunk_size: int = 16,
        update: str = "token",
        theta_max: float = 0.1,
        forget_bias: float = -5.0,
        conv_width: int = 4,
        epsilon: float = 1e-5,
        position: Any = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(features, num_heads, position=position)
        if linear:
            depth, residual = 1, False
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads, got {kv_heads} and {num_heads}")
        if head_dim is None and features % num_heads:
            raise ValueError(f"num_heads must divide features unless head_dim is given, got {num_heads}, {features}")
        for name, size in (("depth", depth), ("expansion", expansion), ("chunk_size", chunk_size)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if update not in PLANS:
            raise ValueError(f"update must be one of {', '.join(PLANS)}, got {update!r}")
        head_dim = features // num_heads if head_dim is None else head_dim
        value_dim = head_dim if value_dim is None else value_dim
        if residual and value_dim != head_dim:
            raise ValueError(f"value_dim must be head_dim = {head_dim} with a residual memory, got {value_dim}")
        self.dtype, self.chunk_size, self.update, self.residual = dtype, chunk_size, update, residual
        self.theta_max = theta_max
        shared: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query = HeadProjection(features, num_heads, head_dim, **shared)
        self.key = HeadProjection(features, kv_heads, head_dim, axis="kv_heads", **shared)
        self.value = HeadProjection(features, kv_heads, value_dim, axis="kv_heads", **shared)
        # From here to the answer everything is float32 at least, as the memory is: the convolutions have no dtype.
        of_conv: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.query_conv = ShortConv(num_heads * head_dim, conv_width, **of_conv)
        self.key_conv = ShortConv(kv_heads * head_dim, conv_width, **of_conv)
        self.value_conv = ShortConv(kv_heads * value_dim, conv_width, **of_conv)

        def gate(bias: float) -> nnx.Linear:
            return nnx.Linear(
                features,
                kv_heads,
                bias_init=nnx.initializers.constant(bias),
                kernel_metadata=axes("embed", "kv_heads"),
                bias_metadata=axes("kv_heads"),
                **shared,
            )

        self.alpha, self.theta, self.eta = gate(forget_bias), gate(0.0), gate(0.0)
        # A deep memory of zeros has zero gradients and would never move.
        init: Any = nnx.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=(0,))
        init = nnx.initializers.zeros_init() if depth == 1 and not residual else init
        widths = (head_dim, *(expansion * head_dim,) * (depth - 1), value_dim)
        self.memory = nnx.List(
            nnx.Param(init(rngs.params(), (kv_heads, *size), param_dtype), **axes("kv_heads", None, None))
            for size in zip(widths, widths[1:], strict=False)
        )
        self.out = GatedOutput(features, num_heads, value_dim, epsilon=epsilon, **shared)

    def weights(self) -> tuple[jax.Array, ...]:
        """W_0, matrices `[K, in, out]`."""
        return tuple(matrix.get_value() for matrix in self.memory)

    def start(self, batch: int, dtype: Any) -> tuple[MemoryState, tuple[jax.Array, ...]]:
        """The memory before any token, and the tails of the three convolutions, float32 at least."""
        wide = jnp.promote_types(dtype, jnp.float32)
        weights = tuple(jnp.broadcast_to(w, (batch, *w.shape)).astype(wide) for w in self.weights())
        tails = (
            jnp.zeros((batch, conv.width - 1, conv.kernel.get_value().shape[1]), wide)
            for conv in (self.query_conv, self.key_conv, self.value_conv)
        )
        return start_state(weights, jax.tree.map(jnp.zeros_like, weights), self.update), tuple(tails)

    def queries(
        self, x: jax.Array, *, segment_ids: Any = None, positions: Any = None, tail: Any = None, lead: Any = None
    ) -> tuple[jax.Array, jax.Array]:
        """Queries `[B, T, N, D]` and the tail of their convolution.

        Args:
            x: `[B, T, M]`.
            segment_ids: int `[B, T]` or None.
            positions: int `[B|1, T]`, where a position object rotates to.
            tail: of an earlier call.
            lead: a tail `[1, W - 1, ND]` that every document has before its first token; not together with a tail.
        """
        query, tail = _convolved(self.query_conv, self.query(x), segment_ids, tail, lead)
        query = l2_normalize(query, rule="inside")
        return query if self.position is None else self.rotated(query, query, positions)[0], tail

    def inputs(
        self,
        x: jax.Array,
        *,
        segment_ids: Any = None,
        positions: Any = None,
        tails: Any = (None, None),
        leads: Any = (None, None),
    ) -> tuple[MemoryInputs, tuple[jax.Array, jax.Array]]:
        """What x writes, and the tails of the convolutions of keys and values; arguments as in `queries`."""
        key, key_tail = _convolved(self.key_conv, self.key(x), segment_ids, tails[0], leads[0])
        value, value_tail = _convolved(self.value_conv, self.value(x), segment_ids, tails[1], leads[1])
        key = l2_normalize(key, rule="inside")
        key = key if self.position is None else self.rotated(key, key, positions)[1]
        wide = jnp.promote_types(x.dtype, jnp.float32)
        alpha, theta, eta = (gate(x).astype(wide) for gate in (self.alpha, self.theta, self.eta))
        gates = jax.nn.log_sigmoid(-alpha), jax.nn.log_sigmoid(eta), self.theta_max * jax.nn.sigmoid(theta)
        return MemoryInputs(key, value, *gates), (key_tail, value_tail)

    def rounded(self, o: jax.Array, x: jax.Array) -> jax.Array:
        """An answer in the dtype in which the layer computes on x."""
        return o.astype(self.dtype or jnp.promote_types(x.dtype, self.query.kernel.get_value().dtype))

    def read(self, query: jax.Array, weights: Any) -> jax.Array:
        """M(q; W) with the same weights `[B, K, in, out]` for all queries `[B, T, N, D]`, without a write."""
        groups = query.reshape(*query.shape[:2], weights[0].shape[-3], -1, query.shape[-1]).transpose(0, 2, 3, 1, 4)
        found = apply_memory(weights, groups, residual=self.residual).transpose(0, 3, 1, 2, 4)
        return found.reshape(*query.shape[:3], -1)

    def write_and_read(
        self,
        query: jax.Array,
        inputs: MemoryInputs,
        *,
        first: Any = None,
        state: MemoryState | None = None,
        **options: Any,
    ) -> tuple[jax.Array, MemoryState]:
        """M(q_t; W_t) `[B, T, N, Dv]`, and the memory after the last token.

        Args:
            query: `[B, T, N, D]`.
            inputs: of the same tokens.
            first: weights and momentum that every document starts with; W_0 and 0 if not given.
            state: the memory before these tokens.
            **options: segment_ids, at_border, one_run of `run_memory`.
        """
        weights, momentum = (self.weights(), None) if first is None else first
        return run_memory(
            query,
            *inputs,
            weights,
            momentum=momentum,
            state=state,
            chunk_size=self.chunk_size,
            update=self.update,
            residual=self.residual,
            **options,
        )

    def mix(
        self,
        x: jax.Array,
        *,
        segment_ids: Any,
        positions: jax.Array,
        state: RecurrentState | None,
        start: RecurrentState | None = None,
        **options: Any,
    ) -> tuple[jax.Array, RecurrentState, dict[str, Any]]:
        """See `RecurrentLayer`.

        Without a state, every document starts from `start` if that is given: a state of one row that stands at a chunk
        border, such as tokens leave behind that all documents begin with.
        """
        tails = (None,) * 3 if state is None else state.conv
        leads = (None,) * 3 if start is None else start.conv
        common = {"segment_ids": segment_ids, "positions": positions}
        query, query_tail = self.queries(x, tail=tails[0], lead=leads[0], **common)
        inputs, rest = self.inputs(x, tails=tails[1:], leads=leads[1:], **common)
        o, after = self.write_and_read(
            query,
            inputs,
            first=None if start is None else (start.state, start.aux[1]),
            state=None if state is None else memory_state(state),
            segment_ids=segment_ids,
            one_run=state is not None,
        )
        aux = (after.held, after.momentum, after.means, after.position)
        return self.rounded(o, x), RecurrentState(after.weights, aux, (query_tail, *rest)), {}

    def output(self, o: jax.Array, x: jax.Array) -> jax.Array:
        """See `RecurrentLayer`."""
        return self.out(o, x)


def memory_state(state: RecurrentState) -> MemoryState:
    """The memory in the cache of a `NeuralMemory`."""
    held, momentum, means, position = state.aux
    return MemoryState(state.state, momentum, held, means, position)


def _convolved(conv: ShortConv, x: jax.Array, segment_ids: Any, tail: Any, lead: Any) -> tuple[jax.Array, jax.Array]:
    """silu(conv(x)) for heads `[B, T, heads, width]`, and the tail."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    y, tail = conv(wide.reshape(*x.shape[:2], -1), segment_ids=segment_ids, cache=tail)[:2]
    if lead is not None:
        # What the tokens before a document still add to its first ones.
        added = conv(jnp.zeros_like(lead), cache=lead).output[0]
        added = jnp.concatenate([added, jnp.zeros_like(added, shape=(1, added.shape[1]))])
        ids = jnp.zeros(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        y = y + added[jnp.clip(places_in_runs(ids), 0, len(added) - 1)]
    return jax.nn.silu(y).reshape(x.shape), tail


def _example(key, length):
    options = {"num_kv_heads": 1, "head_dim": 6, "expansion": 2, "chunk_size": 4 if length < 64 else 64}
    return LayerExample((12, 2), options, (normal(key, 2, length, 12),), {})


ENTRY = Entry(
    name="NeuralMemory",
    kind="layer",
    family="memory",
    layer=NeuralMemory,
    papers=(Paper("Titans: Learning to Memorize at Test Time", "2501.00663", 2024),),
    patterns=("causal self",),
    cost=Cost(flops="T", memory="T"),
    decode="W, W at the last chunk border, S, tokens since the border, tails of the convolutions",
    example=_example,
    fidelity="inferred: how gates are made, the largest step, initial values",
)
