"""The catalogue: finds every entry of the library by reading its files, when asked and never at import.

A module takes part by ending with `ENTRY = Entry(...)` or `ENTRIES = (Entry(...), ...)`. Nothing is registered by hand:
a file that is there is in the catalogue, a file that is gone is not.
"""

import dataclasses
import difflib
import functools
import importlib
import pathlib
import re
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from jattn.mechanisms.entry import Entry

PACKAGES = ("mechanisms", "cache", "probes", "tasks", "softmax", "recurrence", "layers")
"""The sub-packages of jattn that may hold entries."""

_DECLARES = re.compile(r"^ENTR(?:Y|IES)\b", re.MULTILINE)


def modules(root: pathlib.Path, package: str = "jattn", within: Iterable[str] = PACKAGES) -> list[str]:
    """Name the modules that hold entries, by reading their source without importing them.

    Args:
        root: the folder of the package.
        package: its dotted name.
        within: the sub-packages to look into.

    Returns:
        Dotted module names, sorted.

    Example:
        >>> import pathlib, tempfile
        >>> root = pathlib.Path(tempfile.mkdtemp())
        >>> (root / "tasks").mkdir()
        >>> _ = (root / "tasks" / "copying.py").write_text("ENTRY = None")
        >>> modules(root, "mine")
        ['mine.tasks.copying']
    """
    names = []
    for folder in within:
        for path in (root / folder).rglob("*.py"):
            if _DECLARES.search(path.read_text(encoding="utf-8")):
                parts = path.relative_to(root).with_suffix("").parts
                names.append(".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts))))
    return sorted(names)


def collect(loaded: Iterable[ModuleType]) -> tuple[Entry, ...]:
    """Gather the entries of modules.

    Args:
        loaded: modules with a constant `ENTRY` or `ENTRIES`, or both.

    Returns:
        The entries, sorted by name.

    Raises:
        ValueError: a constant holds something else, or two entries share a name.

    Example:
        >>> import types
        >>> module = types.ModuleType("zero")
        >>> module.ENTRY = Entry("zero", "primitive", "softmax", function=lambda query, key, value: 0 * query)
        >>> [entry.name for entry in collect([module])]
        ['zero']
    """
    found: dict[str, tuple[Entry, str]] = {}
    for module in loaded:
        single = [module.ENTRY] if hasattr(module, "ENTRY") else []
        for entry in [*single, *getattr(module, "ENTRIES", ())]:
            if not isinstance(entry, Entry):
                raise ValueError(f"ENTRY and ENTRIES of {module.__name__} must hold Entry objects, got {entry!r}")
            if entry.name in found and found[entry.name][0] is not entry:
                raise ValueError(
                    f"two entries are named {entry.name!r}: in {found[entry.name][1]} and in {module.__name__}; "
                    "a name belongs to one file"
                )
            found.setdefault(entry.name, (entry, module.__name__))
    return tuple(entry for _, (entry, _) in sorted(found.items()))


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Give every entry of the library, sorted by name; the first call imports the modules that hold them.

    Returns:
        The entries.

    Raises:
        ValueError: two entries share a name.

    Example:
        >>> all(isinstance(entry, Entry) for entry in entries())
        True
    """
    loaded = []
    for name in modules(pathlib.Path(__file__).parent):
        try:
            loaded.append(importlib.import_module(name))
        except Exception as error:
            error.add_note(f"while the catalogue was reading {name}")
            raise
    return collect(loaded)


def nearest(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """Give the names most like a mistyped one.

    Args:
        name: what was typed.
        names: what there is.
        count: how many to give at most.

    Returns:
        Names, the nearest first; empty if nothing is near.

    Example:
        >>> nearest("sofmax_atention", ["softmax_attention", "ssa"])
        ['softmax_attention']
        >>> nearest("moba", ["moba_attention", "ssa"])
        ['moba_attention']
    """
    names = sorted(names)
    lowered = name.lower()
    parts = [other for other in names if lowered and (lowered in other.lower() or other.lower() in lowered)]
    close = difflib.get_close_matches(lowered, names, n=count, cutoff=0.5)
    return list(dict.fromkeys([*parts, *close]))[:count]


def unknown(name: Any, names: Iterable[str], what: str = "mechanism") -> ValueError:
    """Make the error that answers an unknown name with the nearest ones.

    Args:
        name: what was asked for.
        names: what there is.
        what: the word for it.

    Returns:
        The error, to be raised.

    Example:
        >>> unknown("sssa", ["ssa", "moba_attention"])
        ValueError("unknown mechanism 'sssa'; nearest: ssa")
    """
    names = sorted(names)
    close = nearest(name, names) if isinstance(name, str) else []
    hint = f"nearest: {', '.join(close)}" if close else f"there are: {', '.join(names)}"
    return ValueError(f"unknown {what} {name!r}; {hint}")


def find(name: str) -> Entry:
    """Give the entry of a name.

    Args:
        name: canonical name, such as `"softmax_attention"`.

    Returns:
        The entry.

    Raises:
        ValueError: there is no such name; the message gives the nearest ones.

    Example:
        >>> find("full_cache").kind
        'cache'
    """
    for entry in entries():
        if entry.name == name:
            return entry
    raise unknown(name, (entry.name for entry in entries()))


def get(name: str) -> Any:
    """Give the function or the layer class behind a name.

    Args:
        name: canonical name, such as `"softmax_attention"`.

    Returns:
        The function of the entry, or its Flax NNX class.

    Raises:
        ValueError: there is no such name; the message gives the nearest ones.

    Example:
        >>> callable(get("full_cache"))
        True
    """
    return find(name).target


def row(entry: Entry) -> dict[str, Any]:
    """Turn an entry into a dictionary that JSON can hold, with the keys of the dataclass.

    Args:
        entry: the entry.

    Returns:
        The dictionary; functions and classes are given as `"module:name"`.

    Example:
        >>> row(Entry("zero", "mask", "softmax", function=len))["function"]
        'builtins:len'
    """
    values = {field.name: getattr(entry, field.name) for field in dataclasses.fields(entry)}
    for name in ("function", "layer", "example"):
        target = values[name]
        if target is not None:
            target = target if hasattr(target, "__qualname__") else type(target)
            values[name] = f"{target.__module__}:{target.__qualname__}"
    values["papers"] = [dataclasses.asdict(paper) for paper in entry.papers]
    values["patterns"] = list(entry.patterns)
    values["cost"] = None if entry.cost is None else dataclasses.asdict(entry.cost)
    values["exempt"] = dict(entry.exempt)
    return values
