"""ONNX: a graph of operations whose constants, the initializers, are the weights.

The library `onnx` parses the file, which is a protocol buffer. Before that the fields are counted, because an empty
field takes two bytes in a file and over a hundred in memory.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from jattn.models.pretrained.readers.common import BFLOAT16, Path, Source, library, shown

_DTYPES = {
    "FLOAT": np.float32,
    "DOUBLE": np.float64,
    "FLOAT16": np.float16,
    "BFLOAT16": BFLOAT16,
    "INT64": np.int64,
    "INT32": np.int32,
    "INT16": np.int16,
    "INT8": np.int8,
    "UINT64": np.uint64,
    "UINT32": np.uint32,
    "UINT16": np.uint16,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}
_FEW_FIELDS, _BYTES_A_FIELD = 100_000, 32


def read(path: Path) -> dict[str, np.ndarray]:
    """Read all initializers of an ONNX model.

    Exporters lose the names of weights in matrix products (`onnx::MatMul_1962`), but keep those of the nodes. The right
    operand of a MatMul is therefore found under the name of its node, too; it is `[inputs, outputs]`, as it is stored.

    Args:
        path: the file.

    Returns:
        Arrays by name, read-only, in the dtypes of the file. A weight with two names is one array.

    Raises:
        UnreadableFile: the file is truncated or corrupt, keeps weights in other files, or has a dtype that is not read.
        ImportError: the library `onnx` is not installed.

    Example:
        >>> import os, tempfile
        >>> from onnx import TensorProto, helper, numpy_helper, save
        >>> path = os.path.join(tempfile.mkdtemp(), "model.onnx")
        >>> x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
        >>> node = helper.make_node("MatMul", ["x", "onnx::MatMul_3"], ["y"], name="/query/MatMul")
        >>> weight = numpy_helper.from_array(np.ones((1, 1), np.float32), "onnx::MatMul_3")
        >>> save(helper.make_model(helper.make_graph([node], "graph", [x], [y], [weight])), path)
        >>> sorted(read(path))
        ['/query/MatMul', 'onnx::MatMul_3']

    Source: the format's specification, https://github.com/onnx/onnx/blob/main/docs/IR.md.
    """
    onnx = library("onnx")
    decode_error = library("google.protobuf.message").DecodeError
    source = Source(path, "ONNX", pathlib.Path(path).read_bytes())
    _count_fields(source, onnx.ModelProto.DESCRIPTOR)
    try:
        return _weights(source, onnx, onnx.load_model_from_string(source.data))
    except decode_error as error:
        raise source.error(f"it is no protocol buffer of a model ({error})") from None
    except UnicodeDecodeError:
        raise source.error("it has a name that is not UTF-8") from None


def _weights(source: Source, onnx: Any, model: Any) -> dict[str, np.ndarray]:
    if not (model.ir_version and model.opset_import and model.graph.node):
        raise source.error("it has no version, no operator set or no nodes")
    weights: dict[str, np.ndarray] = {}
    for tensor in model.graph.initializer:
        # A name that is not UTF-8 comes as bytes.
        if type(tensor.name) is not str or not tensor.name or tensor.name in weights:
            raise source.error(f"it has an initializer without a name of its own: {shown(tensor.name)}")
        weights[tensor.name] = _array(source, onnx, tensor)
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.name and len(node.input) == 2 and node.input[1] in weights:
            weight = weights[node.input[1]]
            if type(node.name) is not str:
                raise source.error(f"a node has the name {node.name[:80]!r}, which is not UTF-8")
            if weights.setdefault(node.name, weight) is not weight:
                raise source.error(f"two weights are named {shown(node.name)}")
    return weights


def _array(source: Source, onnx: Any, tensor: Any) -> np.ndarray:
    if tensor.external_data or tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise source.error(f"{shown(tensor.name)} lies in another file, which is not followed")
    name = next((name for name, code in onnx.TensorProto.DataType.items() if code == tensor.data_type), "")
    if name not in _DTYPES or tensor.HasField("segment"):
        raise source.error(f"{shown(tensor.name)} has the data type {tensor.data_type}, or is in segments; not read")
    shape, dtype = tuple(tensor.dims), np.dtype(_DTYPES[name])
    if tensor.HasField("raw_data"):
        return source.array(tensor.name, tensor.raw_data, dtype, shape)
    field = getattr(tensor, onnx.helper.tensor_dtype_to_field(tensor.data_type))
    if len(field) != source.count(tensor.name, shape):
        raise source.error(f"{shown(tensor.name)} has {len(field)} numbers, its shape is {list(shape)}")
    if dtype in (np.float32, np.float64):
        return source.array(tensor.name, np.fromiter(field, dtype, len(field)).tobytes(), dtype, shape)
    # Half precision is written as integers that hold its bits.
    stored = np.dtype(np.uint16) if dtype.itemsize == 2 and dtype.kind not in "iu" else dtype
    wide = np.fromiter(field, np.uint64 if stored in (np.uint32, np.uint64) else np.int64, len(field))
    narrow = wide.astype(stored)
    if not np.array_equal(narrow, wide):
        raise source.error(f"{shown(tensor.name)} has numbers outside {stored.name}")
    return source.array(tensor.name, narrow.tobytes(), dtype, shape)


def _count_fields(source: Source, descriptor: Any) -> None:
    """Refuse a file with more fields than its size can honestly hold."""
    allowed = _FEW_FIELDS + len(source.data) // _BYTES_A_FIELD
    data, messages = source.data, [(0, len(source.data), descriptor)]
    while messages:
        source.position, end, descriptor = messages.pop()
        while source.position < end:
            allowed -= 1
            if allowed < 0:
                raise source.error("it consists of more, and smaller, fields than a model does")
            number, wire = divmod(_varint(source), 8)
            if wire == 0:
                _varint(source)
            elif wire in (1, 5):
                source.skip(8 if wire == 1 else 4)
            elif wire == 2:
                length = _varint(source)
                start = source.skip(length)
                field = descriptor.fields_by_number.get(number)
                if field is not None and field.message_type is not None:
                    messages.append((start, start + length, field.message_type))
            else:
                raise source.error(f"a field before byte {source.position} is of the unknown kind {wire}")
            if source.position > end:
                raise source.error(f"a field ends at byte {source.position}, after the message that it is in")
    source.position = len(data)


def _varint(source: Source) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = source.data[source.skip(1)]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value
    raise source.error(f"the number before byte {source.position} has more than ten bytes")
