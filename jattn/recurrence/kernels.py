"""Kernels in place of the matrices of chunks and of the walk along them, during which the state stays on the chip.

On the way back a kernel walks for the gradients of the states alone. After that all chunks are free of each other:
products of XLA give the gradients of their matrices, kernels those of what the matrices were made of. Forward mode and
second derivatives are `implementation="xla"`'s.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jattn.recurrence.chunk import carried_runs, dot, heads_first
from jattn.recurrence.problem import Problem
from jattn.softmax.platforms import current
from pallas_kernels.linear_recurrence.parts import Parts, cotangents

KERNELS = {"triton": "gpu", "tpu": "tpu"}
"""The platform of each kernel. None has been run on its hardware yet, so they run only where they are asked for."""
NARROW = ("rows", "inside", "value", "keys", "carry", "write", "also")
"""Parts that products take in bfloat16 where the inputs have it; states and what is read stay float32."""


class Kernel(NamedTuple):
    """The kernels of one implementation, in the places of `chunk.chunk_parts` and `chunk.walk`.

    Args:
        implementation: "triton" or "tpu".
        narrow: whether products take bfloat16, as the inputs are.
    """

    implementation: str
    narrow: bool

    @property
    def _module(self) -> Any:
        # Pallas takes as long to import as the rest of the library.
        return importlib.import_module(f"pallas_kernels.linear_recurrence.{self.implementation}")

    @property
    def _interpret(self) -> bool:
        return current().name != KERNELS[self.implementation]

    def parts(
        self, problem: Problem, run: Any, arrays: Any, gates: Any, valid: Any, runs: Any, extras: Any
    ) -> tuple[Parts, Any]:
        """As `chunk.chunk_parts`."""
        calls = importlib.import_module("pallas_kernels.linear_recurrence.inside_calls")
        kept = jnp.bfloat16 if self.narrow else problem.dtype
        query, key, value = (heads_first(x) for x in arrays[:3])
        lead, size = key.shape[:3], key.shape[3]
        named = {"q": query, "k": key}
        if problem.a is not None:
            named |= {"a": heads_first(arrays[3]), "b": heads_first(arrays[4])}
        given = {name: _rows(x).astype(kept) for name, x in named.items()}
        given |= {name: _rows(x) for name, x in _gates(problem, gates, lead, size, valid).items()}
        if problem.bonus is not None:
            given["bonus"] = problem.bonus[:, :, None]
        places = {}
        if runs is not None:
            by_chunk = runs.transpose(1, 0, 2)
            run, carried = runs[:, -1, -1], carried_runs(run, by_chunk).T[..., None, None]
            places = {"column": runs[..., None], "row": runs[:, :, None], "carried": carried}
            places["last"] = runs[:, :, -1:, None]
        setup = calls.Setup(
            dot=self._module.dot,
            compiler_params=self._module.inside_params,
            fills=self._module.FILLS,
            heads=lead[1],
            groups=query.shape[3],
            exclusive=problem.read == "pre",
            narrow=self.narrow,
            dtype=problem.dtype,
            interpret=self._interpret,
        )
        found = calls.matrices(setup, given, places)
        found["decay"] = found["decay"].swapaxes(-1, -2)
        for name in ("rows", "inside", "also"):
            if name in found:
                found[name] = found[name].reshape(*found[name].shape[:2], -1, found[name].shape[-1])
        found = {name: x.reshape(*lead[:2], *x.shape[1:]) for name, x in found.items()}
        if "seen" in found:
            found["read"] = dot(found.pop("seen"), value.astype(problem.dtype))
        return Parts(**found, value=value.astype(kept)), run

    def walk(self, state: Any, parts: Parts) -> tuple[jax.Array, jax.Array, None]:
        """As `chunk.walk`, but for the states between chunks."""
        return *_walk(self, state, parts), None


def _rows(x: jax.Array) -> jax.Array:
    """Batch rows and heads as one axis."""
    return x.reshape(-1, *x.shape[2:])


def _gates(problem: Problem, gates: Any, lead: Any, size: int, valid: Any) -> dict[str, jax.Array]:
    """Log decays `[B, H, n, ...]` by the names that kernels have for them; constant ones as those of tokens."""
    if problem.kind == "none":
        return {}
    if problem.kind == "channel":
        return {"gates": heads_first(gates)}
    if problem.kind == "head":
        # Filling does not decay.
        tokens = jnp.arange(size) < valid[:, None]
        column = jnp.broadcast_to(jnp.where(tokens, problem.log_decay[:, None, None], 0), (*lead, size))
    else:
        column = heads_first(gates)
    return {"gates": column[..., None], "gate_row": column[..., None, :]}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _walk(kernel: Kernel, state: Any, parts: Parts) -> tuple[jax.Array, jax.Array]:
    return _forward(kernel, state, parts)[0]


def _flat(kernel: Kernel, parts: Parts) -> Parts:
    """Batch rows and heads as one axis, `[P, ...]`, in the dtypes that products take."""

    def flat(name: str, x: Any) -> Any:
        return None if x is None else _rows(x).astype(jnp.bfloat16 if kernel.narrow and name in NARROW else x.dtype)

    return Parts(*(flat(name, x) for name, x in parts._asdict().items()))


def _options(kernel: Kernel) -> dict[str, Any]:
    precision = None if kernel.narrow else jax.lax.Precision.HIGHEST
    return {"precision": precision, "interpret": kernel._interpret}


def _forward(kernel: Kernel, state: Any, parts: Parts) -> Any:
    out, last, starts = kernel._module.forward(_rows(state), _flat(kernel, parts), **_options(kernel))
    return (out.reshape(*state.shape[:2], *out.shape[1:]), last.reshape(state.shape)), (parts, starts)


def _backward(kernel: Kernel, kept: Any, arriving: Any) -> Any:
    parts, starts = kept
    flat, options = _flat(kernel, parts), _options(kernel)
    d_out, d_last = map(_rows, arriving)
    d_news, d_first = kernel._module.backward(flat, d_out, d_last, **options)
    found = cotangents(flat, starts, d_out, d_news, precision=options["precision"])
    d_parts = (None if x is None else d.reshape(x.shape).astype(x.dtype) for x, d in zip(parts, found, strict=True))
    return d_first.reshape(arriving[1].shape), Parts(*d_parts)


_walk.defvjp(_forward, _backward)
