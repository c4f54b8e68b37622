"""Kernels that make the matrices of chunks, all chunks at once, and their gradients: a program a row, chunk and head.

The gradient of a program is the derivative of what it computes, taken while the kernel is traced; gradients of what
several programs read are written side by side and summed afterwards, without atomics.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.flash_attention.pipeline import result_shape
from pallas_kernels.flash_attention.sizes import padded
from pallas_kernels.linear_recurrence.inside import Chunk, Products, Runs, key_side, query_side

PLACES = {"q": "png", "bonus": "hg"} | dict.fromkeys(("k", "a", "b", "gates", "gate_row"), "pn")
"""Leading axes of inputs: p rows and heads, n chunks, g queries a head, h heads; of runs, b rows and n chunks."""
QUERY_INPUTS = ("q", "k", "b", "gates", "gate_row", "bonus")
KEY_INPUTS = ("k", "a", "b", "gates", "gate_row")
QUERY_OUTPUTS = ("rows", "inside", "also")
KEY_OUTPUTS = ("keys", "decay", "seen", "carry", "write")
SINGLE = {
    "gate_row": (0,),
    "bonus": (0,),
    "decay": (0,),
    "column": (1,),
    "row": (0,),
    "carried": (0, 1),
    "last": (0, 1),
}
"""Axes that have one entry whatever the sizes are; that of gates a token, too."""


class Setup(NamedTuple):
    """What a call is compiled for.

    Args:
        dot: `dot(precision, x, y, trans_a, trans_b)` of the backend.
        compiler_params: `width -> parameters` of the backend.
        fills: whether sizes are filled up to powers of two.
        heads: H, of P = B H.
        groups: G, query heads that share a state.
        exclusive: whether tokens do not see themselves.
        narrow: whether products take bfloat16.
        dtype: of sums.
        interpret: whether to run in Pallas' interpreter.
    """

    dot: Any
    compiler_params: Any
    fills: bool
    heads: int
    groups: int
    exclusive: bool
    narrow: bool
    dtype: Any
    interpret: Any

    @property
    def products(self) -> Products:
        """Of the backend."""
        exact = functools.partial(self.dot, jax.lax.Precision.HIGHEST)
        narrow = functools.partial(_narrow, self.dot)
        return Products(narrow if self.narrow else exact, exact, narrow)


def _narrow(dot: Any, x: Any, y: Any, **options: Any) -> Any:
    return dot(None, x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), **options)


def _side(setup: Setup, is_query: bool, runs: Runs | None, names: Any, arrays: Any) -> tuple[Any, ...]:
    chunk = Chunk(**dict(zip(names, arrays, strict=True)))
    if is_query:
        return query_side(setup.products, chunk, runs, exclusive=setup.exclusive)
    return key_side(setup.products, chunk, runs)


def _kernel(setup: Setup, is_query: bool, names: Any, has_runs: bool, backward: bool, *refs: Any) -> None:
    count = len(names)
    arrays = [ref[...].astype(setup.dtype) for ref in refs[:count]]
    refs = refs[count:]
    runs = Runs(*(ref[...] for ref in refs[:4])) if has_runs else None
    refs = refs[4:] if has_runs else refs
    # Triton does not take functions with rules of their own, but what the rules compute; what is not used is dropped.
    found, pull = jax.vjp(lambda *arrays: _side(setup, is_query, runs, names, arrays), *arrays)
    if backward:
        given, refs = refs[: len(found)], refs[len(found) :]
        found = pull(tuple(ref[...].astype(x.dtype) for ref, x in zip(given, found, strict=True)))
    for ref, x in zip(refs, found, strict=True):
        ref[...] = x.astype(ref.dtype)


def _filled(x: Any, lead: int, single: tuple[int, ...]) -> Any:
    """The two axes behind the leading ones filled up to powers of two, but for those that always have one entry."""
    extra = [0 if axis in single else padded(size) - size for axis, size in enumerate(x.shape[lead:])]
    return jnp.pad(x, [(0, 0)] * lead + [(0, more) for more in extra]) if any(extra) else x


def _spec(x: Any, places: str, heads: int) -> Any:
    def index(p: Any, n: Any, g: Any) -> tuple[Any, ...]:
        at = {"p": p, "n": n, "g": g, "b": p // heads, "h": p % heads}
        return (*(at[place] for place in places), 0, 0)

    return pl.BlockSpec((*(None,) * len(places), *x.shape[len(places) :]), index)


def _call(
    setup: Setup, is_query: bool, given: Mapping[str, Any], runs: Mapping[str, Any], cotangents: Any = None
) -> list[Any]:
    names = [name for name in (QUERY_INPUTS if is_query else KEY_INPUTS) if name in given]
    inputs = [(given[name], PLACES[name]) for name in names]
    inputs += [(runs[name], "bn") for name in Runs._fields if runs]
    grid = (*given["k"].shape[:2], setup.groups if is_query else 1)
    if cotangents is not None:
        inputs += [(x.astype(setup.dtype), "png") for x in cotangents.values()]
    if setup.fills:
        single = SINGLE | {"gates": (1,) if "gate_row" in given else ()}
        filled = [*names, *(Runs._fields if runs else ()), *(cotangents or ())]
        inputs = [
            (_filled(x, len(places), single.get(name, ())), places)
            for name, (x, places) in zip(filled, inputs, strict=True)
        ]
    shape = {name: x.shape[len(places) :] for name, (x, places) in zip(names, inputs, strict=False)}
    if cotangents is None:
        (size, width), narrow = shape["k"], jnp.bfloat16 if setup.narrow else setup.dtype
        if is_query:
            outputs = [((size, width), narrow)] + [((size, size), narrow)] * (2 if "b" in names else 1)
        else:
            outputs = [((size, width), narrow), ((1, width), setup.dtype)]
            if "a" in names:
                outputs += [((size, size), setup.dtype)] + [((size, width), narrow)] * 2
    else:
        outputs = [(shape[name], setup.dtype) for name in names]
    arrays = [x for x, _ in inputs]
    results = [result_shape((*grid, *size), dtype, arrays) for size, dtype in outputs]
    return pl.pallas_call(
        functools.partial(_kernel, setup, is_query, tuple(names), bool(runs), cotangents is not None),
        grid=grid,
        in_specs=[_spec(x, places, setup.heads) for x, places in inputs],
        out_specs=[_spec(x, "png", setup.heads) for x in results],
        out_shape=results,
        compiler_params=setup.compiler_params(shape["k"][1]),
        interpret=setup.interpret,
        name=f"linear_recurrence_{'query' if is_query else 'key'}_side{'' if cotangents is None else '_backward'}",
    )(*arrays)


def _cut(x: Any, like: tuple[int, int]) -> Any:
    return x[..., : like[0], : like[1]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def matrices(setup: Setup, given: Mapping[str, Any], runs: Mapping[str, Any]) -> dict[str, Any]:
    """The matrices of all chunks.

    Args:
        setup: what is compiled.
        given: by the names of `Chunk`, those that there are: q `[P, n, G, C, D]`, k `[P, n, C, D]`, a and b alike,
            both or none; gates `[P, n, C, D]`, or `[P, n, C, 1]` and gate_row `[P, n, 1, C]`; bonus `[H, G, 1, D]`.
        runs: by the names of `Runs`, `[B, n, ...]`; empty for a single run.

    Returns:
        By name: rows `[P, n, G, C, D]`, inside `[P, n, G, C, C]`, keys `[P, n, C, D]`, decay `[P, n, 1, D]`, and with a
        and b seen `[P, n, C, C]`, carry, write and also `[P, n, G, C, C]`.
    """
    size, width = given["k"].shape[2:]
    found = dict(zip(QUERY_OUTPUTS, _call(setup, True, given, runs), strict=False))
    found |= {name: x[:, :, 0] for name, x in zip(KEY_OUTPUTS, _call(setup, False, given, runs), strict=False)}
    widths = {"inside": size, "also": size, "seen": size}
    return {name: _cut(x, (1 if name == "decay" else size, widths.get(name, width))) for name, x in found.items()}


def _forward(setup: Setup, given: Mapping[str, Any], runs: Mapping[str, Any]) -> Any:
    return matrices(setup, given, runs), (given, runs)


def _backward(setup: Setup, kept: Any, cotangents: Mapping[str, Any]) -> Any:
    given, runs = kept
    found: dict[str, Any] = {}
    for is_query, inputs, outputs in ((True, QUERY_INPUTS, QUERY_OUTPUTS), (False, KEY_INPUTS, KEY_OUTPUTS)):
        arriving = {name: cotangents[name] for name in outputs if name in cotangents}
        names = [name for name in inputs if name in given]
        if not is_query:
            arriving = {name: x[:, :, None] for name, x in arriving.items()}
        for name, x in zip(names, _call(setup, is_query, given, runs, arriving), strict=True):
            if PLACES[name] == "pn":
                x = x.sum(2)
            elif PLACES[name] == "hg":
                x = x.reshape(-1, setup.heads, *x.shape[1:]).sum((0, 2))
            x = _cut(x, given[name].shape[-2:])
            found[name] = found[name] + x if name in found else x
    return {name: found[name].astype(x.dtype) for name, x in given.items()}, None


matrices.defvjp(_forward, _backward)
