"""A toy package: a wheel or a Debian package of a few bytes, with true hashes."""

import hashlib
import io
import lzma
import tarfile
import zipfile

from jattn.models.pretrained.packages import File, Package

MEMBERS = {"toy/model/weights.bin": b"w" * 5000, "toy/config.json": b"{}", "toy/LICENSE": b"MIT"}
KEYS = {"weights": "toy/model/weights.bin", "config": "toy/config.json", "licence": "toy/LICENSE"}
CODE = {
    "toy/__init__.py": b"raise SystemExit('ran')",
    "toy-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: toy\nVersion: 1.0\nRequires-Dist: torch\n",
    "toy-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "toy-1.0.dist-info/RECORD": b"",
}
WHEEL = "toy-1.0-py3-none-any.whl"


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def wheel(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {**members, **CODE}.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def debian(members, data_name="data.tar.xz"):
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    packed = b"!<arch>\n"
    for name, data in {"debian-binary": b"2.0", data_name: lzma.compress(tar.getvalue())}.items():
        packed += f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    return packed


def package(data, archive=WHEEL, **changes):
    files = {key: File(member, sha256(MEMBERS[member]), len(MEMBERS[member])) for key, member in KEYS.items()}
    facts = {"sha256": sha256(data), "size": len(data), "requirement": "toy==1.0", "files": files, **changes}
    return Package(name="toy", title="a toy", archive=archive, licence="MIT", **facts)


def nothing_is_left(folder):
    return not folder.exists() or not list(folder.iterdir())
