import itertools

import numpy as np
import pytest

from jattn.models.pretrained.atom_mapping import AtomMap, map_by_attention, numbered, read_reaction


def written(text):
    return "".join(read_reaction(text).tokens)


def test_agents_count_as_reactants():
    assert written("CCO>O.[Na+]>CC") == "CCO.O.[Na+]>>CC"
    assert written("CCO>>CC") == "CCO>>CC"


def test_groups_are_joined_where_their_first_member_stands():
    assert written("CC[O-].[Na+].BrCC.[Na+].[H-]>>CCOCC |f:0.1,3.4|") == "CC[O-]~[Na+].BrCC.[Na+]~[H-]>>CCOCC"
    assert written("C.[K+].O>[Cl-].N>F.[Br-].[Li+] |$;$,f:6.7|") == "C.[K+].O.[Cl-].N>>F.[Br-]~[Li+]"
    assert written("[K+].C.[Cl-]>>C |f:2.0|") == "C.[Cl-]~[K+]>>C"


def test_the_arrow_of_a_dative_bond_is_not_that_of_the_reaction():
    reaction = read_reaction("O=C[O-]->[K+]>>CO")
    assert reaction.tokens == ("O", "=", "C", "[O-]", "-", ">", "[K+]", ">>", "C", "O")
    assert [reaction.tokens[place] for place in reaction.reactant_tokens] == ["O", "C", "[O-]", "[K+]"]
    assert [reaction.tokens[place] for place in reaction.product_tokens] == ["C", "O"]


@pytest.mark.parametrize(
    "text",
    ["CCO", "CCO>CC", ">>C", "C>>", "C>>C>>C", "C>>C |f:0.1|", "C.C>>C |f:0.7|", "C>>C f:0", "C>>C(", "C >>C", ""],
)
def test_what_is_no_reaction_is_refused(text):
    with pytest.raises(ValueError, match=r"reaction|SMILES|group"):
        read_reaction(text)


def test_numbers_go_by_the_products_and_replace_others():
    text = numbered(read_reaction("c1cc[nH]c1.[13CH3:8]Cl.[O-]~[Na+]>>[13CH3]n1cccc1"), [5, 3, 2, 1, 0, 4])
    assert text == "[cH:5]1[cH:4][cH:3][nH:2][cH:6]1.[13CH3:1]Cl.[O-]~[Na+]>>[13CH3:1][n:2]1[cH:3][cH:4][cH:5][cH:6]1"
    # An atom that comes from nowhere has a number on its own side.
    assert numbered(read_reaction("C>>CO"), [0, -1]) == "[CH4:1]>>[CH3:1][OH:2]"


def by_loops(reaction, weights, factor):
    """The matching, atom by atom, with nothing but numbers."""
    ours, theirs = reaction.products.atoms, reaction.reactants.atoms
    p, r = reaction.product_tokens, reaction.reactant_tokens
    score = {
        (i, j): (weights[p[i], r[j]] + weights[r[j], p[i]]) * (ours[i].symbol == theirs[j].symbol)
        for i, j in itertools.product(range(len(ours)), range(len(theirs)))
    }
    mine, other = ({frozenset(b[:2]) for b in side.bonds} for side in (reaction.products, reaction.reactants))
    found = {}
    while True:
        free = [i for i in range(len(ours)) if i not in found]
        taken = {j for j, _ in found.values()}
        shares = {}
        for i in free:
            row = {j: score[i, j] for j in range(len(theirs)) if j not in taken}
            if sum(row.values()) > 0:
                shares |= {(i, j): value / sum(row.values()) for j, value in row.items()}
        if not shares:
            return found
        i, j = max(shares, key=shares.get)
        found[i] = j, shares[i, j]
        for a, b in score:
            if {a, i} in mine and {b, j} in other:
                score[a, b] *= factor


@pytest.mark.parametrize("factor", [1.0, 90.0])
@pytest.mark.parametrize("text", ["CC(C)O.BrCCN>>CC(C)OCCN", "CO.N>>COC", "C1CC1F.O>>OC1CC1.[F-]", "S>>CO"])
def test_matching_equals_that_by_loops(text, factor):
    reaction = read_reaction(text)
    weights = np.random.default_rng(0).random((len(reaction.tokens),) * 2)
    found = map_by_attention(reaction, weights, neighbor_factor=factor)
    wanted = by_loops(reaction, weights, factor)
    assert {i: j for i, (j, _) in found.pairs.items()} == {i: j for i, (j, _) in wanted.items()}
    np.testing.assert_allclose([c for _, c in found.pairs.values()], [wanted[i][1] for i in found.pairs], rtol=1e-12)
    assert np.isclose(found.confidence, np.prod([share for _, share in wanted.values()]), rtol=1e-12)


def test_no_atom_is_taken_twice_and_elements_stay():
    reaction = read_reaction("CCCO.CCN.ClCl>>CCNCCCO")
    found = map_by_attention(reaction, np.random.default_rng(1).random((len(reaction.tokens),) * 2))
    assert isinstance(found, AtomMap) and len(set(found.reactant_atoms.tolist())) == 7
    elements = [reaction.reactants.atoms[atom].symbol for atom in found.reactant_atoms]
    assert elements == [atom.symbol for atom in reaction.products.atoms]
    assert ((found.confidences > 0) & (found.confidences <= 1)).all()


def test_neighbors_follow_a_match():
    # One certain pair, everything else even: the chain is followed from there.
    reaction = read_reaction("CCCC.CCCO>>OCCC")
    weights = np.full((len(reaction.tokens),) * 2, 1.0)
    assert map_by_attention(reaction, weights).reactant_atoms.tolist() == [7, 6, 5, 4]
    assert map_by_attention(reaction, weights, neighbor_factor=1.0).reactant_atoms.tolist() == [7, 0, 1, 2]


def test_weights_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"weights must be \[5, 5\], got \[4, 4\]"):
        map_by_attention(read_reaction("CO>>OC"), np.ones((4, 4)))
