"""Benchmark attention against its peers: same inputs, same process, calls interleaved round by round.

    python -m experiments.benchmark                    # --suite=cpu: causal, lengths 128 to 8192, all implementations
    python -m experiments.benchmark --suite=short      # T <= 512: ratio to jax.nn over 30 interleaved rounds
    python -m experiments.benchmark --suite=window     # sliding window, packed documents, GNA: time for a visible pair
    python -m experiments.benchmark --suite=memory     # temporary memory against length; nothing runs
    python -m experiments.benchmark --suite=compile    # compile time against length; nothing runs
    python -m experiments.benchmark --lengths=512,2048 --implementations="blockwise,torch sdpa" --dtype=bfloat16

Every program is compiled before anything is timed (compile times are of first compilations: the cache is off), then
called once, then timed in rounds of changing order. Printed are medians, interquartile ranges, and the ratio to jax.nn
round by round. The output folder receives a JSON file and a plot. "backward" means forward and backward together.

jax.nn holds the whole score matrix: at T = 8192 its backward pass takes most of a minute and 14 GB on two cores. It is
run all the same, once; `--max_dense_length` leaves such programs out beyond a length, and the table says so.
"""

import collections
import dataclasses
import os
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from experiments import bench_peers, plots, records, timing
from experiments.bench_peers import DENSE, PASSES, Case
from experiments.train import versions

SCHEMA = "jattn.benchmark/1"
BASE = "jax.nn"
"""What ratios are taken to."""


@dataclasses.dataclass(frozen=True)
class Suite:
    """What a suite measures.

    Args:
        kinds: of `bench_peers.Case`.
        lengths: T.
        implementations: names of `bench_peers.make`; None for all of this machine.
        rounds: interleaved rounds.
        times: whether programs run, or are compiled only.
    """

    kinds: tuple[str, ...]
    lengths: tuple[int, ...]
    implementations: tuple[str, ...] | None = None
    rounds: int = 10
    times: bool = True


SUITES = {
    "cpu": Suite(("causal",), (128, 256, 512, 1024, 2048, 4096, 8192)),
    "short": Suite(("causal", "full", "padding"), (64, 128, 256, 512), ("jattn", "jax.nn"), 30),
    "window": Suite(("causal", "window", "documents", "gna"), (16384,), ("blockwise",), 5),
    "memory": Suite(("causal", "window"), (1024, 2048, 4096, 8192, 16384), ("blockwise", "jax.nn"), times=False),
    "compile": Suite(("causal",), (1024, 2048, 4096, 8192, 16384), ("blockwise",), times=False),
}


@dataclasses.dataclass
class Row:
    """One implementation of one case in one direction."""

    case: str
    length: int
    direction: str
    implementation: str
    status: str = "ok"
    reason: str = ""
    seconds: dict[str, float] | None = None
    ratio: dict[str, float] | None = None
    """To jax.nn."""
    compile_s: float | None = None
    temp_bytes: int | None = None
    pairs: int | None = None
    ns_per_pair: float | None = None
    """Median time for a visible pair of a head and row."""
    pair_ratio: float | None = None
    """`ns_per_pair` over that of the causal case of the same implementation, length and direction."""


def measure(
    case: Case, direction: str, implementations: Sequence[str], rounds: int, times: bool, max_dense_length: int
) -> list[Row]:
    """Compile and time all implementations of one case in one direction."""
    rows, programs = [], {}
    for name in implementations:
        row = Row(case.name, case.length, direction, name, pairs=case.pairs)
        rows.append(row)
        if name.startswith(DENSE) and case.length > max_dense_length:
            row.status, row.reason = "left out", f"T is above --max_dense_length={max_dense_length}"
            continue
        try:
            programs[name] = program = bench_peers.make(name, case, direction)
            row.compile_s, row.temp_bytes = program.compile_s, program.temp_bytes
        except bench_peers.Unavailable as error:
            row.status, row.reason = "unavailable", str(error)
        except Exception as error:  # A peer that fails is a result; the others go on.
            row.status, row.reason = "failed", _first_line(error)
    if not times:
        return rows
    by_name = {row.implementation: row for row in rows}
    for name in list(programs):
        try:
            # The first call warms up; where it is slow, it is the measurement.
            first = timing.seconds(programs[name].run)
            by_name[name].seconds = {"median": first, "iqr": 0.0, "n": 1}
        except Exception as error:
            by_name[name].status, by_name[name].reason = "failed", _first_line(error)
            del programs[name]
    quick = {
        name: program.run
        for name, program in programs.items()
        if by_name[name].seconds["median"] <= timing.SLOW_SECONDS
    }
    found = timing.interleaved(quick, rounds)
    found |= {name: [by_name[name].seconds["median"]] for name in programs if name not in quick}
    for name, taken in found.items():
        row = by_name[name]
        row.seconds = timing.spread(taken)
        row.ns_per_pair = 1e9 * row.seconds["median"] / (row.pairs * case.heads * case.batch)
        row.ratio = timing.ratio(taken, found[BASE]) if BASE in found else None
    return rows


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]


def compare_pairs(rows: Sequence[Row]) -> None:
    """Fill in `pair_ratio`."""
    causal = {
        (row.implementation, row.length, row.direction): row.ns_per_pair
        for row in rows
        if row.case == "causal" and row.ns_per_pair
    }
    for row in rows:
        base = causal.get((row.implementation, row.length, row.direction))
        if base and row.ns_per_pair and row.case not in ("causal", "full", "padding"):
            row.pair_ratio = row.ns_per_pair / base


def growth(rows: Sequence[Row], value: str) -> dict[str, float]:
    """Exponent of the growth of a column in T, between the two longest lengths of each program.

    Example:
        >>> rows = [Row("causal", t, "forward", "blockwise", temp_bytes=3 * t) for t in (128, 256)]
        >>> growth(rows, "temp_bytes")
        {'blockwise causal forward': 1.0}
    """
    lines: dict[str, list[tuple[int, float]]] = collections.defaultdict(list)
    for row in rows:
        if getattr(row, value):
            lines[f"{row.implementation} {row.case} {row.direction}"].append((row.length, getattr(row, value)))
    found = {}
    for name, points in lines.items():
        if len(points) > 1:
            (short, less), (long, more) = sorted(points)[-2:]
            found[name] = round(float(np.log(more / less) / np.log(long / short)), 3)
    return found


def table(rows: Sequence[Row]) -> str:
    """All rows as text, columns aligned; a column in which nothing was measured is left out.

    Example:
        >>> print(table([Row("causal", 8, "forward", "jax.nn", seconds={"median": 0.25, "iqr": 0.0, "n": 1})]))
        case    T  pass     implementation  time    iqr    n
        causal  8  forward  jax.nn          250 ms  0.0 s  1
    """

    def duration(value: float | None) -> str:
        if value is None:
            return ""
        scale, unit = next(((s, u) for s, u in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")) if value >= s), (1.0, "s"))
        return f"{value / scale:.3g} {unit}" if value else "0.0 s"

    def of(found: Mapping[str, float] | None, name: str) -> Any:
        return None if found is None else found[name]

    def shown(row: Row) -> list[str]:
        ratio = "" if row.ratio is None else f"{row.ratio['median']:.3f} ± {row.ratio['iqr']:.3f}"
        count = of(row.seconds, "n")
        return [
            row.case,
            str(row.length),
            row.direction,
            row.implementation,
            duration(of(row.seconds, "median")),
            duration(of(row.seconds, "iqr")),
            "" if count is None else str(count),
            ratio,
            duration(row.compile_s),
            "" if row.temp_bytes is None else f"{row.temp_bytes / 1e6:.1f} MB",
            "" if row.ns_per_pair is None else f"{row.ns_per_pair:.3f}",
            "" if row.pair_ratio is None else f"{row.pair_ratio:.2f}",
            "" if row.status == "ok" else f"{row.status}: {row.reason}",
        ]

    heads = ["case", "T", "pass", "implementation", "time", "iqr", "n", f"x {BASE}", "compile", "temporary"]
    lines = [[*heads, "ns/pair", "x causal", "remark"], *map(shown, rows)]
    kept = [place for place in range(len(lines[0])) if any(line[place] for line in lines[1:])]
    widths = {place: max(len(line[place]) for line in lines) for place in kept}
    return "\n".join("  ".join(line[place].ljust(widths[place]) for place in kept).rstrip() for line in lines)


def draw(rows: Sequence[Row], path: pathlib.Path, value: str, label: str) -> None:
    """Plot a column against the length, both axes logarithmic, a panel for each direction."""
    directions = [name for name in PASSES if any(row.direction == name for row in rows)]
    figure, axes = plots.panels(directions, 4.6)
    series = list(dict.fromkeys((row.implementation, row.case) for row in rows))
    cases = {row.case for row in rows}
    for direction in directions:
        for place, (name, case) in enumerate(series):
            points = []
            for row in rows:
                if (row.implementation, row.case, row.direction) == (name, case, direction):
                    number = getattr(row, value)
                    number = number["median"] if isinstance(number, dict) else number
                    points += [(row.length, number)] if number else []
            if points:
                text = f"{name}, {case}" if len(cases) > 1 else name
                style = {"color": plots.COLORS[place % 10], "marker": plots.MARKERS[place % 10]}
                axes[direction].plot(*zip(*sorted(points), strict=True), label=text, **style)
        title = "forward" if direction == "forward" else "forward and backward"
        axes[direction].set(xscale="log", yscale="log", xlabel="length T", ylabel=label, title=title)
        axes[direction].grid(alpha=0.3, which="both")
        if axes[direction].lines:
            axes[direction].legend(fontsize=8)
    plots.save(figure, path)


def run(values: Any) -> dict[str, Any]:
    """Run a suite as the flags say, print it, write it; returns what the JSON file holds.

    Raises:
        ValueError: an unknown suite, direction or implementation.
    """
    suite = SUITES[values.suite]
    lengths = [int(length) for length in values.lengths] or list(suite.lengths)
    implementations = list(values.implementations) or list(suite.implementations or bench_peers.names())
    known = ["jattn", *bench_peers.names()]
    for name in implementations:
        if name not in known:
            raise ValueError(f"unknown implementation {name!r}; this machine has: {', '.join(known)}")
    for direction in values.passes:
        if direction not in PASSES:
            raise ValueError(f"passes must be among {', '.join(PASSES)}, got {direction!r}")
    rows: list[Row] = []
    for length in lengths:
        for kind in suite.kinds:
            case = Case(
                kind,
                length,
                values.batch,
                values.heads,
                values.kv_heads or values.heads,
                values.dim,
                values.dtype,
                values.window,
            )
            for direction in values.passes:
                logging.info("%s, T = %d, %s", case.name, length, direction)
                rounds = values.rounds or suite.rounds
                rows += measure(case, direction, implementations, rounds, suite.times, values.max_dense_length)
                print(table(rows[-len(implementations) :]), file=sys.stderr, flush=True)
    compare_pairs(rows)
    results = {
        "schema": SCHEMA,
        "suite": values.suite,
        "command": shlex.join(["python", "-m", "experiments.benchmark", *sys.argv[1:]]),
        "versions": versions() | ({"torch": _torch_version()} if _torch_version() else {}),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "threads": values.threads,
        "sizes": {name: getattr(values, name) for name in ("batch", "heads", "kv_heads", "dim", "dtype", "window")},
        "growth": {name: growth(rows, name) for name in ("temp_bytes", "compile_s")},
        "rows": rows,
    }
    folder = pathlib.Path(values.output)
    records.write_json(folder / f"{values.suite}.json", results)
    value, label = {
        "memory": ("temp_bytes", "temporary memory (bytes)"),
        "compile": ("compile_s", "compile time (s)"),
    }.get(values.suite, ("seconds", "time (s)"))
    draw(rows, folder / f"{values.suite}.png", value, label)
    print(table(rows))
    if not suite.times:
        print(f"\ngrowth in T between the two longest lengths, as an exponent: {results['growth']}")
    print(f"\nwritten: {folder / values.suite}.json, .png")
    return results


def _torch_version() -> str:
    from importlib import metadata

    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of this script; a function, so that several scripts can be imported into one process."""

    def whole(name: str, default: int | None, meaning: str) -> None:
        flags.DEFINE_integer(name, default, meaning, lower_bound=1, flag_values=values)

    flags.DEFINE_enum("suite", "cpu", list(SUITES), "what to measure; see above", flag_values=values)
    flags.DEFINE_list("lengths", [], "lengths T; those of the suite if not given", flag_values=values)
    known = "jattn (its own choice), " + ", ".join(["blockwise", "reference", "jax.nn", "torch sdpa", "torch flex"])
    flags.DEFINE_list("implementations", [], f"some of: {known}; on GPUs also jax.nn cudnn", flag_values=values)
    flags.DEFINE_list("passes", list(PASSES), "forward, backward (which is forward and backward)", flag_values=values)
    whole("batch", 1, "batch rows B")
    whole("heads", 8, "query heads N")
    whole("kv_heads", None, "key-value heads K; as many as query heads if not given")
    whole("dim", 64, "width of a head D")
    flags.DEFINE_string("dtype", "float32", "of query, key and value", flag_values=values)
    whole("window", 256, "window, shortest document, or size of the neighborhood (a square number)")
    whole("rounds", None, "interleaved rounds; the suite's number if not given")
    whole("max_dense_length", 8192, "leave out programs that hold the whole score matrix beyond this length")
    whole("threads", os.cpu_count() or 1, "threads of PyTorch; those of JAX are all cores")
    flags.DEFINE_string("output", "results/benchmark", "output folder", flag_values=values)


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    jax.config.update("jax_enable_compilation_cache", False)
    if any(name.startswith("torch") for name in values.implementations or bench_peers.names()):
        try:
            import torch

            torch.set_num_threads(values.threads)
        except ImportError:
            logging.info("torch is not installed; its rows are left out")
    try:
        run(values)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    flags.FLAGS.set_default("verbosity", logging.WARNING)
    app.run(main)
