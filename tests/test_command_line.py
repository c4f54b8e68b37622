"""The command line says what the catalogue holds, and exits with what the checks found."""

import json
import subprocess
import sys

import pytest

from jattn import catalog
from jattn.__main__ import main
from jattn.testing import conformance


def test_the_catalogue_is_a_table_with_one_line_an_entry(capsys):
    assert main(["catalog"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == [entry.name for entry in catalog.entries()]


def test_the_catalogue_as_json_has_the_keys_of_an_entry(capsys):
    assert main(["catalog", "--json", "--kind", "cache"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} >= {"full_cache", "window_cache"}
    assert all(row["kind"] == "cache" for row in rows)


def test_the_catalogue_is_filtered_by_family(capsys):
    main(["catalog", "--json", "--family", "tasks"])
    assert {row["family"] for row in json.loads(capsys.readouterr().out)} == {"tasks"}


def test_show_prints_docstring_papers_cost_and_signature(capsys):
    assert main(["show", "softmax_attention"]) == 0
    out = capsys.readouterr().out
    for text in ("softmax_attention(", "Attention Is All You Need (2017) arXiv 1706.03762", "cost: work", "fidelity: "):
        assert text in out


@pytest.mark.parametrize("entry", catalog.entries(), ids=lambda entry: entry.name)
def test_every_entry_can_be_shown(entry, capsys):
    assert main(["show", entry.name]) == 0
    assert entry.target.__name__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "sofmax_attention"], "unknown mechanism 'sofmax_attention'; nearest: softmax_attention"),
        (["check", "full_cach"], "unknown mechanism 'full_cach'; nearest: full_cache"),
        (["check", "full_cache", "--only", "content"], "unknown check 'content'; nearest: contents"),
        (["catalog", "--family", "task"], "unknown family 'task'; nearest: tasks"),
        (["catalog", "--kind", "prmitive"], "unknown kind 'prmitive'; nearest: primitive"),
    ],
)
def test_unknown_names_are_answered_with_near_ones(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_check_prints_a_line_a_check_and_seconds_on_request(capsys):
    assert main(["check", "full_cache", "--time"]) == 0
    out = capsys.readouterr().out
    assert "[1/1]" in out
    assert " s  full_cache contents: passed (13 slots)" in out
    assert "3 passed" in out


def test_a_failed_check_is_the_exit_status(capsys, monkeypatch):
    def check_contents(bench):
        raise conformance.Failed("broken on purpose")

    monkeypatch.setitem(conformance.CHECKS, "cache", (check_contents,))
    assert main(["check", "full_cache", "--quiet"]) == 1
    assert "FAILED full_cache contents: failed (broken on purpose)" in capsys.readouterr().out


@pytest.mark.slow
def test_several_processes_check_the_same(capsys):
    assert main(["check", "full_cache", "sinusoidal", "--only", "contents", "gradients", "--jobs", "2"]) == 0
    out = capsys.readouterr().out
    assert "full_cache contents: passed" in out
    assert "sinusoidal gradients: passed" in out


def test_the_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "jattn", "--help"], capture_output=True, text=True, check=True)
    assert "jattn check moba_attention --time" in done.stdout


@pytest.mark.parametrize("jobs", ["0", "two"])
def test_a_bad_number_of_processes_is_refused(jobs, capsys):
    with pytest.raises(SystemExit):
        main(["check", "--jobs", jobs])
    assert "must be a number from 1 on" in capsys.readouterr().err
