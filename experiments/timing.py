"""Measuring programs side by side: compiled first, then run in turn, so that a noisy machine disturbs all alike."""

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass
class Subject:
    """A program to measure: `call()` runs it to the end; what is known before it runs, and the times it took."""

    name: str
    call: Callable[[], Any]
    compile_s: float | None = None
    temp_bytes: int | None = None
    times: list[float] = dataclasses.field(default_factory=list)


def compiled(name: str, function: Callable[..., Any], *arguments: Any) -> Subject:
    """Compile a JAX function anew (no cache on disk) and note what the compiler says about it."""
    start = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    used = None if memory is None else int(memory.temp_size_in_bytes)
    return Subject(name, lambda: jax.block_until_ready(program(*arguments)), seconds, used)


def interleave(subjects: Sequence[Subject], rounds: int, *, warm: bool = True) -> None:
    """Run every subject once a round, in turn, after one unmeasured round if `warm`."""
    for number in range(-1 if warm else 0, rounds):
        for subject in subjects:
            gc.collect()
            start = time.perf_counter()
            subject.call()
            if number >= 0:
                subject.times.append(time.perf_counter() - start)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.percentile(np.asarray(values), [25, 50, 75])
    return {"median": float(median), "q25": float(low), "q75": float(high), "min": float(min(values))}


def ratio(subject: Subject, baseline: Subject) -> dict[str, float]:
    """Spread of the round-by-round ratios of two subjects that were run in turn."""
    return spread(np.asarray(subject.times) / np.asarray(baseline.times))
