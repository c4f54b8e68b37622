"""The search for tile sizes: one run through the interpreter, and the arithmetic of the table it writes."""

import json

import pytest
from absl import app, flags

from experiments import tune
from pallas_kernels.flash_attention import sizes
from pallas_kernels.flash_attention.sizes import TileSizes


def run(*arguments):
    values = flags.FlagValues()
    tune.define_flags(values)
    values(["tune", *arguments])
    tune.main(["tune"], values)


def test_without_a_gpu_it_says_what_runs_without_one():
    with pytest.raises(SystemExit, match="tune measures an NVIDIA GPU.*--interpret --table=FILE"):
        run()


def test_the_interpreter_never_writes_the_table_that_kernels_read(tmp_path):
    for more in ((), (f"--table={tune.SHIPPED_TABLE}",)):
        with pytest.raises(app.UsageError, match="--interpret times an interpreter"):
            run("--interpret", f"--output={tmp_path}", *more)
    with pytest.raises(app.UsageError, match="not sideways"):
        run("--interpret", "--passes=sideways")


@pytest.mark.slow
def test_one_search_from_candidates_to_the_table(tmp_path, capsys):
    table = tmp_path / "tiles.json"
    options = (
        "--interpret",
        f"--output={tmp_path}",
        f"--table={table}",
        "--block_q=16,24",
        "--block_k=16",
        "--rounds=1",
    )
    run(*options)
    (path,) = (x for x in tmp_path.glob("*.json") if x != table)
    results = json.loads(path.read_text())
    assert {"device", "versions", "command", "settings"} <= set(results)
    assert [(x["causal"], x["passes"]) for x in results["cases"]] == [
        (causal, name) for causal in (False, True) for name in ("forward", "backward")
    ]
    for case in results["cases"]:
        good, bad = case["candidates"]
        assert good["status"] == "ok" and good["time_s"]["median"] > 0, good
        assert bad["status"] == "refused" and "power of two" in bad["reason"]
    found = sizes.read_table(table.read_text())
    kind = results["device"]["kind"]
    assert found == {(kind, backward, 2, 16, 16): TileSizes(16, 16, 4, 1) for backward in (False, True)}
    capsys.readouterr()
    run(*options)
    assert capsys.readouterr().out.count("measured before") == 4
    with pytest.raises(app.UsageError, match="another settings"):
        run(*options[:-1], "--rounds=2")


def test_a_program_that_computes_something_else_is_left_out(monkeypatch):
    case = tune.Case("bfloat16", 16, 16, False, "forward", 1, 32, 1)
    monkeypatch.setattr(tune.Kernel, "__call__", lambda self, query, *_: (1.05 * query.astype("float32"),))
    (row,) = tune.search(case, [TileSizes(16, 16, 4, 1)], 1, 0.0, True)["candidates"]
    assert row["status"] == "wrong" and "time_s" not in row
    monkeypatch.setattr(tune.Kernel, "__call__", lambda *_: 1 / 0)
    (row,) = tune.search(case, [TileSizes(16, 16, 4, 1)], 1, 0.0, True)["candidates"]
    assert row["status"] == "fails" and "ZeroDivisionError" in row["reason"]


def measured(causal, times, name="forward"):
    rows = [
        {
            "sizes": {"block_q": q, "block_k": 16, "num_warps": 4, "num_stages": 1},
            "status": "ok",
            "time_s": {"median": t},
        }
        for q, t in times.items()
    ]
    return {"dtype": "bfloat16", "head_dim": 64, "value_dim": 64, "passes": name, "causal": causal, "candidates": rows}


def test_the_entry_is_the_best_over_all_cases_of_its_key():
    cases = [measured(False, {16: 1.0, 32: 1.2, 64: 9.0}), measured(True, {16: 2.0, 32: 1.0, 128: 0.1})]
    (entry,) = tune.best_entries(cases)
    assert entry == {
        **{"pass": "forward", "itemsize": 2, "head_dim": 64, "value_dim": 64},
        **{"block_q": 32, "block_k": 16, "num_warps": 4, "num_stages": 1},
    }
    assert tune.best_entries([measured(False, {16: 1.0}), measured(True, {32: 1.0})]) == []


def test_entries_take_the_place_of_those_with_the_same_key(tmp_path):
    path = tmp_path / "tiles.json"
    (first,) = tune.best_entries([measured(False, {16: 1.0})])
    (second,) = tune.best_entries([measured(False, {32: 1.0})])
    (backward,) = tune.best_entries([measured(False, {16: 1.0}, "backward")])
    for entries in ([first, backward], [second]):
        tune.update_table(path, "Some GPU", "9.0", entries)
    found = sizes.read_table(path.read_text())
    assert [found["Some GPU", back, 2, 64, 64].block_q for back in (False, True)] == [32, 16]
    before = path.read_text()
    with pytest.raises(ValueError, match="cannot run"):
        tune.update_table(path, "Some GPU", "9.0", [{**first, "num_stages": 99}])
    assert path.read_text() == before


def test_cases_of_the_flags():
    cases = list(tune.make_cases(["float32"], ["192/128"], ["forward"], 16384, 4096, 2048))
    assert [(x.head_dim, x.value_dim, x.causal, x.batch, x.heads) for x in cases] == [
        (192, 128, causal, 4, 10) for causal in (False, True)
    ]
