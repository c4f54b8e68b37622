"""Files of a run: whole or absent, metrics without doubled steps, checkpoints that restore every bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import records


def test_json_is_json(tmp_path):
    value = {
        "a": np.float32(0.5),
        "b": jnp.arange(2),
        "c": float("nan"),
        "d": [np.int64(3), np.inf],
        5: None,
        "e": True,
    }
    records.write_json(tmp_path / "deep" / "x.json", value)
    assert json.loads((tmp_path / "deep" / "x.json").read_text()) == {
        "a": 0.5,
        "b": [0, 1],
        "c": None,
        "d": [3, None],
        "5": None,
        "e": True,
    }


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    records.write_json(path, 1)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(records.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        records.write_json(path, 2)
    assert [found.name for found in tmp_path.iterdir()] == ["x.json"]
    assert json.loads(path.read_text()) == 1


def test_metrics_behind_the_restored_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = records.MetricsLog(path)
    for step in (1, 2, 3):
        log.append(step, "train", loss=step / 2)
    with open(path, "a") as file:
        file.write('{"step": 4, "spl')
    assert [line["step"] for line in log.read(path)] == [1, 2, 3]
    records.MetricsLog(path, 2).append(3, "valid", loss=float("nan"))
    assert records.MetricsLog.read(path) == [
        {"step": 1, "split": "train", "loss": 0.5},
        {"step": 2, "split": "train", "loss": 1.0},
        {"step": 3, "split": "valid", "loss": None},
    ]
    assert records.MetricsLog.read(tmp_path / "absent") == []


def tree():
    return {
        "wide": jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32),
        "narrow": jnp.arange(3, dtype=jnp.bfloat16) / 3,
        "count": jnp.asarray(7, jnp.int32),
        "keys": jax.random.split(jax.random.key(3), 2),
    }


def test_checkpoints_keep_every_bit_and_only_the_last(tmp_path):
    checkpoints = records.Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.latest() is None
    with pytest.raises(ValueError, match="no checkpoint in"):
        checkpoints.restore(tree())
    saved = tree()
    for step in (1, 2, 3):
        checkpoints.save(step, {**saved, "count": jnp.asarray(step, jnp.int32)})
    checkpoints.close()
    again = records.Checkpoints(tmp_path / "c", keep=2)
    assert again.latest() == 3
    assert {path.name for path in (tmp_path / "c").iterdir()} >= {"2", "3"}
    assert not (tmp_path / "c" / "1").exists()
    restored = again.restore(jax.tree.map(jnp.zeros_like, {**saved, "keys": None}) | {"keys": saved["keys"]})
    assert int(restored["count"]) == 3
    assert int(again.restore(saved, 2)["count"]) == 2
    for name in ("wide", "narrow"):
        assert restored[name].dtype == saved[name].dtype
        assert np.asarray(restored[name]).tobytes() == np.asarray(saved[name]).tobytes()
    assert (jax.random.bits(restored["keys"][1]) == jax.random.bits(saved["keys"][1])).all()
    again.close()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    checkpoints = records.Checkpoints(tmp_path / "c")
    checkpoints.save(1, tree())
    with pytest.raises(ValueError, match=r"another model at 'wide': expected \(\(3, 5\), 'float32'\), got \(\(3, 4\)"):
        checkpoints.restore({**tree(), "wide": jnp.zeros((3, 5))})
    with pytest.raises(ValueError, match="another model at 'more'"):
        checkpoints.restore({**tree(), "more": jnp.zeros(())})
    checkpoints.close()
    with pytest.raises(ValueError, match="keep must be at least 1"):
        records.Checkpoints(tmp_path / "c", keep=0)


def test_the_plot_is_a_picture(tmp_path):
    lines = [{"step": step, "split": "train", "loss": 1 / step} for step in (1, 2, 3)]
    lines += [{"step": 3, "split": "valid", "accuracy": 0.5}, {"step": 4, "split": "train", "loss": None}]
    records.plot_losses(tmp_path / "loss.png", lines, "accuracy", "title")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    records.plot_losses(tmp_path / "empty.png", [], "accuracy", "nothing yet")
    assert (tmp_path / "empty.png").stat().st_size > 1000


def test_options_read_literals_and_strings():
    assert records.parse_options("") == {}
    assert records.parse_options("a=1,b=(2, 3),c=exp,d=[1,{'x': 2}],e=None, f = -0.5,") == {
        "a": 1,
        "b": (2, 3),
        "c": "exp",
        "d": [1, {"x": 2}],
        "e": None,
        "f": -0.5,
    }
    for text in ("a", "=3", "a b=3"):
        with pytest.raises(ValueError, match="options must be written as name=value"):
            records.parse_options(text)


def test_clear_removes_what_it_is_told_to(tmp_path):
    for name in ("mine", "folder/inside", "yours"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    records.clear(tmp_path, ("mine", "folder", "absent"))
    assert [path.name for path in tmp_path.iterdir()] == ["yours"]
