"""One cell of the swap table: a mechanism in the place of a trained model's attention, judged on real text."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments import keeping, measures, swap_kept, swap_tune, timing
from experiments.cells import Request, parse_requests
from experiments.swap_tune import TuneOptions
from jattn import catalog
from jattn.models import Swap
from jattn.models.pretrained.filling import WeightsDoNotFit
from jattn.models.resolve import attention_entry, is_attention
from jattn.tasks.base import cross_entropy

PATTERN = "causal self"
BUDGETS: Mapping[str, Sequence[str]] = {
    "full_cache": ("max_tokens={length}",),
    "window_cache": ("window=64", "window=256", "window=1024"),
    "sink_window_cache": tuple(f"window={window},num_sinks=4,positions=original" for window in (64, 256, 1024)),
    "gna_mask": ("grid=None,window=256,is_causal=True",),
    "gna_attention": ("window=256",),
    "moba_attention": ("chunk_size=64,topk=4", "chunk_size=64,topk=8"),
}
"""Options of the mechanisms that have a budget; one that is not here runs with its defaults. Positions stay those of
the text, since a model without training knows no others."""

BLANK: Mapping[str, Any] = {
    "mechanism": "",
    "layers": None,
    "heads": None,
    "status": "",
    "reason": "",
    "perplexity": None,
    "ratio": None,
    "tuned": None,
    "kept_mass": None,
    "kept_by_layer": None,
    "kept_how": "",
    "visited_share": None,
    "forward_s": None,
    "forward_ratio": None,
    "compile_s": None,
    "temp_bytes": None,
    "new_params": None,
}
"""The keys of a cell in `results.json`."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A trained model that can be loaded with any attention.

    Args:
        name: of the model.
        fingerprint: of its weights.
        load: from what `attention=` takes to an object with a `model` and a function `encode` from text to tokens.
    """

    name: str
    fingerprint: str
    load: Callable[[Any], Any]


def smollm2() -> Source:
    """SmolLM2-135M-Instruct.

    Raises:
        NotFetched: the message says which command brings it.
    """
    from jattn.models.pretrained import packages, smollm2

    packages.path("smollm2", "weights")
    fingerprint = packages.find("smollm2").files["weights"].sha256
    return Source("SmolLM2-135M-Instruct", fingerprint, lambda attention: smollm2.load(attention=attention))


@dataclasses.dataclass(frozen=True)
class Cell:
    """Everything that decides the outcome of a cell; equal cells have equal keys."""

    mechanism: str
    label: str
    options: Mapping[str, Any]
    layers: tuple[int, ...] | None
    heads: tuple[int, ...] | None
    model: str
    text: str
    length: int
    rounds: int
    tune: TuneOptions | None = None

    @property
    def key(self) -> str:
        """Hash of the configuration, and of what it was computed with."""
        return keeping.key_of(self)


def everything(length: int) -> list[Request]:
    """All that the catalogue offers for a decoder, with budgets; and what attends but not so, which gets a reason."""
    texts = []
    for entry in catalog.entries():
        if entry.kind != "task" and is_attention(entry):
            budgets = BUDGETS.get(entry.name, ("",)) if PATTERN in entry.patterns else ("",)
            texts += [f"{entry.name}:{budget}" if budget else entry.name for budget in budgets]
    return parse_requests(",".join(texts).format(length=length))


class Bench:
    """What all cells share: the text, and what the unswapped model makes of it.

    Args:
        source: the model.
        text: what is read.
        length: its first tokens.

    Raises:
        ValueError: the text has fewer tokens.
    """

    def __init__(self, source: Source, text: str, length: int) -> None:
        self.source, self.length = source, length
        self.text = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._text = text

    @functools.cached_property
    def base(self) -> Any:
        """The unswapped model, loaded."""
        return self.source.load("softmax_attention")

    @property
    def config(self) -> Any:
        """Of the model."""
        return self.base.model.config

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """int32 `[1, T]`."""
        tokens = self.base.encode(self._text)[: self.length]
        if len(tokens) < self.length:
            raise ValueError(f"--tokens is {self.length}, but the text has {len(tokens)} tokens")
        return tokens[None]

    @functools.cached_property
    def seen(self) -> swap_kept.Seen:
        """What the layers of the unswapped model were given and saw."""
        return swap_kept.see(self.base.model, self.tokens)

    @functools.cached_property
    def forward(self) -> timing.Subject:
        """The compiled pass of the unswapped model, which every other is timed beside."""
        graphdef, state = nnx.split(self.base.model)
        return timing.compiled("full attention", functools.partial(_logits, graphdef), state, self.tokens)

    @functools.cached_property
    def perplexity(self) -> float:
        """Of the unswapped model."""
        return perplexity_of(self.forward.call(), self.tokens)

    def cells(
        self,
        requests: Sequence[Request],
        *,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        rounds: int = 3,
        tune: TuneOptions | None = None,
    ) -> list[Cell]:
        """A cell for every request."""
        chosen = (None if numbers is None else tuple(numbers) for numbers in (layers, heads))
        shared = (*chosen, self.source.fingerprint, self.text, self.length, rounds, tune)
        return [Cell(request.name, request.label, dict(request.options), *shared) for request in requests]


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef: Any, state: Any, tokens: Any) -> jax.Array:
    # Logits are the result, so that the temporary memory of the program is that of the blocks.
    return nnx.merge(graphdef, state)(tokens).logits


@jax.jit
def _loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    return cross_entropy(logits[:, :-1], tokens[:, 1:]).mean()


def perplexity_of(logits: jax.Array, tokens: Any) -> float:
    """exp of the mean negative log-likelihood of all tokens but the first."""
    return float(np.exp(_loss(logits, tokens)))


def run_cell(cell: Cell, bench: Bench, report: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Swap, and measure.

    Returns:
        A cell of `results.json`. A mechanism that does not attend causally, or has no place for the trained weights,
        gives the status `"unsupported"`, another exception `"failed"`; both with the reason.
    """
    blank = {**BLANK, "mechanism": cell.label, "layers": cell.layers, "heads": cell.heads}
    try:
        attention_entry(cell.mechanism, PATTERN)
    except ValueError as error:
        return blank | {"status": "unsupported", "reason": str(error)}
    try:
        return blank | _measured(cell, bench, report)
    except WeightsDoNotFit as error:  # It has other projections than those that were trained.
        return blank | {"status": "unsupported", "reason": keeping.reason_of(error)}
    except Exception as error:  # One mechanism's failure is a result; the others go on.
        return blank | {"status": "failed", "reason": keeping.reason_of(error)}


def _measured(cell: Cell, bench: Bench, report: Callable[[str], None]) -> dict[str, Any]:
    report("loading")
    swap = Swap(cell.mechanism, cell.options, layers=cell.layers, heads=cell.heads)
    model = bench.source.load(swap).model
    graphdef, state = nnx.split(model)
    report("compiling")
    subject = timing.compiled(cell.label, functools.partial(_logits, graphdef), state, bench.tokens)
    perplexity = perplexity_of(subject.call(), bench.tokens)
    report(f"perplexity {perplexity:.3f}, timing")
    ratio, plain = perplexity / bench.perplexity, bench.forward
    plain.times.clear()
    timing.interleave([subject, plain], cell.rounds, warm=False)
    report(f"perplexity {perplexity:.3f}, kept mass")
    count, num_heads = bench.config.num_layers, bench.config.num_heads
    layers = sorted({layer % count for layer in cell.layers or range(count)})
    heads = sorted({head % num_heads for head in cell.heads or range(num_heads)})
    found = {
        "status": "ok",
        "layers": None if cell.layers is None else layers,
        "heads": None if cell.heads is None else heads,
        "perplexity": perplexity,
        "ratio": ratio,
        "forward_s": measures.median_and_iqr(subject.times),
        "forward_ratio": timing.ratio(subject, plain)["median"],
        "compile_s": subject.compile_s,
        "temp_bytes": subject.temp_bytes,
        "new_params": _size(model) - _size(bench.base.model),
        **swap_kept.kept(model, bench.base.model, bench.seen, layers, heads),
    }
    tune = cell.tune
    if tune is not None and not found["ratio"] <= tune.above:
        tuned = swap_tune.tune(model, bench.base, layers, tune, report)
        after = perplexity_of(_logits(graphdef, tuned.state, bench.tokens), bench.tokens)
        found["tuned"] = {"perplexity": after, "ratio": after / bench.perplexity, **tuned.record}
    return found


def _size(model: nnx.Module) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
