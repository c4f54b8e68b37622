"""Kernels in place of the walk along chunks: the state stays on the chip.

What is computed of chunks before the state comes by stays with XLA. So do, in reverse mode, the gradients of it: the
kernel walks back for the gradients of the states alone, after which all chunks are free of each other. Forward mode and
second derivatives are `implementation="xla"`'s.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp

from jattn.softmax.platforms import current
from pallas_kernels.linear_recurrence.parts import Parts, cotangents

KERNELS = {"triton": "gpu", "tpu": "tpu"}
"""The platform of each kernel. None has been run on its hardware yet, so they run only where they are asked for."""
NARROW = ("rows", "inside", "value", "keys", "carry", "write", "also")
"""Parts that products take in bfloat16 where the inputs have it; states and what is read stay float32."""


def kernel_walk(implementation: str, dtype: Any) -> Any:
    """`(state, parts) -> (outputs, state)` of a kernel.

    Args:
        implementation: "triton" or "tpu".
        dtype: of the inputs.
    """
    return functools.partial(_walk, implementation, jnp.dtype(dtype) == jnp.bfloat16)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _walk(implementation: str, narrow: bool, state: Any, parts: Parts) -> tuple[jax.Array, jax.Array]:
    return _forward(implementation, narrow, state, parts)[0]


def _flat(narrow: bool, state: Any, parts: Parts) -> tuple[Any, Parts]:
    """Batch rows and heads as one axis, `[P, ...]`."""
    lead = parts.keys.shape[:3]
    decay = jnp.broadcast_to(parts.decay, (*lead, parts.keys.shape[-1], 1))
    parts = parts._replace(decay=decay.astype(state.dtype))

    def flat(name: str, x: Any) -> Any:
        if x is None:
            return None
        x = x.reshape(-1, *x.shape[2:])
        return x.astype(jnp.bfloat16) if narrow and name in NARROW else x

    return state.reshape(-1, *state.shape[2:]), Parts(*(flat(name, x) for name, x in parts._asdict().items()))


def _options(implementation: str, narrow: bool) -> dict[str, Any]:
    platform = current().name
    precision = None if narrow else jax.lax.Precision.HIGHEST
    return {"precision": precision, "interpret": platform != KERNELS[implementation]}


def _module(implementation: str) -> Any:
    # Pallas takes as long to import as the rest of the library.
    return importlib.import_module(f"pallas_kernels.linear_recurrence.{implementation}")


def _forward(implementation: str, narrow: bool, state: Any, parts: Parts) -> Any:
    first, flat = _flat(narrow, state, parts)
    out, last, starts = _module(implementation).forward(first, flat, **_options(implementation, narrow))
    lead = state.shape[:2]
    return (out.reshape(*lead, *out.shape[1:]), last.reshape(state.shape)), (state, parts, starts)


def _backward(implementation: str, narrow: bool, kept: Any, arriving: Any) -> Any:
    state, parts, starts = kept
    _, flat = _flat(narrow, state, parts)
    d_out, d_last = (x.reshape(-1, *x.shape[2:]) for x in arriving)
    options = _options(implementation, narrow)
    d_news, d_first = _module(implementation).backward(flat, d_out, d_last, **options)
    d_flat = cotangents(flat, starts, d_out, d_news, precision=options["precision"])

    def back(like: Any, x: Any) -> Any:
        if like is None:
            return None
        x = x.reshape(*state.shape[:2], *x.shape[1:]).astype(like.dtype)
        spread = tuple(k for k in range(x.ndim) if like.shape[k] == 1 and x.shape[k] > 1)
        return x.sum(spread, keepdims=True) if spread else x

    return d_first.reshape(state.shape), Parts(*map(back, parts, d_flat))


_walk.defvjp(_forward, _backward)
