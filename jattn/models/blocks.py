"""What all models share: the MLP, the pre-norm block, the stack of blocks, and how their losses are gathered.

h = x + attention(norm(x));   y = h + mlp(norm(h))
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jattn.layers.attention import LayerOutput
from jattn.layers.norms import make_norm
from jattn.layers.positions import LearnedAbs, sinusoidal
from jattn.layers.rope import Rope
from jattn.layers.sharding import axes
from jattn.mechanisms.softmax.alibi import Alibi
from jattn.mechanisms.softmax.t5_bias import T5Bias
from jattn.models.config import TransformerConfig
from jattn.models.sites import Sites


class ModelOutput(NamedTuple):
    """What every model returns.

    Example:
        >>> ModelOutput(1.0).cache is None
        True
    """

    logits: Any
    """`[B, T, V]`, or `[B, classes]`."""
    cache: Any = None
    """The cache after this call; None without one."""
    aux: dict[str, Any] = {}
    """'losses': by name, averaged over the layers that report them; 'statistics': by name, a list with one item for
    each layer that reports; 'sites': the recorded sites."""


class Mlp(nnx.Module):
    """The feed-forward half of a block: act(x W_in) W_out, or (silu(x W_gate) * x W_in) W_out for `"swiglu"`.

    Args:
        config: of the model.
        rngs: for the initial values.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> Mlp(TransformerConfig(features=8), rngs=nnx.Rngs(0))(jnp.ones((1, 3, 8))).shape
        (1, 3, 8)

    Source: Attention Is All You Need (arXiv 1706.03762); GLU Variants Improve Transformer (arXiv 2002.05202).
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        hidden = max(1, int(config.features * config.mlp_ratio))
        self.kind = config.mlp

        def linear(source: int, target: int, *names: str) -> nnx.Linear:
            return nnx.Linear(
                source,
                target,
                use_bias=config.use_bias,
                dtype=config.dtype,
                param_dtype=config.param_dtype,
                kernel_metadata=axes(*names),
                bias_metadata=axes(names[-1]),
                rngs=rngs,
            )

        self.up = linear(config.features, hidden, "embed", "mlp")
        self.gate = linear(config.features, hidden, "embed", "mlp") if config.mlp == "swiglu" else None
        self.down = linear(hidden, config.features, "mlp", "embed")
        scale_start(self.down, config.residual_scale)

    def __call__(self, x: Float[Array, "B T M"]) -> Float[Array, "B T M"]:
        """Apply the MLP to every token."""
        hidden = self.up(x)
        if self.gate is not None:
            hidden = jax.nn.silu(self.gate(x)) * hidden
        else:
            hidden = (jax.nn.gelu if self.kind == "gelu" else jax.nn.relu)(hidden)
        return self.down(hidden)


def scale_start(projection: Any, factor: float | int) -> None:
    """Multiply the initial weights of a projection."""
    if factor != 1:
        projection.kernel[...] = projection.kernel[...] * factor


class Block(nnx.Module):
    """A pre-norm block: attention, then the MLP, each added to the stream.

    Args:
        config: of the model.
        factory: makes the attention layer; see `jattn.models.resolve`.
        position: position option of the layer.
        rngs: for the initial values.
    """

    def __init__(self, config: TransformerConfig, factory: Callable[..., Any], position: Any, *, rngs: nnx.Rngs):
        def norm() -> nnx.Module:
            return make_norm(
                config.norm,
                config.features,
                epsilon=config.norm_epsilon,
                dtype=config.dtype,
                param_dtype=config.param_dtype,
                rngs=rngs,
            )

        self.attention_norm = norm()
        self.attention = factory(
            config.features,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            position=position,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        if hasattr(self.attention, "out"):
            scale_start(self.attention.out, config.residual_scale)
        self.mlp_norm = norm() if config.has_mlp else None
        self.mlp = Mlp(config, rngs=rngs) if config.has_mlp else None
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self, x: Float[Array, "B T M"], *, layer: int, sites: Sites, deterministic: bool, rngs: Any, **call: Any
    ) -> LayerOutput:
        """Run the block; `call` goes to the attention layer."""
        if "head_out" in sites.wanted:
            if "tap" not in inspect.signature(type(self.attention).__call__).parameters:
                raise ValueError(
                    f"record and replace cannot name 'head_out': {type(self.attention).__name__} shows no per-head "
                    "outputs (its call has no argument tap)"
                )
            call["tap"] = lambda site, value: sites.visit(site, value, layer)
        found = self.attention(self.attention_norm(x), deterministic=deterministic, rngs=rngs, **call)
        added = self.dropout(found.output, deterministic=deterministic, rngs=rngs)
        x = x + sites.visit("attn_out", added, layer)
        if self.mlp is not None and self.mlp_norm is not None:
            added = self.dropout(self.mlp(self.mlp_norm(x)), deterministic=deterministic, rngs=rngs)
            x = x + sites.visit("mlp_out", added, layer)
        return LayerOutput(sites.visit("resid", x, layer), found.cache, found.aux)


class Stack(nnx.Module):
    """Positions, blocks and the last norm: a transformer without its ends.

    Args:
        config: of the model.
        factory: makes the attention layers; see `jattn.models.resolve`.
        bidirectional: whether relative positions have two directions.
        rngs: for the initial values.
    """

    def __init__(self, config: TransformerConfig, factory: Callable[..., Any], *, bidirectional: bool, rngs: nnx.Rngs):
        self.config = config
        position: Any = None
        if config.position == "rope":
            position = Rope(config.rope_base, config.rope_layout, None, config.rope_scaling)
        elif config.position == "alibi":
            position = Alibi()
        elif config.position == "t5":
            position = T5Bias(config.num_heads, bidirectional=bidirectional, param_dtype=config.param_dtype, rngs=rngs)
        learned = None
        if config.position == "learned":
            learned = LearnedAbs(
                config.max_length,
                config.features,
                dtype=config.dtype,
                param_dtype=config.param_dtype,
                std=config.embedding_std,
                rngs=rngs,
            )
        self.learned = learned
        self.blocks = nnx.List([Block(config, factory, position, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = make_norm(
            config.norm,
            config.features,
            epsilon=config.norm_epsilon,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.dropout = nnx.Dropout(config.dropout)

    def add_positions(self, x: Float[Array, "B T M"], positions: Any) -> Float[Array, "B T M"]:
        """Add absolute positions, where the configuration has such; None stands for 0 .. T-1."""
        if self.config.position not in ("learned", "sinusoidal"):
            return x
        places = jnp.arange(x.shape[1]) if positions is None else positions
        if self.learned is not None:
            return x + self.learned(places)
        return x + sinusoidal(places, x.shape[-1]).astype(x.dtype)

    def __call__(
        self,
        x: Float[Array, "B T M"],
        *,
        sites: Sites,
        caches: Any = None,
        deterministic: bool = True,
        rngs: Any = None,
        **call: Any,
    ) -> tuple[Float[Array, "B T M"], Any, dict[str, Any]]:
        """Run all blocks and the last norm.

        Args:
            x: `[B, T, M]`, embeddings with positions.
            sites: what to record and replace.
            caches: (policy, cache) of every layer, or None.
            deterministic: no dropout.
            rngs: for dropout.
            **call: goes to every attention layer.

        Returns:
            The normed stream, the caches of the layers, and aux.
        """
        if isinstance(rngs, jax.Array):
            rngs = nnx.Rngs(rngs)  # A stream, so that every layer draws numbers of its own.
        losses: dict[str, list[Any]] = {}
        statistics: dict[str, list[Any]] = {}
        new_caches = []
        x = self.dropout(sites.visit("embed", x), deterministic=deterministic, rngs=rngs)
        for layer, block in enumerate(self.blocks):
            if caches is not None:
                call["cache"] = caches[layer]
            done = block(x, layer=layer, sites=sites, deterministic=deterministic, rngs=rngs, **call)
            x = done.output
            new_caches.append(done.cache)
            for name, value in done.aux.items():
                (losses if name.endswith("_loss") else statistics).setdefault(name, []).append(value)
        aux: dict[str, Any] = {}
        if losses:
            aux["losses"] = {name: sum(values) / len(values) for name, values in losses.items()}
        if statistics:
            aux["statistics"] = statistics
        if sites.recorded():
            aux["sites"] = sites.recorded()
        return self.norm(x), tuple(new_caches), aux


def embedding(config: TransformerConfig, *, rngs: nnx.Rngs) -> nnx.Embed:
    """The token table of a model."""
    return nnx.Embed(
        config.vocab_size,
        config.features,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        embedding_init=nnx.initializers.normal(config.embedding_std),
        embedding_metadata=axes("vocab", "embed"),
        rngs=rngs,
    )


def head(config: TransformerConfig, outputs: int, *, use_bias: bool, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear map from the stream to logits."""
    return nnx.Linear(
        config.features,
        outputs,
        use_bias=use_bias,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        kernel_metadata=axes("embed", "vocab"),
        bias_metadata=axes("vocab"),
        rngs=rngs,
    )


def reject_hook(hook: Any) -> None:
    """Refuse a hook: models take `record` and `replace` so far."""
    if hook is not None:
        raise NotImplementedError(
            f"hook: models of this version run no attention hooks, got {type(hook).__name__}; use record= and replace= "
            "for the sites of a model"
        )
