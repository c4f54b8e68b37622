"""Packages that may be absent, registries of one package, and files that may be broken.

Of the last: what a reader may answer, in how much time and memory.
"""

import time
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest

from jattn.models.pretrained import packages
from jattn.models.pretrained.readers import UnreadableFile

# What parsers and errors need whatever the file is, and what arrays of a few bytes weigh as objects.
FEW_BYTES, BYTES_A_BYTE, SECONDS = 4 << 20, 64, 10.0


@pytest.fixture(scope="session")
def fetched():
    """`fetched(name)` skips a test whose package is not on this machine, and says how to get it.

    A damaged package is no reason to skip: reading it fails, and so does the test.
    """

    def require(name):
        try:
            packages.path(name, "weights")
        except packages.NotFetched as missing:
            pytest.skip(str(missing))

    return require


@pytest.fixture(scope="module")
def reading_untrusted(tmp_path_factory):
    """`reading_untrusted(read, data)`: the arrays that `read` finds in these bytes, or the message refusing them."""
    path = tmp_path_factory.mktemp("hostile") / "weights.bin"

    def run(read, data):
        path.write_bytes(data)
        tracemalloc.start()
        start = time.process_time()
        try:
            found = read(path)
        except UnreadableFile as error:
            message = str(error)
            assert message.startswith(f"{path} cannot be read as ")
            assert message.isprintable()
            assert len(message) < 1000
            return message
        finally:
            seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert seconds < SECONDS
            assert peak < FEW_BYTES + BYTES_A_BYTE * len(data)
        for name, array in found.items():
            assert type(name) is str
            assert type(array) is np.ndarray
            assert array.dtype.kind in "fiub" or array.dtype == jnp.bfloat16
            assert array.dtype.kind != "b" or array.view(np.uint8).max(initial=0) <= 1
            assert array.nbytes <= BYTES_A_BYTE * len(data)
            array.tobytes()
        return found

    return run


@pytest.fixture(scope="module")
def refusal(reading_untrusted):
    """`refusal(read, data)` is the message that refuses a file of these bytes; that it is read is a failure."""

    def run(read, data):
        message = reading_untrusted(read, data)
        assert isinstance(message, str), f"read as {message}"
        return message

    return run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JATTN_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def known(monkeypatch, folder):
    """`known(package)` makes it the only one in the registry."""

    def run(one):
        monkeypatch.setattr(packages, "PACKAGES", {one.name: one})
        return one

    return run
