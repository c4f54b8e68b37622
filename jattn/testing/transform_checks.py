"""Conformance under transformations and in low precision: jit, vmap, export, forward mode, bfloat16, decoding."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jattn.cache import FullCache
from jattn.layers.attention import MultiHeadAttention
from jattn.mechanisms.entry import Entry, LayerExample
from jattn.mechanisms.examples import normals
from jattn.testing import jaxprs, recurrence_checks, tolerance
from jattn.testing.compiling import quick_jit
from jattn.testing.subject import Arrays, build, cast, construct, takes
from jattn.testing.workbench import (
    LENGTH,
    Failed,
    NotApplicable,
    Workbench,
    assert_same,
    differentiate,
    to_numpy,
)


def check_jit(bench: Workbench) -> str:
    """Without jit the output of a function is the same, beyond rounding."""
    if bench.entry.layer is not None:
        raise NotApplicable("a layer is trained and served under jit, as all other checks run it")
    eager = np.asarray(bench.base(bench.base.arrays, bench.base.all_visible()))
    complaint = tolerance.within_policy(eager, bench.truth.output, bench.result.output)
    if complaint:
        raise Failed(f"without jit: {complaint}")
    return ""


def check_vmap(bench: Workbench) -> str:
    """Under vmap, over every float array and over the cotangent, outputs and gradients are those of single calls."""
    first, second = bench.base, bench.call(seed=1)
    visible = first.all_visible()
    singles = [bench.truth, bench.true(second.arrays)]
    with jax.enable_x64(True):
        stacked = {n: np.stack([first.arrays[n], second.arrays[n]]).astype(np.float64) for n in first.arrays}
        cotangents = np.stack([bench.cotangent] * 2).astype(np.float64)
        program = quick_jit(
            jax.vmap(lambda arrays, cotangent: differentiate(first.function)(arrays, visible, cotangent))
        )
        batched = to_numpy(program(stacked, cotangents))
    for index, single in enumerate(singles):
        assert_same(batched.output[index], single.output, "output under vmap")
        for name, gradient in single.gradients.items():
            largest = max(np.abs(g).max(initial=0.0) for g in single.gradients.values())
            if np.abs(batched.gradients[name][index] - gradient).max() > np.finfo(np.float32).eps * largest:
                raise Failed(f"the gradient of {name} under vmap differs from that of a single call")
    return ""


def check_export(bench: Workbench) -> str:
    """`jax.export` to bytes and back gives the same output, beyond rounding."""
    base = bench.base
    visible = base.all_visible()
    exported = jax.export.export(quick_jit(lambda arrays: base.function(arrays, visible)))(base.arrays)
    try:
        blob = exported.serialize()
    except ImportError as error:
        raise NotApplicable(f"jax.export needs a package that is not installed: {error}") from error
    output = np.asarray(quick_jit(jax.export.deserialize(blob).call)(base.arrays))
    complaint = tolerance.within_policy(output, bench.truth.output, bench.result.output)
    if complaint:
        raise Failed(f"after export: {complaint}")
    return f"{len(blob)} bytes"


def check_forward_mode(bench: Workbench) -> str:
    """The jvp of the output and of the gradient can be taken (by tracing only)."""
    base = bench.base
    visible = base.all_visible()

    def gradient(arrays: Arrays) -> Any:
        return differentiate(base.function)(arrays, visible, bench.cotangent).gradients

    for what, function in (("", lambda arrays: base.function(arrays, visible)), (" of the gradient", gradient)):
        try:
            program = jax.make_jaxpr(lambda a, function=function: jax.jvp(function, (a,), (a,))[1])(base.arrays)
        except TypeError as error:
            raise Failed(f"the jvp{what} is refused: {str(error).splitlines()[0]}") from error
        # What has a rule for reverse mode alone leaves this behind, and is refused when the program is compiled.
        if "custom_lin" in jaxprs.primitives(program):
            raise Failed(f"the jvp{what} is refused: a custom_vjp function has no rule for forward mode")
    return ""


def check_precision(bench: Workbench) -> str:
    """In bfloat16, logits, exponentials and sums are float32 inside, and the error is within the tolerance policy.

    The plain program of a function computes in float32 and rounds its output. That of a layer, which rounds its
    projections as well, also has its tokens off by a rounding.
    """
    call = bench.call(dtype=jnp.bfloat16)
    if not call.roles:
        raise NotApplicable("its example has no array with one row a token")
    narrow = jaxprs.narrow_operations(jax.make_jaxpr(call)(call.arrays))
    if narrow:
        raise Failed(f"expected float32 inside, found {', '.join(sorted(narrow))}")
    exact = {name: np.asarray(a, np.float32) for name, a in call.arrays.items()}
    candidate = np.asarray(bench.forward(call)(call.arrays, call.all_visible()))
    truth = bench.true(exact).output
    plain = bench.run(_dithered(exact, call.roles) if bench.entry.layer is not None else exact).output
    complaint = tolerance.within_policy(candidate, truth, np.asarray(plain).astype(jnp.bfloat16))
    if complaint:
        raise Failed(complaint)
    return f"RMS error {tolerance.errors(candidate, truth).rms:.2g}"


def _dithered(arrays: Arrays, roles: Any) -> Arrays:
    """Tokens off by up to a unit in the last place of bfloat16."""
    random = np.random.default_rng(11)
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    return {
        name: (a * (1 + eps * random.uniform(-1, 1, a.shape))).astype(a.dtype) if name in roles else a
        for name, a in arrays.items()
    }


def check_decode(bench: Workbench) -> str:
    """One token at a time on a cache of its keys and values gives the outputs of the whole sequence."""
    entry = bench.entry
    if "causal self" not in entry.patterns:
        raise NotApplicable("it does not declare 'causal self'")
    if not entry.decode or entry.decode.lower().startswith("no"):
        raise NotApplicable(f"it declares decode={entry.decode!r}")
    if entry.layer is None and recurrence_checks.keeps_state(entry.target):
        arrays, whole = recurrence_checks.whole(bench)
        with jax.enable_x64(True):
            stepwise = quick_jit(recurrence_checks.token_by_token(bench))(arrays)
        assert_same(stepwise, whole, "one token at a time against the whole sequence")
        if required(entry.target) != ["query", "key", "value"] or "is_causal" not in takes(entry.target):
            return entry.decode  # Its gates come with the tokens, so there is no layer to make of it.
    layer = entry if entry.layer is not None else as_layer(entry)
    call = build(layer, "causal self", LENGTH)
    tokens = next(iter(call.roles))
    step = _stepper(layer, call.batch)
    with jax.enable_x64(True):
        arrays = cast(call.arrays, np.float64)
        whole = quick_jit(call.function)(arrays, {})
        stepwise = quick_jit(step)(arrays, arrays[tokens])
    assert_same(stepwise, whole, "one token at a time against the whole sequence")
    return entry.decode


def _stepper(entry: Entry, batch: int) -> Any:
    """`f(arrays, x)`: the layer's outputs for the tokens of x `[B, T, features]`, fed one at a time through a cache."""
    policy = FullCache(LENGTH)
    bind = construct(entry, LENGTH)[3]

    def run(arrays: Arrays, x: Any) -> Any:
        layer = bind(arrays)
        cache = layer.init_cache(policy, batch, x.dtype)

        def step(cache: Any, token: Any) -> Any:
            result = layer(token[:, None], cache=(policy, cache))
            return result.cache, result.output[:, 0]

        return jnp.swapaxes(jax.lax.scan(step, cache, jnp.swapaxes(x, 0, 1))[1], 0, 1)

    return run


def required(function: Any) -> list[str]:
    """Names of the arguments that a function cannot be called without.

    Example:
        >>> required(lambda query, key, value, gate, *, scale=1: query)
        ['query', 'key', 'value', 'gate']
    """
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]


def as_layer(entry: Entry) -> Entry:
    """An entry of (query, key, value) form as the attention function of `MultiHeadAttention`.

    Example:
        >>> import jax, jattn
        >>> def example(key, length):
        ...     return tuple(jax.random.normal(key, (3, 1, length, 2, 4))), {}
        >>> function = jattn.dot_product_attention
        >>> toy = Entry("toy", "primitive", "softmax", function=function, patterns=("causal self",), example=example)
        >>> as_layer(toy).layer.__name__
        'MultiHeadAttention'
    """

    def example(key: Any, length: int) -> LayerExample:
        assert entry.example is not None
        args, kwargs = entry.example(key, length)
        query, _, value = args[:3]
        heads, width = query.shape[2:]
        options = {
            "num_kv_heads": value.shape[2],
            "head_dim": width,
            "value_dim": value.shape[3],
            "attention_fn": functools.partial(entry.target, **kwargs),
        }
        return LayerExample((heads * width, heads), options, normals(key, (query.shape[0], length, heads * width)))

    return Entry(entry.name, "layer", entry.family, layer=MultiHeadAttention, patterns=entry.patterns, example=example)
