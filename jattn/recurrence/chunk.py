"""A recurrence chunk by chunk: products of matrices inside a chunk, the state between chunks.

    A_qk, A_qb, A_ab, A_ak = scores (see `decay`),   S the state at the chunk's start
    R  = (I - A_ab)^-1 [(a exp Gx) S + A_ak V] = U + W S          what the rank-1 term reads
    O  = scale [(q exp G) S + A_qk V + A_qb R]
    S' = Diag(exp G_C) S + (k exp(G_C - G))^T V + (b exp(G_C - G))^T R

Several chunks form a step: their matrices are computed together, only S goes through them one by one. A step is
recomputed in the backward pass, which keeps the states between steps and nothing else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jattn.recurrence.decay import HIGHEST, ChannelDecay, HeadDecay, NoDecay, TokenDecay
from jattn.recurrence.problem import Problem
from jattn.recurrence.triangular import unit_lower_inverse

CHUNKS_A_STEP = 8
"""How many chunks are computed together: enough to keep the cores busy, few enough for what they need to stay near."""


class Cut(NamedTuple):
    """How a row is cut: `steps` steps of `chunks` chunks of `size` tokens, the last ones filled up."""

    steps: int
    chunks: int
    size: int
    length: int

    @classmethod
    def of(cls, length: int, chunk_size: int) -> Cut:
        """Cut T tokens."""
        size = min(chunk_size, length)
        count = -(-length // size)
        steps = -(-count // CHUNKS_A_STEP)
        return cls(steps, -(-count // steps), size, length)

    def split(self, x: Any, mode: str = "constant") -> Any:
        """`[B, T, H, ...]` -> `[steps, B, H, n, ..., C, D]`: heads first, time before the last axis."""
        if x is None:
            return None
        x = self._cut(x, mode)
        if x.ndim == 5:  # [B, steps, n, C, H]
            return x.transpose(1, 0, 4, 2, 3)
        axes = (1, 0, 4, 2, *range(5, x.ndim - 1), 3, x.ndim - 1)
        return x.transpose(axes)

    def rows(self, x: Any) -> Any:
        """`[B, T]` -> `[steps, B, n, C]`, filled up with the last entry."""
        return None if x is None else self._cut(x, "edge").transpose(1, 0, 2, 3)

    def _cut(self, x: jax.Array, mode: str) -> jax.Array:
        extra = self.steps * self.chunks * self.size - self.length
        if extra:
            x = jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2), mode=mode)
        return x.reshape(x.shape[0], self.steps, self.chunks, self.size, *x.shape[2:])

    def join(self, x: jax.Array) -> jax.Array:
        """`[steps, B, H, n, G, C, D]` -> `[B, T, H, G, D]`."""
        x = x.transpose(1, 0, 3, 5, 2, 4, 6)
        return x.reshape(x.shape[0], -1, *x.shape[4:])[:, : self.length]

    def valid(self) -> np.ndarray:
        """Tokens of each chunk that are no filling, `[steps, n]`."""
        first = np.arange(self.steps * self.chunks) * self.size
        return np.clip(self.length - first, 0, self.size).reshape(self.steps, self.chunks).astype(np.int32)


class Inner(NamedTuple):
    """What the loop over the chunks of a step needs of each: S' = decay S + add + b^T R, R = read + carry S."""

    decay: Any
    """`[B|1, H|1, n, D|1, 1]`."""
    add: Any
    """`[B, H, n, D, Dv]`."""
    read: Any
    """U `[B, H, n, C, Dv]`, None without a and b."""
    carry: Any
    """W `[B, H, n, C, D]`."""
    write: Any
    """b with the decay to the chunk's end, `[B, H, n, C, D]`."""


def run_chunks(problem: Problem, chunk_size: int, sub_chunk: int) -> tuple[jax.Array, jax.Array]:
    """Outputs and the final state.

    Args:
        problem: what to compute.
        chunk_size: C.
        sub_chunk: c, for decays a channel.

    Returns:
        `[B, T, H, G, Dv]` in the dtype of sums, and `[B, H, D, Dv]`.
    """
    cut = Cut.of(problem.query.shape[1], chunk_size)
    arrays = [cut.split(x) for x in (problem.query, problem.key, problem.value, problem.a, problem.b)]
    gates = None if problem.kind in ("none", "head") else cut.split(problem.log_decay)
    extras = tuple(cut.rows(x) for x in problem.extras)
    parts = (arrays, gates, jnp.asarray(cut.valid()), cut.rows(problem.runs), extras)

    def step(carry: Any, part: Any) -> Any:
        return _step(problem, sub_chunk, carry, *part)

    first = jnp.zeros_like(problem.state, shape=(problem.state.shape[0],), dtype=jnp.int32)
    body = jax.checkpoint(step, prevent_cse=cut.steps == 1)
    if cut.steps == 1:
        (state, _), out = body((problem.state, first), jax.tree.map(lambda x: x[0], parts))
        return cut.join(out[None]), state
    (state, _), out = jax.lax.scan(body, (problem.state, first), parts)
    return cut.join(out), state


def _decay(problem: Problem, gates: Any, size: int, valid: Any, sub_chunk: int) -> Any:
    if problem.kind == "none":
        return NoDecay()
    if problem.kind == "head":
        return HeadDecay(problem.log_decay, size, valid)
    return TokenDecay(gates) if problem.kind == "token" else ChannelDecay(gates, sub_chunk)


def _step(
    problem: Problem, sub_chunk: int, carry: Any, arrays: Any, gates: Any, valid: Any, runs: Any, extras: Any
) -> Any:
    dtype, exclusive = problem.dtype, problem.read == "pre"
    q, k, v = (x.astype(dtype) for x in arrays[:3])
    a, b = (None if x is None else x.astype(dtype) for x in arrays[3:])
    size = k.shape[-2]
    if problem.features is not None:
        q, k, v = problem.features(q, k, v, extras)
        # Features of zeros need not be zero.
        k = jnp.where((np.arange(size) < valid[:, None])[..., None], k, 0)
    decay = _decay(problem, gates, size, valid, sub_chunk)
    state, run = carry
    through, before = (np.tri(size, k=shift, dtype=bool) for shift in (0, -1))
    same = from_carry = at_end = None
    if runs is not None:
        runs = runs.transpose(1, 0, 2)  # [n, B, C]: the run of the carried state differs chunk by chunk
        carried = jnp.concatenate([run[None], runs[:-1, :, -1]])
        places = (runs[..., :, None] == runs[..., None, :], runs == carried[..., None], runs == runs[..., -1:])
        same, from_carry, at_end = (x.swapaxes(0, 1)[:, None] for x in places)  # [B, 1, n, C, ...]
        run = runs[-1, :, -1]

    def masked(scores: jax.Array, seen: np.ndarray) -> jax.Array:
        return jnp.where(seen if same is None else seen & same[:, :, :, None], scores, 0)

    def only(x: jax.Array, tokens: Any) -> jax.Array:
        """Rows `[B, H, n, (G,) C, D]` of some tokens `[B, 1, n, C]`."""
        if tokens is None:
            return x
        return jnp.where((tokens if x.ndim == 5 else tokens[:, :, :, None])[..., None], x, 0)

    q = q * problem.scale
    seen = before if exclusive else through
    from_start = only(decay.since_start(q, exclusive=exclusive), from_carry)
    inside = masked(decay.scores(q, k, exclusive=exclusive), seen)
    if problem.bonus is not None:
        own = jnp.einsum("bhngid,hgd,bhnid->bhngi", q, problem.bonus, k)
        inside = inside + own[..., None] * np.eye(size, dtype=dtype)
    kept, whole = only(decay.until_end(k), at_end), decay.whole()
    if runs is not None:
        stays = (carried == runs[..., -1]).swapaxes(0, 1)[:, None, :, None, None]
        whole = jnp.where(stays, whole, 0)
    inner = Inner(whole, _dot("bhnid,bhniv->bhndv", kept, v), None, None, None)
    if a is not None:
        rows = a[:, :, :, None]
        across = masked(decay.scores(rows, b, exclusive=True), before)[:, :, :, 0]
        right = masked(decay.scores(rows, k, exclusive=True), before)[:, :, :, 0]
        start = only(decay.since_start(rows, exclusive=True)[:, :, :, 0], from_carry)
        inverse = unit_lower_inverse(across)
        read = _dot("bhnij,bhnjv->bhniv", inverse, _dot("bhnij,bhnjv->bhniv", right, v))
        carry_over = _dot("bhnij,bhnjd->bhnid", inverse, start)
        inner = inner._replace(read=read, carry=carry_over, write=only(decay.until_end(b), at_end))
    state, starts, reads = _through(state, inner)
    out = _dot("bhngid,bhndv->bhngiv", from_start, starts) + _dot("bhngij,bhnjv->bhngiv", inside, v)
    if a is not None:
        also = masked(decay.scores(q, b, exclusive=exclusive), seen)
        out = out + _dot("bhngij,bhnjv->bhngiv", also, reads)
    return (state, run), out


def _through(state: jax.Array, inner: Inner) -> tuple[jax.Array, jax.Array, Any]:
    """Carry the state through the chunks of a step: the last one, those at every start, and what was read."""
    count = inner.add.shape[2]
    decays = jnp.broadcast_to(inner.decay, (*inner.decay.shape[:2], count, *inner.decay.shape[3:]))
    starts, reads = [], []
    for i in range(count):
        starts.append(state)
        new = decays[:, :, i] * state + inner.add[:, :, i]
        if inner.read is not None:
            read = inner.read[:, :, i] + _dot("bhid,bhdv->bhiv", inner.carry[:, :, i], state)
            new = new + _dot("bhid,bhiv->bhdv", inner.write[:, :, i], read)
            reads.append(read)
        state = new
    return state, jnp.stack(starts, 2), jnp.stack(reads, 2) if reads else None


def _dot(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, precision=HIGHEST)
