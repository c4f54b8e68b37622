"""Gates that are quotients of running sums: the decays and weights of a softmax over time.

    z_t = log sum_{s<=t} exp(x_s),   log decay_t = z_{t-1} - z_t,   weight_t = exp(x_t - z_t) = 1 - decay_t

so that weight_s times the decays after s is softmax_{r<=t}(x_r)_s.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jattn.recurrence.segments import running_logsumexp, runs_of


class Gates(NamedTuple):
    """Gates of T tokens, `[B, T, ...]` in the dtype of the logits, and z after the last one, `[B, ...]`."""

    log_decay: jax.Array
    weight: jax.Array
    last: jax.Array


def additive_gates(logits: Any, ids: Any = None, before: Any = None, *, zero_sink: bool = False) -> Gates:
    """Decays and weights whose products are a softmax over the tokens of a run so far.

    Args:
        logits: x `[B, T, ...]`, float32 at least; -inf is a token without weight.
        ids: int `[B, T]` or None; a run of equal ids has sums of its own. Padding must have the logit -inf.
        before: z before the first token, `[B, ...]`, of the first run; where None, nothing is.
        zero_sink: whether each run starts with a token of logit 0.

    Returns:
        The gates; where nothing has been summed the log decay is 0.

    Raises:
        ValueError: `before` does not fit.

    Example:
        >>> [round(x, 4) for x in additive_gates(jnp.zeros((1, 3))).weight[0].tolist()]
        [1.0, 0.5, 0.3333]
    """
    logits = jnp.asarray(logits)
    shape = logits[:, 0].shape
    if before is not None and jnp.shape(before) != shape:
        raise ValueError(f"the log-sum-exp of a state must be {list(shape)}, got {list(jnp.shape(before))}")
    first = jnp.full_like(logits[:, 0], 0 if zero_sink else -jnp.inf) if before is None else jnp.asarray(before)
    runs = None if ids is None else jnp.pad(runs_of(ids), [(0, 0), (1, 0)])
    z = running_logsumexp(jnp.concatenate([first[:, None].astype(logits.dtype), logits], axis=1), runs)
    forgets = z[:, :-1] > -jnp.inf
    if runs is not None:
        runs = runs.reshape(*runs.shape, *(1,) * (z.ndim - 2))
        # What was before the first run holds its sink already.
        z = jnp.where(runs > 0, jnp.logaddexp(z, 0), z) if zero_sink else z
        forgets &= runs[:, :-1] == runs[:, 1:]
    log_decay = jnp.where(forgets, z[:, :-1] - finite(z[:, 1:]), 0)
    # Neighbors are summed in different orders: z may fall by a rounding error.
    log_decay = jnp.where(log_decay > 0, 0, log_decay)
    return Gates(log_decay, jnp.exp(logits - finite(z[:, 1:])), z[:, -1])


def finite(z: jax.Array) -> jax.Array:
    """z, but 0 where nothing has been summed and z is -inf."""
    return jnp.where(z > -jnp.inf, z, 0)
