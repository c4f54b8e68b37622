"""Constant decays of heads: which head forgets how fast, by fixed rules.

    alibi      slope_h = 2^(-8 (h + 1) / N), N a power of two           ALiBi; see `alibi_slopes` for other N
    retention  exp(log_decay_h) = 1 - 2^(-5 - h)                        RetNet: head 0 forgets fastest
    tnl        slope_h = alibi_h (1 - l / (L - 1) + 1e-5)               TransNormerLLM, layer l of L
               slope_h = (8 h / N) (1 - l / L)                          the rule that its second paper prints

with h = 0 .. N-1. A slope is the negative of a log decay. Everything is computed in float64.
"""

from __future__ import annotations

import numpy as np

from jattn.mechanisms.entry import Entry, Paper

SCHEDULES = ("alibi", "paper")


def alibi_slopes(num_heads: int) -> np.ndarray:
    """The slopes of N heads.

    2^(-8 n / N), n = 1 .. N, for a power of two; otherwise, P the largest power of two <= N: the slopes of P, then
    entries 0, 2, 4, ... of the slopes of 2P.

    Args:
        num_heads: N.

    Returns:
        float64 `[N]`.

    Raises:
        ValueError: N is not positive.

    Example:
        >>> alibi_slopes(4).tolist()
        [0.25, 0.0625, 0.015625, 0.00390625]

    Source: Train Short, Test Long (arXiv 2108.12409), published code for other N.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")

    def regular(heads: int) -> np.ndarray:
        return 2.0 ** (-8.0 * np.arange(1, heads + 1) / heads)

    power = 1 << (num_heads.bit_length() - 1)
    return np.concatenate([regular(power), regular(2 * power)[0::2][: num_heads - power]])


def retention_log_decay(num_heads: int) -> np.ndarray:
    """The log decays of retention, head 0 the fastest.

    log(1 - 2^(-5 - h)), h = 0 .. N-1

    Args:
        num_heads: N.

    Returns:
        float64 `[N]`, all negative.

    Raises:
        ValueError: N is not positive.

    Example:
        >>> np.exp(retention_log_decay(2)).round(6).tolist()
        [0.96875, 0.984375]

    Source: Retentive Network: A Successor to Transformer for Large Language Models (arXiv 2307.08621).
    """
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")
    return np.log1p(-(2.0 ** (-5.0 - np.arange(num_heads))))


def tnl_decay_slopes(num_heads: int, layer: int, num_layers: int, schedule: str = "alibi") -> np.ndarray:
    """The slopes of TransNormerLLM: heads as in ALiBi, and the last layer hardly forgets.

    "alibi": alibi_slopes(N)_h * (1 - l / (L - 1) + 1e-5), as published code and weights have it; 1 + 1e-5 for L = 1.
    "paper": (8 h / N) (1 - l / L), as the paper prints it. The two disagree: here head 0 never forgets, and others do
    far faster. The paper leaves open from where h and l count; 0 is an inference.

    Args:
        num_heads: N.
        layer: l, from 0.
        num_layers: L.
        schedule: "alibi" or "paper".

    Returns:
        float64 `[N]`, >= 0; the log decay is its negative.

    Raises:
        ValueError: numbers that are not positive, a layer outside of 0 .. L-1, an unknown schedule.

    Example:
        >>> tnl_decay_slopes(2, 0, 3).round(6).tolist()
        [0.062501, 0.003906]
        >>> tnl_decay_slopes(2, 1, 2, "paper").tolist()
        [0.0, 2.0]

    Source: "alibi" is the published code of TransNormerLLM (arXiv 2307.14995); "paper" equation 10 of Various Lengths,
    Constant Speed: Efficient Language Modeling with Lightning Attention (arXiv 2405.17381).
    """
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer must lie in 0 .. num_layers - 1, got {layer} and num_layers {num_layers}")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if schedule == "paper":
        return 8.0 * np.arange(num_heads) / num_heads * (1 - layer / num_layers)
    return alibi_slopes(num_heads) * (1 - layer / max(num_layers - 1, 1) + 1e-5)


def _example(key, length):
    return (4, 1, 3), {}


ENTRY = Entry(
    name="tnl_decay_slopes",
    kind="recurrence",
    family="engine",
    function=tnl_decay_slopes,
    papers=(
        Paper(
            "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention", "2405.17381", 2024
        ),
    ),
    patterns=("causal self",),
    decode="a constant",
    example=_example,
    fidelity="inferred: where the printed rule starts to count heads and layers; the default is official code",
)
