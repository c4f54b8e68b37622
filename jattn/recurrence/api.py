"""The public engine of linear recurrences: linear attention and all its relatives are front ends of one function."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jattn.recurrence.associative import run_associative
from jattn.recurrence.chunk import run_chunks
from jattn.recurrence.kernels import KERNELS, Kernel
from jattn.recurrence.problem import Problem, flipped, make_problem
from jattn.recurrence.segment_states import count_segments, last_tokens, states_at, states_in_windows
from jattn.recurrence.tokens import run_tokens

MODES = ("recurrent", "chunk", "parallel", "associative")
IMPLEMENTATIONS = ("xla", *KERNELS)


def linear_recurrence(
    query: Any,
    key: Any,
    value: Any,
    *,
    log_decay: Any = None,
    a: Any = None,
    b: Any = None,
    scale: Any = None,
    initial_state: Any = None,
    segment_ids: Any = None,
    reverse: bool = False,
    read: str = "post",
    bonus: Any = None,
    mode: str = "chunk",
    implementation: str | None = None,
    chunk_size: int = 64,
    sub_chunk: int = 16,
    return_final_state: bool = False,
    segment_final_state: bool = False,
    max_segments: int | None = None,
) -> Any:
    """A linear recurrence over matrices, with decay and a rank-1 correction.

    S_t = Diag(exp g_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,   o_t = scale q_t^T S_t

    The rank-1 term reads the undecayed state. Sums and states are float32 at least. Decays are natural logarithms,
    any finite ones from 0 to -1e5 (below, they count as -1e5, whose exponential is 0), at full accuracy however mild
    and strong ones are mixed.

    Args:
        query: `[B, T, N, D]`.
        key: `[B, T, K, D]`; K divides the number of output heads, max(N, heads of value). Output head h reads input
            head h // (outputs / inputs), here and below.
        value: `[B, T, K', Dv]`, more heads than the query or fewer.
        log_decay: g: None, `[N]` (constant), `[B, T, N]` (a token) or `[B, T, N, D]` (a token and key channel); N
            output heads, or a divisor.
        a: `[B, T, N, D]`, what the correction reads; with b, or neither.
        b: `[B, T, N, D]`, where the correction writes.
        scale: of the queries, D^-0.5 if None.
        initial_state: `[B, N, D, Dv]`, the state before the first token; it belongs to the first segment.
        segment_ids: integers `[B, T]`. A run of equal ids is a segment and starts from a zero state; negative =
            padding, which outputs 0 and leaves the state alone.
        reverse: from right to left: flip(recurrence(flip(inputs))) along T.
        read: "post", or "pre": o_t = scale q_t^T (S_{t-1} + Diag(bonus) k_t v_t^T).
        bonus: `[N, D]`, what a token sees of itself with read="pre"; nothing if None.
        mode: "chunk"; "recurrent", token by token; "parallel", one chunk of T tokens; "associative", a scan of
            logarithmic depth over all states, without a and b.
        implementation: who computes mode "chunk": "xla", or the kernel "triton" (NVIDIA GPUs) or "tpu", elsewhere in
            the interpreter of Pallas. None is "xla": no kernel has been run on its hardware yet. Kernels have gradients
            in reverse mode only.
        chunk_size: C, tokens a chunk; no effect on the result.
        sub_chunk: accepted as other libraries have it, and without effect: chunks are halved down to single tokens.
        return_final_state: also return the state after the last token.
        segment_final_state: also return the state after each segment, behind the final state if both are asked for.
            Segments are numbered from the left, with `reverse` too, where the state is that after the segment's
            leftmost token. What there is no segment for is zeros. In a row of nothing but padding the first one is the
            initial state.
        max_segments: M, how many segments of a row have their states returned; what lies to the right of them is left
            out. None counts the segments, which needs ids that are known outside of jit.

    Returns:
        `[B, T, N, Dv]` in the query's dtype; with `return_final_state` also the state, float32 `[B, N, D, Dv]`; with
        `segment_final_state` also those after segments, float32 `[B, M, N, D, Dv]`.

    Raises:
        ValueError: shapes that do not fit, an unknown mode or implementation, a and b in mode "associative", a kernel
            in another mode than "chunk"; max_segments below 1, without `segment_final_state`, or missing where the
            segments cannot be counted.

    Example:
        >>> import jax.numpy as jnp
        >>> one = jnp.ones((1, 4, 1, 1))
        >>> out = linear_recurrence(one, one, one, log_decay=jnp.log(jnp.array([0.5])))
        >>> [round(x, 4) for x in out.ravel().tolist()]
        [1.0, 1.5, 1.75, 1.875]

    Source: common form of linear attention (arXiv 2006.16236), GLA (2312.06635), DeltaNet (2406.06484) and RWKV-7
    (2503.14456), in the semantics of flash-linear-attention.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation must be None or one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    if implementation in KERNELS and mode != "chunk":
        raise ValueError(f"implementation={implementation!r} computes mode='chunk', not mode={mode!r}")
    if chunk_size < 1 or sub_chunk < 1:
        raise ValueError(f"chunk_size and sub_chunk must be at least 1, got {chunk_size} and {sub_chunk}")
    if max_segments is not None and (not segment_final_state or max_segments < 1):
        raise ValueError(f"max_segments must be at least 1 and needs segment_final_state=True; got {max_segments}")
    if segment_final_state and max_segments is None:
        max_segments = count_segments(segment_ids)
    arrays = {"query": query, "key": key, "value": value, "a": a, "b": b, "segment_ids": segment_ids}
    if reverse:
        arrays = {name: flipped(x) for name, x in arrays.items()}
        log_decay = flipped(log_decay)
    problem = make_problem(
        log_decay=log_decay, scale=scale, initial_state=initial_state, read=read, bonus=bonus, **arrays
    )
    kernel = implementation if implementation in KERNELS else None
    out, state, ends = run(problem, mode, chunk_size, kernel, max_segments, reverse)
    out = out.reshape(*out.shape[:2], -1, out.shape[-1]).astype(jnp.asarray(query).dtype)
    out = flipped(out) if reverse else out
    repeats = out.shape[2] // state.shape[1]
    found = [out]
    if return_final_state:
        found.append(jnp.repeat(state, repeats, axis=1))
    if segment_final_state:
        found.append(jnp.repeat(ends, repeats, axis=2))
    return tuple(found) if len(found) > 1 else out


@functools.partial(jax.jit, static_argnames=("mode", "chunk_size", "kernel", "max_segments", "from_the_right"))
def run(
    problem: Problem,
    mode: str,
    chunk_size: int,
    kernel: str | None = None,
    max_segments: int | None = None,
    from_the_right: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """A checked problem: `[B, T, H, G, Dv]`, `[B, H, D, Dv]`, and the states after segments `[B, M, H, D, Dv]` or None.

    Segments are numbered as the problem has them, or from its last token on.
    """
    length, count = problem.query.shape[1], max_segments or 0
    asked = max_segments is not None
    numbers = problem.runs if asked else None
    if numbers is not None and from_the_right:
        numbers = numbers[:, -1:] - numbers
    ends = starts = None
    if mode == "recurrent":
        out, state, ends = run_tokens(problem, numbers, count)
    elif mode == "associative":
        out, states = run_associative(problem)
        state = states[:, -1]
        ends = None if numbers is None else states_at(states, last_tokens(numbers, count))
    else:
        in_chunks = mode == "chunk" and kernel is None
        kernels = None if kernel is None else Kernel(kernel, problem.query.dtype == jnp.bfloat16)
        size = length if mode == "parallel" else chunk_size
        keep = in_chunks and numbers is not None
        out, state, starts = run_chunks(problem, size, kernels, keep_starts=keep)
        if numbers is not None:
            if not in_chunks:
                _, _, starts = run_chunks(problem, chunk_size, keep_starts=True)
            ends = states_in_windows(problem, starts, numbers, count, chunk_size)
    if asked and ends is None:
        ends = jnp.pad(state[:, None], [(0, 0), (0, count - 1), (0, 0), (0, 0), (0, 0)])
    return out, state, ends


def linear_recurrence_step(
    query: Any,
    key: Any,
    value: Any,
    state: Any,
    *,
    log_decay: Any = None,
    a: Any = None,
    b: Any = None,
    scale: Any = None,
    read: str = "post",
    bonus: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """One more token, or a few: the state is all that decoding keeps, whatever has been read.

    S = Diag(exp g) S + b (a^T S) + k v^T,   o = scale q^T S

    Args:
        query: `[B, T, N, D]`, T new tokens, mostly 1; or `[B, N, D]`, one token.
        key: likewise.
        value: likewise.
        state: `[B, N, D, Dv]`.
        log_decay: None, `[N]`, or of the new tokens, as in `linear_recurrence`.
        a: of the new tokens.
        b: of the new tokens.
        scale: of the queries, D^-0.5 if None.
        read: "post" or "pre".
        bonus: `[N, D]` or None.

    Returns:
        The output, shaped like the query with Dv in place of D, and the new state, float32.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> one = jnp.ones((1, 2, 4))
        >>> out, state = linear_recurrence_step(one, one, one, jnp.zeros((1, 2, 4, 4)), scale=1.0)
        >>> out.shape, float(out[0, 0, 0])
        ((1, 2, 4), 4.0)

    Source: as `linear_recurrence`.
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    is_single = query.ndim == 3
    if is_single:

        def with_time(x: Any) -> Any:
            return x if x is None else jnp.asarray(x)[:, None]

        query, key, value, a, b = map(with_time, (query, key, value, a, b))
        log_decay = with_time(log_decay) if log_decay is not None and jnp.ndim(log_decay) > 1 else log_decay
    out, state = linear_recurrence(
        query,
        key,
        value,
        log_decay=log_decay,
        a=a,
        b=b,
        scale=scale,
        initial_state=state,
        read=read,
        bonus=bonus,
        mode="recurrent",
        return_final_state=True,
    )
    return (out[:, 0] if is_single else out), state
