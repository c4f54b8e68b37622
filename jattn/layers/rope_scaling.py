"""Rules that stretch rotary frequencies beyond the length that a model was trained at.

With f_m = base^(-2m/d), m = 0 .. d/2 - 1, s the factor and L0 the original training length, each rule gives new
frequencies and a factor c that multiplies cos and sin of queries and keys (so that logits grow by c^2). Frequencies
are computed on the host in float64; a rule is a frozen dataclass of numbers.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np


def plain_frequencies(dim: int, base: float | int) -> np.ndarray:
    """f_m = base^(-2m/dim), float64 `[dim / 2]`."""
    return base ** (-2.0 * np.arange(dim // 2, dtype=np.float64) / dim)


def _positive(owner: object, **numbers: float | int) -> None:
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{type(owner).__name__}: {name} must be positive, got {number}")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Base of the rules; as it stands, the rule that changes nothing."""

    def frequencies(self, dim: int, base: float | int) -> tuple[np.ndarray, float]:
        """Frequencies and attention factor.

        Args:
            dim: d, the number of rotated channels.
            base: of the frequencies.

        Returns:
            float64 `[d / 2]`, and c.
        """
        return plain_frequencies(dim, base), 1.0


@dataclasses.dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """Position interpolation: f_m / s, the same as positions / s.

    Args:
        factor: s.

    Raises:
        ValueError: the factor is not positive.

    Example:
        >>> LinearScaling(4.0).frequencies(4, 100.0)[0].tolist()
        [0.25, 0.025]

    Source: Extending Context Window of Large Language Models via Positional Interpolation (arXiv 2306.15595).
    """

    factor: float | int

    def __post_init__(self) -> None:
        _positive(self, factor=self.factor)

    def frequencies(self, dim: int, base: float | int) -> tuple[np.ndarray, float]:
        """Frequencies divided by the factor; c = 1."""
        return plain_frequencies(dim, base) / self.factor, 1.0


@dataclasses.dataclass(frozen=True)
class NtkScaling(RopeScaling):
    """NTK-aware: base' = base * s^(d / (d - 2)); the highest frequency stays, the lowest is divided by s.

    Args:
        factor: s.

    Raises:
        ValueError: the factor is not positive.

    Example:
        >>> NtkScaling(4.0).frequencies(4, 100.0)[0].round(6).tolist()
        [1.0, 0.025]

    Source: NTK-aware scaled RoPE, described in YaRN (arXiv 2309.00071).
    """

    factor: float | int

    def __post_init__(self) -> None:
        _positive(self, factor=self.factor)

    def frequencies(self, dim: int, base: float | int) -> tuple[np.ndarray, float]:
        """Frequencies of the larger base; c = 1."""
        if dim <= 2:
            raise ValueError(f"rotary_dim must be more than 2 for NTK scaling, got {dim}")
        return plain_frequencies(dim, base * self.factor ** (dim / (dim - 2))), 1.0


@dataclasses.dataclass(frozen=True)
class DynamicNtkScaling(RopeScaling):
    """Dynamic NTK: base' = base * (s L / L0 - (s - 1))^(d / (d - 2)) with L = max(length, L0).

    `length` is fixed when the rule is made, at the longest sequence to come: with a length that grows, cached keys
    would have been rotated with frequencies that no longer hold.

    Args:
        factor: s.
        original_length: L0.
        length: the longest sequence.

    Raises:
        ValueError: a number is not positive, or s L / L0 - (s - 1) is not.

    Example:
        >>> rule = DynamicNtkScaling(1.0, original_length=16, length=64)
        >>> bool((rule.frequencies(8, 1e4)[0] == NtkScaling(4.0).frequencies(8, 1e4)[0]).all())
        True

    Source: dynamic NTK scaling, described in YaRN (arXiv 2309.00071); the rule of published implementations.
    """

    factor: float | int
    original_length: int
    length: int

    def __post_init__(self) -> None:
        _positive(self, factor=self.factor, original_length=self.original_length, length=self.length)

    def frequencies(self, dim: int, base: float | int) -> tuple[np.ndarray, float]:
        """Frequencies of the larger base; c = 1."""
        ratio = max(self.length, self.original_length) / self.original_length
        return NtkScaling(self.factor * ratio - (self.factor - 1)).frequencies(dim, base)


@dataclasses.dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """YaRN: high frequencies stay, low ones are divided by s, a ramp lies between; logits grow by c^2.

    dim(r) = d ln(L0 / (2 pi r)) / (2 ln base), lo = dim(beta_fast), hi = dim(beta_slow) (floor and ceil if `truncate`),
    ramp_m = clip((m - lo) / (hi - lo), 0, 1), f'_m = (1 - ramp_m) f_m + ramp_m f_m / s; c = 0.1 ln s + 1.

    Args:
        factor: s.
        original_length: L0.
        beta_fast: turns within L0 above which a frequency stays.
        beta_slow: turns within L0 below which a frequency is divided by s.
        truncate: round lo down and hi up.
        attention_factor: c itself, instead of the rule.
        mscale: with `mscale_all_dim`, c = (0.1 mscale ln s + 1) / (0.1 mscale_all_dim ln s + 1).
        mscale_all_dim: see `mscale`.
        ramp: `"dims"`, as above, is what checkpoints use; `"turns"` is the paper's, linear in L0 f_m / (2 pi).

    Raises:
        ValueError: a number is not positive, only one of the mscales is given, or an unknown ramp.

    Example:
        >>> round(YarnScaling(32.0, 2048).frequencies(64, 1e4)[1], 5)
        1.34657

    Source: YaRN: Efficient Context Window Extension of Large Language Models (arXiv 2309.00071); rounding, mscale and
    the ramp over dimensions follow published implementations.
    """

    factor: float | int
    original_length: int
    beta_fast: float | int = 32.0
    beta_slow: float | int = 1.0
    truncate: bool = True
    attention_factor: float | int | None = None
    mscale: float | int | None = None
    mscale_all_dim: float | int | None = None
    ramp: str = "dims"

    def __post_init__(self) -> None:
        _positive(
            self,
            factor=self.factor,
            original_length=self.original_length,
            beta_fast=self.beta_fast,
            beta_slow=self.beta_slow,
        )
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"YarnScaling: beta_fast must exceed beta_slow, got {self.beta_fast} and {self.beta_slow}")
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError("YarnScaling: mscale and mscale_all_dim are given together or not at all")
        if self.ramp not in ("dims", "turns"):
            raise ValueError(f"YarnScaling: ramp must be 'dims' or 'turns', got {self.ramp!r}")

    def bounds(self, dim: int, base: float | int) -> tuple[float, float]:
        """(lo, hi): the channels between which the ramp runs."""

        def channel(turns: float | int) -> float:
            return dim * math.log(self.original_length / (2 * math.pi * turns)) / (2 * math.log(base))

        low, high = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0.0), min(high, dim - 1.0)
        return float(low), high + 0.001 if low == high else float(high)

    def frequencies(self, dim: int, base: float | int) -> tuple[np.ndarray, float]:
        """Blended frequencies, and c."""
        plain = plain_frequencies(dim, base)
        if self.ramp == "dims":
            low, high = self.bounds(dim, base)
            share = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
        else:
            turns = self.original_length * plain / (2 * math.pi)
            share = 1.0 - np.clip((turns - self.beta_slow) / (self.beta_fast - self.beta_slow), 0.0, 1.0)
        return (1 - share) * plain + share * plain / self.factor, self._attention_factor()

    def _attention_factor(self) -> float:
        if self.attention_factor is not None:
            return float(self.attention_factor)
        log = math.log(self.factor) if self.factor > 1 else 0.0
        if self.mscale is None or self.mscale_all_dim is None:
            return 0.1 * log + 1.0
        return (0.1 * self.mscale * log + 1.0) / (0.1 * self.mscale_all_dim * log + 1.0)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """Llama 3: short wavelengths stay, long ones are divided by s, in between a blend.

    l = 2 pi / f_m; l < L0 / high: f_m; l > L0 / low: f_m / s; else g = (L0 / l - low) / (high - low) and
    (1 - g) f_m / s + g f_m.

    Args:
        factor: s.
        original_length: L0.
        low_frequency_factor: low.
        high_frequency_factor: high.

    Raises:
        ValueError: a number is not positive, or high <= low.

    Example:
        >>> Llama3Scaling().frequencies(8, 5e5)[0].shape
        (4,)

    Source: The Llama 3 Herd of Models (arXiv 2407.21783); the rule of the published implementation.
    """

    factor: float | int = 8.0
    original_length: int = 8192
    low_frequency_factor: float | int = 1.0
    high_frequency_factor: float | int = 4.0

    def __post_init__(self) -> None:
        _positive(
            self,
            factor=self.factor,
            original_length=self.original_length,
            low_frequency_factor=self.low_frequency_factor,
        )
        if self.high_frequency_factor <= self.low_frequency_factor:
            raise ValueError(
                f"Llama3Scaling: high_frequency_factor must exceed low_frequency_factor, got "
                f"{self.high_frequency_factor} and {self.low_frequency_factor}"
            )

    def frequencies(self, dim: int, base: float | int) -> tuple[np.ndarray, float]:
        """Blended frequencies; c = 1."""
        plain = plain_frequencies(dim, base)
        turns = self.original_length * plain / (2 * math.pi)
        share = (turns - self.low_frequency_factor) / (self.high_frequency_factor - self.low_frequency_factor)
        share = np.clip(share, 0.0, 1.0)
        return (1 - share) * plain / self.factor + share * plain, 1.0


@dataclasses.dataclass(frozen=True)
class LongRopeScaling(RopeScaling):
    """LongRoPE: every frequency has its own factor, f_m / e_m; c = sqrt(1 + ln(s) / ln(L0)) with s = L_max / L0.

    Args:
        factors: e, d / 2 numbers (the short or the long list of a checkpoint).
        original_length: L0.
        max_length: L_max.

    Raises:
        ValueError: a number is not positive, or the list has the wrong length.

    Example:
        >>> LongRopeScaling((1.0, 2.0), original_length=4096, max_length=4096).frequencies(4, 100.0)[0].tolist()
        [1.0, 0.05]

    Source: LongRoPE (arXiv 2402.13753); c as in the published implementation of Phi-3.
    """

    factors: tuple[float, ...]
    original_length: int
    max_length: int

    def __post_init__(self) -> None:
        _positive(self, original_length=self.original_length, max_length=self.max_length)
        _positive(self, factors=min(self.factors, default=0.0))

    def frequencies(self, dim: int, base: float | int) -> tuple[np.ndarray, float]:
        """Frequencies divided one by one, and c."""
        if len(self.factors) != dim // 2:
            raise ValueError(f"LongRopeScaling: factors must hold {dim // 2} numbers, got {len(self.factors)}")
        ratio = self.max_length / self.original_length
        factor = math.sqrt(1 + math.log(ratio) / math.log(self.original_length)) if ratio > 1 else 1.0
        return plain_frequencies(dim, base) / np.asarray(self.factors, np.float64), factor


SCALINGS: dict[str, type[RopeScaling]] = {
    "linear": LinearScaling,
    "ntk": NtkScaling,
    "dynamic_ntk": DynamicNtkScaling,
    "yarn": YarnScaling,
    "llama3": Llama3Scaling,
    "longrope": LongRopeScaling,
}
"""The rules by name, for configurations."""
