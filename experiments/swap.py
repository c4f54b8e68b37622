"""Put other attention mechanisms into a trained model, and see what becomes of it on real text.

    python -m experiments.swap
    python -m experiments.swap --mechanisms="window_cache:window=128,sink_window_cache:window=128,positions=original"
    python -m experiments.swap --mechanisms=moba_attention:chunk_size=64,topk=4 --layers=10:20 --tokens=1024
    python -m experiments.swap --mechanisms=window_cache:window=64 --layers=18 --heads=3,4,5
    python -m experiments.swap --mechanisms=linear_attention --tune=100

The model is SmolLM2-135M-Instruct (once: `jattn fetch smollm2`), the text the first 2,048 tokens of three articles of
Python's language reference. For every mechanism and budget: perplexity, kept attention mass, visited share, time and
temporary memory of a forward pass. Without `--mechanisms` everything that the catalogue offers for a decoder takes
part, masks and cache policies included; what cannot run is a row with its reason.

Weights stay those of full attention, so a mechanism with parameters of its own starts from new ones. `--tune=STEPS`
distills what got worse than `--tune_above` times full attention: its swapped attention layers are trained (projections
and new parameters), all else is frozen, on prose and code of the standard library without the articles; perplexity
stands in the table before and after.

The output folder receives `results.json`, `report.html` (one file with all pictures inside), the pictures as PNG, and
one JSON file for each cell under `cells/`. A finished cell is kept under the hash of its configuration, so a run that
was stopped goes on where it stopped. A mechanism takes about a minute on two cores, a step of tuning a few seconds.
"""

import json
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import app, flags, logging

from experiments import cells as cell_module
from experiments import keeping, records, swap_cells, swap_report
from experiments.swap_cells import BLANK, Bench, Cell
from experiments.swap_tune import TuneOptions
from experiments.train import versions
from jattn.models.pretrained.packages import NotFetched
from jattn.tasks.real_qkv import articles

SCHEMA = "jattn.swap/1"


def numbers(text: str) -> list[int] | None:
    """Read layers or heads: numbers, negative ones from the end, and ranges; None for an empty text.

    Raises:
        ValueError: something else.

    Example:
        >>> numbers("0,3,10:13,-1")
        [0, 3, 10, 11, 12, -1]
    """
    found: list[int] = []
    try:
        for part in filter(None, (part.strip() for part in text.split(","))):
            first, colon, last = part.partition(":")
            found += range(int(first), int(last)) if colon else [int(first)]
    except ValueError as error:
        raise ValueError(f"{text!r} must be numbers and ranges, such as 0,3,10:20") from error
    if text.strip() and not found:
        raise ValueError(f"{text!r} names nothing")
    return found or None


def line(outcome: Mapping[str, Any]) -> str:
    """One cell in one line.

    Example:
        >>> line({"mechanism": "ssa", "status": "failed", "reason": "ValueError: no", "perplexity": None})
        'ssa: failed (ValueError: no)'
    """
    if outcome["status"] != "ok":
        return f"{outcome['mechanism']}: {outcome['status']} ({outcome['reason']})"

    def shown(value: float | None) -> str:
        return "not finite" if value is None else f"{value:.3f}"

    text = f"{outcome['mechanism']}: perplexity {shown(outcome['perplexity'])}"
    if outcome["tuned"] is not None:
        text += f" -> {shown(outcome['tuned']['perplexity'])} in {outcome['tuned']['steps']} steps"
    if outcome["kept_mass"] is not None:
        text += f", kept mass {outcome['kept_mass']:.3f}"
    return f"{text}, {outcome['forward_ratio']:.2f} times the time of full attention"


def summarize(outcomes: Sequence[Mapping[str, Any]], cells: Sequence[Cell], bench: Bench, command: str) -> dict:
    """The contents of `results.json`."""
    first = cells[0]
    return {
        "schema": SCHEMA,
        "command": command,
        "versions": versions(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "budget": {
            "model": bench.source.name,
            "text": bench.text,
            "tokens": first.length,
            "layers": first.layers,
            "heads": first.heads,
            "rounds": first.rounds,
            "tune": first.tune,
        },
        "cells": [{name: outcome[name] for name in BLANK} for outcome in outcomes],
    }


def run(
    cells: Sequence[Cell],
    bench: Bench,
    folder: pathlib.Path,
    command: str,
    minutes: float | None = None,
    fresh: bool = False,
) -> dict[str, Any]:
    """Compute the cells that the folder lacks, and write everything.

    Args:
        cells: of `bench.cells`.
        bench: the model and the text.
        folder: where everything goes.
        command: how this run was started.
        minutes: no cell is begun after so many minutes; what is missing is computed by the next run.
        fresh: compute again what is there.

    Returns:
        The contents of `results.json`.
    """
    outcomes, progress = keeping.compute(
        cells,
        [folder / "cells" / f"{cell.mechanism}-{cell.key}.json" for cell in cells],
        lambda cell, report: swap_cells.run_cell(cell, bench, report),
        columns=BLANK.keys(),
        name=lambda cell: cell.label,
        line=line,
        minutes=minutes,
        fresh=fresh,
    )
    results = json.loads(records.to_json(summarize(outcomes, cells, bench, command)))
    records.write_json(folder / "results.json", results)
    swap_report.write_report(folder / "report.html", results, swap_report.draw(results["cells"], folder))
    progress.say(f"{len(outcomes)} cells in {progress.minutes:.1f} minutes; see {folder / 'report.html'}")
    return results


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of this script; a function, so that several scripts can be imported into one process."""

    def whole(name: str, default: int, meaning: str, least: int = 1) -> None:
        flags.DEFINE_integer(name, default, meaning, lower_bound=least, flag_values=values)

    def text(name: str, default: str, meaning: str) -> None:
        flags.DEFINE_string(name, default, meaning, flag_values=values)

    def number(name: str, default: float | None, meaning: str) -> None:
        flags.DEFINE_float(name, default, meaning, flag_values=values)

    tune = TuneOptions(1)
    text(
        "mechanisms",
        "",
        "names with their options, as name:key=value,key=value,name; `python -m jattn catalog` lists them. Without it "
        "all that a decoder can hold, with a budget or several of each",
    )
    text("layers", "", "which layers are swapped, as 0,3,10:20; without it all")
    text(
        "heads", "", "which query heads of these layers, in the same way; only functions and masks can serve some alone"
    )
    whole("tokens", 2048, "length of the text", 2)
    whole("rounds", 3, "how often the forward pass is timed")
    whole("tune", 0, "steps of distillation; 0 for none", 0)
    number(
        "tune_above", tune.above, "tune what has more than so many times the perplexity of full attention; 0 for all"
    )
    whole("tune_batch", tune.batch, "texts a step of tuning")
    whole("tune_length", tune.length, "tokens of each of them", 2)
    number("tune_rate", tune.learning_rate, "peak learning rate of tuning")
    number("minutes", None, "begin no cell after so many minutes")
    text("output", "results/swap", "output folder")
    flags.DEFINE_boolean("fresh", False, "compute again the cells that the output folder holds", flag_values=values)


def chosen_cells(values: flags.FlagValues, bench: Bench) -> list[Cell]:
    """The cells that the flags ask for.

    Raises:
        ValueError: an unknown mechanism or option (the nearest ones are named), or a text that is no numbers.
    """
    requests = cell_module.parse_requests(values.mechanisms)
    for request in requests:
        cell_module.check_mechanism(request)
    tune = None
    if values.tune:
        tune = TuneOptions(
            values.tune, values.tune_above, values.tune_batch, values.tune_length, learning_rate=values.tune_rate
        )
    return bench.cells(
        requests or swap_cells.everything(values.tokens),
        layers=numbers(values.layers),
        heads=numbers(values.heads),
        rounds=values.rounds,
        tune=tune,
    )


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    # A cached program would make the compile times of a second run a lie.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        bench = Bench(swap_cells.smollm2(), articles(), values.tokens)
        cells = chosen_cells(values, bench)
    except (ValueError, NotFetched) as error:
        sys.exit(f"error: {error}")
    command = shlex.join(["python", "-m", "experiments.swap", *sys.argv[1:]])
    results = run(cells, bench, pathlib.Path(values.output), command, values.minutes, values.fresh)
    if any(cell["status"] == "failed" for cell in results["cells"]):
        sys.exit(1)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    flags.FLAGS.set_default("verbosity", logging.WARNING)
    app.run(main)
