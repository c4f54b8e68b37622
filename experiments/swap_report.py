"""The pictures and the HTML report of a swap table."""

import html
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import plots, report
from experiments.records import write_bytes

COLUMNS = (
    "mechanism",
    "status",
    "perplexity",
    "× full (perplexity)",
    "after tuning",
    "kept mass",
    "visited share",
    "forward (s)",
    "iqr (s)",
    "× full (time)",
    "compile (s)",
    "temporary (MiB)",
    "new parameters",
    "remark",
)

HIGHEST = 1000
"""Ratios of perplexities above this are left out of pictures, where they would press all others together."""
WIDTH, HEIGHT = 10.0, 5.2

NOTES = """
<ul class="note">
<li>Perplexity: exp of the mean negative log-likelihood of all tokens but the first, in one pass over the text; the
weights are those of full attention, and parameters that a mechanism brings along are new. × full (perplexity): over
that of the unswapped model.</li>
<li>Kept mass: the share of full attention's weights that lies on pairs which the mechanism keeps, where every layer is
given what it gets in the unswapped model; the mean over swapped layers and heads and over the rows of the second half
of the text. The remark says how it was read. A dash where every pair is kept (a mechanism may still weigh them in
another way), or where weights cannot be read.</li>
<li>Visited share: pairs that masks and layouts leave, over all T x T; causal attention leaves (T + 1) / 2T. It is not
the work of the implementation. A dash where the mechanism is not one softmax under a mask.</li>
<li>Forward: median and interquartile range of a compiled pass from tokens to logits, batch 1. Cells run one after the
other, so these times also hold what else the machine did; × full (time) is the median of round-by-round ratios to the
unswapped model, which runs in turn with each. Temporary memory is that of the program, without parameters and logits.
Compile time without a cache.</li>
<li>After tuning: the swapped attention layers were distilled towards the unswapped model on other text for the number
of steps that stands above; all else was frozen.</li>
</ul>
"""


def ordered(cells: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Lowest perplexity first; what has none comes last, by name."""

    def order(cell: Mapping[str, Any]) -> tuple:
        value = cell["perplexity"]
        return (value is None, ("ok", "unsupported", "failed").index(cell["status"]), value or 0, cell["mechanism"])

    return sorted(cells, key=order)


def _row(cell: Mapping[str, Any]) -> str:
    forward, tuned = cell["forward_s"] or {}, cell["tuned"] or {}
    temporary = None if cell["temp_bytes"] is None else cell["temp_bytes"] / 2**20
    items = [
        (cell["mechanism"], html.escape(cell["mechanism"])),
        (cell["status"], html.escape(cell["status"])),
        report.number(cell["perplexity"], ",.3f"),
        report.number(cell["ratio"], ",.3f"),
        report.number(tuned.get("perplexity"), ",.3f"),
        report.number(cell["kept_mass"], ".4f"),
        report.number(cell["visited_share"], ".4f"),
        report.number(forward.get("median"), ".2f"),
        report.number(forward.get("iqr"), ".2f"),
        report.number(cell["forward_ratio"], ".2f"),
        report.number(cell["compile_s"], ".1f"),
        report.number(temporary, ",.1f"),
        report.number(cell["new_params"], ",d"),
    ]
    remark = cell["reason"] or f"kept mass: {cell['kept_how']}"
    return report.row(items, remark, is_ranked=cell["perplexity"] is not None)


def write_report(path: pathlib.Path, results: Mapping[str, Any], pictures: Mapping[str, pathlib.Path]) -> None:
    """Write the report.

    Args:
        path: the HTML file.
        results: what `results.json` holds.
        pictures: PNG files by title; they are put into the file.
    """
    table = report.table(COLUMNS, [_row(cell) for cell in ordered(results["cells"])])
    told = ", ".join(f"{name}={value}" for name, value in results["budget"].items())
    body = f"<p class='note'>{html.escape(told)}</p>\n{table}\n{NOTES}\n{report.images(pictures)}"
    headline = f"Attention mechanisms inside {results['budget']['model']}"
    write_bytes(path, report.page("jattn: swap", headline, results, "swapped without training, unless tuned", body))


def _scatter(cells: Sequence[Mapping[str, Any]], key: str, label: str, path: pathlib.Path) -> None:
    """Perplexity over that of full attention against something, a mark a mechanism; hollow marks are after tuning."""
    looks = plots.styles(cells)
    figure, axes = plots.panels([label], HEIGHT)
    figure.set_figwidth(WIDTH)
    for cell in cells:
        place = cell[key]
        if place is None:
            continue
        look = {"linestyle": "none", "markersize": 7, **looks[cell["mechanism"]]}
        ratios = {None: cell["ratio"], "none": (cell["tuned"] or {}).get("ratio")}
        for face, ratio in ratios.items():
            if ratio is not None and ratio <= HIGHEST:
                axes[label].plot(place, ratio, label=cell["mechanism"], markerfacecolor=face, **look)
    axes[label].set(xlabel=label, ylabel=f"perplexity over full attention's (up to {HIGHEST})", yscale="log")
    axes[label].grid(alpha=0.3, which="both")
    plots.legend(figure, axes, beside=True)
    plots.save(figure, path)


def by_layer(cells: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Kept mass of every layer, a line a mechanism."""
    looks = plots.styles(cells)
    figure, axes = plots.panels(["kept mass by layer"], HEIGHT)
    figure.set_figwidth(WIDTH)
    (axis,) = axes.values()
    for cell in cells:
        kept = cell["kept_by_layer"]
        if kept:
            layers = range(len(kept)) if cell["layers"] is None else cell["layers"]
            axis.plot(list(layers), kept, label=cell["mechanism"], markersize=3, **looks[cell["mechanism"]])
    axis.set(xlabel="layer", ylabel="kept attention mass")
    axis.grid(alpha=0.3)
    plots.legend(figure, axes, beside=True)
    plots.save(figure, path)


def draw(cells: Sequence[Mapping[str, Any]], folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Draw all pictures.

    Args:
        cells: of the table.
        folder: where the files go.

    Returns:
        The files by what they show.
    """
    measured = [cell for cell in cells if cell["perplexity"] is not None]
    found = {}
    if any(cell["kept_mass"] is not None for cell in measured):
        found["Perplexity against kept mass"] = folder / "kept.png"
        _scatter(measured, "kept_mass", "kept attention mass", folder / "kept.png")
        found["Kept mass by layer"] = folder / "layers.png"
        by_layer(measured, folder / "layers.png")
    if measured:
        found["Perplexity against time"] = folder / "time.png"
        _scatter(measured, "forward_ratio", "time of a forward pass over full attention's", folder / "time.png")
    return found
