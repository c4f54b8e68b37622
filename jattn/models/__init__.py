"""Models whose attention is any catalogued mechanism, by name."""

from jattn.models.blocks import ModelOutput
from jattn.models.config import TransformerConfig
from jattn.models.decoder import DecodeCache, DecoderLM
from jattn.models.encoder import Encoder
from jattn.models.encoder_decoder import EncoderDecoder
from jattn.models.generate import Generated, filter_logits, generate, sample
from jattn.models.resolve import resolve
from jattn.models.stream import Stream
from jattn.models.swap import Swap, hybrid
from jattn.models.vit import ViT

__all__ = [
    "DecodeCache",
    "DecoderLM",
    "Encoder",
    "EncoderDecoder",
    "Generated",
    "ModelOutput",
    "Stream",
    "Swap",
    "TransformerConfig",
    "ViT",
    "filter_logits",
    "generate",
    "hybrid",
    "resolve",
    "sample",
]
