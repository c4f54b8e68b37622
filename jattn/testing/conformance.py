"""The conformance suite: what a mechanism promises by its kind, checked one promise at a time.

    for result in run_checks(entry):
        print(result)

An entry may be exempt from a check, with a reason; the reason is printed wherever the result is.
"""

from __future__ import annotations

import dataclasses
import difflib
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jattn.mechanisms.entry import KINDS, Entry
from jattn.testing import attention_checks, cost_checks, other_checks, recurrence_checks, transform_checks, value_checks
from jattn.testing.subject import attends
from jattn.testing.workbench import Failed, NotApplicable, Workbench

PASSED, FAILED, EXEMPT, NOT_APPLICABLE = "passed", "failed", "exempt", "not applicable"


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """What one check found about one entry.

    Args:
        entry: name of the entry.
        check: name of the check.
        status: "passed", "failed", "exempt" or "not applicable".
        detail: the fault, the reason, or a remark.
        seconds: how long it took.

    Example:
        >>> print(CheckResult("ssa", "shapes", "passed", "4 patterns", 0.25))
        ssa shapes: passed (4 patterns)
    """

    entry: str
    check: str
    status: str
    detail: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.entry} {self.check}: {self.status}" + (f" ({self.detail})" if self.detail else "")


Check = Callable[[Any], str]

ATTENTION: tuple[Check, ...] = (
    attention_checks.check_shapes,
    attention_checks.check_gradients,
    attention_checks.check_derivative,
    attention_checks.check_determinism,
    attention_checks.check_empty_rows,
    attention_checks.check_poison,
    attention_checks.check_lengths,
    attention_checks.check_truncation,
    attention_checks.check_causality,
    attention_checks.check_patterns,
    attention_checks.check_permutation,
    transform_checks.check_jit,
    transform_checks.check_vmap,
    transform_checks.check_export,
    transform_checks.check_forward_mode,
    transform_checks.check_precision,
    transform_checks.check_decode,
    cost_checks.check_work,
    cost_checks.check_memory,
)

FUNCTION: tuple[Check, ...] = (
    attention_checks.check_gradients,
    attention_checks.check_derivative,
    attention_checks.check_determinism,
    transform_checks.check_jit,
    transform_checks.check_vmap,
    transform_checks.check_export,
    transform_checks.check_forward_mode,
    transform_checks.check_precision,
    cost_checks.check_work,
    cost_checks.check_memory,
)
"""What every pure function of arrays promises, whatever it is for."""

CHECKS: dict[str, tuple[Check, ...]] = {
    **dict.fromkeys(KINDS, FUNCTION),
    "mask": value_checks.MASK,
    "score_mod": value_checks.SCORE_MOD,
    "normalizer": value_checks.NORMALIZER,
    "pooling": (*FUNCTION, *other_checks.POOLING),
    "task": other_checks.TASK,
    "cache": other_checks.CACHE,
}
"""The checks of the kinds; whatever attends faces `ATTENTION`, of whichever kind it is, recurrences more."""


def check_name(check: Check) -> str:
    """The name of a check, which `exempt` and the command line use.

    Example:
        >>> check_name(attention_checks.check_empty_rows)
        'empty_rows'
    """
    return check.__name__.removeprefix("check_")


def checks_of(entry: Entry) -> tuple[Check, ...]:
    """The checks that an entry faces: those of attention if it attends, else those of its kind.

    Example:
        >>> from jattn import catalog
        >>> [check_name(check) for check in checks_of(catalog.find("mqar"))]
        ['batches', 'loss']
    """
    if not attends(entry):
        return CHECKS[entry.kind]
    return (*ATTENTION, *recurrence_checks.RECURRENCE) if entry.kind == "recurrence" else ATTENTION


def run_checks(entry: Entry, only: Iterable[str] | None = None) -> Iterator[CheckResult]:
    """Check an entry against everything that its kind promises, one result at a time.

    Args:
        entry: the entry, from the catalogue or of your own.
        only: names of checks; all of them if not given.

    Yields:
        The results, in the order of the checks.

    Raises:
        ValueError: `only` names a check that this kind does not have.

    Example:
        >>> from jattn import catalog
        >>> print(next(run_checks(catalog.find("full_cache"), only=["contents"])))
        full_cache contents: passed (...)
    """
    checks = {check_name(check): check for check in checks_of(entry)}
    wanted = list(checks) if only is None else list(only)
    for name in wanted:
        if name not in checks:
            raise ValueError(f"unknown check {name!r} for a {entry.kind}; there are: {', '.join(checks)}")
    for name in entry.exempt:
        if name not in checks:
            near = difflib.get_close_matches(name, checks, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(checks)}"
            yield CheckResult(
                entry.name, name, FAILED, f"exempt names a check that a {entry.kind} does not have; {hint}"
            )
    bench = Workbench(entry)
    for name in wanted:
        if name in entry.exempt:
            yield CheckResult(entry.name, name, EXEMPT, entry.exempt[name])
        else:
            yield _run(bench, name, checks[name])


def _run(bench: Workbench, name: str, check: Check) -> CheckResult:
    start = time.perf_counter()
    try:
        status, detail = PASSED, check(bench)
    except NotApplicable as reason:
        status, detail = NOT_APPLICABLE, str(reason)
    except Failed as fault:
        status, detail = FAILED, str(fault)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        status, detail = FAILED, f"{type(error).__name__}: {error} [{where.filename}:{where.lineno}]"
    return CheckResult(bench.entry.name, name, status, detail, time.perf_counter() - start)


def check_mechanism(entry: Entry, only: Iterable[str] | None = None) -> list[CheckResult]:
    """Check an entry against everything that its kind promises.

    Args:
        entry: the entry, from the catalogue or of your own.
        only: names of checks; all of them if not given.

    Returns:
        The results, in the order of the checks.

    Raises:
        ValueError: `only` names a check that this kind does not have.

    Example:
        >>> from jattn import catalog
        >>> [result.status for result in check_mechanism(catalog.find("full_cache"), only=["contents"])]
        ['passed']
    """
    return list(run_checks(entry, only))


def assert_conforms(entry: Entry, only: Iterable[str] | None = None) -> list[CheckResult]:
    """Assert that an entry passes every check that it is not exempt from.

    Args:
        entry: the entry, from the catalogue or of your own.
        only: names of checks; all of them if not given.

    Returns:
        The results, for those who want to print them.

    Raises:
        AssertionError: a check failed; the message holds all that did.

    Example:
        >>> from jattn import catalog
        >>> results = assert_conforms(catalog.find("full_cache"))
    """
    results = check_mechanism(entry, only)
    failed = [result for result in results if result.status == FAILED]
    if failed:
        raise AssertionError("\n".join(map(str, failed)))
    return results
