"""One attention call that can be made again: with other values, without dropout, with what a hook adds to it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.probes.hook import AttnHook
from jattn.softmax import masks
from jattn.softmax.api import dot_product_attention
from jattn.softmax.calling import accepts, asked_for, call_attention, name_of
from jattn.softmax.masks import Mask
from jattn.softmax.normalizers import Softmax


@dataclasses.dataclass(frozen=True)
class Call:
    """`function(query, key, value, **arguments)`; arguments that are None are not asked for.

    Shapes: query `[B, T, N, D]`, key `[B, S, K, D]`, value `[B, S, K, Dv]`.
    """

    function: Callable[..., Any]
    query: Any
    key: Any
    value: Any
    arguments: dict[str, Any]

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """(B, T, S, N, K)."""
        batch, length, num_heads, _ = self.query.shape
        return batch, length, self.key.shape[1], num_heads, self.key.shape[2]

    @property
    def is_engine(self) -> bool:
        """Whether the plain engine runs, whose pipeline is known."""
        return self.function is dot_product_attention

    @property
    def is_softmax(self) -> bool:
        """Whether weights are known to be a softmax over the visible keys, so that rows sum to 1."""
        normalizer = self.arguments.get("normalizer")
        plain = normalizer is None or isinstance(normalizer, Softmax)
        return self.is_engine and plain and self.arguments.get("sinks") is None

    @property
    def drops(self) -> bool:
        """Whether weights are dropped."""
        rate = self.arguments.get("dropout_rate")
        return rate is not None and rate != 0

    def with_arguments(self, **changes: Any) -> Call:
        """The call with other arguments."""
        return dataclasses.replace(self, arguments={**self.arguments, **changes})

    def run(self, value: Any = None, *, residual: bool = False) -> Any:
        """The output for the call's values or others; with `residual` also lse `[B, T, N]`."""
        arguments = {**self.arguments, "return_residual": residual}
        return call_attention(self.function, self.query, self.key, self.value if value is None else value, arguments)

    def statistic(self) -> Call:
        """The call in float32 at least and without dropout, from which statistics are read."""
        wide = jnp.promote_types(self.query.dtype, jnp.float32)
        query, key, value = (x.astype(wide) for x in (self.query, self.key, self.value))
        arguments = {name: a for name, a in self.arguments.items() if name not in ("dropout_rate", "dropout_key")}
        return Call(self.function, query, key, value, arguments)

    def per_query_head(self) -> Call:
        """The call with one key and value head for each query head."""
        *_, num_heads, kv_heads = self.sizes
        if num_heads == kv_heads:
            return self
        key, value = (jnp.repeat(x, num_heads // kv_heads, axis=2) for x in (self.key, self.value))
        return dataclasses.replace(self, key=key, value=value)

    def hooked(self, hook: AttnHook) -> Call:
        """The call with what a hook changes before the logits and adds to them."""
        call = self
        if hook.qkv is not None:
            changed = hook.qkv(call.query, call.key, call.value, hook.params)
            if not isinstance(changed, tuple | list) or len(changed) != 3:
                raise ValueError(f"AttnHook: qkv must return (query, key, value), got {type(changed).__name__}")
            query, key, value = changed
            if query.shape[:3] != call.query.shape[:3]:
                raise ValueError(
                    f"AttnHook: qkv returned a query of shape {list(query.shape)}; batch, length and heads must stay "
                    f"those of {list(call.query.shape)}"
                )
            call = dataclasses.replace(call, query=query, key=key, value=value)
        for bias in _terms(hook.bias):
            own = call.arguments.get("bias")
            call = call.with_arguments(bias=bias if own is None else jnp.asarray(own) + bias)
        for mask in _terms(hook.mask):
            call = call.with_arguments(mask=call._visible_in_both(call.arguments.get("mask"), mask))
        if hook.score_mod is not None:
            own = call.arguments.get("score_mod")
            call = call.with_arguments(score_mod=hook.score_mod if own is None else own >> hook.score_mod)
        return call

    def _visible_in_both(self, own: Any, other: Any) -> Any:
        if own is None:
            return other
        if isinstance(own, Mask) and isinstance(other, Mask):
            return own & other
        if not isinstance(own, Mask) and not isinstance(other, Mask):
            return jnp.logical_and(_booleans(own), _booleans(other))
        mask, array = (own, other) if isinstance(own, Mask) else (other, own)
        array = _booleans(array)
        places = [self.arguments.get(name) for name in ("query_positions", "key_positions")]
        if all(x is None for x in places) and np.ndim(array) <= 4:
            return mask & masks.dense(array.reshape((1,) * (4 - np.ndim(array)) + np.shape(array)))
        # An array is read by index, a Mask by position: where these differ, only the pairs themselves say both.
        batch, length, source, num_heads, _ = self.sizes
        query_positions, key_positions = (None if x is None else jnp.atleast_2d(jnp.asarray(x)) for x in places)
        given = {"query_positions": query_positions, "key_positions": key_positions}
        return mask.to_dense(batch, num_heads, length, source, **given) & array


def _terms(terms: Any) -> tuple[Any, ...]:
    return () if terms is None else terms if isinstance(terms, tuple) else (terms,)


def _booleans(array: Any) -> Any:
    array = array if isinstance(array, jax.Array) else np.asarray(array)
    if array.dtype != bool:
        raise ValueError(f"mask must hold booleans (additive terms go to bias) or be a Mask, got {array.dtype}")
    return array


def make_call(function: Callable[..., Any], query: Any, key: Any, value: Any, arguments: dict[str, Any]) -> Call:
    """The call, with arguments that partials bind among its own.

    A function with an attribute `engine_call` is replaced by the engine: `engine_call(query, key, value, **arguments)`
    gives the query, key, value and arguments of the `dot_product_attention` that it stands for.

    Raises:
      ValueError: arrays that are not of rank 4, or an argument that the function does not take.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if jnp.ndim(x) != 4:
            raise ValueError(f"attention: a hook needs {name} as [B, length, heads, dim], got {list(jnp.shape(x))}")
    arguments = asked_for(function, arguments)
    while isinstance(function, functools.partial) and not function.args:
        arguments = {**function.keywords, **arguments}
        function = function.func
    if hasattr(function, "engine_call"):
        query, key, value, arguments = function.engine_call(query, key, value, **arguments)
        arguments = {name: argument for name, argument in arguments.items() if argument is not None}
        function = dot_product_attention
    return Call(function, jnp.asarray(query), jnp.asarray(key), jnp.asarray(value), arguments)


def needs(call: Call, argument: str, what: str) -> None:
    """ValueError if the attention function has no such argument.

    Raises:
      ValueError: it has none.
    """
    if not accepts(call.function, argument):
        raise ValueError(
            f"AttnHook: {what} needs an attention function with the argument {argument}; {name_of(call.function)} has "
            "none, jattn.dot_product_attention does"
        )
