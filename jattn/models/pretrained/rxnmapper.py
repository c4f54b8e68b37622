"""rxnmapper: ALBERT on chemical reactions, one of whose heads has learned which atom becomes which, from its pickle.

Twelve layers with the same weights, norms after attention and MLP, tokens of width 128 that a projection brings to 256.
The checkpoint tells sentences apart by a token type; a reaction has type 0 throughout, whose row is added to every row
of the position table when the weights are loaded.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jattn.models.config import TransformerConfig
from jattn.models.encoder import Encoder
from jattn.models.pretrained import packages
from jattn.models.pretrained.atom_mapping import AtomMap, Reaction, map_by_attention, read_reaction
from jattn.models.pretrained.filling import fill, new_in_attention
from jattn.models.pretrained.readers import UnreadableFile, torch_pickle
from jattn.models.pretrained.smiles import is_atom
from jattn.models.pretrained.torch_layout import Renaming
from jattn.models.swap import Attention
from jattn.probes import AttnHook

FIRST, LAST, UNKNOWN = "[CLS]", "[SEP]", "[UNK]"
LAYER, HEAD = 10, 5
"""The layer and the head, counted from 0, that map atoms best."""


@dataclasses.dataclass(frozen=True)
class RxnMapper:
    """The model with its vocabulary.

    Args:
        model: the encoder.
        vocabulary: tokens of SMILES and their numbers.
    """

    model: Encoder
    vocabulary: Mapping[str, int]

    def encode(self, reaction: str | Reaction) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of a reaction, between the ones that every reaction begins and ends with.

        Args:
            reaction: SMILES without numbers at atoms.

        Returns:
            int32 `[T]`, and whether they are atoms, boolean `[T]`.

        Raises:
            ValueError: it cannot be read, has numbers already, or is too long for the model.
        """
        reaction = reaction if isinstance(reaction, Reaction) else read_reaction(reaction)
        if any(atom.number for side in (reaction.reactants, reaction.products) for atom in side.atoms):
            raise ValueError("the atoms of the reaction have numbers already; the model was trained without")
        tokens = [FIRST, *reaction.tokens, LAST]
        if len(tokens) > self.model.config.max_length:
            raise ValueError(
                f"the reaction has {len(tokens)} tokens; the model takes at most {self.model.config.max_length}"
            )
        unknown = self.vocabulary[UNKNOWN]
        flags = [False, *map(is_atom, reaction.tokens), False]
        return np.array([self.vocabulary.get(token, unknown) for token in tokens], np.int32), np.array(flags)

    def map_atoms(
        self, reaction: str, layer: int = LAYER, head: int = HEAD, *, replace: Mapping[str, Any] | None = None
    ) -> AtomMap:
        """Say which atom of the reactants each atom of the products was.

        The model was trained on canonical SMILES, molecules sorted. The reaction is read as it is written: another
        writing of the same reaction gives other weights, and usually the same map.

        Args:
            reaction: SMILES, `reactants>>products`; see `jattn.models.pretrained.atom_mapping.read_reaction`.
            layer: whose weights are read.
            head: likewise.
            replace: (mask, value) by site, as in a call of the model.

        Returns:
            Matched atoms with confidences, and the numbered reaction.

        Raises:
            ValueError: it cannot be read, has numbers already, is too long, or there is no such layer or head.
        """
        config = self.model.config
        if not 0 <= layer < config.num_layers or not 0 <= head < config.num_heads:
            raise ValueError(
                f"layer must be below {config.num_layers} and head below {config.num_heads}, got {layer} and {head}"
            )
        read = read_reaction(reaction)
        tokens, _ = self.encode(read)
        weights = attention_weights(self.model, tokens[None], dict(replace or {}))
        return map_by_attention(read, np.asarray(weights[layer, 0, head, 1:-1, 1:-1], np.float64))


@nnx.jit
def attention_weights(model: Encoder, tokens: jax.Array | np.ndarray, replace: Mapping[str, Any]) -> jax.Array:
    """The weights of all layers and heads.

    Args:
        model: an encoder whose mechanisms have weights.
        tokens: `[B, T]`.
        replace: (mask, value) by site.

    Returns:
        float32 at least, `[L, B, N, T, T]`.
    """
    _, aux = model.states(tokens, hook=AttnHook(observe=frozenset({"row_weights"})), replace=replace)
    return aux["hook"]["row_weights"]


def load(*, attention: Attention = "softmax_attention", dtype: Any = jnp.float32) -> RxnMapper:
    """Load rxnmapper.

    Args:
        attention: a mechanism for all layers, or swaps for some. All layers share their weights, so the layers' own
            mechanisms must have the same ones.
        dtype: of parameters and computation.

    Returns:
        The model with its vocabulary.

    Raises:
        NotFetched: run `jattn fetch rxnmapper` first.
        ValueError: the file is damaged, or the mechanism does not fit.

    Source: Extraction of organic chemistry grammar from unsupervised learning of chemical reactions (Science Advances
    2021, doi 10.1126/sciadv.abe4166); ALBERT (arXiv 1909.11942).
    """
    paths = {key: packages.path("rxnmapper", key) for key in ("weights", "config", "vocabulary")}
    config = config_of(json.loads(paths["config"].read_text(encoding="utf-8")), dtype)
    vocabulary = {token: i for i, token in enumerate(paths["vocabulary"].read_text(encoding="utf-8").splitlines())}

    def build(rngs: nnx.Rngs) -> nnx.Module:
        return Encoder(config, attention=attention, rngs=rngs)

    model = fill(build, renamed(torch_pickle.read(paths["weights"]), config), new=new_in_attention)
    return RxnMapper(model, vocabulary)


def config_of(fields: Mapping[str, Any], dtype: Any = jnp.float32) -> TransformerConfig:
    """The configuration that a `config.json` of ALBERT describes.

    Raises:
        UnreadableFile: another architecture, or one whose layers do not all share their weights.
    """
    if fields.get("model_type") != "albert" or (fields["num_hidden_groups"], fields["inner_group_num"]) != (1, 1):
        raise UnreadableFile("a configuration of ALBERT with one group of one layer is needed")
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
        embedding_features=fields["embedding_size"],
        share_layers=True,
        use_bias=True,
        dtype=dtype,
        param_dtype=dtype,
    )


def renamed(tensors: MutableMapping[str, np.ndarray], config: TransformerConfig) -> dict[str, np.ndarray]:
    """The tensors of the checkpoint by the paths of `Encoder`; the given mapping is emptied.

    The pooler and the head that guessed hidden tokens in training are left out.

    Raises:
        UnreadableFile: a tensor is missing, or one is left over.
    """
    renaming = Renaming(tensors, config.num_heads)
    renaming.drop("albert.pooler.", "predictions.")
    tables = "albert.embeddings"
    types = renaming.take(f"{tables}.token_type_embeddings.weight")
    renaming.weights["embed.embedding"] = renaming.take(f"{tables}.word_embeddings.weight")
    renaming.weights["stack.learned.table.embedding"] = renaming.take(f"{tables}.position_embeddings.weight") + types[0]
    renaming.norm("stack.embedding_norm", f"{tables}.LayerNorm")
    renaming.linear("stack.embedding_projection", "albert.encoder.embedding_hidden_mapping_in")
    mine, theirs = "stack.blocks.0", "albert.encoder.albert_layer_groups.0.albert_layers.0"
    for name in ("query", "key", "value"):
        renaming.heads(f"{mine}.attention.{name}", f"{theirs}.attention.{name}")
    renaming.from_heads(f"{mine}.attention.out", f"{theirs}.attention.dense")
    renaming.norm(f"{mine}.attention_norm", f"{theirs}.attention.LayerNorm")
    renaming.linear(f"{mine}.mlp.up", f"{theirs}.ffn")
    renaming.linear(f"{mine}.mlp.down", f"{theirs}.ffn_output")
    renaming.norm(f"{mine}.mlp_norm", f"{theirs}.full_layer_layer_norm")
    return renaming.done()
