"""What every task promises: pure batches, disjoint splits, a fixed walk through evaluation sets, finite losses."""

import dataclasses
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn import tasks
from jattn.tasks import base

SMALL = {
    "mqar": {"seq_len": 16, "vocab_size": 64, "num_kv_pairs": 2, "num_eval_examples": 21},
    "prose": {"seq_len": 48, "eval_characters": 1000},
    "code": {"seq_len": 48, "eval_characters": 1000},
    "digits": {},
}


def small(name):
    return tasks.get(name, **SMALL.get(name, {}))


def same(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


def random_logits(task, batch, seed=0):
    shape = (*batch["targets"].shape, task.num_classes)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_names_and_small_sizes_cover_each_other():
    assert tasks.names() == sorted(SMALL)


@pytest.mark.parametrize("name", sorted(SMALL))
class TestEveryTask:
    def test_it_says_what_it_is(self, name):
        task = small(name)
        assert task.name == name
        assert task.kind in ("lm", "classification")
        assert task.num_classes > 1
        batch = task.batch("train", 0, 3)
        assert set(batch) == {"inputs", "targets", "weights"}
        assert all(isinstance(array, np.ndarray) and len(array) == 3 for array in batch.values())
        assert batch["weights"].dtype == np.float32
        assert batch["targets"].dtype == np.int32
        assert batch["targets"].min() >= 0
        assert batch["targets"].max() < task.num_classes
        if task.kind == "lm":
            assert batch["inputs"].shape == batch["targets"].shape == (3, task.length)
            assert batch["inputs"].dtype == np.int32
            assert batch["inputs"].max() < task.vocab_size == task.num_classes
        else:
            assert batch["targets"].shape == (3,)
            with pytest.raises(ValueError, match="no tokens"):
                _ = task.vocab_size

    @pytest.mark.parametrize("split", base.SPLITS)
    def test_a_batch_is_a_function_of_seed_split_and_step(self, name, split):
        """Asked for out of order, by another object, after other batches: always the same."""
        first = [small(name).batch(split, step, 4) for step in (0, 1, 2)]
        task = small(name)
        for step in (2, 0, 1):
            assert same(task.batch(split, step, 4), first[step])
        if split == "train":
            assert not same(first[0], first[1])

    def test_a_batch_may_be_overwritten(self, name):
        task = small(name)
        for split in base.SPLITS:
            before = task.batch(split, 0, 2)
            kept = {key: array.copy() for key, array in before.items()}
            for array in before.values():
                array[:] = 0
            assert same(task.batch(split, 0, 2), kept)

    def test_the_seed_moves_training_and_nothing_else(self, name):
        first = small(name)
        second = dataclasses.replace(first, seed=1)
        assert not same(first.batch("train", 0, 4), second.batch("train", 0, 4))
        for split in ("valid", "test"):
            assert same(first.batch(split, 0, 4), second.batch(split, 0, 4))

    @pytest.mark.parametrize("split", ["valid", "test"])
    @pytest.mark.parametrize("size", [1, 4, 7, 500])
    def test_evaluation_walks_the_set_once_in_order(self, name, split, size):
        task = small(name)
        total, batches = task.num_examples(split), task.num_batches(split, size)
        assert batches == -(-total // size)
        whole = task.batch(split, 0, total)
        if size == 1:
            batches = min(batches, 5)
        walked = [task.batch(split, step, size) for step in range(batches)]
        for key in whole:
            joined = np.concatenate([batch[key] for batch in walked])
            assert len(joined) == batches * size
            np.testing.assert_array_equal(joined[:total], whole[key][: len(joined)])
        padding = np.concatenate([batch["weights"] for batch in walked])[total:]
        assert not padding.any()

    def test_the_last_step_is_the_last(self, name):
        task = small(name)
        with pytest.raises(ValueError, match="step must be below num_batches"):
            task.batch("test", task.num_batches("test", 8), 8)
        with pytest.raises(ValueError, match="have no end"):
            task.num_batches("train", 8)

    def test_bad_arguments(self, name):
        task = small(name)
        for call in (
            lambda: task.batch("training", 0, 2),
            lambda: task.num_batches("eval", 2),
            lambda: task.num_examples("eval"),
        ):
            with pytest.raises(ValueError, match="split must be one of 'train', 'valid', 'test'"):
                call()
        with pytest.raises(ValueError, match="size must be an integer of at least 1"):
            task.batch("train", 0, 0)
        with pytest.raises(ValueError, match="step must be an integer of at least 0"):
            task.batch("train", -1, 2)
        with pytest.raises(ValueError, match="seed must be an integer"):
            dataclasses.replace(task, seed=-1)

    def test_metrics_over_batches_are_metrics_of_the_whole(self, name):
        task = small(name)
        total = task.num_examples("test")
        whole = task.batch("test", 0, total)
        logits = random_logits(task, whole)
        expected = tasks.summarize([task.metrics(logits, whole)])
        parts = []
        for step in range(task.num_batches("test", 8)):
            batch = task.batch("test", step, 8)
            rows = np.minimum(np.arange(step * 8, step * 8 + 8), total - 1)
            parts.append(task.metrics(logits[rows], batch))
        joined = tasks.summarize(parts)
        assert joined.keys() == expected.keys()
        assert task.primary_metric in joined
        for metric, value in joined.items():
            assert value == pytest.approx(expected[metric], rel=1e-5)

    def test_loss_is_the_weighted_mean_of_a_plain_loop(self, name):
        task = small(name)
        batch = task.batch("train", 0, 3)
        weights = np.random.default_rng(1).random(batch["weights"].shape).astype(np.float32) * batch["weights"]
        batch = {**batch, "weights": weights}
        logits = random_logits(task, batch)
        total = 0.0
        for place in np.ndindex(batch["targets"].shape):
            z = np.asarray(logits[place], np.float64)
            total += weights[place] * (np.log(np.exp(z).sum()) - z[batch["targets"][place]])
        assert float(task.loss(logits, batch)) == pytest.approx(total / weights.sum(), rel=1e-5)

    def test_loss_without_weights_is_zero_with_zero_gradients(self, name):
        task = small(name)
        batch = task.batch("train", 0, 2)
        batch = {**batch, "weights": np.zeros_like(batch["weights"])}
        value, gradient = jax.value_and_grad(task.loss)(random_logits(task, batch), batch)
        assert float(value) == 0.0
        assert not np.asarray(gradient).any()

    def test_padding_that_is_not_finite_is_silent(self, name):
        task = small(name)
        batch = task.batch("train", 0, 2)
        weights = batch["weights"].copy()
        weights[1] = 0
        batch = {**batch, "weights": weights}
        logits = random_logits(task, batch)
        poisoned = logits.at[1].set(jnp.nan)
        assert float(task.loss(poisoned, batch)) == float(task.loss(logits, batch))
        for metric, mean in task.metrics(poisoned, batch).items():
            assert float(mean.total) == float(task.metrics(logits, batch)[metric].total)

    def test_outputs_may_be_an_object_with_logits(self, name):
        task = small(name)
        batch = task.batch("train", 0, 2)
        logits = random_logits(task, batch)
        wrapped = type("Output", (), {"logits": logits})()
        assert float(task.loss(wrapped, batch)) == float(task.loss(logits, batch))

    def test_guessing_has_not_learned_and_knowing_has(self, name):
        task = small(name)
        batch = task.batch("test", 0, task.num_examples("test"))
        guess = tasks.summarize([task.metrics(random_logits(task, batch), batch)])
        known = jnp.eye(task.num_classes)[batch["targets"]] * 50
        knows = tasks.summarize([task.metrics(known, batch)])
        assert not task.learned(guess[task.primary_metric])
        assert task.learned(knows[task.primary_metric])
        assert not task.learned(float("nan"))
        assert not task.learned(float("inf"))

    def test_metrics_can_be_vmapped_over_seeds(self, name):
        task = small(name)
        batch = task.batch("valid", 0, 4)
        stacked = jnp.stack([random_logits(task, batch, seed) for seed in range(3)])
        together = tasks.summarize([jax.vmap(task.metrics, in_axes=(0, None))(stacked, batch)] * 2)
        for seed in range(3):
            alone = tasks.summarize([task.metrics(stacked[seed], batch)])
            for metric, value in alone.items():
                assert together[metric][seed] == pytest.approx(value, rel=1e-6)


def test_unknown_names_answer_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown task 'pros'; did you mean 'prose'\? There are: code, digits"):
        tasks.get("pros")
    with pytest.raises(ValueError, match="unknown task 'zzz'; There are"):
        tasks.get("zzz")
    with pytest.raises(ValueError, match=r"has no parameter 'seqlen'; did you mean 'seq_len'"):
        tasks.get("mqar", seqlen=3)


def test_summarize_weighs_by_counts_in_float64():
    big = {"loss": base.Mean(np.float32(2**24), np.float32(2**24))}
    small_one = {"loss": base.Mean(np.float32(0), np.float32(1))}
    assert tasks.summarize([big, small_one])["loss"] == 2**24 / (2**24 + 1)
    assert tasks.summarize([]) == {}
    assert np.isnan(tasks.summarize([{"loss": base.Mean(0.0, 0.0)}])["loss"])


def test_epochs_hold_every_index_once_whatever_the_size():
    drawn = np.concatenate([base.epoch_indices(4, 10, step, 4) for step in range(10)])
    for epoch in range(4):
        assert sorted(drawn[10 * epoch : 10 * epoch + 10].tolist()) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:20].tolist()
    assert sorted(base.epoch_indices(0, 3, 0, 9).tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_scikit_learn_is_imported_where_it_is_used():
    code = "import sys; from jattn import tasks; tasks.get('digits'); sys.exit('sklearn' in sys.modules)"
    root = pathlib.Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
