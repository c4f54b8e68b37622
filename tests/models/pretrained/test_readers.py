"""Each reader gives back what was written, in every dtype; and libraries' arithmetic on blocks is checked once more."""

import sys

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
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

COMMON = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")


@pytest.fixture
def reading(tmp_path):
    """`reading(read, data, ...)` reads a file of these bytes."""

    def run(read, data, *arguments):
        path = tmp_path / "weights.bin"
        path.write_bytes(data)
        return read(path, *arguments)

    return run


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        np.testing.assert_array_equal(found[name], array)


def test_safetensors(reading):
    arrays = files.weights(*COMMON, "uint16", "uint32", "uint64", "bfloat16")
    assert_same(reading(safetensors_file.read, files.safetensors_file(arrays)), arrays)


def test_ctranslate2_with_aliases(reading):
    arrays = files.weights("float32", "int8", "int16", "int32", "float16", "bfloat16")
    data = files.ctranslate2_file(arrays, {"tied": "layer.float16.weight"}, specification="WhisperSpec")
    found = reading(ctranslate2_file.read, data, "WhisperSpec")
    assert found["tied"] is found["layer.float16.weight"]
    assert_same(found, {**arrays, "tied": arrays["layer.float16.weight"]})


def test_ctranslate2_of_another_class_of_models_is_refused(reading):
    with pytest.raises(UnreadableFile, match="it holds 'Spec', wanted is WhisperSpec"):
        reading(ctranslate2_file.read, files.ctranslate2_file({}), "WhisperSpec")


def test_onnx_initializers(reading):
    arrays = files.weights(*COMMON, "uint16", "uint32", "uint64", "bfloat16")
    tensors = [files.onnx_tensor(name, array) for name, array in arrays.items()]
    assert_same(reading(onnx_file.read, files.onnx_file(tensors)), arrays)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("FLOAT", [0.5, -1.0]),
        ("DOUBLE", [0.5, -1.0]),
        ("FLOAT16", [0.5, -1.0]),
        ("BFLOAT16", [0.5, -1.0]),
        ("INT64", [-(2**63), 2**63 - 1]),
        ("INT8", [-128, 127]),
        ("UINT32", [0, 2**32 - 1]),
        ("UINT64", [0, 2**64 - 1]),
        ("BOOL", [0, 1]),
    ],
)
def test_onnx_numbers_outside_of_raw_data(kind, values, reading):
    tensor = helper.make_tensor("w", getattr(TensorProto, kind), [2, 1], values)
    assert not tensor.HasField("raw_data")
    found = reading(onnx_file.read, files.onnx_file([tensor]))["w"]
    assert found.tolist() == [[values[0]], [values[1]]]
    assert found.dtype == (jnp.bfloat16 if kind == "BFLOAT16" else helper.tensor_dtype_to_np_dtype(tensor.data_type))


def test_onnx_weights_of_products_have_the_name_of_the_product_too(reading):
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["a"], name="/layer.0/query/MatMul"),
        helper.make_node("MatMul", ["a", "onnx::MatMul_7"], ["b"], name="/layer.1/query/MatMul"),
        helper.make_node("MatMul", ["a", "b"], ["c"], name="/scores/MatMul"),
        helper.make_node("Add", ["c", "bias"], ["y"], name="/Add"),
    ]
    weight, bias = np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros(3, np.float32)
    tensors = [files.onnx_tensor("onnx::MatMul_7", weight), files.onnx_tensor("bias", bias)]
    found = reading(onnx_file.read, files.onnx_file(tensors, nodes))
    both = dict.fromkeys(("onnx::MatMul_7", "/layer.0/query/MatMul", "/layer.1/query/MatMul"), weight)
    assert_same(found, {**both, "bias": bias})
    assert found["/layer.0/query/MatMul"] is found["onnx::MatMul_7"]


@pytest.mark.parametrize("container", ["stream", "zip"])
def test_torch(container, reading):
    arrays = files.weights(*COMMON, "bfloat16")
    described, storages = files.torch_parts(arrays)
    state = files.With(described, {"_metadata": {"": {"version": 1}}})
    lengths = {str(number): array.size for number, array in enumerate(arrays.values())}
    data = files.torch_zip(state, storages) if container == "zip" else files.torch_stream(state, storages, lengths)
    assert_same(reading(torch_pickle.read, data), arrays)


def test_torch_views_of_one_storage(reading):
    numbers = np.arange(12, dtype=np.float32)
    whole = files.storage("0", "float32", 12)
    described = {
        "rows": files.tensor(whole, 0, (3, 4), (4, 1)),
        "turned": files.tensor(whole, 0, (4, 3), (1, 4)),
        "part": files.Call(
            files.Name("torch._utils", "_rebuild_parameter"),
            (files.tensor(whole, 5, (2, 2), (4, 1)), True, files.Call(files.ORDERED, ())),
        ),
        "single": files.tensor(whole, 11, (), ()),
        "one row": files.tensor(whole, 8, (1, 4), (2**70, 1)),
        "none": files.tensor(whole, 3, (0, 4), (4, 1)),
    }
    found = reading(torch_pickle.read, files.torch_zip(described, {"0": numbers.tobytes()}))
    rows = numbers.reshape(3, 4)
    expected = {"rows": rows, "turned": rows.T, "part": rows[1:, 1:3], "single": rows[2, 3], "one row": rows[2:]}
    assert_same(found, {**expected, "none": np.zeros((0, 4), np.float32)})
    assert np.shares_memory(found["rows"], found["part"])


@pytest.mark.parametrize(
    "options",
    [{}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}],
    ids=["zip", "protocol 4", "stream"],
)
def test_what_torch_itself_writes(options, tmp_path):
    torch = pytest.importorskip("torch", reason="needs pip install 'jattn[bench]'")
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save(model.state_dict(), tmp_path / "state.pt", **options)
    assert_same(torch_pickle.read(tmp_path / "state.pt"), {k: v.numpy() for k, v in model.state_dict().items()})
    torch.save(dict(model.named_parameters()), tmp_path / "parameters.pt", **options)
    expected = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    assert_same(torch_pickle.read(tmp_path / "parameters.pt"), expected)


@pytest.mark.parametrize("alignment", [None, 64])
def test_gguf_metadata_and_axes(alignment, reading):
    arrays = {"matrix": np.arange(6, dtype=np.float32).reshape(2, 3), "vector": np.ones(5, np.float32)}
    metadata, found = reading(gguf_file.read, files.gguf_file(arrays, alignment=alignment))
    assert_same(found, arrays)
    assert metadata["general.architecture"] == "llama"
    assert metadata["test.count"] == 7
    assert metadata["test.negative"] == -(2**40)
    assert metadata["test.half"] == 0.5
    assert metadata["test.yes"] is True
    assert metadata["tokenizer.ggml.tokens"] == ["a", "é", ""]
    assert metadata["tokenizer.ggml.token_type"].tolist() == [1, -2, 3]


def blocks_of_q4_1(raw, shape):
    """20 bytes: step and smallest value in float16, then 32 numbers of 4 bits; the low halves are the first sixteen."""
    numbers = []
    for start in range(0, len(raw), 20):
        step, least = (float(x) for x in np.frombuffer(raw, np.float16, 2, start))
        halves = raw[start + 4 : start + 20]
        numbers += [
            np.float32(np.float32(step) * np.float32(q)) + np.float32(least)
            for q in [byte % 16 for byte in halves] + [byte // 16 for byte in halves]
        ]
    return np.array(numbers, np.float32).reshape(shape)


def blocks_of_q8_0(raw, shape):
    """34 bytes: step in float16, then 32 signed bytes."""
    numbers = []
    for start in range(0, len(raw), 34):
        step = np.float32(np.frombuffer(raw, np.float16, 1, start)[0])
        numbers += [step * np.float32(q if q < 128 else q - 256) for q in raw[start + 2 : start + 34]]
    return np.array(numbers, np.float32).reshape(shape)


@pytest.mark.parametrize(
    ("block_format", "size", "truth"), [("Q4_1", 20, blocks_of_q4_1), ("Q8_0", 34, blocks_of_q8_0)]
)
def test_gguf_blocks_against_plain_arithmetic(block_format, size, truth, reading):
    rng = np.random.default_rng(1)
    scales = rng.normal(size=(6, 2)).astype(np.float16)
    rows = rng.integers(0, 256, (6, size), dtype=np.uint8)
    rows[:, :2] = scales[:, :1].view(np.uint8)
    if block_format == "Q4_1":
        rows[:, 2:4] = scales[:, 1:].view(np.uint8)
    raw = rows.tobytes()
    place = files.gguf_place("w", [64, 3], gguf.GGMLQuantizationType[block_format], 0)
    _, found = reading(gguf_file.read, files.gguf_by_hand([], [place], raw))
    np.testing.assert_array_equal(found["w"], truth(raw, (3, 64)))


@pytest.mark.parametrize("block_format", ["F16", "BF16", "Q4_0", "Q5_1", "Q8_0"])
def test_gguf_blocks_that_the_library_writes(block_format, reading):
    array = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)
    data = files.gguf_file({"w": array}, {"w": gguf.GGMLQuantizationType[block_format]})
    _, found = reading(gguf_file.read, data)
    assert found["w"].shape == (2, 64)
    # Four bits on [-1, 1] are steps of 1/8, and the last value is cut off by a whole step.
    assert np.abs(found["w"] - array).max() <= 0.13


@pytest.mark.parametrize(
    ("read", "name"),
    [(safetensors_file.read, "safetensors"), (gguf_file.read, "gguf"), (onnx_file.read, "onnx")],
)
def test_a_missing_library_is_named_with_its_cure(read, name, reading, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"library {name}: pip install 'jattn\[pretrained\]'"):
        reading(read, b"")


@pytest.mark.parametrize("module", [safetensors_file, gguf_file, onnx_file, ctranslate2_file, torch_pickle])
def test_a_missing_file_is_a_missing_file(module, tmp_path):
    with pytest.raises(FileNotFoundError):
        module.read(tmp_path / "nowhere.bin")
