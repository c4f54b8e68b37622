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
from pallas_kernels.linear_recurrence.parts import Parts

CHUNKS_A_STEP = 8
"""How many chunks are computed together: enough to keep the cores busy, few enough for what they need to stay near."""


class Cut(NamedTuple):
    """How a row is cut: `steps` steps of `chunks` chunks of `size` tokens, the last ones filled up."""

    steps: int
    chunks: int
    size: int
    length: int

    @classmethod
    def of(cls, length: int, chunk_size: int, chunks_a_step: int | None) -> Cut:
        """Cut T tokens; None puts all chunks into one step."""
        size = min(chunk_size, length)
        count = -(-length // size)
        steps = 1 if chunks_a_step is None else -(-count // chunks_a_step)
        return cls(steps, -(-count // steps), size, length)

    def split(self, x: Any) -> Any:
        """`[B, T, ...]` -> `[steps, B, n, C, ...]`, filled up with zeros."""
        return None if x is None else jnp.moveaxis(self._cut(x, "constant"), 1, 0)

    def rows(self, x: Any) -> Any:
        """`[B, T]` -> `[steps, B, n, C]`, filled up with the last entry."""
        return None if x is None else jnp.moveaxis(self._cut(x, "edge"), 1, 0)

    def _cut(self, x: jax.Array, mode: str) -> jax.Array:
        extra = self.steps * self.chunks * self.size - self.length
        if extra:
            x = jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2), mode=mode)
        return x.reshape(x.shape[0], self.steps, self.chunks, self.size, *x.shape[2:])

    def join(self, rows: jax.Array, batch: int, *rest: int) -> jax.Array:
        """`[steps, B, n, C, *rest]`, without axes of one entry or with them, -> `[B, T, *rest]`."""
        x = rows.reshape(self.steps, batch, self.chunks * self.size, *rest)
        return jnp.moveaxis(x, 0, 1).reshape(batch, -1, *rest)[:, : self.length]

    def valid(self) -> np.ndarray:
        """Tokens of each chunk that are no filling, `[steps, n]`."""
        first = np.arange(self.steps * self.chunks) * self.size
        return np.clip(self.length - first, 0, self.size).reshape(self.steps, self.chunks).astype(np.int32)


def run_chunks(
    problem: Problem, chunk_size: int, kernel: Any = None, *, keep_starts: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Outputs, the final state, and the states between chunks if they are asked for.

    Args:
        problem: what to compute.
        chunk_size: C.
        kernel: what stands in for `chunk_parts` and `walk` and is then given all chunks at once, see `kernels.Kernel`.
        keep_starts: also return the states that come by at the starts of chunks, not with a kernel.

    Returns:
        `[B, T, H, G, Dv]` in the dtype of sums, `[B, H, D, Dv]`, and `[B, chunks, H, D, Dv]` or None.
    """
    cut = Cut.of(problem.query.shape[1], chunk_size, CHUNKS_A_STEP if kernel is None else None)
    arrays = [cut.split(x) for x in (problem.query, problem.key, problem.value, problem.a, problem.b)]
    gates = None if problem.kind in ("none", "head") else cut.split(problem.log_decay)
    extras = tuple(cut.rows(x) for x in problem.extras)
    given = (arrays, gates, jnp.asarray(cut.valid()), cut.rows(problem.runs), extras)
    shapes = jax.tree.map(lambda x: x.shape[1:], given)

    make_parts, carry_through = (chunk_parts, walk) if kernel is None else (kernel.parts, kernel.walk)

    def step(carry: Any, rows: Any) -> Any:
        state, run = carry
        given = jax.tree.map(lambda x, shape: x.reshape(shape), rows, shapes)
        parts, run = make_parts(problem, run, *given)
        out, state, starts = carry_through(state, parts)
        starts = starts.swapaxes(1, 2) if keep_starts else None
        out = problem.scale * out.reshape(*out.shape[:3], -1, cut.size, out.shape[-1])
        return (state, run), (_squeezed(out.transpose(0, 2, 4, 1, 3, 5)), starts)

    batch, _, heads, groups, _ = problem.query.shape
    first = jnp.zeros_like(problem.state, shape=(batch,), dtype=jnp.int32)
    body = jax.checkpoint(step, prevent_cse=cut.steps == 1)
    rows = jax.tree.map(jax.vmap(_squeezed), given)
    if cut.steps == 1:
        (state, _), (out, starts) = body((problem.state, first), jax.tree.map(lambda x: x[0], rows))
    else:
        (state, _), (out, starts) = jax.lax.scan(body, (problem.state, first), rows)
        if keep_starts:
            starts = jnp.moveaxis(starts, 0, 1).reshape(batch, -1, *problem.state.shape[1:])
    return cut.join(out, batch, heads, groups, problem.state.shape[-1]), state, starts


def _squeezed(x: jax.Array) -> jax.Array:
    """Without axes of one entry: XLA would copy what goes into a loop to bring them into order."""
    return x.reshape([size for size in x.shape if size > 1])


def _decay(problem: Problem, gates: Any, size: int, valid: Any) -> Any:
    if problem.kind == "none":
        return NoDecay()
    if problem.kind == "head":
        return HeadDecay(problem.log_decay, size, valid)
    return TokenDecay(gates) if problem.kind == "token" else ChannelDecay(gates)


def chunk_parts(
    problem: Problem, run: Any, arrays: Any, gates: Any, valid: Any, runs: Any, extras: Any
) -> tuple[Parts, Any]:
    """What is computed of chunks before the state comes by.

    Args:
        problem: what to compute.
        run: int32 `[B]`, the run of the state that comes by.
        arrays: query, key, value, a and b as `Cut.split` makes them.
        gates: log decays a token, likewise, or None.
        valid: tokens of each chunk that are no filling, `[n]`.
        runs: `[B, n, C]` or None.
        extras: what `problem.features` wants.

    Returns:
        The parts `[B, H, n, ...]`, rows being those of all queries of a head, and the run of the last token.
    """
    dtype, exclusive = problem.dtype, problem.read == "pre"
    q, k, v, a, b = (None if x is None else heads_first(x.astype(dtype)) for x in arrays)
    assert q is not None and k is not None and v is not None
    gates = None if gates is None else heads_first(gates)
    size = k.shape[-2]
    if problem.features is not None:
        q, k, v = problem.features(q, k, v, extras)
        # Features of zeros need not be zero.
        k = jnp.where((np.arange(size) < valid[:, None])[..., None], k, 0)
    decay = _decay(problem, gates, size, valid)
    through, before = (np.tri(size, k=shift, dtype=bool) for shift in (0, -1))
    same = from_carry = at_end = None
    if runs is not None:
        runs = runs.transpose(1, 0, 2)  # [n, B, C]: the run of the carried state differs chunk by chunk
        carried = carried_runs(run, runs)
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

    def all_rows(x: jax.Array) -> jax.Array:
        """`[B, H, n, G, C, D]` -> `[B, H, n, G C, D]`."""
        return x.reshape(*x.shape[:3], -1, x.shape[-1])

    seen = before if exclusive else through
    inside = masked(decay.scores(q, k, exclusive=exclusive), seen)
    if problem.bonus is not None:
        own = jnp.einsum("bhngid,hgd,bhnid->bhngi", q, problem.bonus, k)
        inside = inside + own[..., None] * np.eye(size, dtype=dtype)
    whole = decay.whole()
    if runs is not None:
        stays = (carried == runs[..., -1]).swapaxes(0, 1)[:, None, :, None, None]
        whole = jnp.where(stays, whole, 0)
    parts = Parts(
        rows=all_rows(only(decay.since_start(q, exclusive=exclusive), from_carry)),
        inside=all_rows(inside),
        value=v,
        keys=only(decay.until_end(k), at_end),
        decay=whole,
    )
    if a is None or b is None:
        return parts, run
    asking = a[:, :, :, None]
    inverse = unit_lower_inverse(masked(decay.scores(asking, b, exclusive=True), before)[:, :, :, 0])
    read = masked(decay.scores(asking, k, exclusive=True), before)[:, :, :, 0]
    start = only(decay.since_start(asking, exclusive=True)[:, :, :, 0], from_carry)
    return parts._replace(
        read=dot(inverse, dot(read, v)),
        carry=dot(inverse, start),
        write=only(decay.until_end(b), at_end),
        also=all_rows(masked(decay.scores(q, b, exclusive=exclusive), seen)),
    ), run


def carried_runs(run: jax.Array, runs: jax.Array) -> jax.Array:
    """The runs `[n, B]` of the states that come by chunks of tokens of runs `[n, B, C]`, the first one of run `[B]`."""
    return jnp.concatenate([run[None], runs[:-1, :, -1]])


def heads_first(x: jax.Array) -> jax.Array:
    """`[B, n, C, H]`, `[B, n, C, H, D]` or `[B, n, C, H, G, D]` to `[B, H, n, C]`, `[B, H, n, (G,) C, D]`."""
    return x.transpose({4: (0, 3, 1, 2), 5: (0, 3, 1, 2, 4), 6: (0, 3, 1, 4, 2, 5)}[x.ndim])


def walk(state: jax.Array, parts: Parts) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Carry the state through chunks: outputs `[B, H, n, M, Dv]`, the last state, and those at all starts."""
    count = parts.keys.shape[2]
    decays = jnp.broadcast_to(parts.decay, (*parts.decay.shape[:2], count, *parts.decay.shape[3:]))
    added = dot(parts.keys.swapaxes(-1, -2), parts.value)
    starts, reads = [], []
    for i in range(count):
        starts.append(state)
        new = decays[:, :, i] * state + added[:, :, i]
        if parts.read is not None:
            reads.append(parts.read[:, :, i] + dot(parts.carry[:, :, i], state))
            new = new + dot(parts.write[:, :, i].swapaxes(-1, -2), reads[-1])
        state = new
    carried = jnp.stack(starts, 2)
    out = dot(parts.rows, carried) + dot(parts.inside, parts.value)
    return (out + dot(parts.also, jnp.stack(reads, 2)) if reads else out), state, carried


def dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """Products of matrices in the last two axes."""
    return jnp.matmul(x, y, precision=HIGHEST)
