"""What a mechanism costs, read off programs and shapes: memory, decode state, visited share of the score matrix."""

import dataclasses
import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.training import ModelOptions, Trainer, build_model
from jattn import catalog, tasks
from jattn.cache import FullCache, WindowCache
from jattn.cache.protocol import nbytes
from jattn.mechanisms.entry import Entry
from jattn.softmax import api, gather
from jattn.softmax.arguments import build_problem
from jattn.softmax.blockwise.schedule import make_schedule
from jattn.softmax.problem import dense_visibility


def median_and_iqr(values: Sequence[float]) -> dict[str, float]:
    """Median and interquartile range of measured times.

    Example:
        >>> median_and_iqr([1.0, 2.0, 3.0, 4.0, 100.0])
        {'median': 3.0, 'iqr': 2.0}
    """
    low, middle, high = np.percentile(np.asarray(values, np.float64), [25, 50, 75])
    return {"median": float(middle), "iqr": float(high - low)}


def temporary_bytes(compiled: Any) -> int | None:
    """Temporary memory of a compiled program in bytes; None where the backend does not tell."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Bytes that decoding one sequence keeps: `bytes_per_token * tokens + bytes_fixed`."""

    bytes_per_token: float
    bytes_fixed: float


def decode_state(task: tasks.Task, options: ModelOptions) -> DecodeState | None:
    """The decode state of a model, from the shapes of its cache at two lengths; nothing is computed.

    A mechanism with a function `NAME_state` beside it keeps what that function makes. One with an argument `window`
    keeps a window of keys and values. Every other keeps them all.

    Returns:
        The state of one sequence over all layers, float32; None where the model does not decode.
    """
    entry = catalog.find(options.attention)
    if task.kind != "lm" or not entry.decode or entry.decode.lower().startswith("no"):
        return None
    make_state = getattr(importlib.import_module(entry.target.__module__), f"{entry.name}_state", None)
    if make_state is not None:
        heads, width = options.num_kv_heads or options.num_heads, options.width // options.num_heads
        known = inspect.signature(make_state).parameters
        chosen = {name: value for name, value in options.attention_options.items() if name in known}
        state = jax.eval_shape(lambda: make_state(1, heads, width, width, **chosen))
        return DecodeState(0.0, float(options.depth * nbytes(state)))

    def size(length: int) -> int:
        window = _window(entry, options.attention_options)
        policy = FullCache(length) if window is None else WindowCache(min(window, length))

        def make() -> Any:
            return build_model(task, options, rngs=nnx.Rngs(0)).init_cache(policy, 1).layers

        return nbytes(nnx.eval_shape(make))

    short, long = 1 << 20, 1 << 21
    per_token = (size(long) - size(short)) / (long - short)
    return DecodeState(per_token, size(short) - per_token * short)


def _window(entry: Entry, options: Mapping[str, Any]) -> int | None:
    """How many tokens back a mechanism can look; None for all."""
    known = inspect.signature(entry.target).parameters

    def option(name: str, otherwise: Any) -> Any:
        return options.get(name, known[name].default if name in known else otherwise)

    window, dilation = option("window", None), option("dilation", 1)
    return window * dilation if isinstance(window, int) and isinstance(dilation, int) else None


@contextmanager
def recorded_problems() -> Iterator[list[Any]]:
    """Collect every attention problem that the softmax engine is given meanwhile.

    The engine's entry points check their arguments through `build_problem` of their module; while this is open, what
    comes out of it is also put into the list.
    """
    found: list[Any] = []
    modules = (api, gather)
    before = [module.build_problem for module in modules]

    def recording(build: Any) -> Any:
        def build_and_keep(*arguments: Any, **options: Any) -> Any:
            problem = build(*arguments, **options)
            found.append(problem[0])
            return problem

        return build_and_keep

    for module, build in zip(modules, before, strict=True):
        module.build_problem = recording(build)
    try:
        yield found
    finally:
        for module, build in zip(modules, before, strict=True):
            module.build_problem = build


def visible_pairs(problem: Any) -> Any:
    """How many (query, key) pairs the masks and the layout of a problem leave, a head, averaged over rows and heads."""
    _, length, source, _, _ = problem.sizes
    visible = dense_visibility(problem)
    if visible is None:
        return jnp.asarray(length * source, jnp.float32)
    # Axes of size 1 broadcast, so the mean over what is there is the mean over everything.
    return jnp.mean(jnp.asarray(visible, jnp.float32)) * length * source


def visited_pairs(arrays, **arguments: Any) -> int:
    """Pairs of the score matrix of one head in the tiles that the blockwise path visits."""
    problem, _ = build_problem(*arrays, **arguments)
    schedule = make_schedule(problem, True)
    tiles = int(schedule.full_count.sum() + schedule.partial_count.sum())
    return tiles * schedule.query_block * schedule.key_block


def visited_share(trainer: Trainer, params: Any, other: Any, batch: Mapping[str, Any]) -> float | None:
    """The share of the T x T score matrix of a head that a mechanism looks at, averaged over heads, layers and rows.

    It is counted from the masks and layouts of a real call, so a selector that depends on the data is counted as it
    selected, and causal attention over T tokens visits (T + 1) / 2T.

    Returns:
        The share; None where there is no score matrix.
    """

    # Only the counts leave the program, so the compiler drops the attention itself.
    @jax.jit
    def count(params: Any, other: Any, inputs: Any) -> list[Any]:
        with recorded_problems() as problems:
            trainer.forward(params, other, inputs)
        return [visible_pairs(problem) for problem in problems]

    pairs = count(params, other, batch["inputs"])
    return sum(map(float, pairs)) / (trainer.model.depth * trainer.task.length**2) if pairs else None
