"""SmolLM2-135M-Instruct: a decoder of 30 layers with grouped heads and rotary positions, from its GGUF file.

The file's rows of query and key projections are ordered for interleaved rotary pairs; here they are put back into the
order of the original checkpoint, whose pairs are halves of a head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jattn.models.config import TransformerConfig
from jattn.models.decoder import DecoderLM
from jattn.models.pretrained import packages
from jattn.models.pretrained.filling import fill, new_in_attention
from jattn.models.pretrained.readers import UnreadableFile, gguf_file
from jattn.models.pretrained.readers.common import library
from jattn.models.swap import Attention

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""What the model was told in training before the first message."""


@dataclasses.dataclass(frozen=True)
class SmolLM2:
    """The model with its tokenizer.

    Args:
        model: the decoder.
        tokenizer: a `tokenizers.Tokenizer`.
        stop_token: ends a message.
    """

    model: DecoderLM
    tokenizer: Any
    stop_token: int

    def encode(self, text: str) -> np.ndarray:
        """Tokens of a text, int32 `[T]`, nothing put before or after it."""
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of tokens, without those that mark messages."""
        return self.tokenizer.decode([int(token) for token in tokens])

    def chat(self, messages: Sequence[tuple[str, str]], system: str = SYSTEM) -> np.ndarray:
        """Tokens of a conversation, up to where the assistant is to answer.

        Args:
            messages: (role, text), the roles `"user"` and `"assistant"`.
            system: what comes before all messages.

        Returns:
            int32 `[T]`.
        """
        return self.encode(_marked([("system", system), *messages]))

    def chat_turn(self, messages: Sequence[tuple[str, str]]) -> np.ndarray:
        """Tokens of what follows an answer, whose last token has ended it; otherwise as `chat`."""
        return self.encode("\n" + _marked(messages))


def _marked(messages: Sequence[tuple[str, str]]) -> str:
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)
    return text + "<|im_start|>assistant\n"


def load(*, attention: Attention = "softmax_attention", dtype: Any = jnp.float32) -> SmolLM2:
    """Load SmolLM2.

    Args:
        attention: a mechanism for all layers, or swaps for some; parameters that it brings along start as new.
        dtype: of parameters and computation.

    Returns:
        The model with its tokenizer.

    Raises:
        NotFetched: run `jattn fetch smollm2` first.
        ValueError: the file is damaged, or the mechanism does not fit.

    Source: SmolLM2: When Smol Goes Big (arXiv 2502.02737).
    """
    path = packages.path("smollm2", "weights")
    header, tensors = gguf_file.read(path)
    config = config_of(header, dtype)

    def build(rngs: nnx.Rngs) -> nnx.Module:
        return DecoderLM(config, attention=attention, rngs=rngs)

    model = fill(build, renamed(tensors, config), new=new_in_attention)
    return SmolLM2(model, tokenizer_of(header), int(header["tokenizer.ggml.eos_token_id"]))


def config_of(header: Mapping[str, Any], dtype: Any = jnp.float32) -> TransformerConfig:
    """The configuration that a GGUF header of this architecture describes.

    Raises:
        UnreadableFile: another architecture, or a field that is missing.
    """
    if header.get("general.architecture") != "llama":
        raise UnreadableFile(
            f"a GGUF file of architecture 'llama' is needed, not {header.get('general.architecture')!r}"
        )

    def field(name: str) -> Any:
        if f"llama.{name}" not in header:
            raise UnreadableFile(f"the GGUF header lacks llama.{name}")
        return header[f"llama.{name}"]

    width = int(field("embedding_length"))
    return TransformerConfig(
        vocab_size=int(field("vocab_size")),
        features=width,
        num_layers=int(field("block_count")),
        num_heads=int(field("attention.head_count")),
        num_kv_heads=int(field("attention.head_count_kv")),
        mlp="swiglu",
        mlp_ratio=int(field("feed_forward_length")) / width,
        max_length=int(field("context_length")),
        position="rope",
        rope_base=float(field("rope.freq_base")),
        norm="rmsnorm",
        norm_epsilon=float(field("attention.layer_norm_rms_epsilon")),
        dtype=dtype,
        param_dtype=dtype,
    )


def renamed(tensors: MutableMapping[str, np.ndarray], config: TransformerConfig) -> dict[str, np.ndarray]:
    """The tensors of the file by the paths of `DecoderLM`, as views; the given mapping is emptied.

    Raises:
        UnreadableFile: a tensor is missing.
    """

    def take(name: str) -> np.ndarray:
        if name not in tensors:
            raise UnreadableFile(f"the GGUF file lacks the tensor {name}")
        return tensors.pop(name)

    def heads(name: str, count: int, *, rotated: bool) -> np.ndarray:
        rows = take(name).reshape(count, -1, config.features)
        if rotated:
            rows = rows.reshape(count, -1, 2, config.features).swapaxes(1, 2).reshape(rows.shape)
        return rows.transpose(2, 0, 1)

    weights = {"embed.embedding": take("token_embd.weight"), "stack.norm.scale": take("output_norm.weight")}
    for layer in range(config.num_layers):
        mine, theirs = f"stack.blocks.{layer}", f"blk.{layer}"
        weights |= {
            f"{mine}.attention_norm.scale": take(f"{theirs}.attn_norm.weight"),
            f"{mine}.attention.query.kernel": heads(f"{theirs}.attn_q.weight", config.num_heads, rotated=True),
            f"{mine}.attention.key.kernel": heads(f"{theirs}.attn_k.weight", config.kv_heads, rotated=True),
            f"{mine}.attention.value.kernel": heads(f"{theirs}.attn_v.weight", config.kv_heads, rotated=False),
            f"{mine}.attention.out.kernel": take(f"{theirs}.attn_output.weight").T.reshape(
                config.num_heads, -1, config.features
            ),
            f"{mine}.mlp_norm.scale": take(f"{theirs}.ffn_norm.weight"),
            f"{mine}.mlp.gate.kernel": take(f"{theirs}.ffn_gate.weight").T,
            f"{mine}.mlp.up.kernel": take(f"{theirs}.ffn_up.weight").T,
            f"{mine}.mlp.down.kernel": take(f"{theirs}.ffn_down.weight").T,
        }
    return weights


CONTROL = 3
"""The type of a token in a GGUF header that marks something instead of standing for text."""


def tokenizer_of(header: Mapping[str, Any]) -> Any:
    """The byte-level BPE tokenizer that a GGUF header holds, digits taken one by one."""
    tokenizers = library("tokenizers")
    tokens = list(header["tokenizer.ggml.tokens"])
    merges = [tuple(merge.split(" ", 1)) for merge in header["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    kinds = header["tokenizer.ggml.token_type"]
    marks = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens(marks)
    return tokenizer
