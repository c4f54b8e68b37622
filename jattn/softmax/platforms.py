"""The platform that programs are made for: the one that is attached, or one that is only compiled for."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax


class Platform(NamedTuple):
    """Name ("cpu", "gpu", "tpu") and, on GPUs, the compute capability, as "9.0"."""

    name: str
    capability: str = ""
    attached: bool = True


_TARGET: contextvars.ContextVar[Platform | None] = contextvars.ContextVar("jattn_target", default=None)


def current() -> Platform:
    """The platform that a program traced now is for."""
    target = _TARGET.get()
    if target is not None:
        return target
    name = jax.default_backend()
    capability = str(getattr(jax.devices()[0], "compute_capability", "")) if name == "gpu" else ""
    return Platform(name, capability)


@contextlib.contextmanager
def compiling_for(name: str, capability: str = "") -> Iterator[None]:
    """Choose implementations as if this platform were attached.

    Example:
        >>> with compiling_for("gpu", "9.0"):
        ...     current().name
        'gpu'
    """
    token = _TARGET.set(Platform(name, capability, attached=False))
    try:
        yield
    finally:
        _TARGET.reset(token)
