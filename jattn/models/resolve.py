"""Where a name becomes a layer: a catalogued mechanism and its hyper-parameters as a layer factory."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax import nnx

from jattn import catalog
from jattn.layers.attention import MultiHeadAttention
from jattn.mechanisms.entry import PATTERNS, Entry
from jattn.softmax.api import dot_product_attention
from jattn.softmax.masks import Mask

# What the layer itself passes, from the call or from the model's configuration.
_FROM_CALL = frozenset(
    ("query", "key", "value", "bias", "mask", "is_causal", "segment_ids", "query_positions", "key_positions", "scale")
    + ("score_mod", "dropout_rate", "dropout_key", "logit_soft_cap", "sinks", "return_residual")
    + ("query_seq_lengths", "key_value_seq_lengths", "initial_state", "return_final_state")
)
_FROM_MODEL = frozenset(
    ("self", "features", "num_heads", "num_kv_heads", "head_dim", "position", "dtype", "param_dtype", "rngs")
    + ("attention_fn", "context_features", "layer", "num_layers")
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


MASKED = ("mask", "cache")
"""Kinds that stand for softmax attention under a mask: their own, or what a cache of that policy lets queries see."""


def is_attention(entry: Entry) -> bool:
    """Whether an entry can stand in a model's attention: a layer without an MLP, a function, or a mask."""
    if entry.layer is not None:
        return not getattr(entry.layer, "has_mlp", False) and {"features", "num_heads"} <= keywords(entry.layer)
    parameters = inspect.signature(entry.target).parameters
    # One that needs gates besides gets them from a layer around it.
    needed = [name for name, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    is_switched = "causal self" not in entry.patterns or "is_causal" in parameters
    return entry.kind in MASKED or (needed == ["query", "key", "value"] and is_switched)


def own_options(entry: Entry) -> frozenset[str]:
    """The hyper-parameters of an entry that is a function."""
    if entry.kind in MASKED:
        return frozenset(inspect.signature(entry.target).parameters)
    return keywords(entry.target) - _FROM_CALL - _FROM_MODEL


def options_of(entry: Entry) -> frozenset[str]:
    """The hyper-parameters that `resolve` takes for an entry."""
    if entry.layer is not None:
        return keywords(entry.layer) - _FROM_MODEL
    return own_options(entry) | keywords(MultiHeadAttention) - _FROM_MODEL


def attention_entry(name: str, pattern: str | None = None) -> Entry:
    """The entry of a mechanism that can stand in a model's attention.

    Raises:
        ValueError: an unknown name or pattern, or an entry that is no attention or lacks the pattern.
    """
    if pattern is not None and pattern not in PATTERNS:
        raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, got {pattern!r}")
    entry = catalog.find(name)
    if not is_attention(entry):
        raise ValueError(
            f"{name} is a {entry.kind}, which cannot stand as the attention of a model: that takes a layer, a "
            "function of (query, key, value), a mask or a cache policy"
        )
    if pattern is not None and pattern not in entry.patterns:
        raise ValueError(f"{name} does not support {pattern!r}; it supports: {', '.join(entry.patterns) or 'nothing'}")
    return entry


def _check_options(entry: Entry, options: Iterable[str], valid: frozenset[str]) -> None:
    for option in options:
        if option not in valid:
            near = difflib.get_close_matches(option, valid, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"{entry.name} has no option {option!r}.{hint} Valid options: {', '.join(sorted(valid))}")


def resolve_function(name: str, pattern: str | None = None, /, **options: Any) -> Callable[..., Any]:
    """Turn the name of a mechanism without parameters into an attention function.

    Args:
        name: a catalogued function of (query, key, value), a mask, or the policy of a cache.
        pattern: what it must support, such as `"causal self"`; anything if not given.
        **options: its hyper-parameters.

    Returns:
        A function of (query, key, value) with the options bound.

    Raises:
        ValueError: as `resolve`, and for a mechanism that is a layer.

    Example:
        >>> import jax.numpy as jnp
        >>> function = resolve_function("window_cache", "causal self", window=2)
        >>> function(*[jnp.ones((1, 3, 1, 4))] * 3, is_causal=True).shape
        (1, 3, 1, 4)
    """
    entry = attention_entry(name, pattern)
    if entry.layer is not None:
        raise ValueError(f"{name} is a layer with parameters of its own; a function of (query, key, value) is needed")
    _check_options(entry, options, own_options(entry))
    if entry.kind == "mask":
        return functools.partial(masked_attention, visible=entry.target(**options))
    if entry.kind == "cache":
        return functools.partial(masked_attention, visible=entry.target(**options).parallel_mask())
    return functools.partial(entry.target, **options) if options else entry.target


def masked_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    visible: Mask,
    mask: Any = None,
    query_positions: Any = None,
    key_positions: Any = None,
    **arguments: Any,
) -> jax.Array:
    """Softmax attention under a mask that belongs to the mechanism, and that of the call.

    o = softmax(scale q k^T + log [visible & mask]) v

    Args:
        query: `[B, T, N, D]`.
        key: `[B, S, K, D]`.
        value: `[B, S, K, Dv]`.
        visible: the mask of the mechanism.
        mask: an array or a Mask.
        query_positions: `[B|1, T]`, what masks see instead of 0 .. T-1.
        key_positions: `[B|1, S]`.
        **arguments: of `jattn.dot_product_attention`.

    Returns:
        `[B, T, N, Dv]`.
    """
    both: Any = visible
    if isinstance(mask, Mask):
        both = visible & mask
    elif mask is not None:
        shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
        places = {"query_positions": query_positions, "key_positions": key_positions}
        both = visible.to_dense(*shape, **places) & mask
    return dot_product_attention(
        query, key, value, mask=both, query_positions=query_positions, key_positions=key_positions, **arguments
    )


def made_by(factory: Callable[..., Any]) -> Any:
    """The class or function behind a factory with its options bound.

    Example:
        >>> made_by(resolve("softmax_attention", qk_norm="rmsnorm")).__name__
        'MultiHeadAttention'
    """
    while isinstance(factory, functools.partial):
        factory = factory.func
    return factory


def resolve(name: str, pattern: str | None = None, /, **options: Any) -> Callable[..., nnx.Module]:
    """Turn the name of a mechanism into a factory of layers.

    Args:
        name: a catalogued mechanism: a layer, or a function of (query, key, value), which `MultiHeadAttention` then
            calls; a mask or a cache policy stands for softmax attention under that mask.
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
    entry = attention_entry(name, pattern)
    _check_options(entry, options, options_of(entry))
    if entry.layer is not None:
        return functools.partial(entry.layer, **options)
    own = own_options(entry)
    function = resolve_function(name, pattern, **{name: value for name, value in options.items() if name in own})
    rest = {name: value for name, value in options.items() if name not in own}
    return functools.partial(MultiHeadAttention, attention_fn=function, **rest)
