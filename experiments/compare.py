"""Compare attention mechanisms: train each on each task under one budget, and write down what came out.

    python -m experiments.compare
    python -m experiments.compare --mechanisms=softmax_attention,linear_attention --tasks=mqar --steps=500
    python -m experiments.compare --mechanisms="ssa:form=code,moba_attention:chunk_size=8,topk=2" --tasks=prose
    python -m experiments.compare --tasks="mqar:seq_len=64,num_kv_pairs=8" --output=results/recall

The output folder receives `results.json`, `report.html` (one file with all pictures inside), the pictures as PNG, and
one JSON file for each cell (a mechanism on a task) under `cells/`. A finished cell is kept under the hash of its
configuration and not trained again, so a run that was stopped goes on where it stopped, and a mechanism that is added
later costs its own time only. Without flags: nine mechanisms on three tasks, three seeds, a few minutes on two cores.

Times are honest only on a machine that does nothing else meanwhile. The compilation cache of JAX is switched off, so
that compile times are those of a first compilation.
"""

import dataclasses
import json
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import app, flags, logging

from experiments import cells as cell_module
from experiments import keeping, plots, records, report
from experiments.cells import SETTINGS, Cell, Request
from experiments.train import versions
from experiments.training import ModelOptions, TrainOptions
from jattn import tasks

SCHEMA = "jattn.compare/1"
MECHANISMS = (
    "softmax_attention,pointwise_attention,ssa,kv_bias,gna_attention:window=8,moba_attention:chunk_size=8,topk=2,"
    "linear_attention,moh_attention,AgentAttention:grid=(4,4),num_agents=4"
)
TASKS = "mqar,prose,digits"
COLUMNS = (
    "mechanism",
    "task",
    "status",
    "reason",
    "seeds",
    "quality",
    "params",
    "step_time_s",
    "compile_s",
    "temp_bytes",
    "decode_state",
    "visited_share",
)
"""The keys of a cell in `results.json`."""


@dataclasses.dataclass(frozen=True)
class Overrides:
    """What the command line says about every task; None leaves the task's own setting."""

    steps: int | None = None
    batch: int | None = None
    learning_rate: float | None = None
    mlp_ratio: float | None = None
    position: str | None = None
    width: int = 64
    layers: int = 2
    heads: int = 2
    seeds: int = 3


def make_cells(mechanisms: Sequence[Request], chosen: Sequence[Request], overrides: Overrides) -> list[Cell]:
    """All cells of a comparison, task by task; names, options and sizes are checked.

    Raises:
        ValueError: an unknown mechanism, task or option (the nearest ones are named), or sizes that do not fit.
    """
    for request in mechanisms:
        cell_module.check_mechanism(request)
    found = []
    for wanted in chosen:
        tasks.get(wanted.name)
        setting = SETTINGS.get(wanted.name, SETTINGS["prose"])
        options = {**(setting.options if wanted.name in SETTINGS else {}), **wanted.options}
        tasks.get(wanted.name, **options)

        def value(name: str, setting: Any = setting) -> Any:
            asked = getattr(overrides, name)
            return getattr(setting, name) if asked is None else asked

        train = TrainOptions(steps=value("steps"), batch_size=value("batch"), learning_rate=value("learning_rate"))
        for request in mechanisms:
            model = ModelOptions(
                attention=request.name,
                attention_options=dict(request.options),
                width=overrides.width,
                depth=overrides.layers,
                num_heads=overrides.heads,
                mlp_ratio=value("mlp_ratio"),
                position=value("position"),
                **cell_module.START,
            )
            seeds = tuple(range(overrides.seeds))
            found.append(Cell(request.name, request.label, wanted.name, options, model, train, seeds))
    return found


def budget(cells: Sequence[Cell]) -> dict[str, Any]:
    """What all mechanisms of a comparison share."""
    first, shared = cells[0], {}
    for cell in cells:
        names = ("mlp_ratio", "position", *cell_module.START)
        model = {name: getattr(cell.model, name) for name in names}
        shared[cell.task] = {**cell.task_options, **dataclasses.asdict(cell.train), **model}
    return {
        "width": first.model.width,
        "layers": first.model.depth,
        "heads": first.model.num_heads,
        "seeds": list(first.seeds),
        "tasks": shared,
        "step_time_s": "median over steps of the program that trains all seeds side by side, over the number of seeds",
        "temp_bytes": "of the same program, and of its evaluation at the same batch size, over the number of seeds",
        "compile_s": "of the program that trains all seeds, without a cache",
        "visited_share": "pairs that masks and layouts leave over T^2, counted in a real call",
    }


def summarize(outcomes: Sequence[Mapping[str, Any]], cells: Sequence[Cell], command: str) -> dict[str, Any]:
    """The contents of `results.json`."""
    return {
        "schema": SCHEMA,
        "command": command,
        "versions": versions(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "budget": budget(cells),
        "cells": [{name: outcome[name] for name in COLUMNS} for outcome in outcomes],
    }


def line(outcome: Mapping[str, Any]) -> str:
    """One cell in one line.

    Example:
        >>> line({"mechanism": "ssa", "task": "mqar", "status": "failed", "reason": "ValueError: no", "quality": None})
        'ssa on mqar: failed (ValueError: no)'
    """
    text = f"{outcome['mechanism']} on {outcome['task']}: "
    quality = outcome["quality"]
    if quality is None:
        return f"{text}{outcome['status']} ({outcome['reason']})"
    mean = float("nan") if quality["mean"] is None else quality["mean"]
    spread = "" if quality["std"] is None else f" ± {quality['std']:.4f}"
    milliseconds = 1e3 * outcome["step_time_s"]["median"]
    text += f"{quality['metric']} {mean:.4f}{spread}, {milliseconds:.1f} ms a step and seed"
    return text if outcome["status"] == "ok" else f"{text}, {outcome['status']}"


def run(
    cells: Sequence[Cell], folder: pathlib.Path, command: str, minutes: float | None = None, fresh: bool = False
) -> dict[str, Any]:
    """Compute the cells that the folder lacks, and write everything.

    Args:
        cells: what `make_cells` gave.
        folder: where everything goes.
        command: how this run was started.
        minutes: no cell is begun after so many minutes; what is missing is computed by the next run.
        fresh: compute again what is there.

    Returns:
        The contents of `results.json`.
    """
    outcomes, progress = keeping.compute(
        cells,
        [folder / "cells" / f"{cell.task}-{cell.mechanism}-{cell.key}.json" for cell in cells],
        lambda cell, report: cell_module.run_cell(cell, report),
        columns=COLUMNS,
        name=lambda cell: f"{cell.label} on {cell.task}",
        line=line,
        minutes=minutes,
        fresh=fresh,
    )
    results = json.loads(records.to_json(summarize(outcomes, cells, command)))
    records.write_json(folder / "results.json", results)
    report.write_report(folder / "report.html", results, plots.draw(outcomes, folder))
    progress.say(f"{len(outcomes)} cells in {progress.minutes:.1f} minutes; see {folder / 'report.html'}")
    return results


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of this script; a function, so that several scripts can be imported into one process."""

    def whole(name: str, default: int | None, meaning: str) -> None:
        flags.DEFINE_integer(name, default, meaning, lower_bound=1, flag_values=values)

    def own(name: str) -> str:
        return "; without it each task has its own: " + ", ".join(
            f"{task} {getattr(setting, name)}" for task, setting in SETTINGS.items()
        )

    shared = Overrides()
    flags.DEFINE_string(
        "mechanisms",
        MECHANISMS,
        "names with their options, as name:key=value,key=value,name; `python -m jattn catalog` lists them",
        flag_values=values,
    )
    flags.DEFINE_string(
        "tasks", TASKS, f"names with their options, in the same way: {', '.join(tasks.names())}", flag_values=values
    )
    whole("steps", None, "optimizer steps" + own("steps"))
    whole("batch", None, "examples a step and seed" + own("batch"))
    flags.DEFINE_float("learning_rate", None, "peak learning rate" + own("learning_rate"), flag_values=values)
    flags.DEFINE_float(
        "mlp_ratio", None, "feed-forward width over width, 0 for none" + own("mlp_ratio"), flag_values=values
    )
    flags.DEFINE_string("position", None, "how positions enter" + own("position"), flag_values=values)
    whole("width", shared.width, "features of the residual stream")
    whole("layers", shared.layers, "number of blocks")
    whole("heads", shared.heads, "query heads; divides the width")
    whole("seeds", shared.seeds, "number of seeds, trained side by side in one program")
    flags.DEFINE_float("minutes", None, "begin no cell after so many minutes", flag_values=values)
    flags.DEFINE_string("output", "results/compare", "output folder", flag_values=values)
    flags.DEFINE_boolean("fresh", False, "compute again the cells that the output folder holds", flag_values=values)


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    # A cached program would make the compile times of a second run a lie.
    jax.config.update("jax_enable_compilation_cache", False)
    names = ("steps", "batch", "learning_rate", "mlp_ratio", "position", "width", "layers", "heads", "seeds")
    try:
        cells = make_cells(
            cell_module.parse_requests(values.mechanisms),
            cell_module.parse_requests(values.tasks),
            Overrides(**{name: getattr(values, name) for name in names}),
        )
        if not cells:
            raise ValueError("--mechanisms and --tasks must each name something")
    except ValueError as error:
        sys.exit(f"error: {error}")
    command = shlex.join(["python", "-m", "experiments.compare", *sys.argv[1:]])
    results = run(cells, pathlib.Path(values.output), command, values.minutes, values.fresh)
    if any(cell["status"] == "failed" for cell in results["cells"]):
        sys.exit(1)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    flags.FLAGS.set_default("verbosity", logging.WARNING)
    app.run(main)
