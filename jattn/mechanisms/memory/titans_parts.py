"""What the architectures of Titans share: persistent tokens, an attention and a memory of equal heads, their gate.

gate(y, m) = rmsnorm(y; w_y) * sigmoid(rmsnorm(m; w_m))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jattn.cache import RecurrentState
from jattn.layers.attention import LayerOutput, MultiHeadAttention
from jattn.layers.norms import make_norm
from jattn.layers.recurrent import RecurrentLayer
from jattn.layers.sharding import axes
from jattn.mechanisms.memory.neural_memory import NeuralMemory
from jattn.recurrence.memory_blocks import places_in_runs
from jattn.softmax import masks
from jattn.softmax.api import dot_product_attention
from jattn.softmax.merge import merge_lse
from jattn.softmax.segments import renumber_segments


class BranchGate(nnx.Module):
    """rmsnorm(y; w_y) * sigmoid(rmsnorm(m; w_m)): both branches normalized, the memory's through a sigmoid.

    The paper says that both are normalized with learned vectors and pass a non-linearity; which one and where is chosen
    here.

    Args:
        features: M.
        epsilon: of the norms.
        dtype: of the computation.
        param_dtype: of the weights.
        rngs: for flax.
    """

    def __init__(self, features: int, *, epsilon: float, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        shared: dict[str, Any] = {"epsilon": epsilon, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.attention_norm = make_norm("rmsnorm", features, **shared)
        self.memory_norm = make_norm("rmsnorm", features, **shared)

    def __call__(self, y: jax.Array, m: jax.Array) -> jax.Array:
        """Of `[B, T, M]` and `[B, T, M]`."""
        return self.attention_norm(y) * jax.nn.sigmoid(self.memory_norm(m))


class Recent(NamedTuple):
    """Keys and values of the last tokens, and their positions `[B, W - 1]`, -1 where there is none."""

    key: Any
    value: Any
    positions: Any


class TitansLayer(RecurrentLayer):
    """Base of the architectures.

    Args:
        features: M.
        num_heads: N, of the attention and of the memory.
        num_kv_heads: K of the attention; N if not given.
        head_dim: D; features / num_heads if not given.
        num_persistent: Np, learned tokens before every document.
        chunk_size: b of the memory.
        memory_options: other arguments of `NeuralMemory`.
        position: None, or an object with `rotate`, for the attention.
        epsilon: of the norms.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: for the initial values.

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        num_persistent: int = 16,
        chunk_size: int = 16,
        memory_options: Mapping[str, Any] | None = None,
        position: Any = None,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(features, num_heads, position=position)
        if num_persistent < 0:
            raise ValueError(f"num_persistent must be at least 0, got {num_persistent}")
        self.dtype, self.num_persistent = dtype, num_persistent
        shared: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.attention = MultiHeadAttention(
            features, num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, position=position, **shared
        )
        options: dict[str, Any] = {"head_dim": head_dim, "chunk_size": chunk_size, "epsilon": epsilon}
        self.memory = NeuralMemory(features, num_heads, **{**options, **(memory_options or {})}, **shared)
        drawn = nnx.initializers.normal(0.02)(rngs.params(), (num_persistent, features), param_dtype)
        self.persistent = nnx.Param(drawn, **axes(None, "embed"))

    def __call__(self, x: Any, context: Any = None, *, positions: Any = None, **arguments: Any) -> LayerOutput:
        """As `RecurrentLayer`, but tokens are always counted from the start of their document.

        Args:
            x: `[B, T, features]`.
            context: refused.
            positions: refused.
            **arguments: of `RecurrentLayer`.

        Returns:
            LayerOutput(output `[B, T, features]`, the new state if there was a cache, aux).

        Raises:
            ValueError: positions, and what `RecurrentLayer` refuses.
        """
        if positions is not None:
            raise ValueError(f"{type(self).__name__} takes no positions: it counts tokens from their document's start")
        return super().__call__(x, context, **arguments)

    def prefix(self, x: jax.Array) -> jax.Array:
        """The persistent tokens `[1, Np, M]` in the dtype of the tokens."""
        wide = self.persistent.get_value()
        return wide.astype(self.dtype or jnp.promote_types(x.dtype, wide.dtype))[None]


class WindowedTitansLayer(TitansLayer):
    """Base of those whose memory reads the persistent tokens first, and whose attention has a window.

    Args:
        features: M.
        num_heads: N.
        window: tokens that the attention sees, the own one included.
        num_persistent: Np.
        **options: of `TitansLayer`.

    Raises:
        ValueError: sizes that do not fit.
    """

    sees_persistent = False
    """Whether every query sees the persistent tokens, also those outside of its window."""

    def __init__(self, features: int, num_heads: int, *, window: int = 512, num_persistent: int = 16, **options: Any):
        super().__init__(features, num_heads, num_persistent=num_persistent, **options)
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if num_persistent % self.memory.chunk_size:
            raise ValueError(
                f"num_persistent must be a multiple of chunk_size = {self.memory.chunk_size}, got {num_persistent}"
            )
        self.window = window

    def after_persistent(self, x: jax.Array) -> tuple[jax.Array | None, RecurrentState | None]:
        """Per-head outputs of the memory for the persistent tokens, and what they leave behind, of one row."""
        if not self.num_persistent:
            return None, None
        places = jnp.arange(self.num_persistent)[None]
        return self.memory.mix(self.prefix(x), segment_ids=None, positions=places, state=None)[:2]

    def remember(
        self, x: jax.Array, *, segment_ids: Any, positions: Any, state: RecurrentState | None
    ) -> tuple[jax.Array, jax.Array | None, RecurrentState]:
        """Per-head outputs of the memory for x and for the persistent tokens, and its state."""
        lead, start = self.after_persistent(x)
        if state is not None:
            state, start = RecurrentState(state.state, state.aux[0], state.conv), None
        o, after, _ = self.memory.mix(x, segment_ids=segment_ids, positions=positions, state=state, start=start)
        return o, lead, after

    def attend(
        self, x: jax.Array, lead: jax.Array, *, segment_ids: Any, positions: jax.Array, recent: Recent | None
    ) -> tuple[jax.Array, Recent]:
        """Per-head outputs of the attention, and the keys and values that later tokens see.

        Args:
            x: `[B, T, M]`.
            lead: `[1, Np, M]`, what stands before every document.
            segment_ids: int `[B, T]` or None.
            positions: of x, `[B|1, T]`.
            recent: of an earlier call; then ids only mark padding.
        """
        batch, length = x.shape[:2]
        query, key, value = self.attention.project(x, x)
        real = None if segment_ids is None else segment_ids >= 0
        # Known when tracing where only the length says them, so that tiles outside of the window are skipped.
        places: Any = np.arange(length)[None]
        if recent is not None or real is not None:
            positions = positions if recent is not None else places_in_runs(segment_ids)
            places = jnp.maximum(jnp.broadcast_to(positions, (batch, length)), 0)
        places = places + self.num_persistent
        query, key = self.rotated(query, key, jnp.asarray(places))
        new = Recent(
            key, value, jnp.broadcast_to(places if real is None else jnp.where(real, places, -1), (batch, length))
        )
        keys, ids = new, None if real is None else (renumber_segments(segment_ids),) * 2
        if recent is not None:
            keys = Recent(*(jnp.concatenate([x, y.astype(x.dtype)], 1) for x, y in zip(recent, new, strict=True)))
            ids = tuple(jnp.where(x.positions >= 0, 0, -1) for x in (new, keys))
        parts = [
            self._attention(query, keys.key, keys.value, places, places if recent is None else keys.positions, ids)
        ]
        if self.num_persistent:
            _, key, value = self.attention.project(lead, lead)
            before = np.arange(self.num_persistent)[None]
            key = self.rotated(key, key, jnp.asarray(before))[1]
            key, value = (jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in (key, value))
            parts.append(self._attention(query, key, value, places, before, None, is_open=self.sees_persistent))
        o, _ = merge_lse(*parts)
        kept = new if recent is None else keys
        return o, _latest(kept, self.window - 1)

    def _attention(
        self, query: Any, key: Any, value: Any, places: Any, key_places: Any, ids: Any, *, is_open: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Per-head outputs and lse."""
        return dot_product_attention(
            query,
            key,
            value,
            mask=None if is_open else masks.sliding_window(self.window),
            segment_ids=ids,
            query_positions=places,
            key_positions=key_places,
            return_residual=True,
        )

    def nothing_recent(self, batch: int, key: jax.Array, value: jax.Array) -> Recent:
        """Before any token."""
        size = (batch, self.window - 1)
        key, value = (jnp.zeros((*size, *x.shape[2:]), x.dtype) for x in (key, value))
        return Recent(key, value, jnp.full(size, -1, jnp.int32))

    def init_cache(self, policy: Any, batch: int, dtype: Any = None) -> RecurrentState:
        """The state before any token: the memory after the persistent ones, and an empty window.

        Args:
            policy: of the model's caches; a state needs no room, so any causal one will do.
            batch: B.
            dtype: of the tokens to come; float32 if not given.

        Returns:
            The state.

        Raises:
            ValueError: a policy that is not causal.
        """
        if not policy.causal:
            raise ValueError(f"{type(self).__name__} is causal; {policy} holds a context that all may see")
        x = jnp.zeros((1, 1, self.features), self.dtype or dtype or jnp.float32)
        _, start = self.after_persistent(x)
        memory = self.memory.init_cache(policy, 1, x.dtype) if start is None else start
        _, key, value = self.attention.project(x, x)
        recent = self.nothing_recent(1, key, value)
        state = RecurrentState(memory.state, (memory.aux, recent), memory.conv, jnp.zeros(1, jnp.int32))
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:])), state)


def _latest(tokens: Recent, count: int) -> Recent:
    """The `count` last tokens by position; places are left empty, in front, if there are fewer."""
    missing = max(count - tokens.positions.shape[1], 0)
    order = jnp.argsort(tokens.positions, axis=1, stable=True)
    order = order[:, order.shape[1] - (count - missing) :]

    def pick(x: jax.Array, empty: int) -> jax.Array:
        found = jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)
        return jnp.pad(found, [(0, 0), (missing, 0)] + [(0, 0)] * (x.ndim - 2), constant_values=empty)

    return Recent(pick(tokens.key, 0), pick(tokens.value, 0), pick(tokens.positions, -1))
