"""Block layouts from what a dynamic selector computes: scores, probabilities, and choices per query."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.softmax.block_masks import as_four_axes, check_sizes, from_block_mask, make_layout
from jattn.softmax.layout import BlockLayout
from jattn.softmax.masks import Mask
from jattn.softmax.predicates import token_selection
from jattn.softmax.tiling import make_grid, over_shared_heads, tile_classes
from jattn.softmax.topk import topk_mask

__all__ = ["from_cumulative", "from_token_selection", "from_topk"]


def _module_of(*arrays: Any) -> Any:
    return jnp if any(isinstance(x, jax.Array) for x in arrays) else np


def from_topk(
    scores: Any, k: Any, *, forced: Any = None, allowed: Any = None, predicate: Mask | None = None, **sizes: Any
) -> BlockLayout:
    """Keeps the k best kv tiles of every q tile.

    live = topk_mask(scores, k, forced=forced, allowed=allowed)

    Args:
      scores: [Bb, Hb, nQ, nK] or [nQ, nK].
      k: Tiles a row; forced ones count.
      forced: Booleans broadcastable to scores; all kept, even if they exceed k.
      allowed: Booleans broadcastable to scores; the others are never kept, not even if forced.
      predicate: As for `from_block_mask`.
      **sizes: query_slots, key_slots, query_block, key_block, full, query_perm, key_perm and capacity of
        `from_block_mask`.

    Returns:
      A BlockLayout; it carries no gradient.

    Raises:
      ValueError: As for `topk_mask` and `from_block_mask`.

    Example:
      >>> import numpy as np
      >>> scores = np.array([[0.0, 1.0, 1.0], [np.nan, -np.inf, 0.0]])
      >>> layout = from_topk(scores, 1, query_slots=16, key_slots=24, query_block=8, key_block=8)
      >>> layout.live_map()[0, 0].astype(int).tolist()
      [[0, 1, 0], [0, 0, 1]]

    Source: MoBA (arXiv 2502.13189) and most dynamic selectors.
    """
    scores = as_four_axes("scores", scores)
    live = topk_mask(scores, k, forced=forced, allowed=allowed)
    return from_block_mask(live, predicate, forced=forced, scores=scores, **sizes)


def from_cumulative(
    probabilities: Any,
    p: Any,
    min_k: int = 0,
    max_k: int | None = None,
    *,
    rule: str,
    forced: Any = None,
    allowed: Any = None,
    predicate: Mask | None = None,
    **sizes: Any,
) -> BlockLayout:
    """Keeps the most probable kv tiles of every q tile until their sum reaches p.

    P_n = sum of the n highest;  "cross": m = 1 + #{P <= p};  "reach": m = first n with P_n >= p, all if never;
    "below": m = #{P <= p};  m is clipped to [min_k, max_k]

    Equal probabilities go to the smaller index; forced tiles are added afterwards and do not count.

    Args:
      probabilities: [Bb, Hb, nQ, nK] or [nQ, nK].
      p: Target sum, a number or an array broadcastable to [Bb, Hb, nQ, 1].
      min_k: Fewest tiles a row.
      max_k: Most tiles a row, nK by default.
      rule: "cross" (FlexPrefill's counts, Rectified SpaAttn), "reach" (VMoBA) or "below" (FlexPrefill's block map).
      forced: Booleans broadcastable to probabilities.
      allowed: Booleans broadcastable to probabilities; the others are never kept and their probability does not count.
      predicate: As for `from_block_mask`.
      **sizes: query_slots, key_slots, query_block, key_block, full, query_perm, key_perm and capacity of
        `from_block_mask`.

    Returns:
      A BlockLayout; it carries no gradient.

    Raises:
      ValueError: If the rule is unknown, min_k exceeds max_k, or shapes do not fit.

    Example:
      >>> import numpy as np
      >>> sizes = dict(query_slots=8, key_slots=32, query_block=8, key_block=8)
      >>> probabilities = np.array([[0.5, 0.25, 0.125, 0.125]])
      >>> [int(from_cumulative(probabilities, 0.75, rule=r, **sizes).count.sum()) for r in ("cross", "reach", "below")]
      [3, 2, 2]

    Source: FlexPrefill (arXiv 2502.20766), VMoBA (arXiv 2506.23858).
    """
    if rule not in ("cross", "reach", "below"):
        raise ValueError(f"rule must be 'cross', 'reach' or 'below'; got {rule!r}")
    scores = as_four_axes("probabilities", probabilities)
    xp = _module_of(scores, forced, allowed)
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise ValueError(f"probabilities must be floating-point; got {scores.dtype}")
    scores = scores if xp is np else jax.lax.stop_gradient(jnp.asarray(scores))
    tiles = scores.shape[-1]
    max_k = tiles if max_k is None else min(max_k, tiles)
    if not min_k >= 0 or min(min_k, tiles) > max_k:
        raise ValueError(f"min_k must lie in [0, max_k]; got {min_k} and {max_k}")
    keep = scores > -np.inf
    if allowed is not None:
        allowed = xp.broadcast_to(as_four_axes("allowed", allowed, bool), scores.shape)
        keep = keep & allowed
    ordered = xp.flip(xp.sort(xp.where(keep, scores, -np.inf), axis=-1), axis=-1)
    sums = xp.cumsum(xp.where(ordered > -np.inf, ordered, 0), axis=-1)
    if rule == "reach":
        number = 1 + xp.sum(sums < p, axis=-1, dtype=np.int32)
    else:
        number = xp.sum(sums <= p, axis=-1, dtype=np.int32) + (rule == "cross")
    number = xp.clip(number, min_k, max_k).astype(np.int32)
    live = topk_mask(scores, number, allowed=allowed)
    if forced is not None:
        forced = xp.broadcast_to(as_four_axes("forced", forced, bool), scores.shape)
        live = live | (forced if allowed is None else forced & allowed)
    return from_block_mask(live, predicate, forced=forced, scores=scores, **sizes)


def from_token_selection(
    sel: Any,
    sel_q: int,
    sel_block: int,
    extra: Mask | None = None,
    *,
    query_slots: int,
    key_slots: int,
    query_block: int = 128,
    key_block: int = 128,
    include: Mask | None = None,
    num_heads: int | None = None,
    list_heads: int | None = None,
    batch: int | None = None,
    query_positions: Any = None,
    key_positions: Any = None,
    query_perm: Any = None,
    key_perm: Any = None,
    capacity: int | None = None,
    exact: bool = True,
) -> BlockLayout:
    """Compiles a choice of key blocks for each query into tiles: the union over a tile's queries and heads.

    allowed(p, r) = (sel[b, h, p // sel_q, r // sel_block] or include) and extra

    A tile is live iff one of its pairs passes, full iff all do, over all heads that share the list; the predicate
    restores each query's own choice. Pairs are looked at only where `extra` or `include` are partial.

    Args:
      sel: Booleans [Bs, Hs, ceil(T / sel_q), ceil(S / sel_block)], by slot.
      sel_q: Queries that share a choice.
      sel_block: Keys a block.
      extra: Mask that has to hold, too (causal, say).
      query_slots: T.
      key_slots: S.
      query_block: Queries a tile.
      key_block: Keys a tile.
      include: Mask that is allowed whatever was selected (a window, sinks).
      num_heads: N; Hs if not given.
      list_heads: Heads the lists distinguish, 1, K or N; Hs if not given. A list is the union over the heads that
        share it.
      batch: Batch rows the lists distinguish; Bs if not given.
      query_positions: [1|B, T] that extra and include see.
      key_positions: [1|B, S] that extra and include see.
      query_perm: int32 [Bp, Hp, query_slots], -1 = empty slot.
      key_perm: int32 [Bp, Hp, key_slots].
      capacity: Length M of the lists, nK by default.
      exact: If False, tiles where `extra` or `include` are partial count as live and partial.

    Returns:
      A BlockLayout; it carries no gradient.

    Raises:
      ValueError: If shapes do not fit, or (outside jit) a row exceeds the capacity.

    Example:
      >>> import numpy as np
      >>> from jattn.softmax import masks
      >>> sel = np.array([[[[True, False]] * 4 + [[False, True]] * 4]])
      >>> sizes = dict(query_slots=8, key_slots=8, query_block=4, key_block=4)
      >>> layout = from_token_selection(sel, 1, 4, masks.causal(), **sizes)
      >>> layout.live_map()[0, 0].astype(int).tolist()
      [[1, 0], [0, 1]]

    Source: MoBA (arXiv 2502.13189), HiP (arXiv 2406.09827), native sparse attention (arXiv 2502.11089).
    """
    check_sizes(query_block, key_block, query_slots=query_slots, key_slots=key_slots)
    predicate: Mask = token_selection(sel, sel_q, sel_block, num_heads=num_heads)
    rows, heads, *cells = np.shape(sel)
    expected = [-(-query_slots // sel_q), -(-key_slots // sel_block)]
    if cells != expected:
        raise ValueError(f"sel has shape {np.shape(sel)}; expected [Bs, Hs, {expected[0]}, {expected[1]}]")
    num_heads = heads if num_heads is None else num_heads
    list_heads = heads if list_heads is None else list_heads
    batch = rows if batch is None else batch
    if num_heads % list_heads or rows not in (1, batch):
        raise ValueError(
            f"lists of {list_heads} heads and {batch} rows do not fit {num_heads} heads and sel of shape "
            f"{np.shape(sel)}"
        )
    if include is not None:
        predicate = predicate | include
    if extra is not None:
        predicate = predicate & extra
    blocks, slots, perms = (query_block, key_block), (query_slots, key_slots), (query_perm, key_perm)
    alone = extra is None and include is None and perms == (None, None)
    # The selection alone does not tell heads apart that share an entry, so neither need the evaluation.
    seen = max(heads, list_heads) if alone else num_heads
    grid = make_grid(blocks, slots, (query_positions, key_positions), perms, batch, seen)
    live, full = over_shared_heads(tile_classes(predicate, grid, exact=exact), batch, list_heads, seen)
    return make_layout(live, full, predicate, blocks, slots, perms, capacity)
