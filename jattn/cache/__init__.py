"""KV caches: one protocol, and policies that say what is kept and where.

One step of decoding is always append -> attention over the slots -> evict. What a query may see follows from the
positions that stand beside the slots, never from their order.
"""

from jattn.cache.full_cache import FullCache
from jattn.cache.protocol import CachePolicy, KVCache, nbytes, reorder, slots_for_heads, token_positions
from jattn.cache.recurrent import RecurrentState
from jattn.cache.sink_window_cache import SinkWindowCache
from jattn.cache.window_cache import WindowCache

__all__ = [
    "CachePolicy",
    "FullCache",
    "KVCache",
    "RecurrentState",
    "SinkWindowCache",
    "WindowCache",
    "nbytes",
    "reorder",
    "slots_for_heads",
    "token_positions",
]
