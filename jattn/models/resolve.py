"""Where a name becomes a layer: a catalogued mechanism and its hyper-parameters as a layer factory."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any

from flax import nnx

from jattn import catalog
from jattn.layers.attention import MultiHeadAttention
from jattn.mechanisms.entry import PATTERNS, Entry

# What the layer itself passes, from the call or from the model's configuration.
_FROM_CALL = frozenset(
    ("query", "key", "value", "bias", "mask", "is_causal", "segment_ids", "query_positions", "key_positions", "scale")
    + ("score_mod", "dropout_rate", "dropout_key", "logit_soft_cap", "sinks", "return_residual")
    + ("query_seq_lengths", "key_value_seq_lengths", "initial_state", "return_final_state")
)
_FROM_MODEL = frozenset(
    ("self", "features", "num_heads", "num_kv_heads", "head_dim", "position", "dtype", "param_dtype", "rngs")
    + ("attention_fn", "context_features")
)


def keywords(function: Callable[..., Any]) -> frozenset[str]:
    """Keyword arguments of a function, or of a class and the bases that its `**kwargs` go to.

    Example:
        >>> sorted(keywords(lambda query, *, window=1: query))
        ['query', 'window']
    """
    names: set[str] = set()
    functions = [function]
    if isinstance(function, type):
        functions = [c.__dict__["__init__"] for c in function.__mro__ if "__init__" in c.__dict__ and c is not object]
    for one in functions:
        parameters = inspect.signature(one).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return frozenset(names)


def is_attention(entry: Entry) -> bool:
    """Whether an entry can stand in a model's attention: a layer, or a function of (query, key, value)."""
    if entry.layer is not None:
        return {"features", "num_heads"} <= keywords(entry.layer)
    names = list(inspect.signature(entry.target).parameters)
    return names[:3] == ["query", "key", "value"]


def options_of(entry: Entry) -> frozenset[str]:
    """The hyper-parameters that `resolve` takes for an entry."""
    if entry.layer is not None:
        return keywords(entry.layer) - _FROM_MODEL
    return (keywords(entry.target) - _FROM_CALL | keywords(MultiHeadAttention)) - _FROM_MODEL


def resolve(name: str, pattern: str | None = None, /, **options: Any) -> Callable[..., nnx.Module]:
    """Turn the name of a mechanism into a factory of layers.

    Args:
        name: a catalogued mechanism: a layer, or a function of (query, key, value), which `MultiHeadAttention` then
            calls.
        pattern: what it must support, such as `"causal self"`; anything if not given.
        **options: hyper-parameters of the mechanism, and for a function those of `MultiHeadAttention` too.

    Returns:
        `factory(features, num_heads, *, num_kv_heads, head_dim, position, dtype, param_dtype, rngs) -> layer`.

    Raises:
        ValueError: an unknown name (the nearest ones are listed), an entry that is no attention or lacks the pattern,
            or an unknown option (the valid ones are listed).

    Example:
        >>> from flax import nnx
        >>> factory = resolve("softmax_attention", "causal self", qk_norm="rmsnorm")
        >>> type(factory(16, 4, rngs=nnx.Rngs(0))).__name__
        'MultiHeadAttention'
    """
    if pattern is not None and pattern not in PATTERNS:
        raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, got {pattern!r}")
    entry = catalog.find(name)
    if not is_attention(entry):
        raise ValueError(
            f"{name} is a {entry.kind}, which cannot stand as the attention of a model: that takes a layer or a "
            "function of (query, key, value)"
        )
    if pattern is not None and pattern not in entry.patterns:
        raise ValueError(f"{name} does not support {pattern!r}; it supports: {', '.join(entry.patterns) or 'nothing'}")
    valid = options_of(entry)
    for option in options:
        if option not in valid:
            near = difflib.get_close_matches(option, valid, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"{name} has no option {option!r}.{hint} Valid options: {', '.join(sorted(valid))}")
    if entry.layer is not None:
        return functools.partial(entry.layer, **options)
    own = keywords(entry.target) - _FROM_CALL - _FROM_MODEL
    bound = {name: value for name, value in options.items() if name in own}
    rest = {name: value for name, value in options.items() if name not in own}
    function = functools.partial(entry.target, **bound) if bound else entry.target
    return functools.partial(MultiHeadAttention, attention_fn=function, **rest)
