"""A transformer without its ends: positions, blocks, the last norm, and how losses and observations are gathered."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jattn.layers.positions import LearnedAbs, sinusoidal
from jattn.layers.rope import Rope
from jattn.layers.sharding import axes
from jattn.mechanisms.softmax.alibi import Alibi
from jattn.mechanisms.softmax.t5_bias import T5Bias
from jattn.models.blocks import Block, norm_of
from jattn.models.config import TransformerConfig
from jattn.models.resolve import keywords, made_by
from jattn.models.sites import Sites
from jattn.probes import AttnHook


class Stack(nnx.Module):
    """Positions, blocks and the last norm: a transformer without its ends.

    Args:
        config: of the model.
        factories: make the attention layers, one a layer; see `jattn.models.resolve`.
        bidirectional: whether relative positions have two directions.
        cross_factories: make the layers of cross attention, one a layer; none if not given.
        rngs: for the initial values.
    """

    def __init__(
        self,
        config: TransformerConfig,
        factories: Sequence[Callable[..., Any]],
        *,
        bidirectional: bool,
        cross_factories: Sequence[Callable[..., Any]] | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        position: Any = None
        if config.position == "rope":
            position = Rope(config.rope_base, config.rope_layout, None, config.rope_scaling)
        elif config.position == "alibi":
            position = Alibi()
        elif config.position == "t5":
            position = T5Bias(config.num_heads, bidirectional=bidirectional, param_dtype=config.param_dtype, rngs=rngs)
        learned = None
        width = config.embedding_width
        if config.position == "learned":
            learned = LearnedAbs(
                config.max_length,
                width,
                dtype=config.dtype,
                param_dtype=config.param_dtype,
                std=config.embedding_std,
                rngs=rngs,
            )
        self.learned = learned
        self.embedding_norm = norm_of(config, width, rngs=rngs) if config.embedding_norm else None
        self.embedding_projection = None if config.embedding_features is None else _projection(config, rngs=rngs)
        crosses = [None] * config.num_layers if cross_factories is None else cross_factories
        blocks: list[Block] = []
        for factory, cross_factory in zip(_numbered(factories, config), crosses, strict=True):
            block = Block(config, factory, position, cross_factory=cross_factory, rngs=rngs)
            if config.share_layers and blocks:
                share_weights(block, blocks[0])
            blocks.append(block)
        self.blocks = nnx.List(blocks)
        self.norm = norm_of(config, config.features, rngs=rngs) if config.norm_placement == "pre" else None
        self.dropout = nnx.Dropout(config.dropout)

    def enter(self, x: Float[Array, "B T E"], positions: Any) -> Float[Array, "B T M"]:
        """From the token table to the stream: absolute positions, norm, projection, where the model has such.

        Args:
            x: `[B, T, E]`.
            positions: `[T]` or `[B, T]`; None stands for 0 .. T-1.

        Returns:
            `[B, T, M]`.
        """
        if self.config.position in ("learned", "sinusoidal"):
            places = jnp.arange(x.shape[1]) if positions is None else positions
            added = sinusoidal(places, x.shape[-1]) if self.learned is None else self.learned(places)
            x = x + added.astype(x.dtype)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return x if self.embedding_projection is None else self.embedding_projection(x)

    def __call__(
        self,
        x: Float[Array, "B T M"],
        *,
        sites: Sites,
        caches: Any = None,
        deterministic: bool = True,
        rngs: Any = None,
        hook: Any = None,
        cross: dict[str, Any] | None = None,
        cross_hook: Any = None,
        **call: Any,
    ) -> tuple[Float[Array, "B T M"], Any, dict[str, Any]]:
        """Run all blocks and the last norm.

        Args:
            x: `[B, T, M]`, what `enter` returns.
            sites: what to record and replace.
            caches: (policy, cache) of every layer, or a pair of such with cross attention, or None.
            deterministic: no dropout.
            rngs: for dropout.
            hook: a `jattn.probes.AttnHook` whose arrays have a leading layer axis.
            cross: goes to every layer of cross attention.
            cross_hook: likewise for cross attention.
            **call: goes to every attention layer.

        Returns:
            The normed stream, the caches of the layers, and aux.
        """
        if isinstance(rngs, jax.Array):
            rngs = nnx.Rngs(rngs)  # A stream, so that every layer draws numbers of its own.
        gathered: dict[str, list[Any]] = {}
        handed: dict[str, Any] = {}
        new_caches = []
        x = self.dropout(sites.visit("embed", x), deterministic=deterministic, rngs=rngs)
        for layer, block in enumerate(self.blocks):
            at_layer, across = dict(call), dict(cross or {})
            if caches is not None and cross is None:
                at_layer["cache"] = caches[layer]
            elif caches is not None:
                at_layer["cache"], across["cache"] = caches[layer]
            if hook is not None:
                at_layer["hook"] = _of_layer(hook, layer, len(self.blocks))
            if cross_hook is not None:
                across["hook"] = _of_layer(cross_hook, layer, len(self.blocks))
            wanted = getattr(block.attention, "beside", ())
            at_layer |= {name: handed[name] for name in wanted if name in handed}
            options = {"cross": across} if block.cross is not None else {}
            done = block(x, layer=layer, sites=sites, deterministic=deterministic, rngs=rngs, **options, **at_layer)
            x = done.output
            new_caches.append(done.cache)
            for name, value in done.aux.items():
                if name in getattr(block.attention, "hands_on", ()):
                    handed[name] = value
                else:
                    gathered.setdefault(name, []).append(value)
        return x if self.norm is None else self.norm(x), tuple(new_caches), _summary(gathered, sites)


def _numbered(factories: Sequence[Callable[..., Any]], config: TransformerConfig) -> list[Callable[..., Any]]:
    """Tell layers that ask for it their number among those of their kind, and how many these are."""
    kinds = [made_by(factory) for factory in factories]
    if config.share_layers:
        return list(factories)  # All are the first one.
    return [
        functools.partial(factory, layer=kinds[:place].count(kind), num_layers=kinds.count(kind))
        if {"layer", "num_layers"} <= keywords(kind)
        else factory
        for place, (factory, kind) in enumerate(zip(factories, kinds, strict=True))
    ]


def _of_layer(hook: Any, layer: int, num_layers: int) -> AttnHook:
    if not isinstance(hook, AttnHook):
        raise ValueError(f"hook must be a jattn.probes.AttnHook, got {type(hook).__name__}")
    for leaf in jax.tree.leaves(hook):
        if jnp.ndim(leaf) == 0 or leaf.shape[0] != num_layers:
            raise ValueError(
                f"the arrays of a model's hook must have a leading axis of {num_layers} layers, got {jnp.shape(leaf)}; "
                "jattn.probes.for_layers makes one"
            )
    return jax.tree.map(lambda leaf: leaf[layer], hook)


def _summary(gathered: dict[str, list[Any]], sites: Sites) -> dict[str, Any]:
    """What layers report: losses averaged, observations of hooks and sites stacked, the rest in lists."""
    aux: dict[str, Any] = {}
    for name, values in gathered.items():
        if name.endswith("_loss"):
            aux.setdefault("losses", {})[name] = sum(values) / len(values)
        elif name in ("hook", "cross_hook"):
            aux[name] = jax.tree.map(lambda *parts: jnp.stack(parts), *values)
        else:
            aux.setdefault("statistics", {})[name] = values
    if sites.recorded():
        aux["sites"] = sites.recorded()
    return aux


def share_weights(block: Block, first: Block) -> None:
    """Let a block use the weights of another; what has no weights, such as the attention function, stays its own."""
    for name in ("attention_norm", "attention_scale", "cross_norm", "cross_scale", "mlp_norm", "mlp", "mlp_scale"):
        setattr(block, name, getattr(first, name))
    for mine, other in ((block.attention, first.attention), (block.cross, first.cross)):
        if mine is None:
            continue
        own, shared = (
            {name: type(part) for name, part in vars(layer).items() if _has_weights(part)} for layer in (mine, other)
        )
        if own != shared:
            raise ValueError(
                f"layers that share weights must have the same ones, got {sorted(own)} and {sorted(shared)}: "
                f"{type(mine).__name__} and {type(other).__name__}"
            )
        for name in own:
            setattr(mine, name, getattr(other, name))


def _has_weights(part: Any) -> bool:
    return isinstance(part, nnx.Module | nnx.Variable)


def _projection(config: TransformerConfig, *, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        config.embedding_width,
        config.features,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        kernel_metadata=axes(None, "embed"),
        bias_metadata=axes("embed"),
        rngs=rngs,
    )
