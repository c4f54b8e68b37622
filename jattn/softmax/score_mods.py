"""Score mods: functions of one logit and its place, with arrays whose indexing is declared.

The declaration is what lets one score mod run in the reference, the blockwise path and kernels, with gradients
to its arrays: whoever evaluates a tile knows which part of each array the tile reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("scalar", "head", "query", "key", "pair", "offset")
_CORE_RANK = {"scalar": 0, "head": 0, "query": 1, "key": 1, "pair": 2, "offset": 1}
_SHAPES = {
    "scalar": "[], [N] or [B|1, N|1]",
    "head": "[N|1] or [B|1, N|1]",
    "query": "[T], [N|1, T] or [B|1, N|1, T]",
    "key": "[S], [N|1, S] or [B|1, N|1, S]",
    "pair": "[T, S], [N|1, T, S] or [B|1, N|1, T, S]",
    "offset": "[R], [N|1, R] or [B|1, N|1, R]",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operand:
    """An array that a score mod reads, with the way it is indexed.

    Shapes, with optional leading axes `[N, ...]` or `[B|1, N|1, ...]`: scalar `[]`; head `[N]` or `[B, N]`; query
    `[T]`; key `[S]`; pair `[T, S]`; offset `[R]`, read at key position - query position + center and clipped to
    its ends (center: (R - 1) // 2 unless given). query, key and pair are read by row index, not by position. The array
    is differentiable if it is a float one.

    Args:
      array: the values.
      kind: how they are indexed.
      center: the index of offset 0 in an offset table.

    Raises:
      ValueError: an unknown kind, or a center for another kind than offset.

    Example:
      >>> import jattn, numpy as np
      >>> jattn.Operand(np.zeros(3), "head").kind
      'head'
    """

    array: Any
    kind: str = dataclasses.field(metadata={"static": True})
    center: int | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"Operand: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.center is not None and self.kind != "offset":
            raise ValueError(f"Operand: center belongs to kind 'offset', got {self.center} with kind {self.kind!r}")

    def broadcastable(self, name: str, batch: int, num_heads: int, query_length: int, key_length: int):
        """The array as `[B|1, N|1, T|1, S|1]`, or `[B|1, N|1, R]` for offsets.

        Args:
          name: the operand's name, for the message.
          batch: B.
          num_heads: N, query heads.
          query_length: T.
          key_length: S.

        Returns:
          The array, reshaped.

        Raises:
          ValueError: the shape does not fit the kind.
        """
        array = jnp.asarray(self.array)
        core = _CORE_RANK[self.kind]
        ranks = {"head": (1, 2)}.get(self.kind, (core, core + 1, core + 2))
        sizes = {"query": (query_length,), "key": (key_length,), "pair": (query_length, key_length)}.get(self.kind, ())
        shape = array.shape
        tail = shape[len(shape) - core :]
        lead = (1,) * (2 + core - len(shape)) + shape[: len(shape) - core]
        fits = tail == sizes if self.kind != "offset" else 0 not in tail
        if len(shape) not in ranks or not fits or lead[0] not in (1, batch) or lead[1] not in (1, num_heads):
            raise ValueError(
                f"score_mod operand {name!r} of kind {self.kind!r} has shape {shape}; expected {_SHAPES[self.kind]} "
                f"with B={batch}, N={num_heads}, T={query_length}, S={key_length}"
            )
        return array.reshape(
            lead + {"query": (*tail, 1), "key": (1, *tail), "pair": tail, "offset": tail}.get(self.kind, (1, 1))
        )

    def offset_center(self) -> int:
        """The index of offset 0 in an offset table."""
        return (np.shape(self.array)[-1] - 1) // 2 if self.center is None else self.center


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScoreMod:
    """A modification of the logits after scale, temperature and soft cap, before bias and mask.

    new_logit = function(logit, b, h, i, j, **tiles)

    `b`, `h` are batch row and query head, `i`, `j` query and key positions; `tiles` holds, by name, the part of each
    operand that the tile reads, all broadcastable against `logit`. `first >> second` chains. The function must be
    module-level, elementwise in the logit, and finite (with its derivatives) at hidden pairs, too: there it is called
    with logit 0, and its result is dropped.

    Args:
      function: the function, or a tuple of functions that run one after the other.
      operands: the arrays it reads, by name; for a tuple of functions a tuple of such mappings.

    Raises:
      ValueError: the numbers of functions and of mappings differ (when first used).
      TypeError: chained with something else than a ScoreMod.

    Example:
      >>> import jax.numpy as jnp, jattn
      >>> def add_slope(logit, b, h, i, j, slope):
      ...     return logit + slope * (j - i)
      >>> slope = jattn.Operand(jnp.array([0.5, 0.25]), "head")
      >>> mod = jattn.ScoreMod(add_slope, {"slope": slope})
      >>> x = jnp.ones((1, 3, 2, 4))
      >>> jattn.dot_product_attention(x, x, x, is_causal=True, score_mod=mod).shape
      (1, 3, 2, 4)

    Source: FlexAttention (arXiv:2412.05496).
    """

    function: Callable[..., Any] | tuple[Callable[..., Any], ...] = dataclasses.field(metadata={"static": True})
    operands: Mapping[str, Operand] | tuple[Mapping[str, Operand], ...] = dataclasses.field(default_factory=dict)

    def __rshift__(self, other: ScoreMod) -> ScoreMod:
        if not isinstance(other, ScoreMod):
            raise TypeError(f"score mods chain with score mods, got {type(other).__name__}")
        return ScoreMod(
            tuple(f for f, _ in self.steps) + tuple(f for f, _ in other.steps),
            tuple(o for _, o in self.steps) + tuple(o for _, o in other.steps),
        )

    @property
    def steps(self) -> tuple[tuple[Callable[..., Any], Mapping[str, Operand]], ...]:
        """The chained functions with their operands, first to last."""
        if isinstance(self.function, tuple):
            if not isinstance(self.operands, tuple) or len(self.operands) != len(self.function):
                raise ValueError(
                    f"ScoreMod: {len(self.function)} functions need as many mappings, got {self.operands!r}"
                )
            return tuple(zip(self.function, self.operands, strict=True))
        if not isinstance(self.operands, Mapping):
            raise ValueError(f"ScoreMod: operands must map names to Operands, got {type(self.operands).__name__}")
        return ((self.function, self.operands),)

    def flat_operands(self) -> dict[str, Operand]:
        """All operands of the chain, keyed `step/name`."""
        return {f"{n}/{name}": op for n, (_, ops) in enumerate(self.steps) for name, op in ops.items()}

    def without_arrays(self) -> ScoreMod:
        """The same chain with the kinds of its operands only, for engines that hold the arrays elsewhere."""
        bare = tuple(
            {
                n: Operand(None, op.kind, op.offset_center() if op.kind == "offset" else None)
                for n, op in operands.items()
            }
            for _, operands in self.steps
        )
        return ScoreMod(tuple(function for function, _ in self.steps), bare)

    def apply(self, logit, b, h, i, j, tiles: Mapping[str, Any]):
        """Run the chain on a tile; `tiles` is keyed like `flat_operands`."""
        for n, (function, operands) in enumerate(self.steps):
            logit = function(logit, b, h, i, j, **{name: tiles[f"{n}/{name}"] for name in operands})
        return logit
