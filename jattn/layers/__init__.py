"""Flax NNX building blocks that mechanisms and models share. Layers take functions, never names."""

from jattn.layers.adapters import as_flax_attention_fn
from jattn.layers.attention import LayerOutput, MultiHeadAttention
from jattn.layers.norms import QkNorm, make_norm
from jattn.layers.positions import LearnedAbs, sinusoidal
from jattn.layers.rope import Rope, rope
from jattn.layers.sharding import axes, named_shardings

__all__ = [
    "LayerOutput",
    "LearnedAbs",
    "MultiHeadAttention",
    "QkNorm",
    "Rope",
    "as_flax_attention_fn",
    "axes",
    "make_norm",
    "named_shardings",
    "rope",
    "sinusoidal",
]
