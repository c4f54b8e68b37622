"""Every entry of the catalogue keeps what its kind promises.

What a mechanism is, its own tests say; here is only what all of them share. `jattn check NAME` runs the same.
"""

import pytest

from jattn import catalog
from jattn.testing import assert_conforms, checks_of
from jattn.testing.conformance import check_name

# Two long programs, compiled as users compile them, cost as much as all other checks together.
LONG = "memory"


def is_slow(entry):
    """Layers around a recurrence are the largest programs; the functions inside them are checked either way."""
    return entry.layer is not None and (entry.kind == "recurrence" or entry.family == "memory")


def cases():
    return [
        pytest.param(entry.name, marks=pytest.mark.slow) if is_slow(entry) else entry.name
        for entry in catalog.entries()
    ]


@pytest.mark.parametrize("name", cases())
def test_conformance(name):
    entry = catalog.find(name)
    assert_conforms(entry, only=[check for check in map(check_name, checks_of(entry)) if check != LONG])


@pytest.mark.slow
@pytest.mark.parametrize("name", [entry.name for entry in catalog.entries()])
def test_memory_grows_as_declared(name):
    entry = catalog.find(name)
    if LONG in map(check_name, checks_of(entry)):
        assert_conforms(entry, only=[LONG])
