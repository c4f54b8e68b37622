"""One cell of a comparison: a mechanism on a task under a budget, trained under several seeds in one program."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments import keeping, measures, records
from experiments.training import ModelOptions, Trainer, TrainOptions, stacked_batch, step_keys
from jattn import catalog, tasks
from jattn.models.resolve import is_attention, resolve
from jattn.testing.compiling import quick_jit

CURVE_POINTS = 10
"""How often a cell is judged on validation data while it trains."""
CURVE_BATCHES = 2
WARMUP_STEPS = 3
"""Steps whose times are left out: they pay for first touches of memory."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """A task with the budget in which softmax attention learns it on a small machine.

    Args:
        options: parameters of the task.
        steps: optimizer steps.
        batch: examples a step and seed.
        learning_rate: peak of the schedule.
        mlp_ratio: width of the feed-forward part over the width of the model; 0 for none.
        position: how positions enter.
    """

    options: Mapping[str, Any]
    steps: int
    batch: int
    learning_rate: float
    mlp_ratio: float
    position: str


START = {"embedding_std": 0.1, "residual_scale": 0.3}
"""How models start, under every mechanism alike. With tables at 0.02 and full projections the first block writes ten
times more into the stream than the embedding had put there, later blocks hardly see the tokens any more, and recall is
learned only after thousands of steps."""

SETTINGS = {
    # Attention alone, as in the paper that proposed the task: with feed-forward parts the same recall takes longer.
    "mqar": Setting({"seq_len": 32, "vocab_size": 64, "num_kv_pairs": 4}, 320, 64, 5e-3, 0.0, "rope"),
    "prose": Setting({"seq_len": 64, "eval_characters": 32768}, 240, 16, 5e-3, 2.0, "rope"),
    "code": Setting({"seq_len": 64, "eval_characters": 32768}, 240, 16, 5e-3, 2.0, "rope"),
    "digits": Setting({"patch_size": 2}, 200, 32, 3e-3, 2.0, "learned"),
}
"""The budget of each task unless the command line says otherwise."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A name with its options, as `name:key=value,key=value` on the command line."""

    name: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Cell:
    """Everything that decides the outcome of a cell; equal cells have equal keys."""

    mechanism: str
    label: str
    task: str
    task_options: Mapping[str, Any]
    model: ModelOptions
    train: TrainOptions
    seeds: tuple[int, ...]

    @property
    def key(self) -> str:
        """Hash of the configuration, and of what it was computed with."""
        return keeping.key_of(self)


def parse_requests(text: str) -> list[Request]:
    """Read `"ssa,moba_attention:chunk_size=8,topk=2,kv_bias"`: names, each with its options behind a colon.

    Raises:
        ValueError: an option without a name before it.

    Example:
        >>> [(found.name, dict(found.options)) for found in parse_requests("ssa, gna:window=4,stride=2, kv_bias")]
        [('ssa', {}), ('gna', {'window': 4, 'stride': 2}), ('kv_bias', {})]
    """
    groups: list[list[str]] = []
    for part in _split(text):
        name, colon, rest = part.partition(":")
        if "=" in name:
            if not groups or len(groups[-1]) < 2:
                raise ValueError(f"{part!r} must follow a name and a colon, as in name:key=value,key=value")
            groups[-1].append(part)
        else:
            groups.append([name.strip(), *([rest] if colon else [])])
    requests = []
    for name, *options in groups:
        written = ",".join(option.strip() for option in options if option.strip())
        label = f"{name}:{written}" if written else name
        requests.append(Request(name, records.parse_options(written), label))
    labels = [request.label for request in requests]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"{label!r} is named twice")
    return requests


def _split(text: str) -> list[str]:
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0 and (letter in ",;" or letter.isspace()):
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part]


def pattern_of(task: tasks.Task) -> str:
    """The attention pattern that the model for a task needs."""
    return "causal self" if task.kind == "lm" else "noncausal self"


def check_mechanism(request: Request) -> None:
    """Refuse a name or an option that does not exist, before anything runs.

    Raises:
        ValueError: with the nearest names.
    """
    attentions = [entry.name for entry in catalog.entries() if entry.patterns and _stands(entry)]
    if request.name not in [entry.name for entry in catalog.entries()]:
        raise catalog.unknown(request.name, attentions)
    resolve(request.name, **request.options)


def _stands(entry: Any) -> bool:
    return entry.kind != "task" and is_attention(entry)


def unsupported(cell: Cell, task: tasks.Task) -> str:
    """Why a mechanism cannot take part in a task; empty if it can."""
    patterns, needed = catalog.find(cell.mechanism).patterns, pattern_of(task)
    if needed in patterns:
        return ""
    return f"needs {needed} attention; {cell.mechanism} offers {', '.join(patterns) or 'none'}"


def run_cell(cell: Cell, report: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Train and measure a cell.

    Returns:
        A cell of `results.json`, and beside its columns `curve`: a list of steps, training losses and validation
        metrics, one number a seed.

    A mechanism that lacks the pattern gives the status `"unsupported"`, an exception `"failed"`; both with the reason.
    """
    blank = _blank(cell)
    try:
        task = tasks.get(cell.task, **cell.task_options)
        reason = unsupported(cell, task)
        if reason:
            return blank | {"status": "unsupported", "reason": reason}
        return blank | _trained(cell, task, report)
    except Exception as error:  # One mechanism's failure is a result; the others go on.
        return blank | {"status": "failed", "reason": keeping.reason_of(error)}


def _blank(cell: Cell) -> dict[str, Any]:
    return {
        "mechanism": cell.label,
        "task": cell.task,
        "status": "",
        "reason": "",
        "seeds": [],
        "quality": None,
        "params": None,
        "step_time_s": None,
        "compile_s": None,
        "temp_bytes": None,
        "decode_state": None,
        "visited_share": None,
        "curve": [],
    }


def _trained(cell: Cell, task: tasks.Task, report: Callable[[str], None]) -> dict[str, Any]:
    trainer = Trainer(task, cell.model, cell.train)
    seeds, size, steps = cell.seeds, cell.train.batch_size, cell.train.steps
    seeded = [dataclasses.replace(task, seed=seed) for seed in seeds]
    # Starting values are drawn once: a quick compilation is worth more here than a quick program.
    start = quick_jit(jax.vmap(trainer.init))
    states = start(np.asarray(seeds, np.uint32))
    batch = stacked_batch(seeded, "train", 0, size)

    def compiled(function: Any, *arguments: Any, **options: Any) -> tuple[Any, float]:
        started = time.perf_counter()
        program = jax.jit(function, **options).lower(*arguments).compile()
        return program, time.perf_counter() - started

    step, compile_s = compiled(jax.vmap(trainer.train_step), states, batch, step_keys(seeds, 0), donate_argnums=0)
    valid = task.batch("valid", 0, size)
    judge, _ = compiled(jax.vmap(trainer.eval_step, in_axes=(0, None)), states, valid)
    one = jax.tree.map(lambda leaf: leaf[0], states)
    share = measures.visited_share(trainer, one.params, one.other, task.batch("valid", 0, min(size, 4)))

    def evaluate(split: str, most: int | None = None) -> dict[str, np.ndarray]:
        count = task.num_batches(split, size)
        chosen = range(count if most is None else min(count, most))
        return tasks.summarize([judge(states, task.batch(split, number, size)) for number in chosen])

    times, curve = [], []
    for number in range(steps):
        batch, keys = stacked_batch(seeded, "train", number, size), step_keys(seeds, number)
        started = time.perf_counter()
        states, stats = step(states, batch, keys)
        jax.block_until_ready(stats)
        times.append(time.perf_counter() - started)
        if (number + 1) * CURVE_POINTS // steps > number * CURVE_POINTS // steps:
            metrics, loss = evaluate("valid", CURVE_BATCHES), np.asarray(stats["loss"])
            curve.append({"step": number + 1, "loss": loss, "metric": metrics[task.primary_metric]})
            report(f"step {number + 1}/{steps}, training loss {np.mean(loss):.3f}")
    final = evaluate("test")
    temporary = {"forward": measures.temporary_bytes(judge), "train": measures.temporary_bytes(step)}
    return _verdict(task, [float(value) for value in final[task.primary_metric]]) | {
        "seeds": [
            {"seed": seed, "metrics": {name: float(values[place]) for name, values in final.items()}}
            for place, seed in enumerate(seeds)
        ],
        "params": trainer.num_params,
        "step_time_s": measures.median_and_iqr([t / len(seeds) for t in times[min(WARMUP_STEPS, steps - 1) :]]),
        "compile_s": compile_s,
        "temp_bytes": {name: None if b is None else round(b / len(seeds)) for name, b in temporary.items()},
        "decode_state": measures.decode_state(task, cell.model),
        "visited_share": share,
        "curve": curve,
    }


def _verdict(task: tasks.Task, values: Sequence[float]) -> dict[str, Any]:
    mean = float(np.mean(values))
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    missed = sum(not task.learned(value) for value in values)
    word = "at least" if task.higher_is_better else "below"
    reason = ""
    if missed:
        bar = f"{task.primary_metric} {word} {task.threshold:.3g}"
        reason = f"{missed} of {len(values)} seeds did not learn within the budget: the bar is {bar}"
    return {
        "status": "ok" if task.learned(mean) else "not learned",
        "reason": reason,
        "quality": {
            "metric": task.primary_metric,
            "mean": mean,
            "std": spread,
            "n": len(values),
            "higher_is_better": task.higher_is_better,
        },
    }
