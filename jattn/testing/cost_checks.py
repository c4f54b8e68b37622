"""Conformance of the declared cost: what is compiled must grow as the entry says. Nothing is timed."""

from __future__ import annotations

from typing import Any

import jax

from jattn.mechanisms.entry import Entry, growth
from jattn.testing.compiling import usual_options
from jattn.testing.jaxprs import count_program
from jattn.testing.subject import Call, build
from jattn.testing.workbench import Failed, NotApplicable, Workbench

LENGTHS = (1024, 4096)
"""T and 4 T: long enough for the leading term to lead, and for the engines to take their long-sequence paths."""

SLACK = 1.4
"""Lower-order terms may bend a ratio of growth by this factor; the next declarable growth is a factor 2 away."""


def _declared(entry: Entry, what: str) -> tuple[str, float]:
    """The declared growth, and how many times it grows from T to 4 T."""
    if entry.cost is None:
        raise NotApplicable("it declares no cost")
    short, long = LENGTHS
    expression = getattr(entry.cost, what)
    return expression, growth(expression, long) / growth(expression, short)


def _traced(bench: Workbench) -> tuple[tuple[Call, Any], tuple[Call, Any]]:
    """Calls at both lengths with their traced programs; tracing is what both checks have in common."""

    def make() -> Any:
        calls = [build(bench.entry, bench.pattern, length, key_length=length) for length in LENGTHS]
        return tuple((call, jax.jit(call.function).trace(call.arrays, {})) for call in calls)

    return bench.once("cost", make)


def check_work(bench: Workbench) -> str:
    """Floating-point work at T and 4 T, counted from the program and not timed, grows as declared."""
    expression, declared = _declared(bench.entry, "flops")
    short, long = (count_program(traced.jaxpr, call.arrays) for call, traced in _traced(bench))
    if not short:
        raise NotApplicable("it computes no floats")
    ratio = long / short
    if not declared / SLACK <= ratio <= declared * SLACK:
        raise Failed(
            f"work grows {ratio:.2f} times from T = {LENGTHS[0]} to {LENGTHS[1]}, {expression!r} is "
            f"{declared:.2f} times"
        )
    return f"x{ratio:.2f}, declared x{declared:.2f}"


def check_memory(bench: Workbench) -> str:
    """Temporary memory of the compiled forward program grows from T to 4 T by no more than declared."""
    expression, declared = _declared(bench.entry, "memory")
    programs = [traced.lower().compile(usual_options()) for _, traced in _traced(bench)]
    short, long = (int(program.memory_analysis().temp_size_in_bytes) for program in programs)
    if long > declared * SLACK * max(short, 1):
        raise Failed(
            f"temporary memory grows {long / max(short, 1):.2f} times from T = {LENGTHS[0]} ({short} bytes) to "
            f"{LENGTHS[1]} ({long} bytes), {expression!r} is {declared:.2f} times"
        )
    return f"{short} to {long} bytes"
