"""A catalogue entry as something that can be called: one pattern, one length, named float arrays in, one array out.

The example of an entry fixes sizes and hyper-parameters. This module turns it into a pure function of its float arrays
(for a layer: of its parameters too), chooses between causal and noncausal, makes the keys longer than the queries for
cross attention, and hides tokens through whatever the entry takes: `segment_ids`, `mask`, or both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jattn.mechanisms.entry import Entry, LayerExample
from jattn.softmax import masks
from jattn.testing.compiling import quick_jit

Arrays = dict[str, Any]


def takes(function: Callable[..., Any]) -> frozenset[str]:
    """Names of the arguments of a function, or of the constructor of a class and the bases that its `**kwargs` go to.

    Example:
        >>> sorted(takes(lambda query, *, mask=None: query))
        ['mask', 'query']
    """
    while isinstance(function, functools.partial):
        function = function.func
    chain = [function]
    if isinstance(function, type):
        chain = [c.__dict__["__init__"] for c in function.__mro__ if "__init__" in c.__dict__ and c is not object]
    names: set[str] = set()
    for one in chain:
        parameters = inspect.signature(one).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return frozenset(names)


def attends(entry: Entry) -> bool:
    """Whether an entry is attention: a function of (query, key, value), or a layer made from (features, num_heads).

    Example:
        >>> from jattn import catalog
        >>> attends(catalog.find("mqar"))
        False
    """
    if not entry.patterns or entry.kind in ("pooling", "position", "task", "cache"):
        return False
    if entry.layer is not None:
        return {"features", "num_heads"} <= takes(entry.layer)
    try:
        names = list(inspect.signature(entry.target).parameters)
    except ValueError:  # a builtin without a signature
        return False
    return names[:3] == ["query", "key", "value"]


def is_float(leaf: Any) -> bool:
    """Whether a leaf is an array of real floats."""
    return isinstance(leaf, np.ndarray | jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)


def cast(arrays: Mapping[str, Any], dtype: Any) -> Arrays:
    """The float arrays in another precision; call it for float64 inside `jax.enable_x64(True)`."""
    return {name: jnp.asarray(np.asarray(array).astype(dtype)) for name, array in arrays.items()}


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an entry, as a pure function of its float arrays.

    Args:
        function: `function(arrays, visible) -> output`.
        arrays: the float arrays by name; what a caller differentiates.
        roles: which of them hold one row a token (axis 1): `"query"`, `"key"`, or `"both"` in self attention.
        pattern: one of the four patterns, or "" for what does not attend.
        query_length: T.
        key_length: S.
    """

    function: Callable[[Arrays, Mapping[str, Any]], Any]
    arrays: Arrays
    roles: dict[str, str]
    pattern: str
    query_length: int
    key_length: int

    @property
    def causal(self) -> bool:
        """Whether a query may see no later key."""
        return self.pattern.startswith("causal")

    @property
    def batch(self) -> int:
        """The number of batch rows."""
        return next((self.arrays[name].shape[0] for name in self.roles), 1)

    @functools.cached_property
    def controls(self) -> tuple[str, ...]:
        """What the entry takes to hide tokens, of `("segment_ids", "mask")`; found by tracing, not by running."""
        for names in (("segment_ids", "mask"), ("segment_ids",), ("mask",)):
            with contextlib.suppress(ValueError, TypeError, NotImplementedError):
                jax.eval_shape(self.function, self.arrays, self.all_visible(names))
                return names
        return ()

    def all_visible(self, names: tuple[str, ...] | None = None) -> Arrays:
        """Hiding arguments that hide nothing."""
        names = self.controls if names is None else names
        return self.hide(np.zeros((self.batch, self.key_length), bool), names)

    def hide(self, hidden: Any, names: tuple[str, ...] | None = None, *, by: str | None = None) -> Arrays:
        """Hiding arguments that hide keys, and with `segment_ids` the queries of the same tokens in self attention.

        Args:
            hidden: bool `[B, S]`.
            names: the arguments to give; `controls` if not given.
            by: the one that hides; the others hide nothing. The first one if not given.

        Returns:
            The arguments by name.
        """
        names = self.controls if names is None else names
        by = by or (names[0] if names else None)
        hidden = np.asarray(hidden, bool)
        nothing = np.zeros_like(hidden)
        arguments: Arrays = {}
        if "mask" in names:
            arguments["mask"] = ~(hidden if by == "mask" else nothing)[:, None, None, :]
        if "segment_ids" in names:
            ids = np.where(hidden if by == "segment_ids" else nothing, -1, 0).astype(np.int32)
            cross = self.pattern.endswith("cross")
            queries = np.zeros((len(hidden), self.query_length), np.int32)
            arguments["segment_ids"] = (queries, ids) if cross else ids
        return arguments

    def __call__(self, arrays: Arrays, visible: Mapping[str, Any] | None = None) -> Any:
        """Run the entry."""
        return self.function(arrays, {} if visible is None else visible)


def build(
    entry: Entry, pattern: str, length: int, *, key_length: int | None = None, seed: int = 0, dtype: Any = None
) -> Call:
    """Make a call of an entry's example.

    Args:
        entry: the entry; a function whose arguments or a layer whose call has one row a token on axis 1.
        pattern: one of the four patterns, or "" for entries that do not attend.
        length: T.
        key_length: S for cross attention; T if not given.
        seed: of the example's key.
        dtype: of the tokens, and of the computation of a layer; the example's if not given.

    Returns:
        The call.

    Raises:
        ValueError: the entry has no example, or cannot be switched to the pattern that it declares.

    Example:
        >>> import jax
        >>> def values(query, key, value):
        ...     return value
        >>> def example(key, length):
        ...     return tuple(jax.random.normal(key, (3, 1, length, 2, 4))), {}
        >>> self_attention = ("noncausal self",)
        >>> toy = Entry("values", "primitive", "softmax", function=values, patterns=self_attention, example=example)
        >>> sorted(build(toy, "noncausal self", 5).roles)
        ['key', 'query', 'value']
    """
    if entry.example is None:
        raise ValueError(f"entry {entry.name!r} has no example(key, length), which conformance needs")
    cross = pattern.endswith("cross")
    key_length = length if key_length is None or not cross else key_length
    make = _layer_call if entry.layer is not None else _function_call
    return make(entry, pattern, length, key_length, seed, dtype)


# Examples and layers are asked for again and again, and making them runs many small programs.
@functools.lru_cache(maxsize=64)
def _example(entry: Entry, seed: int, length: int, query_length: int | None = None) -> Any:
    assert entry.example is not None
    key = jax.random.key(seed)
    if query_length is not None and "query_length" in takes(entry.example):
        return entry.example(key, length, query_length=query_length)
    return entry.example(key, length)


def _switch(entry: Entry, pattern: str, call: frozenset[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that make a call causal or not; empty where the entry knows only one of them."""
    causal = pattern.startswith("causal")
    if not pattern:
        return {}
    if "is_causal" in call:
        return {"is_causal": causal}
    if entry.layer is not None and "mask" in call and "mask" not in given:
        return {"mask": masks.causal()} if causal else {}
    if len({name.split()[0] for name in entry.patterns}) > 1:
        raise ValueError(
            f"{entry.name} declares causal and noncausal patterns, but its call has no is_causal (a layer: no mask)"
        )
    return {}


def _with_hidden(arguments: dict[str, Any], visible: Mapping[str, Any]) -> dict[str, Any]:
    """Join a causal Mask with a mask of hidden keys; a layer takes one mask for both."""
    merged = {**arguments, **visible}
    if "mask" in arguments and "mask" in visible:
        merged["mask"] = arguments["mask"] & masks.dense(jnp.asarray(visible["mask"]))
    return merged


def _tokens(name: str, array: Any, roles: Mapping[str, str], batch: int, lengths: Mapping[str, int]) -> str | None:
    """The role of an array: by its name, else by its shape `[B, T, ...]` where that is telling."""
    if name in roles:
        return roles[name]
    if array.ndim < 2 or array.shape[0] != batch:
        return None
    return next((role for role, size in lengths.items() if array.shape[1] == size and size > 1), None)


def _name(path: Any) -> str:
    """A path as words with dots; `value`, which ends the path of every nnx variable, is left out."""
    words = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path]
    return ".".join(words[:-1] if len(words) > 1 and isinstance(path[-1], jax.tree_util.GetAttrKey) else words)


def _flat(tree: Any) -> tuple[Arrays, Callable[[Arrays], Any]]:
    """The float arrays of a tree by path, and the way back."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [_name(path) for path, _ in leaves]
    floats = {name: np.asarray(leaf) for name, (_, leaf) in zip(names, leaves, strict=True) if is_float(leaf)}

    def rebuild(arrays: Arrays) -> Any:
        return structure.unflatten([arrays.get(name, leaf) for name, (_, leaf) in zip(names, leaves, strict=True)])

    return floats, rebuild


def _function_call(entry: Entry, pattern: str, length: int, key_length: int, seed: int, dtype: Any) -> Call:
    function = entry.target
    signature = inspect.signature(function)
    cross = pattern.endswith("cross")
    args, kwargs = _example(entry, seed, key_length, length if cross else None)
    bound = signature.bind(*args, **kwargs)
    if cross and "query" in bound.arguments and bound.arguments["query"].shape[1] != length:
        bound.arguments["query"] = signature.bind(*_example(entry, seed + 1000, length)[0]).arguments["query"]
    switch = _switch(entry, pattern, takes(function), bound.arguments)
    arrays, rebuild = _flat(dict(bound.arguments))
    self_role = dict.fromkeys(("query", "key", "value"), "both")
    by_name = {"query": "query", "key": "key", "value": "key"} if cross else self_role
    lengths = {"query": length, "key": key_length} if cross else {"both": length}
    batch = arrays["query"].shape[0] if "query" in arrays else next((a.shape[0] for a in arrays.values() if a.ndim), 1)
    roles = {n: r for n, a in arrays.items() if (r := _tokens(n, a, by_name, batch, lengths)) is not None}
    if dtype is not None:
        arrays = {n: a.astype(dtype) if n in roles else a for n, a in arrays.items()}

    def run(arrays: Arrays, visible: Mapping[str, Any]) -> Any:
        new = inspect.BoundArguments(signature, dict(rebuild(arrays)))
        return _main(function(*new.args, **{**new.kwargs, **_with_hidden(switch, visible)}))

    return Call(run, arrays, roles, pattern, length, key_length)


def _layer_call(entry: Entry, pattern: str, length: int, key_length: int, seed: int, dtype: Any) -> Call:
    cross = pattern.endswith("cross")
    layer, example, parameters, bind = construct(entry, length, seed, dtype)
    signature = inspect.signature(layer.__call__)
    bound = signature.bind(*example.call_args, **example.call_kwargs)
    if cross:
        if "context" not in signature.parameters:
            raise ValueError(f"{entry.name} declares {pattern!r}, but its call has no argument 'context'")
        other = LayerExample(*_example(entry, seed + 1000, key_length))
        given = signature.bind(*other.call_args, **other.call_kwargs).arguments
        bound.arguments["context"] = given.get("context", next(iter(given.values())))
    elif pattern:
        bound.arguments.pop("context", None)
    switch = _switch(entry, pattern, takes(layer.__call__), bound.arguments)
    inputs, rebuild = _flat(dict(bound.arguments))
    first = next(iter(bound.arguments))
    by_name = {first: "query", "context": "key"} if cross else {first: "both"}
    lengths = {"query": length, "key": key_length} if cross else {"both": length}
    batch = inputs[first].shape[0] if first in inputs else 1
    roles = {n: r for n, a in inputs.items() if (r := _tokens(n, a, by_name, batch, lengths)) is not None}
    if dtype is not None:
        inputs = {n: a.astype(dtype) if n in roles else a for n, a in inputs.items()}

    def run(arrays: Arrays, visible: Mapping[str, Any]) -> Any:
        new = inspect.BoundArguments(signature, dict(rebuild(arrays)))
        return _main(bind(arrays)(*new.args, **{**new.kwargs, **_with_hidden(switch, visible)}))

    return Call(run, {**inputs, **parameters}, roles, pattern, length, key_length)


@functools.lru_cache(maxsize=16)
def construct(entry: Entry, length: int, seed: int = 0, dtype: Any = None) -> tuple[Any, LayerExample, Arrays, Any]:
    """Build the layer of an entry's example.

    Args:
        entry: the entry of a layer.
        length: of the example.
        seed: of the example's key and of the parameters.
        dtype: of the computation; the example's if not given.

    Returns:
        The layer, the example, its float parameters by name, and `bind(arrays) -> layer`, which puts those back.
    """
    assert entry.layer is not None
    example = LayerExample(*_example(entry, seed, length))
    options = dict(example.ctor_kwargs)
    names = takes(entry.layer)
    if dtype is not None and "dtype" in names:
        options["dtype"] = dtype
    make, own_rngs = entry.layer, "rngs" in names and "rngs" not in options

    def create() -> Any:
        return make(*example.ctor_args, **options, **({"rngs": nnx.Rngs(seed)} if own_rngs else {}))

    layer = nnx.eval_shape(create)
    graph, _ = nnx.split(layer)
    # One quick program for all initial values: drawn one by one they take a compilation each.
    state = quick_jit(lambda: nnx.split(create())[1])()
    parameters, rebuild = _flat(state)
    prefix = "parameters."

    def bind(arrays: Arrays) -> Any:
        return nnx.merge(graph, rebuild({n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}))

    return layer, example, _perturbed({prefix + name: a for name, a in parameters.items()}, seed), bind


def _perturbed(parameters: Arrays, seed: int) -> Arrays:
    """Parameters that start at zero get small values: a gate that is closed would hide every fault behind it."""
    random = np.random.default_rng(seed)
    return {
        name: array if array.any() else (0.1 * random.normal(size=array.shape)).astype(array.dtype)
        for name, array in parameters.items()
    }


def _main(result: Any) -> Any:
    """The output proper: `.output` of a layer's result, the first of several."""
    if hasattr(result, "output"):
        return result.output
    return result[0] if isinstance(result, tuple) else result
