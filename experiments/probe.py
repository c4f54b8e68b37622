"""Look into a trained model: what its attention heads do, as an HTML page, numbers and pictures.

    python -m experiments.probe --model=smollm2
    python -m experiments.probe --model=smollm2 --text="To be, or not to be, that is the question:"
    python -m experiments.probe --model=whisper_tiny_en --file=speech.wav --output=results/speech

The model reads a text (a sound, a picture) once, and everything that its attention did is kept. For every head the page
shows how much it attends to one key that serves as a sink, how widely it spreads (entropy in nats), and, for SmolLM2,
whether it copies what followed the same token before (induction score, on 25 random tokens that stand there twice);
then the attention maps of the most telling heads and of all heads, layer by layer, and a table that sorts by a click.

The output folder receives MODEL.html (one file with all pictures inside), MODEL.json (all numbers), and the pictures as
PNG under MODEL/. Weights are never downloaded here: a model that is not on this machine is an error that names the
command that fetches it, with exit status 2. A text is cut to 512 tokens.
"""

import pathlib
import shlex
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from experiments import probe_page, records
from experiments.probe_models import ADAPTERS, PERIOD, View
from experiments.train import versions
from jattn.models import pretrained
from jattn.probes import induction_rows
from jattn.probes.summary import heads_summary, top_heads

SCHEMA = "jattn.probe/1"


def numbers_of(view: View) -> dict[str, Any]:
    """What is known about the heads of a view, as JSON holds it.

    Args:
        view: what was captured.

    Returns:
        'sink_mass', 'entropy', 'induction' `[L][N]`, 'sink_per_layer' `[L]`, 'resid_norms' by name `[L]`, 'drawn' `[S]`
        (mean attention that a key draws), 'top_induction' with names, and what they refer to.
    """
    layers, _, heads = view.weights.shape[:3]
    drawn = view.weights[..., view.from_row :, :].mean((0, 1, 2, 3), dtype=np.float32)
    column = int(drawn.argmax()) if view.column is None else view.column
    repeats = {} if view.repeated is None else {"repeated": {"weights": view.repeated}, "period": PERIOD}
    seen = {"weights": view.weights} if view.resid is None else {"weights": view.weights, "resid": view.resid}
    rows = {} if view.repeated is None else {"rows": induction_rows(PERIOD)}
    found = heads_summary(seen, **repeats, **rows, column=column, from_row=view.from_row)
    found = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64).round(5).tolist(), found)
    top = {} if view.repeated is None else {"period": PERIOD, "top_induction": _named(top_heads(found["induction"]))}
    return {
        "name": view.name,
        "title": view.title,
        "layers": layers,
        "heads": heads,
        "queries": list(view.queries),
        "from_row": view.from_row,
        "column": column,
        "column_label": view.keys[column],
        **top,
        "top_sinks": _named(top_heads(found["sink_mass"])),
        "named": {title: [list(head) for head in chosen] for title, chosen in view.named.items()},
        "sink_per_layer": np.mean(found["sink_mass"], 1).round(5).tolist(),
        "drawn": drawn.astype(np.float64).round(5).tolist(),
        **found,
    }


def _named(heads: list[tuple[int, int, float]]) -> list[dict[str, Any]]:
    return [{"layer": layer, "head": head, "value": value} for layer, head, value in heads]


def run(name: str, given: str, folder: pathlib.Path, command: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Probe a model and write everything.

    Args:
        name: of the model, and of the files.
        given: the text, or the path of a file.
        folder: where everything goes.
        command: how this run was started.
        say: hears about progress.

    Returns:
        The contents of the JSON file.

    Raises:
        NotFetched: the model is not on this machine.
        ImportError: a library that reads its file is missing.
        ValueError: its file is damaged, or what is given does not suit it.
    """
    say(f"loading {name}")
    model = pretrained.load(name)
    say("running it")
    adapter = ADAPTERS[name]
    probed = adapter.probe(model, given)
    results: Mapping[str, Any] = {
        "schema": SCHEMA,
        "command": command,
        "versions": versions(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "model": name,
        "title": adapter.title,
        "facts": dict(probed.facts),
        "views": [numbers_of(view) for view in probed.views],
    }
    pictures = []
    for view, numbers in zip(probed.views, results["views"], strict=True):
        say(f"drawing {view.title}")
        pictures.append(probe_page.draw(view, numbers, folder / name, say))
    records.write_json(folder / f"{name}.json", results)
    probe_page.write_page(folder / f"{name}.html", results, probed.views, pictures)
    return dict(results)


def told(results: Mapping[str, Any]) -> str:
    """The main numbers as text."""
    lines = [f"{name}: {value}" for name, value in results["facts"].items()]
    for view in results["views"]:
        lines.append(f"{view['title']}, {view['layers']} layers of {view['heads']} heads")
        for name, title in (("top_induction", "induction"), ("top_sinks", "sinks")):
            if name in view:
                shown = ", ".join(f"{head['layer']}.{head['head']} {head['value']:.2f}" for head in view[name])
                lines.append(f"  {title} (layer.head): {shown}")
        per_layer = " ".join(f"{mass:.2f}" for mass in view["sink_per_layer"])
        lines.append(f"  mass on key {view['column']} ({view['column_label']}) by layer: {per_layer}")
    return "\n".join(lines)


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of this script; a function, so that several scripts can be imported into one process."""
    texts = ", ".join(name for name, adapter in ADAPTERS.items() if adapter.given == "text")
    files = ", ".join(name for name, adapter in ADAPTERS.items() if adapter.given == "file")
    flags.DEFINE_enum("model", "smollm2", list(ADAPTERS), "which model", flag_values=values)
    flags.DEFINE_string("text", None, f"what it reads (for {texts}); an example if not given", flag_values=values)
    flags.DEFINE_string(
        "file", None, f"a WAV file or a picture (for {files}); an example if not given", flag_values=values
    )
    flags.DEFINE_string("output", "results/probe", "output folder", flag_values=values)


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    adapter = ADAPTERS[values.model]
    other = {"text": "file", "file": "text"}[adapter.given]
    if getattr(values, other) is not None:
        raise app.UsageError(f"{values.model} takes --{adapter.given}, not --{other}")
    command, folder = shlex.join(["python", "-m", "experiments.probe", *sys.argv[1:]]), pathlib.Path(values.output)
    given = getattr(values, adapter.given)
    try:
        given = adapter.example() if given is None else given
        results = run(values.model, given, folder, command, lambda text: print(text, file=sys.stderr, flush=True))
    except (FileNotFoundError, ImportError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{told(results)}\nsee {folder / values.model}.html")


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    flags.FLAGS.set_default("verbosity", logging.WARNING)
    app.run(main)
