"""The command line: `python -m jattn`, also installed as `jattn`."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any

from jattn import catalog, pretrained_commands
from jattn.mechanisms.entry import KINDS, PATTERNS, Entry

_INTRODUCTION = """\
The catalogue of jattn: what there is, what it means, and whether it keeps its promises. And trained models.

examples:
  jattn catalog                          every mechanism, one a line
  jattn catalog --family sparse          those of one family
  jattn catalog --json > catalog.json    the same for programs
  jattn show moba_attention              definition, papers, cost, signature
  jattn check moba_attention --time      conformance of one mechanism, with seconds
  jattn check --jobs 2                   conformance of everything, on two processes
  jattn aot ssa --target h100,v5e        does it compile for devices that are not here?
  jattn fetch --list                     trained weights, their size and licence
"""

_PATTERNS = """\
patterns: NS noncausal self, CS causal self, NC noncausal cross, CC causal cross attention.
cost: growth of floating-point work, and of temporary memory, in the sequence length T.
"""

_CHECK = """\
Every entry is checked against what its kind promises: shapes and dtypes, hidden tokens, causality, gradients,
transformations, precision, decoding, declared cost. A check that an entry is exempt from is listed with the reason.
The exit status is 1 if a check failed, 2 for a wrong command line.

examples:
  jattn check ssa                                  all checks of one entry
  jattn check ssa kv_bias --only causality decode  some checks of two
  jattn check --jobs 2 --quiet                     everything, failures only
Set JAX_COMPILATION_CACHE_DIR to make the next run faster.
"""

_AOT = """\
Compiles the example of a mechanism at T tokens, forward and with all gradients, for GPUs and TPUs that are not
attached: whether it compiles, and in how much temporary memory. Nothing is run; the exit status is 1 if something did
not compile. GPUs need `pip install 'jattn[aot-cuda]'`, TPUs `pip install 'jattn[aot-tpu]'`, each best in an environment
of its own.

examples:
  jattn aot --target a100,h100,rtx4090              softmax attention for three GPUs
  jattn aot moba_attention --target v5e --forward   one mechanism for a TPU
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what stands after the command's name; `sys.argv[1:]` if not given.

    Returns:
        The exit status: 0, 1 if a check failed, 2 for an unknown name.

    Example:
        >>> main(["catalog", "--kind", "cache", "--family", "layers"])
        nothing in the catalogue has kind 'cache' and family 'layers'
        0
    """
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except _Unknown as error:
        print(f"jattn: {error}", file=sys.stderr)
        return 2


class _Unknown(ValueError):
    """A name on the command line that the catalogue does not have."""


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="jattn", description=_INTRODUCTION, formatter_class=raw)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    listing = commands.add_parser("catalog", help="list the entries", epilog=_PATTERNS, formatter_class=raw)
    listing.add_argument("--json", action="store_true", help="print a JSON list with the fields of every entry")
    listing.add_argument("--family", metavar="NAME", help="only this family, such as softmax, sparse, tasks")
    listing.add_argument("--kind", metavar="KIND", help=f"only this kind: {', '.join(KINDS)}")
    listing.set_defaults(run=_catalog)

    show = commands.add_parser("show", help="explain one entry", formatter_class=raw)
    show.add_argument("name", metavar="NAME", help="a name of `jattn catalog`")
    show.set_defaults(run=_show)

    check = commands.add_parser("check", help="run the conformance suite", description=_CHECK, formatter_class=raw)
    check.add_argument(
        "names", metavar="NAME", nargs="*", help="names of `jattn catalog`; all of them if none is given"
    )
    check.add_argument("--only", metavar="CHECK", nargs="+", help="only these checks")
    check.add_argument("--time", action="store_true", help="print the seconds that each check took")
    check.add_argument("--quiet", action="store_true", help="print failures and the summary only")
    check.add_argument("--jobs", metavar="N", type=_positive, default=1, help="processes, each with entries of its own")
    check.set_defaults(run=_check)

    ahead = commands.add_parser("aot", help="compile for absent devices", description=_AOT, formatter_class=raw)
    ahead.add_argument("names", metavar="NAME", nargs="*", default=["softmax_attention"], help="mechanisms to compile")
    ahead.add_argument("--target", metavar="LIST", default="h100", help="devices, with commas between (default: h100)")
    ahead.add_argument("--length", metavar="T", type=_positive, default=4096, help="tokens (default: 4096)")
    ahead.add_argument("--forward", action="store_true", help="without the gradient")
    ahead.set_defaults(run=_aot)

    pretrained_commands.add_commands(commands)
    return parser


def _positive(text: str) -> int:
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1 on, got {text!r}")
    return value


def _known(word: str, value: str | None, values: Sequence[str]) -> None:
    if value is not None and value not in values:
        raise _Unknown(str(catalog.unknown(value, values, word)))


def _find(name: str) -> Entry:
    try:
        return catalog.find(name)
    except ValueError as error:
        raise _Unknown(str(error)) from None


def _catalog(options: argparse.Namespace) -> int:
    _known("family", options.family, sorted({entry.family for entry in catalog.entries()}))
    _known("kind", options.kind, KINDS)
    chosen = [
        entry
        for entry in catalog.entries()
        if options.family in (None, entry.family) and options.kind in (None, entry.kind)
    ]
    if options.json:
        print(json.dumps([catalog.row(entry) for entry in chosen], indent=2, ensure_ascii=False))
    elif chosen:
        print(_table(chosen))
    else:
        wanted = [f"{word} {value!r}" for word, value in (("kind", options.kind), ("family", options.family)) if value]
        print(f"nothing in the catalogue has {' and '.join(wanted)}")
    return 0


def _table(chosen: Sequence[Entry]) -> str:
    rows = [("name", "kind", "family", "patterns", "work", "memory", "paper")]
    for entry in chosen:
        short = " ".join(
            "".join(word[0] for word in pattern.split()).upper() for pattern in PATTERNS if pattern in entry.patterns
        )
        cost = (entry.cost.flops, entry.cost.memory) if entry.cost else ("", "")
        paper = (
            entry.papers[0].title + (f" (+{len(entry.papers) - 1})" if len(entry.papers) > 1 else "")
            if entry.papers
            else ""
        )
        rows.append((entry.name, entry.kind, entry.family, short, *cost, paper))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    room = shutil.get_terminal_size((160, 24)).columns if sys.stdout.isatty() else None
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(line[:room] for line in lines)


def _show(options: argparse.Namespace) -> int:
    entry = _find(options.name)
    row = catalog.row(entry)
    print(f"{entry.name}: {entry.kind} of the family {entry.family}  [{row['layer'] or row['function']}]\n")
    print(_call(entry) + "\n")
    print(textwrap.indent(inspect.getdoc(entry.target) or "(no docstring)", "    ") + "\n")
    facts = {
        "patterns": ", ".join(entry.patterns) or "none",
        "cost": f"work {entry.cost.flops}, memory {entry.cost.memory}" if entry.cost else "not declared",
        "decode": entry.decode or "not declared",
        "fidelity": entry.fidelity or "not declared",
        **{f"exempt from {check}": reason for check, reason in entry.exempt.items()},
    }
    for paper in entry.papers:
        source = f" arXiv {paper.arxiv}" if paper.arxiv else ""
        print(f"paper: {paper.title} ({paper.year}){source}")
    for name, fact in facts.items():
        print(f"{name}: {fact}")
    return 0


def _call(entry: Entry) -> str:
    """The signature, one argument a line where it does not fit on one."""
    target: Any = entry.target
    try:
        # The signature of an nnx class is that of its metaclass, which tells nothing.
        signature = inspect.signature(target.__init__ if entry.layer is not None else target)
    except ValueError:
        return f"{target.__name__}(...)"
    if "self" in signature.parameters:
        signature = signature.replace(parameters=list(signature.parameters.values())[1:])
    whole = f"{target.__name__}{signature}"
    if len(whole) <= 100:
        return whole
    lines, last = [], None
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and last not in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL):
            lines.append("    *,")
        last = parameter.kind
        lines.append(f"    {parameter},")
    returns = signature.return_annotation
    arrow = "" if returns is inspect.Signature.empty else f" -> {inspect.formatannotation(returns)}"
    return "\n".join([f"{target.__name__}(", *lines, f"){arrow}"])


def _aot(options: argparse.Namespace) -> int:
    import jax
    import jax.numpy as jnp

    from jattn import aot
    from jattn.testing.subject import attends, build

    failed = 0
    wanted = options.target.split(",")
    for name in wanted:
        if name not in aot.TARGETS:
            raise _Unknown(f"unknown target {name!r}; there are {', '.join(aot.TARGETS)}")
    for entry in map(_find, options.names):
        if not attends(entry):
            raise _Unknown(f"{entry.name!r} is no attention mechanism; `jattn catalog` lists those that have patterns")
        call = build(entry, entry.patterns[0], options.length)

        def total(arrays: Any, call: Any = call) -> Any:
            return jnp.sum(call(arrays).astype(jnp.float32))

        passes = {"forward": call} if options.forward else {"forward": call, "with gradients": jax.grad(total)}
        for target in wanted:
            for word, function in passes.items():
                try:
                    report = aot.compile_for(function, call.arrays, target=target)
                except RuntimeError as error:
                    print(f"jattn: {error}", file=sys.stderr)
                    return 2
                failed += not report.compiles
                print(f"{entry.name}, {word}, T = {options.length}, {report}", flush=True)
    return 1 if failed else 0


def _check(options: argparse.Namespace) -> int:
    from jattn.testing import conformance, runner

    chosen = [_find(name) for name in options.names] or list(catalog.entries())
    everywhere = {conformance.check_name(check) for entry in chosen for check in conformance.checks_of(entry)}
    for name in options.only or ():
        _known("check", name, sorted(everywhere))
    counts: Counter[str] = Counter()
    failures = []
    started: dict[str, int] = {}
    for result in runner.check_entries([entry.name for entry in chosen], options.only, options.jobs):
        number = started.setdefault(result.entry, len(started) + 1)
        counts[result.status] += 1
        if result.status == conformance.FAILED:
            failures.append(result)
        if result.status == conformance.FAILED or not options.quiet:
            seconds = f"{result.seconds:7.2f} s  " if options.time else ""
            print(f"[{number}/{len(chosen)}] {seconds}{result}", flush=True)
    print(", ".join(f"{count} {status}" for status, count in counts.items()) or "nothing to check")
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
