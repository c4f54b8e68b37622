"""Timing several programs against each other: interleaved, so that what else the machine does hits all of them."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

SLOW_SECONDS = 3.0
"""A call that takes longer is measured once: its spread is small against the differences in question."""


def seconds(call: Callable[[], Any]) -> float:
    """Time of one call, which must wait for its result itself."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int, budget: float = 60.0) -> dict[str, list[float]]:
    """Time all calls round by round, each round in another order.

    Args:
        calls: what to time, by name; compiled and warm, and waiting for its result.
        rounds: how many times each.
        budget: seconds for all rounds; where they would take longer there are fewer, but at least three.

    Returns:
        Times by name; equal places belong to one round.

    Example:
        >>> times = interleaved({"a": lambda: None, "b": lambda: None}, rounds=4)
        >>> {name: len(found) for name, found in times.items()}
        {'a': 4, 'b': 4}
    """
    names, order = list(calls), np.random.default_rng(0)
    times: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    for number in range(rounds):
        if number >= 3 and (time.perf_counter() - started) * (number + 1) / number > budget:
            break
        for place in order.permutation(len(names)):
            times[names[place]].append(seconds(calls[names[place]]))
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, interquartile range and number of values.

    Example:
        >>> spread([1.0, 2.0, 3.0])
        {'median': 2.0, 'iqr': 1.0, 'n': 3}
    """
    low, middle, high = np.percentile(np.asarray(values, np.float64), [25, 50, 75])
    return {"median": float(middle), "iqr": float(high - low), "n": len(values)}


def ratio(times: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """How many times longer: the spread of the ratios of single rounds, or the ratio of medians where lengths differ.

    Example:
        >>> ratio([2.0, 4.0], [1.0, 2.0])
        {'median': 2.0, 'iqr': 0.0, 'n': 2}
    """
    if len(times) == len(others):
        return spread(np.asarray(times) / np.asarray(others))
    return {"median": float(np.median(times) / np.median(others)), "iqr": 0.0, "n": 1}
