"""What a transformer of this library is made of, apart from its attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jattn.layers.norms import NORMS
from jattn.layers.rope_scaling import RopeScaling

POSITIONS = ("rope", "alibi", "t5", "learned", "sinusoidal", "none")
MLPS = ("gelu", "gelu_erf", "relu", "swiglu", "none")
NORM_PLACEMENTS = ("pre", "post")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and options of a transformer.

    Args:
        vocab_size: V; unused by a vision transformer.
        features: M, width of the residual stream.
        num_layers: L.
        num_heads: N.
        num_kv_heads: K, which divides N; N if not given.
        head_dim: D; M / N if not given.
        mlp: `"gelu"` (by tanh), `"gelu_erf"` (the exact one), `"relu"`, `"swiglu"`, or `"none"` for blocks of attention
            alone.
        mlp_ratio: hidden width of the MLP over M; 0 for blocks of attention alone, like `mlp="none"`.
        max_length: the longest sequence; the size of a learned position table.
        position: `"rope"`, `"alibi"`, `"t5"`, `"learned"`, `"sinusoidal"` or `"none"`.
        rope_base: of rotary frequencies.
        rope_layout: `"half"` or `"interleaved"`.
        rope_scaling: a rule of `jattn.layers.rope_scaling`.
        norm: `"rmsnorm"` or `"layernorm"`.
        norm_epsilon: inside the root.
        norm_placement: `"pre"`, x + f(norm(x)) and a last norm; `"post"`, norm(x + f(x)), as in BERT.
        embedding_norm: whether embeddings, positions added, go through a norm.
        embedding_features: E, width of the token and position tables, which a projection then brings to M; M if not
            given.
        share_layers: whether all blocks have the same weights, as in ALBERT.
        layer_scale: first value of a learned factor for each channel of what attention and MLP add; None for no factor.
        dropout: of embeddings and of what attention and MLP add to the stream.
        tie_embeddings: logits by the embedding table.
        use_bias: whether projections have biases, which not every mechanism can have.
        embedding_std: deviation of token tables, position tables and class tokens at the start.
        residual_scale: factor on the initial values of the last projection of every attention and MLP. Below 1, the
            first blocks do not drown what the embeddings have put into the stream: GPT-2 takes 1 / sqrt(2 L).
        dtype: of the computation; that of the parameters if not given.
        param_dtype: of the parameters.

    Raises:
        ValueError: a size or a word that does not fit.

    Example:
        >>> TransformerConfig(vocab_size=100, features=32, num_layers=2, num_heads=4).kv_heads
        4
    """

    vocab_size: int = 256
    features: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp: str = "gelu"
    mlp_ratio: float | int = 4.0
    max_length: int = 1024
    position: str = "rope"
    rope_base: float | int = 10000.0
    rope_layout: str = "half"
    rope_scaling: RopeScaling | None = None
    norm: str = "rmsnorm"
    norm_epsilon: float | int = 1e-6
    norm_placement: str = "pre"
    embedding_norm: bool = False
    embedding_features: int | None = None
    share_layers: bool = False
    layer_scale: float | int | None = None
    dropout: float | int = 0.0
    tie_embeddings: bool = True
    use_bias: bool = False
    embedding_std: float | int = 0.02
    residual_scale: float | int = 1.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        for name in ("vocab_size", "features", "num_layers", "num_heads", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads = {self.num_heads}, got {self.num_kv_heads}")
        if self.head_dim is None and self.features % self.num_heads:
            raise ValueError(f"num_heads must divide features = {self.features} unless head_dim is given")
        words_of = {"position": POSITIONS, "mlp": MLPS, "norm": NORMS, "norm_placement": NORM_PLACEMENTS}
        for name, words in words_of.items():
            if getattr(self, name) not in words:
                raise ValueError(f"{name} must be one of {', '.join(words)}, got {getattr(self, name)!r}")
        if self.embedding_features is not None and self.embedding_features < 1:
            raise ValueError(f"embedding_features must be at least 1, got {self.embedding_features}")
        if self.mlp_ratio < 0:
            raise ValueError(f"mlp_ratio must not be negative, got {self.mlp_ratio}")
        for name in ("embedding_std", "residual_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def embedding_width(self) -> int:
        """E, width of the token and position tables."""
        return self.features if self.embedding_features is None else self.embedding_features

    @property
    def has_mlp(self) -> bool:
        """Whether blocks have an MLP."""
        return self.mlp != "none" and self.mlp_ratio > 0
