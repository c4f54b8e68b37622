"""Whisper tiny.en: speech to English text, an encoder-decoder of 4 + 4 layers, from its CTranslate2 file.

memory = encoder(gelu(conv(gelu(conv(log mel)))) + positions);   token_t ~ decoder(tokens before t, memory)
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jattn.cache import FullCache
from jattn.models.config import TransformerConfig
from jattn.models.encoder_decoder import EncoderDecoder
from jattn.models.pretrained import packages
from jattn.models.pretrained.filling import fill, new_in_attention
from jattn.models.pretrained.log_mel import HOP, RATE, log_mel, windows
from jattn.models.pretrained.readers import UnreadableFile, ctranslate2_file
from jattn.models.pretrained.readers.common import library
from jattn.models.swap import Attention
from jattn.probes import AttnHook, for_layers

HEADS, LAYERS, MELS = 6, 4, 80


class SoundFront(nnx.Module):
    """Two convolutions over time, the second at every other column: `[B, 3000, 80]` -> `[B, 1500, M]`.

    Args:
        features: M.
        bands: of the spectrogram.
        dtype: of computation and parameters.
        rngs: for the initial values.
    """

    def __init__(self, features: int, bands: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        convolution = functools.partial(
            nnx.Conv, kernel_size=(3,), padding=((1, 1),), dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        self.first, self.second = convolution(bands, features), convolution(features, features, strides=(2,))

    def __call__(self, x: Float[Array, "B S F"]) -> Float[Array, "B S2 M"]:
        """Apply both."""
        return jax.nn.gelu(self.second(jax.nn.gelu(self.first(x), approximate=False)), approximate=False)


class Transcript(NamedTuple):
    """What was said, and when.

    Example:
        >>> Transcript("Hello.", [("Hello.", 0.4)]).text
        'Hello.'
    """

    text: str
    times: list[tuple[str, float]]
    """Each token's text with the second at which it is heard, by the heads that follow the sound."""

    def words(self) -> list[tuple[str, float]]:
        """Each word with the second of its first token."""
        found: list[tuple[str, float]] = []
        for token, time in self.times:
            if token.startswith(" ") or not found:
                found.append((token.strip(), time))
            else:
                found[-1] = (found[-1][0] + token, found[-1][1])
        return found


@dataclasses.dataclass(frozen=True)
class Whisper:
    """The model with its tokenizer and what its configuration says about decoding.

    Args:
        model: the encoder-decoder.
        tokenizer: a `tokenizers.Tokenizer`.
        alignment_heads: (layer, head) of the cross attentions that follow the sound.
        suppressed: tokens that are never chosen.
        suppressed_first: tokens that are not chosen at the beginning either.
    """

    model: EncoderDecoder
    tokenizer: Any
    alignment_heads: tuple[tuple[int, int], ...]
    suppressed: tuple[int, ...]
    suppressed_first: tuple[int, ...]

    def token(self, name: str) -> int:
        """The number of a mark such as `"startoftranscript"`."""
        return self.tokenizer.token_to_id(f"<|{name}|>")

    def transcribe(self, sound: np.ndarray, *, max_tokens: int = 224) -> Transcript:
        """Write down what is said, greedily.

        Sound of more than 30 seconds is cut at quiet places into windows that are transcribed one by one.

        Args:
            sound: samples in [-1, 1] at 16 kHz; see `jattn.models.pretrained.log_mel.read_sound`.
            max_tokens: of one window.

        Returns:
            The text, and the time of every token.
        """
        texts, times = [], []
        for start, part in windows(np.asarray(sound)):
            tokens = self.tokens(part, max_tokens=max_tokens)
            texts.append(self.tokenizer.decode(tokens).strip())
            found = self.token_times(part, tokens)
            times += [(self.tokenizer.decode([token]), start + time) for token, time in zip(tokens, found, strict=True)]
        return Transcript(" ".join(text for text in texts if text), times)

    @property
    def prompt(self) -> list[int]:
        """What stands before the text: transcribe, without timestamps."""
        return [self.token("startoftranscript"), self.token("notimestamps")]

    def tokens(self, sound: np.ndarray, *, max_tokens: int = 224) -> list[int]:
        """The tokens of the text of at most 30 seconds, through caches, one after the other."""
        graphdef, state = nnx.split(self.model)
        never = np.zeros(self.model.config.vocab_size, bool)
        never[list(self.suppressed)] = True
        never_first = never.copy()
        never_first[list(self.suppressed_first)] = True
        found, count = _decode(
            graphdef,
            state,
            log_mel(sound, MELS)[None],
            np.asarray([self.prompt], np.int32),
            never,
            never_first,
            self.token("endoftext"),
            max_tokens=min(max_tokens, self.model.config.max_length - len(self.prompt)),
        )
        return np.asarray(found)[0, : int(count)].tolist()

    def alignment(self, sound: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
        """Where in the sound each token looks: mean weights of the alignment heads, `[len(tokens), 1500]`.

        Row t holds what the decoder attends to while it predicts token t.
        """
        graphdef, state = nnx.split(self.model)
        row = np.asarray([[*self.prompt, *tokens]], np.int32)
        weights = np.asarray(_cross_weights(graphdef, state, log_mel(sound, MELS)[None], row), np.float32)
        mean = np.mean([weights[layer, 0, head] for layer, head in self.alignment_heads], axis=0)
        return mean[len(self.prompt) - 1 : -1]

    def token_times(self, sound: np.ndarray, tokens: Sequence[int]) -> list[float]:
        """The second that each token looks at most, within the sound."""
        if not len(tokens):
            return []
        heard = max(1, -(-len(sound) // (2 * HOP)))
        return (self.alignment(sound, tokens)[:, :heard].argmax(axis=1) * 2 * HOP / RATE).tolist()


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("max_tokens",))
def _decode(
    graphdef: Any, state: Any, mel: Any, prompt: Any, never: Any, never_first: Any, stop: Any, *, max_tokens: int
) -> tuple[Any, Any]:
    model = nnx.merge(graphdef, state)
    memory, _ = model.encode(mel)
    cache = model.init_cache(FullCache(prompt.shape[1] + max_tokens), memory)
    out = model(prompt, cache=cache)

    def unfinished(carry: Any) -> Any:
        step, token, *_ = carry
        return (step < max_tokens) & (token[0] != stop)

    def one(carry: Any) -> Any:
        step, token, cache, tokens = carry
        tokens = tokens.at[:, step].set(token)
        out = model(token[:, None], cache=cache)
        return step + 1, choose(out.logits, never), out.cache, tokens

    def choose(logits: Any, hidden: Any) -> Any:
        return jnp.argmax(jnp.where(hidden, -jnp.inf, logits[:, -1].astype(jnp.float32)), axis=-1).astype(jnp.int32)

    start = (0, choose(out.logits, never_first), out.cache, jnp.zeros((mel.shape[0], max_tokens), jnp.int32))
    step, _, _, tokens = jax.lax.while_loop(unfinished, one, start)
    return tokens, step


@functools.partial(jax.jit, static_argnums=(0,))
def _cross_weights(graphdef: Any, state: Any, mel: Any, tokens: Any) -> Any:
    model = nnx.merge(graphdef, state)
    memory, _ = model.encode(mel)
    hook = for_layers(AttnHook(observe=frozenset({"row_weights"})), model.config.num_layers)
    return model(tokens, memory, cross_hook=hook).aux["cross_hook"]["row_weights"]


def load(
    *,
    attention: Attention = "softmax_attention",
    encoder_attention: Attention = "softmax_attention",
    cross_attention: Attention = "softmax_attention",
    dtype: Any = jnp.float32,
) -> Whisper:
    """Load Whisper tiny.en.

    Args:
        attention: of the decoder to itself: a mechanism for all layers, or swaps for some; parameters that it brings
            along start as new.
        encoder_attention: of the encoder.
        cross_attention: of the decoder to the encoder.
        dtype: of parameters and computation.

    Returns:
        The model with its tokenizer.

    Raises:
        NotFetched: run `jattn fetch whisper_tiny_en` first.
        ValueError: a file is damaged, or a mechanism does not fit.

    Source: Robust Speech Recognition via Large-Scale Weak Supervision (arXiv 2212.04356).
    """
    tensors = dict(ctranslate2_file.read(packages.path("whisper_tiny_en", "weights"), "WhisperSpec"))
    config = json.loads(packages.path("whisper_tiny_en", "config").read_text(encoding="utf-8"))
    encoder, decoder = configs_of(tensors, dtype)

    def build(rngs: nnx.Rngs) -> nnx.Module:
        return EncoderDecoder(
            decoder,
            encoder,
            attention=attention,
            encoder_attention=encoder_attention,
            cross_attention=cross_attention,
            front=SoundFront(encoder.features, MELS, dtype=dtype, rngs=rngs),
            rngs=rngs,
        )

    tokenizer = library("tokenizers").Tokenizer.from_file(str(packages.path("whisper_tiny_en", "tokenizer")))
    return Whisper(
        fill(build, renamed(tensors), new=new_in_attention),
        tokenizer,
        tuple((layer, head) for layer, head in config["alignment_heads"]),
        tuple(config["suppress_ids"]),
        tuple(config["suppress_ids_begin"]),
    )


def configs_of(tensors: Mapping[str, np.ndarray], dtype: Any = jnp.float32) -> tuple[TransformerConfig, ...]:
    """Configurations of encoder and decoder, by the shapes of the tensors."""
    vocabulary, width = tensors["decoder/embeddings/weight"].shape
    encoder = TransformerConfig(
        vocab_size=vocabulary,
        features=width,
        num_layers=LAYERS,
        num_heads=HEADS,
        mlp="gelu_erf",
        max_length=tensors["encoder/position_encodings/encodings"].shape[0],
        position="learned",
        norm="layernorm",
        norm_epsilon=1e-5,
        use_bias=True,
        dtype=dtype,
        param_dtype=dtype,
    )
    length = tensors["decoder/position_encodings/encodings"].shape[0]
    return encoder, dataclasses.replace(encoder, max_length=length)


def renamed(tensors: MutableMapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of the file by the paths of `EncoderDecoder`.

    Raises:
        UnreadableFile: a tensor is missing.
    """

    def take(name: str) -> np.ndarray:
        if name not in tensors:
            raise UnreadableFile(f"the CTranslate2 file lacks the tensor {name}")
        return tensors[name]

    weights = {"embed.embedding": take("decoder/embeddings/weight")}
    for number, mine in ((1, "front.first"), (2, "front.second")):
        weights[f"{mine}.kernel"] = take(f"encoder/conv{number}/weight").transpose(2, 1, 0)
        weights[f"{mine}.bias"] = take(f"encoder/conv{number}/bias")

    def norm(mine: str, theirs: str) -> None:
        weights[f"{mine}.scale"] = take(f"{theirs}/layer_norm/gamma")
        weights[f"{mine}.bias"] = take(f"{theirs}/layer_norm/beta")

    def linear(mine: str, theirs: str) -> None:
        weights[f"{mine}.kernel"], weights[f"{mine}.bias"] = take(f"{theirs}/weight").T, take(f"{theirs}/bias")

    def into_heads(mine: str, names: Sequence[str], theirs: str) -> None:
        matrices = np.split(take(f"{theirs}/weight"), len(names))
        for name, matrix, bias in zip(names, matrices, np.split(take(f"{theirs}/bias"), len(names)), strict=True):
            weights[f"{mine}.{name}.kernel"] = matrix.T.reshape(matrix.shape[1], HEADS, -1)
            weights[f"{mine}.{name}.bias"] = bias.reshape(HEADS, -1)

    def out(mine: str, theirs: str) -> None:
        matrix = take(f"{theirs}/weight")
        weights[f"{mine}.out.kernel"] = matrix.T.reshape(HEADS, -1, matrix.shape[0])
        weights[f"{mine}.out.bias"] = take(f"{theirs}/bias")

    for side in ("encoder", "decoder"):
        weights[f"{side}.learned.table.embedding"] = take(f"{side}/position_encodings/encodings")
        norm(f"{side}.norm", side)
        for layer in range(LAYERS):
            mine, theirs = f"{side}.blocks.{layer}", f"{side}/layer_{layer}"
            norm(f"{mine}.attention_norm", f"{theirs}/self_attention")
            into_heads(f"{mine}.attention", ("query", "key", "value"), f"{theirs}/self_attention/linear_0")
            out(f"{mine}.attention", f"{theirs}/self_attention/linear_1")
            if side == "decoder":
                norm(f"{mine}.cross_norm", f"{theirs}/attention")
                into_heads(f"{mine}.cross", ("query",), f"{theirs}/attention/linear_0")
                into_heads(f"{mine}.cross", ("key", "value"), f"{theirs}/attention/linear_1")
                out(f"{mine}.cross", f"{theirs}/attention/linear_2")
            norm(f"{mine}.mlp_norm", f"{theirs}/ffn")
            linear(f"{mine}.mlp.up", f"{theirs}/ffn/linear_0")
            linear(f"{mine}.mlp.down", f"{theirs}/ffn/linear_1")
    return weights
