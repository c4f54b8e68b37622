"""What every task is: seeded batches as a pure function of the step, a loss, metrics that add up, a bar for "learned".

Three splits, `"train"`, `"valid"` and `"test"`, never share an example.

- `"train"` goes on forever: `batch("train", step, size)` depends on the seed and the step alone, so a run that stops
  and goes on sees the batches that it would have seen.
- `"valid"` and `"test"` are fixed sets, the same for every seed, walked in order: batch `step` holds the examples from
  `step * size` on, for `step` in `range(num_batches(split, size))`. The last batch is filled up with copies of
  weight 0, so that all batches have one shape and every example counts once.
"""

import abc
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SPLITS = ("train", "valid", "test")
"""The names of the splits."""


class Mean(NamedTuple):
    """A mean that is still being taken: `total / count`, where totals and counts add up over batches.

    Example:
        >>> float(Mean(3.0, 4.0).value)
        0.75
    """

    total: Any
    count: Any

    @property
    def value(self) -> Any:
        """The mean; nan where nothing was counted."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(self.total, np.float64) / np.asarray(self.count, np.float64)


def summarize(batches: Iterable[Mapping[str, Mean]]) -> dict[str, Any]:
    r"""Join the metrics of many batches, weighing each by what it counted.

    $$ \mathrm{metric} = \frac{\sum_b \mathrm{total}_b}{\sum_b \mathrm{count}_b} $$

    Sums are taken in float64. A metric of arrays (several seeds at once) gives an array.

    Args:
        batches: what `Task.metrics` returned for each batch.

    Returns:
        The value of every metric; empty where there was no batch.

    Example:
        >>> summarize([{"accuracy": Mean(1.0, 2.0)}, {"accuracy": Mean(2.0, 2.0)}])
        {'accuracy': 0.75}
    """
    joined: dict[str, Mean] = {}
    for metrics in batches:
        for name, mean in metrics.items():
            before = joined.get(name, Mean(0.0, 0.0))
            joined[name] = Mean(
                before.total + np.asarray(mean.total, np.float64), before.count + np.asarray(mean.count, np.float64)
            )
    values = {name: mean.value for name, mean in joined.items()}
    return {name: float(value) if np.ndim(value) == 0 else value for name, value in values.items()}


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    r"""Negative log-likelihood of every target in nats, in float32.

    $$ \ell = \log \sum_c e^{z_c} - z_y $$

    Args:
        logits: scores `[..., C]`.
        targets: class indices `[...]`.

    Returns:
        float32 `[...]`.

    Example:
        >>> import jax.numpy as jnp
        >>> float(cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))[0])  # log 4
        1.386...
    """
    logits = jnp.asarray(logits).astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, jnp.asarray(targets)[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def weighted_sum(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Sum of `values * weights`, where a weight of 0 silences even a value that is not finite."""
    weights = jnp.asarray(weights).astype(jnp.float32)
    return jnp.sum(jnp.where(weights > 0, values, 0.0) * weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """A learning problem: data, loss, metrics.

    A task is a frozen dataclass of its parameters; two equal tasks give equal batches.

    Args:
        seed: moves the training batches, and nothing else: every seed is judged on the same examples.

    Attributes:
        name: the name under which `jattn.tasks.get` finds it.
        kind: `"lm"` (inputs and targets are tokens `[B, T]`) or `"classification"` (inputs `[B, ...]`, targets `[B]`).
        primary_metric: the metric that ranks models.
        higher_is_better: whether more of the primary metric is better.
    """

    seed: int = 0

    name: ClassVar[str]
    kind: ClassVar[str]
    primary_metric: ClassVar[str]
    higher_is_better: ClassVar[bool]

    def __post_init__(self) -> None:
        """Check what all tasks share."""
        require_integer("seed", self.seed, 0)

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """Tokens a sequence, or patches an image."""

    @property
    @abc.abstractmethod
    def num_classes(self) -> int:
        """Size of the last axis of the outputs."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens of a language-modelling task, which is `num_classes`."""
        if self.kind != "lm":
            raise ValueError(f"task {self.name!r} is of kind {self.kind!r}: its inputs are no tokens of a vocabulary")
        return self.num_classes

    @abc.abstractmethod
    def num_examples(self, split: str) -> int | None:
        """Number of examples of a split; None where training examples are drawn afresh without end."""

    @abc.abstractmethod
    def train_batch(self, rng: np.random.Generator, step: int, size: int) -> dict[str, np.ndarray]:
        """Training batch number `step`; `rng` is seeded with (seed, step)."""

    @abc.abstractmethod
    def examples(self, split: str, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The examples of `"valid"` or `"test"` at the given indices."""

    def batch(self, split: str, step: int, size: int) -> dict[str, np.ndarray]:
        """The batch of a step: a pure function of (seed, split, step, size).

        Args:
            split: `"train"`, `"valid"` or `"test"`.
            step: number of the batch, from 0; for an evaluation split less than `num_batches(split, size)`.
            size: examples a batch, B.

        Returns:
            `inputs`, `targets` and `weights`, NumPy arrays with a leading axis of B; a weight of 0 means: not counted.

        Raises:
            ValueError: an unknown split, a size below 1, or a step outside the split.

        Example:
            >>> from jattn import tasks
            >>> task = tasks.get("mqar", seq_len=16, num_kv_pairs=2, vocab_size=32)
            >>> {name: array.shape for name, array in task.batch("train", step=0, size=4).items()}
            {'inputs': (4, 16), 'targets': (4, 16), 'weights': (4, 16)}
        """
        require_split(split)
        require_integer("size", size, 1)
        require_integer("step", step, 0)
        if split == "train":
            return self.train_batch(split_rng(self.seed, split, step), step, size)
        total, batches = self._set_size(split), self.num_batches(split, size)
        if step >= batches:
            raise ValueError(f"step must be below num_batches({split!r}, {size}) = {batches}, got {step}")
        indices = np.arange(step * size, (step + 1) * size)
        batch = self.examples(split, np.minimum(indices, total - 1))
        padding = indices >= total
        if padding.any():
            weights = batch["weights"].copy()
            weights[padding] = 0.0
            batch = {**batch, "weights": weights}
        return batch

    def num_batches(self, split: str, size: int) -> int:
        """How many batches of `size` examples walk once through an evaluation split.

        Raises:
            ValueError: the training split (its batches have no end), an unknown split, or a size below 1.

        Example:
            >>> from jattn import tasks
            >>> tasks.get("mqar", num_eval_examples=100).num_batches("valid", 32)
            4
        """
        require_split(split)
        require_integer("size", size, 1)
        if split == "train":
            raise ValueError("split must be 'valid' or 'test': the batches of 'train' have no end")
        return -(-self._set_size(split) // size)

    def _set_size(self, split: str) -> int:
        total = self.num_examples(split)
        if total is None:
            raise TypeError(f"num_examples({split!r}) of task {self.name!r} must be a number: evaluation splits end")
        return total

    def loss(self, outputs: Any, batch: Mapping[str, Any]) -> jax.Array:
        r"""The training loss: mean cross-entropy of the weighted targets, in nats; 0 where all weights are 0.

        $$ L = \frac{\sum_i w_i \ell_i}{\sum_i w_i} $$

        Args:
            outputs: logits `[B, ..., C]`, or an object with such an attribute `logits`.
            batch: what `batch` returned.

        Returns:
            A float32 scalar.
        """
        weights = jnp.asarray(batch["weights"]).astype(jnp.float32)
        total = weighted_sum(cross_entropy(logits_of(outputs), batch["targets"]), weights)
        return total / jnp.where(weights.sum() > 0, weights.sum(), 1.0)

    @abc.abstractmethod
    def metrics(self, outputs: Any, batch: Mapping[str, Any]) -> dict[str, Mean]:
        """The metrics of one batch, as totals and counts that `summarize` joins over batches."""

    @property
    @abc.abstractmethod
    def threshold(self) -> float:
        """What the primary metric must reach before a result says anything about the model: see `learned`."""

    def learned(self, metric: float) -> bool:
        """Whether a value of the primary metric shows learning, rather than a guess that needs no model.

        The bar is `threshold`, and each task says in its own words why it lies there. A value that is not a number has
        learned nothing.
        """
        if not np.isfinite(metric):
            return False
        return bool(metric >= self.threshold if self.higher_is_better else metric < self.threshold)


def logits_of(outputs: Any) -> jax.Array:
    """The logits of a model's output: its attribute `logits`, or the array itself."""
    return jnp.asarray(getattr(outputs, "logits", outputs))


def split_rng(seed: int, split: str, step: int = 0) -> np.random.Generator:
    """The generator of (seed, split, step): streams of different triples are independent.

    Example:
        >>> split_rng(0, "train", 7).integers(100) == split_rng(0, "train", 7).integers(100)
        np.True_
    """
    return np.random.default_rng(np.random.SeedSequence([seed, SPLITS.index(split), step]))


def epoch_indices(seed: int, num_examples: int, step: int, size: int) -> np.ndarray:
    """Indices of training batch `step` when a set is walked in epochs, each in a new random order.

    Batch `step` holds the places `step * size` and on of the endless row of epochs: every example comes once an epoch,
    also where the size does not divide the set, and nothing needs to be remembered between steps.

    Example:
        >>> sorted(int(i) for step in range(2) for i in epoch_indices(0, 6, step, 3))
        [0, 1, 2, 3, 4, 5]
    """
    places = np.arange(step * size, (step + 1) * size)
    epochs = places // num_examples
    indices = np.empty(size, np.int64)
    for epoch in np.unique(epochs):
        order = split_rng(seed, "train", int(epoch)).permutation(num_examples)
        chosen = epochs == epoch
        indices[chosen] = order[places[chosen] % num_examples]
    return indices


def require_split(split: str) -> None:
    """Raise ValueError unless `split` is one of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(map(repr, SPLITS))}, got {split!r}")


def require_integer(name: str, value: Any, least: int) -> None:
    """Raise ValueError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
