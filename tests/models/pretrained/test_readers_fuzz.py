"""Broken and hostile files: a reader says what is wrong, or gives well-formed arrays; in bounded time and memory."""

import os
import pickle
import struct
import time
import tracemalloc
import zipfile

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from jattn.models.pretrained.readers import (
    UnreadableFile,
    ctranslate2_file,
    gguf_file,
    onnx_file,
    safetensors_file,
    torch_pickle,
)
from tests.models.pretrained import files
from tests.models.pretrained.files import Call, Name, Outside, With

ARRAYS = files.weights("float32", "int8")
DESCRIBED, STORED = files.torch_parts({"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float32)})
NODES = [helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["y"], name="/query/MatMul")]
TENSORS = [
    files.onnx_tensor("onnx::MatMul_7", np.ones((2, 3), np.float32)),
    helper.make_tensor("typed", TensorProto.FLOAT16, [2], [0.5, 1.0]),
]
BLOCKS = {"vector": np.ones(5, np.float32), "matrix": np.ones((2, 32), np.float32)}

FORMATS = {
    "safetensors": (safetensors_file.read, files.safetensors_file(ARRAYS)),
    "gguf": (
        lambda path: gguf_file.read(path)[1],
        files.gguf_file(BLOCKS, {"matrix": gguf.GGMLQuantizationType.Q4_1}),
    ),
    "ctranslate2": (ctranslate2_file.read, files.ctranslate2_file(ARRAYS, {"tied": "layer.int8.scale"})),
    "onnx": (onnx_file.read, files.onnx_file(TENSORS, NODES)),
    "torch stream": (torch_pickle.read, files.torch_stream(With(DESCRIBED, {"_metadata": {}}), STORED)),
    "torch zip": (torch_pickle.read, files.torch_zip(DESCRIBED, STORED)),
}
# What parsers and errors need whatever the file is, and what arrays of a few bytes weigh as objects.
FEW_BYTES, BYTES_A_BYTE, SECONDS = 4 << 20, 64, 10.0


@pytest.fixture(scope="module")
def reading(tmp_path_factory):
    """`reading(read, data)` is what `read` makes of a file of these bytes: arrays, or the message that refuses it."""
    path = tmp_path_factory.mktemp("hostile") / "weights.bin"

    def run(read, data):
        path.write_bytes(data)
        tracemalloc.start()
        start = time.process_time()
        try:
            found = read(path)
        except UnreadableFile as error:
            message = str(error)
            assert message.startswith(f"{path} cannot be read as ")
            assert message.isprintable()
            assert len(message) < 1000
            return message
        finally:
            seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert seconds < SECONDS
            assert peak < FEW_BYTES + BYTES_A_BYTE * len(data)
        for name, array in found.items():
            assert type(name) is str
            assert type(array) is np.ndarray
            assert array.dtype.kind in "fiub" or array.dtype == jnp.bfloat16
            assert array.dtype.kind != "b" or array.view(np.uint8).max(initial=0) <= 1
            assert array.nbytes <= BYTES_A_BYTE * len(data)
            array.tobytes()
        return found

    return run


def refusal(reading, read, data):
    message = reading(read, data)
    assert isinstance(message, str), f"read as {message}"
    return message


@pytest.mark.parametrize("kind", FORMATS)
def test_whole_files_are_read(kind, reading):
    assert isinstance(reading(*FORMATS[kind]), dict)


@pytest.mark.parametrize("kind", FORMATS)
def test_truncation_at_any_byte_is_refused(kind, reading):
    read, data = FORMATS[kind]
    for length in range(len(data)):
        found = reading(read, data[:length])
        # What follows the last weight of GGUF is padding, which nobody misses.
        assert isinstance(found, str) or (kind == "gguf" and length > len(data) - 32), length


@pytest.mark.parametrize("kind", FORMATS)
def test_any_flipped_byte_is_refused_or_read(kind, reading):
    read, data = FORMATS[kind]
    for position in range(len(data)):
        for mask in (0xFF, 1 << position % 8):
            reading(read, data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :])


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["replace", "insert", "delete"]),
        st.integers(0, 10_000),
        st.one_of(
            st.binary(min_size=1, max_size=9),
            st.sampled_from([b"\xff" * 4, b"\xff" * 8, b"\x00" * 8, b"\xff\xff\xff\x7f", b"\x00" * 7 + b"\x40"]),
            st.sampled_from(
                [b"(", b"(t", b"]", b"}", b")", b"R", b"b", b"Q", b"h\x00", b"r\xff\xff\xff\xff", b"0", b"2"]
            ),
        ),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(changes=CHANGES)
def test_changed_files_are_refused_or_read(kind, changes, reading):
    read, data = FORMATS[kind]
    for change, place, piece in changes:
        place %= len(data) + 1
        end = place if change == "insert" else place + len(piece)
        data = data[:place] + (b"" if change == "delete" else piece) + data[end:]
    reading(read, data)


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=50, deadline=None, derandomize=True)
@given(rest=st.binary(max_size=200), kept=st.integers(0, 64))
def test_noise_is_refused_or_read(kind, rest, kept, reading):
    read, data = FORMATS[kind]
    reading(read, data[:kept] + rest)


# --- pickles ---


class Reduced:
    """Pickles to a call of a function, which is how a pickle runs code."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Reduced(os.system, "touch ran"), "system"),
        (Reduced(eval, "open('ran', 'w')"), "eval"),
        (Reduced(pickle.loads, b"."), "loads"),
        ({"w": [Reduced(getattr, Reduced(os.system, "touch ran"), "x")]}, "getattr"),
        (Reduced(print), "print"),
    ],
)
@pytest.mark.parametrize("container", ["zip", "stream"])
def test_pickles_that_call_something_are_refused_by_its_name(
    container, value, named, protocol, reading, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    program = pickle.dumps(value, protocol=protocol)
    if container == "zip":
        data = files.zipped({"x/data.pkl": program})
    else:
        head = files.pickled(files.MAGIC) + files.pickled(1001) + files.pickled({"little_endian": True})
        data = head + program + files.pickled([])
    message = refusal(reading, torch_pickle.read, data)
    # A pickle with bytes in it already fails there, before their call is reached.
    assert f".{named}', which is refused" in message or (named == "loads" and "refused" in message)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("torch.serialization", "load"),
        ("torch._utils", "_rebuild_tensor"),
        ("torch.hub", "load"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("collections", "OrderedDict.fromkeys"),
        ("builtins", "getattr"),
        ("__builtin__", "eval"),
        ("posix", "system"),
        ("torch", "FloatStorage.__class__"),
        ("x" * 150, "y\x1b[31m"),
    ],
)
def test_only_a_handful_of_names_is_known(module, name, reading):
    message = refusal(reading, torch_pickle.read, files.torch_zip({"w": Call(Name(module, name), ())}, {}))
    assert "it names" in message
    assert "which is refused" in message


def nested(opening, closing, depth=100_000):
    return opening * depth + closing * depth


HOSTILE_PROGRAMS = {
    "an entry of the memo that is not there": b"\x80\x02h\x05.",
    "a text of four gigabytes": b"\x80\x02X\xff\xff\xff\xffabc",
    "a frame of exabytes": b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f.",
    "an opcode with eight bytes of length": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f",
    "a number with four bytes of length": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "no end": b"\x80\x02}",
    "nothing on the stack": b"\x80\x02.",
    "taking from an empty stack": b"\x80\x02\x86.",
    "taking what lies below a mark": b"\x80\x02K\x01(\x85t.",
    "no mark": b"\x80\x02t.",
    "a mark left": b"\x80\x02}(.",
    "two values": b"\x80\x02}}.",
    "a key without value": b"\x80\x02}(K\x01u.",
    "items of no dictionary": b"\x80\x02K\x01(K\x01K\x01u.",
    "items of no list": b"\x80\x02K\x01(K\x01e.",
    "a call of a number": b"\x80\x02K\x01)R.",
    "a call without tuple": b"\x80\x02ccollections\nOrderedDict\nK\x01R.",
    "a storage called": b"\x80\x02ctorch\nFloatStorage\n)R.",
    "a state of no dictionary": b"\x80\x02]}b.",
    "a state that is none": b"\x80\x02}Nb.",
    "a name from numbers": b"\x80\x04K\x01K\x02\x93.",
    "a name without end": b"\x80\x02c" + b"x" * 1000,
    "lists in lists": b"\x80\x02" + nested(b"]", b"a")[:-1] + b".",
    "tuples in tuples": b"\x80\x02" + nested(b")", b"\x86")[:-1] + b".",
    "a key that nests": b"\x80\x02})" + b"\x85" * 100_000 + b"Ns.",
    "a key that doubles": b"\x80\x02})" + b"q\x00h\x00\x86" * 200 + b"Ns.",
    "a call of what doubles": b"\x80\x02)" + b"q\x00h\x00\x86" * 200 + b")R.",
    "a size that doubles": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
    + files.opcodes(files.storage("0", "float32", 6))
    + b"K\x00)"
    + b"q\x00h\x00\x86" * 200
    + b")NNtR.",
    "many marks": b"\x80\x02" + b"(" * 600_000,
    "many dictionaries": b"\x80\x02" + b"}" * 600_000,
    "a very long number as size": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
    + files.opcodes(files.storage("0", "float32", 6))
    + b"K\x00("
    + (b"\x8a\xff" + b"\x7f" * 255) * 2000
    + b"t("
    + b"K\x01" * 2000
    + b"tNNtR.",
    "itself": b"\x80\x02]q\x00h\x00a.",
}


@pytest.mark.parametrize("name", HOSTILE_PROGRAMS)
def test_hostile_programs_are_refused(name, reading):
    refusal(reading, torch_pickle.read, files.zipped({"x/data.pkl": HOSTILE_PROGRAMS[name]}))


def test_an_entry_of_the_memo_far_away_takes_no_memory(reading):
    assert reading(torch_pickle.read, files.zipped({"x/data.pkl": b"\x80\x02}r\xff\xff\xff\xff."})) == {}


SIX = files.storage("0", "float32", 6)
HOSTILE_TENSORS = {
    "beyond its storage": files.tensor(SIX, 1, (2, 3), (3, 1)),
    "beyond by its stride": files.tensor(SIX, 0, (2,), (2**62,)),
    "before its storage": files.tensor(SIX, -1, (2,), (1,)),
    "backwards": files.tensor(SIX, 5, (3,), (-1,)),
    "of negative size": files.tensor(SIX, 0, (-2, -3), (3, 1)),
    "repeating one number": files.tensor(SIX, 0, (2**40,), (0,)),
    "of one number at the end": files.tensor(SIX, 6, (), ()),
    "with another number of strides": files.tensor(SIX, 0, (2, 3), (1,)),
    "with a size that is no tuple": files.tensor(SIX, 0, 6, (1,)),
    "with a size in half numbers": files.tensor(SIX, 0, (1.5,), (1,)),
    "with true as size": files.tensor(SIX, 0, (True,), (1,)),
    "with many axes": files.tensor(SIX, 0, (1,) * 100, (1,) * 100),
    "empty, of impossible size": files.tensor(SIX, 0, (0, 2**62, 2**62), (1, 1, 1)),
    "of no storage": files.tensor(6, 0, (6,), (1,)),
    "without arguments": Call(Name("torch._utils", "_rebuild_tensor_v2"), ()),
    "a parameter of nothing": Call(Name("torch._utils", "_rebuild_parameter"), (None, True, None)),
    "a dictionary with arguments": Call(files.ORDERED, ([("a", 1)],)),
    "a number": 3,
    "a list": [files.tensor(SIX, 0, (6,), (1,))],
    "a storage": SIX,
    "outside, of no tuple": Outside("storage"),
    "outside, a module": Outside(("module", 1, 2, 3, 4)),
    "of an unknown storage": Outside(("storage", Name("torch", "FloatStorage"), 7, "cpu", 6)),
    "of a negative length": Outside(("storage", Name("torch", "FloatStorage"), "0", "cpu", -6)),
    "of part of a storage": Outside(("storage", Name("torch", "FloatStorage"), "0", "cpu", 6, ("1", 0, 6))),
    "of a storage that is longer": files.tensor(files.storage("0", "float32", 7), 0, (6,), (1,)),
    "of a huge storage": files.tensor(files.storage("0", "float32", 2**60), 0, (6,), (1,)),
    "of a storage with two dtypes": [SIX, files.storage("0", "int32", 6)],
    "of a storage that is not there": files.tensor(files.storage("../0", "float32", 6), 0, (6,), (1,)),
    "of truths other than 0 and 1": files.tensor(files.storage("0", "bool", 24), 0, (6,), (1,)),
}


@pytest.mark.parametrize("container", [files.torch_zip, files.torch_stream], ids=["zip", "stream"])
@pytest.mark.parametrize("name", HOSTILE_TENSORS)
def test_hostile_tensors_are_refused(name, container, reading):
    numbers = np.arange(6, dtype=np.float32).tobytes()
    refusal(reading, torch_pickle.read, container({"w": HOSTILE_TENSORS[name]}, {"0": numbers}))


@pytest.mark.parametrize(
    "change",
    [
        {"x/data/0": b"\x00" * 20},
        {"x/byteorder": b"big"},
        {"../x/data/1": b""},
        {"/etc/passwd": b""},
        {"y/data.pkl": files.pickled({})},
        {"x/..\\y": b""},
    ],
    ids=["short storage", "big-endian", "traversal", "absolute", "two pickles", "backslash"],
)
def test_hostile_zip_members_are_refused(change, reading):
    members = {"x/data.pkl": files.pickled(DESCRIBED), "x/data/0": STORED["0"], "x/data/1": STORED["1"]}
    refusal(reading, torch_pickle.read, files.zipped({**members, **change}))


def test_zip_bombs_are_refused(reading):
    zeros = {"w": files.tensor(files.storage("0", "uint8", 1 << 26), 0, (1 << 26,), (1,))}
    data = files.torch_zip(zeros, {"0": bytes(1 << 26)}, zipfile.ZIP_DEFLATED)
    assert len(data) < 1 << 17
    assert "is compressed" in refusal(reading, torch_pickle.read, data)


def test_zip_members_on_top_of_each_other_are_refused(reading):
    data = files.torch_zip(DESCRIBED, STORED)
    first = data.index(b"PK\x01\x02")
    second = data.index(b"PK\x01\x02", first + 4)
    third = data.index(b"PK\x01\x02", second + 4)
    # The directory's entry of the last member points where that of the second does.
    data = data[: third + 42] + data[second + 42 : second + 46] + data[third + 46 :]
    assert "lies on another member" in refusal(reading, torch_pickle.read, data)


def test_a_big_endian_stream_is_refused(reading):
    parts = [files.MAGIC, 1001, {"little_endian": False}, {}, []]
    assert "little-endian" in refusal(reading, torch_pickle.read, b"".join(map(files.pickled, parts)))


# --- the other formats ---


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
def test_hostile_safetensors_are_refused(name, reading):
    refusal(reading, safetensors_file.read, HOSTILE_SAFETENSORS[name])


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
def test_hostile_gguf_is_refused(name, reading):
    refusal(reading, gguf_file.read, HOSTILE_GGUF[name])


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
def test_hostile_ctranslate2_is_refused(name, reading):
    refusal(reading, ctranslate2_file.read, HOSTILE_CT2[name])


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
def test_hostile_onnx_is_refused(name, reading):
    refusal(reading, onnx_file.read, HOSTILE_ONNX[name])
