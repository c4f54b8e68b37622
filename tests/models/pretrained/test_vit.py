"""The trained ViT-S/14 against onnxruntime and a plain forward; needs `jattn fetch vit_s14` (90 MB)."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_sample_images

from jattn.models.pretrained import packages, vit
from jattn.models.pretrained.readers import onnx_file
from jattn.models.swap import Swap
from jattn.testing.tolerance import assert_within_policy
from tests.models.pretrained.plain import TRUTH, in_precision

FEATURES = "/backbone/layernorm/Add_1_output_0"


@pytest.fixture(scope="module")
def model(fetched):
    fetched("vit_s14")
    return vit.load()


def photos(height, width):
    """A temple and a flower, cut out of photos of 427 x 640."""
    return np.stack([photo[80 : 80 + height, 200 : 200 + width] for photo in load_sample_images().images])


def by_onnxruntime(images):
    """The tokens after the backbone's last norm, computed by the file's own graph for any size of images."""
    onnx = pytest.importorskip("onnx", reason="needs pip install 'jattn[pretrained]'")
    runtime = pytest.importorskip("onnxruntime", reason="needs pip install onnxruntime")
    graph = onnx.load(packages.path("vit_s14", "weights"))
    for axis, name in ((2, "height"), (3, "width")):
        graph.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    del graph.graph.output[:]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(FEATURES, onnx.TensorProto.FLOAT, None))
    session = runtime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = (images / 255 - np.array(vit.MEAN)) / np.array(vit.DEVIATION)
    return session.run([FEATURES], {"input_image": pixels.transpose(0, 3, 1, 2).astype(np.float32)})[0]


@pytest.mark.pretrained
@pytest.mark.parametrize("size", [(224, 224), (196, 280), (42, 14)])
def test_equals_onnxruntime(model, size):
    images = photos(*size)
    mine, theirs = model.features(images), by_onnxruntime(images)
    assert mine.shape == (2, 1 + size[0] // 14 * size[1] // 14, 384)
    np.testing.assert_allclose(mine, theirs, atol=1e-4, rtol=0)


@pytest.mark.pretrained
def test_sizes_of_images(model):
    images = photos(28, 56)
    resized = model.resized((28, 56))
    assert resized.model.image_shape == (28, 56, 3) and model.model.image_shape == (224, 224, 3)
    assert resized.resized((28, 56)) is resized
    np.testing.assert_array_equal(resized.features(images), vit.load(image_size=(28, 56)).features(images))
    np.testing.assert_allclose(model.features(images / 255), model.features(images), atol=1e-5)
    with pytest.raises(ValueError, match="multiples of 14, got 28 x 50"):
        model.features(images[:, :, :50])


@pytest.mark.parametrize("images", [np.ones((14, 14, 3)), np.ones((1, 14, 14, 1)), np.full((1, 14, 14, 3), 2.0)])
def test_what_is_no_image_is_refused(images):
    with pytest.raises(ValueError, match="images must"):
        vit.normalized(images)


def plain_features(plain, tensors, image, num_layers=12, num_heads=6):
    """From one image `[H, W, 3]` and the tensors of the file to the normed tokens."""
    np_ = plain.np
    rows, columns = image.shape[0] // 14, image.shape[1] // 14
    patches = image.reshape(rows, 14, columns, 14, 3).transpose(0, 2, 4, 1, 3).reshape(rows * columns, 588)
    embeddings = "backbone.embeddings"
    projection = f"{embeddings}.patch_embeddings.projection"
    x = plain.linear(
        plain.array(patches), tensors[f"{projection}.weight"].reshape(384, 588), tensors[f"{projection}.bias"]
    )
    x = np_.concatenate([plain.array(tensors[f"{embeddings}.cls_token"][0]), x])
    table = vit.table_for(image.shape[:2], tensors["onnx::Reshape_1962"].reshape(37, 37, 384), np.zeros(384))
    table[0] = tensors["onnx::Concat_1957"].reshape(384)
    x = x + plain.array(table)

    def linear(name, x):
        weight = tensors["/" + name.replace("layer.", "layer?").replace(".", "/").replace("?", ".") + "/MatMul"].T
        return plain.linear(x, weight, tensors[f"{name}.bias"])

    for layer in range(num_layers):
        name = f"backbone.encoder.layer.{layer}"
        h = plain.norm(x, tensors[f"{name}.norm1.weight"], tensors[f"{name}.norm1.bias"], 1e-6)
        qkv = (linear(f"{name}.attention.attention.{part}", h) for part in ("query", "key", "value"))
        _, mixed = plain.attention(*qkv, num_heads)
        x = x + plain.array(tensors[f"{name}.layer_scale1.lambda1"]) * linear(f"{name}.attention.output.dense", mixed)
        h = plain.norm(x, tensors[f"{name}.norm2.weight"], tensors[f"{name}.norm2.bias"], 1e-6)
        h = linear(f"{name}.mlp.fc2", plain.gelu(linear(f"{name}.mlp.fc1", h)))
        x = x + plain.array(tensors[f"{name}.layer_scale2.lambda1"]) * h
    return plain.norm(x, tensors["backbone.layernorm.weight"], tensors["backbone.layernorm.bias"], 1e-6)


@pytest.mark.pretrained
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_all_layers_against_float64(model, dtype):
    model = model if dtype == jnp.float32 else vit.load(dtype=dtype)
    images = photos(112, 112)[:1]
    tensors = onnx_file.read(packages.path("vit_s14", "weights"))
    pixels = (images[0] / 255 - np.array(vit.MEAN)) / np.array(vit.DEVIATION)
    found = model.features(images)
    assert found.dtype == dtype
    truth = plain_features(TRUTH, tensors, pixels)
    assert_within_policy(found[0], truth, plain_features(in_precision(dtype), tensors, pixels), what="features")


@pytest.mark.pretrained
def test_swapped_attention_changes_features(model):
    images = photos(56, 56)
    swapped = vit.load(attention=Swap("linear_attention", layers=[-1], heads=[0])).features(images)
    difference = np.abs(np.asarray(swapped - model.features(images)))
    assert 1e-3 < difference.max() < 30


def test_cubic_interpolation_by_hand():
    # As many places as samples: the samples; one place in the middle of two: their mean; a constant stays one.
    np.testing.assert_array_equal(vit.cubic_interpolation(5, 5), np.eye(5))
    np.testing.assert_allclose(vit.cubic_interpolation(2, 1), [[0.5, 0.5]])
    for length, wanted in ((37, 16), (37, 50), (3, 7), (1, 4)):
        np.testing.assert_allclose(vit.cubic_interpolation(length, wanted).sum(axis=1), 1.0, rtol=1e-12)


def test_cubic_interpolation_equals_that_of_onnx():
    onnx = pytest.importorskip("onnx", reason="needs pip install 'jattn[pretrained]'")
    reference = pytest.importorskip("onnx.reference", reason="needs pip install 'jattn[pretrained]'")
    options = {"mode": "cubic", "cubic_coeff_a": -0.75, "coordinate_transformation_mode": "half_pixel"}
    node = onnx.helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], **options)
    x, sizes, y = (
        onnx.helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (
            ("x", onnx.TensorProto.DOUBLE, [37, 5]),
            ("sizes", onnx.TensorProto.INT64, [2]),
            ("y", onnx.TensorProto.DOUBLE, None),
        )
    )
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "resize", [x, sizes], [y]))
    samples = np.random.default_rng(0).standard_normal((37, 5))
    for wanted in ((16, 16), (50, 3)):
        theirs = reference.ReferenceEvaluator(model).run(None, {"x": samples, "sizes": np.array(wanted)})[0]
        mine = vit.cubic_interpolation(37, wanted[0]) @ samples @ vit.cubic_interpolation(5, wanted[1]).T
        # The reference has its places in float32.
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("size", [(0, 14), (14, 15), (7, 14)])
def test_sizes_that_do_not_fit_are_refused(size):
    with pytest.raises(ValueError, match="multiples of 14"):
        vit.table_for(size, np.zeros((3, 3, 2)), np.zeros(2))
