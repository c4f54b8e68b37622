"""Weights saved by torch: a pickle that describes tensors, and the storages that they are views of, without torch.

Two containers are read. The stream of torch before 1.6: pickles of a magic number, the protocol's version, facts about
the machine, the weights, the storages' keys; then each storage as int64 length and numbers. And the zip file since:
`data.pkl` and one member `data/KEY` for each storage, none of them compressed. `restricted_pickle` runs the pickles.
"""

from __future__ import annotations

import dataclasses
import io
import math
import pathlib
import zipfile
from typing import Any

import numpy as np

from jattn.models.pretrained.readers import UnreadableFile, restricted_pickle
from jattn.models.pretrained.readers.common import BFLOAT16, MOST_AXES, Path, Source, shown
from jattn.models.pretrained.readers.restricted_pickle import Global

_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": BFLOAT16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_ZIP_HEADER = 30  # bytes before each member, at least


def read(path: Path) -> dict[str, np.ndarray]:
    """Read the tensors of a file that `torch.save` has written from a dictionary of tensors.

    Args:
        path: the file.

    Returns:
        Arrays by name, read-only, in the dtypes of the file; tensors that share a storage are views of one array.

    Raises:
        UnreadableFile: the file is truncated or corrupt, compressed, holds anything but tensors by name, or its pickle
            names anything but the few functions that rebuild tensors.

    Example:
        >>> import os, pickle, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "weights.bin")
        >>> with open(path, "wb") as file:
        ...     for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}, []):
        ...         pickle.dump(part, file, protocol=2)
        >>> read(path)
        {}

    Source: the serialization in https://github.com/pytorch/pytorch, torch/serialization.py.
    """
    source = Source(path, "weights of torch", pathlib.Path(path).read_bytes())
    rebuild = _Rebuild(source)
    made = rebuild.from_zip() if source.data.startswith(b"PK\x03\x04") else rebuild.from_stream()
    if type(made) is not dict:
        raise source.error(f"it holds a {type(made).__name__}, not a dictionary of tensors")
    weights = {}
    for name, tensor in made.items():
        if type(name) is not str or type(tensor) is not _Tensor:
            raise source.error(f"{shown(name)} is a {type(tensor).__name__}, not a tensor with a name")
        weights[name] = rebuild.array(name, tensor)
    return weights


@dataclasses.dataclass
class _Storage:
    dtype: np.dtype
    length: int
    values: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Rebuild:
    """The storages of one file, and what its pickle may call."""

    def __init__(self, source: Source):
        self.source = source
        self.storages: dict[str, _Storage] = {}
        self.allowed = {
            ("collections", "OrderedDict"): self.dictionary,
            ("torch._utils", "_rebuild_tensor_v2"): self.tensor,
            ("torch._utils", "_rebuild_parameter"): self.parameter,
            **{("torch", name): None for name in _DTYPES},
        }

    def from_stream(self) -> Any:
        source = self.source
        if not source.data.startswith(b"\x80"):
            raise source.error("it begins like neither a zip file nor a pickle")
        magic, protocol, machine = (restricted_pickle.run(source, {}) for _ in range(3))
        if type(magic) is not int or magic != _MAGIC or protocol != _PROTOCOL:
            raise source.error("it does not begin with torch's magic number and protocol")
        if type(machine) is not dict or machine.get("little_endian") is not True:
            raise source.error("it was not written on a little-endian machine")
        made = restricted_pickle.run(source, self.allowed, self.storage)
        keys = restricted_pickle.run(source, {})
        if type(keys) is not list or any(type(key) is not str for key in keys) or sorted(keys) != sorted(self.storages):
            raise source.error("the list of its storages is not that of its tensors")
        for key in keys:
            storage = self.storages[key]
            if source.number("q") != storage.length:
                raise source.error(f"the storage {shown(key)} has another length than its tensors say")
            self.fill(key, source.take(storage.length * storage.dtype.itemsize))
        if source.position != len(source.data):
            raise source.error(f"{len(source.data) - source.position} bytes are left over")
        return made

    def from_zip(self) -> Any:
        source = self.source
        try:
            with zipfile.ZipFile(io.BytesIO(source.data)) as archive:
                members = self.members(archive)
                roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
                if len(roots) != 1 or roots[0].count("/") != 1:
                    raise source.error("it does not have one folder with one data.pkl")
                root = roots[0]
                if f"{root}byteorder" in members and archive.read(members[f"{root}byteorder"]) != b"little":
                    raise source.error("it was not written on a little-endian machine")
                pickle = Source(source.path, source.kind, archive.read(members[f"{root}data.pkl"]))
                made = restricted_pickle.run(pickle, self.allowed, self.storage)
                for key in self.storages:
                    if f"{root}data/{key}" not in members:
                        raise source.error(f"it lacks the storage {shown(key)}")
                    self.fill(key, archive.read(members[f"{root}data/{key}"]))
                return made
        except UnreadableFile:
            raise
        # What zipfile raises for broken archives, besides its own error.
        except (zipfile.BadZipFile, EOFError, NotImplementedError, OverflowError, RuntimeError, ValueError) as error:
            raise source.error(f"its zip container is broken ({error})") from None

    def members(self, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
        """The members by name, each as long as it says, none of them compressed or lying on another."""
        end, members = 0, {}
        for member in sorted(archive.infolist(), key=lambda member: member.header_offset):
            name = member.filename
            if name in members or name.startswith("/") or ".." in name.split("/") or "\\" in name:
                raise self.source.error(f"its zip container has a second or an unsafe name {shown(name)}")
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise self.source.error(f"{shown(name)} is compressed, which torch never does")
            if member.header_offset < end:
                raise self.source.error(f"{shown(name)} lies on another member")
            end = member.header_offset + _ZIP_HEADER + member.file_size
            if end > len(self.source.data):
                raise self.source.error(f"{shown(name)} ends after the file")
            members[name] = member
        return members

    def dictionary(self, arguments: tuple) -> dict:
        if arguments:
            raise self.source.error("its pickle makes an OrderedDict in another way than torch does")
        return {}

    def storage(self, identifier: Any) -> _Storage:
        """('storage', its type, key, device, length), and in old files None, or else a view of another storage."""
        if type(identifier) is not tuple or len(identifier) not in (5, 6) or identifier[0] != "storage":
            raise self.source.error("its pickle refers to something that is no storage")
        kind, key, _, length = identifier[1:5]
        known = type(kind) is Global and kind.name in _DTYPES
        if (
            not known
            or type(key) is not str
            or type(length) is not int
            or length < 0
            or identifier[5:] not in ((), (None,))
        ):
            raise self.source.error(f"the storage {shown(key)} is of an unknown kind or length, or part of another")
        dtype = np.dtype(_DTYPES[kind.name])
        storage = self.storages.setdefault(key, _Storage(dtype, length))
        if (storage.dtype, storage.length) != (dtype, length):
            raise self.source.error(f"the storage {shown(key)} is described in two ways")
        return storage

    def tensor(self, arguments: tuple) -> _Tensor:
        """(storage, offset, size, stride, requires_grad, hooks), and in new files metadata."""
        if len(arguments) not in (6, 7) or type(arguments[0]) is not _Storage:
            raise self.source.error("its pickle rebuilds a tensor from something else")
        storage, offset, size, stride = arguments[:4]
        numbers = [offset, *size, *stride] if type(size) is tuple and type(stride) is tuple else [None]
        if any(type(number) is not int or number < 0 for number in numbers) or len(size) != len(stride):
            raise self.source.error("a tensor's offset, size or stride are no counting numbers")
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if len(size) > MOST_AXES or math.prod(size) > storage.length or (0 not in size and last >= storage.length):
            raise self.source.error(f"a tensor with {len(size)} axes is larger than its storage, or ends after it")
        return _Tensor(storage, offset, size, stride)

    def parameter(self, arguments: tuple) -> _Tensor:
        """(tensor, requires_grad, hooks)."""
        if len(arguments) != 3 or type(arguments[0]) is not _Tensor:
            raise self.source.error("its pickle makes a parameter of something that is no tensor")
        return arguments[0]

    def fill(self, key: str, raw: bytes) -> None:
        storage = self.storages[key]
        storage.values = self.source.array(f"storage {key}", raw, storage.dtype, (storage.length,))

    def array(self, name: str, tensor: _Tensor) -> np.ndarray:
        """The view of a storage that a tensor is; its bounds were checked when it was described."""
        values = tensor.storage.values
        if values is None:
            raise self.source.error(f"{shown(name)} has no storage")
        if 0 in tensor.size:
            return self.source.array(name, b"", tensor.storage.dtype, tensor.size)
        # The stride of an axis of length 1 is never walked, and may be any number.
        pairs = zip(tensor.size, tensor.stride, strict=True)
        strides = tuple(values.itemsize * (stride if length > 1 else 0) for length, stride in pairs)
        return np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.size, strides, writeable=False)
