"""What a token reads of a memory that learns, and what a block of tokens leaves behind: the factors, from gates alone.

    token:  S_t = eta_t S_{t-1} - theta_t grad_t,   W_t = (1 - alpha_t) W_{t-1} + S_t
    chunk:  A = sum_j theta_j grad_j;  at its last token  S' = mean(eta) S - A,  W' = (1 - mean(alpha)) W + S'

Everything is linear in what was there before the block (W, S, and A where a chunk collects gradients) and in the
gradients of its tokens. Every exponent is a sum of logarithms over its own interval, so a closed gate leaves the digits
of the others alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jattn.recurrence.decay import HIGHEST, segsum


class Tokens(NamedTuple):
    """Tokens of a block, heads first; G queries share a memory."""

    query: Any
    """`[B, H, G, C, D]`."""
    key: Any
    """`[B, H, C, D]`."""
    value: Any
    """`[B, H, C, V]`."""
    log_keep: Any
    """log(1 - alpha) `[B, H, C]`."""
    log_momentum: Any
    """log eta."""
    step: Any
    """theta."""


class Plan(NamedTuple):
    """How outputs and the end depend on what was there before, P parts W, S, ..., and on the gradients of the block."""

    read: Any
    """`[B, H, P, C]`: factor of each part in what a token reads."""
    write: Any
    """`[B, H, C, C]`: factor of the gradient of token j in what token t reads."""
    end: Any
    """`[B, H, P, P]`: new parts from old ones."""
    end_write: Any
    """`[B, H, P, C]`: factor of the gradient of token j in each new part."""
    means: Any
    """Gates collected for the chunk under way, () if they are not."""


def token_plan(tokens: Tokens, member: jax.Array, same: Any, last: jax.Array, means: Any, chunk_size: int) -> Plan:
    """A step a token: W forgets and takes S up at every member, S keeps its momentum."""
    size = tokens.key.shape[-2]
    seen = np.tri(size, dtype=bool) if same is None else np.tri(size, dtype=bool) & same[:, None]
    keep, momentum, step = (
        jnp.where(member[:, None], x, 0) for x in (tokens.log_keep, tokens.log_momentum, tokens.step)
    )
    # Columns of tokens that are skipped are empty: W takes S up at the members alone.
    kept = jnp.where(seen & member[:, None, None], jnp.exp(segsum(keep, axis=-1)), 0)
    pushed = jnp.where(seen, jnp.exp(segsum(momentum, axis=-1)), 0)
    old, push = (jnp.exp(jnp.where(seen, x[..., None, :], 0).sum(-1)) for x in (keep, momentum))
    taken = dot("bhti,bhi->bht", kept, push)
    write = -dot("bhti,bhij->bhtj", kept, pushed) * step[..., None, :]
    ends = [[old[..., -1], taken[..., -1]], [jnp.zeros_like(old[..., -1]), push[..., -1]]]
    end_write = jnp.stack([write[..., -1, :], -pushed[..., -1, :] * step], 2)
    return Plan(jnp.stack([old, taken], 2), write, _matrix(ends), end_write, means)


def chunk_plan(tokens: Tokens, member: jax.Array, same: Any, last: jax.Array, means: Any, chunk_size: int) -> Plan:
    """A step a chunk, at its last token: S' = eta S - A, W' = (1 - alpha) W + S', A the gradients of the chunk."""
    size = tokens.key.shape[-2]
    seen = np.tri(size, dtype=bool) if same is None else np.tri(size, dtype=bool) & same[:, None]
    gates = jnp.stack([jnp.exp(tokens.log_keep), jnp.exp(tokens.log_momentum)], -1)
    shares = jnp.where(member[:, None, :, None], gates / chunk_size, 0)
    collected = means[:, :, None] + jnp.where(seen[..., None], shares[:, :, None], 0).sum(-2)
    keep, momentum = collected[..., 0], collected[..., 1]
    step = jnp.where(member[:, None], tokens.step, 0)
    due = jnp.broadcast_to(last[:, None].astype(step.dtype), step.shape)
    write = -jnp.where(seen, step[..., None, :], 0)
    read = jnp.stack([1 + due * (keep - 1), due * momentum, -due], 2)
    # Whether the chunk that the last row belongs to is complete; its step then is that of its last token.
    ending = last if same is None else last & same[:, -1]
    done = ending.any(-1)[:, None].astype(step.dtype)
    rate = jnp.where(ending[:, None, :, None], collected, 0).sum(2)
    gradient, zero = write[..., -1, :], jnp.zeros_like(rate[..., 0])
    ends = [
        [1 - done + rate[..., 0], rate[..., 1], zero - done],
        [zero, 1 - done + rate[..., 1], zero - done],
        [zero, zero, zero + 1 - done],
    ]
    done = done[..., None]
    end_write = jnp.stack([done * gradient, done * gradient, (done - 1) * gradient], 2)
    left = (1 - done) * collected[..., -1, :]
    return Plan(read, due[..., None] * write, _matrix(ends), end_write, left)


PLANS: dict[str, Callable[..., Plan]] = {"token": token_plan, "chunk": chunk_plan}


def _matrix(rows: Any) -> jax.Array:
    return jnp.stack([jnp.stack(row, -1) for row in rows], -2)


def dot(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """An einsum of two arrays, in full precision."""
    return jnp.einsum(subscripts, x, y, precision=HIGHEST)
