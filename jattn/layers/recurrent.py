"""What layers around a recurrence share: the call, its state as the cache, the norm and gate of its output.

    x  ->  mix(x), per head  ->  output  ->  y

A subclass says in `mix` how projections, gates and the engine make per-head outputs, and in `output` how those become
the layer's. All that decoding keeps is a `RecurrentState`, whose size does not depend on what has been read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.cache import RecurrentState
from jattn.cache.recurrent import state_before
from jattn.layers.attention import LayerOutput
from jattn.layers.norms import make_norm
from jattn.layers.sharding import axes
from jattn.recurrence.segments import without_padding
from jattn.softmax import masks
from jattn.softmax.masks import Mask

GATES = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


class RecurrentLayer(nnx.Module):
    """Base of causal layers whose state replaces keys and values.

    Args:
        features: M, width of x and of the output.
        num_heads: N.
        position: None, or an object with `rotate`, which `rotated` applies.

    Raises:
        ValueError: a position that can only bias logits, of which there are none.
    """

    beside: tuple[str, ...] = ()
    """Names of arrays `[B, T, ...]` that every call gives beside x; `mix` is handed them, with zeros at padding."""
    hands_on: tuple[str, ...] = ()
    """Names in aux of arrays `[B, T, ...]` that later layers of a stack are given beside x, if they say so."""

    def __init__(self, features: int, num_heads: int, *, position: Any = None):
        if position is not None and not hasattr(position, "rotate"):
            raise ValueError(
                f"{type(self).__name__} has no logits, so {type(position).__name__} cannot bias them; rotary positions "
                "and those added to the embedding can be used"
            )
        self.features, self.num_heads, self.position = features, num_heads, position

    def mix(
        self, x: jax.Array, *, segment_ids: Any, positions: jax.Array, state: RecurrentState | None, **options: Any
    ) -> tuple[jax.Array, RecurrentState, dict[str, Any]]:
        """Per-head outputs.

        Args:
            x: `[B, T, M]`.
            segment_ids: int `[B, T]` or None; when decoding only padding is marked.
            positions: int `[B|1, T]`.
            state: what earlier tokens left behind, None before the first. `next` is counted by the caller.
            **options: deterministic, rngs, and what a call gives `beside` x; nothing of the latter from `init_cache`.

        Returns:
            `[B, T, N, Dv]`, the state after the last token, and statistics by name.
        """
        raise NotImplementedError

    def output(self, o: jax.Array, x: jax.Array) -> jax.Array:
        """From per-head outputs `[B, T, N, Dv]` and the input `[B, T, M]` to `[B, T, M]`."""
        raise NotImplementedError

    def rotated(self, query: jax.Array, key: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries and keys `[B, T, heads, D]` at their positions."""
        if self.position is None:
            return query, key
        return self.position.rotate(query, key, positions, positions)

    def init_cache(self, policy: Any, batch: int, dtype: Any = None) -> RecurrentState:
        """The state before any token.

        Args:
            policy: of the model's caches; a state needs no room, so any causal one will do.
            batch: B.
            dtype: of the tokens to come; float32 if not given. States are float32 at least.

        Returns:
            The state.

        Raises:
            ValueError: a policy that is not causal.
        """
        if not policy.causal:
            raise ValueError(f"{type(self).__name__} is causal; {policy} holds a context that all may see")
        dtype = getattr(self, "dtype", None) or dtype or jnp.float32
        return state_before(
            lambda ids: self.mix(
                jnp.zeros((batch, 1, self.features), dtype),
                segment_ids=ids,
                positions=jnp.zeros((1, 1), jnp.int32),
                state=None,
                deterministic=True,
                rngs=None,
            )[1],
            batch,
        )

    def __call__(
        self,
        x: Any,
        context: Any = None,
        *,
        mask: Any = None,
        positions: Any = None,
        segment_ids: Any = None,
        cache: tuple[Any, RecurrentState] | None = None,
        deterministic: bool = True,
        rngs: Any = None,
        tap: Callable[[str, Any], Any] | None = None,
        hook: Any = None,
        **beside: Any,
    ) -> LayerOutput:
        """Mix tokens with those before them.

        Args:
            x: `[B, T, features]`.
            context: refused: a recurrence reads one sequence.
            mask: None or `masks.causal()`; the layer is causal either way.
            positions: of x, `[T]` or `[B, T]`; 0 .. T-1 if not given. Rotary positions see them.
            segment_ids: `[B, T]`; a run of equal ids is a document, negative = padding. With a cache only the sign
                counts.
            cache: (policy, RecurrentState); the policy is not asked.
            deterministic: no dropout.
            rngs: an `nnx.Rngs` or a key, for dropout.
            tap: `tap("head_out", o) -> o` sees, and may replace, the per-head outputs.
            hook: refused: it looks into the weights of attention, of which there are none.
            **beside: arrays `[B, T, ...]` that the layer needs beside x, if its class says so.

        Returns:
            LayerOutput(output `[B, T, features]`, the new state if there was a cache, aux).

        Raises:
            ValueError: shapes that do not fit, a context, another mask, a hook, positions together with a cache, too
                much or too little beside x.
        """
        x = jnp.asarray(x)
        if x.ndim != 3 or x.shape[-1] != self.features:
            raise ValueError(f"x must be [B, T, {self.features}], got {list(x.shape)}")
        if context is not None:
            raise ValueError(f"{type(self).__name__} reads one sequence; it has no cross attention")
        if hook is not None:
            raise ValueError(
                f"{type(self).__name__} has no attention weights that a hook could see; sites see its heads"
            )
        if mask is not None and not (isinstance(mask, Mask) and mask == masks.causal()):
            raise ValueError(f"{type(self).__name__} takes no mask but causal(); hide padding with segment_ids")
        if set(beside) != set(self.beside):
            raise ValueError(
                f"this {type(self).__name__} takes {', '.join(self.beside) or 'nothing'} beside x, got "
                f"{', '.join(beside) or 'nothing'}"
            )
        beside = {name: jnp.asarray(array) for name, array in beside.items()}
        for name, array in beside.items():
            if array.shape[:2] != x.shape[:2]:
                raise ValueError(f"{name} must be {[*x.shape[:2], '...']}, got {list(array.shape)}")
        ids = _checked_ids(segment_ids, x)
        state = None
        if cache is None:
            places = jnp.arange(x.shape[1])[None] if positions is None else jnp.atleast_2d(jnp.asarray(positions))
        else:
            if positions is not None:
                raise ValueError("positions cannot be given together with a cache, which counts them itself")
            state = cache[1]
            real = jnp.ones(x.shape[:2], bool) if ids is None else ids >= 0
            ids = None if ids is None else jnp.where(real, 0, -1)
            places = jnp.maximum(state.next[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0)
        if ids is not None:
            # Padding may hold anything, NaN too; it must not reach weights through 0 * NaN.
            (x, *others) = without_padding(ids, x, *beside.values())
            beside = dict(zip(beside, others, strict=True))
        o, new_state, aux = self.mix(
            x, segment_ids=ids, positions=places, state=state, deterministic=deterministic, rngs=rngs, **beside
        )
        if tap is not None:
            o = tap("head_out", o)
        y = self.output(o, x)
        if ids is not None:
            y = jnp.where((ids >= 0)[..., None], y, 0)
        if state is None:
            return LayerOutput(y, None, aux)
        new_state = RecurrentState(
            new_state.state, new_state.aux, new_state.conv, state.next + jnp.sum(real, axis=1, dtype=jnp.int32)
        )
        return LayerOutput(y, new_state, aux)


def _checked_ids(segment_ids: Any, x: jax.Array) -> jax.Array | None:
    if segment_ids is None:
        return None
    ids = jnp.asarray(segment_ids)
    if ids.ndim != 2 or ids.shape[0] not in (1, x.shape[0]) or ids.shape[1] != x.shape[1] or ids.dtype.kind not in "iu":
        raise ValueError(f"segment_ids must be integers {list(x.shape[:2])}, got {ids.dtype}{list(ids.shape)}")
    return jnp.broadcast_to(ids, x.shape[:2])


class HeadProjection(nnx.LinearGeneral):
    """A projection to heads: `[..., M]` -> `[..., heads, width]`.

    Args:
        features: M.
        heads: number of heads.
        width: of a head.
        axis: logical name of the axis of heads, for sharding.
        use_bias: whether there is a bias.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: for the initial values.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        width: int,
        *,
        axis: str = "heads",
        use_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            features,
            (heads, width),
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_metadata=axes("embed", axis, "head_dim"),
            bias_metadata=axes(axis, "head_dim"),
            rngs=rngs,
        )


class LowRank(nnx.Module):
    """Two linear maps with a narrow waist: x W_1 [activation] W_2 + b.

    Args:
        features: M.
        rank: width of the waist.
        outputs: width of the result.
        activation: between the two; none if not given.
        use_bias: whether the second has a bias.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: for the initial values.
    """

    def __init__(
        self,
        features: int,
        rank: int,
        outputs: int,
        *,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        shared = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.down = nnx.Linear(features, rank, use_bias=False, kernel_metadata=axes("embed", None), **shared)
        self.up = nnx.Linear(rank, outputs, use_bias=use_bias, kernel_metadata=axes(None, "heads"), **shared)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., M]` -> `[..., outputs]`."""
        y = self.down(x)
        return self.up(y if self.activation is None else self.activation(y))


class GatedOutput(nnx.LinearGeneral):
    """Norm of each head, gate, output projection: y = (norm(o_n) * act(x W_g)_n) concatenated, W_o.

    It is the projection W_o, so that trained weights of an attention layer's output find their place.

    Args:
        features: M.
        num_heads: N.
        value_dim: Dv.
        gate: "silu", "sigmoid", or None for no gate.
        gate_rank: waist of a gate that has two projections, the second with a bias; None for one without.
        norm: "rmsnorm" or "layernorm" over Dv, with weights that heads share.
        epsilon: of the norm.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: for the initial values.

    Raises:
        ValueError: an unknown gate or norm.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        value_dim: int,
        *,
        gate: str | None = "silu",
        gate_rank: int | None = None,
        norm: str = "rmsnorm",
        epsilon: float | int = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if gate is not None and gate not in GATES:
            raise ValueError(f"gate must be None or one of {', '.join(GATES)}, got {gate!r}")
        shared: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        super().__init__(
            (num_heads, value_dim),
            features,
            axis=(-2, -1),
            use_bias=False,
            kernel_metadata=axes("heads", "head_dim", "embed"),
            **shared,
        )
        self.activation = None if gate is None else GATES[gate]
        self.norm = make_norm(norm, value_dim, epsilon=epsilon, axis_name="head_dim", **shared)
        projection: Any = None
        if gate is not None and gate_rank is not None:
            projection = LowRank(features, gate_rank, num_heads * value_dim, **shared)
        elif gate is not None:
            projection = HeadProjection(features, num_heads, value_dim, **shared)
        self.gate = projection

    def __call__(self, o: jax.Array, x: jax.Array) -> jax.Array:
        """Per-head outputs `[B, T, N, Dv]` and the layer's input `[B, T, M]` to `[B, T, M]`."""
        o = self.norm(o)
        if self.gate is not None and self.activation is not None:
            o = o * self.activation(self.gate(x)).reshape(o.shape)
        return super().__call__(o)
