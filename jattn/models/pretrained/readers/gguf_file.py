"""GGUF: metadata, then the places of the weights, then the weights in blocks of a few bits.

The header is parsed here, since it is where a hostile file does its harm; the library `gguf` knows the block formats
and turns them into float32.

    "GGUF", uint32 version, uint64 weights, uint64 metadata entries,
    each entry: text key, uint32 type, value; each weight: text name, uint32 rank, uint64 sizes (fastest axis first),
    uint32 block format, uint64 offset from the start of the data, which is the next multiple of the alignment.
"""

from __future__ import annotations

import math
import pathlib
import struct
from typing import Any, NamedTuple

import numpy as np

from jattn.models.pretrained.readers.common import Path, Source, library, shown

_VERSIONS = (2, 3)
_MOST_AXES = 4  # of a tensor in ggml
# Codes of metadata types: numbers by their code in `struct`, and three others.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_BOOL, _TEXT, _LIST = 7, 8, 9
_LENGTH = struct.Struct("<Q")


class _Weight(NamedTuple):
    name: str
    shape: tuple[int, ...]
    format: Any
    row: int  # bytes
    offset: int
    size: int  # bytes


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read metadata and weights of a GGUF file.

    Args:
        path: the file.

    Returns:
        Metadata by key: numbers, truth values, texts, lists of texts, and numpy arrays of numbers. Weights by name, in
        float32, with axes in the order of numpy (a matrix is `[outputs, inputs]`).

    Raises:
        UnreadableFile: the file is truncated or corrupt, of another version, or has a weight in a format that the
            library does not turn into numbers.
        ImportError: the library `gguf` is not installed.

    Example:
        >>> import os, tempfile, gguf
        >>> path = os.path.join(tempfile.mkdtemp(), "model.gguf")
        >>> writer = gguf.GGUFWriter(path, "llama")
        >>> writer.add_tensor("scale", np.ones((1, 2), np.float32))
        >>> for part in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        ...     part()
        >>> writer.close()
        >>> read(path)
        ({'general.architecture': 'llama'}, {'scale': array([[1., 1.]], dtype=float32)})

    Source: the format's specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
    """
    gguf = library("gguf")
    source = Source(path, "GGUF", pathlib.Path(path).read_bytes())
    if source.take(4) != b"GGUF":
        raise source.error("it does not begin with GGUF")
    version = source.number("I")
    if version not in _VERSIONS:
        raise source.error(
            f"its version is {version}, read are {', '.join(map(str, _VERSIONS))} in little-endian order"
        )
    count, entries = source.number("Q"), source.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = source.text(source.number("Q"))
        if key in metadata:
            raise source.error(f"it has two values of {shown(key)}")
        metadata[key] = _value(source, key, source.number("I"))
    weights = [_weight(source, gguf) for _ in range(count)]
    _check_places(source, weights, metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT))
    return metadata, {weight.name: _floats(source, gguf, weight) for weight in weights}


def _value(source: Source, key: str, code: int) -> Any:
    if code in _NUMBERS:
        return source.number(_NUMBERS[code])
    if code == _BOOL:
        return bool(source.array(key, source.take(1), np.bool_, ()))
    if code == _TEXT:
        return source.text(source.number("Q"))
    if code != _LIST:
        raise source.error(f"{shown(key)} has the unknown type {code}")
    code, count = source.number("I"), source.number("Q")
    if code == _TEXT:
        return _texts(source, count)
    if code in _NUMBERS or code == _BOOL:
        dtype = np.dtype(bool) if code == _BOOL else np.dtype("<" + _NUMBERS[code])
        return source.array(key, source.take(count * dtype.itemsize), dtype, (count,))
    raise source.error(f"{shown(key)} is a list of the type {code}, which is not read")


def _texts(source: Source, count: int) -> list[str]:
    """Many short texts, such as a vocabulary; written out, because calls of methods would take most of the time."""
    data, position, texts = source.data, source.position, []
    start, end = position, len(source.data)
    try:
        for _ in range(count):
            (length,) = _LENGTH.unpack_from(data, position)
            start, position = position + 8, position + 8 + length
            if position > end:
                raise source.error(f"it ends at byte {end}, within a text of {length} bytes from byte {start}")
            texts.append(data[start:position].decode("utf-8"))
    except struct.error:
        raise source.error(f"it ends at byte {end}, within a list of {count} texts") from None
    except UnicodeDecodeError:
        raise source.error(f"the text at byte {start} is not UTF-8") from None
    source.position = position
    return texts


def _weight(source: Source, gguf: Any) -> _Weight:
    name = source.text(source.number("Q"))
    rank = source.number("I")
    if rank > _MOST_AXES:
        raise source.error(f"{shown(name)} has {rank} axes")
    shape = tuple(source.number("Q") for _ in range(rank))[::-1]
    code, offset = source.number("I"), source.number("Q")
    try:
        block_format = gguf.GGMLQuantizationType(code)
        values, size = gguf.GGML_QUANT_SIZES[block_format]
    except (ValueError, KeyError):
        raise source.error(f"{shown(name)} has the unknown block format {code}") from None
    columns = shape[-1] if shape else 1
    if 0 in shape or columns % values:
        raise source.error(f"{shown(name)} has the shape {list(shape)}, in blocks of {values} ({block_format.name})")
    row = columns // values * size
    return _Weight(name, shape, block_format, row, offset, row * math.prod(shape[:-1]))


def _check_places(source: Source, weights: list[_Weight], alignment: Any) -> None:
    """Every weight lies in the file, on a multiple of the alignment, and on no other weight.

    Offsets are counted from the next such multiple, where the source then stands.
    """
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise source.error(f"its alignment is {shown(alignment)}")
    source.position += -source.position % alignment
    available = len(source.data) - source.position
    end, names = 0, set()
    for weight in sorted(weights, key=lambda weight: weight.offset):
        if weight.name in names:
            raise source.error(f"it has two weights named {shown(weight.name)}")
        names.add(weight.name)
        if weight.offset < end or weight.offset % alignment:
            raise source.error(f"{shown(weight.name)} lies on another weight, or on no multiple of {alignment}")
        end = weight.offset + weight.size
        if end > available:
            raise source.error(f"{shown(weight.name)} ends {end - available} bytes after the file")


def _floats(source: Source, gguf: Any, weight: _Weight) -> np.ndarray:
    start = source.position + weight.offset
    blocks = np.frombuffer(source.data, np.uint8, weight.size, start).reshape(*weight.shape[:-1], weight.row)
    try:
        with np.errstate(all="ignore"):  # scales of infinity are numbers as well
            values = gguf.quants.dequantize(blocks, weight.format)
    except NotImplementedError:
        raise source.error(f"{shown(weight.name)} is in the format {weight.format.name}, which is not read") from None
    # What is stored as float32 is still a view of the file, which must not be kept in memory for it.
    return (values.copy() if np.may_share_memory(values, blocks) else values).reshape(weight.shape)
