"""How an attention function is called: only what is asked for is passed, and what cannot be taken is refused."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def name_of(function: Callable[..., Any]) -> str:
    """The name of a function, also inside `functools.partial`."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


@functools.lru_cache(maxsize=512)
def _parameters(function: Callable[..., Any]) -> tuple[frozenset[str], bool]:
    found = inspect.signature(function).parameters
    named = frozenset(n for n, p in found.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD))
    return named, any(p.kind is p.VAR_KEYWORD for p in found.values())


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether a function takes a keyword argument of this name.

    Example:
        >>> accepts(lambda query, key, value, *, mask=None: value, "mask")
        True
    """
    while isinstance(function, functools.partial):
        function = function.func
    named, anything = _parameters(function)
    return anything or name in named


def names_argument(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has an argument of this very name, not only `**arguments` that would take it.

    Example:
        >>> names_argument(lambda query, key, value, **arguments: value, "initial_state")
        False
    """
    while isinstance(function, functools.partial):
        function = function.func
    return name in _parameters(function)[0]


def asked_for(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments that ask for something: not None, not False, and no dropout_rate of 0.

    Args:
        function: an attention function.
        arguments: by name.

    Returns:
        The arguments that the function must be given.

    Raises:
        ValueError: the function has no argument of a name that is asked for.

    Example:
        >>> asked_for(lambda query, key, value, *, scale: value, {"mask": None, "scale": 0.0})
        {'scale': 0.0}
    """
    given = {
        name: argument
        for name, argument in arguments.items()
        if argument is not None and argument is not False and not (name == "dropout_rate" and argument == 0)
    }
    refused = [name for name in given if not accepts(function, name)]
    if refused:
        raise ValueError(
            f"{name_of(function)} does not take {', '.join(refused)}; jattn.dot_product_attention does, and so do the "
            "mechanisms whose signature lists it"
        )
    return given


def call_attention(function: Callable[..., Any], query: Any, key: Any, value: Any, arguments: Mapping[str, Any]) -> Any:
    """Call `function(query, key, value, **arguments)` with those arguments that ask for something.

    Args:
        function: an attention function.
        query: `[B, T, N, D]`.
        key: `[B, S, K, D]`.
        value: `[B, S, K, Dv]`.
        arguments: by name; see `asked_for`.

    Returns:
        What the function returns.

    Raises:
        ValueError: the function has no argument of a name that is asked for.

    Example:
        >>> call_attention(lambda query, key, value: value, 1, 2, 3, {"mask": None})
        3
    """
    return function(query, key, value, **asked_for(function, arguments))
