"""How much the compiler should think: little for programs that are checked once, as usual where cost is measured."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

# Compiler option -> (value for a quick compilation, usual value).
_OPTIONS: dict[str, tuple[Any, Any]] = {
    "xla_backend_optimization_level": (0, 3),
    "xla_llvm_disable_expensive_passes": (True, False),
    "xla_cpu_use_fusion_emitters": (False, True),
}


@functools.cache
def _known(option: str) -> bool:
    """Whether this version of the compiler has the option; they come and go."""
    try:
        jax.jit(lambda: 0, compiler_options={option: _OPTIONS[option][1]})()
    except Exception:  # The runtime's own class, which has no public name.
        return False
    return True


def quick_options() -> dict[str, Any]:
    """Compiler options for programs that run once or twice: compiled three times faster, slow to run.

    Example:
        >>> jax.jit(lambda x: x + 1, compiler_options=quick_options())(1).item()
        2
    """
    return {option: quick for option, (quick, _) in _OPTIONS.items() if _known(option)}


def usual_options() -> dict[str, Any]:
    """Compiler options as users have them, also in a process that was started with quick ones.

    Example:
        >>> jax.jit(lambda x: x + 1, compiler_options=usual_options())(1).item()
        2
    """
    return {option: usual for option, (_, usual) in _OPTIONS.items() if _known(option)}


def quick_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` with the quick options.

    Example:
        >>> quick_jit(lambda x: x + 1)(1).item()
        2
    """
    return jax.jit(function, compiler_options=quick_options())
