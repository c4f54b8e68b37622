"""Weights as torch's layers hold them, into the layout of jattn's: kernels turned, heads on an axis of their own."""

from __future__ import annotations

from collections.abc import MutableMapping

import numpy as np

from jattn.models.pretrained.readers import UnreadableFile


class Renaming:
    """Moves tensors of a checkpoint to the paths of a model, as views, and keeps count of what is left.

    Args:
        tensors: of the checkpoint by name; emptied on the way.
        num_heads: N.

    Example:
        >>> renaming = Renaming({"fc.weight": np.zeros((6, 4)), "fc.bias": np.zeros(6)}, num_heads=2)
        >>> renaming.heads("query", "fc")
        >>> {name: array.shape for name, array in renaming.weights.items()}
        {'query.kernel': (4, 2, 3), 'query.bias': (2, 3)}
    """

    def __init__(self, tensors: MutableMapping[str, np.ndarray], num_heads: int):
        self.tensors = tensors
        self.num_heads = num_heads
        self.weights: dict[str, np.ndarray] = {}

    def take(self, name: str) -> np.ndarray:
        """A tensor of the checkpoint, which is then gone from it.

        Raises:
            UnreadableFile: there is none.
        """
        if name not in self.tensors:
            raise UnreadableFile(f"the checkpoint lacks the tensor {name}")
        return self.tensors.pop(name)

    def linear(self, mine: str, theirs: str) -> None:
        """A linear layer with bias: `[outputs, inputs]` becomes `[inputs, outputs]`."""
        self.weights[f"{mine}.kernel"] = self.take(f"{theirs}.weight").T
        self.weights[f"{mine}.bias"] = self.take(f"{theirs}.bias")

    def heads(self, mine: str, theirs: str) -> None:
        """A linear layer into heads: `[N D, M]` becomes `[M, N, D]`."""
        self.linear(mine, theirs)
        kernel, bias = self.weights[f"{mine}.kernel"], self.weights[f"{mine}.bias"]
        self.weights[f"{mine}.kernel"] = kernel.reshape(len(kernel), self.num_heads, -1)
        self.weights[f"{mine}.bias"] = bias.reshape(self.num_heads, -1)

    def from_heads(self, mine: str, theirs: str) -> None:
        """A linear layer out of heads: `[M, N D]` becomes `[N, D, M]`."""
        self.linear(mine, theirs)
        kernel = self.weights[f"{mine}.kernel"]
        self.weights[f"{mine}.kernel"] = kernel.reshape(self.num_heads, -1, kernel.shape[1])

    def norm(self, mine: str, theirs: str) -> None:
        """A layer norm with bias."""
        self.weights[f"{mine}.scale"] = self.take(f"{theirs}.weight")
        self.weights[f"{mine}.bias"] = self.take(f"{theirs}.bias")

    def drop(self, *prefixes: str) -> None:
        """Forget the tensors of parts that the model does not have."""
        for name in [name for name in self.tensors if name.startswith(prefixes)]:
            del self.tensors[name]

    def done(self) -> dict[str, np.ndarray]:
        """The weights by the paths of the model.

        Raises:
            UnreadableFile: the checkpoint holds tensors that nobody asked for.
        """
        if self.tensors:
            names = ", ".join(sorted(self.tensors)[:4])
            raise UnreadableFile(f"the checkpoint holds {len(self.tensors)} tensors that this model lacks: {names}")
        return self.weights
