"""Handwritten digits: the 1,797 grey images of 8 x 8 pixels that ship with scikit-learn.

The split keeps the share of every class: of each ten images of a digit eight are for training, one for `"valid"` and
one for `"test"`, chosen once by a fixed seed. Training walks the set in epochs, each in a new order.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (1998),
the test set, as `sklearn.datasets.load_digits` gives it.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jattn.mechanisms.entry import Entry
from jattn.tasks import base

SPLIT_SEED = 0
"""Chooses which image goes into which split; fixed, so that a figure always means the same images."""


@functools.lru_cache(maxsize=1)
def _splits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (data.images / 16.0).astype(np.float32)[..., None]
    labels = data.target.astype(np.int32)
    rng = np.random.default_rng(SPLIT_SEED)
    chosen: dict[str, list[np.ndarray]] = {"train": [], "valid": [], "test": []}
    for digit in range(10):
        order = rng.permutation(np.flatnonzero(labels == digit))
        tenth = len(order) // 10
        chosen["valid"].append(order[:tenth])
        chosen["test"].append(order[tenth : 2 * tenth])
        chosen["train"].append(order[2 * tenth :])
    splits = {}
    for split, parts in chosen.items():
        indices = np.sort(np.concatenate(parts))
        splits[split] = images[indices], labels[indices]
        for array in splits[split]:
            array.setflags(write=False)
    return splits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits(base.Task):
    """Name the digit on an image of 8 x 8 pixels.

    Inputs are images `[B, 8, 8, 1]` in [0, 1], which the model cuts into patches; targets `[B]`.

    Args:
        patch_size: side of a patch, a divisor of 8; the sequence has `(8 / patch_size) ** 2` patches.
        seed: moves the order of the training images.

    Raises:
        ValueError: a patch size that does not divide 8.

    Example:
        >>> task = Digits(patch_size=2)
        >>> task.length, task.num_classes, task.num_examples("test")
        (16, 10, 176)

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """

    patch_size: int = 2

    name: ClassVar[str] = "digits"
    kind: ClassVar[str] = "classification"
    primary_metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    image_size: ClassVar[int] = 8
    num_channels: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Check the patch size."""
        super().__post_init__()
        base.require_integer("patch_size", self.patch_size, 1)
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size must divide {self.image_size}, got {self.patch_size}")

    @property
    def length(self) -> int:
        """Patches an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_classes(self) -> int:
        """Ten digits."""
        return 10

    @property
    def threshold(self) -> float:
        """Twice the accuracy of guessing among ten classes of nearly one size: 0.2."""
        return 2.0 / self.num_classes

    def num_examples(self, split: str) -> int:
        """Images of a split."""
        base.require_split(split)
        return len(_splits()[split][1])

    def train_batch(self, rng: np.random.Generator, step: int, size: int) -> dict[str, np.ndarray]:
        """The next images of an endless row of epochs, each in its own order."""
        return self.examples("train", base.epoch_indices(self.seed, self.num_examples("train"), step, size))

    def examples(self, split: str, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The images of a split at the given indices."""
        images, labels = _splits()[split]
        return {
            "inputs": images[indices],
            "targets": labels[indices],
            "weights": np.ones(len(indices), np.float32),
        }

    def metrics(self, outputs: Any, batch: Mapping[str, Any]) -> dict[str, base.Mean]:
        """`accuracy` and `loss` (nats), means over the images of weight above 0."""
        logits, weights = base.logits_of(outputs), jnp.asarray(batch["weights"]).astype(jnp.float32)
        right = (jnp.argmax(logits, axis=-1) == batch["targets"]).astype(jnp.float32)
        losses = base.cross_entropy(logits, batch["targets"])
        return {
            "accuracy": base.Mean(base.weighted_sum(right, weights), weights.sum()),
            "loss": base.Mean(base.weighted_sum(losses, weights), weights.sum()),
        }


def _example(key: Any, length: int) -> tuple[tuple, dict[str, Any]]:
    return (), {"patch_size": 2 if length < 64 else 1}


TASKS = {"digits": Digits}

ENTRY = Entry(
    name="digits", kind="task", family="tasks", function=Digits, patterns=("noncausal self",), example=_example
)
