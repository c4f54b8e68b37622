"""The benchmark's arithmetic and one tiny run of each suite; no figure of time is asserted."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from experiments import benchmark, peers, timing


def test_ratios_are_taken_round_by_round():
    slow, fast = timing.Subject("slow", lambda: None), timing.Subject("fast", lambda: None)
    slow.times, fast.times = [2.0, 4.0, 12.0], [1.0, 2.0, 4.0]
    assert timing.ratio(slow, fast)["median"] == 2.0
    assert timing.spread(slow.times)["median"] == 4.0


def test_subjects_are_run_in_turn():
    order = []
    subjects = [timing.Subject(name, lambda name=name: order.append(name)) for name in "ab"]
    timing.interleave(subjects, 2)
    assert order == ["a", "b"] * 3 and len(subjects[0].times) == 2


def test_visited_pairs():
    arrays = tuple(jnp.zeros((1, 1024, 1, 4)) for _ in range(3))
    assert benchmark.visited_pairs(arrays) == 1024**2
    assert benchmark.visited_pairs(arrays, is_causal=True) == 3 * 512**2
    window = {"mask": jattn.masks.sliding_window(8), "block_sizes": (128, 128)}
    assert benchmark.visited_pairs(arrays, **window) == (8 + 7) * 128**2


def test_a_peer_that_refuses_says_why():
    arrays = tuple(jnp.zeros((1, 8, 2, 4)) for _ in range(3))
    assert "Error" in peers.jax_nn("jax.nn", arrays, False, "no such implementation")


@pytest.mark.slow
def test_every_suite_writes_what_it_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark.jax.config, "update", lambda *_: None)
    rows = [*benchmark.lengths_suite([32], 2, 32, 1), *benchmark.short_suite([16], 2), *benchmark.sparse_suite(256, 2)]
    assert {row["suite"] for row in rows} == {"lengths", "short", "sparse"}
    assert all(row["time_s"]["median"] > 0 and np.isfinite(row["ratio"]["median"]) for row in rows)
    benchmark.plot([row for row in rows if row["suite"] == "lengths"], tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").stat().st_size > 1000
    json.dumps(rows)


def test_many_runs_in_one_program_are_all_made():
    counted = []

    def function(x, y):
        jax.debug.callback(lambda: counted.append(1))
        return jnp.sin(x) @ y

    arrays = (jnp.ones((3, 3)), jnp.full((3, 3), 2.0))
    found = jax.jit(timing.repeated(function, 4))(*arrays)
    jax.effects_barrier()
    assert len(counted) == 4
    np.testing.assert_allclose(found, jnp.sin(arrays[0]) @ arrays[1], rtol=1e-6)


def test_a_measurement_is_divided_among_its_calls_and_runs(monkeypatch):
    calls = []
    subject = timing.Subject("x", lambda: calls.append(1), calls=5, runs=2)
    clock = iter([0.0, 20.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert subject.measure() == 2.0 and len(calls) == 5


def test_short_programs_make_more_calls_at_a_time():
    subject = timing.Subject("x", lambda: None, runs=10)
    subject.measure = lambda: 0.001
    timing.calibrate([subject], 0.1)
    assert subject.calls == 10
    timing.calibrate([subject], 0.0)
    assert subject.calls == 1
