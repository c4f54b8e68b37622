"""A bidirectional encoder whose attention is any catalogued mechanism."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jattn.models.blocks import ModelOutput, embedding, head
from jattn.models.config import TransformerConfig
from jattn.models.decoder import checked_tokens
from jattn.models.sites import Sites
from jattn.models.stack import Stack
from jattn.models.swap import Attention, factories, kept


class Encoder(nnx.Module):
    """A pre-norm encoder: embed, L blocks of attention to all tokens and MLP, norm, logits.

    Args:
        config: sizes and options.
        attention: name of a catalogued mechanism that supports noncausal self attention, or one `Swap` or several.
        attention_options: hyper-parameters of the named mechanism; for one that is a function, those of
            `MultiHeadAttention` too.
        num_classes: classes of a whole row, read from the mean over its tokens; None for logits of every token.
        rngs: for the initial values.

    Raises:
        ValueError: an unknown name or option, or a mechanism that is only causal.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> config = TransformerConfig(vocab_size=11, features=16, num_layers=1, num_heads=2)
        >>> Encoder(config, num_classes=3, rngs=nnx.Rngs(0))(jnp.zeros((2, 5), jnp.int32)).logits.shape
        (2, 3)
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        attention: Attention = "softmax_attention",
        attention_options: Mapping[str, Any] | None = None,
        num_classes: int | None = None,
        rngs: nnx.Rngs,
    ):
        made = factories(attention, attention_options, "noncausal self", config)
        self.config, self.attention, self.num_classes = config, kept(attention), num_classes
        self.embed = embedding(config, rngs=rngs)
        self.stack = Stack(config, made, bidirectional=True, rngs=rngs)
        if num_classes is not None:
            self.head = head(config, num_classes, use_bias=True, rngs=rngs)
        else:
            self.head = None if config.tie_embeddings else head(config, config.vocab_size, use_bias=False, rngs=rngs)

    def states(
        self,
        tokens: Any,
        *,
        positions: Any = None,
        segment_ids: Any = None,
        hook: Any = None,
        record: Iterable[str] = (),
        replace: Mapping[str, Any] | None = None,
        deterministic: bool = True,
        rngs: Any = None,
    ) -> tuple[Any, dict[str, Any]]:
        """The stream after the last block and norm, `[B, T, M]`, and aux; arguments as in a call of the model."""
        tokens = checked_tokens(tokens)
        sites = Sites(tuple(record), replace or {}, self.config.num_layers)
        x = self.stack.enter(self.embed(tokens), positions)
        call = {"positions": positions, "segment_ids": segment_ids}
        x, _, aux = self.stack(x, sites=sites, hook=hook, deterministic=deterministic, rngs=rngs, **call)
        return x, aux

    def __call__(self, tokens: Any, *, segment_ids: Any = None, **options: Any) -> ModelOutput:
        """Encode.

        Args:
            tokens: integers `[B, T]`.
            segment_ids: `[B, T]`, documents packed in a row; negative = padding, left out of the mean.
            **options: positions `[T]` or `[B, T]`, 0 .. T-1 if not given; hook, a `jattn.probes.AttnHook` for every
                attention, its arrays with a leading layer axis; record, sites to record; replace, (mask, value) by
                site; deterministic, no dropout (the default); rngs, an `nnx.Rngs` or a key, for dropout.

        Returns:
            ModelOutput(logits `[B, T, V]` or `[B, num_classes]`, None, aux).

        Raises:
            ValueError: bad shapes, an unknown site, or a call that the mechanism cannot serve.
        """
        x, aux = self.states(tokens, segment_ids=segment_ids, **options)
        if self.num_classes is not None and self.head is not None:
            return ModelOutput(self.head(mean_of_tokens(x, segment_ids)), None, aux)
        return ModelOutput(self.embed.attend(x) if self.head is None else self.head(x), None, aux)


def mean_of_tokens(x: Any, segment_ids: Any = None) -> Any:
    """Mean over the tokens of `[B, T, M]` that are not padding; 0 for a row of nothing else."""
    if segment_ids is None:
        return jnp.mean(x, axis=1)
    kept = (jnp.asarray(segment_ids) >= 0)[..., None]
    return jnp.sum(jnp.where(kept, x, 0), axis=1) / jnp.maximum(jnp.sum(kept, axis=1), 1)
