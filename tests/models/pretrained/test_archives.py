"""Archives from mirrors, with one after the other asked, and from the real pip, with an index of files."""

import http.client
import io
import os

import pytest

from jattn.models.pretrained import archives, packages
from jattn.models.pretrained.packages import CorruptFile, FetchFailed
from tests.models.pretrained.toys import MEMBERS, WHEEL, debian, nothing_is_left, package, wheel


@pytest.fixture
def mirrors(monkeypatch):
    """`mirrors({url: bytes or error})` answers requests, and returns the list of those that were made."""
    asked = []

    def replace(answers):
        def urlopen(url, timeout):
            asked.append(url)
            if isinstance(answers[url], Exception):
                raise answers[url]
            return io.BytesIO(answers[url])

        monkeypatch.setattr(archives.urllib.request, "urlopen", urlopen)
        return asked

    return replace


def test_the_second_mirror_is_asked_when_the_first_fails(known, mirrors):
    data = debian(MEMBERS)
    known(package(data, "toy.deb", requirement="", urls=("https://first", "https://second")))
    asked = mirrors({"https://first": OSError("gone"), "https://second": data})
    packages.fetch("toy", say=str)
    assert asked == ["https://first", "https://second"]
    assert packages.path("toy", "config").read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (OSError("no route"), "https://only: no route"),
        (http.client.IncompleteRead(b""), "https://only: IncompleteRead"),
        (b"short", "https://only: sent 5 than"),
        (b"x" * 100_000, "https://only: sent more than"),
    ],
)
def test_a_mirror_that_fails_is_named_with_the_reason(answer, reason, folder, known, mirrors):
    known(package(debian(MEMBERS), "toy.deb", requirement="", urls=("https://only",)))
    mirrors({"https://only": answer})
    with pytest.raises(FetchFailed, match=reason):
        packages.fetch("toy", say=str)
    assert nothing_is_left(folder)


@pytest.mark.parametrize(
    "data",
    [
        b"no ar",
        b"!<arch>\n" + b"x" * 60,
        debian(MEMBERS)[:-200],
        debian(MEMBERS, data_name="data.cpio"),
        debian({}),
    ],
    ids=["no ar", "broken header", "truncated", "no data", "nothing in it"],
)
def test_a_broken_debian_package_is_refused(data, folder, known, mirrors):
    known(package(data, "toy.deb", requirement="", urls=("https://only",)))
    mirrors({"https://only": data})
    with pytest.raises(CorruptFile):
        packages.fetch("toy", say=str)
    assert nothing_is_left(folder)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """`index(data)` makes an index with this wheel the only one that pip knows, by its own configuration."""

    def make(data):
        root = tmp_path / "index" / "toy"
        root.mkdir(parents=True)
        (root / WHEEL).write_bytes(data)
        (root / "index.html").write_text(f'<a href="{WHEEL}">{WHEEL}</a>')
        configuration = tmp_path / "pip.conf"
        configuration.write_text(f"[global]\nindex-url = {(tmp_path / 'index').as_uri()}\n")
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_CONFIG_FILE", str(configuration))
        # Configurations of the machine and of the user may name more indices, which must not be asked here.
        monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
        monkeypatch.setenv("PIP_FIND_LINKS", "")

    return make


@pytest.mark.slow
def test_pip_fetches_from_the_index_of_its_configuration(known, index):
    data = wheel(MEMBERS)
    known(package(data))
    index(data)
    packages.fetch("toy", say=str)
    assert packages.state("toy") == "fetched"


@pytest.mark.slow
def test_pip_itself_refuses_another_archive(folder, known, index):
    known(package(wheel(MEMBERS)))
    index(wheel({}))
    with pytest.raises(FetchFailed, match="(?s)could not download toy==1.0 .*DO NOT MATCH THE HASHES"):
        packages.fetch("toy", say=str)
    assert nothing_is_left(folder)


def test_a_version_that_vanished_is_said_in_the_words_of_pip(folder, known, index):
    data = wheel(MEMBERS)
    known(package(data, requirement="toy==0.9"))
    index(data)
    with pytest.raises(FetchFailed, match="(?s)fetching toy failed.*toy==0.9.*No matching distribution found"):
        packages.fetch("toy", say=str)
    assert nothing_is_left(folder)
