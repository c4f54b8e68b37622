"""The cache of StreamingLLM: the first tokens of the stream (sinks) and the last W tokens.

    C = num_sinks + W + chunk - 1
    slot(p) = p if p < num_sinks else num_sinks + (p - num_sinks) mod (C - num_sinks)
    visible(i, j) = j <= i and (j < num_sinks or j > i - W)

`positions="cache"` numbers the visible entries of a query by their place in the cache, which keeps every distance
within what training has seen. Keys need no re-rotation for that. With m entries visible the query stands at m - 1,
a window key keeps its true distance, and a sink key j is seen from position min(i, num_sinks + W - 1). So the query
is rotated twice, and one call with doubled head dimension serves both groups:

    q = [R(min(i, num_sinks + W - 1)) q, R(i) q],   k = [k, 0] for sinks, [0, k] for the window
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jattn.cache.protocol import CachePolicy, KVCache, check_sizes
from jattn.mechanisms.entry import Cost, Entry, Paper
from jattn.softmax import masks
from jattn.softmax.masks import Mask


@dataclasses.dataclass(frozen=True)
class SinkWindowCache(CachePolicy):
    """Keep the first `num_sinks` tokens of the stream and the last `window`.

    Query i sees j <= i with j < num_sinks or j > i - W.

    Args:
        window: W, recent keys that a query sees, its own included.
        num_sinks: leading tokens that are never evicted.
        chunk: the largest number of tokens of one append.
        positions: `"cache"` (positions within the cache, the published method) or `"original"` (equals the
            `sliding_window(window, num_sinks)` mask on full attention).

    Raises:
        ValueError: a size is out of range, or `positions` is neither word.

    Example:
        >>> SinkWindowCache(window=8, num_sinks=4, chunk=2).capacity
        13

    Source: Efficient Streaming Language Models with Attention Sinks (arXiv 2309.17453), published code; there keys
    are stored raw and rotated again at every step, which gives the same logits.
    """

    window: int
    num_sinks: int = 4
    chunk: int = 1
    positions: str = "cache"

    def __post_init__(self) -> None:
        check_sizes("SinkWindowCache", window=self.window, chunk=self.chunk, num_sinks=self.num_sinks)
        if self.positions not in ("cache", "original"):
            raise ValueError(f"SinkWindowCache: positions must be 'cache' or 'original', got {self.positions!r}")

    @property
    def capacity(self) -> int:
        """C, the number of slots."""
        return self.num_sinks + self.window + self.chunk - 1

    @property
    def max_chunk(self) -> int:
        """Largest number of tokens that one append takes."""
        return self.chunk

    @property
    def forgets(self) -> bool:
        """Old tokens are overwritten."""
        return True

    def slot_of(self, positions: Any) -> Any:
        """The sinks have slots of their own, the others share a ring."""
        ring = self.num_sinks + (positions - self.num_sinks) % (self.capacity - self.num_sinks)
        return jnp.where(positions < self.num_sinks, positions, ring)

    def visible(self, query_positions: Any, key_positions: Any) -> Any:
        """Sinks and the last W positions."""
        return (key_positions < self.num_sinks) | (key_positions > query_positions - self.window)

    def parallel_mask(self) -> Mask:
        """The sliding window with sinks.

        Raises:
            ValueError: `positions="cache"`, which changes what queries see beside hiding keys.
        """
        if self._renumbers:
            raise ValueError(
                'SinkWindowCache(positions="cache") moves sinks along with the query, which no mask can say; with '
                'positions="original" it is one'
            )
        return masks.sliding_window(self.window, self.num_sinks)

    @property
    def _renumbers(self) -> bool:
        return self.positions == "cache" and self.num_sinks > 0

    def _seen_from(self, query_positions: Any) -> Any:
        return jnp.minimum(query_positions, self.num_sinks + self.window - 1)

    def read(
        self, cache: KVCache, query: Any, query_positions: Any, rotate: Callable[[Any, Any], Any]
    ) -> tuple[Any, Any, Any]:
        """As the protocol says; with `positions="cache"` the head dimension is doubled (see the module)."""
        if not self._renumbers:
            return super().read(cache, query, query_positions, rotate)
        place = jnp.maximum(query_positions, 0)
        doubled = jnp.concatenate([rotate(query, self._seen_from(place)), rotate(query, place)], axis=-1)
        sink = (cache.key_positions[:, 0] < self.num_sinks)[:, :, None, None]
        nothing = jnp.zeros_like(cache.key)
        keys = jnp.concatenate([jnp.where(sink, cache.key, nothing), jnp.where(sink, nothing, cache.key)], axis=-1)
        return doubled, keys, cache.value

    def seen_positions(self, cache: KVCache, query_positions: Any) -> tuple[Any, Any]:
        """As the protocol says; sinks move along with the query once the cache is full, so that distances stay."""
        i, j = super().seen_positions(cache, query_positions)
        if not self._renumbers:
            return i, j
        return i, jnp.where((j >= 0) & (j < self.num_sinks), j + i - self._seen_from(i), j)


def _example(key, length):
    return (), {"window": int(np.maximum(length // 2, 1)), "num_sinks": 2, "chunk": 2}


ENTRY = Entry(
    name="sink_window_cache",
    kind="cache",
    family="cache",
    function=SinkWindowCache,
    papers=(Paper("Efficient Streaming Language Models with Attention Sinks", "2309.17453", 2023),),
    patterns=("causal self",),
    cost=Cost(flops="T", memory="1"),
    decode="fixed: num_sinks + window + chunk - 1 slots",
    example=_example,
    fidelity="official code",
)
