"""The states after segments, exactly, without holding a state for every token.

The state after a segment's last token e is the final state of a recurrence over e's chunk alone, of which only the
segment's tokens are shown. It starts from the state at the chunk's start if that belongs to the segment, else from
zeros. So M states take the states between chunks and M chunks more, however long the segments are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.recurrence.chunk import CHUNKS_A_STEP, Cut, run_chunks
from jattn.recurrence.problem import Problem
from jattn.softmax.segments import renumber_segments


def count_segments(segment_ids: Any) -> int:
    """How many segments the row with most of them has, at least 1.

    Args:
        segment_ids: integers `[B, T]` or `[T]`, known outside of jit; None for a single segment.

    Raises:
        ValueError: ids that are not known.

    Example:
        >>> count_segments(np.array([[4, 4, 2, -1], [0, 1, 1, 0]]))
        3
    """
    if segment_ids is None:
        return 1
    if isinstance(segment_ids, jax.core.Tracer):
        raise ValueError("max_segments must be given under jit, where the segments cannot be counted")
    return max(1, int(np.max(renumber_segments(np.asarray(segment_ids)))) + 1)


def last_tokens(numbers: jax.Array, count: int) -> jax.Array:
    """The last token of each segment, in the order of the scan.

    Args:
        numbers: int32 `[B, T]`, the segment of each token.
        count: M; segments from M on are left out.

    Returns:
        int32 `[B, M]`, -1 where there is no such segment.

    Example:
        >>> last_tokens(jnp.array([[0, 0, 1, 1]]), 3).tolist()
        [[1, 3, -1]]
    """
    batch, length = numbers.shape
    none = jnp.full_like(numbers, -1, shape=(batch, count))
    return none.at[np.arange(batch)[:, None], numbers].max(np.arange(length, dtype=np.int32), mode="drop")


def states_at(states: jax.Array, tokens: jax.Array) -> jax.Array:
    """Out of all states `[B, T + 1, H, D, Dv]` those after tokens `[B, M]`, zeros for token -1."""
    taken = states[np.arange(states.shape[0])[:, None], tokens + 1]
    return jnp.where((tokens >= 0)[..., None, None, None], taken, 0)


def states_in_windows(problem: Problem, starts: Any, numbers: jax.Array, count: int, chunk_size: int) -> jax.Array:
    """The states after segments, from those at the starts of chunks.

    Args:
        problem: what was computed.
        starts: `[B, chunks, H, D, Dv]`.
        numbers: int32 `[B, T]`, the segment of each token.
        count: M.
        chunk_size: C, between the starts.

    Returns:
        `[B, M, H, D, Dv]`.
    """
    cut = Cut.of(numbers.shape[1], chunk_size, None)
    rows, wanted = np.arange(numbers.shape[0]), np.arange(count)[:, None]
    chunk = jnp.maximum(last_tokens(numbers, count).T, 0) // cut.size  # [M, B]
    before = jnp.maximum(chunk * cut.size - 1, 0)
    state = jnp.where((numbers[rows, before] == wanted)[..., None, None, None], starts[rows, chunk], 0)
    shown = cut.rows(numbers)[0][rows, chunk] == wanted[..., None]

    def window(x: Any) -> Any:
        if x is None:
            return None
        x = cut.split(x)[0][rows, chunk]
        return jnp.where(shown.reshape(*shown.shape, *(1,) * (x.ndim - 3)), x, 0)

    def last_state(given: Any) -> jax.Array:
        state, key, value, log_decay, a, b = given
        # Queries have no part in states.
        query = jnp.zeros_like(key)[:, :, :, None]
        part = Problem(query, key, value, log_decay, a, b, state, None, 1.0)
        return run_chunks(part, cut.size)[1]

    arrays = (problem.key, problem.value, problem.log_decay, problem.a, problem.b)
    found = jax.lax.map(last_state, (state, *map(window, arrays)), batch_size=CHUNKS_A_STEP)
    return jnp.moveaxis(found, 0, 1)
