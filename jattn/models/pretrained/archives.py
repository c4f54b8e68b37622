"""Archives: downloaded by pip or from a mirror, compared with their hash, and unpacked file by named file.

Nothing of an archive is installed or run: a wheel is read as the zip file that it is, a Debian package as tar.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import pathlib
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from jattn.models.pretrained.registry import File, Package

_CHUNK = 1 << 20
_LAST_LINES = 12
_SECONDS_OF_SILENCE = 60


@runtime_checkable
class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


_Write = Callable[[str, _Readable], None]


class FetchFailed(RuntimeError):
    """An archive could not be downloaded.

    Example:
        >>> raise FetchFailed("fetching smollm2 failed: no index is reachable")
        Traceback (most recent call last):
        ...
        jattn.models.pretrained.archives.FetchFailed: fetching smollm2 failed: no index is reachable
    """


class CorruptFile(ValueError):
    """A file holds other bytes than its hash says.

    Example:
        >>> raise CorruptFile("weights.gguf is corrupt")
        Traceback (most recent call last):
        ...
        jattn.models.pretrained.archives.CorruptFile: weights.gguf is corrupt
    """


def check_hash(path: pathlib.Path, sha256: str, advice: str) -> None:
    """Compare a file with its hash.

    Args:
        path: the file.
        sha256: what is expected, in hexadecimal.
        advice: how the message ends.

    Raises:
        CorruptFile: the file holds something else; the message has both hashes.

    Example:
        >>> import os
        >>> check_hash(pathlib.Path(os.devnull), 64 * "0", "run: jattn fetch NAME")
        Traceback (most recent call last):
        ...
        jattn.models.pretrained.archives.CorruptFile: ... is corrupt: expected sha256 0000..., found e3b0...; run: ...
    """
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise CorruptFile(f"{path} is corrupt: expected sha256 {sha256}, found {found}; {advice}")


def run_pip(arguments: Sequence[str], temporary: pathlib.Path) -> tuple[int, list[str]]:
    """Run this interpreter's own pip, with the index and the options of its configuration.

    On a terminal pip shows its progress there; elsewhere it is silent.

    Args:
        arguments: what stands after `pip`.
        temporary: where pip puts what is not complete, so that it disappears with that folder.

    Returns:
        The exit status, and the last lines that pip printed as errors (or at all, where there is no terminal).
    """
    terminal = sys.stdout.isatty()
    process = subprocess.Popen(
        [sys.executable, "-m", "pip", *arguments],
        env=dict(os.environ, TMPDIR=str(temporary)),
        stdin=subprocess.DEVNULL,
        stdout=None if terminal else subprocess.PIPE,
        stderr=subprocess.PIPE if terminal else subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    last: deque[str] = deque(maxlen=_LAST_LINES)
    with process:
        try:
            for line in (process.stderr if terminal else process.stdout) or ():
                last.append(line.rstrip())
                if terminal:
                    print(line, end="", file=sys.stderr, flush=True)
        except BaseException:
            process.kill()
            raise
    return process.returncode, list(last)


def download(package: Package, folder: pathlib.Path) -> pathlib.Path:
    """Download the archive of a package, and compare it with its hash.

    Args:
        package: what to download.
        folder: an empty folder, where it shall lie.

    Returns:
        The archive.

    Raises:
        FetchFailed: nobody gave it; the message says what went wrong.
        CorruptFile: it is another file than the registry says.
    """
    archive = folder / package.archive
    if package.requirement:
        _download_with_pip(package, folder)
        if not archive.is_file():
            found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
            raise FetchFailed(f"fetching {package.name} failed: pip brought {found} instead of {package.archive}")
    else:
        _download_from_mirrors(package, archive)
    check_hash(archive, package.sha256, "nothing of it was kept")
    return archive


def _download_with_pip(package: Package, folder: pathlib.Path) -> None:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--no-cache-dir", "--disable-pip-version-check"]
    status, last = run_pip(["download", *options, "--dest", str(folder), "-r", str(requirements)], folder)
    requirements.unlink()
    if status:
        lines = "".join(f"\n  {line}" for line in last) or " nothing"
        raise FetchFailed(
            f"fetching {package.name} failed: pip could not download {package.requirement} with the expected hash "
            f"(exit status {status}); its last lines:{lines}"
        )


def _download_from_mirrors(package: Package, archive: pathlib.Path) -> None:
    reasons = []
    for url in package.urls:
        try:
            with (
                urllib.request.urlopen(url, timeout=_SECONDS_OF_SILENCE) as answer,
                open(archive, "wb") as file,
            ):
                copied = _copy(answer, file, package.size)
        except (OSError, http.client.HTTPException, ValueError) as error:
            reasons.append(f"{url}: {error}")
            continue
        if copied == package.size:
            return
        reasons.append(f"{url}: sent {'more' if copied > package.size else copied} than {package.size} bytes")
    raise FetchFailed(f"fetching {package.name} failed:" + "".join(f"\n  {reason}" for reason in reasons))


def unpack(package: Package, archive: pathlib.Path, folder: pathlib.Path) -> None:
    """Write the named files of an archive into a folder, each compared with its hash.

    Args:
        package: which files, and what they shall be called.
        archive: a wheel or a Debian package.
        folder: where they shall lie.

    Raises:
        CorruptFile: a file is missing, has another hash, or the archive cannot be read.
    """
    keys = {file.member: key for key, file in package.files.items()}
    written = set()

    def write(member: str, source: _Readable) -> None:
        key = keys[member]
        path, expected = folder / package.file_name(key), package.files[key]
        with open(path, "wb") as file:
            _copy(source, file, expected.size)
        check_hash(path, expected.sha256, f"it came as {member} in {package.archive}; nothing of it was kept")
        written.add(member)

    members = {file.member: file for file in package.files.values()}
    try:
        (_unpack_debian if archive.suffix == ".deb" else _unpack_wheel)(archive, members, write)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise CorruptFile(f"{package.archive} cannot be unpacked: {error}") from None
    if missing := sorted(set(keys) - written):
        raise CorruptFile(f"{package.archive} does not hold {', '.join(missing)}; nothing of it was kept")


def _unpack_wheel(archive: pathlib.Path, members: Mapping[str, File], write: _Write) -> None:
    with zipfile.ZipFile(archive) as wheel:
        for member in wheel.namelist():
            if member in members:
                with wheel.open(member) as source:
                    write(member, source)


def _unpack_debian(archive: pathlib.Path, members: Mapping[str, File], write: _Write) -> None:
    """A Debian package is an `ar` archive: 8 bytes, then members with headers of 60 bytes, of even length each."""
    with open(archive, "rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise CorruptFile(f"{archive.name} is no Debian package")
        while len(header := file.read(60)) == 60:
            name, size = header[:16].decode("ascii", "replace").strip().rstrip("/"), header[48:58].strip()
            if not size.isdigit() or header[58:] != b"`\n":
                raise CorruptFile(f"{archive.name} has a broken header at byte {file.tell() - 60}")
            if name.startswith("data.tar"):
                with tarfile.open(fileobj=file, mode="r|*") as tar:
                    for entry in tar:
                        member = entry.name.removeprefix("./")
                        if member in members and (source := tar.extractfile(entry)) is not None:
                            write(member, source)
                return
            file.seek(int(size) + int(size) % 2, os.SEEK_CUR)


def _copy(source: _Readable, target: io.BufferedIOBase, size: int) -> int:
    """Copy until the source ends, or has given more than it should; the number of bytes copied."""
    copied = 0
    while copied <= size and (chunk := source.read(_CHUNK)):
        target.write(chunk)
        copied += len(chunk)
    return copied
