"""Conformance of recurrences: all modes agree, a state carries everything over, packed documents are separate ones."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.cache import FullCache
from jattn.recurrence.api import MODES
from jattn.testing.compiling import quick_jit
from jattn.testing.subject import Arrays, build, cast, construct, takes
from jattn.testing.workbench import LENGTH, NotApplicable, Workbench, assert_same

CUTS = (1, LENGTH // 2, LENGTH - 1)


def keeps_state(function: Any) -> bool:
    """Whether a function takes a state and gives one back.

    Example:
        >>> keeps_state(lambda query, *, initial_state=None, return_final_state=False: query)
        True
    """
    return {"initial_state", "return_final_state"} <= takes(function)


def _causal(bench: Workbench) -> Any:
    if "causal self" not in bench.entry.patterns:
        raise NotApplicable("it does not declare 'causal self'")
    return bench.call("causal self")


def _arguments(bench: Workbench) -> dict[str, Any]:
    """Arguments of the function that are no float arrays, and the switch that makes it causal."""
    entry = bench.entry
    signature = inspect.signature(entry.target)
    assert entry.example is not None
    args, kwargs = entry.example(jax.random.key(0), LENGTH)
    given = signature.bind(*args, **kwargs).arguments
    rest = {name: x for name, x in given.items() if name not in _causal(bench).arrays}
    return rest | ({"is_causal": True} if "is_causal" in signature.parameters else {})


def _part(bench: Workbench, arrays: Arrays, start: int, stop: int) -> Arrays:
    roles = _causal(bench).roles
    return {name: x[:, start:stop] if name in roles else x for name, x in arrays.items()}


def in_parts(bench: Workbench) -> Any:
    """`f(arrays)`: the output for the whole, computed part by part with the state passed on."""
    ends = (0, *CUTS, LENGTH)
    parts = list(zip(ends, ends[1:], strict=False))
    if bench.entry.layer is not None:
        bind = construct(bench.entry, LENGTH)[3]
        tokens = next(iter(_causal(bench).roles))

        def through_layer(arrays: Arrays) -> Any:
            layer, outputs = bind(arrays), []
            policy = FullCache(LENGTH)
            cache = layer.init_cache(policy, arrays[tokens].shape[0], arrays[tokens].dtype)
            for start, stop in parts:
                found = layer(arrays[tokens][:, start:stop], cache=(policy, cache))
                cache = found.cache
                outputs.append(found.output)
            return jnp.concatenate(outputs, 1)

        return through_layer
    step = _function_step(bench)

    def through_function(arrays: Arrays) -> Any:
        state, outputs = arrays.get("initial_state"), []
        for start, stop in parts:
            out, state = step(_part(bench, arrays, start, stop), state)
            outputs.append(out)
        return jnp.concatenate(outputs, 1)

    return through_function


def _function_step(bench: Workbench) -> Any:
    rest = _arguments(bench)
    return lambda arrays, state: bench.entry.target(
        **{**arrays, **rest, "initial_state": state}, return_final_state=True
    )


def token_by_token(bench: Workbench) -> Any:
    """`f(arrays)`: the output of a function, computed one token at a time on its state."""
    step, roles = _function_step(bench), _causal(bench).roles

    def run(arrays: Arrays) -> Any:
        fixed = {name: x for name, x in arrays.items() if name not in roles}
        first, state = step(_part(bench, arrays, 0, 1), arrays.get("initial_state"))

        def one(state: Any, tokens: Arrays) -> Any:
            out, state = step({**fixed, **{name: x[:, None] for name, x in tokens.items()}}, state)
            return state, out[:, 0]

        later = {name: jnp.swapaxes(x[:, 1:], 0, 1) for name, x in arrays.items() if name in roles}
        return jnp.concatenate([first, jnp.swapaxes(jax.lax.scan(one, state, later)[1], 0, 1)], 1)

    return run


def whole(bench: Workbench) -> tuple[Arrays, Any]:
    """The arrays in float64 and the output for them."""
    call = _causal(bench)

    def make() -> Any:
        with jax.enable_x64(True):
            arrays = cast(call.arrays, np.float64)
            return arrays, np.asarray(quick_jit(call.function)(arrays, {}))

    return bench.once("recurrence", make)


def check_modes(bench: Workbench) -> str:
    """All modes of the engine that the function can run in give the same output."""
    entry = bench.entry
    if entry.function is None or "mode" not in takes(entry.function):
        raise NotApplicable("it takes no mode")
    arrays, expected = whole(bench)
    rest, ran = _arguments(bench), []
    for mode in MODES:
        try:
            with jax.enable_x64(True):
                found = quick_jit(lambda arrays, mode=mode: entry.target(**{**arrays, **rest, "mode": mode}))(arrays)
        except ValueError as error:
            if mode != "associative" or "associative" not in str(error):
                raise
            continue
        assert_same(found, expected, f"mode={mode!r}")
        ran.append(mode)
    return ", ".join(ran)


def check_splitting(bench: Workbench) -> str:
    """A sequence that is split anywhere, the state passed on, gives the outputs of the whole."""
    entry = bench.entry
    _causal(bench)
    if entry.layer is None and not keeps_state(entry.target):
        raise NotApplicable("it takes no initial_state, or gives no final one")
    if entry.layer is not None and not hasattr(entry.layer, "init_cache"):
        raise NotApplicable("it has no cache")
    arrays, expected = whole(bench)
    with jax.enable_x64(True):
        found = quick_jit(in_parts(bench))(arrays)
    assert_same(found, expected, f"split after {CUTS} tokens")
    return f"after {', '.join(map(str, CUTS))} of {LENGTH} tokens"


def check_packing(bench: Workbench) -> str:
    """Two documents packed in a row, with padding between them, give what they give alone."""
    call = _causal(bench)
    if "segment_ids" not in call.controls:
        raise NotApplicable("it takes no segment_ids")
    first, second = LENGTH // 3, LENGTH // 2 + 1
    arrays, _ = whole(bench)
    ids = np.full((call.batch, LENGTH), -1, np.int32)
    ids[:, :first], ids[:, second:] = 5, 3
    run = quick_jit(call.function)
    with jax.enable_x64(True):
        packed = np.asarray(run(arrays, {"segment_ids": ids}))
        for start, stop in ((0, first), (second, LENGTH)):
            alone = build(bench.entry, "causal self", stop - start)
            given = _part(bench, arrays, start, stop)
            if start and "initial_state" in given:
                given["initial_state"] = given["initial_state"] * 0
            found = quick_jit(alone.function)(given, {})
            assert_same(packed[:, start:stop], found, f"tokens {start} to {stop}")
    if packed[:, first:second].any():
        raise AssertionError("padding has an output")
    return f"documents of {first} and {LENGTH - second} tokens"


RECURRENCE = (check_modes, check_splitting, check_packing)
