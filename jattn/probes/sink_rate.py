"""Sink rate: which keys draw attention from all queries that can see them.

alpha_k = (1 / c_k) sum_i a_ik,   c_k = number of queries that can see key k
rate_k = 100 * mean over samples, layers and heads of [alpha_k > eps]
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.mechanisms.entry import Cost, Entry, Paper
from jattn.mechanisms.examples import normal
from jattn.softmax.masks import Mask


def sink_rate(col_mass: Any, counts: Any, *, eps: float = 0.3) -> tuple[Any, Any]:
    """Mean attention that each key draws, and how often it is a sink.

    alpha_k = col_mass_k / c_k;   rate_k = 100 * mean over all leading axes and heads of [alpha_k > eps]

    Args:
      col_mass: `[..., B, S, N]`, the hook's 'col_mass' with one key head a query head (`per_query_head`); further axes,
        such as layers, stand in front. It is meant for weights that sum to 1.
      counts: queries that can see a key, `[S]`, `[B|1, S]` or `[..., B|1, N|1, S]`; see `column_counts`. Key k of plain
        causal self attention has S - k.
      eps: threshold; it depends on the length: 0.3 goes with 64 tokens.

    Returns:
      alpha `[..., B, N, S]` (0 for a key that nobody sees), and rate `[S]` in percent; the papers report rate[0].

    Raises:
      ValueError: col_mass of fewer than three axes, or counts that do not fit.

    Example:
      >>> mass = np.array([[[4.0], [0.0], [0.0], [0.0]]])
      >>> alpha, rate = sink_rate(mass, np.array([4, 3, 2, 1]))
      >>> alpha.tolist(), rate.tolist()
      ([[[1.0, 0.0, 0.0, 0.0]]], [100.0, 0.0, 0.0, 0.0])

    Source: When Attention Sink Emerges in Language Models: An Empirical View (arXiv 2410.10781).
    """
    col_mass = jnp.asarray(col_mass)
    if col_mass.ndim < 3:
        raise ValueError(f"sink_rate: col_mass must be [..., B, S, N], got {list(col_mass.shape)}")
    mass = jnp.swapaxes(col_mass.astype(jnp.promote_types(col_mass.dtype, jnp.float32)), -1, -2)
    counts = jnp.asarray(counts)
    counts = counts[:, None] if counts.ndim == 2 else counts
    if counts.ndim > mass.ndim or any(
        n not in (1, full) for n, full in zip(counts.shape[::-1], mass.shape[::-1], strict=False)
    ):
        raise ValueError(
            f"sink_rate: counts have shape {list(counts.shape)}, which does not fit [..., B, N, S] = {list(mass.shape)}"
        )
    alpha = jnp.where(counts > 0, mass / jnp.maximum(counts, 1), 0)
    return alpha, 100 * (alpha > eps).astype(alpha.dtype).mean(tuple(range(alpha.ndim - 1)))


def column_counts(
    mask: Any = None,
    query_length: int = 1,
    key_length: int | None = None,
    *,
    batch: int = 1,
    num_heads: int = 1,
    query_positions: Any = None,
    key_positions: Any = None,
) -> Any:
    """Number of queries that can see each key, in memory linear in T and S.

    c_k = sum_i [mask_ik]

    Args:
      mask: a `Mask`, booleans that broadcast to `[B, N, T, S]`, or None where everything is visible.
      query_length: T.
      key_length: S, T if not given.
      batch: B.
      num_heads: N.
      query_positions: `[B|1, T]`, which a Mask sees instead of 0..T-1.
      key_positions: `[B|1, S]` likewise.

    Returns:
      int32 `[B, N, S]`.

    Example:
      >>> import jattn
      >>> column_counts(jattn.masks.causal(), 4).tolist()
      [[[4, 3, 2, 1]]]
    """
    key_length = query_length if key_length is None else key_length
    shape = (batch, num_heads, key_length)
    if mask is None:
        return jnp.full(shape, query_length, jnp.int32)
    if not isinstance(mask, Mask):
        mask = jnp.asarray(mask)
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        seen = jnp.broadcast_to(mask, (*mask.shape[:2], query_length, mask.shape[3])).sum(2, dtype=jnp.int32)
        return jnp.broadcast_to(seen, shape)
    mask.check(
        batch,
        num_heads,
        query_length if query_positions is None else None,
        key_length if key_positions is None else None,
    )
    i = jnp.arange(query_length)[None] if query_positions is None else jnp.atleast_2d(jnp.asarray(query_positions))
    j = jnp.arange(key_length)[None] if key_positions is None else jnp.atleast_2d(jnp.asarray(key_positions))
    b, h, mask = jnp.arange(batch)[:, None, None], jnp.arange(num_heads)[None, :, None], jax.tree.map(jnp.asarray, mask)

    def column(k: Any) -> Any:
        visible = mask(b, h, i[:, None], j[:, None, k, None])
        return jnp.broadcast_to(visible, (batch, num_heads, query_length)).sum(-1, dtype=jnp.int32)

    return jnp.moveaxis(jax.lax.map(column, jnp.arange(key_length)), 0, -1)


def _example(key: Any, length: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (np.abs(normal(key, 2, length, 3)), np.arange(length, 0, -1)), {}


ENTRY = Entry(
    name="sink_rate",
    kind="probe",
    family="probes",
    function=sink_rate,
    papers=(Paper("When Attention Sink Emerges in Language Models: An Empirical View", "2410.10781", 2025),),
    cost=Cost(flops="T", memory="T"),
    decode="no: it divides by the queries that see a key, which are all known at the end only",
    example=_example,
    fidelity="official code",
)
