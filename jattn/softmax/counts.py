"""How many keys each query sees: what temperatures and normalizers that depend on the row's length must use."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.softmax.api import dot_product_attention
from jattn.softmax.masks import Mask
from jattn.softmax.normalizers import elu1


def visible_counts(
    batch: int,
    num_heads: int,
    query_length: int,
    key_length: int,
    *,
    mask: Any = None,
    is_causal: bool = False,
    segment_ids: Any = None,
    query_positions: Any = None,
    key_positions: Any = None,
) -> jax.Array:
    """The number of visible keys of every row.

    n_i = sum_j visible_ij; padding and other documents do not count, positions do not matter as such.

    Args:
      batch: B.
      num_heads: N, query heads.
      query_length: T.
      key_length: S.
      mask: booleans that broadcast to `[B, N, T, S]`, or a `Mask`.
      is_causal: key position <= query position.
      segment_ids: `[B, T]`, or a pair of `[B, T]` and `[B, S]`; negative = padding.
      query_positions: `[B|1, T]` integers, 0..T-1 if None.
      key_positions: `[B|1, S]` integers, 0..S-1 if None.

    Returns:
      float32 `[B|1, T, N|1]`, exact integers; the axes are 1 where rows or heads cannot differ.

    Raises:
      ValueError: an argument that `dot_product_attention` would refuse.

    Example:
      >>> visible_counts(1, 2, 3, 5, is_causal=True)[0, :, 0].tolist()
      [1.0, 2.0, 3.0]
      >>> visible_counts(1, 2, 3, 3, is_causal=True, segment_ids=np.array([[-1, 0, 0]]))[0, :, 0].tolist()
      [0.0, 1.0, 2.0]
    """
    if mask is None and segment_ids is None and query_positions is None and key_positions is None:
        rows = np.arange(1, query_length + 1) if is_causal else np.full(query_length, key_length)
        return jnp.asarray(np.minimum(rows, key_length)[None, :, None], jnp.float32)
    # The engine counts: every visible key has weight elu(0) + 1 = 1 and value 1. So dead tiles are skipped here, too.
    shared = mask is None or (not isinstance(mask, Mask) and (jnp.ndim(mask) < 3 or jnp.shape(mask)[-3] == 1))
    heads = 1 if shared else num_heads
    ones = jnp.ones((batch, key_length, heads, 1), jnp.float32)
    return dot_product_attention(
        jnp.zeros((batch, query_length, heads, 1), jnp.float32),
        ones,
        ones,
        mask=mask,
        scale=1.0,
        is_causal=is_causal,
        segment_ids=segment_ids,
        query_positions=query_positions,
        key_positions=key_positions,
        normalizer=elu1(),
    )[..., 0]
