"""Train one model on one task.

    python -m experiments.train --task=mqar --attention=softmax_attention --steps=1000
    python -m experiments.train --task=prose --task_options=seq_len=256 --width=128 --depth=4 --output=results/prose

The output folder receives `config.json`, `metrics.jsonl`, `loss.png`, `summary.json` and `checkpoints/`. The same
command started again goes on from the newest checkpoint, and ends with the same bits as if it had never stopped.
"""

import dataclasses
import pathlib
import platform
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from experiments import records
from experiments.training import ModelOptions, Trainer, TrainOptions
from jattn import tasks
from jattn.models.config import POSITIONS

OWNED = ("config.json", "metrics.jsonl", "loss.png", "summary.json", "checkpoints")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides the outcome of a run.

    Two runs of equal configs end with equal bits, on one machine and one set of package versions.
    """

    task: str
    task_options: Mapping[str, Any]
    model: ModelOptions
    train: TrainOptions
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Habits:
    """What a run writes and how often, in steps; nothing here changes what is learned."""

    log_every: int = 20
    eval_every: int = 200
    checkpoint_every: int = 200
    keep: int = 3
    eval_batches: int | None = None

    def __post_init__(self) -> None:
        for name in ("log_every", "eval_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class Progress:
    """One line on a terminal that is overwritten, or a line for each report elsewhere."""

    def __init__(self, steps: int, tokens_per_step: int) -> None:
        self._steps, self._tokens = steps, tokens_per_step
        self._mark: tuple[int, float] | None = None
        self._live = sys.stderr.isatty()

    def start(self, step: int) -> None:
        """Begin to measure at a finished step, so that compilation, evaluation and checkpoints do not count."""
        self._mark = (step, time.perf_counter())

    def report(self, step: int, loss: float) -> float | None:
        """Show where the run is; returns tokens a second since the last report, None where nothing was measured."""
        now = time.perf_counter()
        rate, left = None, "--:--"
        if self._mark is not None and step > self._mark[0]:
            seconds = (now - self._mark[1]) / (step - self._mark[0])
            rate = self._tokens / seconds
            minutes, rest = divmod(round((self._steps - step) * seconds), 60)
            left = f"{minutes}:{rest:02d}"
            self._mark = (step, now)
        speed = f"{rate:,.0f}" if rate else "-"
        line = f"step {step}/{self._steps}  loss {loss:.4f}  {speed} tokens/s  ETA {left}"
        print(f"\r\033[K{line}" if self._live else line, end="" if self._live else "\n", file=sys.stderr, flush=True)
        return rate

    def note(self, text: str) -> None:
        """Print a line that stays."""
        print(f"\r\033[K{text}" if self._live else text, file=sys.stderr, flush=True)


def prepare(config: Config, folder: pathlib.Path, fresh: bool = False) -> Trainer:
    """Check a config against the output folder and make the trainer.

    Raises:
        ValueError: a bad option, or a folder that holds another run.
    """
    task = tasks.get(config.task, **{"seed": config.seed, **config.task_options})
    trainer = Trainer(task, config.model, config.train)
    path = folder / "config.json"
    if fresh and path.exists():
        records.clear(folder, OWNED)
    if path.exists():
        import json

        before, now = json.loads(path.read_text()), json.loads(records.to_json(config))
        if before != now:
            odd = [
                f"{name}: {before.get(name)} then, {now.get(name)} now" for name in now if before.get(name) != now[name]
            ]
            raise ValueError(f"{folder} holds another run ({'; '.join(odd)}); choose another --output, or pass --fresh")
    elif (folder / "checkpoints").exists():
        raise ValueError(f"{folder} holds checkpoints without a config.json; choose another --output")
    records.write_json(path, config)
    return trainer


def run(config: Config, folder: pathlib.Path, habits: Habits | None = None, fresh: bool = False) -> dict[str, Any]:
    """Train to the end, from the newest checkpoint of the folder if it has one.

    Returns:
        What `summary.json` says.

    Raises:
        ValueError: see `prepare`.
        FloatingPointError: the loss is no longer a number.
    """
    return fit(prepare(config, folder, fresh), config, folder, habits or Habits())


def fit(trainer: Trainer, config: Config, folder: pathlib.Path, habits: Habits) -> dict[str, Any]:
    """`run`, for a trainer that `prepare` has made."""
    started = time.perf_counter()
    task, steps, size = trainer.task, config.train.steps, config.train.batch_size
    progress = Progress(steps, size * task.length)
    checkpoints = records.Checkpoints(folder / "checkpoints", habits.keep)
    state, key = jax.jit(trainer.init)(config.seed), jax.random.key(config.seed)
    saved = checkpoints.latest()
    if saved is not None:
        at = checkpoints.restore({"state": state, "rng": key, "data_step": np.zeros((), np.int32)}, saved)
        state, key, first = at["state"], at["rng"], int(at["data_step"])
        progress.note(f"resuming {folder} at step {first}")
    else:
        first = 0
    log = records.MetricsLog(folder / "metrics.jsonl", first)

    def evaluate(split: str) -> dict[str, float]:
        return trainer.evaluate(state, split, max_batches=habits.eval_batches)

    for step in range(first + 1, steps + 1):
        batch = task.batch("train", step - 1, size)
        state, stats = trainer.step(state, batch, jax.random.fold_in(key, step - 1))
        due = {name: step % getattr(habits, name) == 0 or step == steps for name in ("log_every", "eval_every")}
        save = step % habits.checkpoint_every == 0 or step == steps
        if step == first + 1:
            jax.block_until_ready(stats)
            progress.start(step)
        if due["log_every"] or save:
            values = {name: float(value) for name, value in stats.items()}
            if not np.isfinite(values["loss"]):
                raise FloatingPointError(
                    f"the loss is {values['loss']} at step {step}: a lower --learning_rate or --clip_norm may help"
                )
        if due["log_every"]:
            rate = progress.report(step, values["loss"])
            log.append(step, "train", **values, tokens_per_s=rate)
        if due["eval_every"]:
            metrics = evaluate("valid")
            log.append(step, "valid", **metrics)
            shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            progress.note(f"step {step}/{steps}  validation: {shown}")
        if save:
            checkpoints.save(step, {"state": state, "rng": key, "data_step": np.asarray(step, np.int32)})
        if due["eval_every"] or save:
            progress.start(step)
    checkpoints.close()

    final = {split: evaluate(split) for split in ("valid", "test")}
    quality = final["test"][task.primary_metric]
    summary = {
        "config": config,
        "steps": steps,
        "resumed_at": saved,
        "params": trainer.num_params,
        "metrics": final,
        "primary_metric": task.primary_metric,
        "higher_is_better": task.higher_is_better,
        "quality": quality,
        "learned": task.learned(quality),
        "threshold": task.threshold,
        "seconds": time.perf_counter() - started,
        "versions": versions(),
        "device": jax.devices()[0].device_kind,
    }
    title = f"{config.model.attention} on {config.task}"
    records.plot_losses(folder / "loss.png", log.read(log.path), task.primary_metric, title)
    records.write_json(folder / "summary.json", summary)
    verdict = "" if summary["learned"] else f" (not learned: the bar is {task.threshold:.4f})"
    progress.note(f"done: test {task.primary_metric} {quality:.4f}{verdict}; everything in {folder}")
    return summary


def versions() -> dict[str, str]:
    """Versions of what decides the figures; the text of `prose` and `code` comes with Python itself."""
    from importlib import metadata

    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of this script; a function, so that several scripts can be imported into one process."""
    model, budget, habits = ModelOptions(), TrainOptions(), Habits()

    def text(name: str, default: str | None, meaning: str) -> None:
        flags.DEFINE_string(name, default, meaning, flag_values=values)

    def whole(name: str, default: int | None, meaning: str, least: int = 1) -> None:
        flags.DEFINE_integer(name, default, meaning, lower_bound=least, flag_values=values)

    def real(name: str, default: float, meaning: str) -> None:
        flags.DEFINE_float(name, default, meaning, flag_values=values)

    text("task", "mqar", f"the task: {', '.join(tasks.names())}")
    text("task_options", "", "its parameters, such as seq_len=128,num_kv_pairs=8")
    text("attention", model.attention, "name of the attention mechanism; `python -m jattn catalog` lists them")
    text("attention_options", "", "its hyper-parameters, as name=value,name=value")
    whole("width", model.width, "features of the residual stream")
    whole("depth", model.depth, "number of blocks")
    whole("heads", model.num_heads, "query heads; divides the width")
    whole("kv_heads", None, "key-value heads; as many as query heads if not given")
    real("mlp_ratio", model.mlp_ratio, "feed-forward width over width; 0 for no feed-forward part")
    text("position", model.position, f"how positions enter: {', '.join(POSITIONS)}")
    text("pooling", model.pooling, "how classification pools its patches: mean, class or a catalogued pooling")
    real("dropout", model.dropout, "dropout of embeddings and residual branches")
    whole("steps", budget.steps, "optimizer steps")
    whole("batch_size", budget.batch_size, "examples a step")
    real("learning_rate", budget.learning_rate, "peak learning rate")
    real("warmup_fraction", budget.warmup_fraction, "share of the steps spent in linear warmup")
    real("final_fraction", budget.final_fraction, "last learning rate over the peak")
    real("weight_decay", budget.weight_decay, "AdamW's decay of matrices")
    real("clip_norm", budget.clip_norm, "largest global gradient norm")
    whole("seed", 0, "seed of parameters, dropout and training data", least=0)
    whole("log_every", habits.log_every, "steps between lines of metrics")
    whole("eval_every", habits.eval_every, "steps between evaluations")
    whole("eval_batches", None, "batches an evaluation; all if not given")
    whole("checkpoint_every", habits.checkpoint_every, "steps between checkpoints")
    whole("keep", habits.keep, "how many checkpoints stay on disk")
    text("output", None, "output folder; results/train/TASK-ATTENTION-SEED if not given")
    flags.DEFINE_boolean(
        "fresh", False, "remove the run that the output folder holds, and start over", flag_values=values
    )


def config_from_flags(values: flags.FlagValues) -> Config:
    """The config that the command line asks for."""
    return Config(
        task=values.task,
        task_options=records.parse_options(values.task_options),
        model=ModelOptions(
            attention=values.attention,
            attention_options=records.parse_options(values.attention_options),
            width=values.width,
            depth=values.depth,
            num_heads=values.heads,
            num_kv_heads=values.kv_heads,
            mlp_ratio=values.mlp_ratio,
            position=values.position,
            dropout=values.dropout,
            pooling=values.pooling,
        ),
        train=TrainOptions(
            steps=values.steps,
            batch_size=values.batch_size,
            learning_rate=values.learning_rate,
            warmup_fraction=values.warmup_fraction,
            final_fraction=values.final_fraction,
            weight_decay=values.weight_decay,
            clip_norm=values.clip_norm,
        ),
        seed=values.seed,
    )


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    try:
        config = config_from_flags(values)
        habits = Habits(values.log_every, values.eval_every, values.checkpoint_every, values.keep, values.eval_batches)
        name = f"{config.task}-{config.model.attention}-{config.seed}"
        folder = pathlib.Path(values.output or pathlib.Path("results", "train", name))
        trainer = prepare(config, folder, values.fresh)
    except ValueError as error:
        sys.exit(f"error: {error}")
    try:
        fit(trainer, config, folder, habits)
    except FloatingPointError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    # Orbax reports every stage of a checkpoint at level INFO; --verbosity=0 shows that again.
    app.run(main, argv=[sys.argv[0], f"--verbosity={logging.WARNING}", *sys.argv[1:]])
