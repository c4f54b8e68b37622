"""The comparison: what it writes, what it keeps, what it refuses, and the figures it reads off programs and shapes."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from absl import app, flags

from experiments import cells as cell_module
from experiments import compare, measures
from experiments.cells import Request, parse_requests
from experiments.training import ModelOptions, Trainer, TrainOptions
from jattn import tasks

TINY = compare.Overrides(steps=4, batch=4, width=8, layers=1, heads=2, seeds=2)
RECALL = "mqar:seq_len=16,vocab_size=32,num_kv_pairs=2,num_eval_examples=10"


def cells_of(mechanisms, chosen, overrides=TINY):
    return compare.make_cells(parse_requests(mechanisms), parse_requests(chosen), overrides)


def trainer_of(name, task, **options):
    model = ModelOptions(attention=name, attention_options=options, width=8, depth=2, num_heads=2, position="none")
    return Trainer(task, model, TrainOptions(steps=2, batch_size=2))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    cells = cells_of("softmax_attention,AgentAttention:grid=(4,4),num_agents=4", RECALL)
    return folder, cells, compare.run(cells, folder, "the <command>")


def test_results_have_the_agreed_keys(finished):
    folder, _, results = finished
    assert results == json.loads((folder / "results.json").read_text())
    assert list(results) == ["schema", "command", "versions", "device", "budget", "cells"]
    cell, other = results["cells"]
    assert set(cell) == set(compare.COLUMNS) == set(other)
    assert [seed["seed"] for seed in cell["seeds"]] == [0, 1]
    accuracies = [seed["metrics"]["accuracy"] for seed in cell["seeds"]]
    assert set(cell["quality"]) == {"metric", "mean", "std", "n", "higher_is_better"}
    np.testing.assert_allclose(cell["quality"]["mean"], np.mean(accuracies))
    np.testing.assert_allclose(cell["quality"]["std"], np.std(accuracies, ddof=1))
    assert set(cell["step_time_s"]) == {"median", "iqr"}
    assert cell["temp_bytes"]["train"] > cell["temp_bytes"]["forward"] > 0
    assert cell["visited_share"] == pytest.approx(17 / 32)
    # Keys and values of 2 heads of 4 numbers and the position of the slot, 4 bytes each; the count of tokens.
    assert cell["decode_state"] == {"bytes_per_token": 4 * (2 * 8 + 1), "bytes_fixed": 4}


def test_a_cell_that_did_not_learn_says_so(finished):
    cell = finished[2]["cells"][0]
    assert cell["status"] == "not learned"
    assert re.search(r"2 of 2 seeds did not learn within the budget: the bar is accuracy at least", cell["reason"])


def test_a_mechanism_without_the_pattern_is_unsupported(finished):
    cell = finished[2]["cells"][1]
    assert cell["status"] == "unsupported"
    assert "causal self" in cell["reason"]
    assert cell["quality"] is None


def test_the_report_stands_alone(finished):
    page = (finished[0] / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "the &lt;command&gt;" in page
    assert not re.search(r"(src|href)=.?(http|/|\w+\.png)", page)
    for name in ("curves.png", "quality_time.png", "memory.png"):
        assert (finished[0] / name).read_bytes().startswith(b"\x89PNG")


def test_finished_cells_are_kept(finished, monkeypatch):
    folder, cells, results = finished
    monkeypatch.setattr(cell_module, "run_cell", lambda *arguments: pytest.fail("the cell was there already"))
    assert compare.run(cells, folder, "the <command>") == results


def test_another_budget_is_another_cell(finished):
    cell = finished[1][0]
    keys = {
        dataclasses.replace(cell, seeds=(0,)).key,
        dataclasses.replace(cell, train=dataclasses.replace(cell.train, steps=5)).key,
        dataclasses.replace(cell, task_options={**cell.task_options, "seq_len": 8}).key,
        cell.key,
    }
    assert len(keys) == 4
    assert dataclasses.replace(cell).key == cell.key


def test_a_failure_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    def trained(cell, task, report):
        if cell.mechanism == "ssa":
            raise RuntimeError("the mechanism broke")
        return {"status": "ok", "curve": []}

    monkeypatch.setattr(cell_module, "_trained", trained)
    cells = cells_of("ssa,kv_bias", RECALL)
    outcomes = [cell_module.run_cell(cell) for cell in cells]
    assert [outcome["status"] for outcome in outcomes] == ["failed", "ok"]
    assert outcomes[0]["reason"] == "RuntimeError: the mechanism broke"
    results = compare.run(cells[:1], tmp_path, "command")
    assert results["cells"][0]["status"] == "failed"
    assert not list((tmp_path / "cells").glob("*"))


def test_no_cell_is_begun_after_the_minutes(tmp_path, monkeypatch):
    monkeypatch.setattr(cell_module, "run_cell", lambda *arguments: pytest.fail("too late"))
    results = compare.run(cells_of("ssa", RECALL), tmp_path, "command", minutes=0.0)
    assert results["cells"] == []
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("mechanisms", "chosen", "message"),
    [
        ("sofmax_attention", "mqar", "softmax_attention"),
        ("softmax_attention", "mqr", "mqar"),
        ("softmax_attention:windw=3", "mqar", "no option 'windw'"),
        ("softmax_attention", "mqar:seq_length=3", "seq_len"),
        ("causal=True", "mqar", "must follow a name"),
        ("ssa,ssa", "mqar", "named twice"),
        ("mqar", "mqar", "cannot stand as the attention"),
    ],
)
def test_a_wrong_word_is_answered_before_anything_runs(mechanisms, chosen, message):
    with pytest.raises(ValueError, match=message):
        cells_of(mechanisms, chosen)


def test_the_defaults_are_eight_mechanisms_on_three_tasks():
    cells = cells_of(compare.MECHANISMS, compare.TASKS, compare.Overrides())
    assert len({cell.label for cell in cells}) >= 8
    assert {cell.task for cell in cells} == {"mqar", "prose", "digits"}


def test_flags_reach_the_cells(tmp_path, monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(
        compare, "run", lambda cells, folder, command, minutes, fresh: seen.update(cells=cells) or {"cells": []}
    )
    before = jax.config.jax_enable_compilation_cache
    values = flags.FlagValues()
    compare.define_flags(values)
    values(["compare", "--mechanisms=ssa", "--tasks=digits", "--steps=7", "--width=16", "--seeds=4"])
    try:
        compare.main(["compare"], values)
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
    (cell,) = seen["cells"]
    assert (cell.train.steps, cell.model.width, cell.seeds) == (7, 16, (0, 1, 2, 3))
    with pytest.raises(app.UsageError):
        compare.main(["compare", "extra"], values)


def test_options_may_hold_commas_and_brackets():
    assert parse_requests("a:grid=(4,4),n=2;b c:kind=x") == [
        Request("a", {"grid": (4, 4), "n": 2}, "a:grid=(4,4),n=2"),
        Request("b", {}, "b"),
        Request("c", {"kind": "x"}, "c:kind=x"),
    ]


@pytest.mark.parametrize(
    ("name", "options", "share"),
    [
        ("gna_attention", {"window": 4}, (1 + 2 + 3 + 13 * 4) / 256),
        ("moba_attention", {"chunk_size": 4, "topk": 1}, 4 * 10 / 256),
        ("linear_attention", {}, None),
    ],
)
def test_visited_share_counts_what_masks_and_layouts_leave(name, options, share):
    task = tasks.get("mqar", seq_len=16, vocab_size=32, num_kv_pairs=2)
    trainer = trainer_of(name, task, **options)
    state = trainer.init(0)
    found = measures.visited_share(trainer, state.params, state.other, task.batch("valid", 0, 2))
    assert found is share if share is None else found == pytest.approx(share)


def test_decode_state_of_a_fixed_state_and_of_a_window():
    task = tasks.get("mqar", seq_len=16, vocab_size=32, num_kv_pairs=2)

    def state(name, **options):
        return measures.decode_state(task, trainer_of(name, task, **options).model)

    # 2 layers of 2 heads: the state 4 x 4, its normalizer 4; one count of tokens a layer.
    assert state("linear_attention") == measures.DecodeState(0.0, 2 * 4 * (2 * (16 + 4) + 1))
    assert state("gna_attention", window=4) == measures.DecodeState(0.0, 2 * 4 * (4 * (2 * 8 + 1) + 1))
    assert measures.decode_state(tasks.get("digits"), ModelOptions("linear_attention")) is None


def test_the_start_is_rescaled_the_same_way_for_all():
    task = tasks.get("mqar", seq_len=16, vocab_size=32, num_kv_pairs=2)
    usual, balanced = (
        Trainer(task, ModelOptions(width=8, **start), TrainOptions(steps=2)).init(3)
        for start in ({}, cell_module.START)
    )
    ratios = {
        jax.tree_util.keystr(path, simple=True, separator="."): float(np.ravel(new)[0] / np.ravel(old)[0])
        for (path, new), (_, old) in zip(
            jax.tree_util.tree_flatten_with_path(balanced.params)[0],
            jax.tree_util.tree_flatten_with_path(usual.params)[0],
            strict=True,
        )
    }
    scaled = {name: round(ratio, 3) for name, ratio in ratios.items() if round(ratio, 3) != 1}
    assert sorted(set(scaled.values())) == [0.3, 5.0]
    assert sum(ratio == 5.0 for ratio in scaled.values()) == 2  # tokens and positions
    assert sum(ratio == 0.3 for ratio in scaled.values()) == 4  # two projections in each of two blocks
