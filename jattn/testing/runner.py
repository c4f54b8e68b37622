"""Conformance of many entries, on one process or several."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from collections.abc import Iterator, Sequence

import jax

from jattn import catalog
from jattn.testing.conformance import CheckResult, check_name, checks_of, run_checks


def check_entries(names: Sequence[str], only: Sequence[str] | None = None, jobs: int = 1) -> Iterator[CheckResult]:
    """Run the checks of catalogued entries.

    Args:
        names: of the entries.
        only: names of checks; an entry whose kind does not have one goes without it. All of them if not given.
        jobs: number of processes, each with entries of its own.

    Yields:
        The results: as they come with one process, entry by entry as they finish with several.

    Raises:
        ValueError: an unknown name of an entry.

    Example:
        >>> [result.check for result in check_entries(["full_cache", "mqar"], only=["contents"])]
        ['contents']
    """
    for name in names:
        catalog.find(name)
    if jobs == 1 or len(names) == 1:
        _keep_compiled_programs()
        for name in names:
            yield from _checks(name, only)
        return
    # A process that has started XLA's threads cannot be forked safely.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(jobs, len(names)), mp_context=context) as pool:
        waiting = [pool.submit(_all_checks, name, only) for name in names]
        try:
            for done in concurrent.futures.as_completed(waiting):
                yield from done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _checks(name: str, only: Sequence[str] | None) -> Iterator[CheckResult]:
    entry = catalog.find(name)
    have = [check_name(check) for check in checks_of(entry)]
    return run_checks(entry, None if only is None else [check for check in have if check in only])


def _all_checks(name: str, only: Sequence[str] | None) -> list[CheckResult]:
    _keep_compiled_programs()
    return list(_checks(name, only))


def _keep_compiled_programs() -> None:
    """Conformance compiles many small programs; where there is a cache for them, all are worth keeping."""
    if jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
