import pytest

from jattn.models.pretrained import packages


@pytest.fixture(scope="session")
def fetched():
    """`fetched(name)` skips a test whose package is not on this machine, and says how to get it.

    A damaged package is no reason to skip: reading it fails, and so does the test.
    """

    def require(name: str) -> None:
        try:
            packages.path(name, "weights")
        except packages.NotFetched as missing:
            pytest.skip(str(missing))

    return require
