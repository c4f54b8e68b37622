"""The pictures of a comparison, as PNG files."""

import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.records import write_bytes

COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#000000", "#994455", "#ee8866")
MARKERS = "osD^v<>P*X"


def pyplot() -> Any:
    """matplotlib without a screen; imported where it is drawn, because importing it takes long."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as module

    return module


def save(figure: Any, path: pathlib.Path, dpi: int = 110) -> None:
    """Write a figure whole as PNG, and let go of it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    pyplot().close(figure)
    write_bytes(path, buffer.getvalue())


def panels(names: Sequence[str], height: float) -> tuple[Any, dict[str, Any]]:
    """A figure with one panel a name, side by side."""
    figure, axes = pyplot().subplots(
        1, len(names), figsize=(1.2 + 4.2 * len(names), height), layout="constrained", squeeze=False
    )
    return figure, dict(zip(names, axes[0], strict=True))


def _grouped(cells: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        found.setdefault(cell["task"], [])
        if cell["quality"] is not None:
            found[cell["task"]].append(cell)
    return found


def styles(cells: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """A color and a marker for every mechanism."""
    names = list(dict.fromkeys(cell["mechanism"] for cell in cells))
    return {
        name: {"color": COLORS[place % len(COLORS)], "marker": MARKERS[(place + place // len(COLORS)) % len(MARKERS)]}
        for place, name in enumerate(names)
    }


def learning_curves(cells: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Validation metric against the step, mean over seeds with the band from the worst to the best seed."""
    looks, groups = styles(cells), _grouped(cells)
    figure, axes = panels(list(groups), 4.4)
    for task, found in groups.items():
        for cell in found:
            curve = [point for point in cell["curve"] if None not in point["metric"]]
            if not curve:
                continue
            steps, values = [point["step"] for point in curve], np.asarray([point["metric"] for point in curve])
            axes[task].plot(steps, values.mean(1), markersize=4, label=cell["mechanism"], **looks[cell["mechanism"]])
            band = {"color": looks[cell["mechanism"]]["color"], "alpha": 0.12, "linewidth": 0}
            axes[task].fill_between(steps, values.min(1), values.max(1), **band)
            axes[task].set_ylabel(cell["quality"]["metric"] + " (validation)")
        axes[task].set(title=task, xlabel="step")
        axes[task].grid(alpha=0.3)
    legend(figure, axes)
    save(figure, path)


def quality_against_time(cells: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Test quality, with its spread over seeds, against the time of a step; hollow marks did not learn."""
    looks, groups = styles(cells), _grouped(cells)
    figure, axes = panels(list(groups), 4.4)
    for task, found in groups.items():
        for cell in found:
            quality, style = cell["quality"], looks[cell["mechanism"]]
            if quality["mean"] is None:
                continue
            axes[task].errorbar(
                1e3 * cell["step_time_s"]["median"],
                quality["mean"],
                yerr=quality["std"] or 0.0,
                xerr=500 * cell["step_time_s"]["iqr"],
                markersize=8,
                capsize=3,
                linestyle="none",
                markerfacecolor=style["color"] if cell["status"] == "ok" else "none",
                label=cell["mechanism"],
                **style,
            )
            axes[task].set_ylabel(
                quality["metric"] + (" (more is better)" if quality["higher_is_better"] else " (less is better)")
            )
        axes[task].set(title=task, xlabel="time of a step and seed (ms)")
        axes[task].grid(alpha=0.3)
    legend(figure, axes)
    save(figure, path)


def memory(cells: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Temporary memory of a forward pass and of a training step, a bar each."""
    groups = _grouped(cells)
    rows = max((len(found) for found in groups.values()), default=0)
    figure, axes = panels(list(groups), 1.6 + 0.4 * rows)
    for task, found in groups.items():
        names, places = [cell["mechanism"] for cell in found], np.arange(len(found))
        for kind, shift, color in (("train", 0.2, COLORS[0]), ("forward", -0.2, COLORS[3])):
            sizes = [(cell["temp_bytes"][kind] or 0) / 2**20 for cell in found]
            axes[task].barh(places + shift, sizes, 0.38, color=color, label=kind)
        axes[task].set_yticks(places, names)
        axes[task].invert_yaxis()
        axes[task].set(title=task, xlabel="temporary memory a seed (MiB)")
        axes[task].grid(alpha=0.3, axis="x")
    legend(figure, axes)
    save(figure, path)


def legend(figure: Any, axes: Mapping[str, Any], *, beside: bool = False) -> None:
    """One legend for all panels, each name once: below them, or beside them where names are many."""
    found = {}
    for axis in axes.values():
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        where = {"loc": "outside right upper"} if beside else {"loc": "outside lower center", "ncols": 4}
        figure.legend(found.values(), found.keys(), fontsize=8, **where)


def draw(cells: Sequence[Mapping[str, Any]], folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Draw all pictures of a comparison.

    Args:
        cells: cells with their curves.
        folder: where the files go.

    Returns:
        The files by what they show.
    """
    if not _grouped(cells):
        return {}
    files = {
        "Learning curves": (learning_curves, "curves.png"),
        "Quality against time": (quality_against_time, "quality_time.png"),
        "Temporary memory": (memory, "memory.png"),
    }
    for function, name in files.values():
        function(cells, folder / name)
    return {title: folder / name for title, (_, name) in files.items()}
