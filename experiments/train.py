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
from absl import app, flags

from experiments import records
from experiments.training import ModelOptions, Trainer, TrainOptions
from jattn import tasks

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


_MODEL, _TRAIN, _HABITS = ModelOptions(), TrainOptions(), Habits()
TASK = flags.DEFINE_string("task", "mqar", "the task: mqar, prose, code or digits")
TASK_OPTIONS = flags.DEFINE_string("task_options", "", "its parameters, such as seq_len=128,num_kv_pairs=8")
ATTENTION = flags.DEFINE_string(
    "attention", _MODEL.attention, "name of the attention mechanism; `python -m jattn catalog` lists them"
)
ATTENTION_OPTIONS = flags.DEFINE_string("attention_options", "", "its hyper-parameters, as name=value,name=value")
WIDTH = flags.DEFINE_integer("width", _MODEL.width, "features of the residual stream", lower_bound=1)
DEPTH = flags.DEFINE_integer("depth", _MODEL.depth, "number of blocks", lower_bound=1)
HEADS = flags.DEFINE_integer("heads", _MODEL.num_heads, "query heads; divides the width", lower_bound=1)
KV_HEADS = flags.DEFINE_integer("kv_heads", None, "key-value heads; as many as query heads if not given", lower_bound=1)
MLP_RATIO = flags.DEFINE_float("mlp_ratio", _MODEL.mlp_ratio, "feed-forward width over width; 0 for no feed-forward")
POSITION = flags.DEFINE_string("position", _MODEL.position, "how positions enter: learned, rope, alibi, t5 or none")
STEPS = flags.DEFINE_integer("steps", _TRAIN.steps, "optimizer steps", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", _TRAIN.batch_size, "examples a step", lower_bound=1)
LEARNING_RATE = flags.DEFINE_float("learning_rate", _TRAIN.learning_rate, "peak learning rate")
WARMUP = flags.DEFINE_float("warmup_fraction", _TRAIN.warmup_fraction, "share of the steps spent in linear warmup")
FINAL = flags.DEFINE_float("final_fraction", _TRAIN.final_fraction, "last learning rate over the peak")
WEIGHT_DECAY = flags.DEFINE_float("weight_decay", _TRAIN.weight_decay, "AdamW's decay of matrices")
CLIP_NORM = flags.DEFINE_float("clip_norm", _TRAIN.clip_norm, "largest global gradient norm")
SEED = flags.DEFINE_integer("seed", 0, "seed of parameters, dropout and training data", lower_bound=0)
LOG_EVERY = flags.DEFINE_integer("log_every", _HABITS.log_every, "steps between lines of metrics", lower_bound=1)
EVAL_EVERY = flags.DEFINE_integer("eval_every", _HABITS.eval_every, "steps between evaluations", lower_bound=1)
EVAL_BATCHES = flags.DEFINE_integer("eval_batches", None, "batches an evaluation; all if not given", lower_bound=1)
CHECKPOINT_EVERY = flags.DEFINE_integer(
    "checkpoint_every", _HABITS.checkpoint_every, "steps between checkpoints", lower_bound=1
)
KEEP = flags.DEFINE_integer("keep", _HABITS.keep, "how many checkpoints stay on disk", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "output folder; results/train/TASK-ATTENTION-SEED if not given")
FRESH = flags.DEFINE_boolean("fresh", False, "remove the run that the output folder holds, and start over")


def config_from_flags() -> Config:
    """The config that the command line asks for."""
    return Config(
        task=TASK.value,
        task_options=records.parse_options(TASK_OPTIONS.value),
        model=ModelOptions(
            attention=ATTENTION.value,
            attention_options=records.parse_options(ATTENTION_OPTIONS.value),
            width=WIDTH.value,
            depth=DEPTH.value,
            num_heads=HEADS.value,
            num_kv_heads=KV_HEADS.value,
            mlp_ratio=MLP_RATIO.value,
            position=POSITION.value,
        ),
        train=TrainOptions(
            steps=STEPS.value,
            batch_size=BATCH_SIZE.value,
            learning_rate=LEARNING_RATE.value,
            warmup_fraction=WARMUP.value,
            final_fraction=FINAL.value,
            weight_decay=WEIGHT_DECAY.value,
            clip_norm=CLIP_NORM.value,
        ),
        seed=SEED.value,
    )


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    try:
        config = config_from_flags()
        habits = Habits(LOG_EVERY.value, EVAL_EVERY.value, CHECKPOINT_EVERY.value, KEEP.value, EVAL_BATCHES.value)
        name = f"{config.task}-{config.model.attention}-{config.seed}"
        folder = pathlib.Path(OUTPUT.value or pathlib.Path("results", "train", name))
        trainer = prepare(config, folder, FRESH.value)
    except ValueError as error:
        sys.exit(f"error: {error}")
    try:
        fit(trainer, config, folder, habits)
    except FloatingPointError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
