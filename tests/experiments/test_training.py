"""The training library: pure steps, seeds side by side equal to seeds alone, schedules, evaluation."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import training
from experiments.training import ModelOptions, Trainer, TrainOptions
from jattn import tasks

TASK = tasks.get("mqar", seq_len=16, vocab_size=32, num_kv_pairs=2, num_eval_examples=10)
MODEL = ModelOptions(width=8, depth=1, num_heads=1)
OPTIONS = TrainOptions(steps=8, batch_size=4, learning_rate=1e-2, warmup_fraction=0.25)


class Output(NamedTuple):
    logits: jax.Array
    cache: Any
    aux: dict


class StandIn(nnx.Module):
    """Embedding, dropout, a running statistic, head: what a trainer must carry, without attention."""

    def __init__(self, task, options, rngs):
        self.embed = nnx.Embed(task.vocab_size, options.width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)
        self.calls = nnx.BatchStat(jnp.zeros(()))
        self.head = nnx.Linear(options.width, task.num_classes, rngs=rngs)

    def __call__(self, inputs, *, deterministic=True, rngs=None):
        if not deterministic:
            self.calls[...] += 1.0
        hidden = self.dropout(self.embed(inputs), deterministic=deterministic, rngs=rngs)
        return Output(self.head(hidden), None, {"losses": {"balance_loss": 0.5}, "statistics": {"share": [7.0]}})


@pytest.fixture
def trainer(monkeypatch):
    monkeypatch.setattr(training, "build_model", lambda task, options, *, rngs: StandIn(task, options, rngs))
    return Trainer(TASK, MODEL, OPTIONS)


def fit(trainer, seed, steps, state=None):
    state = trainer.init(seed) if state is None else state
    stats = {}
    task = dataclasses.replace(trainer.task, seed=seed)
    for step in range(int(state.step), steps):
        state, stats = trainer.step(state, task.batch("train", step, 4), training.step_key(seed, step))
    return state, stats


def assert_same(first, second, **tolerance):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        if tolerance:
            np.testing.assert_allclose(one, other, **tolerance)
        else:
            np.testing.assert_array_equal(one, other)


def test_a_step_counts_learns_and_reports(trainer):
    before = jax.tree.map(np.array, trainer.init(0))
    state, stats = fit(trainer, 0, 2)
    assert int(state.step) == 2
    assert set(stats) == {"loss", "auxiliary_loss", "gradient_norm", "learning_rate"}
    assert float(stats["auxiliary_loss"]) == 0.5
    assert np.isfinite(float(stats["gradient_norm"]))
    pairs = zip(jax.tree.leaves(state.params), jax.tree.leaves(before.params), strict=True)
    assert all((np.asarray(new) != old).any() for new, old in pairs)
    assert [float(leaf) for leaf in jax.tree.leaves(state.other)] == [2.0]
    assert trainer.num_params == 32 * 8 + 8 * 32 + 32


def test_training_lowers_the_loss(trainer):
    _, first = fit(trainer, 0, 1)
    long = Trainer(TASK, MODEL, dataclasses.replace(OPTIONS, steps=200, learning_rate=3e-2))
    _, last = fit(long, 0, 200)
    assert float(last["loss"]) < float(first["loss"])


def test_stopping_and_going_on_changes_nothing(trainer):
    whole, _ = fit(trainer, 3, 6)
    half, _ = fit(trainer, 3, 3)
    on_host = jax.tree.map(np.array, half)
    resumed, _ = fit(trainer, 3, 6, jax.tree.map(jnp.asarray, on_host))
    assert_same(whole, resumed)


def test_seeds_side_by_side_are_seeds_alone(trainer):
    seeds = [0, 5, 9]
    states = trainer.init_seeds(seeds)
    seeded = [dataclasses.replace(TASK, seed=seed) for seed in seeds]
    for step in range(4):
        batch = training.stacked_batch(seeded, "train", step, 4)
        states, stats = trainer.step_seeds(states, batch, training.step_keys(seeds, step))
    metrics = trainer.evaluate(states, "test", stacked=True)
    assert stats["loss"].shape == metrics["accuracy"].shape == (3,)
    for place, seed in enumerate(seeds):
        alone, _ = fit(trainer, seed, 4)
        assert_same(jax.tree.map(lambda leaf, place=place: leaf[place], states), alone, rtol=1e-4, atol=1e-6)
        single = trainer.evaluate(alone, "test")
        assert metrics["loss"][place] == pytest.approx(single["loss"], rel=1e-5)
        assert isinstance(single["loss"], float)


def test_evaluation_does_not_depend_on_the_batch_size(trainer):
    state = trainer.init(0)
    whole = trainer.evaluate(state, "valid", batch_size=10)
    for size in (1, 3, 4, 64):
        assert trainer.evaluate(state, "valid", batch_size=size) == pytest.approx(whole, rel=1e-5)
    part = trainer.evaluate(state, "valid", batch_size=5, max_batches=1)
    assert part != pytest.approx(whole, rel=1e-5)


def test_evaluation_has_no_dropout(trainer):
    state = trainer.init(0)
    assert trainer.evaluate(state, "valid") == trainer.evaluate(state, "valid")
    batch = TASK.batch("train", 0, 4)
    first = trainer.forward(state.params, state.other, batch["inputs"], jax.random.key(0))[0]
    second = trainer.forward(state.params, state.other, batch["inputs"], jax.random.key(1))[0]
    assert (first.logits != second.logits).any()


def test_the_schedule_warms_up_and_comes_down():
    schedule = training.learning_rate_schedule(TrainOptions(steps=100, learning_rate=0.5, final_fraction=0.1))
    rates = np.array([float(schedule(step)) for step in range(101)])
    assert rates[0] == 0
    assert rates[10] == rates.max() == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.05)
    assert (np.diff(rates[:11]) > 0).all()
    assert (np.diff(rates[10:]) < 0).all()
    flat = training.learning_rate_schedule(TrainOptions(steps=1, warmup_fraction=0.5))
    assert float(flat(0)) > 0


def test_only_matrices_decay(trainer):
    options = dataclasses.replace(OPTIONS, weight_decay=1.0, warmup_fraction=0.0)
    optimizer = training.make_optimizer(options)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert (np.asarray(updates["kernel"]) < 0).all()
    assert not np.asarray(updates["bias"]).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelOptions(width=0), "width must be at least 1"),
        (lambda: ModelOptions(width=10, num_heads=4), "width must be a multiple of num_heads=4"),
        (lambda: ModelOptions(mlp_ratio=-1.0), "mlp_ratio"),
        (lambda: TrainOptions(steps=0), "steps must be at least 1"),
        (lambda: TrainOptions(learning_rate=0.0), "learning_rate must be positive"),
        (lambda: TrainOptions(clip_norm=float("nan")), "clip_norm must be positive"),
        (lambda: TrainOptions(warmup_fraction=1.0), r"warmup_fraction must be in \[0, 1\)"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
