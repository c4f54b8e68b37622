"""Catalogue entries of the engine and of its feature maps, apart from them: `import jattn` reads no catalogue."""

from __future__ import annotations

from jattn.mechanisms.entry import PATTERNS, Cost, Entry, Paper
from jattn.mechanisms.examples import normal, normals
from jattn.recurrence import feature_maps
from jattn.recurrence.api import linear_recurrence


def _example(key, length):
    shape = (2, length, 4, 6)
    query, keys, value, decay = normals(key, shape, shape, (2, length, 4, 5), shape)
    unit = keys / (1e-6 + (keys**2).sum(-1, keepdims=True)) ** 0.5
    options = {"log_decay": -abs(decay), "a": -0.5 * unit, "b": unit, "chunk_size": 4 if length < 64 else 64}
    return (query, keys, value), options


_ENGINE = Entry(
    name="linear_recurrence",
    kind="recurrence",
    family="engine",
    function=linear_recurrence,
    papers=(
        Paper("Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention", "2006.16236", 2020),
        Paper("Parallelizing Linear Transformers with the Delta Rule over Sequence Length", "2406.06484", 2024),
    ),
    patterns=("causal self",),
    cost=Cost(flops="T", memory="T"),
    decode="linear_recurrence_step on its state [B, N, D, Dv]",
    example=_example,
    fidelity="official code",
)

_RNN = Paper("Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention", "2006.16236", 2020)
_ZOOLOGY = Paper("Zoology: Measuring and Improving Recall in Efficient Language Models", "2312.04927", 2023)
_FAST_WEIGHTS = Paper("Linear Transformers Are Secretly Fast Weight Programmers", "2102.11174", 2021)


def _features(key, length):
    return (normal(key, 2, length, 2, 4),), {}


def _feature_map(name: str, paper: Paper) -> Entry:
    return Entry(
        name=name,
        kind="feature_map",
        family="engine",
        function=getattr(feature_maps, name),
        papers=(paper,),
        patterns=tuple(pattern for pattern in PATTERNS if pattern != "causal cross"),
        cost=Cost(flops="T", memory="T"),
        decode="as linear_attention",
        example=_features,
        fidelity="official code",
    )


ENTRIES = (
    _ENGINE,
    _feature_map("elu1", _RNN),
    _feature_map("relu", _RNN),
    _feature_map("taylor2", _ZOOLOGY),
    _feature_map("dpfp", _FAST_WEIGHTS),
)
