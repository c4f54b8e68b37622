"""The catalogue finds what is there, by reading files, and answers what is not there with what is near."""

import json
import pathlib
import subprocess
import sys
import types

import pytest

from jattn import catalog
from jattn.mechanisms.entry import KINDS, PATTERNS, Cost, Entry, Paper, growth

ROOT = pathlib.Path(catalog.__file__).parent


def toy(name="toy", **changes):
    return Entry(**{"name": name, "kind": "primitive", "family": "softmax", "function": max, **changes})


def module(name, **constants):
    made = types.ModuleType(name)
    vars(made).update(constants)
    return made


def test_every_file_with_an_entry_is_found_and_no_other(tmp_path):
    for path, text in {
        "mechanisms/softmax/one.py": "ENTRY = 1",
        "mechanisms/softmax/none.py": "# no ENTRY here\nx = 'ENTRY'",
        "cache/__init__.py": "ENTRIES = ()",
        "elsewhere/two.py": "ENTRY = 2",
        "tasks/two.py": '"""Doc."""\nENTRY: int = 2',
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert catalog.modules(tmp_path, "p") == ["p.cache", "p.mechanisms.softmax.one", "p.tasks.two"]


def test_entries_are_sorted_and_named_after_what_they_are():
    names = [entry.name for entry in catalog.entries()]
    assert names == sorted(set(names))
    assert names, "the catalogue is empty"
    for entry in catalog.entries():
        assert catalog.find(entry.name) is entry
        assert catalog.get(entry.name) is entry.target
        assert entry.fidelity or not entry.papers, f"{entry.name} must say how sure its definition is"
        assert entry.target.__doc__, f"{entry.name} has no docstring"


def test_mechanisms_stand_in_the_folder_of_their_family():
    for name in catalog.modules(ROOT, within=["mechanisms"]):
        loaded = sys.modules.get(name) or __import__(name, fromlist=["ENTRY"])
        family = name.split(".")[2]
        for entry in catalog.collect([loaded]):
            assert entry.family == family, f"{entry.name} in {name} says family {entry.family!r}"
            assert entry.patterns or entry.kind in ("pooling", "block", "router"), f"{entry.name} supports no pattern"
            assert entry.cost is not None, f"{entry.name} declares no cost"
            assert entry.example is not None, f"{entry.name} has no example"


def test_two_files_may_not_claim_one_name():
    with pytest.raises(ValueError, match=r"two entries are named 'toy': in a and in b"):
        catalog.collect([module("a", ENTRY=toy()), module("b", ENTRIES=(toy("other"), toy()))])
    same = toy()
    assert catalog.collect([module("a", ENTRY=same), module("b", ENTRY=same)]) == (same,)


def test_a_constant_that_holds_something_else_is_an_error():
    with pytest.raises(ValueError, match=r"ENTRY and ENTRIES of a must hold Entry objects, got 3"):
        catalog.collect([module("a", ENTRY=3)])


@pytest.mark.parametrize(
    ("typed", "near"), [("full_cach", "full_cache"), ("fullcache", "full_cache"), ("window", "window_cache")]
)
def test_unknown_names_are_answered_with_near_ones(typed, near):
    with pytest.raises(ValueError, match=f"unknown mechanism '{typed}'; nearest: .*{near}"):
        catalog.get(typed)


def test_a_name_like_no_other_gets_the_whole_list():
    with pytest.raises(ValueError, match=r"unknown mechanism 'zzzzzz'; there are: .*full_cache"):
        catalog.find("zzzzzz")
    with pytest.raises(ValueError, match=r"unknown mechanism 3; there are: "):
        catalog.find(3)


def test_rows_have_the_keys_of_the_dataclass_and_survive_json():
    paper = Paper("Attention Is All You Need", "1706.03762", 2017)
    entry = toy(papers=(paper,), cost=Cost("T^2", "T"), patterns=PATTERNS[:2], exempt={"decode": "no state"})
    row = json.loads(json.dumps(catalog.row(entry)))
    assert set(row) == set(Entry.__dataclass_fields__)
    assert row["papers"] == [{"title": "Attention Is All You Need", "arxiv": "1706.03762", "year": 2017}]
    assert row["cost"] == {"flops": "T^2", "memory": "T"}
    assert row["function"] == "builtins:max"
    assert row["layer"] is None
    assert row["patterns"] == ["noncausal self", "causal self"]
    for entry in catalog.entries():
        json.dumps(catalog.row(entry))


def test_nothing_is_imported_before_it_is_asked_for():
    code = "import sys, jattn.catalog; print([m for m in sys.modules if m.startswith('jattn.tasks')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "two words"}, "name must be an identifier"),
        ({"kind": "primitve"}, "kind of entry 'toy' must be one of primitive, layer"),
        ({"family": ""}, "family of entry 'toy' must be an identifier"),
        ({"function": None}, "exactly one of function and layer"),
        ({"layer": int}, "exactly one of function and layer"),
        ({"function": 3}, "must be a callable"),
        ({"function": None, "layer": 3}, "must be a class"),
        ({"papers": ("1706.03762",)}, "must be a tuple of Paper"),
        ({"patterns": ("causal",)}, "must be a tuple with some of"),
        ({"patterns": ("causal self", "causal self")}, "each at most once"),
        ({"cost": "T"}, "must be a Cost"),
        ({"decode": None}, "must be a string: how to decode"),
        ({"example": 3}, "must be a function example"),
        ({"fidelity": None}, "fidelity of entry 'toy' must be a string"),
        ({"exempt": {"decode": ""}}, "from the name of a check to the reason"),
    ],
)
def test_a_bad_entry_fails_where_it_is_written(changes, message):
    with pytest.raises(ValueError, match=message):
        toy(**changes)


def test_papers_and_costs_check_themselves():
    with pytest.raises(ValueError, match="arxiv must be an id"):
        Paper("A title", "arXiv:1706.03762", 2017)
    with pytest.raises(ValueError, match="title must be"):
        Paper(" ", "", 2017)
    with pytest.raises(ValueError, match="year must be"):
        Paper("A title", "", 17)
    assert Paper("A title", "", 1997).arxiv == ""
    assert Paper("A title", "cs.CL/0309034", 2003).arxiv == "cs.CL/0309034"
    with pytest.raises(ValueError, match=r"growth 'T\^2\+T' is not understood at 'T\^2\+T'"):
        Cost("T^2+T", "T")
    with pytest.raises(ValueError, match="memory must be a string"):
        Cost("T", 1)


@pytest.mark.parametrize(
    ("expression", "value"), [("1", 1), ("T", 4), ("T^2", 16), ("T^1.5", 8), ("T * log(T)", 4 * 1.3862943611198906)]
)
def test_growth_is_evaluated(expression, value):
    assert growth(expression, 4) == pytest.approx(value)


def test_kinds_and_patterns_are_the_ones_everybody_else_names():
    assert len(set(KINDS)) == 18
    assert PATTERNS == ("noncausal self", "causal self", "noncausal cross", "causal cross")
