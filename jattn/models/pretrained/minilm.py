"""MiniLM-L6: sentences to vectors, a BERT of six layers, from its safetensors file.

v = m / |m|,  m the mean of the last layer over the tokens of a sentence

Norms come after attention and MLP. The checkpoint tells first and second sentences of a pair apart by a token type;
here there are only first ones, whose row is added to every row of the position table when the weights are loaded.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jattn.models.config import TransformerConfig
from jattn.models.encoder import Encoder, mean_of_tokens
from jattn.models.pretrained import packages
from jattn.models.pretrained.filling import fill, new_in_attention
from jattn.models.pretrained.readers import UnreadableFile, safetensors_file
from jattn.models.pretrained.readers.common import library
from jattn.models.pretrained.torch_layout import Renaming
from jattn.models.swap import Attention


@dataclasses.dataclass(frozen=True)
class MiniLM:
    """The model with its tokenizer.

    Args:
        model: the encoder.
        tokenizer: a `tokenizers.Tokenizer` that neither pads nor cuts.
    """

    model: Encoder
    tokenizer: Any

    def encode(self, sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
        """Tokens of sentences, each between [CLS] and [SEP].

        Args:
            sentences: B of them, at least one.

        Returns:
            int32 `[B, T]`, T the longest, and segment ids `[B, T]`, 0 for tokens and -1 for padding; None in their
            place where nothing is padded, so that mechanisms without segments can be swapped in.

        Raises:
            ValueError: no sentences, a single string, or a sentence that is too long for the model.
        """
        if isinstance(sentences, str) or not sentences:
            raise ValueError(f"sentences must be a sequence of strings, at least one, got {sentences!r}")
        rows = [encoded.ids for encoded in self.tokenizer.encode_batch(list(sentences))]
        longest = max(map(len, rows))
        if longest > self.model.config.max_length:
            raise ValueError(
                f"a sentence has {longest} tokens; the model takes at most {self.model.config.max_length}, and was "
                "trained on 128"
            )
        tokens, segments = np.zeros((len(rows), longest), np.int32), np.full((len(rows), longest), -1, np.int32)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 0
        return tokens, segments if (segments < 0).any() else None

    def embed(self, sentences: Sequence[str]) -> jax.Array:
        """One vector of length 1 for each sentence.

        Args:
            sentences: B of them; all are padded to the longest, and computed at once.

        Returns:
            float32 `[B, M]`.

        Raises:
            ValueError: as `encode`, or a mechanism that takes no segments met padding.
        """
        return _embed(self.model, *self.encode(sentences))

    def similarity(self, sentences: Sequence[str], others: Sequence[str]) -> jax.Array:
        """Cosines between sentences: 1 for the same direction, near 0 for nothing in common.

        Args:
            sentences: A of them.
            others: B of them.

        Returns:
            float32 `[A, B]`.

        Raises:
            ValueError: as `embed`.
        """
        one, other = self.embed(sentences), self.embed(others)
        return jnp.matmul(one, other.T, precision="highest")


@nnx.jit
def _embed(model: Encoder, tokens: jax.Array | np.ndarray, segment_ids: jax.Array | np.ndarray | None) -> jax.Array:
    states, _ = model.states(tokens, segment_ids=segment_ids)
    mean = mean_of_tokens(states.astype(jnp.float32), segment_ids)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def load(*, attention: Attention = "softmax_attention", dtype: Any = jnp.float32) -> MiniLM:
    """Load MiniLM.

    Args:
        attention: a mechanism for all layers, or swaps for some; parameters that it brings along start as new.
        dtype: of parameters and computation; sentence vectors are float32.

    Returns:
        The model with its tokenizer.

    Raises:
        NotFetched: run `jattn fetch minilm` first.
        ValueError: the file is damaged, or the mechanism does not fit.
        ImportError: the libraries safetensors or tokenizers are not installed.

    Source: MiniLM (arXiv 2002.10957); Sentence-BERT (arXiv 1908.10084).
    """
    paths = {key: packages.path("minilm", key) for key in ("weights", "config", "tokenizer")}
    config = config_of(json.loads(paths["config"].read_text(encoding="utf-8")), dtype)

    def build(rngs: nnx.Rngs) -> nnx.Module:
        return Encoder(config, attention=attention, rngs=rngs)

    model = fill(build, renamed(safetensors_file.read(paths["weights"]), config), new=new_in_attention)
    tokenizer = library("tokenizers").Tokenizer.from_file(str(paths["tokenizer"]))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return MiniLM(model, tokenizer)


def config_of(fields: Mapping[str, Any], dtype: Any = jnp.float32) -> TransformerConfig:
    """The configuration that a `config.json` of BERT describes.

    Raises:
        UnreadableFile: another architecture.
    """
    wanted = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    if {name: fields.get(name) for name in wanted} != wanted:
        raise UnreadableFile("a configuration of BERT with GELU and absolute positions is needed")
    return TransformerConfig(
        vocab_size=fields["vocab_size"],
        features=fields["hidden_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=fields["num_attention_heads"],
        mlp="gelu_erf",
        mlp_ratio=fields["intermediate_size"] / fields["hidden_size"],
        max_length=fields["max_position_embeddings"],
        position="learned",
        norm="layernorm",
        norm_epsilon=fields["layer_norm_eps"],
        norm_placement="post",
        embedding_norm=True,
        use_bias=True,
        dtype=dtype,
        param_dtype=dtype,
    )


def renamed(tensors: MutableMapping[str, np.ndarray], config: TransformerConfig) -> dict[str, np.ndarray]:
    """The tensors of the checkpoint by the paths of `Encoder`; the given mapping is emptied.

    The pooler, which sentence vectors do not use, is left out.

    Raises:
        UnreadableFile: a tensor is missing, or one is left over.
    """
    renaming = Renaming(tensors, config.num_heads)
    renaming.drop("pooler.", "embeddings.position_ids")
    types = renaming.take("embeddings.token_type_embeddings.weight")
    renaming.weights["embed.embedding"] = renaming.take("embeddings.word_embeddings.weight")
    renaming.weights["stack.learned.table.embedding"] = (
        renaming.take("embeddings.position_embeddings.weight") + types[0]
    )
    renaming.norm("stack.embedding_norm", "embeddings.LayerNorm")
    for layer in range(config.num_layers):
        mine, theirs = f"stack.blocks.{layer}", f"encoder.layer.{layer}"
        for name in ("query", "key", "value"):
            renaming.heads(f"{mine}.attention.{name}", f"{theirs}.attention.self.{name}")
        renaming.from_heads(f"{mine}.attention.out", f"{theirs}.attention.output.dense")
        renaming.norm(f"{mine}.attention_norm", f"{theirs}.attention.output.LayerNorm")
        renaming.linear(f"{mine}.mlp.up", f"{theirs}.intermediate.dense")
        renaming.linear(f"{mine}.mlp.down", f"{theirs}.output.dense")
        renaming.norm(f"{mine}.mlp_norm", f"{theirs}.output.LayerNorm")
    return renaming.done()
