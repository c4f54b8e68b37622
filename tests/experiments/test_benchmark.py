"""The benchmark: its cases, its peers agree with each other, its tables and files, what it refuses."""

import importlib.util
import json

import jax
import numpy as np
import pytest
from absl import app, flags

from experiments import bench_peers, benchmark, timing
from experiments.bench_peers import Case
from experiments.benchmark import Row

HAS_TORCH = importlib.util.find_spec("torch") is not None


def tiny(kind, length=16, **options):
    return Case(kind, length, heads=2, kv_heads=1, dim=4, window=4, **options)


@pytest.mark.parametrize("kind", bench_peers.KINDS)
def test_pairs_are_those_of_the_dense_mask(kind):
    case = tiny(kind)
    assert case.pairs == np.broadcast_to(bench_peers._dense_mask(case), (1, 1, 16, 16))[0, 0].sum() or kind == "full"
    assert kind != "full" or case.pairs == 256


@pytest.mark.parametrize("kind", ["causal", "padding", "window", "documents", "gna"])
def test_peers_compute_the_same(kind):
    case = tiny(kind)
    names = ["reference", "jax.nn", *(["torch sdpa"] if HAS_TORCH else [])]
    functions = {
        "reference": lambda q, k, v: bench_peers._jattn("reference", case)(q, k, v),
        "jax.nn": lambda q, k, v: bench_peers._jax_nn("jax.nn", case)(q, k, v),
    }
    if HAS_TORCH:
        import torch

        attend = bench_peers._torch_sdpa(torch, case, "cpu")
        functions["torch sdpa"] = lambda q, k, v: attend(
            *(torch.tensor(array).transpose(1, 2) for array in (q, k, v))
        ).transpose(1, 2)
    found = [np.asarray(functions[name](*case.arrays[:3])) for name in names]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=0, atol=2e-6)


def test_a_program_knows_its_compile_time_and_memory():
    program = bench_peers.make("reference", tiny("causal"), "backward")
    assert program.compile_s > 0
    assert program.temp_bytes > 0
    out, gradients = program.run()
    assert out.shape == (1, 16, 2, 4)
    assert [gradient.shape[2] for gradient in gradients] == [2, 1, 1]


def test_what_is_not_to_be_had_says_why():
    with pytest.raises(bench_peers.Unavailable, match="square"):
        bench_peers.make("blockwise", tiny("gna", 15), "forward")
    with pytest.raises(ValueError, match="kind must be one of"):
        Case("causl", 4)


def test_rounds_pair_their_times():
    calls = []
    times = timing.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 5)
    assert [len(times[name]) for name in "ab"] == [5, 5]
    assert all(sorted(calls[place : place + 2]) == ["a", "b"] for place in range(0, 10, 2))
    assert len(timing.interleaved({"a": lambda: None}, 50, budget=0.0)["a"]) == 3
    assert timing.ratio([1.0, 2.0, 9.0], [1.0, 1.0, 3.0]) == {"median": 2.0, "iqr": 1.0, "n": 3}
    assert timing.ratio([6.0], [1.0, 2.0, 3.0])["median"] == 3.0


def test_dense_programs_beyond_the_bound_are_named_in_the_table():
    rows = benchmark.measure(tiny("causal"), "forward", ["jax.nn"], 1, True, max_dense_length=8)
    assert rows[0].status == "left out"
    assert "--max_dense_length=8" in benchmark.table(rows)


def test_a_failing_peer_leaves_the_others(monkeypatch):
    real = bench_peers.make

    def make(name, case, which):
        if name == "reference":
            raise RuntimeError("out of memory\nmore")
        return real(name, case, which)

    monkeypatch.setattr(bench_peers, "make", make)
    broken, good = benchmark.measure(tiny("causal"), "forward", ["reference", "jax.nn"], 3, True, 8192)
    assert (broken.status, broken.reason) == ("failed", "RuntimeError: out of memory")
    assert good.ratio == {"median": 1.0, "iqr": 0.0, "n": 3}
    assert good.ns_per_pair == pytest.approx(1e9 * good.seconds["median"] / (136 * 2))


def test_a_slow_call_is_measured_once(monkeypatch):
    monkeypatch.setattr(timing, "SLOW_SECONDS", 0.0)
    (row,) = benchmark.measure(tiny("causal"), "forward", ["jax.nn"], 5, True, 8192)
    assert row.seconds["n"] == 1


def test_time_for_a_pair_against_causal():
    rows = [
        Row("causal", 8, "forward", "blockwise", ns_per_pair=2.0),
        Row("window 4", 8, "forward", "blockwise", ns_per_pair=3.0),
        Row("window 4", 8, "backward", "blockwise", ns_per_pair=3.0),
    ]
    benchmark.compare_pairs(rows)
    assert [row.pair_ratio for row in rows] == [None, 1.5, None]


def flags_of(*arguments):
    values = flags.FlagValues()
    benchmark.define_flags(values)
    values(["benchmark", *arguments])
    return values


def test_a_suite_writes_its_files(tmp_path, capsys):
    values = flags_of(
        "--suite=short", "--lengths=8", "--rounds=3", "--heads=1", "--dim=4", "--passes=forward", f"--output={tmp_path}"
    )
    results = benchmark.run(values)
    written = json.loads((tmp_path / "short.json").read_text())
    assert written["schema"] == benchmark.SCHEMA
    assert len(written["rows"]) == len(results["rows"]) == 6
    assert {row["implementation"] for row in written["rows"]} == {"jattn", "jax.nn"}
    assert all(row["status"] == "ok" and row["ratio"]["n"] == 3 for row in written["rows"])
    assert (tmp_path / "short.png").read_bytes().startswith(b"\x89PNG")
    assert "x jax.nn" in capsys.readouterr().out


def test_wrong_words_are_refused(monkeypatch):
    before = jax.config.jax_enable_compilation_cache
    try:
        with pytest.raises(SystemExit, match="unknown implementation 'blokwise'"):
            benchmark.main(["benchmark"], flags_of("--implementations=blokwise"))
        with pytest.raises(SystemExit, match="passes must be among"):
            benchmark.main(["benchmark"], flags_of("--implementations=blockwise", "--passes=sideways"))
        with pytest.raises(app.UsageError):
            benchmark.main(["benchmark", "extra"], flags_of())
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
