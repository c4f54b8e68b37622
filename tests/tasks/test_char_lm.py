"""Character language modelling: where the text comes from, how it is cut, and that windows cover it once."""

import collections
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jattn import tasks
from jattn.tasks import char_lm


@pytest.mark.parametrize("name", ["prose", "code"])
def test_splits_are_three_pieces_of_one_text(name):
    task = tasks.get(name)
    text = task.text()
    pieces = task.corpus.splits
    assert sum(map(len, pieces.values())) == len(text)
    joined = np.concatenate([pieces[split] for split in ("train", "valid", "test")])
    np.testing.assert_array_equal(joined, task.corpus.encode(text))
    assert len(pieces["train"]) == pytest.approx(0.9 * len(text), abs=1)
    assert task.text() == text


@pytest.mark.parametrize("name", ["prose", "code"])
def test_the_vocabulary_comes_from_the_training_text_with_a_rare_bucket(name):
    task = tasks.get(name, min_count=20)
    text = task.text()
    training = text[: len(text) * 90 // 100]
    characters = task.corpus.characters
    assert list(characters) == sorted(set(characters))
    counts = collections.Counter(training)
    assert set(characters) == {letter for letter, count in counts.items() if count >= 20}
    assert task.vocab_size == len(characters) + 1
    assert task.corpus.encode(characters).tolist() == list(range(1, task.vocab_size))
    assert task.corpus.encode("\U0001f9ff\udcff").tolist() == [0, 0]
    rare = task.corpus.splits["train"] == char_lm.RARE
    assert rare.sum() == sum(count for count in counts.values() if count < 20)
    assert 0 < rare.mean() < 0.01


def test_the_prose_is_english_and_the_code_is_python():
    assert char_lm.prose_text().count(" the ") > 1000
    code = char_lm.code_text()
    assert len(code) > 1_000_000
    assert code.count("\n    def ") > 1000


def test_code_leaves_out_tests_packages_and_what_a_build_made(monkeypatch, tmp_path):
    for path in (
        "b.py",
        "a/z.py",
        "a/test/t.py",
        "x/tests/t.py",
        "site-packages/p.py",
        "dist-packages/p.py",
        "_sysconfigdata_linux.py",
        "idlelib/idle_test/t.py",
        "data.txt",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path + " " * 100_000)
    monkeypatch.setattr(char_lm.sysconfig, "get_path", lambda name: str(tmp_path))
    assert char_lm.code_text().split() == ["a/z.py", "b.py"]


def test_decode_turns_encode_back():
    task = tasks.get("prose")
    text = task.text()[1000:1200]
    assert task.corpus.decode(task.corpus.encode(text)) == text


@pytest.mark.parametrize(("seq_len", "limit"), [(7, 50), (7, 51), (16, 65), (64, 40), (1, 9)])
def test_evaluation_predicts_every_character_but_the_first_once(seq_len, limit):
    task = tasks.get("prose", seq_len=seq_len, eval_characters=limit)
    tokens = task.tokens("valid")
    assert len(tokens) == limit
    targets, inputs = [], []
    for step in range(task.num_batches("valid", 2)):
        batch = task.batch("valid", step, 2)
        targets.extend(batch["targets"][batch["weights"] > 0].tolist())
        inputs.extend(batch["inputs"][batch["weights"] > 0].tolist())
    assert targets == tokens[1:].tolist()
    assert inputs == tokens[:-1].tolist()


def test_training_windows_lie_in_the_training_text():
    task = tasks.get("prose", seq_len=100)
    training = task.corpus.decode(task.tokens("train"))
    for row in task.batch("train", 3, 8)["inputs"]:
        assert task.corpus.decode(row) in training


def test_bits_per_character_is_the_loss_over_log_two():
    task = tasks.get("prose", seq_len=20)
    batch = task.batch("test", 0, 3)
    uniform = jnp.zeros((3, 20, task.vocab_size))
    result = tasks.summarize([task.metrics(uniform, batch)])
    assert result["bits_per_character"] == pytest.approx(math.log2(task.vocab_size), rel=1e-6)
    assert result["loss"] == pytest.approx(math.log(task.vocab_size), rel=1e-6)


@pytest.mark.parametrize("name", ["prose", "code"])
def test_knowing_how_often_characters_occur_has_not_learned(name):
    task = tasks.get(name, seq_len=128)
    counts = np.bincount(task.tokens("train"), minlength=task.vocab_size)
    logits = jnp.log(jnp.asarray((counts + 1) / (counts + 1).sum()))
    batch = task.batch("train", 0, 256)
    result = tasks.summarize([task.metrics(jnp.broadcast_to(logits, (256, 128, task.vocab_size)), batch)])
    assert result["bits_per_character"] == pytest.approx(task.threshold, abs=0.1)
    assert 3 < task.threshold < 6
    assert not task.learned(task.threshold)
    assert task.learned(task.threshold - 1)


def test_a_window_longer_than_the_text_is_refused():
    task = tasks.get("prose", seq_len=10_000_000)
    with pytest.raises(ValueError, match="split 'train' of 'prose' must hold 10000001 characters"):
        task.batch("train", 0, 1)
    with pytest.raises(ValueError, match="seq_len must be an integer of at least 1"):
        tasks.get("prose", seq_len=0)


def test_text_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(char_lm.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="task 'code' reads the standard library's sources"):
        char_lm.code_text()
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match=r"task 'prose' reads pydoc_data\.topics"):
        char_lm.prose_text()
