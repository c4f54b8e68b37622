"""One attention call, checked and normalized: what every implementation receives."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.softmax.dropout import keep_pairs
from jattn.softmax.masks import Mask
from jattn.softmax.normalizers import Normalizer
from jattn.softmax.predicates import head_entry
from jattn.softmax.score_mods import ScoreMod


def _static(default: Any = dataclasses.MISSING):
    return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
    """The arguments of `dot_product_attention` in one shape each.

    Shapes: query `[B, T, N, D]`, key `[B, S, K, D]`, value `[B, S, K, Dv]`; bias and every array of `mask_arrays`
    `[B|1, N|1, T|1, S|1]`; operands likewise, or `[B|1, N|1, R]` for offsets; positions and segments `[B|1, T]` and
    `[B|1, S]`; seed uint32 `[2]`. `key_lengths` `[B]` is there where key lengths were given, which then also are the
    last of `mask_arrays`.
    """

    query: Any
    key: Any
    value: Any
    bias: Any
    operands: dict[str, Any]
    mask: Mask | None
    mask_arrays: tuple[Any, ...]
    layout: Any
    query_positions: Any
    key_positions: Any
    query_segments: Any
    key_segments: Any
    score_mod: ScoreMod | None
    seed: Any
    normalizer: Normalizer = _static()
    scale: float = _static()
    sizes: tuple[int, int, int, int, int] = _static()
    compute_dtype: Any = _static()
    logit_soft_cap: float | None = _static(None)
    dropout_rate: float = _static(0.0)
    precision: Any = _static(None)
    self_segments: bool = _static(False)
    block_sizes: tuple[int, int] | None = _static(None)
    key_lengths: Any = None


def modify_logits(problem: Problem, logits, tiles, bias, b, h, i, j):
    """Soft cap, score mod and bias, in the pipeline's order; `tiles` holds the operands' parts by name."""
    if problem.logit_soft_cap is not None:
        logits = problem.logit_soft_cap * jnp.tanh(logits / problem.logit_soft_cap)
    if problem.score_mod is not None:
        logits = problem.score_mod.apply(logits, b, h, i, j, tiles).astype(logits.dtype)
    return logits if bias is None else logits + bias.astype(logits.dtype)


def drop_pairs(problem: Problem, weights, b, h, row, column):
    """Inverted dropout of weights at query rows `row` and key indices `column`."""
    if not problem.dropout_rate:
        return weights
    keep = keep_pairs(problem.seed, problem.dropout_rate, b, h, row, column)
    return jnp.where(keep, weights / (1 - problem.dropout_rate), 0)


def offset_tile(table, center: int, i, j):
    """Read an offset table (offsets on the last axis) at key position - query position + center, clipped."""
    return jnp.take(table, jnp.clip(j - i + center, 0, table.shape[-1] - 1), axis=-1)


def slot_tokens(problem: Problem) -> tuple[Any, Any]:
    """Token of every slot of queries and of keys, `[B|1, N|1, slots]`, -1 if empty; None where slots are tokens."""
    layout, num_heads = problem.layout, problem.sizes[3]
    perms = (None, None) if layout is None else (layout.query_perm, layout.key_perm)
    return tuple(
        perm
        if perm is None or perm.shape[1] == 1
        else perm[:, head_entry(np.arange(num_heads), num_heads, perm.shape[1])]
        for perm in perms
    )  # type: ignore[return-value]


def positions(problem: Problem):
    """Query positions `[B|1, T]` and key positions `[B|1, S]`; numpy where they are the default."""
    _, length, source, _, _ = problem.sizes
    i = np.arange(length, dtype=np.int32)[None] if problem.query_positions is None else problem.query_positions
    j = np.arange(source, dtype=np.int32)[None] if problem.key_positions is None else problem.key_positions
    return i, j


def dense_visibility(problem: Problem):
    """All mask terms as one boolean array that broadcasts to `[B, N, T, S]`; None if everything is visible.

    numpy if nothing but static masks at default positions enters, so that callers can look at it while tracing.
    """
    batch, length, source, num_heads, _ = problem.sizes
    i, j = positions(problem)
    i, j = i[:, None, :, None], j[:, None, None, :]
    terms = list(problem.mask_arrays)
    if problem.query_segments is not None:
        ids = problem.query_segments[:, None, :, None]
        terms.append((ids == problem.key_segments[:, None, None, :]) & (ids >= 0))
    if problem.mask is not None:
        # A mask that does not look at them stays numpy.
        b, h = jnp.arange(batch)[:, None, None, None], np.arange(num_heads)[None, :, None, None]
        terms.append(problem.mask(b, h, i, j))
    if problem.layout is not None:
        terms.append(
            problem.layout.to_dense(
                batch,
                num_heads,
                length,
                source,
                query_positions=problem.query_positions,
                key_positions=problem.key_positions,
            )
        )
    visible = None
    for term in terms:
        visible = term if visible is None else visible & term
    return visible
