"""MQAR: every promise of the generator, its distribution of gaps, and the task around it."""

import dataclasses
import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jattn import tasks
from jattn.tasks.mqar import ENTRY, UNLABELED, Mqar, check_mqar, mqar

SIZES = [(8, 16, 2), (8, 9, 2), (64, 256, 4), (128, 8192, 8), (64, 65, 16), (30, 31, 3), (4, 6, 1)]


@pytest.mark.parametrize("random_non_queries", [False, True])
@pytest.mark.parametrize(("seq_len", "vocab_size", "pairs"), SIZES)
def test_rows_keep_every_promise(seq_len, vocab_size, pairs, random_non_queries):
    """Plain loops over the rows, written without a look at `check_mqar`, which must agree."""
    inputs, labels = mqar(
        np.random.default_rng(3), 20, seq_len, vocab_size, pairs, random_non_queries=random_non_queries
    )
    assert inputs.shape == labels.shape == (20, seq_len)
    assert inputs.dtype == labels.dtype == np.int32
    for tokens, answers in zip(inputs.tolist(), labels.tolist(), strict=True):
        keys, values = tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
        assert len(set(keys)) == pairs
        assert all(1 <= key <= vocab_size // 2 - 1 for key in keys)
        assert len(set(values)) == pairs
        assert all(vocab_size // 2 <= value <= vocab_size - 1 for value in values)
        asked = [place for place, answer in enumerate(answers) if answer != -100]
        assert len(asked) == pairs
        assert all(place % 2 == 0 and 2 * pairs <= place <= seq_len - 2 for place in asked)
        assert sorted(tokens[place] for place in asked) == sorted(keys)
        for place in asked:
            assert answers[place] == tokens[tokens.index(tokens[place]) + 1]
        if 4 * pairs == seq_len:
            assert asked == list(range(2 * pairs, seq_len, 2))
        filler = [token for place, token in enumerate(tokens) if place >= 2 * pairs and place not in asked]
        assert all(0 <= token < vocab_size for token in filler)
        if not random_non_queries:
            assert not any(filler)
    check_mqar(inputs, labels, vocab_size=vocab_size, num_kv_pairs=pairs, random_non_queries=random_non_queries)


def test_filler_changes_nothing_but_filler():
    plain, plain_labels = mqar(5, 30, 64, 128, 4, random_non_queries=False)
    filled, filled_labels = mqar(5, 30, 64, 128, 4, random_non_queries=True)
    np.testing.assert_array_equal(plain_labels, filled_labels)
    np.testing.assert_array_equal(plain[plain != 0], filled[plain != 0])
    filler = filled[plain == 0]
    # Uniform over the whole vocabulary, the filler token 0 included: 30 * 52 draws over 128 tokens.
    assert filler.min() == 0
    assert filler.max() == 127
    assert abs(filler.mean() - 63.5) < 5 * math.sqrt((128**2 - 1) / 12 / filler.size)


def successive_probabilities(slots: int, pairs: int, power_a: float) -> dict[tuple[int, ...], float]:
    """Probability of every ordered choice of gaps: each draw renormalizes over the slots that are still free."""
    weights = [power_a * n ** (power_a - 1) for n in range(1, slots + 1)]
    table = {}
    for choice in itertools.permutations(range(slots), pairs):
        probability, left = 1.0, sum(weights)
        for gap in choice:
            probability *= weights[gap] / left
            left -= weights[gap]
        table[choice] = probability
    return table


@pytest.mark.parametrize("power_a", [0.01, 0.5, 1.0, 3.0])
def test_gaps_follow_successive_sampling(power_a):
    rows, pairs, seq_len = 40_000, 2, 16
    slots = (seq_len - 2 * pairs) // 2
    inputs, labels = mqar(1, rows, seq_len, 32, pairs, power_a)
    table = successive_probabilities(slots, pairs, power_a)
    assert sum(table.values()) == pytest.approx(1.0)
    counts = dict.fromkeys(table, 0)
    asked = np.nonzero(labels != UNLABELED)[1].reshape(rows, pairs)
    for row in range(rows):
        gap_of = {inputs[row, place]: (place - 2 * pairs) // 2 for place in asked[row]}
        counts[tuple(int(gap_of[inputs[row, 2 * pair]]) for pair in range(pairs))] += 1
    statistic = sum((counts[choice] - rows * p) ** 2 / (rows * p) for choice, p in table.items())
    freedom = len(table) - 1
    # The chi-square statistic has mean `freedom` and variance 2 * freedom; six deviations never happen by chance.
    assert abs(statistic - freedom) < 6 * math.sqrt(2 * freedom)


def test_keys_and_values_are_uniform_in_every_place():
    inputs, _ = mqar(2, 20_000, 8, 16, 2)
    for place, (low, size) in enumerate([(1, 7), (8, 8), (1, 7), (8, 8)]):
        counts = np.bincount(inputs[:, place] - low, minlength=size)
        expected = 20_000 / size
        assert ((counts - expected) ** 2 / expected).sum() < (size - 1) + 6 * math.sqrt(2 * (size - 1))


def test_same_seed_same_rows():
    first, again, other = mqar(7, 5, 32, 64, 4), mqar(np.random.default_rng(7), 5, 32, 64, 4), mqar(8, 5, 32, 64, 4)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert (first[0] != other[0]).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seq_len": 7}, "seq_len must be even"),
        ({"seq_len": 0}, "seq_len must be an integer of at least 1"),
        ({"vocab_size": 16}, "vocab_size must be above seq_len=16"),
        ({"num_kv_pairs": 5}, "num_kv_pairs must be at most seq_len / 4 = 4"),
        ({"num_kv_pairs": 0}, "num_kv_pairs must be an integer of at least 1"),
        ({"num_kv_pairs": 2.0}, "num_kv_pairs must be an integer"),
        ({"power_a": 0.0}, "power_a must be positive"),
        ({"power_a": float("nan")}, "power_a must be positive"),
        ({"num_examples": 0}, "num_examples must be an integer"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    arguments = {"num_examples": 2, "seq_len": 16, "vocab_size": 32, "num_kv_pairs": 2, **arguments}
    with pytest.raises(ValueError, match=message):
        mqar(0, **arguments)


def broken(change):
    inputs, labels = mqar(0, 3, 16, 32, 2, random_non_queries=False)
    places = np.flatnonzero(labels[1] != UNLABELED)
    change(inputs[1], labels[1], places)
    return inputs, labels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y, at: x.__setitem__(2, x[0]), "row 1 must have distinct keys"),
        (lambda x, y, at: x.__setitem__(0, 0), "row 1 must have distinct keys in 1 .. 15"),
        (lambda x, y, at: x.__setitem__(0, 16), "row 1 must have distinct keys in 1 .. 15"),
        (lambda x, y, at: x.__setitem__(3, x[1]), "row 1 must have distinct values"),
        (lambda x, y, at: x.__setitem__(1, 15), "row 1 must have distinct values in 16 .. 31"),
        (lambda x, y, at: y.__setitem__(at[0], -100), "row 1 has 1 labels"),
        (lambda x, y, at: y.__setitem__(at[0] + 1, 16), "row 1 has 3 labels"),
        (lambda x, y, at: x.__setitem__(at[0], x[at[1]]), "row 1 must ask for every key once"),
        (lambda x, y, at: y.__setitem__(at[0], y[at[1]]), "row 1 has a label that is not the value"),
        (lambda x, y, at: x.__setitem__(at[0] + 1, 5), "row 1 must have filler 0"),
        (lambda x, y, at: (y.__setitem__(0, y[at[0]]), y.__setitem__(at[0], -100)), "row 1 must ask on even positions"),
    ],
)
def test_check_finds_what_is_broken(change, message):
    with pytest.raises(ValueError, match=message):
        check_mqar(*broken(change), vocab_size=32, num_kv_pairs=2, random_non_queries=False)


def test_check_wants_filler_of_the_vocabulary():
    inputs, labels = broken(lambda x, y, at: x.__setitem__(at[0] + 1, 32))
    with pytest.raises(ValueError, match="row 1 must have filler in 0 .. 31"):
        check_mqar(inputs, labels, vocab_size=32, num_kv_pairs=2)
    with pytest.raises(ValueError, match="one shape"):
        check_mqar(inputs, labels[:2], vocab_size=32, num_kv_pairs=2)


TASK = Mqar(seq_len=16, vocab_size=32, num_kv_pairs=2, num_eval_examples=10)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_batches_are_valid_rows(split):
    batch = TASK.batch(split, 1, 4)
    labels = np.where(batch["weights"] > 0, batch["targets"], UNLABELED)
    check_mqar(batch["inputs"], labels, vocab_size=32, num_kv_pairs=2)
    assert set(np.unique(batch["weights"])) == {0.0, 1.0}
    assert (batch["targets"] >= 0).all()


def test_a_fixed_training_set_is_walked_in_order():
    task = dataclasses.replace(TASK, num_train_examples=6)
    rows = np.concatenate([task.batch("train", step, 4)["inputs"] for step in range(3)])
    np.testing.assert_array_equal(rows[:6], rows[6:])
    assert task.num_examples("train") == 6
    assert len(np.unique(rows[:6], axis=0)) == 6
    other = dataclasses.replace(task, seed=1).batch("train", 0, 4)["inputs"]
    assert (other != rows[:4]).any()


def test_accuracy_is_the_mean_over_rows_of_each_rows_share():
    rng = np.random.default_rng(0)
    batches, outputs, shares, losses = [], [], [], []
    for step in range(TASK.num_batches("test", 4)):
        batch = TASK.batch("test", step, 4)
        batch = {**batch, "weights": batch["weights"] * (rng.random(batch["weights"].shape) < 0.7)}
        logits = rng.normal(size=(4, 16, 32)).astype(np.float32)
        right = rng.random((4, 16)) < 0.5
        logits[right, batch["targets"][right]] += 50
        batches.append(batch)
        outputs.append(logits)
        for row in range(4):
            asked = np.flatnonzero(batch["weights"][row])
            if len(asked):
                hits = [int(logits[row, place].argmax()) == batch["targets"][row, place] for place in asked]
                shares.append(sum(hits) / len(hits))
            for place in asked:
                z = logits[row, place].astype(np.float64)
                losses.append(np.log(np.exp(z - z.max()).sum()) + z.max() - z[batch["targets"][row, place]])
    result = tasks.summarize(TASK.metrics(output, batch) for output, batch in zip(outputs, batches, strict=True))
    assert result["accuracy"] == pytest.approx(np.mean(shares), rel=1e-6)
    assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_answering_any_value_of_the_row_has_not_learned():
    chance = 1 / 4
    task = Mqar(num_kv_pairs=4)
    assert not task.learned(chance)
    assert not task.learned(0.3)
    assert task.learned(0.5)
    assert task.learned(1.0)
    assert not task.learned(float("nan"))


def test_the_entry_points_at_the_generator():
    args, kwargs = ENTRY.example(None, 33)
    inputs, labels = ENTRY.function(*args, **kwargs)
    check_mqar(inputs, labels, **kwargs)
    assert ENTRY.kind == "task"
    assert ENTRY.name == "mqar"


def test_a_perfect_model_scores_one():
    batch = TASK.batch("valid", 0, 10)
    logits = jnp.asarray(np.eye(32, dtype=np.float32)[batch["targets"]] * 100)
    result = tasks.summarize([TASK.metrics(logits, batch)])
    assert result["accuracy"] == 1.0
    assert float(TASK.loss(logits, batch)) < 1e-6
