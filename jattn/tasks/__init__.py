"""Learning problems: synthetic ones, and real data that arrives inside ordinary packages.

A task is one file of this folder. It ends with `TASKS`, from names to task classes, and with its catalogue entry;
`get` and `names` find it by themselves.

`real_qkv` is no task: it gives queries, keys and values of a trained model on real text.
"""

import difflib
import functools
import importlib
import inspect
import pkgutil
from typing import Any

from jattn.tasks.base import SPLITS, Mean, Task, summarize
from jattn.tasks.real_qkv import RealQkv, real_qkv

__all__ = ["SPLITS", "Mean", "RealQkv", "Task", "get", "names", "real_qkv", "summarize"]


@functools.cache
def _classes() -> dict[str, type[Task]]:
    classes: dict[str, type[Task]] = {}
    for module in sorted(found.name for found in pkgutil.iter_modules(__path__)):
        classes.update(getattr(importlib.import_module(f"{__name__}.{module}"), "TASKS", {}))
    return classes


def names() -> list[str]:
    """The names of all tasks, sorted.

    Example:
        >>> "mqar" in names()
        True
    """
    return sorted(_classes())


def get(name: str, **overrides: Any) -> Task:
    """Make a task by name.

    Args:
        name: one of `names()`.
        **overrides: parameters that differ from the task's defaults.

    Returns:
        The task.

    Raises:
        ValueError: an unknown name or parameter (the nearest ones are named), or parameters that do not fit together.

    Example:
        >>> get("mqar", seq_len=128, num_kv_pairs=8).length
        128
        >>> get("mqr")
        Traceback (most recent call last):
        ...
        ValueError: unknown task 'mqr'; did you mean 'mqar'? There are: code, digits, mqar, prose
    """
    classes = _classes()
    if name not in classes:
        raise ValueError(f"unknown task {name!r}; {_nearest(name, classes)}There are: {', '.join(names())}")
    task_class = classes[name]
    known = sorted(inspect.signature(task_class).parameters)
    for override in overrides:
        if override not in known:
            raise ValueError(
                f"task {name!r} has no parameter {override!r}; {_nearest(override, known)}It has: {', '.join(known)}"
            )
    return task_class(**overrides)


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, near))}? " if near else ""
