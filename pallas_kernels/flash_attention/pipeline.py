"""What all backends of the attention kernel share: tile inputs, lists of tiles, and the functions between products."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Place(NamedTuple):
    """Where a tile lies: batch row, query head, row numbers `[Bq, 1]` and column numbers `[1, Bk]`, int32."""

    b: Any
    h: Any
    row: Any
    column: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileInput:
    """An array that tiles read beside queries, keys and values.

    `[B|1, N|1, T|1, S|1]`, read at the rows and columns of the tile; with `center` a table `[B|1, N|1, 1, R]`, read at
    (key position - query position + center) and clipped to its ends; with `by_tile` `[B|1, N|1, nQ|1, nK|1]`, a number
    for the whole tile; with `packed` bits of pairs, int32 `[B|1, N|1, nQ * nK, ceil(Bq / 32), Bk]`, that tiles hold as
    0 and 1, the first row in the lowest bit; with `gathered` of any shape, and tiles hold a function
    `read(*index) -> entries` of one non-negative int32 index an axis, in range, that broadcast against each other.
    """

    array: jax.Array
    center: int | None = dataclasses.field(default=None, metadata={"static": True})
    by_tile: bool = dataclasses.field(default=False, metadata={"static": True})
    gathered: bool = dataclasses.field(default=False, metadata={"static": True})
    packed: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def reads(self) -> tuple[bool, ...]:
        """Which of the axes are more than one long."""
        return tuple(size != 1 for size in self.array.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileLists:
    """For each tile of one side the tiles of the other that are visited: all visible ones, then partly visible ones.

    Counts `[B|1, N|1, n]` and indices `[B|1, N|1, n, M]`, int32. `any_full` and `any_partial` are False only where no
    such tile can exist.
    """

    full_count: jax.Array
    full_index: jax.Array
    partial_count: jax.Array
    partial_index: jax.Array
    any_full: bool = dataclasses.field(default=True, metadata={"static": True})
    any_partial: bool = dataclasses.field(default=True, metadata={"static": True})


Tiles = Mapping[str, Any]
LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """What happens between the two products, on one tile.

    Args:
        modify: `modify(logits, place, tiles) -> logits`: cap, score functions, bias. None changes nothing.
        visible: `visible(place, tiles) -> bool`, asked in partial tiles only.
        drop: `drop(weights, place, tiles) -> weights`: dropout. None drops nothing.
        phi: `phi(logits) -> weights` of a pointwise normalizer; None for softmax.
        guard: whether partial tiles may hold rows or columns that nobody sees, whose values must be hidden.
    """

    visible: Callable[[Place, Tiles], Any]
    modify: Callable[[Any, Place, Tiles], Any] | None = None
    drop: Callable[[Any, Place, Tiles], Any] | None = None
    phi: Callable[[Any], Any] | None = None
    guard: bool = True

    def logits(self, products: Any, visible: Any, place: Place, tiles: Tiles) -> Any:
        """Modified logits; finite where not visible as long as the products are."""
        if visible is not None and (self.modify is not None or self.phi is not None):
            products = jnp.where(visible, products, 0)
        return products if self.modify is None else self.modify(products, place, tiles)

    def exponents(self, products: Any, scale: float, visible: Any, place: Place, tiles: Tiles) -> tuple[Any, float]:
        """What the softmax raises 2 to the power of, up to a factor, which comes second; -inf where not visible.

        The factor is left to the exponential, where it costs nothing: 2 ** (x * factor - y) is one fused operation.
        """
        if self.modify is None and scale > 0:
            logits, factor = products, scale * LOG2_E
        else:
            logits, factor = self.logits(products * scale, visible, place, tiles), LOG2_E
        return (logits if visible is None else jnp.where(visible, logits, -jnp.inf)), factor

    def weights(self, products: Any, visible: Any, place: Place, tiles: Tiles, lse: Any) -> tuple[Any, Any]:
        """Weights after dropout, and before it; `lse` `[Bq, 1]` is 0 where a row sees nothing, None without softmax."""
        logits = self.logits(products, visible, place, tiles)
        if self.phi is not None:
            raw = self.phi(logits)
        else:
            raw = jnp.exp((logits if visible is None else jnp.where(visible, logits, -jnp.inf)) - lse)
        raw = raw if visible is None else jnp.where(visible, raw, 0)
        return (raw if self.drop is None else self.drop(raw, place, tiles)), raw

    def pull(
        self,
        products: Any,
        scale: float,
        visible: Any,
        place: Place,
        tiles: Tiles,
        lse: Any,
        cotangents: Any,
        wanted: Sequence[str],
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Weights after dropout, and cotangents of the scaled products and of the wanted inputs.

        `cotangents` are those of the weights after dropout `[Bq, Bk]` and of the rows' sums of weights before it
        `[Bq, 1]`. An input that does not vary along the keys gets a cotangent `[Bq, 1]`.
        """
        if self.modify is None and self.phi is None and self.drop is None:
            weights = jnp.exp2(products * (scale * LOG2_E) - lse * LOG2_E)
            products_ct = weights * (cotangents[0] + cotangents[1])
            if visible is not None:
                weights, products_ct = jnp.where(visible, weights, 0), jnp.where(visible, products_ct, 0)
            return weights, products_ct, {}

        def weigh(products, chosen):
            return self.weights(products, visible, place, {**tiles, **chosen}, lse)

        # A cotangent a row: fewer numbers are summed one after the other than in one for the whole tile.
        chosen = {
            n: x if jnp.ndim(x) and x.shape[1] != 1 else jnp.broadcast_to(x, (products.shape[0], 1))
            for n, x in tiles.items()
            if n in wanted
        }
        (weights, raw), pull = jax.vjp(weigh, products * scale, chosen)
        return weights, *pull((cotangents[0], jnp.broadcast_to(cotangents[1], raw.shape)))


@dataclasses.dataclass(frozen=True)
class Backward:
    """What the backward kernels read beside the forward ones.

    Args:
        output: cotangent of the output (pointwise: of the unscaled sums), `[B, T, N, Dv]`.
        lse: log-sum-exp of the rows `[B, N, T]`, 0 where a row sees nothing; zeros for pointwise normalizers.
        total: cotangent of the sum of unnormalized weights of each row, `[B, N, T]` float32.
        code: class of every tile, `[B|1, N|1, nQ, nK]`: 0 nothing is visible, 1 something is, 2 everything is; for
            kernels that do not find all they need in lists.
        columns: `TileLists` of query tiles by key tile, for kernels that walk along lists.
    """

    output: Any
    lse: Any
    total: Any
    code: Any = None
    columns: Any = None


def summed_like(cotangent: Any, given: TileInput) -> Any:
    """Sum of `[B, N, T|1, S|1]` over the axes that the input broadcasts over."""
    axes = tuple(axis for axis, real in enumerate(given.reads) if not real)
    return jnp.sum(cotangent, axis=axes, keepdims=True)


def result_shape(shape: tuple[int, ...], dtype: Any, arrays: Sequence[Any]) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result: varying over every mesh axis that an argument varies over, under shard_map."""

    def join(*given):
        return jnp.zeros(shape, dtype) + sum(jnp.zeros_like(x, shape=(), dtype=dtype) for x in given)

    return jax.eval_shape(join, *arrays)
