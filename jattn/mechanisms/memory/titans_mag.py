"""Memory as a gate (Titans MAG): attention in a window and a neural memory side by side.

    x~ = [P ; x],   y = window_attention(x~),   m = M(x~),   o = rmsnorm(y; w_y) * sigmoid(rmsnorm(m; w_m))

P are learned tokens, which every query sees whatever its window; the window counts tokens of x~ back from the query,
the own one included. The memory writes P first. There is no official code; which non-linearity the gate has, and on
which branch, is chosen here. Source: Titans: Learning to Memorize at Test Time (arXiv 2501.00663).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.cache import RecurrentState
from jattn.mechanisms.entry import Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import normal
from jattn.mechanisms.memory.titans_parts import BranchGate, WindowedTitansLayer


class TitansMAG(WindowedTitansLayer):
    """Window attention with persistent tokens, gated by a neural memory of everything before.

    o = rmsnorm(y; w_y) * sigmoid(rmsnorm(m; w_m)), y = window_attention([P ; x]), m = M([P ; x])

    Args:
        features: M, width of x and of the output.
        num_heads: N, heads of the attention and of the memory.
        num_kv_heads: K of the attention; N if not given.
        head_dim: D; features / num_heads if not given.
        window: tokens that the attention sees, the own one included, beside the persistent ones.
        num_persistent: Np, a multiple of the memory's chunk_size, so that documents start at a border.
        chunk_size: b of the memory.
        memory_options: other arguments of `NeuralMemory`, by name.
        position: None, or an object with `rotate`, for the attention: P stands at 0 .. Np - 1, x at Np, Np + 1, ...
        epsilon: of the norms.
        dtype: of the computation; that of inputs and parameters if not given.
        param_dtype: of the parameters.
        rngs: for the initial values.

    Raises:
        ValueError: sizes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> TitansMAG(16, 2, window=4, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 16))).output.shape
        (1, 5, 16)

    Source: Titans: Learning to Memorize at Test Time (arXiv 2501.00663).
    """

    sees_persistent = True

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        shared: dict[str, Any] = {"epsilon": epsilon, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        super().__init__(features, num_heads, **shared, **options)
        self.gate = BranchGate(features, **shared)

    def mix(
        self, x: jax.Array, *, segment_ids: Any, positions: jax.Array, state: RecurrentState | None, **options: Any
    ) -> tuple[jax.Array, RecurrentState, dict[str, Any]]:
        """See `RecurrentLayer`; the heads of the memory stand behind those of the attention."""
        common = {"segment_ids": segment_ids, "positions": positions}
        remembered, _, after = self.remember(x, state=state, **common)
        recent = None if state is None else state.aux[1]
        o, recent = self.attend(x, self.prefix(x), recent=recent, **common)
        return jnp.concatenate([o, remembered], 2), RecurrentState(after.state, (after.aux, recent), after.conv), {}

    def output(self, o: jax.Array, x: jax.Array) -> jax.Array:
        """See `RecurrentLayer`."""
        attended, remembered = jnp.split(o, 2, axis=2)
        return self.gate(self.attention.output(attended), self.memory.output(remembered, x))


def _example(key, length):
    size = 2 if length < 64 else 32
    options = {"num_kv_heads": 1, "head_dim": 4, "window": 3, "num_persistent": size, "chunk_size": size}
    return LayerExample((8, 2), {**options, "memory_options": {"expansion": 2}}, (normal(key, 2, length, 8),), {})


ENTRY = Entry(
    name="TitansMAG",
    kind="block",
    family="memory",
    layer=TitansMAG,
    papers=(Paper("Titans: Learning to Memorize at Test Time", "2501.00663", 2024),),
    patterns=("causal self",),
    cost=Cost(flops="T", memory="T"),
    decode="the state of its NeuralMemory, keys and values of the last window - 1 tokens",
    example=_example,
    fidelity="inferred: the non-linearity of the gate, how the memory's gates are made",
)
