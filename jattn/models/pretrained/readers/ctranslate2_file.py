"""CTranslate2's `model.bin`: named arrays one after the other, then second names for some of them.

All numbers are little-endian; a text is a uint16 length and so many bytes, of which the last is zero.

    uint32 version, text specification, uint32 revision, uint32 count,
    count times: text name, uint8 rank, rank times uint32, uint8 dtype, uint32 bytes, the bytes,
    uint32 aliases, so many times: text alias, text name.
"""

from __future__ import annotations

import pathlib

import numpy as np

from jattn.models.pretrained.readers.common import BFLOAT16, MOST_AXES, Path, Source, shown

_VERSIONS = (4, 5, 6)  # before 4, arrays were stored with the size of their items in place of a dtype
_DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16, BFLOAT16)


def read(path: Path, specification: str | None = None) -> dict[str, np.ndarray]:
    """Read all arrays of a CTranslate2 model.

    Args:
        path: the file `model.bin`.
        specification: the class of models that it must hold, such as `"WhisperSpec"`; None takes any.

    Returns:
        Arrays by name, read-only, in the dtypes of the file; an alias is a second name of the same array.

    Raises:
        UnreadableFile: the file is truncated or corrupt, of another version or of another class of models.

    Example:
        >>> import os, struct, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "model.bin")
        >>> def text(value):
        ...     return struct.pack("<H", len(value) + 1) + value.encode() + bytes(1)
        >>> array = text("scale") + struct.pack("<BIBI", 1, 2, 1, 2) + bytes([3, 4])
        >>> with open(path, "wb") as file:
        ...     _ = file.write(struct.pack("<I", 6) + text("Spec") + struct.pack("<II", 1, 1) + array + bytes(4))
        >>> read(path)
        {'scale': array([3, 4], dtype=int8)}

    Source: the serialization in https://github.com/OpenNMT/CTranslate2, python/ctranslate2/specs/model_spec.py.
    """
    source = Source(path, "a CTranslate2 model", pathlib.Path(path).read_bytes())
    version = source.number("I")
    if version not in _VERSIONS:
        raise source.error(f"its version is {version}, read are {', '.join(map(str, _VERSIONS))}")
    found = _text(source)
    if specification is not None and found != specification:
        raise source.error(f"it holds {shown(found)}, wanted is {specification}")
    source.number("I")  # the revision of the specification
    weights: dict[str, np.ndarray] = {}
    for _ in range(source.number("I")):
        name, array = _array(source)
        if name in weights:
            raise source.error(f"it has two arrays named {shown(name)}")
        weights[name] = array
    for _ in range(source.number("I")):
        alias, name = _text(source), _text(source)
        if alias in weights or name not in weights:
            raise source.error(f"it calls {shown(name)} {shown(alias)} as well, but only the second must be new")
        weights[alias] = weights[name]
    if source.position != len(source.data):
        raise source.error(f"{len(source.data) - source.position} bytes are left over")
    return weights


def _text(source: Source) -> str:
    text = source.text(source.number("H"))
    if not text.endswith("\0") or "\0" in text[:-1]:
        raise source.error(f"the text before byte {source.position} does not end with its only zero")
    return text[:-1]


def _array(source: Source) -> tuple[str, np.ndarray]:
    name = _text(source)
    rank = source.number("B")
    if rank > MOST_AXES:
        raise source.error(f"{shown(name)} has {rank} axes")
    shape = [source.number("I") for _ in range(rank)]
    dtype, size = source.number("B"), source.number("I")
    if dtype >= len(_DTYPES):
        raise source.error(f"{shown(name)} has the unknown dtype {dtype}")
    return name, source.array(name, source.take(size), _DTYPES[dtype], shape)
