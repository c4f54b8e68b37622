"""Generalized neighborhood attention: softmax attention in the neighborhoods of `gna_mask`.

    out_i = softmax(scale q_i . k_j over the j in i's neighborhood, and the extra tokens) v

Tokens stand on a line, an image or a video; the window may slide (stride 1), jump (stride > 1, up to blocked attention
at stride = window), be dilated, and be causal in some of the dimensions. Extra tokens (text, registers) are seen by
every query: a second attention, joined by its log-sum-exp. Long grids of two or three dimensions are read in tiles that
are boxes of the grid, so that the work follows the neighborhoods. Source: arXiv 2504.16922.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.mechanisms.entry import Cost, Entry, Paper
from jattn.mechanisms.examples import normals
from jattn.mechanisms.sparse.gna_mask import Neighborhood, gna_layout, gna_mask
from jattn.softmax import masks
from jattn.softmax.api import dot_product_attention
from jattn.softmax.merge import join_sinks, merge_lse

# Up to this many pairs a head the engine computes all of them at once, and another order of the tokens gains nothing.
_SMALL_PAIRS = 512 * 512


def gna_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    window: Any = 16,
    stride: Any = 1,
    dilation: Any = 1,
    is_causal: Any = False,
    grid: Any = None,
    extra_key: Any = None,
    extra_value: Any = None,
    bias: Any = None,
    mask: Any = None,
    segment_ids: Any = None,
    query_positions: Any = None,
    key_positions: Any = None,
    scale: Any = None,
    score_mod: Any = None,
    logit_soft_cap: float | None = None,
    sinks: Any = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    tile: tuple[int, ...] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """Attention of every token of a grid to its neighborhood.

    out_i = softmax_j(scale q_i . k_j) v_j over the neighborhood of i and the extra tokens.

    Args:
        query: `[B, *X, N, D]`, X of one to three dimensions; or `[B, T, N, D]` with `grid`, tokens row by row.
        key: `[B, *X, K, D]`; K divides N.
        value: `[B, *X, K, Dv]`.
        window: w, an int or one a dimension: keys a query sees, itself included. w * dilation <= X where not causal.
        stride: s, 1 <= s <= w: queries of a group of s share their window; s = w is blocked attention.
        dilation: d: the neighborhood takes every d-th token.
        is_causal: a bool or one a dimension.
        grid: X of flat tokens; a line of T if not given.
        extra_key: `[B, E, K, D]`, tokens that every query sees.
        extra_value: `[B, E, K, Dv]`.
        bias: broadcasts to `[B, N, T, T]` over flat tokens; not for the extra ones. So does `score_mod`.
        mask: booleans that broadcast to `[B, N, T, T]`, or a `Mask`: hides keys of the neighborhood, moves none.
        segment_ids: `[B, T]` or a pair; hides like the mask. Neighborhoods are those of the whole grid.
        query_positions: `[B|1, T]`, number of each query token in the grid, such as the position when decoding; goes
            with `key_positions` and, where not 1-D causal with stride 1, with `grid`.
        key_positions: `[B|1, S]` likewise.
        scale: of the logits, D^-0.5 if None.
        score_mod: a `ScoreMod`.
        logit_soft_cap: cap * tanh(logits / cap), of all logits.
        sinks: `[N]`, they join once.
        dropout_rate: of the weights.
        dropout_key: a key of jax.random, needed for a rate above 0.
        tile: sides of the boxes of tokens of the blockwise path; no effect on the result.
        implementation: as in `jattn.dot_product_attention`.
        return_residual: also return the log-sum-exp, extra tokens included.

    Returns:
        `[B, *X, N, Dv]` (or `[B, T, N, Dv]`) in the query's dtype; with `return_residual` also lse `[B, *X, N]`.

    Raises:
        ValueError: shapes that do not fit each other or the grid, or a parameter out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 4, 6, 2, 8))  # an image of 4 x 6 tokens, 2 heads
        >>> gna_attention(x, x, x, window=(3, 5)).shape
        (1, 4, 6, 2, 8)
        >>> gna_attention(x.reshape(1, 24, 2, 8), *[x.reshape(1, 24, 2, 8)] * 2, window=(3, 5), grid=(4, 6)).shape
        (1, 24, 2, 8)

    Source: Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light (arXiv
    2504.16922).
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    flat, grid = _flat(query, key, value, grid)
    batch, length = flat[0].shape[:2]
    source = flat[1].shape[1]
    has_positions = query_positions is not None
    if has_positions != (key_positions is not None):
        raise ValueError("query_positions and key_positions must be given together")
    if grid is None:
        grid = (None if has_positions and np.all(is_causal) and np.all(np.equal(stride, 1)) else length,)
    if not has_positions and not length == source == math.prod(x or 0 for x in grid):
        raise ValueError(
            f"query and key have {length} and {source} tokens, expected the grid's {grid}; give query_positions and "
            "key_positions for a part of it"
        )
    if has_positions and grid == (length,):
        raise ValueError(
            "query_positions need the grid (grid=...), or is_causal and stride 1, where a window does not depend on it"
        )
    neighbors = gna_mask(grid, window, stride=stride, dilation=dilation, is_causal=is_causal)
    assert isinstance(neighbors, Neighborhood)
    visible, segment_ids = _combined(
        neighbors, mask, segment_ids, query_positions, key_positions, (batch, length, source)
    )
    layout = None
    if not has_positions and _wants_layout(neighbors, length, implementation, tile):
        layout = gna_layout(neighbors, tile)
        visible = None if visible is neighbors else visible
    shared: dict[str, Any] = {"scale": scale, "logit_soft_cap": logit_soft_cap, "implementation": implementation}
    dropout = {"dropout_rate": dropout_rate, "dropout_key": dropout_key}
    out, lse = dot_product_attention(
        *flat,
        bias,
        visible,
        segment_ids=segment_ids,
        query_positions=query_positions,
        key_positions=key_positions,
        score_mod=score_mod,
        layout=layout,
        sinks=sinks if extra_key is None else None,
        return_residual=True,
        **shared,
        **dropout,
    )
    if extra_key is not None or extra_value is not None:
        if dropout_rate:
            dropout["dropout_key"] = jax.random.fold_in(dropout_key, 1)
        extra = _extra(flat[0], extra_key, extra_value, segment_ids, {**shared, **dropout})
        out, lse = merge_lse((out, lse), extra)
        out = out if sinks is None else join_sinks(out, lse, jnp.asarray(sinks))
    out = out.reshape(*query.shape[:-1], -1)
    return (out, lse.reshape(query.shape[:-1])) if return_residual else out


def _flat(query: Any, key: Any, value: Any, grid: Any) -> tuple[list[Any], tuple[int | None, ...] | None]:
    """Flat tokens and the grid; None for `[B, T, N, D]` without one."""
    named = (("query", query), ("key", key), ("value", value))
    for name, x in named:
        if not 4 <= x.ndim <= 6 or x.ndim != query.ndim:
            raise ValueError(f"{name} must be [B, *X, heads, size] with one to three X, all alike; got {list(x.shape)}")
    if query.ndim == 4:
        if grid is None:
            return [query, key, value], None
        return [query, key, value], tuple(grid) if np.ndim(grid) else (grid,)
    sizes = query.shape[1:-2]
    if grid is not None and tuple(grid) != sizes:
        raise ValueError(f"grid must be left out or be that of the query, {sizes}; got {grid}")
    for name, x in named:
        if x.shape[1:-2] != sizes:
            raise ValueError(f"{name} must have the grid of the query, {sizes}; got {list(x.shape)}")
    return [x.reshape(x.shape[0], -1, *x.shape[-2:]) for _, x in named], sizes


def _combined(
    neighbors: Neighborhood, mask: Any, segment_ids: Any, query_positions: Any, key_positions: Any, sizes: Any
) -> tuple[Any, Any]:
    """The neighborhoods and what else hides keys, as a Mask or an array, and segment ids."""
    batch, length, source = sizes
    if mask is None:
        return neighbors, segment_ids
    if isinstance(mask, masks.Mask):
        return neighbors & mask, segment_ids
    mask = jnp.asarray(mask)
    shape = (1,) * (4 - mask.ndim) + mask.shape
    if mask.dtype != bool or len(shape) > 4:
        raise ValueError(f"mask must be booleans that broadcast to [B, N, T, S], got {mask.dtype}{list(mask.shape)}")
    mask = mask.reshape(shape)
    if shape[1:3] == (1, 1) and shape[0] in (1, batch) and shape[3] in (1, source):
        # A mask of keys is padding: ids say it in memory linear in the length.
        pair = segment_ids if isinstance(segment_ids, tuple | list) else (segment_ids, segment_ids)
        ids = [
            jnp.zeros((batch, n), jnp.int32) if x is None else jnp.asarray(x)
            for x, n in zip(pair, (length, source), strict=True)
        ]
        return neighbors, (ids[0], jnp.where(mask[:, 0, 0], ids[1], -1))
    if query_positions is None:
        return neighbors & masks.dense(mask), segment_ids
    i, j = (jnp.atleast_2d(jnp.asarray(x))[:, None] for x in (query_positions, key_positions))
    return mask & neighbors(0, 0, i[..., :, None], j[..., None, :]), segment_ids


def _wants_layout(neighbors: Neighborhood, length: int, implementation: str | None, tile: Any) -> bool:
    """Whether tokens are read in boxes: where asked for, or where fewer pairs are visited than in their own order."""
    if implementation == "reference" or (length * length <= _SMALL_PAIRS and tile is None):
        return False
    if tile is not None:
        return True
    if len(neighbors.grid) == 1 and neighbors.dilation == (1,):
        return False
    layout = gna_layout(neighbors)
    block = 512
    low = np.arange(0, length, block)
    high = np.minimum(low + block, length) - 1
    runs = neighbors.classify(low[:, None], high[:, None], low, high)
    boxes = int(np.sum(layout.count)) * layout.query_block * layout.key_block
    return boxes < 0.8 * int(np.count_nonzero(runs)) * block * block


def _extra(query: Any, extra_key: Any, extra_value: Any, segment_ids: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """Attention to the extra tokens: all of them for every query that is not padding."""
    if extra_key is None or extra_value is None:
        raise ValueError("extra_key and extra_value must be given together")
    extra_key, extra_value = jnp.asarray(extra_key), jnp.asarray(extra_value)
    ids = None
    if segment_ids is not None:
        query_ids = jnp.asarray(segment_ids[0] if isinstance(segment_ids, tuple | list) else segment_ids)
        ids = (jnp.where(query_ids >= 0, 0, -1), jnp.zeros(extra_key.shape[:2], jnp.int32))
    return dot_product_attention(query, extra_key, extra_value, segment_ids=ids, return_residual=True, **options)


def _example(key, length):
    arrays = normals(key, *((2, length, heads, 8) for heads in (4, 2, 2)))
    return arrays, {"window": min(3, length), "is_causal": True}


ENTRY = Entry(
    name="gna_attention",
    kind="primitive",
    family="sparse",
    function=gna_attention,
    papers=(
        Paper(
            "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
            "2504.16922",
            2025,
        ),
    ),
    patterns=("noncausal self", "causal self"),
    cost=Cost(flops="T", memory="T"),
    decode="1-D causal with stride 1, is_causal=True: any KV cache that keeps window * dilation tokens",
    example=_example,
    fidelity="official code",
    exempt={"permutation": "a neighborhood is a matter of places: outputs do not follow a permutation of the tokens"},
)
