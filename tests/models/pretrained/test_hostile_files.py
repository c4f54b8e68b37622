"""Files whose sizes, places and names are lies, in the formats that are no pickles."""

import struct

import numpy as np
import pytest
from onnx import TensorProto, helper

from jattn.models.pretrained.readers import ctranslate2_file, gguf_file, onnx_file, safetensors_file
from tests.models.pretrained import files

ARRAYS = files.weights("float32", "int8")


def safetensors_header(**entries):
    items = [f'"{name}":{{"dtype":"{d}","shape":{s},"data_offsets":{o}}}' for name, (d, s, o) in entries.items()]
    return "{" + ",".join(items) + "}"


HOSTILE_SAFETENSORS = {
    "a header of exabytes": struct.pack("<Q", 2**62) + b"{}",
    "a header longer than the file": struct.pack("<Q", 1000) + b"{}",
    "no JSON": files.safetensors_by_hand("{nothing", b""),
    "JSON that nests": files.safetensors_by_hand('{"a":' * 100_000 + "1" + "}" * 100_000, b""),
    "arrays on top of each other": files.safetensors_by_hand(
        safetensors_header(a=("F32", [2], [0, 8]), b=("F32", [2], [4, 12])), bytes(12)
    ),
    "a hole": files.safetensors_by_hand(safetensors_header(a=("F32", [1], [4, 8])), bytes(8)),
    "more bytes than the shape": files.safetensors_by_hand(safetensors_header(a=("F32", [1], [0, 8])), bytes(8)),
    "a shape that overflows": files.safetensors_by_hand(
        safetensors_header(a=("F32", [2**62, 2**62], [0, 8])), bytes(8)
    ),
    "an empty array of impossible shape": files.safetensors_by_hand(
        safetensors_header(a=("F32", [0, 2**62, 2**62], [0, 0])), b""
    ),
    "a negative size": files.safetensors_by_hand(safetensors_header(a=("F32", [-1], [0, 4])), bytes(4)),
    "an unknown dtype": files.safetensors_by_hand(safetensors_header(a=("F31", [1], [0, 4])), bytes(4)),
    "a dtype without numpy": files.safetensors_by_hand(safetensors_header(a=("F8_E4M3", [4], [0, 4])), bytes(4)),
    "truths other than 0 and 1": files.safetensors_by_hand(safetensors_header(a=("BOOL", [2], [0, 2])), b"\x01\x02"),
    "bytes left over": files.safetensors_by_hand(safetensors_header(a=("F32", [1], [0, 4])), bytes(8)),
    "many axes": files.safetensors_by_hand(safetensors_header(a=("F32", [1] * 100, [0, 4])), bytes(4)),
}


@pytest.mark.parametrize("name", HOSTILE_SAFETENSORS)
def test_hostile_safetensors_are_refused(name, refusal):
    refusal(safetensors_file.read, HOSTILE_SAFETENSORS[name])


def entry(key, code, value):
    return files.gguf_text(key) + struct.pack("<I", code) + value


F32, Q4_1, I32 = 0, 3, 26
FAR = 2**62
HOSTILE_GGUF = {
    "another magic number": b"GGML" + bytes(100),
    "an old version": files.gguf_by_hand([], [], version=1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "many entries": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**64 - 1),
    "many weights": b"GGUF" + struct.pack("<IQQ", 3, 2**64 - 1, 0),
    "a key of exabytes": files.gguf_by_hand([struct.pack("<Q", FAR) + b"a"], []),
    "a list of many bytes": files.gguf_by_hand([entry("a", 9, struct.pack("<IQ", 0, 2**64 - 1))], []),
    "a list of many texts": files.gguf_by_hand([entry("a", 9, struct.pack("<IQ", 8, 2**64 - 1))], []),
    "a list of many doubles": files.gguf_by_hand([entry("a", 9, struct.pack("<IQ", 12, 2**61))], []),
    "lists in lists": files.gguf_by_hand([entry("a", 9, struct.pack("<IQ", 9, 1) * 50_000)], []),
    "an unknown type": files.gguf_by_hand([entry("a", 13, bytes(8))], []),
    "a truth of 2": files.gguf_by_hand([entry("a", 7, b"\x02")], []),
    "a key twice": files.gguf_by_hand([entry("a", 0, b"\x02")] * 2, []),
    "a text that is not UTF-8": files.gguf_by_hand([entry("a", 8, struct.pack("<Q", 2) + b"\xff\xfe")], []),
    "no alignment": files.gguf_by_hand([entry("general.alignment", 4, bytes(4))], []),
    "an alignment of 3": files.gguf_by_hand([entry("general.alignment", 4, struct.pack("<I", 3))], []),
    "an alignment in words": files.gguf_by_hand([entry("general.alignment", 8, files.gguf_text("x"))], []),
    "many axes": files.gguf_by_hand([], [files.gguf_place("w", [1] * 5, F32, 0)], bytes(32)),
    "a shape of exabytes": files.gguf_by_hand([], [files.gguf_place("w", [FAR, FAR], F32, 0)], bytes(32)),
    "an empty axis": files.gguf_by_hand([], [files.gguf_place("w", [FAR, 0], F32, 0)], bytes(32)),
    "a broken block": files.gguf_by_hand([], [files.gguf_place("w", [33], Q4_1, 0)], bytes(64)),
    "an unknown block format": files.gguf_by_hand([], [files.gguf_place("w", [1], 4, 0)], bytes(32)),
    "a format without numbers": files.gguf_by_hand([], [files.gguf_place("w", [1], I32, 0)], bytes(32)),
    "an offset far away": files.gguf_by_hand([], [files.gguf_place("w", [1], F32, 2**63)], bytes(32)),
    "an offset between": files.gguf_by_hand([], [files.gguf_place("w", [1], F32, 4)], bytes(32)),
    "weights on top of each other": files.gguf_by_hand(
        [], [files.gguf_place("a", [16], F32, 0), files.gguf_place("b", [8], F32, 32)], bytes(64)
    ),
    "a weight twice": files.gguf_by_hand(
        [], [files.gguf_place("a", [8], F32, 0), files.gguf_place("a", [8], F32, 32)], bytes(64)
    ),
}


@pytest.mark.parametrize("name", HOSTILE_GGUF)
def test_hostile_gguf_is_refused(name, refusal):
    refusal(gguf_file.read, HOSTILE_GGUF[name])


def one_ct2(name=b"\x02\x00w\x00", shape=b"\x01\x01\x00\x00\x00", code=0, size=4, data=bytes(4), tail=bytes(4)):
    head = struct.pack("<I", 6) + files.ctranslate2_text("Spec") + struct.pack("<II", 1, 1)
    return head + name + shape + struct.pack("<BI", code, size) + data + tail


HOSTILE_CT2 = {
    "an unknown version": files.ctranslate2_file({}, version=7),
    "an old version": files.ctranslate2_file({}, version=3),
    "many arrays": struct.pack("<I", 6) + files.ctranslate2_text("Spec") + struct.pack("<II", 1, 2**32 - 1),
    "a text without zero": one_ct2(name=b"\x01\x00w"),
    "a text without anything": one_ct2(name=b"\x00\x00"),
    "a text with two zeros": one_ct2(name=b"\x03\x00\x00w\x00"),
    "many axes": one_ct2(shape=b"\xff" + b"\x01\x00\x00\x00" * 255),
    "another shape": one_ct2(shape=b"\x01\x02\x00\x00\x00"),
    "a huge shape": one_ct2(shape=b"\x04" + b"\xff" * 16),
    "an unknown dtype": one_ct2(code=6),
    "a huge size": one_ct2(size=2**32 - 1),
    "half a number": one_ct2(size=3),
    "an array twice": one_ct2()[:-4].replace(b"\x01\0\0\0\x01\0\0\0\x02", b"\x01\0\0\0\x02\0\0\0\x02", 1)
    + one_ct2()[-18:],
    "bytes left over": one_ct2(tail=bytes(5)),
    "many aliases": one_ct2(tail=b"\xff" * 4),
    "an alias of nothing": files.ctranslate2_file({}, {"a": "b"}),
    "an alias of itself": files.ctranslate2_file({}, {"a": "a"}),
    "an alias of a known name": files.ctranslate2_file(ARRAYS, {next(iter(ARRAYS)): next(iter(ARRAYS))}),
}


@pytest.mark.parametrize("name", HOSTILE_CT2)
def test_hostile_ctranslate2_is_refused(name, refusal):
    refusal(ctranslate2_file.read, HOSTILE_CT2[name])


def onnx_with(**changes):
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    for field, value in changes.items():
        if isinstance(value, list):
            del getattr(tensor, field)[:]
            getattr(tensor, field).extend(value)
        else:
            setattr(tensor, field, value)
    return tensor


def outside():
    tensor = onnx_with(float_data=[])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    return tensor


def half_outside():
    tensor = onnx_with()
    tensor.external_data.add(key="location", value="../weights.bin")
    return tensor


def field(number, raw):
    """A field of a protocol buffer that holds bytes."""
    length, head = len(raw), []
    while length > 127:
        head.append(length & 127 | 128)
        length >>= 7
    return bytes([number << 3 | 2, *head, length]) + raw


def graphs_in_graphs(depth):
    """A graph whose node has an attribute that is a graph whose node has one."""
    graph = b""
    for _ in range(depth):
        graph = field(1, field(5, field(6, graph)))
    return graph


PRODUCTS = [helper.make_node("MatMul", ["x", name], ["y"], name="same") for name in "ab"]
HOSTILE_ONNX = {
    "weights in another file": files.onnx_file([outside()]),
    "weights in two files": files.onnx_file([half_outside()]),
    "a longer shape": files.onnx_file([onnx_with(dims=[3])]),
    "a huge shape": files.onnx_file([onnx_with(dims=[2**62, 2**62])]),
    "a negative shape": files.onnx_file([onnx_with(dims=[-1, -2])]),
    "many axes": files.onnx_file([onnx_with(dims=[2**62] * 100_000)]),
    "an empty array of impossible shape": files.onnx_file([onnx_with(dims=[0, 2**62, 2**62], float_data=[])]),
    "texts": files.onnx_file([helper.make_tensor("w", TensorProto.STRING, [1], [b"a"])]),
    "complex numbers": files.onnx_file([helper.make_tensor("w", TensorProto.COMPLEX64, [1], [1j])]),
    "an unknown dtype": files.onnx_file([onnx_with(data_type=999)]),
    "no name": files.onnx_file([onnx_with(name="")]),
    "a name twice": files.onnx_file([onnx_with(), onnx_with()]),
    "raw data of another length": files.onnx_file([onnx_with(raw_data=bytes(7))]),
    "a number that does not fit": files.onnx_file([onnx_with(data_type=TensorProto.INT8, int32_data=[1, 128])]),
    "half precision that does not fit": files.onnx_file(
        [onnx_with(data_type=TensorProto.FLOAT16, int32_data=[1, 65536])]
    ),
    "truths other than 0 and 1": files.onnx_file([onnx_with(data_type=TensorProto.BOOL, int32_data=[1, 2])]),
    "two products of one name": files.onnx_file(
        [files.onnx_tensor("a", np.ones(2)), files.onnx_tensor("b", np.ones(2))], PRODUCTS
    ),
    "a million empty nodes": field(7, field(1, b"") * 1_000_000),
    "a million empty attributes": field(7, field(1, field(5, b"") * 1_000_000)),
    "a million numbers": b"\x08\x01" * 1_000_000,
    "graphs in graphs": files.onnx_file([]) + field(7, graphs_in_graphs(1000)),
    "a number without end": b"\x08" + b"\xff" * 100,
    "a name that is not UTF-8": files.onnx_file([onnx_with(name="qqq")]).replace(b"qqq", b"\xff\xfe\xfd"),
    "nothing": b"",
}


@pytest.mark.parametrize("name", HOSTILE_ONNX)
def test_hostile_onnx_is_refused(name, refusal):
    refusal(onnx_file.read, HOSTILE_ONNX[name])
