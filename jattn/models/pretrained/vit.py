"""A trained ViT-S/14 for images: 12 layers with LayerScale and a class token, from its ONNX file.

The positions of patches were trained on a grid of 37 x 37 and are interpolated to that of the image, by cubic
convolution with a = -0.75 along rows and columns, pixels being squares and the border repeated, as the file's own graph
does it. The file's decoder, which draws maps of saliency, is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from jattn.models.config import TransformerConfig
from jattn.models.pretrained import packages
from jattn.models.pretrained.filling import fill, new_in_attention
from jattn.models.pretrained.readers import onnx_file
from jattn.models.pretrained.torch_layout import Renaming
from jattn.models.swap import Attention
from jattn.models.vit import ViT

PATCH = 14
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of red, green and blue between 0 and 1, over ImageNet."""
CUBIC = -0.75

_POSITIONS, _CLASS_POSITION = "onnx::Reshape_1962", "onnx::Concat_1957"
_TABLE = ("stack", "learned", "table", "embedding")


@dataclasses.dataclass(frozen=True)
class ViTS14:
    """The model with what makes it fit other sizes of images.

    Args:
        model: the vision transformer, for images of one size.
        positions: `[37, 37, M]`, of patches, as they were trained.
        class_position: `[M]`.
    """

    model: ViT
    positions: np.ndarray
    class_position: np.ndarray

    def features(self, images: ArrayLike) -> jax.Array:
        """The tokens after the last layer and norm, the class token first, then patches row by row.

        Args:
            images: `[B, H, W, 3]` in red, green, blue; integers from 0 to 255 or floats from 0 to 1. H and W are
                multiples of 14; the model was used at 224. Images of other sizes than the model's use `resized`.

        Returns:
            `[B, 1 + H/14 * W/14, M]`.

        Raises:
            ValueError: images of another shape, or a mechanism that does not fit them.
        """
        pixels = normalized(images)
        return _states(self.resized((pixels.shape[1], pixels.shape[2])).model, pixels)

    def resized(self, image_size: tuple[int, int]) -> ViTS14:
        """The same model for images of another size; weights are shared, positions interpolated anew.

        Args:
            image_size: height and width, multiples of 14.

        Raises:
            ValueError: no multiples of 14.
        """
        if image_size == self.model.image_shape[:2]:
            return self
        model, table = self.model, table_for(image_size, self.positions, self.class_position)
        old = dict(nnx.to_flat_state(nnx.state(model)))
        old[_TABLE] = old[_TABLE].replace(jnp.asarray(table, model.config.param_dtype))
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: _vit(model.config, image_size, model.attention, nnx.Rngs(0))))
        return dataclasses.replace(self, model=nnx.merge(graphdef, nnx.from_flat_state(list(old.items()))))


@nnx.jit
def _states(model: ViT, images: jax.Array) -> jax.Array:
    return model.states(images)[0]


def normalized(images: ArrayLike) -> jax.Array:
    """Images as the model was trained on them: each color minus its mean, over its deviation.

    Args:
        images: `[B, H, W, 3]`, integers from 0 to 255 or floats from 0 to 1.

    Returns:
        float32 `[B, H, W, 3]`.

    Raises:
        ValueError: another rank or number of colors, or floats outside 0 to 1.

    Example:
        >>> float(normalized(np.full((1, 14, 14, 3), 255, np.uint8))[0, 0, 0, 0].round(2))
        2.25
    """
    array = np.asarray(images)
    if array.ndim != 4 or array.shape[-1] != 3:
        raise ValueError(f"images must be [B, H, W, 3], got {list(array.shape)}")
    pixels = array.astype(np.float32) / (255 if array.dtype.kind in "iu" else 1)
    if not (pixels.min(initial=0) >= 0 and pixels.max(initial=1) <= 1):
        raise ValueError(f"images must hold integers from 0 to 255 or floats from 0 to 1, got other {array.dtype}")
    return jnp.asarray((pixels - np.array(MEAN, np.float32)) / np.array(DEVIATION, np.float32))


def load(
    *,
    attention: Attention = "softmax_attention",
    dtype: Any = jnp.float32,
    image_size: tuple[int, int] = (224, 224),
) -> ViTS14:
    """Load the vision transformer.

    Args:
        attention: a mechanism for all layers, or swaps for some; parameters that it brings along start as new.
        dtype: of parameters and computation.
        image_size: height and width that it is made for, multiples of 14; `features` takes others too.

    Returns:
        The model.

    Raises:
        NotFetched: run `jattn fetch vit_s14` first.
        ValueError: the file is damaged, or the mechanism or the size does not fit.
        ImportError: the library onnx is not installed.

    Source: An Image is Worth 16x16 Words (arXiv 2010.11929); LayerScale from Going deeper with Image Transformers
    (arXiv 2103.17239). Where the package has its weights from, it does not say; the layout is that of DINOv2-small
    (arXiv 2304.07193).
    """
    tensors = torch_names(onnx_file.read(packages.path("vit_s14", "weights")))
    rows = tensors[_POSITIONS].shape[1]
    grid = round(rows**0.5)
    # Copies: views would keep the whole file in memory.
    positions = tensors[_POSITIONS].reshape(grid, grid, -1).copy()
    class_position = tensors[_CLASS_POSITION].reshape(-1).copy()
    width = positions.shape[-1]
    config = TransformerConfig(
        features=width,
        num_layers=12,
        num_heads=width // 64,
        mlp="gelu_erf",
        mlp_ratio=4,
        position="learned",
        norm="layernorm",
        norm_epsilon=1e-6,
        layer_scale=1.0,
        use_bias=True,
        dtype=dtype,
        param_dtype=dtype,
    )

    def build(rngs: nnx.Rngs) -> nnx.Module:
        return _vit(config, image_size, attention, rngs)

    weights = renamed(tensors, config)
    weights[".".join(_TABLE)] = table_for(image_size, positions, class_position)
    return ViTS14(fill(build, weights, new=new_in_attention), positions, class_position)


def _vit(config: TransformerConfig, image_size: tuple[int, int], attention: Attention, rngs: nnx.Rngs) -> ViT:
    return ViT(
        config,
        image_size=image_size,
        patch_size=PATCH,
        num_classes=None,
        pooling="class",
        attention=attention,
        rngs=rngs,
    )


def table_for(image_size: tuple[int, int], positions: np.ndarray, class_position: np.ndarray) -> np.ndarray:
    """The position table for images of a size.

    Args:
        image_size: height and width, multiples of 14.
        positions: `[R, C, M]` as trained.
        class_position: `[M]`.

    Returns:
        float32 `[1 + H/14 * W/14, M]`.

    Raises:
        ValueError: no multiples of 14.

    Example:
        >>> table_for((28, 14), np.ones((3, 3, 5)), np.zeros(5)).sum(axis=1).round(6).tolist()
        [0.0, 5.0, 5.0]
    """
    height, width = image_size
    if height < PATCH or width < PATCH or height % PATCH or width % PATCH:
        raise ValueError(f"height and width must be multiples of {PATCH}, got {height} x {width}")
    down = cubic_interpolation(positions.shape[0], height // PATCH)
    across = cubic_interpolation(positions.shape[1], width // PATCH)
    patches = np.einsum("ir,jc,rcm->ijm", down, across, positions, optimize=True).reshape(-1, positions.shape[2])
    return np.concatenate([class_position[None], patches]).astype(np.float32)


def cubic_interpolation(length: int, wanted: int) -> np.ndarray:
    """The matrix that interpolates `length` samples at `wanted` places, by cubic convolution.

    Place i lies at x = (i + 1/2) length / wanted - 1/2. With a = -0.75, t the distance from x, the four samples around
    x weigh

        (a + 2) t^3 - (a + 3) t^2 + 1  for t <= 1;    a (t^3 - 5 t^2 + 8 t - 4)  for 1 < t <= 2

    and what lies outside is taken from the border.

    Args:
        length: number of samples.
        wanted: number of places; fewer places than samples skip some, nothing is averaged.

    Returns:
        float64 `[wanted, length]`, rows that sum to 1.

    Example:
        >>> cubic_interpolation(4, 2).tolist()
        [[0.5, 0.59375, -0.09375, 0.0], [0.0, -0.09375, 0.59375, 0.5]]

    Source: Cubic convolution interpolation for digital image processing (Keys, IEEE Transactions on Acoustics, Speech,
    and Signal Processing 1981); the operator Resize of ONNX.
    """
    places = (np.arange(wanted) + 0.5) * (length / wanted) - 0.5
    matrix = np.zeros((wanted, length))
    for offset in range(-1, 3):
        samples = np.floor(places).astype(int) + offset
        t = np.abs(places - samples)
        near = (CUBIC + 2) * t**3 - (CUBIC + 3) * t**2 + 1
        far = CUBIC * (t**3 - 5 * t**2 + 8 * t - 4)
        np.add.at(matrix, (np.arange(wanted), samples.clip(0, length - 1)), np.where(t <= 1, near, far))
    return matrix


def torch_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of the file, weights of products by the name and in the layout of before the export.

    Example:
        >>> {name: array.shape for name, array in torch_names({"/layer.0/fc/MatMul": np.ones((2, 3))}).items()}
        {'layer.0.fc.weight': (3, 2)}
    """
    named = {}
    for name, array in tensors.items():
        if name.endswith("/MatMul"):
            named[name.removesuffix("/MatMul").strip("/").replace("/", ".") + ".weight"] = array.T
        else:
            named[name] = array
    return named


def renamed(tensors: dict[str, np.ndarray], config: TransformerConfig) -> dict[str, np.ndarray]:
    """The tensors of the backbone by the paths of `ViT`, without positions; the given mapping is emptied.

    Raises:
        UnreadableFile: a tensor is missing, or one of the backbone is left over.
    """
    renaming = Renaming(tensors, config.num_heads)
    renaming.drop("decoder.", "onnx::")
    patches = "backbone.embeddings.patch_embeddings.projection"
    # From [M, 3, 14, 14] to patches that are flattened row by row, colors last.
    kernel = renaming.take(f"{patches}.weight").transpose(2, 3, 1, 0)
    renaming.weights["embed.kernel"] = kernel.reshape(-1, config.features)
    renaming.weights["embed.bias"] = renaming.take(f"{patches}.bias")
    renaming.weights["class_token"] = renaming.take("backbone.embeddings.cls_token")
    for layer in range(config.num_layers):
        mine, theirs = f"stack.blocks.{layer}", f"backbone.encoder.layer.{layer}"
        renaming.norm(f"{mine}.attention_norm", f"{theirs}.norm1")
        for name in ("query", "key", "value"):
            renaming.heads(f"{mine}.attention.{name}", f"{theirs}.attention.attention.{name}")
        renaming.from_heads(f"{mine}.attention.out", f"{theirs}.attention.output.dense")
        renaming.weights[f"{mine}.attention_scale"] = renaming.take(f"{theirs}.layer_scale1.lambda1")
        renaming.norm(f"{mine}.mlp_norm", f"{theirs}.norm2")
        renaming.linear(f"{mine}.mlp.up", f"{theirs}.mlp.fc1")
        renaming.linear(f"{mine}.mlp.down", f"{theirs}.mlp.fc2")
        renaming.weights[f"{mine}.mlp_scale"] = renaming.take(f"{theirs}.layer_scale2.lambda1")
    renaming.norm("stack.norm", "backbone.layernorm")
    return renaming.done()
