"""What a claim is, how claims are found, and what a run of one leaves behind."""

import dataclasses
import importlib
import pathlib
import pkgutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from experiments import plots, records
from experiments.train import versions
from jattn.catalog import unknown
from jattn.mechanisms.entry import Paper

VERDICTS = ("reproduced", "partly", "not reproduced")
SCHEMA = "jattn.claim/1"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a claim's run found.

    Args:
        verdict: one of `VERDICTS`.
        reason: the verdict in words, with the numbers it rests on.
        numbers: everything that was measured.
        draw: `draw(figure)` draws the numbers on an empty matplotlib figure.
    """

    verdict: str
    reason: str
    numbers: Mapping[str, Any]
    draw: Callable[[Any], None]

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict must be one of {', '.join(VERDICTS)}, got {self.verdict!r}")


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of a paper and the experiment that tests it.

    Args:
        name: of the file.
        paper: where it is claimed.
        claim: what is claimed.
        setting: what is run here, and where it differs from the paper.
        expected: what must come out, and which numbers make which verdict.
        run: `run(quick, report) -> Outcome`; `quick` is a smoke test whose verdict means nothing, and
            `report(text)` shows progress.
    """

    name: str
    paper: Paper
    claim: str
    setting: str
    expected: str
    run: Callable[[bool, Callable[[str], None]], Outcome]


def claims() -> dict[str, Claim]:
    """All claims by name, found by their files."""
    found = {}
    for module in pkgutil.iter_modules([str(pathlib.Path(__file__).parent)]):
        if module.name not in ("registry", "__main__"):
            claim = getattr(importlib.import_module(f"experiments.claims.{module.name}"), "CLAIM", None)
            if claim is not None:
                found[claim.name] = claim
    return dict(sorted(found.items()))


def find(name: str) -> Claim:
    """The claim of a name.

    Raises:
        ValueError: there is none; the nearest ones are named.
    """
    known = claims()
    if name not in known:
        raise unknown(name, known, "claim")
    return known[name]


def run(claim: Claim, folder: pathlib.Path, quick: bool, report: Callable[[str], None]) -> dict[str, Any]:
    """Run a claim, and write `NAME.json` and `NAME.png` (with `-quick` behind the name for a quick run)."""
    started = time.perf_counter()
    outcome = claim.run(quick, report)
    name = claim.name + ("-quick" if quick else "")
    result = {
        "schema": SCHEMA,
        "name": claim.name,
        "paper": claim.paper,
        "claim": claim.claim,
        "setting": claim.setting,
        "expected": claim.expected,
        "quick": quick,
        "verdict": outcome.verdict,
        "reason": outcome.reason,
        "numbers": outcome.numbers,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": versions(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    records.write_json(folder / f"{name}.json", result)
    figure = plots.pyplot().figure(figsize=(9, 4.2), layout="constrained")
    outcome.draw(figure)
    plots.save(figure, folder / f"{name}.png")
    return result
