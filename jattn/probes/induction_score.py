"""Induction score: does a head look at the token that followed the current token when it came before?

Tokens are a random sequence of period P, repeated:   score = mean over i = P + 1 .. 2 P - 2 of w[i, i - P + 1]
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jattn.mechanisms.entry import Cost, Entry, Paper
from jattn.mechanisms.examples import normal


def induction_rows(period: int) -> np.ndarray:
    """The query rows that the score reads, int32 `[P - 2]`: P + 1 .. 2 P - 2, for the hook's `rows`.

    Raises:
      ValueError: a period below 3, which leaves no row.

    Example:
      >>> induction_rows(4).tolist()
      [5, 6]
    """
    if period < 3:
        raise ValueError(f"induction_rows: period must be at least 3, got {period}")
    return np.arange(period + 1, 2 * period - 1, dtype=np.int32)


def induction_score(weights: Any, period: int, *, rows: Any = None) -> Any:
    """Mean attention from a token of the second period to the successor of the same token in the first.

    score = mean over i = P + 1 .. 2 P - 2 of w[i, i - P + 1]

    In tokens x with x[i] = x[i - P], query i that attends to i - P + 1 copies what came after its own token last time.
    The first row of the second period (nothing of that period stands before it) and the last one are left out.

    Args:
      weights: `[..., T, S]` of a sequence of at least two periods, T, S >= 2 P - 1; or `[..., R, S]` of some rows.
      period: P.
      rows: int `[R]`, the query rows that weights hold; all of them if not given. `induction_rows(period)` are enough.

    Returns:
      `[...]`, between 0 and 1 for weights that sum to 1; float32 at least.

    Raises:
      ValueError: a period below 3, rows that weights do not hold, or too few keys.

    Example:
      >>> weights = np.eye(8, k=-3)  # each query looks 3 tokens back
      >>> float(induction_score(weights, 4))
      1.0

    Source: In-context Learning and Induction Heads (arXiv 2209.11895), prefix matching on a repeated random sequence.
    """
    weights, wanted = jnp.asarray(weights), induction_rows(period)
    weights = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
    held = np.arange(weights.shape[-2]) if rows is None else np.ravel(rows)
    places = {int(row): place for place, row in enumerate(held)}
    missing = [int(row) for row in wanted if int(row) not in places]
    if missing or len(held) != weights.shape[-2] or weights.shape[-1] < period:
        raise ValueError(
            f"induction_score: weights of shape {list(weights.shape)} with {len(held)} rows do not hold rows "
            f"{period + 1} to {2 * period - 2} and their keys"
        )
    return weights[..., np.array([places[int(row)] for row in wanted]), wanted - period + 1].mean(-1)


def _example(key: Any, length: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    period = max(3, length // 2)
    raw = np.exp(normal(key, 1, period - 2, length))
    return (raw / raw.sum(-1, keepdims=True), period), {"rows": tuple(induction_rows(period).tolist())}


ENTRY = Entry(
    name="induction_score",
    kind="probe",
    family="probes",
    function=induction_score,
    papers=(Paper("In-context Learning and Induction Heads", "2209.11895", 2022),),
    cost=Cost(flops="T", memory="T"),
    decode="row by row",
    example=_example,
    fidelity="inferred: which rows are averaged",
)
