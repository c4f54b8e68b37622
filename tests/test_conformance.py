"""Every entry of the catalogue keeps what its kind promises.

What a mechanism is, its own tests say; here is only what all of them share. `jattn check NAME` runs the same.
"""

import pytest

from jattn import catalog
from jattn.testing import assert_conforms, checks_of
from jattn.testing.conformance import check_name

# Two long programs, compiled as users compile them, cost as much as all other checks together.
LONG = "memory"
# These run one program, compiled in two precisions; each of the other checks compiles programs of its own.
CHEAP = ("gradients", "derivative", "determinism", "empty_rows", "poison", "causality")
# Large mechanisms that face every check in the fast suite all the same, for all others of their form.
REPRESENTATIVES = ("linear_recurrence", "kv_bias", "efficient_probing", "SimpleRMSNorm")
# Functions whose programs are as large as those of layers.
SLOW = ("flow_attention", "titans_linear_memory")


def is_slow(entry):
    """Layers around a recurrence are the largest programs; most functions inside them are checked either way."""
    of_recurrence = entry.layer is not None and (entry.kind == "recurrence" or entry.family == "memory")
    return of_recurrence or entry.name in SLOW


def is_large(entry):
    """Layers and what is not softmax attention: slow to compile, and to run an operation at a time."""
    large = entry.layer is not None or entry.kind in ("recurrence", "selector") or entry.family == "linear"
    return large and entry.name not in REPRESENTATIVES


def checks(entry):
    """Names of the checks that the fast suite makes of an entry, and of those that it leaves to the slower one."""
    names = [name for name in map(check_name, checks_of(entry)) if name != LONG]
    fast = [name for name in names if name in CHEAP] if is_large(entry) else names
    return fast, [name for name in names if name not in fast]


def cases():
    return [
        pytest.param(entry.name, marks=pytest.mark.slow) if is_slow(entry) else entry.name
        for entry in catalog.entries()
    ]


@pytest.mark.every_case
@pytest.mark.parametrize("name", cases())
def test_conformance(name):
    entry = catalog.find(name)
    assert_conforms(entry, only=checks(entry)[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", [entry.name for entry in catalog.entries() if checks(entry)[1]])
def test_conformance_of_large_mechanisms(name):
    entry = catalog.find(name)
    assert_conforms(entry, only=checks(entry)[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", [entry.name for entry in catalog.entries()])
def test_memory_grows_as_declared(name):
    entry = catalog.find(name)
    if LONG in map(check_name, checks_of(entry)):
        assert_conforms(entry, only=[LONG])


def test_every_check_is_made_of_some_mechanism_in_the_fast_suite():
    entries = [entry for entry in catalog.entries() if not is_slow(entry)]
    made = {name for entry in entries for name in checks(entry)[0] if name not in entry.exempt}
    assert made == {check_name(check) for entry in entries for check in checks_of(entry)} - {LONG}
    assert all(checks(entry)[0] for entry in entries)
