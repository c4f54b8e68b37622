"""The training script: a run that was killed ends with the bits of one that was not, and errors say what to do."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
from absl import app, flags

from experiments import records, train
from experiments.training import ModelOptions, TrainOptions

ROOT = pathlib.Path(__file__).resolve().parents[2]
TASK = {"seq_len": 16, "vocab_size": 32, "num_kv_pairs": 2, "num_eval_examples": 8}
CONFIG = train.Config(
    task="mqar",
    task_options=TASK,
    model=ModelOptions(width=8, depth=1, num_heads=2),
    train=TrainOptions(steps=9, batch_size=4),
    seed=3,
)
HABITS = train.Habits(log_every=2, eval_every=4, checkpoint_every=2, keep=20)


def lines(folder):
    """The metrics without the one column that a clock wrote."""
    found = records.MetricsLog.read(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name != "tokens_per_s"} for line in found]


def newest(folder):
    """Every array of the newest checkpoint, as bytes."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(
        (folder / "checkpoints").absolute(), item_handlers=ocp.StandardCheckpointHandler()
    ) as manager:
        step = manager.latest_step()
        arrays = manager.restore(step)
        return step, {name: (array.shape, str(array.dtype), array.tobytes()) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, train.run(CONFIG, folder, HABITS)


def test_a_run_leaves_its_records(finished):
    folder, summary = finished
    assert json.loads((folder / "summary.json").read_text())["quality"] == summary["quality"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [line["step"] for line in lines(folder) if line["split"] == "train"] == [2, 4, 6, 8, 9]
    assert [line["step"] for line in lines(folder) if line["split"] == "valid"] == [4, 8, 9]
    assert summary["learned"] in (True, False)
    assert summary["metrics"]["test"]["accuracy"] == summary["quality"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(train.OWNED)
    assert newest(folder)[0] == 9


def test_going_on_from_an_earlier_checkpoint_changes_no_bit(finished, tmp_path):
    whole, summary = finished
    folder = tmp_path / "run"
    train.run(CONFIG, folder, HABITS)
    for step in (6, 8, 9):
        records.clear(folder / "checkpoints", (str(step),))
    resumed = train.run(CONFIG, folder, HABITS)
    assert resumed["resumed_at"] == 4
    assert newest(folder) == newest(whole)
    assert lines(folder) == lines(whole)
    assert resumed["metrics"] == summary["metrics"]


def test_a_finished_run_started_again_only_reports(finished):
    folder, summary = finished
    before = lines(folder)
    assert train.run(CONFIG, folder, HABITS)["metrics"] == summary["metrics"]
    assert lines(folder) == before


def test_a_folder_of_another_run_is_refused_or_cleared(tmp_path):
    other = dataclasses.replace(CONFIG, train=TrainOptions(steps=2, batch_size=2))
    train.prepare(other, tmp_path)
    records.Checkpoints(tmp_path / "checkpoints").close()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds another run"):
        train.prepare(CONFIG, tmp_path)
    train.prepare(CONFIG, tmp_path, fresh=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "notes.txt"]


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    wild = dataclasses.replace(CONFIG, train=TrainOptions(steps=40, batch_size=2, learning_rate=1e30, clip_norm=1e30))
    with pytest.raises(FloatingPointError, match="a lower --learning_rate"):
        train.run(wild, tmp_path, train.Habits(log_every=1, eval_every=40, checkpoint_every=40))
    assert not (tmp_path / "summary.json").exists()


def command(folder, *more):
    options = ",".join(f"{name}={value}" for name, value in TASK.items())
    return [
        sys.executable,
        "-m",
        "experiments.train",
        f"--task_options={options}",
        "--width=8",
        "--depth=1",
        "--heads=2",
        "--batch_size=4",
        "--log_every=10",
        "--eval_every=50",
        "--checkpoint_every=25",
        f"--output={folder}",
        *more,
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task=mqr"], "unknown task 'mqr'; did you mean 'mqar'?"),
        (["--attention=softmax_atention"], "softmax_attention"),
        (["--task_options=seqlen=3"], "has no parameter 'seqlen'; did you mean 'seq_len'"),
        (["--width=10", "--heads=4"], "width must be a multiple of num_heads=4"),
        (["--attention_options=3"], "options must be written as name=value"),
        (["--eval_batches=0"], "eval_batches"),
        (["stray"], "unknown arguments: stray"),
    ],
)
def test_errors_on_the_command_line(tmp_path, arguments, message):
    values = flags.FlagValues()
    train.define_flags(values)
    with pytest.raises((SystemExit, flags.Error, app.UsageError), match=re.escape(message)):
        train.main(values(["train", f"--output={tmp_path / 'run'}", *arguments]), values)
    assert not (tmp_path / "run").exists()


def complete(arguments, environment):
    """Run to the end; what it printed as progress."""
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment, check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_killed_and_resumed_ends_bit_equal(tmp_path):
    """SIGKILL in mid-run, behind a checkpoint and with metrics written since; then the same command again."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    steps = "--steps=600"
    environment = dict(os.environ, JAX_PLATFORMS="cpu")
    complete(command(whole, steps), environment)

    process = subprocess.Popen(
        command(broken, steps), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        written = records.MetricsLog.read(broken / "metrics.jsonl")
        if written and written[-1]["step"] >= 140:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    cut = lines(broken)
    assert 140 <= cut[-1]["step"] < 600
    assert not (broken / "summary.json").exists()

    assert "resuming" in complete(command(broken, steps), environment)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (whole, broken)]
    assert summaries[1]["resumed_at"] >= 125
    assert summaries[0]["metrics"] == summaries[1]["metrics"]
    assert newest(whole) == newest(broken)
    assert newest(whole)[0] == 600
    assert lines(whole) == lines(broken)
