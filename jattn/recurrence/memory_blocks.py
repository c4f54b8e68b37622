"""Blocks of tokens that borders divide: borders are counted from the start of a run, wherever blocks are cut.

In a block that is no longer than the distance between borders, the chunk under way may end and the next one begin, and
later runs may begin; more cannot happen. Each of these three is a phase.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jattn.recurrence.segments import running_sum, runs_of


def places_in_runs(ids: jax.Array) -> jax.Array:
    """Positions of tokens in their runs; padding is not counted, and has the position of the token before it.

    Args:
        ids: int `[B, T]`, negative = padding.

    Returns:
        int32 `[B, T]`; -1 before the first token.

    Example:
        >>> places_in_runs(jnp.array([[-1, 5, 5, -1, 5, 2]])).tolist()
        [[-1, 0, 1, 1, 2, 0]]
    """
    return running_sum((ids >= 0).astype(jnp.int32), runs_of(ids)) - 1


def _rows(ids: Any, position: Any, batch: int, length: int) -> Rows:
    if ids is None:
        seen = jnp.arange(1, length + 1, dtype=jnp.int32)[None]
        seen = seen if position is None else seen + position[:, None]
        shape = (batch, length)
        return Rows(jnp.ones(shape, bool), jnp.zeros(shape, jnp.int32), jnp.broadcast_to(seen, shape))
    runs = runs_of(ids)
    seen = places_in_runs(ids) + 1
    if position is not None:
        seen = seen + jnp.where(runs == 0, position[:, None], 0)
    return Rows(ids >= 0, runs, seen)


class Rows(NamedTuple):
    """What is known of every token beforehand, `[B, T]`."""

    real: Any
    """False for padding."""
    runs: Any
    """Number of its run."""
    seen: Any
    """Tokens of its run up to and including it; in the first run, those since the last border before it count too."""

    @classmethod
    def of(cls, ids: Any, position: Any, batch: int, length: int) -> Rows:
        """Number the tokens of a row; `position` `[B]` counts those since the last border, None for a row's start."""
        if ids is None:
            seen = jnp.arange(1, length + 1, dtype=jnp.int32)[None]
            seen = seen if position is None else seen + position[:, None]
            shape = (batch, length)
            return cls(jnp.ones(shape, bool), jnp.zeros(shape, jnp.int32), jnp.broadcast_to(seen, shape))
        runs, seen = runs_of(ids), places_in_runs(ids) + 1
        if position is not None:
            seen = seen + jnp.where(runs == 0, position[:, None], 0)
        return cls(ids >= 0, runs, seen)

    def cut(self, size: int) -> Rows:
        """In blocks, with an axis for them before all others; the last one is filled up with padding."""
        return Rows(in_blocks(self.real, size), *(in_blocks(x, size, "edge") for x in self[1:]))


class Phases(NamedTuple):
    """The parts of a block whose tokens do not share a border; F parts."""

    members: Any
    """bool `[F, B, C]`."""
    is_new: Any
    """bool `[F]`: of runs that begin in the block."""
    same: Any
    """bool `[B, C, C]`, tokens of one run; None where there is one run."""

    @classmethod
    def of(cls, rows: Rows, run: jax.Array, chunk: jax.Array, chunk_size: int, several: bool) -> Phases:
        """Of a block of no more than chunk_size tokens: the chunk under way, the next one, and runs after `run` `[B]`.

        `chunk` `[B]` is the number of the chunk under way; `several` says whether there may be several runs.
        """
        real, runs, seen = rows
        own, place = real & (runs == run[:, None]), (seen - 1) // chunk_size - chunk[:, None]
        members = [own & (place == 0), own & (place == 1), real & (runs > run[:, None])]
        members = members[: 3 if several else 2] if real.shape[1] > 1 else members[:: 2 if several else 3]
        is_new = jnp.arange(len(members)) == (len(members) - 1 if several else -1)
        return cls(jnp.stack(members), is_new, runs[:, :, None] == runs[:, None] if several else None)

    def same_in(self, is_new: jax.Array) -> Any:
        """As `same`, but for the parts that are of one run anyway, all tokens are."""
        return None if self.same is None else self.same | ~is_new


def choose(condition: jax.Array, yes: Any, no: Any) -> Any:
    """Trees of arrays `[B, ...]`, row by row."""
    return jax.tree.map(lambda x, y: jnp.where(condition.reshape(-1, *(1,) * (x.ndim - 1)), x, y), yes, no)


def in_blocks(x: jax.Array, size: int, mode: str = "constant") -> jax.Array:
    """`[B, T, ...]` -> `[blocks, B, size, ...]`, filled up."""
    extra = -x.shape[1] % size
    x = jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2), mode=mode) if extra else x
    return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)
