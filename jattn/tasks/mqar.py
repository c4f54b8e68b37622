r"""Multi-query associative recall (MQAR): read key-value pairs once, then answer for every key.

A row of T tokens starts with P pairs `k_1 v_1 ... k_P v_P`. Behind them every key comes once more, at a distance that
favours small gaps, and at that position the model must say the key's value:

$$ x_{2P + 2 g_i} = k_i, \quad y_{2P + 2 g_i} = v_i, \quad p(g = n - 1) \propto a n^{a-1}, \quad 1 \le n \le T/2 - P $$

The gaps of a row are drawn one after the other without replacement, the first pair first. Attention solves the task at
any width; a model with a state of fixed size runs out of room as P grows.

Source: Zoology: Measuring and Improving Recall in Efficient Language Models, arXiv 2312.04927, and its published
generator (HazyResearch/zoology, `data/multiquery_ar.py`).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jattn.mechanisms.entry import Entry, Paper
from jattn.tasks import base

UNLABELED = -100
"""The label of a position that asks for nothing."""


def mqar(
    rng: np.random.Generator | int,
    num_examples: int,
    seq_len: int,
    vocab_size: int = 8192,
    num_kv_pairs: int = 8,
    power_a: float = 0.01,
    random_non_queries: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    r"""Draw rows of multi-query associative recall.

    $$ x_{2i} = k_i, \quad x_{2i+1} = v_i, \quad x_{2P + 2 g_i} = k_i, \quad y_{2P + 2 g_i} = v_i, \quad 0 \le i < P $$

    with distinct keys from `1 .. V/2 - 1`, distinct values from `V/2 .. V - 1`, and distinct gaps drawn one after the
    other with $p(g = n - 1) \propto a\,n^{a-1}$ over the slots that are still free. Every other token is filler.

    Args:
        rng: a NumPy generator, or the seed of one.
        num_examples: number of rows E.
        seq_len: length T of a row, even.
        vocab_size: V, above `seq_len`.
        num_kv_pairs: P, with `4 * num_kv_pairs <= seq_len`.
        power_a: a > 0; 0.01 puts most queries right behind the pairs, 1 spreads them evenly.
        random_non_queries: whether filler is drawn from `0 .. V - 1`, which may repeat a key or a value, or is 0.

    Returns:
        `(inputs, labels)`, both int32 `[E, T]`; labels are -100 except where a key is queried.

    Raises:
        ValueError: sizes that do not fit together.

    Example:
        >>> inputs, labels = mqar(0, 1, 8, vocab_size=16, num_kv_pairs=2, random_non_queries=False)
        >>> bool((labels[0, 4:8:2] >= 8).all())  # 4 P = T: every slot is a query
        True
        >>> check_mqar(inputs, labels, vocab_size=16, num_kv_pairs=2, random_non_queries=False)

    Source: Zoology: Measuring and Improving Recall in Efficient Language Models, arXiv 2312.04927; the published
    generator fixes the order of the draws.
    """
    _check_sizes(num_examples, seq_len, vocab_size, num_kv_pairs, power_a)
    rng = np.random.default_rng(rng)
    pairs, context = num_kv_pairs, 2 * num_kv_pairs
    keys = 1 + _distinct(rng, num_examples, vocab_size // 2 - 1, pairs)
    values = vocab_size // 2 + _distinct(rng, num_examples, vocab_size - vocab_size // 2, pairs)

    # The largest of log p + Gumbel noise, in decreasing order, are draws without replacement, each renormalized.
    slots = np.arange(1, (seq_len - context) // 2 + 1, dtype=np.float64)
    scores = (power_a - 1) * np.log(slots) + rng.gumbel(size=(num_examples, len(slots)))
    gaps = np.argsort(-scores, axis=1, kind="stable")[:, :pairs]

    inputs = np.zeros((num_examples, seq_len), np.int32)
    labels = np.full((num_examples, seq_len), UNLABELED, np.int32)
    inputs[:, 0:context:2] = keys
    inputs[:, 1:context:2] = values
    rows, positions = np.arange(num_examples)[:, None], context + 2 * gaps
    inputs[rows, positions] = keys
    labels[rows, positions] = values
    if random_non_queries:
        inputs = np.where(inputs == 0, rng.integers(0, vocab_size, inputs.shape, dtype=np.int32), inputs)
    return inputs, labels


def check_mqar(
    inputs: Any, labels: Any, *, vocab_size: int = 8192, num_kv_pairs: int = 8, random_non_queries: bool = True
) -> None:
    """Check that rows are what `mqar` promises.

    Args:
        inputs: tokens `[E, T]`.
        labels: labels `[E, T]`, -100 where nothing is asked.
        vocab_size: V.
        num_kv_pairs: P.
        random_non_queries: False checks that filler is 0.

    Raises:
        ValueError: the first promise that is broken, with the row that breaks it.

    Example:
        >>> inputs, labels = mqar(0, 2, 16, vocab_size=32, num_kv_pairs=4)
        >>> labels[1, 8:] = -100
        >>> check_mqar(inputs, labels, vocab_size=32, num_kv_pairs=4)
        Traceback (most recent call last):
        ...
        ValueError: row 1 has 0 labels, expected one for each of 4 pairs

    Source: Zoology: Measuring and Improving Recall in Efficient Language Models, arXiv 2312.04927.
    """
    inputs, labels = np.asarray(inputs), np.asarray(labels)
    if inputs.ndim != 2 or inputs.shape != labels.shape:
        raise ValueError(f"inputs and labels must have one shape [E, T], got {inputs.shape} and {labels.shape}")
    _check_sizes(len(inputs), inputs.shape[1], vocab_size, num_kv_pairs, 1.0)
    context = 2 * num_kv_pairs
    for row, (tokens, answers) in enumerate(zip(inputs, labels, strict=True)):
        keys, values = tokens[0:context:2], tokens[1:context:2]
        value_of = dict(zip(keys.tolist(), values.tolist(), strict=True))
        if len(value_of) < num_kv_pairs or keys.min() < 1 or keys.max() >= vocab_size // 2:
            raise ValueError(f"row {row} must have distinct keys in 1 .. {vocab_size // 2 - 1}, got {keys.tolist()}")
        if len(set(values.tolist())) < num_kv_pairs or values.min() < vocab_size // 2 or values.max() >= vocab_size:
            raise ValueError(
                f"row {row} must have distinct values in {vocab_size // 2} .. {vocab_size - 1}, got {values.tolist()}"
            )
        asked = np.flatnonzero(answers != UNLABELED)
        if len(asked) != num_kv_pairs:
            raise ValueError(f"row {row} has {len(asked)} labels, expected one for each of {num_kv_pairs} pairs")
        if asked.min() < context or (asked % 2).any():
            raise ValueError(f"row {row} must ask on even positions from {context} on, got {asked.tolist()}")
        if sorted(tokens[asked].tolist()) != sorted(value_of):
            raise ValueError(f"row {row} must ask for every key once, got {tokens[asked].tolist()}")
        if any(value_of[int(tokens[place])] != answers[place] for place in asked):
            raise ValueError(f"row {row} has a label that is not the value of the key it stands at")
        filler = np.ones(len(tokens), bool)
        filler[:context], filler[asked] = False, False
        rest = tokens[filler]
        if not random_non_queries and rest.any():
            raise ValueError(f"row {row} must have filler 0, got {rest.tolist()}")
        if ((rest < 0) | (rest >= vocab_size)).any():
            raise ValueError(f"row {row} must have filler in 0 .. {vocab_size - 1}, got {rest.tolist()}")


def _check_sizes(num_examples: int, seq_len: int, vocab_size: int, num_kv_pairs: int, power_a: float) -> None:
    for name, value in (("num_examples", num_examples), ("seq_len", seq_len), ("num_kv_pairs", num_kv_pairs)):
        base.require_integer(name, value, 1)
    base.require_integer("vocab_size", vocab_size, 2)
    if seq_len % 2:
        raise ValueError(f"seq_len must be even, got {seq_len}")
    if vocab_size <= seq_len:
        raise ValueError(f"vocab_size must be above seq_len={seq_len}, got {vocab_size}")
    if 4 * num_kv_pairs > seq_len:
        raise ValueError(f"num_kv_pairs must be at most seq_len / 4 = {seq_len / 4:g}, got {num_kv_pairs}")
    if not (np.isfinite(power_a) and power_a > 0):
        raise ValueError(f"power_a must be positive, got {power_a!r}")


def _distinct(rng: np.random.Generator, rows: int, population: int, count: int) -> np.ndarray:
    """`[rows, count]` numbers of 0 .. population - 1, distinct in a row: the first steps of a Fisher-Yates shuffle."""
    deck = np.tile(np.arange(population, dtype=np.int32), (rows, 1))
    row = np.arange(rows)
    for place in range(count):
        other = rng.integers(place, population, size=rows)
        drawn = deck[row, other]
        deck[row, other] = deck[row, place]
        deck[row, place] = drawn
    return deck[:, :count].copy()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mqar(base.Task):
    """Multi-query associative recall as a task.

    Args:
        seq_len: T, even.
        vocab_size: V, above T.
        num_kv_pairs: P, at most T / 4.
        power_a: a > 0 of the gaps' distribution.
        random_non_queries: whether filler is random or 0.
        num_train_examples: None draws every training batch afresh; a number walks one fixed set of that many rows again
            and again in the same order, as the paper does with 100,000.
        num_eval_examples: rows of `"valid"` and of `"test"`.
        seed: moves the training batches.

    Raises:
        ValueError: sizes that do not fit together.

    Example:
        >>> task = Mqar(seq_len=16, num_kv_pairs=4, vocab_size=32)
        >>> task.batch("train", step=0, size=2)["weights"].sum(axis=1)
        array([4., 4.], dtype=float32)

    Source: Zoology: Measuring and Improving Recall in Efficient Language Models, arXiv 2312.04927.
    """

    seq_len: int = 64
    vocab_size: int = 256
    num_kv_pairs: int = 4
    power_a: float = 0.01
    random_non_queries: bool = True
    num_train_examples: int | None = None
    num_eval_examples: int = 512

    name: ClassVar[str] = "mqar"
    kind: ClassVar[str] = "lm"
    primary_metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the sizes against each other."""
        super().__post_init__()
        if self.num_train_examples is not None:
            base.require_integer("num_train_examples", self.num_train_examples, 1)
        _check_sizes(self.num_eval_examples, self.seq_len, self.vocab_size, self.num_kv_pairs, self.power_a)

    @property
    def length(self) -> int:
        """T."""
        return self.seq_len

    @property
    def num_classes(self) -> int:
        """V."""
        return self.vocab_size

    @property
    def threshold(self) -> float:
        """A quarter of the way from guessing among the P values of the row, `1 / P`, to perfect recall.

        A model that has only learned to answer with some value of the row scores 1 / P: that is what recall is measured
        from, not 1 / V.
        """
        chance = 1.0 / self.num_kv_pairs
        return chance + 0.25 * (1.0 - chance)

    def num_examples(self, split: str) -> int | None:
        """Rows of a split; None for a training split without end."""
        base.require_split(split)
        return self.num_train_examples if split == "train" else self.num_eval_examples

    def train_batch(self, rng: np.random.Generator, step: int, size: int) -> dict[str, np.ndarray]:
        """Fresh rows, or the next ones of the fixed set."""
        if self.num_train_examples is None:
            return _as_batch(*self.draw(rng, size))
        places = np.arange(step * size, (step + 1) * size) % self.num_train_examples
        inputs, labels = _fixed_set(self, "train")
        return _as_batch(inputs[places], labels[places])

    def examples(self, split: str, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of an evaluation set."""
        inputs, labels = _fixed_set(dataclasses.replace(self, seed=0), split)
        return _as_batch(inputs[indices], labels[indices])

    def draw(self, rng: np.random.Generator, num_examples: int) -> tuple[np.ndarray, np.ndarray]:
        """`mqar` with the parameters of the task."""
        return mqar(
            rng,
            num_examples,
            self.seq_len,
            self.vocab_size,
            self.num_kv_pairs,
            self.power_a,
            self.random_non_queries,
        )

    def metrics(self, outputs: Any, batch: Mapping[str, Any]) -> dict[str, base.Mean]:
        """`accuracy`, the mean over rows of each row's share of right answers, and `loss` in nats an answer.

        A row counts once, however many queries it has; rows of weight 0 do not count.
        """
        logits, weights = base.logits_of(outputs), jnp.asarray(batch["weights"]).astype(jnp.float32)
        right = (jnp.argmax(logits, axis=-1) == batch["targets"]).astype(jnp.float32)
        asked = weights.sum(axis=-1)
        share = jnp.sum(right * weights, axis=-1) / jnp.where(asked > 0, asked, 1.0)
        losses = base.cross_entropy(logits, batch["targets"])
        return {
            "accuracy": base.Mean(jnp.sum(share), jnp.sum((asked > 0).astype(jnp.float32))),
            "loss": base.Mean(base.weighted_sum(losses, weights), weights.sum()),
        }


@functools.lru_cache(maxsize=8)
def _fixed_set(task: Mqar, split: str) -> tuple[np.ndarray, np.ndarray]:
    rows = task.num_examples(split)
    assert rows is not None
    arrays = task.draw(base.split_rng(task.seed, split), rows)
    for array in arrays:
        array.setflags(write=False)
    return arrays


def _as_batch(inputs: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    asked = labels != UNLABELED
    return {"inputs": inputs, "targets": np.where(asked, labels, 0), "weights": asked.astype(np.float32)}


def _example(key: Any, length: int) -> tuple[tuple, dict[str, Any]]:
    seq_len = max(8, length - length % 2)
    return (0, 4, seq_len), {"vocab_size": 2 * seq_len, "num_kv_pairs": seq_len // 8}


TASKS = {"mqar": Mqar}

ENTRY = Entry(
    name="mqar",
    kind="task",
    family="tasks",
    function=mqar,
    papers=(Paper("Zoology: Measuring and Improving Recall in Efficient Language Models", "2312.04927", 2023),),
    patterns=("causal self",),
    example=_example,
    fidelity="official code",
)
