"""The window cache: the last W tokens, in a ring of slots.

    C = W + chunk - 1;   slot(p) = p mod C;   visible(i, j) = i - W < j <= i

A ring of W slots alone would be wrong for chunks of several tokens: late tokens of a chunk would overwrite keys that
its first queries still need.
"""

import dataclasses
from typing import Any

import numpy as np

from jattn.cache.protocol import CachePolicy, check_sizes
from jattn.mechanisms.entry import Cost, Entry, Paper
from jattn.softmax import masks
from jattn.softmax.masks import Mask


@dataclasses.dataclass(frozen=True)
class WindowCache(CachePolicy):
    """Keep the last `window` tokens; equals the `sliding_window(window)` mask on full attention.

    C = W + chunk - 1; slot(p) = p mod C; query i sees i - W < j <= i.

    Args:
        window: W, keys that a query sees, its own included.
        chunk: the largest number of tokens of one append.

    Raises:
        ValueError: a size is not positive.

    Example:
        >>> WindowCache(window=4, chunk=3).capacity
        6

    Source: Longformer (arXiv 2004.05150); a ring buffer as in Mistral 7B (arXiv 2310.06825).
    """

    window: int
    chunk: int = 1

    def __post_init__(self) -> None:
        check_sizes("WindowCache", window=self.window, chunk=self.chunk)

    @property
    def capacity(self) -> int:
        """C, the number of slots."""
        return self.window + self.chunk - 1

    @property
    def max_chunk(self) -> int:
        """Largest number of tokens that one append takes."""
        return self.chunk

    @property
    def forgets(self) -> bool:
        """Old tokens are overwritten."""
        return True

    def slot_of(self, positions: Any) -> Any:
        """Slot p mod C."""
        return positions % self.capacity

    def visible(self, query_positions: Any, key_positions: Any) -> Any:
        """The last W positions."""
        return key_positions > query_positions - self.window

    def parallel_mask(self) -> Mask:
        """The sliding window."""
        return masks.sliding_window(self.window)


def _example(key, length):
    return (), {"window": int(np.maximum(length // 2, 1)), "chunk": 2}


ENTRY = Entry(
    name="window_cache",
    kind="cache",
    family="cache",
    function=WindowCache,
    papers=(
        Paper("Longformer: The Long-Document Transformer", "2004.05150", 2020),
        Paper("Mistral 7B", "2310.06825", 2023),
    ),
    patterns=("causal self",),
    cost=Cost(flops="T", memory="1"),
    decode="fixed: window + chunk - 1 slots",
    example=_example,
    fidelity="paper",
)
