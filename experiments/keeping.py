"""Long tables that can be stopped: each cell is computed once and kept, and what is under way is told."""

import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax

from experiments import records
from jattn import __version__


def key_of(cell: Any) -> str:
    """Hash of a configuration, and of what it is computed with."""
    device = jax.devices()[0].device_kind
    found = records.to_json({"cell": cell, "jattn": __version__, "jax": jax.__version__, "device": device})
    return hashlib.sha256(found.encode()).hexdigest()[:16]


def reason_of(error: Exception) -> str:
    """An error in a line, without what JAX and jaxtyping say behind it."""
    return f"{type(error).__name__}: {error}".split("\n--------------------")[0].strip()[:500]


class Progress:
    """What runs, what came out, how long the rest takes."""

    def __init__(self, total: int) -> None:
        self._total, self._left, self._done = total, total, 0
        self._started, self._spent = time.perf_counter(), 0.0
        self._live = sys.stderr.isatty()

    def skip(self) -> None:
        """Count a cell that needs no work."""
        self._left -= 1

    def doing(self, text: str) -> None:
        """Show a passing state, on a terminal only."""
        if self._live:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def done(self, number: int, text: str, seconds: float) -> None:
        """Show a finished cell with the time that the others may take."""
        self._left, self._done, self._spent = self._left - 1, self._done + 1, self._spent + seconds
        minutes, rest = divmod(round(self._left * self._spent / self._done), 60)
        self.say(f"[{number:>2}/{self._total}] {text}, {seconds:.0f} s; ETA {minutes}:{rest:02d}")

    def say(self, text: str) -> None:
        """Print a line that stays."""
        print(f"\r\033[K{text}" if self._live else text, file=sys.stderr, flush=True)

    @property
    def minutes(self) -> float:
        """Minutes since the beginning."""
        return (time.perf_counter() - self._started) / 60


def kept(path: pathlib.Path, columns: Collection[str]) -> dict[str, Any] | None:
    """A cell of an earlier run, if it is there and whole."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["outcome"]
    except (OSError, ValueError, KeyError):
        return None
    return found if set(columns) <= set(found) else None


def compute(
    cells: Sequence[Any],
    paths: Sequence[pathlib.Path],
    run_cell: Callable[[Any, Callable[[str], None]], dict[str, Any]],
    *,
    columns: Collection[str],
    name: Callable[[Any], str],
    line: Callable[[dict[str, Any]], str],
    minutes: float | None = None,
    fresh: bool = False,
) -> tuple[list[dict[str, Any]], Progress]:
    """Compute the cells whose files are missing, in order, and write each when it is finished.

    Args:
        cells: what to compute.
        paths: where each is kept.
        run_cell: `(cell, report) -> outcome` with a key `"status"`; one that failed is not kept.
        columns: the keys that a kept outcome must have.
        name: of a cell, while it runs.
        line: of an outcome.
        minutes: no cell is begun after so many minutes; what is missing is computed by the next run.
        fresh: compute again what is there.

    Returns:
        The outcomes, kept and computed, and the progress, to say the last line with.
    """
    progress, outcomes = Progress(len(cells)), []
    present = {} if fresh else {path: found for path in paths if (found := kept(path, columns)) is not None}
    for _ in present:
        progress.skip()
    if present:
        progress.say(f"{len(present)} of {len(cells)} cells are in {paths[0].parent} already")
    late = 0
    try:
        for number, (cell, path) in enumerate(zip(cells, paths, strict=True), 1):
            if path in present:
                outcomes.append(present[path])
                continue
            if minutes is not None and progress.minutes >= minutes:
                late += 1
                continue
            title, began = f"[{number:>2}/{len(cells)}] {name(cell)}", time.perf_counter()
            progress.doing(f"{title}: compiling")
            outcome = run_cell(cell, lambda text, title=title: progress.doing(f"{title}: {text}"))
            # Through JSON and back, so that a cell reads the same whether it was kept or computed.
            outcome = json.loads(records.to_json(outcome))
            if outcome["status"] != "failed":
                records.write_json(path, {"cell": cell, "outcome": outcome})
            outcomes.append(outcome)
            progress.done(number, line(outcome), time.perf_counter() - began)
    except KeyboardInterrupt:
        progress.say("stopped; the same command goes on from here")
    if late:
        progress.say(f"{late} cells were not begun within {minutes:g} minutes; the same command goes on from here")
    return outcomes, progress
