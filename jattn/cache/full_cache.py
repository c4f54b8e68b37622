"""The full cache: every token is kept, slot = position.

    slot(p) = p;   visible(i, j) = j <= i

With `causal=False` it holds a condition (the keys of a cross attention): appended once, seen by every query.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jattn.cache.protocol import CachePolicy, check_sizes
from jattn.mechanisms.entry import Cost, Entry
from jattn.softmax import masks
from jattn.softmax.masks import Mask


@dataclasses.dataclass(frozen=True)
class FullCache(CachePolicy):
    """Keep every token, up to a fixed number.

    slot(p) = p; query i sees keys j <= i (every key if not causal).

    A token beyond the capacity is not stored and overwrites nothing; `cache.next > capacity` tells that it happened.

    Args:
        max_tokens: C, the largest number of tokens of a row.
        causal: whether queries see earlier positions only; False for the keys of a cross attention.

    Raises:
        ValueError: `max_tokens` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> policy = FullCache(4)
        >>> cache = policy.init(1, 1, 2, 2)
        >>> cache, positions = policy.append(cache, jnp.ones((1, 2, 1, 2)), jnp.ones((1, 2, 1, 2)))
        >>> policy.mask(cache, positions)[0, 0].astype(int).tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0]]
    """

    max_tokens: int
    causal: bool = True

    def __post_init__(self) -> None:
        check_sizes("FullCache", max_tokens=self.max_tokens)

    @property
    def capacity(self) -> int:
        """C, the number of slots."""
        return self.max_tokens

    def slot_of(self, positions: Any) -> Any:
        """Slot p, or C for a position beyond the capacity."""
        return jnp.minimum(positions, self.max_tokens)

    def parallel_mask(self) -> Mask:
        """Causal, or full for conditions."""
        return masks.causal() if self.causal else masks.full()


def _example(key, length):
    return (), {"max_tokens": int(np.maximum(length, 1))}


ENTRY = Entry(
    name="full_cache",
    kind="cache",
    family="cache",
    function=FullCache,
    patterns=("causal self", "noncausal cross", "causal cross"),
    cost=Cost(flops="T^2", memory="T"),
    decode="one slot a token",
    example=_example,
    fidelity="paper",
)
