"""Broken and hostile files: a reader says what is wrong, or gives well-formed arrays; in bounded time and memory."""

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from jattn.models.pretrained.readers import (
    ctranslate2_file,
    gguf_file,
    onnx_file,
    safetensors_file,
    torch_pickle,
)
from tests.models.pretrained import files
from tests.models.pretrained.files import With

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


@pytest.mark.parametrize("kind", FORMATS)
def test_whole_files_are_read(kind, reading_untrusted):
    assert isinstance(reading_untrusted(*FORMATS[kind]), dict)


@pytest.mark.parametrize("kind", FORMATS)
def test_truncation_at_any_byte_is_refused(kind, reading_untrusted):
    read, data = FORMATS[kind]
    for length in range(len(data)):
        found = reading_untrusted(read, data[:length])
        # What follows the last weight of GGUF is padding, which nobody misses.
        assert isinstance(found, str) or (kind == "gguf" and length > len(data) - 32), length


@pytest.mark.parametrize("kind", FORMATS)
def test_any_flipped_byte_is_refused_or_read(kind, reading_untrusted):
    read, data = FORMATS[kind]
    for position in range(len(data)):
        for mask in (0xFF, 1 << position % 8):
            reading_untrusted(read, data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :])


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
def test_changed_files_are_refused_or_read(kind, changes, reading_untrusted):
    read, data = FORMATS[kind]
    for change, place, piece in changes:
        place %= len(data) + 1
        end = place if change == "insert" else place + len(piece)
        data = data[:place] + (b"" if change == "delete" else piece) + data[end:]
    reading_untrusted(read, data)


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=50, deadline=None, derandomize=True)
@given(rest=st.binary(max_size=200), kept=st.integers(0, 64))
def test_noise_is_refused_or_read(kind, rest, kept, reading_untrusted):
    read, data = FORMATS[kind]
    reading_untrusted(read, data[:kept] + rest)
