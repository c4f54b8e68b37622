"""What a run leaves on disk: files written whole or not at all, metrics as JSON lines, checkpoints, a loss plot."""

import dataclasses
import io
import json
import math
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Write a file whole: a reader, or a process that was killed, sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader accepts: arrays become lists, dataclasses objects, numbers that are not finite null."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write JSON whole."""
    write_bytes(path, (to_json(value, indent=2) + "\n").encode())


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


class MetricsLog:
    """Metrics as JSON lines, each with the `step` it belongs to.

    A run that goes on from a checkpoint first drops the lines behind it (and half a line that a kill may have left), so
    that no step stands there twice.
    """

    def __init__(self, path: pathlib.Path, step: int = 0) -> None:
        self.path = path
        kept = [line for line in self.read(path) if line["step"] <= step]
        write_bytes(path, "".join(to_json(line) + "\n" for line in kept).encode())

    @staticmethod
    def read(path: pathlib.Path) -> list[dict[str, Any]]:
        """All complete lines of a file, which need not exist."""
        if not path.exists():
            return []
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return lines

    def append(self, step: int, split: str, **values: Any) -> None:
        """Add a line; it is on disk when this returns."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(to_json({"step": step, "split": split, **values}) + "\n")
            file.flush()
            os.fsync(file.fileno())


class Checkpoints:
    """Checkpoints of pytrees under one folder, the last few of them, through orbax.

    A checkpoint appears under its final name only when it is complete; what a killed process left half-written is
    removed when the folder is opened again.
    """

    def __init__(self, folder: pathlib.Path, keep: int = 3) -> None:
        import orbax.checkpoint as ocp

        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True, create=True)
        # With its handler named, a manager that has saved nothing yet can read what an earlier process saved.
        self._manager = ocp.CheckpointManager(
            folder.absolute(), options=options, item_handlers=ocp.StandardCheckpointHandler()
        )

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, tree: Any) -> None:
        """Save a tree of arrays and random keys; when this returns it is on disk."""
        import orbax.checkpoint as ocp

        named = {name: _storable(leaf) for name, leaf in _named_leaves(tree).items()}
        self._manager.save(step, args=ocp.args.StandardSave(named), force=True)
        self._manager.wait_until_finished()

    def restore(self, like: Any, step: int | None = None) -> Any:
        """The tree saved at a step (the newest one), as a tree like `like`.

        Raises:
            ValueError: there is no checkpoint, or its tree has other leaves or shapes than `like`.
        """
        import orbax.checkpoint as ocp

        step = self.latest() if step is None else step
        if step is None:
            raise ValueError(f"no checkpoint in {self._manager.directory}")
        leaves = _named_leaves(like)
        wanted = {name: _storable(leaf) for name, leaf in leaves.items()}
        shapes = {name: (leaf.shape, str(leaf.dtype)) for name, leaf in wanted.items()}
        saved = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in self._manager.item_metadata(step).items()}
        if saved != shapes:
            odd = sorted(name for name in {*saved, *shapes} if saved.get(name) != shapes.get(name))
            raise ValueError(
                f"checkpoint {step} in {self._manager.directory} is of another model at {odd[0]!r}: "
                f"expected {shapes.get(odd[0])}, got {saved.get(odd[0])}"
            )
        restored = self._manager.restore(step, args=ocp.args.StandardRestore(wanted))
        return jax.tree.unflatten(
            jax.tree.structure(like), [_as_before(restored[name], leaf) for name, leaf in leaves.items()]
        )

    def close(self) -> None:
        """Wait for what is under way and let go of the folder."""
        self._manager.close()


def _named_leaves(tree: Any) -> dict[str, Any]:
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _storable(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf)


def _as_before(stored: Any, like: Any) -> Any:
    return jax.random.wrap_key_data(stored, impl=jax.random.key_impl(like)) if _is_key(like) else stored


def plot_losses(path: pathlib.Path, lines: list[dict[str, Any]], metric: str, title: str) -> None:
    """Draw training loss and validation metric against the step as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, left = pyplot.subplots(figsize=(7, 4), layout="constrained")
    train = [(line["step"], line["loss"]) for line in lines if line["split"] == "train" and line["loss"] is not None]
    valid = [(line["step"], line[metric]) for line in lines if line["split"] == "valid" and line[metric] is not None]
    handles = []
    if train:
        handles += left.plot(*zip(*train, strict=True), color="tab:blue", linewidth=1, label="training loss (nats)")
    left.set(xlabel="step", ylabel="training loss (nats)", title=title)
    left.grid(alpha=0.3)
    right = left.twinx()
    if valid:
        handles += right.plot(
            *zip(*valid, strict=True), "o-", color="tab:orange", markersize=3, label=f"{metric} (validation)"
        )
    right.set_ylabel(f"{metric} (validation)")
    if handles:
        left.legend(handles=handles, loc="best")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    pyplot.close(figure)
    write_bytes(path, buffer.getvalue())


def clear(folder: pathlib.Path, names: tuple[str, ...]) -> None:
    """Remove the named files and folders of a run, and nothing else."""
    for name in names:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def parse_options(text: str) -> dict[str, Any]:
    """Read `"name=value,name=value"`: values are Python literals, anything else is a string.

    Raises:
        ValueError: a part without a name.

    Example:
        >>> parse_options("seq_len=128, window=(2, 3), kind=exp")
        {'seq_len': 128, 'window': (2, 3), 'kind': 'exp'}
    """
    import ast

    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    options: dict[str, Any] = {}
    for part in filter(str.strip, parts):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name.isidentifier():
            raise ValueError(f"options must be written as name=value,name=value; got {part.strip()!r} in {text!r}")
        try:
            options[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            options[name] = value
    return options
