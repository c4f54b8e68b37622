"""jattn: the attention library for JAX."""

from typing import Any

from jattn.recurrence.api import linear_recurrence, linear_recurrence_step
from jattn.softmax import compilers as layouts
from jattn.softmax import masks, normalizers, score_mods
from jattn.softmax.api import dot_product_attention, explain
from jattn.softmax.gather import gather_attention
from jattn.softmax.layout import BlockLayout
from jattn.softmax.masks import Mask
from jattn.softmax.merge import merge_lse
from jattn.softmax.normalizers import Normalizer
from jattn.softmax.paged import paged_attention
from jattn.softmax.score_mods import Operand, ScoreMod
from jattn.softmax.segments import (
    cu_seqlens_from_segment_ids,
    pack_cu_seqlens,
    renumber_segments,
    segment_ids_from_cu_seqlens,
    unpack_cu_seqlens,
)
from jattn.softmax.topk import topk_mask

__version__ = "0.1.0"

__all__ = [
    "BlockLayout",
    "Mask",
    "Normalizer",
    "Operand",
    "ScoreMod",
    "cu_seqlens_from_segment_ids",
    "dot_product_attention",
    "explain",
    "gather_attention",
    "get",
    "layouts",
    "linear_recurrence",
    "linear_recurrence_step",
    "masks",
    "merge_lse",
    "normalizers",
    "pack_cu_seqlens",
    "paged_attention",
    "renumber_segments",
    "score_mods",
    "segment_ids_from_cu_seqlens",
    "topk_mask",
    "unpack_cu_seqlens",
]


def get(name: str) -> Any:
    """A catalogued mechanism by name: its function, or its layer class.

    Args:
      name: a name of `jattn catalog`.

    Raises:
      ValueError: an unknown name; the message holds the nearest ones.

    Example:
      >>> import jattn
      >>> jattn.get("softmax_attention").__name__
      'softmax_attention'
    """
    from jattn import catalog

    return catalog.get(name)
