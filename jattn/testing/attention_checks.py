"""Conformance of what attends: primitives and layers, against the contracts that every mechanism keeps.

Every check takes the `Workbench` of a mechanism, returns a short remark, and raises `Failed` or `NotApplicable`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jattn.testing import subject
from jattn.testing.workbench import (
    KEYS,
    LENGTH,
    SHORT,
    Failed,
    NotApplicable,
    Result,
    Workbench,
    assert_equal_bits,
    assert_same,
)


def check_shapes(bench: Workbench) -> str:
    """Every pattern works at lengths 1, 7 and 13; outputs have the query's length and dtype (by tracing only)."""
    for pattern in bench.entry.patterns:
        for length in (1, SHORT, LENGTH):
            _check_shape(bench, pattern, length, None)
        _check_shape(bench, pattern, LENGTH, jnp.bfloat16)
        with jax.enable_x64(True):
            call = bench.call(pattern)
            wide = jax.eval_shape(call, subject.cast(call.arrays, np.float64), call.all_visible())
            if wide.dtype != jnp.float64:
                raise Failed(f"{pattern}: float64 inputs give {wide.dtype}; there is no truth to compare with")
    return f"{len(bench.entry.patterns)} patterns"


def _check_shape(bench: Workbench, pattern: str, length: int, dtype: object) -> None:
    call = bench.call(pattern, length, dtype=dtype)
    query = next(name for name, role in call.roles.items() if role in ("query", "both"))
    query = "query" if "query" in call.arrays else query
    asked = call.arrays[query]
    got = jax.eval_shape(call, call.arrays)
    expected = asked.shape
    if "query" in call.arrays and "value" in call.arrays:
        expected = (*asked.shape[:-1], call.arrays["value"].shape[-1])
    where = f"{pattern}, T = {length}, S = {call.key_length}, {asked.dtype}"
    if got.dtype != asked.dtype:
        raise Failed(f"{where}: the output is {got.dtype}, expected the dtype of {query}, {asked.dtype}")
    if got.shape != expected:
        raise Failed(f"{where}: the output is {list(got.shape)}, expected {list(expected)}")


def check_gradients(bench: Workbench) -> str:
    """Outputs are finite, and so is the gradient of every float input and parameter."""
    output, gradients = bench.result
    if not np.isfinite(output).all():
        raise Failed("the output is not finite")
    bad = [name for name, gradient in gradients.items() if not np.isfinite(gradient).all()]
    if bad:
        raise Failed(f"gradients that are not finite: {', '.join(bad)}")
    return f"{len(gradients)} arrays"


def check_derivative(bench: Workbench) -> str:
    """Gradients are the slope of the output, measured in float64 by central differences in every array at once."""
    base = bench.base
    random = np.random.default_rng(3)
    direction = {name: random.normal(size=a.shape) * max(float(np.std(a)), 0.1) for name, a in base.arrays.items()}
    wide = {name: a.astype(np.float64) for name, a in base.arrays.items()}

    def value(step: float) -> float:
        moved = {name: a + step * direction[name] for name, a in wide.items()}
        return float(np.sum(bench.true(moved).output * bench.cotangent))

    def slope(step: float) -> float:
        return (value(step) - value(-step)) / (2 * step)

    step = float(np.cbrt(np.finfo(np.float64).eps))
    near, far = slope(step), slope(2 * step)
    each = {name: float(np.sum(bench.truth.gradients[name] * direction[name])) for name in direction}
    claimed = sum(each.values())
    # The two steps bound the truncation error; the resolution of float32 stands far above the rounding error.
    allowed = 4 * abs(near - far) + np.finfo(np.float32).eps * (1 + sum(map(abs, each.values())))
    if not abs(near - claimed) <= allowed:
        raise Failed(f"the output changes by {near:.8g} along a direction, the gradients say {claimed:.8g}")
    return f"slope {near:.4g}"


def check_determinism(bench: Workbench) -> str:
    """Two runs give the same bits, for the output and for every gradient."""
    again = bench.run()
    assert_equal_bits(again.output, bench.result.output, "output of a second run")
    for name, gradient in again.gradients.items():
        assert_equal_bits(gradient, bench.result.gradients[name], f"gradient of {name} in a second run")
    return ""


def _controls(bench: Workbench) -> tuple[str, ...]:
    if not bench.base.controls:
        raise NotApplicable("it takes neither segment_ids nor a mask")
    return bench.base.controls


def check_empty_rows(bench: Workbench) -> str:
    """A row that may attend to nothing gives output 0 and gradients 0 (finite ones, for a layer)."""
    base, controls = bench.base, _controls(bench)
    hidden = np.zeros((base.batch, base.key_length), bool)
    hidden[-1] = True
    for by in controls:
        output, gradients = bench.run(visible=base.hide(hidden, by=by))
        _assert_finite(Result(output, gradients), f"with a batch row hidden by {by}")
        if bench.entry.layer is not None:
            continue
        if output[-1].any():
            raise Failed(f"a batch row hidden by {by} gives outputs up to {np.abs(output[-1]).max():.3g}, expected 0")
        for name in base.roles:
            if gradients[name][-1].any():
                largest = np.abs(gradients[name][-1]).max()
                raise Failed(f"a batch row hidden by {by} has gradients of {name} up to {largest:.3g}, expected 0")
    return f"by {', '.join(controls)}"


def _assert_finite(result: Result, where: str) -> None:
    if not np.isfinite(result.output).all():
        raise Failed(f"{where}: the output is not finite")
    for name, gradient in result.gradients.items():
        if not np.isfinite(gradient).all():
            raise Failed(f"{where}: the gradient of {name} is not finite")


def check_poison(bench: Workbench) -> str:
    """What stands in hidden keys and values reaches nothing: NaN and inf for a function, huge numbers for a layer.

    Outputs and gradients stay the same bit for bit. A layer multiplies its tokens by parameters before anything is
    hidden, so its parameter gradients could not stay finite under NaN.
    """
    base, controls = bench.base, _controls(bench)
    hidden = np.zeros((base.batch, base.key_length), bool)
    hidden[0, -3:] = True
    hidden[-1, 2:4] = True
    cotangent = bench.cotangent
    if base.query_length == base.key_length and not base.pattern.endswith("cross"):
        cotangent = np.where(hidden.reshape(*hidden.shape, *(1,) * (cotangent.ndim - 2)), 0, cotangent)
    kept = cotangent != 0
    poison = np.where(np.arange(base.key_length) % 2, np.inf, np.nan) if bench.entry.layer is None else 1e4
    poison = np.broadcast_to(poison, hidden.shape)
    poisoned = dict(base.arrays)
    for name in bench.attends_to:
        where, what = (x.reshape(*hidden.shape, *(1,) * (poisoned[name].ndim - 2)) for x in (hidden, poison))
        poisoned[name] = np.where(where, what, poisoned[name]).astype(poisoned[name].dtype)
    for by in controls:
        visible = base.hide(hidden, by=by)
        clean, dirty = bench.run(None, visible, cotangent), bench.run(poisoned, visible, cotangent)
        source = f"poison in tokens hidden by {by}"
        assert_equal_bits(dirty.output[kept], clean.output[kept], f"output under {source}")
        for name, gradient in dirty.gradients.items():
            assert_equal_bits(gradient, clean.gradients[name], f"gradient of {name} under {source}")
    return f"{', '.join(bench.attends_to)} by {', '.join(controls)}"


def check_lengths(bench: Workbench) -> str:
    """At lengths 1 and 7 outputs are those that the same tokens have within a longer sequence."""
    base, long = bench.base, bench.truth.output
    for length in (1, SHORT):
        call = bench.call(length=length)
        arrays = bench.slice_tokens(base, length, base.arrays)
        if {n: a.shape for n, a in arrays.items()} != {n: a.shape for n, a in call.arrays.items()}:
            output = bench.true_output(call)
            if not np.isfinite(output).all():
                raise Failed(f"T = {length}: the output is not finite")
            continue
        output = bench.true_output(call, arrays)
        expected = long
        if base.pattern == "noncausal self":
            if not base.controls:
                if not np.isfinite(output).all():
                    raise Failed(f"T = {length}: the output is not finite")
                continue
            hidden = np.broadcast_to(np.arange(LENGTH) >= length, (base.batch, LENGTH))
            expected = bench.true(visible=base.hide(hidden)).output
        assert_same(output, expected[:, :length], f"T = {length} against the start of T = {LENGTH}")
    return f"1, {SHORT}, {LENGTH}"


def check_truncation(bench: Workbench) -> str:
    """Cross attention: leaving out later queries changes no earlier output."""
    pattern = next((pattern for pattern in bench.entry.patterns if pattern.endswith("cross")), None)
    if pattern is None:
        raise NotApplicable("it declares no cross pattern")
    whole, part = bench.call(pattern), bench.call(pattern, SHORT)
    arrays = bench.slice_tokens(whole, SHORT, whole.arrays)
    if {n: a.shape for n, a in arrays.items()} != {n: a.shape for n, a in part.arrays.items()}:
        raise Failed(f"{pattern}: arrays other than the query depend on its length; give example a query_length")
    expected = bench.true_output(whole)[:, :SHORT]
    assert_same(bench.true_output(part, arrays), expected, f"{pattern} with {SHORT} of {LENGTH} queries")
    return f"{pattern}, T = {LENGTH}, S = {KEYS}"


def check_causality(bench: Workbench) -> str:
    """Later tokens, changed to any finite values, change no earlier output bit for bit and get no gradient from it."""
    patterns = [pattern for pattern in bench.entry.patterns if pattern.startswith("causal")]
    if not patterns:
        raise NotApplicable("it declares no causal pattern")
    for pattern in patterns:
        call = bench.call(pattern)
        program = bench.forward(call)
        visible = call.all_visible()
        before = np.asarray(bench.result.output if pattern == bench.pattern else program(call.arrays, visible))
        for start in (1, SHORT, LENGTH - 1):
            changed = _change_from(call, start)
            after = bench.run(changed).output if pattern == bench.pattern else np.asarray(program(changed, visible))
            what = f"{pattern}: outputs before token {start} after a change from there on"
            assert_equal_bits(after[:, :start], before[:, :start], what)
    if bench.base.causal:
        early = np.array(bench.cotangent)
        early[:, SHORT:] = 0
        gradients = bench.run(cotangent=early).gradients
        for name, role in bench.base.roles.items():
            if gradients[name][:, SHORT:].any():
                raise Failed(f"outputs before token {SHORT} have a gradient in later rows of {name} ({role})")
    return ", ".join(patterns)


def _change_from(call: subject.Call, start: int) -> subject.Arrays:
    random = np.random.default_rng(start)
    changed = dict(call.arrays)
    for name in call.roles:
        new = np.array(changed[name])
        drawn = 30 * random.normal(size=new[:, start:].shape)
        # What is nowhere positive is a logarithm of something below 1, and nothing is promised for others.
        new[:, start:] = drawn if (new > 0).any() else -abs(drawn)
        changed[name] = new
    return changed


def check_permutation(bench: Workbench) -> str:
    """Noncausal self attention without positions permutes its outputs as its tokens are permuted."""
    if "noncausal self" not in bench.entry.patterns:
        raise NotApplicable("it does not declare 'noncausal self'")
    call = bench.call("noncausal self")
    order = np.random.default_rng(5).permutation(LENGTH)
    moved = {name: a[:, order] if name in call.roles else a for name, a in call.arrays.items()}
    expected = bench.true_output(call)[:, order]
    assert_same(bench.true_output(call, moved), expected, "outputs of permuted tokens")
    return ""


def check_patterns(bench: Workbench) -> str:
    """Causal and noncausal differ, so that the flag is not dropped on the way."""
    patterns = bench.entry.patterns
    both = [kind for kind in ("self", "cross") if {f"causal {kind}", f"noncausal {kind}"} <= set(patterns)]
    if not both:
        raise NotApplicable("it declares only one of causal and noncausal")
    causal, free = (bench.call(f"{which} {both[0]}") for which in ("causal", "noncausal"))
    expected = bench.truth.output if bench.base is causal else bench.true_output(causal)
    if np.allclose(bench.true_output(free), expected):
        raise Failed(f"causal and noncausal {both[0]} attention give the same output")
    return both[0]
