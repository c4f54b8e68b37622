"""What all models share: the MLP, the block, and their ends.

h = x + attention(norm(x));   y = h + mlp(norm(h))
or, with norms after:   h = norm(x + attention(x));   y = norm(h + mlp(h))
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
from jattn.layers.sharding import axes
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
    each layer that reports; 'hook' and 'cross_hook': what hooks observed, stacked over layers; 'sites': the recorded
    sites."""


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
            hidden = (
                jax.nn.relu(hidden) if self.kind == "relu" else jax.nn.gelu(hidden, approximate=self.kind == "gelu")
            )
        return self.down(hidden)


def scale_start(projection: Any, factor: float | int) -> None:
    """Multiply the initial weights of a projection."""
    if factor != 1:
        projection.kernel[...] = projection.kernel[...] * factor


class Block(nnx.Module):
    """A block: attention, in a decoder of an encoder-decoder cross attention, and the MLP, each added to the stream.

    Args:
        config: of the model.
        factory: makes the attention layer; see `jattn.models.resolve`.
        position: position option of the layer.
        cross_factory: makes the layer of cross attention; none if not given.
        rngs: for the initial values.
    """

    def __init__(
        self,
        config: TransformerConfig,
        factory: Callable[..., Any],
        position: Any,
        *,
        cross_factory: Callable[..., Any] | None = None,
        rngs: nnx.Rngs,
    ):
        def attention(factory: Callable[..., Any], position: Any) -> Any:
            biased = {"use_bias": True} if config.use_bias else {}
            layer = factory(
                config.features,
                config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                position=position,
                dtype=config.dtype,
                param_dtype=config.param_dtype,
                **biased,
                rngs=rngs,
            )
            if hasattr(layer, "out"):
                scale_start(layer.out, config.residual_scale)
            return layer

        self.is_post = config.norm_placement == "post"
        self.attention_norm = norm_of(config, config.features, rngs=rngs)
        self.attention = attention(factory, position)
        self.attention_scale = channel_scale(config)
        has_cross = cross_factory is not None
        self.cross_norm = norm_of(config, config.features, rngs=rngs) if has_cross else None
        self.cross = attention(cross_factory, None) if cross_factory is not None else None
        self.cross_scale = channel_scale(config) if has_cross else None
        self.mlp_norm = norm_of(config, config.features, rngs=rngs) if config.has_mlp else None
        self.mlp = Mlp(config, rngs=rngs) if config.has_mlp else None
        self.mlp_scale = channel_scale(config) if config.has_mlp else None
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self,
        x: Float[Array, "B T M"],
        *,
        layer: int,
        sites: Sites,
        deterministic: bool,
        rngs: Any,
        cross: dict[str, Any] | None = None,
        **call: Any,
    ) -> LayerOutput:
        """Run the block; `call` goes to the attention layer, `cross` to that of cross attention."""

        def add(x: jax.Array, norm: Any, scale: Any, function: Callable[..., Any], site: str) -> jax.Array:
            added = function(x if self.is_post else norm(x))
            added = added if scale is None else added * scale.get_value().astype(added.dtype)
            added = self.dropout(added, deterministic=deterministic, rngs=rngs)
            x = x + sites.visit(site, added, layer)
            return norm(x) if self.is_post else x

        def attend(attention: Any, site: str, call: dict[str, Any]) -> Callable[..., Any]:
            def run(x: jax.Array) -> jax.Array:
                arguments = {"deterministic": deterministic, "rngs": rngs, **call}
                found.append(attention(x, **arguments, **_tap(attention, site, sites, layer)))
                return found[-1].output

            return run

        found: list[LayerOutput] = []
        x = add(x, self.attention_norm, self.attention_scale, attend(self.attention, "head_out", call), "attn_out")
        if self.cross is not None:
            run = attend(self.cross, "cross_head_out", cross or {})
            x = add(x, self.cross_norm, self.cross_scale, run, "cross_out")
        if self.mlp is not None:
            x = add(x, self.mlp_norm, self.mlp_scale, self.mlp, "mlp_out")
        caches, aux = found[0].cache, found[0].aux
        if self.cross is not None:
            caches = (caches, found[1].cache)
            aux = {**aux, **{f"cross_{name}": value for name, value in found[1].aux.items()}}
        return LayerOutput(sites.visit("resid", x, layer), caches, aux)


def _tap(attention: Any, site: str, sites: Sites, layer: int) -> dict[str, Any]:
    """The argument that lets a site see the per-head outputs of a layer, if somebody wants to."""
    if site not in sites.wanted:
        return {}
    if "tap" not in inspect.signature(type(attention).__call__).parameters:
        raise ValueError(
            f"record and replace cannot name {site!r}: {type(attention).__name__} shows no per-head outputs (its call "
            "has no argument tap)"
        )
    return {"tap": lambda _, value: sites.visit(site, value, layer)}


def norm_of(config: TransformerConfig, width: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """A norm as the configuration wants it."""
    return make_norm(
        config.norm, width, epsilon=config.norm_epsilon, dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs
    )


def channel_scale(config: TransformerConfig) -> nnx.Param | None:
    """LayerScale: a learned factor for each channel (arXiv 2103.17239), where the configuration has it."""
    if config.layer_scale is None:
        return None
    return nnx.Param(jnp.full((config.features,), config.layer_scale, config.param_dtype), **axes("embed"))


def embedding(config: TransformerConfig, *, rngs: nnx.Rngs) -> nnx.Embed:
    """The token table of a model."""
    return nnx.Embed(
        config.vocab_size,
        config.embedding_width,
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
