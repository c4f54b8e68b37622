"""Every entry of the catalogue keeps what its kind promises.

What a mechanism is, its own tests say; here is only what all of them share. `jattn check NAME` runs the same.
"""

import pytest

from jattn import catalog
from jattn.testing import assert_conforms


@pytest.mark.parametrize("name", [entry.name for entry in catalog.entries()])
def test_conformance(name):
    assert_conforms(catalog.find(name))
