"""An encoder-decoder: a decoder that also attends, in every block, to what an encoder made of a source.

m = encoder(source);   h = x + attention(norm(x)),   h = h + cross(norm(h), m),   y = h + mlp(norm(h))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jattn.cache import CachePolicy, FullCache, token_positions
from jattn.models.blocks import ModelOutput, embedding, head
from jattn.models.config import TransformerConfig
from jattn.models.decoder import DecodeCache, checked_tokens
from jattn.models.sites import CROSS_SITES, Sites
from jattn.models.stack import Stack
from jattn.models.swap import Attention, factories
from jattn.softmax import masks


class EncoderDecoder(nnx.Module):
    """Encode a source once, decode tokens that attend to it.

    The source is a sequence of vectors `[B, S, M]` (`front` may make them of something else) or of tokens.

    Args:
        config: of the decoder.
        encoder_config: of the encoder; that of the decoder if not given.
        attention: of the decoder's self attention: a name or swaps; see `DecoderLM`.
        attention_options: hyper-parameters of a name.
        encoder_attention: of the encoder's self attention.
        cross_attention: of the decoder's attention to the encoder.
        front: module that turns a source into `[B, S, M]`; without one a source is vectors, or integers `[B, S]` that
            the decoder's token table looks up.
        rngs: for the initial values.

    Raises:
        ValueError: an unknown name or option, a mechanism without the pattern that its place needs, or widths of
            encoder and decoder that differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> config = TransformerConfig(vocab_size=11, features=16, num_layers=1, num_heads=2, position="sinusoidal")
        >>> model = EncoderDecoder(config, rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((1, 5), jnp.int32), model.encode(jnp.zeros((1, 7), jnp.int32))[0]).logits.shape
        (1, 5, 11)

    Source: Attention Is All You Need (arXiv 1706.03762).
    """

    def __init__(
        self,
        config: TransformerConfig,
        encoder_config: TransformerConfig | None = None,
        *,
        attention: Attention = "softmax_attention",
        attention_options: Mapping[str, Any] | None = None,
        encoder_attention: Attention = "softmax_attention",
        cross_attention: Attention = "softmax_attention",
        front: nnx.Module | None = None,
        rngs: nnx.Rngs,
    ):
        encoder_config = config if encoder_config is None else encoder_config
        if config.features != encoder_config.features:
            raise ValueError(
                f"encoder and decoder must have the same width, got {encoder_config.features} and {config.features}"
            )
        self.config, self.encoder_config = config, encoder_config
        self.front = front
        self.embed = embedding(config, rngs=rngs)
        encoders = factories(encoder_attention, None, "noncausal self", encoder_config)
        self.encoder = Stack(encoder_config, encoders, bidirectional=True, rngs=rngs)
        self.decoder = Stack(
            config,
            factories(attention, attention_options, "causal self", config),
            bidirectional=False,
            cross_factories=factories(cross_attention, None, "noncausal cross", config),
            rngs=rngs,
        )
        self.head = None if config.tie_embeddings else head(config, config.vocab_size, use_bias=False, rngs=rngs)

    def encode(
        self,
        source: Any,
        *,
        segment_ids: Any = None,
        hook: Any = None,
        record: Iterable[str] = (),
        replace: Mapping[str, Any] | None = None,
        deterministic: bool = True,
        rngs: Any = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Encode a source.

        Args:
            source: an array that `front` takes; without one, vectors `[B, S, M]` or integers `[B, S]`.
            segment_ids: `[B, S]`; negative = padding.
            hook: a `jattn.probes.AttnHook` for every attention, its arrays with a leading layer axis.
            record: sites to record.
            replace: (mask, value) by site.
            deterministic: no dropout.
            rngs: an `nnx.Rngs` or a key, for dropout.

        Returns:
            The memory `[B, S, M]`, and aux.

        Raises:
            ValueError: bad shapes, an unknown site, or a call that the mechanism cannot serve.
        """
        sites = Sites(tuple(record), replace or {}, self.encoder_config.num_layers)
        x = jnp.asarray(source)
        if self.front is not None:
            x = self.front(x)
        elif jnp.issubdtype(x.dtype, jnp.integer):
            x = self.embed(checked_tokens(x))
        x = self.encoder.enter(x, None)
        call = {"sites": sites, "hook": hook, "deterministic": deterministic, "rngs": rngs}
        x, _, aux = self.encoder(x, **call, segment_ids=segment_ids)
        return x, aux

    def init_cache(self, policy: CachePolicy, memory: Any, *, memory_ids: Any = None, dtype: Any = None) -> DecodeCache:
        """Caches for decoding: an empty one for the tokens, and one with the keys and values of the memory.

        Args:
            policy: of the self attention of all layers.
            memory: `[B, S, M]`, what `encode` returns.
            memory_ids: `[B, S]`; negative = padding, which is not stored.
            dtype: of keys and values; that of the layers if not given.

        Returns:
            A cache to be given to the model instead of the memory.

        Raises:
            ValueError: a mechanism that keeps no keys and values.
        """
        memory = jnp.asarray(memory)
        across = FullCache(memory.shape[1], causal=False)
        layers = []
        for block in self.decoder.blocks:
            if not (hasattr(block.attention, "init_cache") and hasattr(block.cross, "init_cache")):
                raise ValueError("an attention of the decoder keeps no keys and values, so there is no cache for it")
            held = block.cross.init_cache(across, memory.shape[0], dtype)
            valid = None if memory_ids is None else jnp.asarray(memory_ids) >= 0
            _, key, value = block.cross.project(memory[:, :1], memory)
            held, _ = across.append(held, key, value, valid)
            layers.append((block.attention.init_cache(policy, memory.shape[0], dtype), held))
        return DecodeCache(tuple(layers), ((policy, across),) * len(layers))

    def __call__(
        self,
        tokens: Any,
        memory: Any = None,
        *,
        memory_ids: Any = None,
        positions: Any = None,
        segment_ids: Any = None,
        cache: DecodeCache | None = None,
        hook: Any = None,
        cross_hook: Any = None,
        record: Iterable[str] = (),
        replace: Mapping[str, Any] | None = None,
        deterministic: bool = True,
        rngs: Any = None,
    ) -> ModelOutput:
        """Predict the next token at every place.

        Args:
            tokens: integers `[B, T]`.
            memory: `[B, S, M]`, what `encode` returns; not with a cache, which holds it.
            memory_ids: `[B, S]`; negative = padding.
            positions: `[T]` or `[B, T]`; 0 .. T-1 if not given. Not together with a cache, which counts them.
            segment_ids: `[B, T]`; negative = padding. With a cache only the sign counts.
            cache: what `init_cache` made; the new tokens are stored in it.
            hook: a `jattn.probes.AttnHook` for every self attention, its arrays with a leading layer axis.
            cross_hook: the same for every cross attention.
            record: sites to record: those of a decoder, 'cross_head_out' and 'cross_out'.
            replace: (mask, value) by site.
            deterministic: no dropout.
            rngs: an `nnx.Rngs` or a key, for dropout.

        Returns:
            ModelOutput(logits `[B, T, V]`, cache, aux).

        Raises:
            ValueError: bad shapes, neither memory nor cache or both, an unknown site, or a call that a mechanism cannot
                serve.
        """
        tokens = checked_tokens(tokens)
        if (memory is None) == (cache is None):
            raise ValueError("give either memory, what encode returns, or a cache, which holds it")
        sites = Sites(tuple(record), replace or {}, self.config.num_layers, CROSS_SITES)
        places, caches = positions, None
        if cache is not None:
            if positions is not None:
                raise ValueError("positions cannot be given together with a cache, which counts them itself")
            valid = None if segment_ids is None else jnp.asarray(segment_ids) >= 0
            places = jnp.maximum(token_positions(cache.layers[0][0], tokens.shape[1], valid), 0)
            pairs = zip(cache.policies, cache.layers, strict=True)
            caches = [tuple(zip(policies, held, strict=True)) for policies, held in pairs]
        ids = jnp.zeros(tokens.shape, jnp.int32) if segment_ids is None else jnp.minimum(jnp.asarray(segment_ids), 0)
        cross = {"context": memory}
        if memory_ids is not None and memory is not None:
            cross["segment_ids"] = (ids, jnp.minimum(jnp.asarray(memory_ids), 0))
        x = self.decoder.enter(self.embed(tokens), places)
        x, layers, aux = self.decoder(
            x,
            sites=sites,
            caches=caches,
            deterministic=deterministic,
            rngs=rngs,
            hook=hook,
            cross=cross,
            cross_hook=cross_hook,
            mask=masks.causal(),
            positions=positions,
            segment_ids=segment_ids,
        )
        logits = self.embed.attend(x) if self.head is None else self.head(x)
        return ModelOutput(logits, None if cache is None else DecodeCache(layers, cache.policies), aux)
