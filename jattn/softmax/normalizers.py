r"""Normalizers: what turns masked logits into weights.

One form covers all of them and is what lets the blockwise path and the kernels stream any of them:

    weights_ij = phi(logit_ij; row_i) * scale(total_i, count_i),      total_i = sum_j phi(logit_ij; row_i)

where j runs over the visible keys, count_i is their number, and `row_i` are numbers that the normalizer keeps per
row (softmax: the log-sum-exp). `weights` is the dense definition that everything else is tested against.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class StreamState(NamedTuple):
    """What a streaming normalizer carries along the keys of a row: running maximum, total and weighted values."""

    maximum: Any
    total: Any
    weighted: Any


class Normalizer:
    """Base of all normalizers: frozen, hashable values.

    `passes` is how often the keys of a row must be read before the weights are known; `needs_count` says whether
    `scale` looks at the number of visible keys.
    """

    passes = 1
    needs_count = False

    def weights(self, logits, visible, count):
        """Dense weights.

        Args:
          logits: `[..., T, S]` float.
          visible: `[..., T, S]` booleans (broadcastable).
          count: `[..., T, 1]` visible keys of each row.

        Returns:
          `[..., T, S]` weights, 0 where not visible.
        """
        safe = jnp.where(visible, logits, 0)
        raw = jnp.where(visible, self.phi(safe), 0)
        return raw * self.scale(raw.sum(-1, keepdims=True), count)

    def phi(self, logits):
        """The unnormalized weight of a visible key, elementwise; 0 at -inf."""
        raise NotImplementedError

    def scale(self, total, count):
        """The factor of a row, from the sum of its unnormalized weights and its number of visible keys."""
        raise NotImplementedError

    def init(self, rows, width, dtype=jnp.float32) -> StreamState:
        """The state before any key, for `rows` queries and values of `width` channels."""
        return StreamState(
            jnp.full((rows,), -jnp.inf, dtype), jnp.zeros((rows,), dtype), jnp.zeros((rows, width), dtype)
        )

    def update(self, state: StreamState, logits, visible, value) -> StreamState:
        """The state after a tile: logits `[rows, keys]`, visible likewise, value `[keys, width]`."""
        raw = jnp.where(visible, self.phi(jnp.where(visible, logits, 0)), 0)
        return StreamState(state.maximum, state.total + raw.sum(-1), state.weighted + raw @ value)

    def merge(self, left: StreamState, right: StreamState) -> StreamState:
        """The state after the keys of both."""
        return StreamState(left.maximum, left.total + right.total, left.weighted + right.weighted)

    def finish(self, state: StreamState, count):
        """The output `[rows, width]`; `count` `[rows]` visible keys."""
        return state.weighted * self.scale(state.total, count)[:, None]


@dataclasses.dataclass(frozen=True)
class Softmax(Normalizer):
    """weights_ij = exp(logit_ij - lse_i); a row without visible keys has weights 0."""

    def weights(self, logits, visible, count):
        """Dense weights; see the base class."""
        masked = jnp.where(visible, logits, -jnp.inf)
        alive = masked.max(-1, keepdims=True) != -jnp.inf
        return jnp.where(alive, jax.nn.softmax(jnp.where(alive, masked, 0)), 0)

    def update(self, state: StreamState, logits, visible, value) -> StreamState:
        """The online softmax step; see the base class."""
        masked = jnp.where(visible, logits, -jnp.inf)
        maximum = jnp.maximum(state.maximum, masked.max(-1))
        shift = jnp.where(jnp.isfinite(maximum), maximum, 0)
        raw, decay = jnp.exp(masked - shift[:, None]), jnp.exp(state.maximum - shift)
        return StreamState(maximum, state.total * decay + raw.sum(-1), state.weighted * decay[:, None] + raw @ value)

    def merge(self, left: StreamState, right: StreamState) -> StreamState:
        """Join two states; see the base class."""
        maximum = jnp.maximum(left.maximum, right.maximum)
        shift = jnp.where(jnp.isfinite(maximum), maximum, 0)
        a, b = jnp.exp(left.maximum - shift), jnp.exp(right.maximum - shift)
        return StreamState(
            maximum, left.total * a + right.total * b, left.weighted * a[:, None] + right.weighted * b[:, None]
        )

    def finish(self, state: StreamState, count):
        """The output of each row; see the base class."""
        return state.weighted / jnp.where(state.total == 0, 1, state.total)[:, None]


def _elu1(x):
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))


def _taylor2(x):
    finite = jnp.where(x == -jnp.inf, 0, x)
    return jnp.where(x == -jnp.inf, 0, 1 + finite + finite * finite / 2)


_SIMILARITIES: dict[str, Callable[..., Any]] = {
    "sigmoid": jax.nn.sigmoid,
    "elu1": _elu1,
    "relu": jax.nn.relu,
    "softplus": lambda x: jnp.logaddexp(x, 0),
    "taylor2": _taylor2,
}
_NORMS = ("none", "sum", "count")


@dataclasses.dataclass(frozen=True)
class Pointwise(Normalizer):
    """weights_ij = sim(logit_ij) * scale_i with scale_i = 1, 1 / (sum_j sim(logit_ij) + eps) or 1 / count_i."""

    similarity: str
    norm: str = "none"
    eps: float = 1e-8

    def __post_init__(self):
        if self.similarity not in _SIMILARITIES:
            raise ValueError(f"similarity must be one of {', '.join(_SIMILARITIES)}, got {self.similarity!r}")
        if self.norm not in _NORMS:
            raise ValueError(f"norm must be one of {', '.join(_NORMS)}, got {self.norm!r}")
        if not self.eps >= 0:
            raise ValueError(f"eps must be >= 0, got {self.eps!r}")

    @property
    def needs_count(self) -> bool:  # type: ignore[override]
        """Whether the number of visible keys enters."""
        return self.norm == "count"

    def phi(self, logits):
        """The similarity of a visible pair."""
        return _SIMILARITIES[self.similarity](logits)

    def scale(self, total, count):
        """The factor of a row."""
        if self.norm == "sum":
            shifted = total + self.eps
            return 1 / jnp.where(shifted == 0, 1, shifted)
        return 1 / jnp.maximum(count, 1).astype(total.dtype) if self.norm == "count" else jnp.ones_like(total)


@dataclasses.dataclass(frozen=True)
class Reweighted(Normalizer):
    r"""A second stage after another normalizer that keeps only the above-average keys and sharpens them.

    a'_ij = w_ij / sum_j w_ij,  w_ij = relu(count_i * a_ij - O_i)^power,  O_i = 0 for rows of at most `offset_rows`
    visible keys, else `offset`. Evaluated as (r / max r)^power, which equals the formula and cannot overflow; a row
    whose largest r is at most `guard` (all keys alike) has weights 0.
    """

    base: Softmax | Pointwise
    power: float = 15.0
    offset: float = 1.0
    offset_rows: int = 3
    guard: float = 1e-5

    passes = 2
    needs_count = True

    def excess(self, base_weights, count):
        """r_ij = relu(count_i * a_ij - O_i)."""
        count = count.astype(base_weights.dtype)
        return jnp.maximum(count * base_weights - jnp.where(count <= self.offset_rows, 0.0, self.offset), 0)

    def sharpen(self, excess, largest):
        """(r / max r)^power with gradient 0, not NaN, where r = 0; 0 where the largest is within the guard."""
        alive = (largest > self.guard) & (excess > 0)
        ratio = jnp.where(alive, excess, 1) / jnp.where(largest > self.guard, largest, 1)
        return jnp.where(alive, ratio**self.power, 0)

    def weights(self, logits, visible, count):
        """Dense weights; see the base class."""
        excess = jnp.where(visible, self.excess(self.base.weights(logits, visible, count), count), 0)
        largest = jax.lax.stop_gradient(excess.max(-1, keepdims=True))
        raw = self.sharpen(excess, largest)
        total = raw.sum(-1, keepdims=True)
        return raw / jnp.where(total == 0, 1, total)


def softmax() -> Normalizer:
    """The softmax, the engine's default. Learned sinks are the engine's argument `sinks`.

    Example:
      >>> import jattn
      >>> jattn.normalizers.softmax()
      Softmax()
    """
    return Softmax()


def sigmoid(normalize: bool = False, eps: float = 1e-8) -> Normalizer:
    """weights = sigmoid(logit), divided by their sum + eps if `normalize`.

    Args:
      normalize: whether to divide by the sum.
      eps: added to the sum.

    Returns:
      The normalizer, for the engine's argument `normalizer`.

    Raises:
      ValueError: eps < 0.

    Example:
      >>> import numpy as np
      >>> logits, visible, count = np.array([[-1.0, 0.0, 2.0, 9.0]]), np.array([[True] * 3 + [False]]), np.array([[3]])
      >>> print(np.asarray(sigmoid().weights(logits, visible, count)).round(3))
      [[0.269 0.5   0.881 0.   ]]

    Source: When Attention Sink Emerges in Language Models: An Empirical View (arXiv:2410.10781).
    """
    return Pointwise("sigmoid", "sum" if normalize else "none", eps)


def elu1(normalize: bool = False, eps: float = 1e-8) -> Normalizer:
    """weights = elu(logit) + 1, divided by their sum + eps if `normalize`.

    Args:
      normalize: whether to divide by the sum.
      eps: added to the sum.

    Returns:
      The normalizer, for the engine's argument `normalizer`.

    Raises:
      ValueError: eps < 0.

    Example:
      >>> import numpy as np
      >>> logits, visible, count = np.array([[-1.0, 0.0, 2.0, 9.0]]), np.array([[True] * 3 + [False]]), np.array([[3]])
      >>> print(np.asarray(elu1(normalize=True).weights(logits, visible, count)).round(3))
      [[0.084 0.229 0.687 0.   ]]

    Source: When Attention Sink Emerges in Language Models: An Empirical View (arXiv:2410.10781).
    """
    return Pointwise("elu1", "sum" if normalize else "none", eps)


def relu_over_n() -> Normalizer:
    """weights = relu(logit) / n, n = visible keys of the row.

    Returns:
      The normalizer, for the engine's argument `normalizer`.

    Example:
      >>> import numpy as np
      >>> logits, visible, count = np.array([[-1.0, 0.0, 2.0, 9.0]]), np.array([[True] * 3 + [False]]), np.array([[3]])
      >>> print(np.asarray(relu_over_n().weights(logits, visible, count)).round(3))
      [[0.    0.    0.667 0.   ]]

    Source: Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs
    (arXiv:2410.13835).
    """
    return Pointwise("relu", "count")


def softplus_l1(eps: float = 1e-8) -> Normalizer:
    """weights = softplus(logit) / (sum + eps).

    Args:
      eps: added to the sum.

    Returns:
      The normalizer, for the engine's argument `normalizer`.

    Raises:
      ValueError: eps < 0.

    Example:
      >>> import numpy as np
      >>> logits, visible, count = np.array([[-1.0, 0.0, 2.0, 9.0]]), np.array([[True] * 3 + [False]]), np.array([[3]])
      >>> print(np.asarray(softplus_l1().weights(logits, visible, count)).round(3))
      [[0.1   0.221 0.679 0.   ]]

    Source: Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models
    (arXiv:2501.13428), first stage.
    """
    return Pointwise("softplus", "sum", eps)


def taylor2(eps: float = 0.0) -> Normalizer:
    """weights = (1 + s + s^2 / 2) / (sum + eps) of the logit s: the second-order expansion of the softmax.

    Args:
      eps: added to the sum.

    Returns:
      The normalizer, for the engine's argument `normalizer`.

    Raises:
      ValueError: eps < 0.

    Example:
      >>> import numpy as np
      >>> logits, visible, count = np.array([[-1.0, 0.0, 2.0, 9.0]]), np.array([[True] * 3 + [False]]), np.array([[3]])
      >>> print(np.asarray(taylor2().weights(logits, visible, count)).round(3))
      [[0.077 0.154 0.769 0.   ]]

    Source: Deconstructing Attention: Investigating Design Principles for Effective Language Modeling
    (arXiv:2510.11602).
    """
    return Pointwise("taylor2", "sum", eps)


def reweighted(base: Normalizer, power: float = 15.0) -> Normalizer:
    """The re-weighting stage of LSSAR after any one-pass normalizer, two passes over the keys.

    weights_ij = w_ij / sum_j w_ij,  w_ij = relu(n_i * a_ij - O_i)^power with the weights a of `base`; O_i = 0 for rows
    of n_i <= 3 visible keys, else 1.

    Args:
      base: the first stage, softplus_l1() in the paper.
      power: p.

    Returns:
      The normalizer, for the engine's argument `normalizer`.

    Raises:
      ValueError: `base` is itself a two-pass normalizer, or power < 1.

    Example:
      >>> import numpy as np
      >>> logits, visible, count = np.array([[-1.0, 0.0, 2.0, 9.0]]), np.array([[True] * 3 + [False]]), np.array([[3]])
      >>> print(np.asarray(reweighted(softplus_l1(), power=2).weights(logits, visible, count)).round(3))
      [[0.019 0.094 0.887 0.   ]]

    Source: Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models
    (arXiv:2501.13428), second stage.
    """
    if not isinstance(base, (Softmax, Pointwise)):
        raise ValueError(f"reweighted: base must be a one-pass normalizer, got {base!r}")
    if power < 1:
        raise ValueError(f"reweighted: power must be at least 1, got {power}")
    return Reweighted(base, float(power))
