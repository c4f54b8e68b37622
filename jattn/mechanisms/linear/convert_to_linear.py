"""From a trained model with softmax attention to one with linear attention that imitates it.

    student = convert_to_linear(model)                                  softmax -> Hedgehog maps, weights as they are
    student, losses = distill_feature_maps(student, batches, optax.adam(1e-2))
    ... finetune all weights of the student on the task ...

While the maps learn, nothing else does, and every layer gives out what the softmax attention of the given model gives,
so that later layers see what they will have to imitate. The text to learn from is that of the task if the model has
been finetuned, or general text if it has been pretrained. Source: The Hedgehog & the Porcupine (arXiv 2402.04347).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jattn.layers.attention import MultiHeadAttention
from jattn.mechanisms.entry import Cost, Entry, Paper
from jattn.mechanisms.linear.hedgehog_attention import HedgehogAttention
from jattn.softmax.api import dot_product_attention
from jattn.softmax.calling import name_of

MAPS = ("query_map", "key_map")


def convert_to_linear(model: Any, *, layers: Sequence[int] | None = None, **options: Any) -> Any:
    """A model whose softmax attention has become linear attention under Hedgehog maps that are still to learn.

    softmax(q k^T / sqrt(D)) v  ->  phi(q) (psi(k)^T v) / (phi(q) psi(k)^T 1), each head its own phi and psi

    The weights are those of the given model, which stays as it is; the maps are new and start from W = 1. Layers of any
    other mechanism stay what they are.

    Args:
        model: any Flax NNX model, such as `DecoderLM` or `Encoder`, with `MultiHeadAttention` layers over
            `softmax_attention` or `jattn.dot_product_attention`.
        layers: which of these layers, counted from 0 in the order of their names; all if not given.
        **options: num_features, variant, skip, map_bias, shared_maps, eps and chunk_size of `HedgehogAttention`.

    Returns:
        A model of the same class with `HedgehogAttention` layers.

    Raises:
        ValueError: there is no such layer, or one has what needs logits: a relative position, logit_soft_cap, sinks,
            dropout of weights, or options of softmax_attention.

    Example:
        >>> import jattn.layers
        >>> from flax import nnx
        >>> model = nnx.Dict(attention=jattn.layers.MultiHeadAttention(8, 2, rngs=nnx.Rngs(0)))
        >>> type(convert_to_linear(model)["attention"]).__name__
        'HedgehogAttention'

    Source: The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry (arXiv 2402.04347).
    """
    converted = nnx.clone(model)
    found = [path for path, layer in attention_layers(converted) if _is_softmax(layer)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no MultiHeadAttention over softmax_attention to convert")
    for number in layers or ():
        if not -len(found) <= number < len(found):
            raise ValueError(f"layers names {number}; {type(model).__name__} has {len(found)} layers of softmax")
    chosen = found if layers is None else [found[number] for number in layers]
    if not found[0]:
        return _converted(converted, type(model).__name__, options)
    for path in dict.fromkeys(chosen):
        owner = functools.reduce(_part, path[:-1], converted)
        linear = _converted(_part(owner, path[-1]), ".".join(map(str, path)), options)
        if isinstance(path[-1], int) or not hasattr(owner, str(path[-1])):
            owner[path[-1]] = linear
        else:
            setattr(owner, path[-1], linear)
    if len(set(chosen)) == len(found) and isinstance(getattr(converted, "attention", None), str):
        # Models of this library keep the name of their mechanism.
        converted.attention = HedgehogAttention.__name__
    return converted


class Distilled(NamedTuple):
    """The model with trained maps, and the loss of every step, a mean over layers, heads and queries."""

    model: Any
    losses: np.ndarray


def distill_feature_maps(
    model: Any, batches: Iterable[Any], optimizer: Any, *, report: Callable[[int, float], None] | None = None
) -> Distilled:
    """Train the feature maps of a converted model on the attention weights of the model that it was made from.

    loss = mean over layers of attention_distill_loss, a step a batch; all other weights stay

    Args:
        model: what `convert_to_linear` returned; it stays as it is.
        batches: what the model is called with: its first argument, such as tokens `[B, T]`, or a mapping of keyword
            arguments. All of one shape are one compilation.
        optimizer: an optimizer of optax, such as `optax.adam(1e-2)`.
        report: is told each step and its loss.

    Returns:
        The model with trained maps, its attention linear, and the losses `[steps]`.

    Raises:
        ValueError: the model has no `HedgehogAttention`, or its output no aux["losses"].

    Example:
        >>> import jattn.models, optax
        >>> from flax import nnx
        >>> config = jattn.models.TransformerConfig(vocab_size=5, features=8, num_layers=1, num_heads=2)
        >>> student = convert_to_linear(jattn.models.DecoderLM(config, rngs=nnx.Rngs(0)))
        >>> student, losses = distill_feature_maps(student, [np.array([[3, 1, 4, 1]])] * 2, optax.adam(1e-2))
        >>> bool(losses[1] < losses[0])
        True

    Source: The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry (arXiv 2402.04347).
    """
    student = nnx.clone(model)
    if not _set_distilling(student, True):
        raise ValueError(f"{type(model).__name__} has no HedgehogAttention; convert_to_linear makes them")
    graph, maps, rest = nnx.split(student, _is_map, ...)

    @jax.jit
    def step(maps: Any, state: Any, rest: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        def loss(maps: Any) -> jax.Array:
            learner = nnx.merge(graph, maps, rest, copy=True)
            output = learner(**batch) if isinstance(batch, Mapping) else learner(batch)
            losses = getattr(output, "aux", {}).get("losses", {})
            found = [value for name, value in losses.items() if name.endswith("distill_loss")]
            if not found:
                raise ValueError("the model's output has no aux['losses'] with the losses of its layers")
            return sum(found) / len(found)

        value, gradients = jax.value_and_grad(loss)(maps)
        updates, state = optimizer.update(gradients, state, maps)
        maps = jax.tree.map(lambda x, change: (x + change).astype(x.dtype), maps, updates)
        return maps, state, value

    state, losses = optimizer.init(maps), []
    for number, batch in enumerate(batches):
        maps, state, value = step(maps, state, rest, batch)
        losses.append(float(value))
        if report is not None:
            report(number, losses[-1])
    student = nnx.merge(graph, maps, rest)
    _set_distilling(student, False)
    return Distilled(student, np.asarray(losses))


def attention_layers(model: Any) -> list[tuple[tuple[Any, ...], MultiHeadAttention]]:
    """Paths and modules of all multi-head attention in a model, in the order of their names."""
    found = [(path, layer) for path, layer in nnx.iter_modules(model) if isinstance(layer, MultiHeadAttention)]
    return sorted(found, key=lambda pair: [(isinstance(part, str), part) for part in pair[0]])


def _part(owner: Any, name: Any) -> Any:
    return owner[name] if isinstance(name, int) or not hasattr(owner, name) else getattr(owner, name)


def _is_softmax(layer: MultiHeadAttention) -> bool:
    function = layer.attention_fn
    while isinstance(function, functools.partial):
        function = function.func
    return type(layer) is MultiHeadAttention and (function is dot_product_attention or hasattr(function, "engine_call"))


def _converted(layer: MultiHeadAttention, name: str, options: Mapping[str, Any]) -> HedgehogAttention:
    if isinstance(layer.attention_fn, functools.partial) and layer.attention_fn.keywords:
        bound = ", ".join(layer.attention_fn.keywords)
        raise ValueError(
            f"{name} calls {name_of(layer.attention_fn)} with {bound}, which linear attention does not know"
        )
    try:
        linear = HedgehogAttention(
            layer.features,
            layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            value_dim=layer.value_dim,
            context_features=layer.key.in_features[0],
            use_bias=layer.query.use_bias,
            position=layer.position,
            qk_norm=None if layer.qk_norm is None else layer.qk_norm.mode,
            scale=layer.scale,
            logit_soft_cap=layer.logit_soft_cap,
            use_sinks=layer.sinks is not None,
            dropout_rate=layer.dropout_rate,
            dtype=layer.dtype,
            param_dtype=layer.query.kernel.get_value().dtype,
            rngs=nnx.Rngs(0),
            **options,
        )
    except ValueError as error:
        raise ValueError(f"{name} cannot be converted: {error}") from error
    for part in ("query", "key", "value", "out", "qk_norm"):
        if getattr(layer, part) is not None:
            setattr(linear, part, getattr(layer, part))
    return linear


def _is_map(path: Sequence[Any], leaf: Any) -> bool:
    return isinstance(leaf, nnx.Param) and any(name in path for name in MAPS)


def _set_distilling(model: Any, is_distilling: bool) -> bool:
    """Whether there was any layer to tell."""
    layers = [layer for _, layer in attention_layers(model) if isinstance(layer, HedgehogAttention)]
    for layer in layers:
        layer.is_distilling = is_distilling
    return bool(layers)


def _example(key, length):
    return (MultiHeadAttention(16, 4, num_kv_heads=2, rngs=nnx.Rngs(0)),), {}


_CHECKS = ("gradients", "derivative", "determinism", "jit", "vmap", "export", "forward_mode", "precision")

ENTRY = Entry(
    name="convert_to_linear",
    kind="recipe",
    family="linear",
    function=convert_to_linear,
    papers=(
        Paper(
            "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
            "2402.04347",
            2024,
        ),
    ),
    patterns=("noncausal self", "causal self"),
    cost=Cost(flops="T", memory="T"),
    decode="as HedgehogAttention",
    example=_example,
    fidelity="inferred: which variant the paper's results have, from later programs of the same group",
    exempt=dict.fromkeys((*_CHECKS, "work", "memory"), "it takes a model and returns one, no arrays"),
)
