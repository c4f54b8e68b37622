"""Pictures of attention: maps of heads, a number for every head, lines over layers.

matplotlib is imported where it draws. Figures are returned, not shown, and belong to no window: they need no closing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MAX_LABELS = 64
"""An axis with more tokens than this is numbered instead of labeled."""
MAX_NUMBERS = 400
"""A heat map of more heads than this shows colors alone."""


def plot_attention(
    weights: Any,
    tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    *,
    titles: Sequence[str] | None = None,
    columns: int = 3,
    size: float = 3.2,
    gamma: float = 0.5,
    top: float = 1.0,
) -> Any:
    """Maps of attention weights: queries downwards, keys to the right, the darker the more.

    Args:
        weights: `[T, S]` of one head, or `[N, T, S]` of several, which become a grid.
        tokens: T labels of the queries; positions if not given, or if there are more than MAX_LABELS.
        key_tokens: S labels of the keys; `tokens` if not given and T = S.
        titles: one a map; `head n` in a grid if not given.
        columns: of the grid.
        size: of a map, in inches.
        gamma: color = (weight / top) ** gamma; below 1 small weights become visible.
        top: the weight that is darkest, in all maps.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: weights of another rank, or labels or titles of another number.

    Example:
        >>> figure = plot_attention(np.eye(3), ["a", "b", "c"])
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['a', 'b', 'c']
    """
    from matplotlib.colors import PowerNorm

    weights = np.asarray(weights, np.float32)
    if weights.ndim not in (2, 3) or 0 in weights.shape:
        raise ValueError(f"plot_attention: weights must be [T, S] or [N, T, S], got {list(weights.shape)}")
    if titles is None and weights.ndim == 3:
        titles = [f"head {head}" for head in range(len(weights))]
    maps = weights.reshape(-1, *weights.shape[-2:])
    count, length, source = maps.shape
    if key_tokens is None and source == length:
        key_tokens = tokens
    for name, given, wanted in (
        ("tokens", tokens, length),
        ("key_tokens", key_tokens, source),
        ("titles", titles, count),
    ):
        if given is not None and len(given) != wanted:
            raise ValueError(f"plot_attention: {name} holds {len(given)}, expected {wanted}")
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = _figure(size * columns + 0.6, size * rows + 0.3)
    axes = np.asarray(figure.subplots(rows, columns, squeeze=False)).ravel()
    for place, axis in enumerate(axes):
        if place >= count:
            axis.remove()
            continue
        image = axis.imshow(maps[place], cmap="Blues", norm=PowerNorm(gamma, 0, top), aspect="auto")
        if titles is not None:
            axis.set_title(titles[place], fontsize=min(9.0, 2.8 * size), parse_math=False)
        _label(axis.xaxis, key_tokens, size, rotation=90)
        _label(axis.yaxis, tokens, size)
    shown = list(axes[:count])
    ticks = top * np.array([0, 0.01, 0.1, 0.25, 0.5, 1])
    bar = figure.colorbar(image, ax=shown, fraction=0.03, pad=0.01, ticks=ticks, format="%.2g")
    bar.ax.tick_params(labelsize=7)
    return figure


def plot_heads(values: Any, title: str, *, limits: tuple[float, float] | None = None) -> Any:
    """A number for every head as a heat map: layers downwards, heads to the right.

    Args:
        values: `[L, N]`.
        title: what the numbers are.
        limits: where the colors begin and end; 0 and the largest value if not given.

    Returns:
        The matplotlib figure; it shows the numbers too, unless there are more than MAX_NUMBERS.

    Raises:
        ValueError: values of another rank.

    Example:
        >>> plot_heads(np.array([[0.25, 0.5]]), "sink mass").axes[0].get_title()
        'sink mass'
    """
    values = np.asarray(values, np.float32)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"plot_heads: values must be [L, N], got {list(values.shape)}")
    layers, heads = values.shape
    low, high = (0.0, float(values.max()) or 1.0) if limits is None else limits
    figure = _figure(1.6 + 0.42 * heads, 0.9 + 0.24 * layers)
    axis = figure.subplots()
    image = axis.imshow(values, cmap="viridis", vmin=low, vmax=high, aspect="auto")
    axis.set(xlabel="head", ylabel="layer", xticks=range(heads), yticks=range(layers))
    axis.tick_params(labelsize=7)
    axis.set_title(title, fontsize=10, parse_math=False)
    if values.size <= MAX_NUMBERS:
        for (layer, head), value in np.ndenumerate(values):
            color = "black" if value > (low + high) / 2 else "white"
            axis.text(head, layer, f"{value:.2f}", ha="center", va="center", fontsize=6, color=color)
    figure.colorbar(image, ax=axis, fraction=0.05, pad=0.02).ax.tick_params(labelsize=7)
    return figure


def plot_layers(lines: Mapping[str, Any], title: str = "", *, label: str = "", logarithmic: bool = False) -> Any:
    """Lines over the layers of a model.

    Args:
        lines: `[L]` by name.
        title: of the picture.
        label: of the vertical axis.
        logarithmic: whether the vertical axis is.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: no line, or one of another rank.

    Example:
        >>> figure = plot_layers({"sink mass": np.array([0.1, 0.4])}, "sinks")
        >>> figure.axes[0].lines[0].get_label()
        'sink mass'
    """
    if not lines:
        raise ValueError("plot_layers: there is no line to draw")
    figure = _figure(7.0, 3.2)
    axis = figure.subplots()
    for name, given in lines.items():
        values = np.asarray(given, np.float64)
        if values.ndim != 1:
            raise ValueError(f"plot_layers: {name} must be [L], got {list(values.shape)}")
        axis.plot(range(len(values)), values, marker="o", markersize=3, label=name)
    axis.set(xlabel="layer", ylabel=label, title=title, yscale="log" if logarithmic else "linear")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _label(axis: Any, tokens: Sequence[str] | None, size: float, **style: Any) -> None:
    axis.set_tick_params(labelsize=6)
    if tokens is None or len(tokens) > MAX_LABELS:
        return
    shown = [token.replace("\n", "\\n") for token in tokens]
    axis.set_ticks(range(len(shown)), shown, parse_math=False, **style)
    # As large as one token's share of the axis, in points, allows.
    axis.set_tick_params(labelsize=min(8.0, 0.85 * 72 * size / len(shown)), length=0)
