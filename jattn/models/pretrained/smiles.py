"""SMILES: molecules as lines of text, read into graphs of atoms and bonds.

An atom is written by its symbol, in brackets with isotope, hydrogens, charge and number where they are not the usual
ones; a bond leads to the atom before it, or before the parentheses that have been closed since; equal digits close a
ring; a dot begins the next molecule. Two signs go beyond the specification: `->` for dative bonds, and `~` between
ions that belong together. Stereochemistry is not read, and nothing is put into a canonical order.

Source: OpenSMILES specification (http://opensmiles.org/opensmiles.html).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

_TOKEN = re.compile(r"\[[^\]]+\]|%[0-9]{2}|Br|Cl|>>|[BCFINOPSbcnops*0-9.~()=#$:/\\>-]")
_BRACKET = re.compile(
    r"\[(?P<isotope>[0-9]+)?(?P<symbol>[A-Z][a-z]?|[a-z][a-z]?|\*)(?:@@?|@(?:TH|AL|SP|TB|OH)[0-9]+)?"
    r"(?P<hydrogens>H[0-9]*)?(?P<charge>\++[0-9]*|-+[0-9]*)?(?::(?P<number>[0-9]+))?\]"
)
_BONDS = {"-": 1, "/": 1, "\\": 1, "=": 2, "#": 3, "$": 4, ":": 1, "~": 0, "->": 0}
_VALENCES = {
    "B": (3,),
    "C": (4,),
    "N": (3, 5),
    "O": (2,),
    "P": (3, 5),
    "S": (2, 4, 6),
    "F": (1,),
    "Cl": (1,),
    "Br": (1,),
    "I": (1,),
}


def tokenize(text: str) -> list[str]:
    """Split SMILES, or a reaction of them, into atoms, bonds, ring digits, parentheses, dots and arrows.

    Args:
        text: without blanks.

    Returns:
        Tokens, which joined are the text.

    Raises:
        ValueError: a character that SMILES does not have, at the place that the message names.

    Example:
        >>> tokenize("[nH]1cccc1CCl")
        ['[nH]', '1', 'c', 'c', 'c', 'c', '1', 'C', 'Cl']
    """
    tokens, place = [], 0
    while place < len(text):
        found = _TOKEN.match(text, place)
        if found is None:
            raise ValueError(f"no SMILES: {text[place]!r} at character {place + 1} of {text!r}")
        tokens.append(found.group())
        place = found.end()
    return tokens


@dataclasses.dataclass(frozen=True)
class Atom:
    """An atom of a molecule.

    Args:
        symbol: of its element; `"*"` for a place that any atom may take.
        is_aromatic: whether it was written in lower case.
        hydrogens: that are bound to it, those included that SMILES leaves out.
        charge: in units of the elementary charge.
        isotope: its mass number; 0 for the natural mixture.
        number: by which reactions say that two atoms are the same; 0 for none.
        token: where it stands among the tokens.

    Example:
        >>> parse(["[15NH4+:2]"]).atoms[0]
        Atom(symbol='N', is_aromatic=False, hydrogens=4, charge=1, isotope=15, number=2, token=0)
    """

    symbol: str
    is_aromatic: bool
    hydrogens: int
    charge: int
    isotope: int
    number: int
    token: int


@dataclasses.dataclass(frozen=True)
class Molecules:
    """A graph of one molecule or several.

    Args:
        atoms: in the order in which they are written.
        bonds: (atom, atom, order), the earlier atom first; order 0 for bonds that count no electrons of the later one.
    """

    atoms: tuple[Atom, ...]
    bonds: tuple[tuple[int, int, int], ...]

    def adjacency(self) -> np.ndarray:
        """Which atoms are bound to which: boolean, `[A, A]`, symmetric.

        Example:
            >>> parse(tokenize("CO.C")).adjacency().astype(int).tolist()
            [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
        """
        adjacent = np.zeros((len(self.atoms),) * 2, bool)
        for one, other, _ in self.bonds:
            adjacent[one, other] = adjacent[other, one] = True
        return adjacent


def is_atom(token: str) -> bool:
    """Whether a token of `tokenize` is an atom.

    Example:
        >>> [is_atom(token) for token in ("C", "[Na+]", "*", "=", "1")]
        [True, True, True, False, False]
    """
    return token[0].isalpha() or token[0] in "[*"


def parse(tokens: Sequence[str]) -> Molecules:
    """Read the graph that tokens describe.

    Args:
        tokens: of `tokenize`, without arrows of reactions.

    Returns:
        The graph, with hydrogens that are left out counted by the valences of the specification.

    Raises:
        ValueError: parentheses or rings that are not closed, a bond to nothing, or an atom that cannot be read.

    Example:
        >>> [atom.hydrogens for atom in parse(tokenize("c1ccc(O)cc1")).atoms]
        [1, 1, 1, 0, 1, 1, 1]
    """
    return _Reading(tokens).molecules()


class _Reading:
    """How far the reading of tokens has come: the atom that the next one is bound to, and what is still open."""

    def __init__(self, tokens: Sequence[str]):
        self.tokens = tokens
        self.atoms: list[Atom] = []
        self.bonds: list[tuple[int, int, int]] = []
        self.previous: int | None = None
        self.bond = ""
        self.branches: list[int] = []
        self.rings: dict[int, tuple[int, str]] = {}
        for place, token in enumerate(tokens):
            self.read(place, token)
        if self.branches or self.rings or self.bond:
            raise self.error("a parenthesis, a ring or a bond is left open")

    def error(self, what: str) -> ValueError:
        return ValueError(f"no SMILES: {what} in {''.join(self.tokens)!r}")

    def read(self, place: int, token: str) -> None:
        if is_atom(token):
            self.atoms.append(_atom(place, token))
            if self.previous is not None:
                self.bind(self.previous, len(self.atoms) - 1, self.bond)
            elif self.bond:
                raise self.error(f"a bond {self.bond!r} without an atom before it")
            self.previous, self.bond = len(self.atoms) - 1, ""
        elif token == "." and not self.bond:
            self.previous = None
        elif self.previous is None:
            raise self.error(f"{token!r} without an atom before it")
        elif token == "(" and not self.bond:
            self.branches.append(self.previous)
        elif token == ")" and not self.bond and self.branches:
            self.previous = self.branches.pop()
        elif self.bond + token in _BONDS:
            self.bond += token
        elif token.lstrip("%").isdigit():
            self.close_ring(int(token.lstrip("%")))
        else:
            raise self.error(f"{token!r} after {self.bond!r}" if self.bond else f"{token!r} out of place")

    def close_ring(self, label: int) -> None:
        assert self.previous is not None
        if label in self.rings:
            other, bond = self.rings.pop(label)
            if other == self.previous or (bond and self.bond and _BONDS[bond] != _BONDS[self.bond]):
                raise self.error(f"the ring {label} cannot be closed")
            self.bind(other, self.previous, bond or self.bond)
        else:
            self.rings[label] = (self.previous, self.bond)
        self.bond = ""

    def bind(self, one: int, other: int, bond: str) -> None:
        self.bonds.append((one, other, _BONDS[bond] if bond else 1))

    def molecules(self) -> Molecules:
        electrons = [0] * len(self.atoms)
        for one, other, order in self.bonds:
            electrons[one] += order
            electrons[other] += order
        atoms = [
            atom if self.tokens[atom.token][0] == "[" else dataclasses.replace(atom, hydrogens=_left_out(atom, bound))
            for atom, bound in zip(self.atoms, electrons, strict=True)
        ]
        return Molecules(tuple(atoms), tuple(self.bonds))


def _atom(place: int, token: str) -> Atom:
    if token[0] != "[":
        return Atom(token.capitalize(), token.islower(), 0, 0, 0, 0, place)
    found = _BRACKET.fullmatch(token)
    if found is None:
        raise ValueError(f"no SMILES: {token!r} is no atom")
    symbol, hydrogens, charge = found["symbol"], found["hydrogens"] or "", found["charge"] or ""
    digits = charge.strip("+-")
    amount = int(digits) if digits else len(charge)
    return Atom(
        symbol.capitalize(),
        symbol.islower(),
        int(hydrogens[1:] or 1) if hydrogens else 0,
        -amount if charge.startswith("-") else amount,
        int(found["isotope"] or 0),
        int(found["number"] or 0),
        place,
    )


def _left_out(atom: Atom, bound: int) -> int:
    """Hydrogens up to the next usual valence; an aromatic atom gives one electron more to its ring."""
    valences = _VALENCES.get(atom.symbol, (0,))
    if atom.is_aromatic:
        return max(0, valences[0] - bound - 1)
    return next((valence - bound for valence in valences if valence >= bound), 0)
