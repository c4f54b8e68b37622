"""Which atom of the reactants becomes which atom of the products: reactions, and how attention is read as a map.

With A the weights of one head over the tokens of a reaction, p an atom of the products and r one of the reactants,

    W[p, r] = (A[p, r] + A[r, p]) [same element] B[p, r],   B = 1 at first,   C[p, r] = W[p, r] / sum_r' W[p, r'],

atoms are matched one pair at a time, the pair of the largest C first. Its C is the confidence of the match; a matched
pair leaves the rest, and for all neighbors p' of p and r' of r, B[p', r'] is multiplied by 90: atoms that are bound to
each other usually stay so.

Source: Extraction of organic chemistry grammar from unsupervised learning of chemical reactions (Science Advances 2021,
doi 10.1126/sciadv.abe4166).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from jattn.models.pretrained.smiles import Molecules, parse, tokenize

ARROW = ">>"
NEIGHBOR_FACTOR = 90.0
NO_ATOM = -1


@dataclasses.dataclass(frozen=True)
class Reaction:
    """A reaction, as it is written.

    Args:
        tokens: of the line `reactants>>products`.
        reactants: their graph; agents count as reactants.
        products: their graph.

    Example:
        >>> read_reaction("CCO.CBr>>CCOC").products.atoms[2].symbol
        'O'
    """

    tokens: tuple[str, ...]
    reactants: Molecules
    products: Molecules

    @property
    def reactant_tokens(self) -> np.ndarray:
        """Where the atoms of the reactants stand among the tokens."""
        return np.array([atom.token for atom in self.reactants.atoms], int)

    @property
    def product_tokens(self) -> np.ndarray:
        """Where the atoms of the products stand among the tokens."""
        first = self.tokens.index(ARROW) + 1
        return np.array([first + atom.token for atom in self.products.atoms], int)


def read_reaction(text: str) -> Reaction:
    """Read reaction SMILES.

    Args:
        text: `reactants>>products` or `reactants>agents>products`; ions that belong together may be joined by `~`, or
            named after the line as in `|f:0.1|`, the molecules counted from 0 over the whole line.

    Returns:
        The reaction, groups joined by `~`; the order of molecules and atoms is that of the text.

    Raises:
        ValueError: it is no reaction, or cannot be read as SMILES.

    Example:
        >>> "".join(read_reaction("CCO.[Na+].[H-]>O>CC |f:1.2|").tokens)
        'CCO.[Na+]~[H-].O>>CC'
    """
    line, _, extension = text.strip().partition(" ")
    # The head of a dative bond is no part of the reaction's arrow.
    sides = re.split(r"(?<!-)>", line)
    if len(sides) != 3 or not sides[0] or not sides[2]:
        raise ValueError(f"a reaction is reactants>>products or reactants>agents>products, got {text!r}")
    reactants, agents, products = _joined([side.split(".") if side else [] for side in sides], _groups(extension, text))
    halves = [tokenize(".".join(half)) for half in (reactants + agents, products)]
    return Reaction((*halves[0], ARROW, *halves[1]), parse(halves[0]), parse(halves[1]))


def _groups(extension: str, text: str) -> list[list[int]]:
    """The groups of molecules that an extension names; what else it says does not matter here."""
    if not extension:
        return []
    if not re.fullmatch(r"\|[^|]*\|", extension):
        raise ValueError(f"after the reaction only an extension such as |f:0.1| may come, got {text!r}")
    found = re.search(r"(?:^|,)f:([0-9.]+(?:,[0-9.]+)*)", extension.strip("|"))
    return [[int(number) for number in group.split(".") if number] for group in found[1].split(",")] if found else []


def _joined(sides: list[list[str]], groups: list[list[int]]) -> list[list[str]]:
    """The molecules of each side, the members of a group joined where its first one stands."""
    places = [(side, place) for side, molecules in enumerate(sides) for place in range(len(molecules))]
    left: list[list[str | None]] = [list(molecules) for molecules in sides]
    for group in groups:
        if not group or max(group) >= len(places) or len({places[number][0] for number in group}) > 1:
            raise ValueError(f"the group {group} names molecules that are not there, or on two sides of the arrow")
        side, first = places[group[0]]
        members = [sides[side][places[number][1]] for number in group]
        for number in group:
            left[side][places[number][1]] = None
        left[side][first] = "~".join(members)
    return [[molecule for molecule in side if molecule is not None] for side in left]


@dataclasses.dataclass(frozen=True)
class AtomMap:
    """What was matched.

    Args:
        reactant_atoms: `[P]`, for each atom of the products the atom of the reactants, both counted from 0 in the order
            in which they are written; -1 for none.
        confidences: `[P]`, of each match, in (0, 1]; 1 where there is none.
        reaction: the reaction with numbers: 1 .. P for the atoms of the products, in order, and the same number for the
            atom of the reactants that becomes it.

    Example:
        >>> AtomMap(np.array([1, 0]), np.array([0.5, 0.5]), "[CH3:2][OH:1]>>[OH:1][CH3:2]").confidence
        0.25
    """

    reactant_atoms: np.ndarray
    confidences: np.ndarray
    reaction: str

    @property
    def confidence(self) -> float:
        """Of the whole map: the product of those of its matches."""
        return float(np.prod(self.confidences))

    @property
    def pairs(self) -> dict[int, tuple[int, float]]:
        """The atom of the reactants and the confidence, by atom of the products."""
        matches = zip(self.reactant_atoms.tolist(), self.confidences.tolist(), strict=True)
        return {atom: match for atom, match in enumerate(matches) if match[0] != NO_ATOM}


def map_by_attention(reaction: Reaction, weights: np.ndarray, *, neighbor_factor: float = NEIGHBOR_FACTOR) -> AtomMap:
    """Match atoms by the weights of an attention head.

    Args:
        reaction: T tokens.
        weights: `[T, T]`, those of the tokens, without what stands before and after them.
        neighbor_factor: by which a match raises the weights between the neighbors of its atoms.

    Returns:
        The map; two atoms of the products never come from the same atom.

    Raises:
        ValueError: weights of another shape.

    Example:
        >>> reaction = read_reaction("CO>>OC")
        >>> map_by_attention(reaction, np.ones((5, 5))).reactant_atoms.tolist()
        [1, 0]
    """
    if weights.shape != (len(reaction.tokens),) * 2:
        raise ValueError(f"weights must be [{len(reaction.tokens)}, {len(reaction.tokens)}], got {list(weights.shape)}")
    ours, theirs = reaction.product_tokens, reaction.reactant_tokens
    elements, their_elements = (
        np.array([atom.symbol for atom in side.atoms]) for side in (reaction.products, reaction.reactants)
    )
    bound, their_bound = reaction.products.adjacency(), reaction.reactants.adjacency()
    both_ways = weights[np.ix_(ours, theirs)] + weights[np.ix_(theirs, ours)].T
    alike = both_ways * (elements[:, None] == their_elements)
    boost = np.ones(alike.shape)
    found, confidences = np.full(len(ours), NO_ATOM), np.ones(len(ours))
    for _ in range(len(ours)):
        likely = alike * boost
        total = likely.sum(axis=1, keepdims=True)
        shares = np.divide(likely, total, out=np.zeros_like(likely), where=total > 0)
        one, other = np.unravel_index(shares.argmax(), shares.shape)
        if not shares[one, other] > 0:
            break
        found[one], confidences[one] = other, shares[one, other]
        boost[np.ix_(bound[one], their_bound[other])] *= neighbor_factor
        boost[one], boost[:, other] = 0.0, 0.0
    return AtomMap(found, confidences, numbered(reaction, found))


def numbered(reaction: Reaction, reactant_atoms: Sequence[int] | np.ndarray) -> str:
    """Write a reaction with the numbers of a map.

    Args:
        reaction: without numbers, or with others, which are replaced.
        reactant_atoms: `[P]`, for each atom of the products the one of the reactants, or -1.

    Returns:
        The reaction in its own order, numbered atoms in brackets.

    Example:
        >>> numbered(read_reaction("CCBr.O>>CCO"), [0, 1, 3])
        '[CH3:1][CH2:2]Br.[OH2:3]>>[CH3:1][CH2:2][OH:3]'
    """
    tokens = list(reaction.tokens)
    product_of = {int(atom): product for product, atom in enumerate(reactant_atoms)}
    sides = (reaction.reactants, reaction.reactant_tokens), (reaction.products, reaction.product_tokens)
    for side, (molecules, places) in enumerate(sides):
        for index, (atom, place) in enumerate(zip(molecules.atoms, places, strict=True)):
            number = 1 + (index if side else product_of.get(index, NO_ATOM))
            tokens[place] = _with_number(tokens[place], atom.hydrogens, number)
    return "".join(tokens)


def _with_number(token: str, hydrogens: int, number: int) -> str:
    if token[0] == "[":
        token = re.sub(r":[0-9]+\]$", "]", token)
    elif number:
        token = f"[{token}{'H' if hydrogens else ''}{hydrogens if hydrogens > 1 else ''}]"
    return f"{token[:-1]}:{number}]" if number else token
