"""A memory that is trained, by gradient descent with momentum and forgetting, while it is read.

    M(x; W) = x + LN(gelu(gelu(x W_1) ...) W_L),  or without "x + LN"        l(W; t) = |M(k_t; W) - v_t|^2
    S_t = eta_t S_{t-1} - theta_t grad l(W_c; t),   W_t = (1 - alpha_t) W_{t-1} + S_t,   y_t = M(q_t; W_t)

W_c is the memory at the last chunk border. Every chunk's gradients are taken there, and the gradient of a matrix is the
product x_j e_j^T of its input for key j and the error that comes back to its output. So no W_t ever exists:

    a W_t = exp(B_t) a W + f_t a S - sum_{j <= t} G_tj (a . x_j) e_j                         W, S: before the block
    f_t = sum_{i <= t} exp(B_t - B_i + m_i),   G_tj = theta_j sum_{i = j..t} exp(B_t - B_i + m_i - m_j)

B and m are running sums of log(1 - alpha) and log eta; a difference of two is computed as the sum over its interval.
With `update="chunk"` a chunk makes one step with its gates' means, and only its last token sees it.

A block of at most `BLOCK` tokens is computed at once. Borders are counted from the start of a run, so in a block the
chunk under way may end and the next one begin, and later runs may begin; since a block is no longer than a chunk, more
cannot happen. Each of these three is a phase with weights of its own; a row that starts at a border has only the first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jattn.recurrence.memory_blocks import Phases, Rows, choose, in_blocks
from jattn.recurrence.memory_plans import PLANS, Tokens, dot
from jattn.recurrence.problem import varying_like

BLOCK = 64
"""Tokens that are computed at once at most; longer chunks are computed in blocks, with the border's weights kept."""

EPSILON = 1e-5
"""Of the LayerNorm around the memory."""
LEAST = 1e-30
"""What a gate of exactly 0 is raised to before its logarithm is taken: nothing is left of a product with it."""


class MemoryState(NamedTuple):
    """What a memory keeps between calls; batch axis first, float32 at least.

    `weights` W and `momentum` S are tuples of matrices `[B, H, in, out]`. `held` is a third such tuple: the weights at
    the last chunk border, or with `update="chunk"` the gradients collected since. `means` `[B, H, 2]` collects gates
    there and is () otherwise. `position` int32 `[B]` counts the tokens since the border.
    """

    weights: Any
    momentum: Any
    held: Any
    means: Any
    position: Any


def log_gates(forget: Any, momentum: Any) -> tuple[jax.Array, jax.Array]:
    """log(1 - alpha) and log eta of gates in [0, 1]; a gate that lets nothing through gives log 1e-30.

    Derivatives are those of the gates themselves, also there: the products that the logarithms are made for then
    change as they should.

    Example:
        >>> [round(float(x), 2) for x in log_gates(0.5, 0.0)]
        [-0.69, -69.08]
    """
    forget, momentum = jnp.asarray(forget), jnp.asarray(momentum)
    closed = 1 - forget <= LEAST
    keep = jnp.log1p(-jnp.where(closed, 0, forget))
    return jnp.where(closed, _floored(1 - forget), keep), _floored(momentum)


def _floored(x: jax.Array) -> jax.Array:
    return jnp.log(jnp.where(x > LEAST, x, LEAST + (x - jax.lax.stop_gradient(x))))


def apply_memory(weights: Any, x: jax.Array, *, residual: bool) -> jax.Array:
    """M(x; W): what a memory answers, all tokens with the same weights.

    Args:
        weights: matrices `[B, H, in, out]`.
        x: `[B, H, G, C, D]`.
        residual: whether x and a LayerNorm stand around the matrices.

    Returns:
        `[B, H, G, C, V]`.
    """
    hidden = x
    for i, matrix in enumerate(weights):
        hidden = dot("bhgcd,bhde->bhgce", hidden, matrix)
        hidden = _gelu(hidden) if i + 1 < len(weights) else hidden
    return _wrapped(x, hidden, residual)


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _wrapped(x: jax.Array, y: jax.Array, residual: bool) -> jax.Array:
    if not residual:
        return y
    centered = y - y.mean(-1, keepdims=True)
    return x + centered * jax.lax.rsqrt((centered * centered).mean(-1, keepdims=True) + EPSILON)


def _gradients(weights: Any, tokens: Tokens, residual: bool) -> tuple[Any, Any]:
    """Inputs x `[B, H, C, in]` and errors e `[B, H, C, out]` of every matrix; its gradient for token j is x_j e_j^T."""

    def loss(shifts: Any) -> Any:
        hidden, inputs = tokens.key, []
        for i, (matrix, shift) in enumerate(zip(weights, shifts, strict=True)):
            inputs.append(hidden)
            hidden = dot("bhcd,bhde->bhce", hidden, matrix) + shift
            hidden = _gelu(hidden) if i + 1 < len(weights) else hidden
        missed = _wrapped(tokens.key, hidden, residual) - tokens.value
        return jnp.sum(missed * missed), inputs

    sources = (tokens.key, tokens.value, *weights)
    nothing = [varying_like(jnp.zeros((*tokens.key.shape[:3], w.shape[-1]), w.dtype), *sources) for w in weights]
    errors, inputs = jax.grad(loss, has_aux=True)(nothing)
    return inputs, errors


def start_state(weights: Any, momentum: Any, update: str) -> MemoryState:
    """The memory at a border, from matrices `[B, H, in, out]`."""
    batch, heads = weights[0].shape[:2]
    nothing = jax.tree.map(jnp.zeros_like, weights)
    means = jnp.zeros((batch, heads, 2), weights[0].dtype) if update == "chunk" else ()
    return MemoryState(weights, momentum, nothing if update == "chunk" else weights, means, jnp.zeros(batch, jnp.int32))


class Learner(NamedTuple):
    """What stays the same from block to block."""

    first: Any
    """The weights and the momentum that every run starts with, matrices `[B, H, in, out]`."""
    residual: bool
    update: str
    chunk_size: int

    def phase(
        self, border: Any, parts: Any, means: Any, tokens: Tokens, member: jax.Array, seen: jax.Array, same: Any = None
    ) -> tuple[jax.Array, Any, Any]:
        """Outputs of a block's members, whose gradients are taken at `border`, and the parts and means after the block.

        Args:
            border: weights.
            parts: W, S and with `update="chunk"` A before the block.
            means: of `MemoryState`.
            tokens: the block.
            member: bool `[B, C]`.
            seen: tokens of the run up to each, int `[B, C]`.
            same: bool `[B, C, C]`, whether two tokens are of one run; None for one run.
        """
        inputs, errors = _gradients(border, tokens, self.residual)
        last = member & (seen % self.chunk_size == 0)
        plan = PLANS[self.update](tokens, member, same, last, means, self.chunk_size)
        hidden = tokens.query
        for i, (x, e) in enumerate(zip(inputs, errors, strict=True)):
            scores = dot("bhgcd,bhjd->bhgcj", hidden, x) * plan.write[:, :, None]
            read = dot("bhgcj,bhje->bhgce", scores, e)
            for p, part in enumerate(parts):
                read = read + plan.read[:, :, p, None, :, None] * dot("bhgcd,bhde->bhgce", hidden, part[i])
            hidden = _gelu(read) if i + 1 < len(inputs) else read
        ends = tuple(
            tuple(
                sum(plan.end[:, :, q, p, None, None] * part[i] for p, part in enumerate(parts))
                + dot("bhjd,bhje->bhde", plan.end_write[:, :, q, :, None] * x, e)
                for i, (x, e) in enumerate(zip(inputs, errors, strict=True))
            )
            for q in range(len(parts))
        )
        return _wrapped(tokens.query, hidden, self.residual), ends, plan.means

    def fresh(self, means: Any) -> tuple[Any, Any]:
        """Parts and means at the start of a run."""
        parts, nothing = self.first, jax.tree.map(jnp.zeros_like, (self.first[0], means))
        return parts if self.update == "token" else (*parts, nothing[0]), nothing[1]


def _aligned_step(learner: Learner, is_chunk: bool, carry: Any, block: Any) -> tuple[Any, jax.Array]:
    """A block of a row that started at a border, so that no chunk ends inside of a block."""
    parts, held, means = carry
    tokens, rows = block
    border = parts[0] if is_chunk else held or parts[0]
    out, parts, means = learner.phase(border, parts, means, tokens, rows.real, rows.seen)
    held = choose(rows.seen[:, -1] % learner.chunk_size == 0, parts[0], border) if held else held
    return (parts, held, means), out


def _general_step(learner: Learner, several: bool, carry: Any, block: Any) -> tuple[Any, jax.Array]:
    """A block in its phases."""
    *memory, run, chunk = carry
    tokens, rows = block
    phases, last = Phases.of(rows, run, chunk, learner.chunk_size, several), rows.runs[:, -1]
    start, nothing = learner.fresh(memory[2])
    fresh = (start, start[0] if memory[1] else (), nothing)

    def phase(before: Any, which: Any) -> tuple[Any, jax.Array]:
        member, is_new = which
        same = phases.same_in(is_new)
        parts, held, means = before
        if several:
            parts, held, means = jax.tree.map(lambda x, y: jnp.where(is_new, x, y), fresh, before)
        out, parts, means = learner.phase(held or parts[0], parts, means, tokens, member, rows.seen, same)
        done = member & (rows.seen % learner.chunk_size == 0)
        held = choose((done if same is None else done & same[:, -1]).any(1), parts[0], held) if held else held
        after = (parts, held, means)
        after = choose(~is_new | (last > run), after, before) if several else after
        return after, jnp.where(member[:, None, None, :, None], out, 0)

    after, outs = jax.lax.scan(phase, tuple(memory), (phases.members, phases.is_new))
    return (*after, last, rows.seen[:, -1] // learner.chunk_size), outs.sum(0)


def run_memory(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_keep: jax.Array,
    log_momentum: jax.Array,
    step: jax.Array,
    weights: Any,
    *,
    chunk_size: int,
    update: str = "token",
    residual: bool = False,
    momentum: Any = None,
    state: MemoryState | None = None,
    segment_ids: Any = None,
    at_border: bool = False,
    one_run: bool = False,
    padding_last: bool = False,
) -> tuple[jax.Array, MemoryState]:
    """Write tokens into a memory and read it at each.

    Args:
        query: `[B, T, N, D]`.
        key: `[B, T, H, D]`; H divides N.
        value: `[B, T, H, V]`.
        log_keep: log(1 - alpha) `[B, T, H]`.
        log_momentum: log eta, likewise.
        step: theta, likewise.
        weights: matrices `[H, in, out]` or `[B, H, in, out]` that every run starts with.
        chunk_size: b.
        update: "token" or "chunk".
        residual: of `apply_memory`.
        momentum: S that every run starts with, like the weights; zeros if None.
        state: what earlier tokens left behind; it belongs to the first run.
        segment_ids: int `[B, T]`, negative = padding, which is skipped; None for one run.
        at_border: the state is known to stand at a border.
        one_run: ids only mark padding.
        padding_last: and it stands at the end.

    Returns:
        `[B, T, N, V]` in the dtype of states, and the state after the last token.
    """
    batch, length, heads = key.shape[:3]
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    ids = None if segment_ids is None else jnp.broadcast_to(segment_ids, (batch, length))
    arrays = [x.astype(dtype) for x in (query, key, value, log_keep, log_momentum, step)]
    if ids is not None:
        arrays = [jnp.where((ids >= 0).reshape(batch, length, *(1,) * (x.ndim - 2)), x, 0) for x in arrays]
    first, push = (
        tuple(jnp.broadcast_to(w, (batch, *w.shape[-3:])).astype(dtype) for w in matrices)
        for matrices in (weights, jax.tree.map(jnp.zeros_like, weights) if momentum is None else momentum)
    )
    learner = Learner((first, push), residual, update, chunk_size)
    at_border = at_border or state is None
    state = start_state(first, push, update) if state is None else state
    state = jax.tree.map(lambda x: x if x.dtype.kind == "i" else x.astype(dtype), state)
    is_token = update == "token"
    parts = (state.weights, state.momentum) if is_token else (state.weights, state.momentum, state.held)
    held, means, position = state.held if is_token else (), state.means, state.position
    size = min(chunk_size, BLOCK, length)
    rows = Rows.of(ids, None if at_border else position, batch, length)
    aligned = (ids is None or padding_last) and at_border and (chunk_size % size == 0 or length <= chunk_size)
    blocks = (_tokens(arrays, heads, size), rows.cut(size))
    parts, held, means, position = jax.tree.map(
        lambda x: varying_like(x, *arrays, *first, *push, *jax.tree.leaves((parts, held, means, ids))),
        (parts, held, means, position),
    )
    count = blocks[1].real.shape[0]
    carry: Any = (parts, held, means)
    if not aligned:
        carry = (*carry, jnp.zeros_like(position), jnp.zeros_like(position))

    def step_through(carry: Any, block: Any) -> Any:
        if aligned:
            return _aligned_step(learner, size == chunk_size, carry, block)
        return _general_step(learner, ids is not None and not one_run, carry, block)

    body = jax.checkpoint(step_through, prevent_cse=count == 1)
    if count == 1:
        carry, out = body(carry, jax.tree.map(lambda x: x[0], blocks))
        out = out[None]
    else:
        carry, out = jax.lax.scan(body, carry, blocks)
    parts, held, means = carry[:3]
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, query.shape[2], out.shape[-1])[:, :length]
    held = held if is_token else parts[2]
    return out, MemoryState(parts[0], parts[1], held, means, rows.seen[:, -1] % chunk_size)


def _tokens(arrays: Any, heads: int, size: int) -> Tokens:
    """Arrays `[B, T, heads, ...]` in blocks, heads first."""
    query, key, value, *gates = (in_blocks(x, size) for x in arrays)
    query = query.reshape(*query.shape[:3], heads, -1, query.shape[-1]).transpose(0, 1, 3, 4, 2, 5)
    return Tokens(query, key.swapaxes(2, 3), value.swapaxes(2, 3), *(x.swapaxes(2, 3) for x in gates))
