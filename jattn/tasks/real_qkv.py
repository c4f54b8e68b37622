"""Queries, keys and values of a trained model on real text: what approximations of attention are measured on.

The model is SmolLM2-135M-Instruct, the text three prose articles that ship with Python. What was computed once is kept
on disk. Models are imported when they are needed and not before.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

ARTICLES = ("compound", "typesmapping", "formatstrings")
"""Topics of `pydoc_data.topics`: English prose with little code in it."""

_FORMAT = "real_qkv/1"


class RealQkv(NamedTuple):
    """What the attention of some layers was given.

    Example:
        >>> RealQkv._fields
        ('queries', 'keys', 'values', 'tokens')
    """

    queries: np.ndarray
    """`[L, T, N, D]`, after rotary positions."""
    keys: np.ndarray
    """`[L, T, K, D]`, after rotary positions."""
    values: np.ndarray
    """`[L, T, K, D]`."""
    tokens: np.ndarray
    """int32 `[T]`."""


def articles() -> str:
    """The text: three articles of Python's language reference, one after the other.

    Raises:
        ValueError: this Python comes without them.

    Example:
        >>> len(articles()) > 50_000
        True
    """
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
        return "".join(topics[name] for name in ARTICLES)
    except (ImportError, KeyError) as error:
        raise ValueError(
            f"the text is made of {', '.join(ARTICLES)} of pydoc_data.topics, which this Python installation lacks"
        ) from error


def real_qkv(
    layers: Sequence[int] | None = None,
    *,
    length: int = 2048,
    text: str | None = None,
    dtype: Any = np.float32,
    folder: str | os.PathLike | None = None,
) -> RealQkv:
    """Queries, keys and values of SmolLM2 on real text, as its attention sees them.

    q_l, k_l = R(x_l W_q), R(x_l W_k), v_l = x_l W_v, for the normed stream x_l that enters layer l of full attention

    What was computed is kept in a file, under a hash of the model's file, the text, its length, the layers and the
    dtype; a file that is damaged is computed again.

    Args:
        layers: numbers of layers, negative ones from the end; all 30 if not given.
        length: T, the first tokens of the text.
        text: the three articles of `articles` if not given.
        dtype: float32, or float16 for half the size (one part in 2,000).
        folder: where files are kept; `real_qkv` in the folder of fetched packages if not given.

    Returns:
        `RealQkv` of NumPy arrays, with 9 query heads, 3 key heads and head dim 64.

    Raises:
        ValueError: a layer that the model lacks, a text of fewer tokens, or another dtype.
        NotFetched: the model is not on this machine; the message says which command brings it.

    Example:
        >>> import tempfile
        >>> real_qkv([0], dtype="float64", folder=tempfile.gettempdir())
        Traceback (most recent call last):
        ...
        ValueError: dtype must be float32 or float16, got float64

    Source: SmolLM2: When Smol Goes Big (arXiv 2502.02737).
    """
    dtype = np.dtype(dtype)
    if dtype not in (np.float32, np.float16):
        raise ValueError(f"dtype must be float32 or float16, got {dtype}")
    if length < 1:
        raise ValueError(f"length must be positive, got {length}")
    text = articles() if text is None else text
    chosen = None if layers is None else [int(layer) for layer in layers]
    asked = json.dumps([_FORMAT, _fingerprint(), text, length, chosen, dtype.name])
    if folder is None:
        from jattn.models.pretrained import packages

        folder = packages.data_folder() / "real_qkv"
    path = pathlib.Path(folder) / f"{hashlib.sha256(asked.encode()).hexdigest()[:24]}.npz"
    found = _read(path)
    if found is None:
        found = _computed(chosen, length, text, dtype)
        _write(path, found)
    return found


def _fingerprint() -> str:
    """The hash of the model's file; the file itself is compared with it when it is loaded."""
    from jattn.models.pretrained import packages

    return packages.find("smollm2").files["weights"].sha256


def _load() -> Any:
    """An object with a `model` and a function `encode` from text to tokens."""
    from jattn.models.pretrained import smollm2

    return smollm2.load()


def _computed(layers: list[int] | None, length: int, text: str, dtype: np.dtype) -> RealQkv:
    import jax
    from flax import nnx

    from jattn.probes import capture

    loaded = _load()
    count = loaded.model.config.num_layers
    chosen = np.arange(count) if layers is None else np.asarray(layers, int)
    if chosen.size == 0 or chosen.min() < -count or chosen.max() >= count:
        raise ValueError(f"layers must lie in [-{count}, {count}), at least one, got {layers}")
    tokens = loaded.encode(text)[:length]
    if len(tokens) < length:
        raise ValueError(f"length is {length}, but the text has {len(tokens)} tokens")
    graphdef, state = nnx.split(loaded.model)
    names = ("query", "key", "value")

    @jax.jit
    def observed(state: Any, tokens: Any) -> list[Any]:
        seen = capture(nnx.merge(graphdef, state), tokens, observe=names, sites=())
        return [seen[name][chosen, 0].astype(dtype) for name in names]

    queries, keys, values = map(np.asarray, observed(state, tokens[None]))
    return RealQkv(queries, keys, values, tokens)


def _read(path: pathlib.Path) -> RealQkv | None:
    """A kept file, if it is there and whole: each array in it carries a checksum."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return RealQkv(**{name: arrays[name] for name in RealQkv._fields})
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _write(path: pathlib.Path, found: RealQkv) -> None:
    """Write a file whole: a reader, or a process that was killed, sees nothing or all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **found._asdict())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
