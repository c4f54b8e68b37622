"""safetensors: a JSON header with dtype, shape and place of every array, then their bytes.

The library `safetensors` parses the header and refuses arrays that overlap, leave holes or end beyond the file.
"""

from __future__ import annotations

import pathlib

import numpy as np

from jattn.models.pretrained.readers.common import BFLOAT16, Path, Source, library, shown

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": BFLOAT16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read(path: Path) -> dict[str, np.ndarray]:
    """Read all arrays of a safetensors file.

    Args:
        path: the file.

    Returns:
        Arrays by name, read-only, in the dtypes of the file.

    Raises:
        UnreadableFile: the file is truncated or corrupt, or has a dtype that numpy and jax lack.
        ImportError: the library `safetensors` is not installed.

    Example:
        >>> import os, tempfile, safetensors.numpy
        >>> path = os.path.join(tempfile.mkdtemp(), "weights.safetensors")
        >>> safetensors.numpy.save_file({"scale": np.ones(3, np.float32)}, path)
        >>> read(path)
        {'scale': array([1., 1., 1.], dtype=float32)}

    Source: the format's specification, https://github.com/huggingface/safetensors.
    """
    safetensors = library("safetensors")
    source = Source(path, "safetensors", pathlib.Path(path).read_bytes())
    try:
        entries = safetensors.deserialize(source.data)
    except safetensors.SafetensorError as error:
        raise source.error(str(error)) from None
    weights = {}
    for name, entry in entries:
        if entry["dtype"] not in _DTYPES:
            raise source.error(f"{shown(name)} has dtype {shown(entry['dtype'])}, which is not read")
        weights[name] = source.array(name, entry["data"], _DTYPES[entry["dtype"]], entry["shape"])
    return weights
