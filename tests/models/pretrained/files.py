"""Small files in every format, written for tests: by the formats' libraries where there are, by hand elsewhere."""

import dataclasses
import io
import pathlib
import struct
import tempfile
import zipfile
from typing import Any

import gguf
import numpy as np
import safetensors.numpy
from onnx import TensorProto, helper, numpy_helper

CT2_CODES = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4, "bfloat16": 5}
STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}
MAGIC = 0x1950A86A20F9469CFC6C


def weights(*dtypes: str) -> dict[str, np.ndarray]:
    """A matrix and a scalar of each dtype."""
    rng = np.random.default_rng(0)
    made = {}
    for dtype in dtypes:
        made[f"layer.{dtype}.weight"] = rng.integers(0, 2, (2, 3)).astype(dtype)
        made[f"layer.{dtype}.scale"] = np.array(1).astype(dtype)
    return made


def safetensors_file(arrays: dict[str, np.ndarray]) -> bytes:
    return safetensors.numpy.save(arrays)


def safetensors_by_hand(header: str, data: bytes) -> bytes:
    return struct.pack("<Q", len(header.encode())) + header.encode() + data


def gguf_file(arrays: dict[str, Any], quantized: dict[str, Any] | None = None, alignment: int | None = None) -> bytes:
    """float32 arrays as they are, others in the block format that `quantized` names; with metadata of every type."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.gguf")
        writer = gguf.GGUFWriter(path, "llama")
        if alignment is not None:
            writer.add_custom_alignment(alignment)
        writer.add_uint32("test.count", 7)
        writer.add_int64("test.negative", -(2**40))
        writer.add_float32("test.half", 0.5)
        writer.add_bool("test.yes", True)
        writer.add_array("tokenizer.ggml.tokens", ["a", "é", ""])
        writer.add_array("tokenizer.ggml.token_type", [1, -2, 3])
        for name, array in arrays.items():
            block_format = (quantized or {}).get(name)
            if block_format is None:
                writer.add_tensor(name, array)
            else:
                writer.add_tensor(name, gguf.quants.quantize(array, block_format), raw_dtype=block_format)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def gguf_text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf_by_hand(entries: list[bytes], places: list[bytes], data: bytes = b"", version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(places), len(entries)) + b"".join(entries) + b"".join(places)
    return head + bytes(-len(head) % 32) + data


def gguf_place(name: str, sizes: list[int], block_format: int, offset: int) -> bytes:
    return gguf_text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, block_format, offset)


def ctranslate2_text(value: str) -> bytes:
    return struct.pack("<H", len(value.encode()) + 1) + value.encode() + b"\0"


def ctranslate2_file(
    arrays: dict[str, np.ndarray], aliases: dict[str, str] | None = None, version: int = 6, specification: str = "Spec"
) -> bytes:
    parts = [struct.pack("<I", version), ctranslate2_text(specification), struct.pack("<II", 1, len(arrays))]
    for name, array in arrays.items():
        parts += [ctranslate2_text(name), struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)]
        parts += [struct.pack("<BI", CT2_CODES[array.dtype.name], array.nbytes), array.tobytes()]
    parts.append(struct.pack("<I", len(aliases or {})))
    for alias, name in (aliases or {}).items():
        parts += [ctranslate2_text(alias), ctranslate2_text(name)]
    return b"".join(parts)


def onnx_tensor(name: str, array: np.ndarray) -> TensorProto:
    return numpy_helper.from_array(array, name)


def onnx_file(tensors: list[TensorProto], nodes: list[Any] | None = None) -> bytes:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    nodes = nodes or [helper.make_node("Identity", ["x"], ["y"])]
    return helper.make_model(helper.make_graph(nodes, "graph", [x], [y], tensors)).SerializeToString()


@dataclasses.dataclass(frozen=True)
class Name:
    """A global in a pickle, as a module and a name; nothing is imported to write it."""

    module: str
    name: str


@dataclasses.dataclass(frozen=True)
class Call:
    function: Any
    arguments: Any


@dataclasses.dataclass(frozen=True)
class Outside:
    """A persistent identifier."""

    identifier: Any


@dataclasses.dataclass(frozen=True)
class With:
    """A value whose state is set."""

    value: Any
    state: Any


def opcodes(value: Any) -> bytes:
    """The opcodes, of protocol 2, that push a value."""
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int() if 0 <= value < 256:
            return b"K" + bytes([value])
        case int():
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(raw)]) + raw
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(opcodes, value)) + b"t"
        case list():
            return b"](" + b"".join(map(opcodes, value)) + b"e"
        case dict():
            return b"}(" + b"".join(opcodes(key) + opcodes(item) for key, item in value.items()) + b"u"
        case Name():
            return f"c{value.module}\n{value.name}\n".encode()
        case Call():
            return opcodes(value.function) + opcodes(value.arguments) + b"R"
        case Outside():
            return opcodes(value.identifier) + b"Q"
        case With():
            return opcodes(value.value) + opcodes(value.state) + b"b"
    raise TypeError(type(value))


def pickled(value: Any) -> bytes:
    return b"\x80\x02" + opcodes(value) + b"."


ORDERED = Name("collections", "OrderedDict")


def storage(key: str, dtype: str, length: int) -> Outside:
    return Outside(("storage", Name("torch", STORAGES[dtype]), key, "cpu", length))


def tensor(stored: Any, offset: Any, size: Any, stride: Any) -> Call:
    return Call(Name("torch._utils", "_rebuild_tensor_v2"), (stored, offset, size, stride, False, Call(ORDERED, ())))


def torch_parts(arrays: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What describes the arrays, and the storages that they are views of, one each."""
    described, storages = {}, {}
    for number, (name, array) in enumerate(arrays.items()):
        stride = tuple(step // array.itemsize for step in np.ascontiguousarray(array).strides[: array.ndim])
        described[name] = tensor(storage(str(number), array.dtype.name, array.size), 0, array.shape, stride)
        storages[str(number)] = array.tobytes()
    return described, storages


def torch_stream(described: Any, storages: dict[str, bytes], lengths: dict[str, int] | None = None) -> bytes:
    """The container of old versions; `lengths` are counted in float32 where they are not given."""
    parts = [pickled(MAGIC), pickled(1001), pickled({"little_endian": True}), pickled(described)]
    parts.append(pickled(list(storages)))
    for key, raw in storages.items():
        parts += [struct.pack("<q", (lengths or {}).get(key, len(raw) // 4)), raw]
    return b"".join(parts)


def torch_zip(described: Any, storages: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The container of new versions."""
    return zipped(
        {"x/data.pkl": pickled(described), **{f"x/data/{k}": raw for k, raw in storages.items()}}, compression
    )


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)
    return buffer.getvalue()
