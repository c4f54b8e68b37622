"""Flax NNX building blocks that mechanisms and models share. Layers take functions, never names."""

from jattn.layers.adapters import as_flax_attention_fn
from jattn.layers.attention import LayerOutput, MultiHeadAttention
from jattn.layers.long_conv import HyenaFilter, ImplicitFilterRelu, causal_long_conv, fft_conv
from jattn.layers.lrpe import Lrpe
from jattn.layers.md_positions import MdLrpe, MdTpe
from jattn.layers.norms import QkNorm, l2_normalize, make_norm
from jattn.layers.positions import LearnedAbs, sinusoidal
from jattn.layers.recurrent import RecurrentLayer
from jattn.layers.rope import Rope, rope
from jattn.layers.sglu import Sglu
from jattn.layers.sharding import axes, named_shardings
from jattn.layers.short_conv import ShortConv, causal_short_conv
from jattn.layers.simple_rms_norm import SimpleRMSNorm, simple_rms_norm

__all__ = [
    "HyenaFilter",
    "ImplicitFilterRelu",
    "LayerOutput",
    "LearnedAbs",
    "Lrpe",
    "MdLrpe",
    "MdTpe",
    "MultiHeadAttention",
    "QkNorm",
    "RecurrentLayer",
    "Rope",
    "Sglu",
    "ShortConv",
    "SimpleRMSNorm",
    "as_flax_attention_fn",
    "axes",
    "causal_long_conv",
    "causal_short_conv",
    "fft_conv",
    "l2_normalize",
    "make_norm",
    "named_shardings",
    "rope",
    "simple_rms_norm",
    "sinusoidal",
]
