"""Reproductions of what papers claim.

    python -m experiments.claims list
    python -m experiments.claims run mqar_width64
    python -m experiments.claims run ssa_temperature --quick

`list` shows every claim with its paper; `run` measures one, prints the verdict, and writes NAME.json and NAME.png.
`--quick` runs a few steps to see that everything works; its verdict means nothing.
"""

import pathlib
import sys

from absl import app, flags, logging

from experiments.claims import registry

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "results" / "claims"


def describe(claim: registry.Claim) -> str:
    """A claim as text."""
    paper = f"{claim.paper.title} (arXiv {claim.paper.arxiv}, {claim.paper.year})"
    rows = {"paper": paper, "claim": claim.claim, "setting": claim.setting, "expected": claim.expected}
    return "\n".join([claim.name, *(f"  {name + ':':<10} {text}" for name, text in rows.items())])


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of this script; a function, so that several scripts can be imported into one process."""
    flags.DEFINE_boolean("quick", False, "a few steps only; the verdict means nothing", flag_values=values)
    flags.DEFINE_string("output", str(FOLDER), "where NAME.json and NAME.png go", flag_values=values)


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    words = argv[1:]
    if words == ["list"]:
        print("\n\n".join(map(describe, registry.claims().values())))
        return
    if len(words) != 2 or words[0] != "run":
        raise app.UsageError("expected: list, or run NAME [--quick]")
    try:
        claim = registry.find(words[1])
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(describe(claim), file=sys.stderr)
    folder = pathlib.Path(values.output)
    result = registry.run(claim, folder, values.quick, lambda text: print(text, file=sys.stderr, flush=True))
    note = " (quick: this verdict means nothing)" if values.quick else ""
    print(f"{claim.name}: {result['verdict']}{note}\n  {result['reason']}\n  {folder}, {result['seconds']:.0f} s")


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    flags.FLAGS.set_default("verbosity", logging.WARNING)
    app.run(main)
