"""Grids of cases of which a few stand for all in the fast suite."""

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_slow(cases: Iterable[Any], fast: Iterable[Any]) -> list[Any]:
    """The cases for `pytest.mark.parametrize`; those that `fast` does not hold are marked slow."""
    cases, fast = list(cases), list(fast)
    unknown = [case for case in fast if case not in cases]
    if unknown:
        raise ValueError(f"fast holds what is no case: {unknown}")
    return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in cases]
