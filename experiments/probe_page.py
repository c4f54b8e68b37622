"""The page of a probed model: its pictures, its table of heads, a section for each layer."""

import html
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.plots import save
from experiments.probe_models import View
from experiments.records import write_bytes
from experiments.report import document, image
from jattn.probes import induction_rows
from jattn.probes.plots import plot_attention, plot_heads, plot_layers
from jattn.probes.summary import top_heads

STYLE = """
.tokens span { display: inline-block; padding: 0 0.15em; margin: 1px; border: 1px solid #ddd; font-size: 0.85em; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.row img { max-width: 24rem; }
dt { font-weight: bold; }
table { max-width: 40rem; }
th:first-child, td:first-child { text-align: right; }
"""
MEASURES = {"induction": "induction score", "sink_mass": "sink mass", "entropy": "entropy (nats)"}
INDUCTION = "strongest induction"
COUNT = 6
"""Heads in a picture of the most interesting ones."""


def interesting(view: View, numbers: Mapping[str, Any]) -> dict[str, list[tuple[int, int]]]:
    """(layer, head) of the heads that are worth a look, by why: known ones first."""
    found = {name: list(heads) for name, heads in view.named.items()}
    for name, title, smallest in (
        ("induction", INDUCTION, False),
        ("sink_mass", "strongest sink", False),
        ("entropy", "lowest entropy", True),
        ("entropy", "highest entropy", False),
    ):
        if name in numbers:
            found[title] = [head[:2] for head in top_heads(numbers[name], COUNT, smallest=smallest)]
    return found


def draw(
    view: View, numbers: Mapping[str, Any], folder: pathlib.Path, say: Callable[[str], None]
) -> dict[str, pathlib.Path]:
    """Draw all pictures of a view.

    Args:
        view: what was captured.
        numbers: what `experiments.probe.numbers_of` made of it.
        folder: for the PNG files.
        say: hears what is drawn.

    Returns:
        The files by name.
    """
    files = {}

    def keep(name: str, figure: Any, dpi: int = 90) -> None:
        files[name] = folder / f"{view.name}_{name}.png"
        save(figure, files[name], dpi)

    for name, title in MEASURES.items():
        if name in numbers:
            limits = None if name == "entropy" else (0.0, 1.0)
            keep(name, plot_heads(numbers[name], title, limits=limits))
    mass = np.asarray(numbers["sink_mass"])
    lines = {"mean over heads": mass.mean(1), "strongest head": mass.max(1)}
    keep("sinks", plot_layers(lines, f"attention to key {numbers['column']} ({numbers['column_label']})", label="mass"))
    if "resid_norms" in numbers:
        title = "length of the stream's vectors"
        keep("norms", plot_layers(numbers["resid_norms"], title, label="norm", logarithmic=True))
    say(f"{view.name}: numbers")
    for title, heads in interesting(view, numbers).items():
        keep(title.replace(" ", "_"), _maps(view, numbers, heads, size=4.2))
    if view.repeated is not None:
        keep("repeated", _repeated_maps(view, numbers))
    for layer in range(view.weights.shape[0]):
        heads = [(layer, head) for head in range(view.weights.shape[2])]
        keep(f"layer_{layer}", _maps(view, numbers, heads, size=2.4, labeled=False), dpi=70)
        say(f"{view.name}: layer {layer}")
    return files


def _maps(
    view: View, numbers: Mapping[str, Any], heads: Sequence[tuple[int, int]], size: float, labeled: bool = True
) -> Any:
    """The maps of some heads; of the first token over the picture where there is one."""
    keys = view.keys[: view.shown_keys]
    maps = np.stack([view.weights[layer, 0, head, :, : len(keys)] for layer, head in heads])
    labels: dict[str, Any] = {"tokens": view.queries, "key_tokens": keys} if labeled else {}
    if view.grid is not None:
        maps, labels = maps[:, 0, 1:].reshape(-1, *view.grid), {}
    titles = [f"layer {layer} head {head}\n{_measured(numbers, layer, head)}" for layer, head in heads]
    # Rows over hundreds of keys hold no weight near 1; the darkest color is what all but few rows reach at most.
    top = min(1.0, float(np.quantile(maps.max(-1), 0.95))) or 1.0
    figure = plot_attention(maps, **labels, titles=titles, size=size, top=top)
    if view.places is not None:
        for axis in figure.axes[: len(heads)]:
            axis.plot(view.places, range(len(view.places)), ".", color="tab:red", markersize=2)
    return figure


def _repeated_maps(view: View, numbers: Mapping[str, Any]) -> Any:
    """The heads of the strongest induction on the random tokens: the second time below, all keys to the right."""
    heads = interesting(view, numbers)[INDUCTION]
    maps = np.stack([np.asarray(view.repeated[layer, 0, head]) for layer, head in heads])
    titles = [f"layer {layer} head {head}\n{_measured(numbers, layer, head)}" for layer, head in heads]
    rows = [str(row) for row in induction_rows(numbers["period"])]
    return plot_attention(maps, rows, [str(key) for key in range(maps.shape[-1])], titles=titles, size=3.4)


def _measured(numbers: Mapping[str, Any], layer: int, head: int) -> str:
    names = {"induction": "induction", "sink_mass": "sink", "entropy": "entropy"}
    return ", ".join(f"{short} {numbers[name][layer][head]:.2f}" for name, short in names.items() if name in numbers)


def write_page(
    path: pathlib.Path,
    results: Mapping[str, Any],
    views: Sequence[View],
    pictures: Sequence[Mapping[str, pathlib.Path]],
) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        results: what the JSON file holds.
        views: what was captured.
        pictures: files by name for each view; they are put into the page.
    """
    facts = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(v))}</dd>" for name, v in results["facts"].items()
    )
    links = " · ".join(f'<a href="#{view.name}">{html.escape(view.title)}</a>' for view in views)
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    sections = "\n".join(
        _section(view, numbers, files) for view, numbers, files in zip(views, results["views"], pictures, strict=True)
    )
    body = f"""<h1 id="top">{html.escape(results["title"])}: what its heads do</h1>
<p><code>{html.escape(results["command"])}</code></p>
<p class="note">{html.escape(results["device"])}; {html.escape(versions)}. Layers and heads are counted from 0.</p>
<dl>{facts}</dl>
<p>{links}</p>
{sections}"""
    write_bytes(path, document(f"jattn: {results['title']}", body, STYLE))


def _section(view: View, numbers: Mapping[str, Any], files: Mapping[str, pathlib.Path]) -> str:
    layers = view.weights.shape[0]
    anchors = " ".join(f'<a href="#{view.name}-layer-{layer}">{layer}</a>' for layer in range(layers))
    overview = "\n".join(image(name, files[name]) for name in (*MEASURES, "sinks", "norms") if name in files)
    groups = []
    for title, heads in interesting(view, numbers).items():
        named = ", ".join(
            f'<a href="#{view.name}-layer-{layer}">layer {layer} head {head}</a> ({_measured(numbers, layer, head)})'
            for layer, head in heads
        )
        picture = image(title, files[title.replace(" ", "_")])
        groups.append(f"<h3>{html.escape(title)}</h3>\n<p>{named}</p>\n{picture}")
        if title == INDUCTION:
            groups.append(f"<p>The same heads on the random tokens:</p>\n{image('repeated', files['repeated'])}")
    single = "".join(_layer(view, layer, files[f"layer_{layer}"]) for layer in range(layers))
    return f"""<h2 id="{view.name}">{html.escape(view.title)}</h2>
<p>Layers: {anchors}</p>
{_tokens(view, numbers)}
{_note(view, numbers)}
<div class="row">{overview}</div>
{"".join(groups)}
<h3>All heads</h3>
<p class="note">Click on a column to sort, on a layer to see its maps.</p>
{_table(view, numbers)}
{single}"""


def _note(view: View, numbers: Mapping[str, Any]) -> str:
    since = f"queries {view.from_row} and later" if view.from_row else "all queries"
    sink = f"Sink mass: mean attention to key {numbers['column']} (<code>{html.escape(numbers['column_label'])}</code>"
    sink += ") of " if view.column is not None else "), which draws most, of "
    items = [
        f"{sink}{since}.",
        f"Entropy: mean of {since}, in nats; {np.log(len(view.keys)):.2f} is that of all keys alike.",
    ]
    if "induction" in numbers:
        items.append(
            f"Induction score: on {numbers['period']} random tokens that stand there twice, mean attention of the "
            "second ones to what followed the same token the first time; 1 is a head that does nothing else."
        )
    else:
        items.append("No induction score: the model was not made to go on with what it is given.")
    items.append("Maps: queries downwards, keys to the right; colors by the square root of the weight.")
    if view.grid is not None:
        items[-1] = "Maps: what the first token attends to, over the picture; colors by the square root of the weight."
    if view.places is not None:
        items.append("Red dots: the time of each token.")
    return '<ul class="note">' + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def _tokens(view: View, numbers: Mapping[str, Any]) -> str:
    """The queries, the darker the more attention they draw as keys."""
    if not view.listed:
        return ""
    drawn = numbers["drawn"] if view.queries is view.keys else [0.0] * len(view.queries)
    top = max(drawn) or 1.0
    spans = [
        f'<span title="{place}: draws {share:.3f}" style="background: rgba(68, 119, 170, {share / top:.2f})">'
        f"{html.escape(token)}</span>"
        for place, (token, share) in enumerate(zip(view.queries, drawn, strict=True))
    ]
    return f'<p class="tokens">{"".join(spans)}</p>'


def _table(view: View, numbers: Mapping[str, Any]) -> str:
    """All heads, first those of the strongest induction, or sink where there is none."""
    names = [name for name in MEASURES if name in numbers]
    order = top_heads(numbers[names[0]], view.weights.shape[0] * view.weights.shape[2])
    rows = []
    for layer, head, _ in order:
        values = "".join(
            f'<td data-value="{numbers[n][layer][head]}">{numbers[n][layer][head]:.3f}</td>' for n in names
        )
        rows.append(
            f'<tr><td data-value="{layer}"><a href="#{view.name}-layer-{layer}">{layer}</a></td>'
            f'<td data-value="{head}">{head}</td>{values}</tr>'
        )
    heads = "".join(f"<th>{title}</th>" for title in ("layer", "head", *(MEASURES[name] for name in names)))
    return f"<table><thead><tr>{heads}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody></table>"


def _layer(view: View, layer: int, file: pathlib.Path) -> str:
    links = [f'<a href="#{view.name}-layer-{layer - 1}">previous</a>'] if layer else []
    if layer + 1 < view.weights.shape[0]:
        links.append(f'<a href="#{view.name}-layer-{layer + 1}">next</a>')
    links += [f'<a href="#{view.name}">overview</a>', '<a href="#top">top</a>']
    title = f"{view.title}: layer {layer}"
    anchor = f'<h3 id="{view.name}-layer-{layer}">{html.escape(title)}</h3>'
    return f"{anchor}\n<p>{' · '.join(links)}</p>\n{image(title, file)}\n"
