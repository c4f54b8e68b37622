"""The platform that programs are made for: the one that is attached, or one that is only compiled for."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax


class Platform(NamedTuple):
    """Name ("cpu", "gpu", "tpu") and, on GPUs, the compute capability, as "9.0", and the kind, as "NVIDIA H200"."""

    name: str
    capability: str = ""
    attached: bool = True
    kind: str = ""


_TARGET: contextvars.ContextVar[Platform | None] = contextvars.ContextVar("jattn_target", default=None)


def current() -> Platform:
    """The platform that a program traced now is for."""
    target = _TARGET.get()
    if target is not None:
        return target
    name = jax.default_backend()
    if name != "gpu":
        return Platform(name)
    device = jax.devices()[0]
    return Platform(name, str(getattr(device, "compute_capability", "")), kind=device.device_kind)


@contextlib.contextmanager
def compiling_for(name: str, capability: str = "", kind: str = "") -> Iterator[None]:
    """Choose implementations as if this platform were attached.

    Example:
        >>> with compiling_for("gpu", "9.0"):
        ...     current().name
        'gpu'
    """
    token = _TARGET.set(Platform(name, capability, False, kind))
    try:
        yield
    finally:
        _TARGET.reset(token)
