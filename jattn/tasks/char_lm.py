r"""Character language modelling on text that ships with Python itself: no download, real prose, real code.

- `prose`: the language reference topics of `pydoc_data.topics`, about 465,000 characters of English.
- `code`: the source of the standard library without its tests, about 13 million characters.

Everything is deterministic on one Python installation. The text, and with it the vocabulary, changes a little from one
version of Python to the next, so figures compare within one version; results should name it.

The text is cut once, without shuffling: the first 90 % are `"train"`, the next 5 % `"valid"`, the last 5 % `"test"`.
The vocabulary is taken from the training text alone; characters that it holds fewer than `min_count` times, or not at
all, share the token 0, "rare". Evaluation cuts its text into windows that follow one another, so every character but
the first is predicted once, from at most `seq_len` characters of its own window. (A character at the start of a window
has little context: figures are a little higher than with a sliding window, for all models alike.)
"""

import abc
import dataclasses
import functools
import importlib
import math
import pathlib
import sysconfig
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from jattn.mechanisms.entry import Entry
from jattn.tasks import base

RARE = 0
"""The token of all rare characters."""


def prose_text() -> str:
    """The topics of Python's language reference, in the order of their names.

    Raises:
        ValueError: this Python comes without `pydoc_data`.

    Example:
        >>> len(prose_text()) > 300_000
        True
    """
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise ValueError("task 'prose' reads pydoc_data.topics, which this Python installation lacks") from error
    return "\n".join(topics[name] for name in sorted(topics))


def code_text() -> str:
    """The source files of the standard library, without tests and without machine-made configuration, in path order.

    Raises:
        ValueError: this Python comes without its sources.

    Example:
        >>> "import" in code_text()
        True
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    files = {
        path.relative_to(root).as_posix(): path
        for path in root.rglob("*.py")
        if not left_out & set(path.relative_to(root).parts) and not path.name.startswith("_sysconfigdata")
    }
    text = "\n".join(files[name].read_text(encoding="utf-8", errors="replace") for name in sorted(files))
    if len(text) < 100_000:
        raise ValueError(f"task 'code' reads the standard library's sources, but {root} holds {len(text)} characters")
    return text


class Corpus(NamedTuple):
    """A text as tokens: three pieces in a row, and the characters that the tokens from 1 on stand for."""

    splits: dict[str, np.ndarray]
    characters: str

    def encode(self, text: str) -> np.ndarray:
        """Tokens of a text.

        Example:
            >>> tokenize("aabb" * 10, 2).encode("abz").tolist()
            [1, 2, 0]
        """
        return _lookup(text, self.characters)

    def decode(self, tokens: Any) -> str:
        """The text of tokens, with U+FFFD for the rare ones.

        Example:
            >>> tokenize("aabb" * 10, 2).decode([2, 1, 0])
            'ba\ufffd'
        """
        letters = "\ufffd" + self.characters
        return "".join(letters[int(token)] for token in np.asarray(tokens).ravel())


def tokenize(text: str, min_count: int) -> Corpus:
    """Cut a text into splits and give every character a number.

    Args:
        text: the whole text.
        min_count: how often the training text must hold a character for it to have a token of its own.

    Returns:
        The corpus; tokens are ordered by code point.

    Example:
        >>> corpus = tokenize("hello " * 100, min_count=5)
        >>> corpus.characters, {name: len(tokens) for name, tokens in corpus.splits.items()}
        (' ehlo', {'train': 540, 'valid': 30, 'test': 30})
    """
    first, second = len(text) * 90 // 100, len(text) * 95 // 100
    pieces = {"train": text[:first], "valid": text[first:second], "test": text[second:]}
    points, counts = np.unique(_code_points(pieces["train"]), return_counts=True)
    characters = "".join(map(chr, points[counts >= min_count]))
    return Corpus({name: _lookup(piece, characters) for name, piece in pieces.items()}, characters)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _lookup(text: str, characters: str) -> np.ndarray:
    points, known = _code_points(text), _code_points(characters)
    if not len(known):
        return np.full(len(points), RARE, np.int32)
    place = np.minimum(np.searchsorted(known, points), len(known) - 1)
    return np.where(known[place] == points, place + 1, RARE).astype(np.int32)


@functools.lru_cache(maxsize=4)
def _corpus(task_class: "type[CharacterLM]", min_count: int) -> Corpus:
    corpus = tokenize(task_class.text(), min_count)
    for tokens in corpus.splits.values():
        tokens.setflags(write=False)
    return corpus


@dataclasses.dataclass(frozen=True, kw_only=True)
class CharacterLM(base.Task):
    r"""Predict the next character of a text; the primary metric is bits per character, $L / \ln 2$.

    Training batches are windows at random places. Rare characters count like any other: what is predicted there is that
    the character is rare. A subclass names itself and gives the text.

    Args:
        seq_len: characters a window, T.
        min_count: how often the training text must hold a character for it to have a token of its own.
        eval_characters: at most so many characters of the evaluation texts are used, from their beginning.
        seed: moves the training windows.

    Raises:
        ValueError: sizes that are not positive, or (once the text is read) longer than it.

    Example:
        >>> batch = Prose(seq_len=32).batch("train", step=0, size=2)
        >>> bool((batch["inputs"][:, 1:] == batch["targets"][:, :-1]).all())
        True
    """

    seq_len: int = 128
    min_count: int = 10
    eval_characters: int = 65536

    kind: ClassVar[str] = "lm"
    primary_metric: ClassVar[str] = "bits_per_character"
    higher_is_better: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check what needs no text."""
        super().__post_init__()
        for name in ("seq_len", "min_count", "eval_characters"):
            base.require_integer(name, getattr(self, name), 1)

    @staticmethod
    @abc.abstractmethod
    def text() -> str:
        """The whole text."""

    @property
    def corpus(self) -> Corpus:
        """The text as tokens; read when it is first needed and kept."""
        return _corpus(type(self), self.min_count)

    @property
    def length(self) -> int:
        """T."""
        return self.seq_len

    @property
    def num_classes(self) -> int:
        """Size of the vocabulary, with the rare token."""
        return len(self.corpus.characters) + 1

    @property
    def threshold(self) -> float:
        r"""The entropy of single characters, $-\sum_c p_c \log_2 p_c$ over the training text.

        A model that knows how often each character occurs, and nothing of its context, needs so many bits; only below
        that has it learned anything about sequences.
        """
        counts = np.bincount(self.corpus.splits["train"])
        shares = counts[counts > 0] / counts.sum()
        return float(-np.sum(shares * np.log2(shares)))

    def tokens(self, split: str) -> np.ndarray:
        """The tokens of a split, in the order of the text."""
        base.require_split(split)
        tokens = self.corpus.splits[split]
        if split != "train":
            tokens = tokens[: self.eval_characters]
        least = self.seq_len + 1 if split == "train" else 2
        if len(tokens) < least:
            raise ValueError(f"split {split!r} of {self.name!r} must hold {least} characters, it has {len(tokens)}")
        return tokens

    def num_examples(self, split: str) -> int | None:
        """Windows of an evaluation split; None for training, whose windows start anywhere."""
        base.require_split(split)
        return None if split == "train" else -(-(len(self.tokens(split)) - 1) // self.seq_len)

    def train_batch(self, rng: np.random.Generator, step: int, size: int) -> dict[str, np.ndarray]:
        """Windows at random places."""
        tokens = self.tokens("train")
        starts = rng.integers(0, len(tokens) - self.seq_len, size)
        windows = tokens[starts[:, None] + np.arange(self.seq_len + 1)]
        return {
            "inputs": windows[:, :-1].copy(),
            "targets": windows[:, 1:].copy(),
            "weights": np.ones((size, self.seq_len), np.float32),
        }

    def examples(self, split: str, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Windows that follow one another; the end of the last one has weight 0."""
        tokens = self.tokens(split)
        places = np.asarray(indices)[:, None] * self.seq_len + np.arange(self.seq_len)
        inside = places + 1 < len(tokens)
        last = len(tokens) - 1
        return {
            "inputs": tokens[np.minimum(places, last)],
            "targets": np.where(inside, tokens[np.minimum(places + 1, last)], RARE).astype(np.int32),
            "weights": inside.astype(np.float32),
        }

    def metrics(self, outputs: Any, batch: Mapping[str, Any]) -> dict[str, base.Mean]:
        """`bits_per_character` and `loss` (nats), means over all weighted characters."""
        weights = jnp.asarray(batch["weights"]).astype(jnp.float32)
        losses = base.cross_entropy(base.logits_of(outputs), batch["targets"])
        total = base.weighted_sum(losses, weights)
        return {
            "bits_per_character": base.Mean(total / math.log(2), weights.sum()),
            "loss": base.Mean(total, weights.sum()),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prose(CharacterLM):
    """Character language modelling on the English of Python's language reference; parameters as in `CharacterLM`.

    Example:
        >>> Prose(seq_len=64).primary_metric
        'bits_per_character'
    """

    name: ClassVar[str] = "prose"

    @staticmethod
    def text() -> str:
        """`prose_text`."""
        return prose_text()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Code(CharacterLM):
    """Character language modelling on the source of Python's standard library; parameters as in `CharacterLM`.

    Example:
        >>> Code(seq_len=64).length
        64
    """

    name: ClassVar[str] = "code"

    @staticmethod
    def text() -> str:
        """`code_text`."""
        return code_text()


def _example(key: Any, length: int) -> tuple[tuple, dict[str, Any]]:
    return (), {"seq_len": length}


TASKS: dict[str, type[CharacterLM]] = {"prose": Prose, "code": Code}

ENTRIES = tuple(
    Entry(name=name, kind="task", family="tasks", function=task, patterns=("causal self",), example=_example)
    for name, task in TASKS.items()
)
