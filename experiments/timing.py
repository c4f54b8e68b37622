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
    """A program to measure: `call()` starts it, what it returns can be waited for; the times that one run took.

    `calls` of them are started before anything is waited for, and each call makes `runs` runs: what a GPU does in
    microseconds would otherwise be lost in the time of starting it. A device runs what it is given in order.
    """

    name: str
    call: Callable[[], Any]
    compile_s: float | None = None
    temp_bytes: int | None = None
    times: list[float] = dataclasses.field(default_factory=list)
    calls: int = 1
    runs: int = 1

    def measure(self) -> float:
        """Seconds of one run."""
        start = time.perf_counter()
        result = None
        for _ in range(self.calls):
            result = self.call()
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / (self.calls * self.runs)


def compiled(name: str, function: Callable[..., Any], *arguments: Any) -> Subject:
    """Compile a JAX function anew (no cache on disk) and note what the compiler says about it."""
    start = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    used = None if memory is None else int(memory.temp_size_in_bytes)
    return Subject(name, lambda: program(*arguments), seconds, used)


def repeated(function: Callable[..., Any], runs: int) -> Callable[..., Any]:
    """A function that runs another one `runs` times in one program, each run after the one before it."""

    def run(*arrays: Any) -> Any:
        def once(_: Any, carry: Any) -> Any:
            # The compiler must not see that all runs are the same one, nor take a part of them out of the loop.
            return jax.lax.optimization_barrier((carry[0], function(*carry[0])))

        shapes = jax.eval_shape(function, *arrays)
        empty = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), shapes)
        return jax.lax.fori_loop(0, runs, once, (arrays, empty))[1]

    return run


def calibrate(subjects: Sequence[Subject], seconds: float) -> None:
    """Let every subject make as many calls at a time as fit into `seconds`; each must have run before."""
    for subject in subjects:
        subject.calls = 1
        subject.calls = max(1, min(1000, round(seconds / (subject.measure() * subject.runs))))


def interleave(subjects: Sequence[Subject], rounds: int, *, warm: bool = True) -> None:
    """Run every subject once a round, in turn, after one unmeasured round if `warm`."""
    for number in range(-1 if warm else 0, rounds):
        for subject in subjects:
            gc.collect()
            seconds = subject.measure()
            if number >= 0:
                subject.times.append(seconds)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.percentile(np.asarray(values), [25, 50, 75])
    return {"median": float(median), "q25": float(low), "q75": float(high), "min": float(min(values))}


def ratio(subject: Subject, baseline: Subject) -> dict[str, float]:
    """Spread of the round-by-round ratios of two subjects that were run in turn."""
    return spread(np.asarray(subject.times) / np.asarray(baseline.times))
