"""Which mechanism each layer and head of a model uses: one for all, or swaps for some of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.layers.attention import MultiHeadAttention
from jattn.models.config import TransformerConfig
from jattn.models.resolve import keywords, made_by, resolve, resolve_function
from jattn.softmax.calling import call_attention
from jattn.softmax.masks import Mask

BASE = "softmax_attention"


@dataclasses.dataclass(frozen=True)
class Swap:
    """A mechanism for some layers, or some heads of some layers, of a model.

    Args:
        name: a catalogued mechanism. A mask or the policy of a cache stands for softmax attention under that mask.
        options: its hyper-parameters.
        layers: numbers of layers, counted from 0 (negative ones from the end); all if not given.
        heads: numbers of query heads; all if not given. Only a mechanism that is a function can serve some heads alone.

    Example:
        >>> Swap("window_cache", {"window": 256}, layers=range(10, 20)).name
        'window_cache'
    """

    name: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layers: Sequence[int] | None = None
    heads: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "heads"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))

    def __hash__(self) -> int:
        # A model that holds swaps must be hashable, as the static part of a compiled program; their options are not.
        return hash((self.name, repr(sorted(self.options.items())), self.layers, self.heads))


def hybrid(mixers: Sequence[str | Swap], num_layers: int) -> list[Swap]:
    """Let layers take mechanisms in turn: layer i has mixers[i mod len(mixers)].

    Args:
        mixers: names, or swaps with options of their own.
        num_layers: L.

    Returns:
        What the `attention` argument of a model takes.

    Raises:
        ValueError: no mixers, or swaps that name their layers.

    Example:
        >>> [swap.layers for swap in hybrid(["BaseConv", Swap("SelectiveLookup", {"num_lookups": 8})], 5)]
        [(0, 2, 4), (1, 3)]
    """
    swaps = [Swap(mixer) if isinstance(mixer, str) else mixer for mixer in mixers]
    if not swaps or any(swap.layers is not None for swap in swaps):
        raise ValueError("mixers must be names or swaps, at least one, and their turn says which layers they have")
    count = len(swaps)
    # With fewer layers than mixers the last ones have none.
    turns = [(swap, range(i, num_layers, count)) for i, swap in enumerate(swaps)]
    return [dataclasses.replace(swap, layers=layers) for swap, layers in turns if layers]


Attention = str | Swap | Sequence[Swap]
"""What models take: a name for all layers, or swaps over softmax attention, of which later ones win."""


def kept(attention: Attention) -> str | Swap | tuple[Swap, ...]:
    """What a model keeps of its argument, in hashable form."""
    return attention if isinstance(attention, str | Swap) else tuple(attention)


def factories(
    attention: Attention, options: Mapping[str, Any] | None, pattern: str, config: TransformerConfig
) -> list[Callable[..., nnx.Module]]:
    """A factory of attention layers for every layer of a model.

    Args:
        attention: a name, or swaps.
        options: hyper-parameters of a name.
        pattern: what every mechanism must support, such as `"causal self"`.
        config: of the model.

    Returns:
        As many factories as layers.

    Raises:
        ValueError: an unknown name or option, a mechanism that lacks the pattern or cannot serve some heads alone, a
            layer or head that the model does not have, options beside swaps, or `config.use_bias` with a mechanism
            whose projections have no biases.

    Example:
        >>> config = TransformerConfig(num_layers=3)
        >>> made = factories(Swap("window_cache", {"window": 2}, layers=[1]), None, "causal self", config)
        >>> made[0] == made[2], made[0] == made[1]
        (True, False)
    """
    made = _made(attention, options, pattern, config)
    if config.use_bias:
        plain = {kind.__name__ for kind in map(made_by, made) if "use_bias" not in keywords(kind)}
        if plain:
            raise ValueError(f"use_bias=True cannot be met: there are no biases in {', '.join(sorted(plain))}")
    return made


def _made(
    attention: Attention, options: Mapping[str, Any] | None, pattern: str, config: TransformerConfig
) -> list[Callable[..., nnx.Module]]:
    if isinstance(attention, str):
        return [resolve(attention, pattern, **(options or {}))] * config.num_layers
    if options:
        raise ValueError("attention_options belong to a named mechanism; a Swap carries its own options")
    swaps = [attention] if isinstance(attention, Swap) else list(attention)
    plain = resolve(BASE, pattern)
    made = [plain] * config.num_layers
    heads: list[dict[int, Any]] = [{} for _ in made]
    for swap in swaps:
        chosen = _numbers(swap.layers, config.num_layers, "layer", swap.name)
        if swap.heads is None:
            factory = resolve(swap.name, pattern, **swap.options)
            for layer in chosen:
                made[layer], heads[layer] = factory, {}
        else:
            function = resolve_function(swap.name, pattern, **swap.options)
            for layer in chosen:
                for head in _numbers(swap.heads, config.num_heads, "head", swap.name):
                    heads[layer][head] = function
    return [_with_heads(factory, own, config) if own else factory for factory, own in zip(made, heads, strict=True)]


def _numbers(given: Sequence[int] | None, count: int, word: str, name: str) -> list[int]:
    numbers = list(range(count)) if given is None else [int(number) for number in given]
    for number in numbers:
        if not -count <= number < count:
            raise ValueError(f"the swap to {name} names {word} {number}; the model has {count} {word}s")
    return [number % count for number in numbers]


def _with_heads(factory: Any, own: Mapping[int, Callable[..., Any]], config: TransformerConfig) -> Any:
    if not isinstance(factory, functools.partial) or factory.func is not MultiHeadAttention:
        raise ValueError(
            "some heads were swapped in a layer whose other heads use a mechanism with parameters of its own"
        )
    rest = factory.keywords["attention_fn"]
    heads = tuple(own.get(head, rest) for head in range(config.num_heads))
    return functools.partial(factory, attention_fn=HeadMix(heads))


@dataclasses.dataclass(frozen=True)
class HeadMix:
    """An attention function that gives every query head its own mechanism.

    o_n = functions[n](q_n, k_{n // G}, v_{n // G}), G = N / K; heads that share a function are computed in one call.

    Args:
        functions: one a query head.

    Example:
        >>> import jax.numpy as jnp
        >>> import jattn
        >>> mix = HeadMix((jattn.dot_product_attention, jattn.get("linear_attention")))
        >>> mix(*[jnp.ones((1, 3, 2, 4))] * 3, is_causal=True).shape
        (1, 3, 2, 4)
    """

    functions: tuple[Callable[..., Any], ...]

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        bias: Any = None,
        mask: Any = None,
        sinks: Any = None,
        is_causal: bool = False,
        segment_ids: Any = None,
        query_positions: Any = None,
        key_positions: Any = None,
        scale: Any = None,
        logit_soft_cap: Any = None,
    ) -> jax.Array:
        """Attend; arguments as those of `jattn.dot_product_attention`.

        Raises:
            ValueError: a number of heads other than that of the functions, or an argument that one of them lacks.
        """
        if query.shape[2] != len(self.functions):
            raise ValueError(f"query must have {len(self.functions)} heads, got {list(query.shape)}")
        if isinstance(mask, Mask):
            shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
            mask = mask.to_dense(*shape, query_positions=query_positions, key_positions=key_positions)
        group = query.shape[2] // key.shape[2]
        shared = {
            "is_causal": is_causal,
            "segment_ids": segment_ids,
            "query_positions": query_positions,
            "key_positions": key_positions,
            "scale": scale,
            "logit_soft_cap": logit_soft_cap,
        }
        order: list[int] = []
        parts = []
        for function in dict.fromkeys(self.functions):
            heads = [head for head, own in enumerate(self.functions) if own is function]
            index, kv_index = jnp.asarray(heads), jnp.asarray([head // group for head in heads])
            own = {"bias": _of_heads(bias, index), "mask": _of_heads(mask, index)}
            own["sinks"] = None if sinks is None else sinks[index]
            arrays = query[:, :, index], key[:, :, kv_index], value[:, :, kv_index]
            parts.append(call_attention(function, *arrays, {**shared, **own}))
            order += heads
        back = [order.index(head) for head in range(len(order))]
        return jnp.concatenate(parts, axis=2)[:, :, jnp.asarray(back)]


def _of_heads(array: Any, index: jax.Array) -> Any:
    """What of a mask or bias, broadcastable to `[B, N, T, S]`, belongs to some heads."""
    return array[..., index, :, :] if array is not None and array.ndim > 2 and array.shape[-3] > 1 else array
