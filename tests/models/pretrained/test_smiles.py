import numpy as np
import pytest

from jattn.models.pretrained import smiles

TOKENS = {
    "CC(=O)Oc1ccccc1": ["C", "C", "(", "=", "O", ")", "O", "c", "1", "c", "c", "c", "c", "c", "1"],
    "[13CH3][C@@H](Br)Cl": ["[13CH3]", "[C@@H]", "(", "Br", ")", "Cl"],
    "C%12CC%12": ["C", "%12", "C", "C", "%12"],
    "O->[K+]>>[Na+]~[O-].B": ["O", "-", ">", "[K+]", ">>", "[Na+]", "~", "[O-]", ".", "B"],
}


@pytest.mark.parametrize("text", TOKENS)
def test_tokens(text):
    assert smiles.tokenize(text) == TOKENS[text]


@pytest.mark.parametrize("text", ["C C", "CX", "[C", "C]", "Ce", "é"])
def test_characters_that_smiles_lacks_are_named(text):
    with pytest.raises(ValueError, match="at character"):
        smiles.tokenize(text)


def graph(text):
    return smiles.parse(smiles.tokenize(text))


# Bonds by hand, atoms counted from 0 in the order of the text.
BONDS = {
    "CCO": [(0, 1), (1, 2)],
    "CC(C)(C)O": [(0, 1), (1, 2), (1, 3), (1, 4)],
    "C(C(C)C)C": [(0, 1), (1, 2), (1, 3), (0, 4)],
    "c1cc1": [(0, 1), (1, 2), (0, 2)],
    "C12CC1C2": [(0, 1), (1, 2), (0, 2), (2, 3), (0, 3)],
    "C1CC1C1CC1": [(0, 1), (1, 2), (0, 2), (2, 3), (3, 4), (4, 5), (3, 5)],
    "C=1CC%01": [(0, 1), (1, 2), (0, 2)],
    "C1.C1": [(0, 1)],
    "CC.O": [(0, 1)],
    "[O-]->[K+]": [(0, 1)],
    "[O-]~[Na+]": [(0, 1)],
    "F/C=C\\F": [(0, 1), (1, 2), (2, 3)],
}


@pytest.mark.parametrize("text", BONDS)
def test_bonds(text):
    read = graph(text)
    assert sorted(bond[:2] for bond in read.bonds) == sorted(BONDS[text])
    wanted = np.zeros((len(read.atoms),) * 2, bool)
    for one, other in BONDS[text]:
        wanted[one, other] = wanted[other, one] = True
    np.testing.assert_array_equal(read.adjacency(), wanted)


# From chemistry: the hydrogens of each atom of methane, acetic acid, benzene, pyridine, pyrrole, thiophene, furan,
# N-methylpyrrole, pyridone, naphthalene, sulfuric acid, dimethyl sulfoxide, nitromethane (as pentavalent), phosphoric
# acid, borane, acetonitrile, and of fluorine with one bond too many.
HYDROGENS = {
    "C": [4],
    "CC(=O)O": [3, 0, 0, 1],
    "c1ccccc1": [1] * 6,
    "n1ccccc1": [0, 1, 1, 1, 1, 1],
    "[nH]1cccc1": [1] * 5,
    "s1cccc1": [0, 1, 1, 1, 1],
    "o1cccc1": [0, 1, 1, 1, 1],
    "Cn1cccc1": [3, 0, 1, 1, 1, 1],
    "O=c1cccc[nH]1": [0, 0, 1, 1, 1, 1, 1],
    "c1ccc2ccccc2c1": [1, 1, 1, 0, 1, 1, 1, 1, 0, 1],
    "OS(=O)(=O)O": [1, 0, 0, 0, 1],
    "CS(=O)C": [3, 0, 0, 3],
    "CN(=O)=O": [3, 0, 0, 0],
    "OP(=O)(O)O": [1, 0, 0, 1, 1],
    "B": [3],
    "CC#N": [3, 0, 0],
    "CFC": [3, 0, 3],
    "*C": [0, 3],
    "[CH2][C]": [2, 0],
    "[NH4+].[Cl-]": [4, 0],
    "C[C@H](N)[C@@H](O)[C@](F)(Cl)[SiH2][Co@OH12H2]": [3, 1, 2, 1, 1, 0, 0, 0, 2, 2],
    "[O-]->[K+]": [0, 0],
}


@pytest.mark.parametrize("text", HYDROGENS)
def test_hydrogens_that_are_left_out(text):
    assert [atom.hydrogens for atom in graph(text).atoms] == HYDROGENS[text]


def test_what_brackets_say():
    text = "[13CH3:7][C@H](F)[N+]([O-])(=O)[Fe+2][Cu++][S--][se][*:12]"
    said = [(a.symbol, a.is_aromatic, a.charge, a.isotope, a.number) for a in graph(text).atoms]
    assert said == [
        ("C", False, 0, 13, 7),
        ("C", False, 0, 0, 0),
        ("F", False, 0, 0, 0),
        ("N", False, 1, 0, 0),
        ("O", False, -1, 0, 0),
        ("O", False, 0, 0, 0),
        ("Fe", False, 2, 0, 0),
        ("Cu", False, 2, 0, 0),
        ("S", False, -2, 0, 0),
        ("Se", True, 0, 0, 0),
        ("*", False, 0, 0, 12),
    ]


def test_atoms_know_their_tokens():
    tokens = smiles.tokenize("C(=O)[O-].[Na+]")
    assert [tokens[atom.token] for atom in smiles.parse(tokens).atoms] == ["C", "O", "[O-]", "[Na+]"]


@pytest.mark.parametrize(
    "text",
    ["C(", "C)", "C1CC", "=C", "C=", "C==C", "C(=)C", "(C)", "1CC1", "C11", "C-1CC=1", "C.=C", "[Xx3]", "C>C", "C>>C"],
)
def test_what_is_no_molecule_is_refused(text):
    with pytest.raises(ValueError, match="no SMILES"):
        graph(text)


def test_any_text_is_read_or_refused():
    rng = np.random.default_rng(0)
    signs = ["C", "c", "N", "[O-]", "(", ")", "=", "-", ">", "1", "2", "%10", ".", "~", "[", "]", "Cl", "*", ":3"]
    texts = ["".join(rng.choice(signs, size=rng.integers(1, 9))) for _ in range(2000)]

    def is_read(text):
        try:
            return len(graph(text).atoms) > 0
        except ValueError:  # and nothing else
            return False

    assert 0 < sum(map(is_read, texts)) < len(texts)
