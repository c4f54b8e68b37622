"""rxnmapper by its own examples; needs `jattn fetch rxnmapper` (3 MB)."""

import ast
import json

import jax.numpy as jnp
import numpy as np
import pytest

from jattn.models.pretrained import packages, rxnmapper
from jattn.models.pretrained.atom_mapping import map_by_attention, read_reaction
from jattn.models.pretrained.readers import torch_pickle
from jattn.models.swap import Swap
from jattn.testing.tolerance import assert_within_policy
from tests.models.pretrained.plain import TRUTH, bert_layer, in_precision

EXAMPLE = "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F"
ATOMS = [0, 1, 2, 3, 15, 14, 13, 12, 11, 10, 9]

# The package puts reactions into RDKit's canonical form before it maps them, unless a test says otherwise. These are
# the ones that change by it, in that form: each molecule canonical, the molecules of a side sorted.
CANONICAL = {
    "C=CCN=C=S.CNCc1ccc(C#N)cc1.NNC(=O)c1cn2c(n1)CCCC2>>C=CCN1C(C2=CN3CCCCC3=N2)=NN=C1N(C)CC1=CC=C(C#N)C=C1": (
        "C=CCN=C=S.CNCc1ccc(C#N)cc1.NNC(=O)c1cn2c(n1)CCCC2>>C=CCn1c(-c2cn3c(n2)CCCC3)nnc1N(C)Cc1ccc(C#N)cc1"
    ),
    "CC[O-]~[Na+].BrCC.[Na+]~[H-]>>CCOCC": "CCBr.CC[O-]~[Na+].[H-]~[Na+]>>CCOCC",
    "CC[O-].[Na+].BrCC.[Na+].[H-]>>CCOCC |f:0.1,3.4|": "CCBr.CC[O-].[Na+].[H-].[Na+]>>CCOCC |f:1.2,3.4|",
    "CCOCC.[Na+]~[Br-]>>CC[O-]~[Na+].BrCC": "CCOCC.[Br-]~[Na+]>>CCBr.CC[O-]~[Na+]",
}


@pytest.fixture(scope="module")
def mapper(fetched):
    fetched("rxnmapper")
    return rxnmapper.load()


@pytest.fixture(scope="module")
def tensors(fetched):
    fetched("rxnmapper")
    return torch_pickle.read(packages.path("rxnmapper", "weights"))


def test_all_atoms_of_the_example(mapper):
    # Isopropanethiol takes the place of the fluorine beside the nitrogen.
    found = mapper.map_atoms(EXAMPLE, layer=10, head=5)
    assert found.reactant_atoms.tolist() == ATOMS
    assert len(found.pairs) == 11
    tokens, flags = mapper.encode(EXAMPLE)
    assert flags.sum() == 23 + 11 and mapper.vocabulary["[UNK]"] not in tokens
    assert tokens[0] == mapper.vocabulary["[CLS]"] and tokens[-1] == mapper.vocabulary["[SEP]"]


def expected_maps():
    """(reaction, numbered reaction, confidence) from the package's own test file, which is parsed and never run."""
    tree = ast.parse(packages.path("rxnmapper", "expected_maps").read_text(encoding="utf-8"))
    for function in tree.body:
        if isinstance(function, ast.FunctionDef):
            lists = {
                node.targets[0].id: ast.literal_eval(node.value)
                for node in function.body
                if isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Name)
                and isinstance(node.value, ast.List)
            }
            if {"rxns", "expected"} <= lists.keys():
                for reaction, wanted in zip(lists["rxns"], lists["expected"], strict=True):
                    yield reaction, wanted["mapped_rxn"], wanted["confidence"]


def shape_of(text):
    """What a numbered reaction says, whatever the order in which its molecules and atoms are written.

    For each side the sorted descriptions of its atoms: element, isotope, charge, hydrogens, number, and, three rounds
    deep, the same of the atoms that are bound to them and the orders of the bonds.
    """
    sides = []
    for side in (read_reaction(text).reactants, read_reaction(text).products):
        said = [str((a.symbol, a.is_aromatic, a.isotope, a.charge, a.hydrogens, a.number)) for a in side.atoms]
        for _ in range(3):
            around = [[] for _ in said]
            for one, other, order in side.bonds:
                around[one].append(f"{order} {said[other]}")
                around[other].append(f"{order} {said[one]}")
            said = [f"{own} [{', '.join(sorted(near))}]" for own, near in zip(said, around, strict=True)]
        sides.append(sorted(said))
    return sides


@pytest.mark.slow
def test_the_reactions_of_its_own_test_file(mapper):
    seen = 0
    for reaction, wanted, confidence in expected_maps():
        found = mapper.map_atoms(CANONICAL.get(reaction, reaction))
        assert shape_of(found.reaction) == shape_of(wanted), reaction
        # Its file compares with numpy.isclose, which allows 1e-5 of the value.
        assert np.isclose(found.confidence, confidence), reaction
        seen += 1
    assert seen == 10


def test_a_reaction_that_is_too_long(mapper):
    with pytest.raises(ValueError, match="has 1008 tokens; the model takes at most 512"):
        mapper.map_atoms("C=C" + "[C+][C-]" * 500 + ">>CC")


def test_what_cannot_be_mapped_is_refused(mapper):
    with pytest.raises(ValueError, match="numbers already"):
        mapper.map_atoms("[CH4:1]>>C")
    with pytest.raises(ValueError, match="layer must be below 12 and head below 8, got 12 and 5"):
        mapper.map_atoms("C>>C", layer=12)


def without_head(head):
    """Zeros for what one head, or none, gives in all layers."""
    mask = np.arange(8) == head
    return {"head_out": (mask[:, None], np.zeros((1, 1), np.float32))}


def test_head_5_is_the_one_that_maps(mapper):
    read = read_reaction(EXAMPLE)
    tokens, _ = mapper.encode(EXAMPLE)
    weights = np.asarray(rxnmapper.attention_weights(mapper.model, tokens[None], {})[10, 0], np.float64)
    maps = [map_by_attention(read, head[1:-1, 1:-1]) for head in weights]
    right = [int((found.reactant_atoms == maps[5].reactant_atoms).sum()) for found in maps]
    confidences = [found.confidence for found in maps]
    assert right[5] == 11 and confidences[5] > 0.95
    # Head 2 sees the same atoms, without being sure of them; the six others do not map.
    assert max(confidences[:5] + confidences[6:]) < 0.35
    assert max(right[:2] + right[3:5] + right[6:]) <= 4
    even = map_by_attention(read, np.ones((len(read.tokens),) * 2))
    assert (even.reactant_atoms == maps[5].reactant_atoms).sum() < 11


def test_ablating_a_head(mapper):
    """The weights of layer 10 are made from what the layers before have said: of all heads they need head 5 most."""
    untouched, *ablated = (mapper.map_atoms(EXAMPLE, replace=without_head(head)).confidence for head in range(-1, 8))
    assert np.isclose(untouched, mapper.map_atoms(EXAMPLE).confidence, rtol=1e-5)
    assert min(ablated) == ablated[5] < 0.8 * untouched
    everything = {"head_out": (np.ones((1, 1), bool), np.zeros((1, 1), np.float32))}
    destroyed = mapper.map_atoms(EXAMPLE, replace=everything)
    assert destroyed.reactant_atoms.tolist() != ATOMS and destroyed.confidence < 0.2 * untouched


@pytest.mark.slow
def test_swapped_attention_changes_the_map(mapper):
    whole = mapper.map_atoms(EXAMPLE).confidence
    for swap in (Swap("linear_attention", layers=[3]), Swap("linear_attention", layers=[3], heads=[5])):
        changed = rxnmapper.load(attention=swap).map_atoms(EXAMPLE)
        assert changed.confidence < whole - 0.004, swap
    # What comes after the layer whose weights are read does not matter.
    after = rxnmapper.load(attention=Swap("linear_attention", layers=[11])).map_atoms(EXAMPLE)
    assert np.isclose(after.confidence, whole, rtol=1e-5)


def plain_states(plain, tensors, tokens):
    """The stream after each layer, and the weights of each, from the tensors as the checkpoint names them."""
    config = json.loads(packages.path("rxnmapper", "config").read_text(encoding="utf-8"))
    epsilon = config["layer_norm_eps"]
    tables = "albert.embeddings"
    x = plain.array(tensors[f"{tables}.word_embeddings.weight"])[tokens]
    x = x + plain.array(tensors[f"{tables}.position_embeddings.weight"])[: len(tokens)]
    x = x + plain.array(tensors[f"{tables}.token_type_embeddings.weight"])[0]
    x = plain.norm(x, tensors[f"{tables}.LayerNorm.weight"], tensors[f"{tables}.LayerNorm.bias"], epsilon)
    into = "albert.encoder.embedding_hidden_mapping_in"
    x = plain.linear(x, tensors[f"{into}.weight"], tensors[f"{into}.bias"])
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    parts = ("attention.query", "attention.key", "attention.value", "attention.dense", "attention.LayerNorm")
    names = [f"{layer}.{part}" for part in (*parts, "ffn", "ffn_output", "full_layer_layer_norm")]
    stream, weights = [], []
    for _ in range(config["num_hidden_layers"]):
        seen, x = bert_layer(plain, x, tensors, names, config["num_attention_heads"], epsilon)
        stream.append(np.asarray(x, np.float64))
        weights.append(np.asarray(seen, np.float64))
    return np.stack(stream), np.stack(weights)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_all_layers_against_float64(mapper, tensors, dtype):
    mapper = mapper if dtype == jnp.float32 else rxnmapper.load(dtype=dtype)
    tokens, _ = mapper.encode(EXAMPLE)
    states, aux = mapper.model.states(tokens[None], record=("resid",))
    truth, true_weights = plain_states(TRUTH, tensors, tokens)
    plain, plain_weights = plain_states(in_precision(dtype), tensors, tokens)
    assert states.dtype == dtype
    assert_within_policy(aux["sites"]["resid"][:, 0], truth, plain, what="stream")
    assert_within_policy(states[0], truth[-1], plain[-1], what="states")
    weights = rxnmapper.attention_weights(mapper.model, tokens[None], {})
    assert_within_policy(weights[:, 0], true_weights, plain_weights, dtype=dtype, what="weights")
    assert mapper.map_atoms(EXAMPLE).reactant_atoms.tolist() == ATOMS


def test_padding_does_not_matter(mapper):
    tokens, _ = mapper.encode(EXAMPLE)
    padded = np.zeros((2, 80), np.int32)
    segments = np.full((2, 80), -1)
    padded[:, : len(tokens)], segments[:, : len(tokens)] = tokens, 0
    padded[1, len(tokens) :] = 17
    alone, _ = mapper.model.states(tokens[None])
    among, _ = mapper.model.states(padded, segment_ids=segments)
    for row in among[:, : len(tokens)]:
        np.testing.assert_allclose(row, alone[0], atol=1e-4)


def test_a_checkpoint_that_lacks_or_has_more(mapper, tensors):
    config = mapper.model.config
    short = {name: array for name, array in tensors.items() if not name.endswith("ffn.bias")}
    with pytest.raises(ValueError, match=r"lacks the tensor .*ffn\.bias"):
        rxnmapper.renamed(short, config)
    with pytest.raises(ValueError, match="1 tensors that this model lacks: albert.more"):
        rxnmapper.renamed({**tensors, "albert.more": np.zeros(3)}, config)
    with pytest.raises(ValueError, match="ALBERT"):
        rxnmapper.config_of({"model_type": "bert"})
