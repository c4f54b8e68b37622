"""Memory as a layer (Titans MAL): attention in a window over what a neural memory answers.

    y = M([P ; x]),   o = window_attention(y)

P are learned tokens before every document. The window is a plain one: it counts tokens of [P ; x] back from the query,
the own one included, and P falls out of it like any other. There is no official code. Source: Titans: Learning to
Memorize at Test Time (arXiv 2501.00663).
"""

from __future__ import annotations

from typing import Any

import jax

from jattn.cache import RecurrentState
from jattn.mechanisms.entry import Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import normal
from jattn.mechanisms.memory.titans_parts import WindowedTitansLayer


class TitansMAL(WindowedTitansLayer):
    """Window attention over the outputs of a neural memory.

    o = window_attention(M([P ; x]))

    Args:
        features: M, width of x and of the output.
        num_heads: N, heads of the attention and of the memory.
        num_kv_heads: K of the attention; N if not given.
        head_dim: D; features / num_heads if not given.
        window: tokens that the attention sees, the own one included.
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
        >>> TitansMAL(16, 2, window=4, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 16))).output.shape
        (1, 5, 16)

    Source: Titans: Learning to Memorize at Test Time (arXiv 2501.00663).
    """

    def mix(
        self, x: jax.Array, *, segment_ids: Any, positions: jax.Array, state: RecurrentState | None, **options: Any
    ) -> tuple[jax.Array, RecurrentState, dict[str, Any]]:
        """See `RecurrentLayer`; the heads are those of the attention."""
        common = {"segment_ids": segment_ids, "positions": positions}
        remembered, lead, after = self.remember(x, state=state, **common)
        prefix = self.prefix(x)
        first = prefix if lead is None else self.memory.output(lead, prefix)
        recent = None if state is None else state.aux[1]
        o, recent = self.attend(self.memory.output(remembered, x), first, recent=recent, **common)
        return o, RecurrentState(after.state, (after.aux, recent), after.conv), {}

    def output(self, o: jax.Array, x: jax.Array) -> jax.Array:
        """See `RecurrentLayer`."""
        return self.attention.output(o)


def _example(key, length):
    size = 2 if length < 64 else 32
    options = {"num_kv_heads": 1, "head_dim": 4, "window": 3, "num_persistent": size, "chunk_size": size}
    return LayerExample((8, 2), {**options, "memory_options": {"expansion": 2}}, (normal(key, 2, length, 8),), {})


ENTRY = Entry(
    name="TitansMAL",
    kind="block",
    family="memory",
    layer=TitansMAL,
    papers=(Paper("Titans: Learning to Memorize at Test Time", "2501.00663", 2024),),
    patterns=("causal self",),
    cost=Cost(flops="T", memory="T"),
    decode="the state of its NeuralMemory, keys and values of the last window - 1 tokens",
    example=_example,
    fidelity="inferred: how the memory's gates are made",
)
