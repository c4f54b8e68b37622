"""What several readers share: errors, bounded reading of binary numbers, and arrays as large as their bytes."""

from __future__ import annotations

import importlib
import math
import os
import struct
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from jattn.models.pretrained.readers import UnreadableFile

BFLOAT16 = np.dtype(jnp.bfloat16)
MOST_AXES = 32
_LONGEST_MESSAGE = 400

Path = str | os.PathLike[str]


def library(name: str) -> ModuleType:
    """Import an optional library, or say how to install it.

    Args:
        name: the dotted name of the module.

    Raises:
        ImportError: the library is not installed.

    Example:
        >>> library("a_library_that_is_not_here")
        Traceback (most recent call last):
        ...
        ImportError: this file needs the library a_library_that_is_not_here: pip install 'jattn[pretrained]'
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        top = name.split(".")[0]
        raise ImportError(f"this file needs the library {top}: pip install 'jattn[pretrained]'") from error


def shown(value: Any) -> str:
    """A value from a file for a message, cut and quoted.

    Of a collection only the type is told, since to print what a hostile file nests may never end.
    """
    if type(value) is str:
        return repr(value if len(value) <= 80 else value[:77] + "...")
    return repr(value) if type(value) in (int, float, bool) else f"a {type(value).__name__}"


class Source:
    """A file that is being read in one format: its name for errors, its bytes, and how far reading has come.

    Args:
        path: the file, for messages.
        kind: the name of the format, for messages.
        data: its bytes.
        position: where reading starts.

    Example:
        >>> source = Source("numbers.bin", "a list of numbers", bytes([1, 0, 0, 0, 2]))
        >>> source.number("I")
        1
        >>> source.number("I")
        Traceback (most recent call last):
        ...
        jattn...UnreadableFile: numbers.bin cannot be read as a list of numbers: it ends at byte 5, within ...
    """

    def __init__(self, path: Path, kind: str, data: bytes, position: int = 0):
        self.path = os.fspath(path)
        self.kind = kind
        self.data = data
        self.position = position

    def error(self, what: str) -> UnreadableFile:
        """The error that says what is wrong with this file, cut where a library has quoted the file at length."""
        what = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in what[:_LONGEST_MESSAGE])
        return UnreadableFile(f"{self.path} cannot be read as {self.kind}: {what}")

    def skip(self, count: int) -> int:
        """Move past `count` bytes, if there are so many; gives the position before."""
        start = self.position
        if count > len(self.data) - start:
            raise self.error(f"it ends at byte {len(self.data)}, within {count} bytes from byte {start}")
        self.position = start + count
        return start

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        start = self.skip(count)
        return self.data[start : start + count]

    def number(self, code: str) -> Any:
        """The next little-endian number, in a code of `struct`."""
        code = "<" + code
        return struct.unpack_from(code, self.data, self.skip(struct.calcsize(code)))[0]

    def text(self, length: int) -> str:
        """The next `length` bytes as UTF-8."""
        start = self.position
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"the text at byte {start} is not UTF-8") from None

    def count(self, name: str, shape: Sequence[int]) -> int:
        """How many numbers an array of this shape has."""
        if len(shape) > MOST_AXES or min(shape, default=1) < 0:
            raise self.error(f"{shown(name)} has {len(shape)} axes, or a negative one")
        return math.prod(shape)

    def array(self, name: str, raw: bytes | bytearray, dtype: Any, shape: Sequence[int]) -> np.ndarray:
        """Bytes as a read-only array, if they are as many as its shape and dtype say.

        Args:
            name: what is read, for messages.
            raw: its bytes.
            dtype: of the array.
            shape: of the array.
        """
        dtype = np.dtype(dtype)
        if self.count(name, shape) * dtype.itemsize != len(raw):
            raise self.error(f"{shown(name)} has {len(raw)} bytes, its shape is {list(shape)} in {dtype.name}")
        values = np.frombuffer(raw, dtype)
        values.flags.writeable = False
        if dtype.kind == "b" and values.view(np.uint8).max(initial=0) > 1:
            raise self.error(f"{shown(name)} has truth values other than 0 and 1")
        try:
            return values.reshape(shape)
        except ValueError:
            raise self.error(f"{shown(name)} has the impossible shape {list(shape)}") from None
