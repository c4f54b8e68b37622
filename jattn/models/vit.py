"""A vision transformer whose attention, and whose pooling, is any catalogued mechanism."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from jattn import catalog
from jattn.layers.attention import LayerOutput
from jattn.layers.sharding import axes
from jattn.models.blocks import ModelOutput
from jattn.models.config import TransformerConfig
from jattn.models.resolve import keywords
from jattn.models.sites import Sites
from jattn.models.stack import Stack
from jattn.models.swap import Attention, factories

POOLINGS = ("mean", "class")


def patchify(images: ArrayLike, patch_size: tuple[int, int]) -> jax.Array:
    """Cut images into flattened patches, row by row.

    Args:
        images: `[B, H, W, C]`.
        patch_size: height and width of a patch, which divide H and W.

    Returns:
        `[B, H/ph * W/pw, ph * pw * C]`.

    Raises:
        ValueError: images of another rank, or a patch size that does not divide them.

    Example:
        >>> import jax.numpy as jnp
        >>> patchify(jnp.arange(16).reshape(1, 4, 4, 1), (2, 2))[0, 1].tolist()
        [2, 3, 6, 7]
    """
    images = jnp.asarray(images)
    if images.ndim != 4:
        raise ValueError(f"images must be [B, H, W, C], got {list(images.shape)}")
    batch, height, width, channels = images.shape
    if height % patch_size[0] or width % patch_size[1]:
        raise ValueError(f"patch_size {patch_size} must divide the images of {height} x {width}")
    rows, columns = height // patch_size[0], width // patch_size[1]
    cut = images.reshape(batch, rows, patch_size[0], columns, patch_size[1], channels)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)


class ViT(nnx.Module):
    """A vision transformer: patches, L blocks of attention to all patches and MLP, norm, pooling, classes.

    Args:
        config: sizes and options; `vocab_size` and `max_length` are not used.
        image_size: height and width, or one number for both.
        patch_size: likewise.
        num_channels: C.
        num_classes: of the head; None for no head, then the pooled features stand for logits.
        pooling: `"mean"`, `"class"` (a class token is put before the patches), or the name of a catalogued pooling.
        pooling_options: hyper-parameters of a catalogued pooling.
        attention: name of a catalogued mechanism that supports noncausal self attention, or one `Swap` or several.
        attention_options: hyper-parameters of the named mechanism; for one that is a function, those of
            `MultiHeadAttention` too.
        rngs: for the initial values.

    Raises:
        ValueError: an unknown name or option, a mechanism that is only causal, or sizes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> config = TransformerConfig(features=16, num_layers=1, num_heads=2, position="learned")
        >>> model = ViT(config, image_size=8, patch_size=2, num_channels=1, num_classes=10, rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((2, 8, 8, 1))).logits.shape
        (2, 10)

    Source: An Image is Worth 16x16 Words (arXiv 2010.11929).
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        image_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        num_channels: int = 3,
        num_classes: int | None,
        pooling: str = "mean",
        pooling_options: Mapping[str, Any] | None = None,
        attention: Attention = "softmax_attention",
        attention_options: Mapping[str, Any] | None = None,
        rngs: nnx.Rngs,
    ):
        image = (image_size, image_size) if isinstance(image_size, int) else image_size
        patch = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        if image[0] % patch[0] or image[1] % patch[1]:
            raise ValueError(f"patch_size must divide image_size, got {patch} and {image}")
        self.attention = attention
        self.image_shape = (*image, num_channels)
        self.patch_size = patch
        self.grid = (image[0] // patch[0], image[1] // patch[1])
        self.pooling = pooling
        tokens = self.grid[0] * self.grid[1] + (pooling == "class")
        self.config = dataclasses.replace(config, max_length=tokens)
        self.embed = nnx.Linear(
            patch[0] * patch[1] * num_channels,
            config.features,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            kernel_metadata=axes(None, "embed"),
            bias_metadata=axes("embed"),
            rngs=rngs,
        )
        token = None
        if pooling == "class":
            values = config.embedding_std * jax.random.normal(
                rngs.params(), (1, 1, config.features), config.param_dtype
            )
            token = nnx.Param(values, **axes(None, None, "embed"))
        self.class_token = token
        made = factories(attention, attention_options, "noncausal self", self.config)
        self.stack = Stack(self.config, made, bidirectional=True, rngs=rngs)
        self.pool = None if pooling in POOLINGS else _make_pooling(pooling, config, pooling_options or {}, rngs)
        if pooling_options and self.pool is None:
            raise ValueError(f"pooling_options are for catalogued poolings; {pooling!r} takes none")
        pooled = jax.eval_shape(self._pooled, jax.ShapeDtypeStruct((1, tokens, config.features), config.param_dtype))
        self.head = None if num_classes is None else _head(config, pooled.shape[-1], num_classes, rngs)

    def _pooled(self, x: jax.Array) -> jax.Array:
        if self.pool is None:
            return x[:, 0] if self.pooling == "class" else jnp.mean(x, axis=1)
        out = self.pool(x)
        out = out.output if isinstance(out, LayerOutput) else out
        return out.reshape(out.shape[0], -1)

    def states(
        self,
        images: Any,
        *,
        hook: Any = None,
        record: Iterable[str] = (),
        replace: Mapping[str, Any] | None = None,
        deterministic: bool = True,
        rngs: Any = None,
    ) -> tuple[Any, dict[str, Any]]:
        """The tokens after the last block and norm, `[B, T, M]`, and aux; arguments as in a call of the model."""
        images = jnp.asarray(images)
        if images.ndim != 4 or images.shape[1:] != self.image_shape:
            raise ValueError(f"images must be [B, H, W, C] = [B, {self.image_shape}], got {list(images.shape)}")
        sites = Sites(tuple(record), replace or {}, self.config.num_layers)
        x = self.embed(patchify(images, self.patch_size))
        if self.class_token is not None:
            token = jnp.broadcast_to(self.class_token.get_value().astype(x.dtype), (x.shape[0], 1, x.shape[2]))
            x = jnp.concatenate([token, x], axis=1)
        x = self.stack.enter(x, None)
        x, _, aux = self.stack(x, sites=sites, hook=hook, deterministic=deterministic, rngs=rngs)
        return x, aux

    def __call__(self, images: Any, **options: Any) -> ModelOutput:
        """Classify.

        Args:
            images: `[B, H, W, C]`.
            **options: hook, a `jattn.probes.AttnHook` for every attention, its arrays with a leading layer axis;
                record, sites to record; replace, (mask, value) by site; deterministic, no dropout (the default);
                rngs, an `nnx.Rngs` or a key, for dropout.

        Returns:
            ModelOutput(logits `[B, num_classes]`, None, aux).

        Raises:
            ValueError: images of another shape, an unknown site, or a call that the mechanism cannot serve.
        """
        x, aux = self.states(images, **options)
        pooled = self._pooled(x)
        return ModelOutput(pooled if self.head is None else self.head(pooled), None, aux)


def _head(config: TransformerConfig, width: int, num_classes: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        width,
        num_classes,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        kernel_metadata=axes("embed", "vocab"),
        bias_metadata=axes("vocab"),
        rngs=rngs,
    )


def _make_pooling(name: str, config: TransformerConfig, options: Mapping[str, Any], rngs: nnx.Rngs) -> nnx.Module:
    entry = catalog.find(name)
    if entry.kind != "pooling" or entry.layer is None:
        raise ValueError(
            f"pooling must be one of {', '.join(POOLINGS)} or a catalogued pooling with a layer; {name} is a "
            f"{entry.kind}"
        )
    valid = keywords(entry.layer) - {"self", "features", "rngs", "dtype", "param_dtype", "num_classes"}
    for option in options:
        if option not in valid:
            near = difflib.get_close_matches(option, valid, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"{name} has no option {option!r}.{hint} Valid options: {', '.join(sorted(valid))}")
    shared = {"dtype": config.dtype, "param_dtype": config.param_dtype}
    shared = {key: value for key, value in shared.items() if key in keywords(entry.layer)}
    return entry.layer(config.features, **shared, **options, rngs=rngs)
