"""What a mechanism says about itself: the `Entry` that ends every mechanism file.

This module imports nothing of jattn, so that engines, layers, caches, probes and tasks can all end with an entry of
their own. `jattn.catalog` collects the entries, `jattn.testing` holds each one to what it declares.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

KINDS = (
    "primitive",
    "layer",
    "block",
    "mask",
    "score_mod",
    "position",
    "normalizer",
    "selector",
    "feature_map",
    "recurrence",
    "router",
    "cache",
    "reducer",
    "pooling",
    "probe",
    "intervention",
    "task",
    "recipe",
)
"""Everything a catalogue entry can be."""

PATTERNS = ("noncausal self", "causal self", "noncausal cross", "causal cross")
"""The four ways to attend, after the CAB benchmark (arXiv 2210.07661)."""

_FACTOR = re.compile(r"(?:(?P<constant>1)|(?P<log>log\(T\))|T(?:\^(?P<power>\d+(?:\.\d+)?))?)")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_ARXIV = re.compile(r"(?:\d{4}\.\d{4,5}|[a-z-]+(?:\.[A-Z]{2})?/\d{7})?")


def growth(expression: str, length: float) -> float:
    """Evaluate a declared growth such as `"T*log(T)"` at one sequence length.

    An expression is a product of the factors `1`, `T`, `T^p` and `log(T)`; constants do not matter, growth does.

    Args:
        expression: the growth as a string.
        length: the sequence length T, at least 1.

    Returns:
        The value of the expression, meaningful as a ratio between two lengths.

    Raises:
        ValueError: the expression is not such a product.

    Example:
        >>> growth("T^1.5", 16.0) / growth("T^1.5", 4.0)
        8.0
    """
    value = 1.0
    for factor in expression.replace(" ", "").split("*"):
        found = _FACTOR.fullmatch(factor)
        if found is None:
            raise ValueError(
                f"growth {expression!r} is not understood at {factor!r}: expected a product of 1, T, T^p and log(T), "
                "such as 'T*log(T)' or 'T^1.5'"
            )
        if found["log"]:
            value *= math.log(length)
        elif not found["constant"]:
            value *= length ** float(found["power"] or 1)
    return value


@dataclasses.dataclass(frozen=True)
class Paper:
    """A paper behind a mechanism.

    Args:
        title: the exact title, as the paper prints it.
        arxiv: the arXiv id (`"1706.03762"`), or "" for a paper that is not there.
        year: the year of first publication.

    Raises:
        ValueError: a field is not of the form above.

    Example:
        >>> Paper("Attention Is All You Need", "1706.03762", 2017).year
        2017
    """

    title: str
    arxiv: str
    year: int

    def __post_init__(self) -> None:
        """Check the fields, so that a typing slip is found where it was made."""
        if not isinstance(self.title, str) or not self.title.strip():
            raise ValueError(f"title must be a non-empty string, got {self.title!r}")
        if not isinstance(self.arxiv, str) or not _ARXIV.fullmatch(self.arxiv):
            raise ValueError(f"arxiv must be an id such as '1706.03762', or '', got {self.arxiv!r} for {self.title!r}")
        if not isinstance(self.year, int) or not 1900 <= self.year <= 2100:
            raise ValueError(f"year must be a year such as 2017, got {self.year!r} for {self.title!r}")


@dataclasses.dataclass(frozen=True)
class Cost:
    """How work and temporary memory of a forward pass grow with the sequence length T.

    Args:
        flops: growth of the floating-point work.
        memory: growth of the temporary memory.

    Raises:
        ValueError: an expression that `growth` does not understand.

    Example:
        >>> Cost(flops="T^2", memory="T")
        Cost(flops='T^2', memory='T')
    """

    flops: str
    memory: str

    def __post_init__(self) -> None:
        """Check that both expressions can be evaluated."""
        for field in ("flops", "memory"):
            if not isinstance(getattr(self, field), str):
                raise ValueError(f"{field} must be a string such as 'T*log(T)', got {getattr(self, field)!r}")
            growth(getattr(self, field), 2.0)


class LayerExample(NamedTuple):
    """A small instance of a layer and a small call of it.

    `rngs` may be left out of `ctor_kwargs`: whoever builds the layer adds its own.
    """

    ctor_args: tuple = ()
    ctor_kwargs: Mapping[str, Any] = {}
    call_args: tuple = ()
    call_kwargs: Mapping[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of the catalogue: what it is, where it comes from, what it promises.

    Args:
        name: canonical name, which is also the name of the file.
        kind: one of `KINDS`.
        family: the folder it stands in, such as `"softmax"` or `"sparse"`.
        function: the pure function (or constructor of a value), for everything that is not a layer.
        layer: the Flax NNX class; exactly one of `function` and `layer` is given.
        papers: the papers it serves; empty for a standard building block.
        patterns: the subset of `PATTERNS` it supports.
        cost: growth of work and temporary memory; None where it makes no sense (a mask, a task).
        decode: how to generate one token at a time; `""` or a text that starts with `"no"` means not at all, and why.
        example: `example(key, length) -> (args, kwargs)` of a small call of `function`, or a `LayerExample` for a
            `layer`; arrays drawn with numpy (`jattn.mechanisms.examples`) cost no compilation. It may take a keyword
            `query_length` when cross inputs cannot be had by shortening the query.
        fidelity: `"official code"`, `"paper"`, or `"inferred: which part"`.
        exempt: conformance checks that do not apply, each with its reason.

    Raises:
        ValueError: a field is not of the form above.

    Example:
        >>> Entry("identity", "primitive", "softmax", function=lambda query, key, value: value).kind
        'primitive'
    """

    name: str
    kind: str
    family: str
    function: Callable[..., Any] | None = None
    layer: type | None = None
    papers: tuple[Paper, ...] = ()
    patterns: tuple[str, ...] = ()
    cost: Cost | None = None
    decode: str = ""
    example: Callable[..., Any] | None = None
    fidelity: str = ""
    exempt: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Check every field, so that a bad entry fails where it is written and not where it is read."""
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ValueError(f"name must be an identifier such as 'softmax_attention', got {self.name!r}")
        if self.kind not in KINDS:
            raise self._bad("kind", f"one of {', '.join(KINDS)}")
        if not isinstance(self.family, str) or not _NAME.fullmatch(self.family):
            raise self._bad("family", "an identifier such as 'softmax'")
        if (self.function is None) == (self.layer is None):
            raise self._bad("function", f"exactly one of function and layer, with layer={self.layer!r}")
        if self.function is not None and not callable(self.function):
            raise self._bad("function", "a callable")
        if self.layer is not None and not isinstance(self.layer, type):
            raise self._bad("layer", "a class")
        if not isinstance(self.papers, tuple) or not all(isinstance(paper, Paper) for paper in self.papers):
            raise self._bad("papers", "a tuple of Paper(title, arxiv, year)")
        if (
            not isinstance(self.patterns, tuple)
            or len(set(self.patterns)) != len(self.patterns)
            or not set(self.patterns) <= set(PATTERNS)
        ):
            raise self._bad("patterns", f"a tuple with some of {PATTERNS}, each at most once")
        if self.cost is not None and not isinstance(self.cost, Cost):
            raise self._bad("cost", "a Cost(flops, memory) or None")
        if not isinstance(self.decode, str):
            raise self._bad("decode", "a string: how to decode, or 'no: ' and why not")
        if self.example is not None and not callable(self.example):
            raise self._bad("example", "a function example(key, length) -> (args, kwargs) or LayerExample")
        if not isinstance(self.fidelity, str):
            raise self._bad("fidelity", "a string such as 'official code', 'paper' or 'inferred: the scale'")
        if not isinstance(self.exempt, Mapping) or not all(
            isinstance(check, str) and isinstance(reason, str) and reason.strip()
            for check, reason in self.exempt.items()
        ):
            raise self._bad("exempt", "a mapping from the name of a check to the reason why it does not apply")

    def _bad(self, field: str, expected: str) -> ValueError:
        return ValueError(f"{field} of entry {self.name!r} must be {expected}; got {getattr(self, field)!r}")

    @property
    def target(self) -> Any:
        """The function or the layer class, whichever the entry has."""
        return self.function if self.function is not None else self.layer
