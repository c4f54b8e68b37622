"""A decoder language model whose attention is any catalogued mechanism."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.cache import CachePolicy, token_positions
from jattn.models.blocks import ModelOutput, embedding, head
from jattn.models.config import TransformerConfig
from jattn.models.sites import Sites
from jattn.models.stack import Stack
from jattn.models.swap import Attention, factories, kept
from jattn.softmax import masks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeCache:
    """The caches of all layers of a model, with their policies; pairs of both where there is cross attention.

    Example:
        >>> DecodeCache(layers=(), policies=()).layers
        ()
    """

    layers: tuple[Any, ...]
    policies: tuple[Any, ...] = dataclasses.field(metadata={"static": True})


class DecoderLM(nnx.Module):
    """A pre-norm decoder: embed, L blocks of causal attention and MLP, norm, logits.

    Args:
        config: sizes and options.
        attention: name of a catalogued mechanism that supports causal self attention, or one `Swap` or several: other
            mechanisms for some layers and heads.
        attention_options: hyper-parameters of the named mechanism; for one that is a function, those of
            `MultiHeadAttention` too.
        rngs: for the initial values.

    Raises:
        ValueError: an unknown name or option, or a mechanism that is not causal.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> config = TransformerConfig(vocab_size=11, features=16, num_layers=1, num_heads=2)
        >>> DecoderLM(config, rngs=nnx.Rngs(0))(jnp.zeros((1, 5), jnp.int32)).logits.shape
        (1, 5, 11)
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        attention: Attention = "softmax_attention",
        attention_options: Mapping[str, Any] | None = None,
        rngs: nnx.Rngs,
    ):
        made = factories(attention, attention_options, "causal self", config)
        self.config = config
        self.attention = kept(attention)
        self.embed = embedding(config, rngs=rngs)
        self.stack = Stack(config, made, bidirectional=False, rngs=rngs)
        tied = config.tie_embeddings
        self.head = None if tied else head(config, config.vocab_size, use_bias=False, rngs=rngs)

    def init_cache(self, policy: CachePolicy | Sequence[CachePolicy], batch: int, dtype: Any = None) -> DecodeCache:
        """Empty caches for decoding.

        Args:
            policy: one for all layers, or one a layer.
            batch: B.
            dtype: of keys and values; that of the layers if not given.

        Returns:
            A cache to be given to the model.

        Raises:
            ValueError: a wrong number of policies, or a mechanism that keeps no keys and values.
        """
        count = self.config.num_layers
        policies = (policy,) * count if isinstance(policy, CachePolicy) else tuple(policy)
        if len(policies) != count:
            raise ValueError(f"policy must be one policy or {count}, one a layer; got {len(policies)}")
        layers = [block.attention for block in self.stack.blocks]
        if not all(hasattr(layer, "init_cache") for layer in layers):
            raise ValueError(f"{self.attention} keeps no keys and values, so there is no cache to make for it")
        made = [layer.init_cache(one, batch, dtype) for layer, one in zip(layers, policies, strict=True)]
        return DecodeCache(tuple(made), policies)

    def __call__(
        self,
        tokens: Any,
        *,
        positions: Any = None,
        segment_ids: Any = None,
        cache: DecodeCache | None = None,
        logits_at: Any = None,
        hook: Any = None,
        record: Iterable[str] = (),
        replace: Mapping[str, Any] | None = None,
        deterministic: bool = True,
        rngs: Any = None,
    ) -> ModelOutput:
        """Predict the next token at every place.

        Args:
            tokens: integers `[B, T]`.
            positions: `[T]` or `[B, T]`; 0 .. T-1 if not given. Not together with a cache, which counts them.
            segment_ids: `[B, T]`, documents packed in a row; negative = padding. With a cache only the sign counts.
            cache: what `init_cache` made; the new tokens are stored in it.
            logits_at: int `[B, R]`, the places whose logits are wanted; all if not given. After a prompt only the last
                place matters, and a vocabulary is wide.
            hook: a `jattn.probes.AttnHook` for every attention, its arrays with a leading layer axis.
            record: sites to record: 'embed', 'head_out', 'attn_out', 'mlp_out', 'resid'.
            replace: (mask, value) by site: x <- where(mask, value, x), broadcastable to the site's stacked shape.
            deterministic: no dropout.
            rngs: an `nnx.Rngs` or a key, for dropout.

        Returns:
            ModelOutput(logits `[B, T, V]` or `[B, R, V]`, cache, aux); recorded sites are aux['sites'], losses
            aux['losses'], what the hook observed aux['hook'].

        Raises:
            ValueError: bad shapes, an unknown site, or a call that the mechanism cannot serve.
        """
        tokens = checked_tokens(tokens)
        sites = Sites(tuple(record), replace or {}, self.config.num_layers)
        places, caches = positions, None
        if cache is not None:
            if positions is not None:
                raise ValueError("positions cannot be given together with a cache, which counts them itself")
            valid = None if segment_ids is None else jnp.asarray(segment_ids) >= 0
            places = jnp.maximum(token_positions(cache.layers[0], tokens.shape[1], valid), 0)
            caches = tuple(zip(cache.policies, cache.layers, strict=True))
        x = self.stack.enter(self.embed(tokens), places)
        x, layers, aux = self.stack(
            x,
            sites=sites,
            caches=caches,
            hook=hook,
            deterministic=deterministic,
            rngs=rngs,
            mask=masks.causal(),
            positions=positions,
            segment_ids=segment_ids,
        )
        if logits_at is not None:
            x = jnp.take_along_axis(x, jnp.asarray(logits_at)[..., None], axis=1)
        logits = self.embed.attend(x) if self.head is None else self.head(x)
        return ModelOutput(logits, None if cache is None else DecodeCache(layers, cache.policies), aux)


def checked_tokens(tokens: Any) -> jax.Array:
    """Tokens as an array, after a check that they are integers `[B, T]`."""
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers [B, T], got {tokens.dtype}{list(tokens.shape)}")
    return tokens
