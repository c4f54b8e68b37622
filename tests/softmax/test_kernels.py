"""The kernels behind the engine, in the interpreter of Pallas: every feature against the float64 truth."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.softmax.block_masks import from_block_mask
from jattn.softmax.compilers import from_mask_mod
from jattn.testing.compiling import quick_jit
from jattn.testing.tolerance import assert_within_policy
from tests.grids import mostly_slow

B, N, K, D, DV = 2, 4, 2, 24, 20


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An implementation, its smallest tile, and lengths of three and two tiles that the tile does not divide."""

    name: str
    block: int
    length: int
    source: int

    @property
    def blocks(self):
        return {"block_sizes": (self.block, self.block)}


KERNELS = {x.name: x for x in (Kernel("triton", 16, 37, 29), Kernel("tpu", 128, 265, 150))}
each_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=list(KERNELS))


def on_kernels(argument, cases, **fast):
    """Every case on every kernel; slow are those that `fast` does not name for it, since interpreters are slow."""
    marks = {name: dict(zip(cases, mostly_slow(cases, fast[name]), strict=True)) for name in KERNELS}
    grid = [
        pytest.param(case, kernel, id=f"{label(case)}-{name}", marks=getattr(marks[name][case], "marks", ()))
        for case in cases
        for name, kernel in KERNELS.items()
    ]
    return pytest.mark.parametrize((argument, "kernel"), grid)


def label(case):
    return "-".join(getattr(part, "__name__", str(part)) for part in (case if isinstance(case, tuple) else (case,)))


def add_slope(logit, b, h, i, j, slope):
    return logit + slope * (j - i)


def add_all(logit, b, h, i, j, at_query, at_key, pair, table):
    return logit * (1 + at_query) + at_key * pair + table


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def mod_of_everything(kernel, offset=True):
    operands = {
        "at_query": jattn.Operand(0.1 * draw(N, kernel.length, seed=1), "query"),
        "at_key": jattn.Operand(draw(B, 1, kernel.source, seed=2), "key"),
        "pair": jattn.Operand(draw(1, N, kernel.length, kernel.source, seed=3), "pair"),
        "table": jattn.Operand(draw(N, 9, seed=4), "offset") if offset else jattn.Operand(draw(N, seed=4), "head"),
    }
    return jattn.ScoreMod(add_all, operands)


def segments(kernel):
    """Documents that end inside tiles, padding behind them; and a row whose keys are two documents."""
    last_query, last_key = kernel.length - 8, kernel.source - 4
    ids = np.where(np.arange(kernel.length) < 9, 0, np.where(np.arange(kernel.length) < last_query, 1, -1))
    keys = np.where(np.arange(kernel.source) < 5, 0, np.where(np.arange(kernel.source) < last_key, 1, -1))
    half = np.where(np.arange(kernel.source) < kernel.source // 2 + 3, 3, 7)
    return np.stack([ids, np.full(kernel.length, 3)]), np.stack([keys, half])


def positions(kernel):
    count = np.arange(kernel.length)
    return {
        "query_positions": np.stack([count + 3, count[::-1]]),
        "key_positions": np.arange(kernel.source)[None] * 2,
    }


CASES = {
    "plain": lambda x: {},
    "causal": lambda x: {"is_causal": True},
    "window": lambda x: {"mask": jattn.masks.sliding_window(5, num_sinks=2)},
    "positions": lambda x: {"is_causal": True, **positions(x)},
    "segments": lambda x: {"segment_ids": segments(x)},
    "array mask": lambda x: {"mask": np.random.default_rng(5).random((B, N, x.length, x.source)) < 0.5},
    "key padding": lambda x: {"key_value_seq_lengths": np.array([x.source, 11])},
    "cap and sinks": lambda x: {
        "logit_soft_cap": 0.7,
        "sinks": jnp.array([0.3, -1.0, 0.0, -np.inf]),
        "is_causal": True,
    },
    "bias of -inf": lambda x: {
        "bias": np.where(np.random.default_rng(6).random((B, 1, x.length, x.source)) < 0.3, -np.inf, 0.0).astype("f")
    },
    "slopes": lambda x: {"score_mod": jattn.ScoreMod(add_slope, {"slope": jattn.Operand(draw(N, seed=7), "head")})},
    "every operand": lambda x: {"score_mod": mod_of_everything(x, offset=False), "is_causal": True},
    "offset table": lambda x: {"score_mod": mod_of_everything(x)},
    "table of one entry": lambda x: {
        "score_mod": jattn.ScoreMod(add_slope, {"slope": jattn.Operand(draw(N, 1), "offset")})
    },
    "sigmoid": lambda x: {"normalizer": jattn.normalizers.sigmoid(), "is_causal": True},
    "relu / n": lambda x: {"normalizer": jattn.normalizers.relu_over_n()},
    "softplus": lambda x: {"normalizer": jattn.normalizers.softplus_l1(), "segment_ids": segments(x)},
}


def everything(implementation, arguments):
    """`f(arrays) -> (out, lse, gradients)`, with gradients of query, key, value, bias and operands."""
    floats = {n: arguments[n] for n in ("bias", "score_mod", "sinks") if n in arguments}
    rest = {n: x for n, x in arguments.items() if n not in floats}
    has_blocks = implementation in KERNELS and "layout" not in arguments
    blocks = KERNELS[implementation].blocks if has_blocks else {}

    def loss(arrays, given):
        out, lse = jattn.dot_product_attention(
            **arrays, **given, **rest, implementation=implementation, return_residual=True, **blocks
        )
        finite = jnp.where(jnp.isfinite(lse), lse, 0)
        return (jnp.sin(out.astype(jnp.float32)) * jnp.arange(DV)).sum() + (finite**2).sum(), (out, lse)

    def run(arrays, given):
        gradients, (out, lse) = jax.grad(loss, (0, 1), has_aux=True)(arrays, given)
        return out, lse, gradients

    return quick_jit(run), floats


def inputs(kernel, dtype=jnp.float32):
    shapes = {
        "query": (B, kernel.length, N, D),
        "key": (B, kernel.source, K, D),
        "value": (B, kernel.source, K, DV),
    }
    return {n: jnp.asarray(draw(*s, seed=10 + i), dtype) for i, (n, s) in enumerate(shapes.items())}


def wide(tree):
    def cast(leaf):
        is_float = isinstance(leaf, np.ndarray | jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return np.asarray(leaf, np.float64) if is_float else leaf

    return jax.tree.map(cast, tree)


def compare(kernel, arguments, plain="reference"):
    """In float64, which the interpreter can: outputs, lse and every gradient against the reference."""
    with jax.enable_x64(True):
        arrays, arguments = wide(inputs(kernel)), wide(arguments)
        (run, floats), (expect, _) = everything(kernel.name, arguments), everything(plain, arguments)
        found, expected = run(arrays, floats), expect(arrays, floats)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for got, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)


@on_kernels(
    "name",
    CASES,
    triton=("window", "segments", "cap and sinks", "offset table", "sigmoid"),
    tpu=("positions", "array mask", "key padding", "cap and sinks", "every operand", "relu / n"),
)
def test_values_and_all_gradients(name, kernel):
    compare(kernel, CASES[name](kernel))


@on_kernels("axes", ("", "BS", "NT", "NTS", "BNTS", "TS", "N"), triton=("NT",), tpu=("BS",))
def test_bias_of_every_shape(axes, kernel):
    sizes = {"B": B, "N": N, "T": kernel.length, "S": kernel.source}
    shape = tuple(sizes[axis] if axis in axes else 1 for axis in sizes)
    compare(kernel, {"bias": draw(*shape, seed=8), "is_causal": True})


LAYOUTS = {
    "causal": lambda x: from_mask_mod(jattn.masks.causal(), 1, 1, x.length, x.source, x.block, x.block),
    "blocks": lambda x: from_block_mask(
        np.random.default_rng(9).random((B, K, 3, 2)) < 0.6,
        query_slots=x.length,
        key_slots=x.source,
        query_block=x.block,
        key_block=x.block,
    ),
    "whole and cut": lambda x: from_mask_mod(
        jattn.masks.local_window(x.block + 4, 3), 1, 1, x.length, x.source, x.block, x.block
    ),
}


@on_kernels("name", LAYOUTS, triton=("whole and cut",), tpu=("blocks",))
def test_block_layouts(name, kernel):
    layout = LAYOUTS[name](kernel)
    compare(kernel, {"layout": layout}, "blockwise")
    bias = draw(1, 1, kernel.length, kernel.source, seed=8)
    compare(kernel, {"layout": layout, "is_causal": True, "segment_ids": segments(kernel), "bias": bias}, "blockwise")


@on_kernels(
    "case",
    tuple(itertools.product((jnp.float32, jnp.bfloat16), ("causal", "segments", "cap and sinks", "sigmoid"))),
    triton=((jnp.float32, "sigmoid"), (jnp.bfloat16, "causal")),
    tpu=((jnp.float32, "causal"), (jnp.bfloat16, "cap and sinks")),
)
def test_tolerance_policy(case, kernel):
    dtype, name = case
    arrays, arguments = inputs(kernel, dtype), CASES[name](kernel)
    run, floats = everything(kernel.name, arguments)
    found, plain = run(arrays, floats), everything("reference", arguments)[0](arrays, floats)
    with jax.enable_x64(True):
        truth = everything("reference", wide(arguments))[0](wide(arrays), floats)
    alive = np.isfinite(truth[1])
    np.testing.assert_array_equal(np.isfinite(found[1]), alive)
    parts = [(out, np.where(alive, lse, 0), gradients) for out, lse, gradients in (found, truth, plain)]
    for candidate, exact, ordinary in zip(*map(jax.tree.leaves, parts), strict=True):
        assert candidate.dtype == ordinary.dtype
        assert_within_policy(candidate, exact, ordinary)


@on_kernels("lengths", ((1, 1), (15, 17), (16, 16), (17, 31)), triton=((1, 1), (17, 31)), tpu=((1, 1), (17, 31)))
def test_any_length(lengths, kernel):
    query, key, value = (draw(1, n, 3, 8, seed=n) for n in (lengths[0], lengths[1], lengths[1]))
    out = jattn.dot_product_attention(query, key, value, is_causal=True, implementation=kernel.name, **kernel.blocks)
    expected = jattn.dot_product_attention(query, key, value, is_causal=True, implementation="reference")
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.slow
@each_kernel
def test_dropout_is_that_of_the_other_paths(kernel):
    arrays = inputs(kernel)
    drop = {"dropout_rate": 0.4, "dropout_key": jax.random.key(3), "is_causal": True}
    found = jattn.dot_product_attention(**arrays, **drop, implementation=kernel.name, **kernel.blocks)
    blockwise = jattn.dot_product_attention(**arrays, **drop, implementation="blockwise", block_sizes=(8, 8))
    np.testing.assert_allclose(found, blockwise, atol=1e-5)
    compare(kernel, drop)


@each_kernel
def test_poison_reaches_nothing(kernel):
    arrays = inputs(kernel)
    lengths = {
        "key_value_seq_lengths": np.array([kernel.source, 11]),
        "query_seq_lengths": np.array([20, kernel.length]),
    }
    run, floats = everything(kernel.name, lengths)
    clean = run(arrays, floats)
    poisoned = {
        **arrays,
        "key": arrays["key"].at[1, 11:].set(jnp.nan),
        "value": arrays["value"].at[1, 11:].set(jnp.inf),
    }
    poisoned["query"] = arrays["query"].at[0, 20:].set(jnp.nan)
    for got, wanted in zip(jax.tree.leaves(run(poisoned, floats)), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(got, wanted)


@each_kernel
def test_vmap_of_gradients_is_that_of_single_calls(kernel):
    arrays = {n: jnp.stack([x, 2 * x, -x]) for n, x in inputs(kernel).items()}

    def gradient(arrays):
        def loss(arrays):
            out = jattn.dot_product_attention(**arrays, is_causal=True, implementation=kernel.name, **kernel.blocks)
            return jnp.sin(out).sum()

        return jax.grad(loss)(arrays)

    batched = quick_jit(jax.vmap(gradient))(arrays)
    alone = quick_jit(gradient)
    for row in range(3):
        single = alone({n: x[row] for n, x in arrays.items()})
        for name, expected in single.items():
            np.testing.assert_allclose(batched[name][row], expected, atol=2e-5)


@each_kernel
def test_forward_mode_and_second_derivatives_go_through_the_tiles(kernel):
    arrays = inputs(kernel)

    def loss(query, implementation):
        blocks = kernel.blocks if implementation == kernel.name else {}
        out = jattn.dot_product_attention(
            query, arrays["key"], arrays["value"], implementation=implementation, **blocks
        )
        return jnp.sin(out).sum()

    query = arrays["query"]
    for transform in (
        lambda f: jax.jvp(f, (query,), (query,))[1],
        lambda f: jax.jvp(jax.grad(f), (query,), (query,))[1],
    ):
        found, expected = (transform(lambda q, name=name: loss(q, name)) for name in (kernel.name, "reference"))
        np.testing.assert_allclose(found, expected, atol=5e-4, rtol=5e-4)


@each_kernel
def test_what_it_cannot_do_names_who_can(kernel):
    arrays = inputs(kernel)
    with pytest.raises(NotImplementedError, match=f"'{kernel.name}'.*passes; 'blockwise' does"):
        jattn.dot_product_attention(
            **arrays, implementation=kernel.name, normalizer=jattn.normalizers.reweighted(jattn.normalizers.softmax())
        )
    layout = from_mask_mod(jattn.masks.causal(), 1, 1, kernel.length, kernel.source, 8, 8)
    with pytest.raises(NotImplementedError, match="a block layout with these tiles .*(power of two|multiple of 128)"):
        jattn.dot_product_attention(**arrays, implementation=kernel.name, layout=layout)
    with pytest.raises(ValueError, match="(shared|vector) memory"):
        jattn.dot_product_attention(**arrays, implementation=kernel.name, block_sizes=(1024, 1024))


@each_kernel
def test_explain_tells_where_it_runs(kernel):
    home = {"triton": "gpu", "tpu": "tpu"}[kernel.name]
    assert jattn.explain(**inputs(kernel)).others[kernel.name] == f"it runs on a {home}, this is a cpu"
    assert jattn.explain(**inputs(kernel), implementation=kernel.name).reason == "asked for"


def test_explain_tells_whose_backward_pass_it_is():
    kernel = KERNELS["triton"]
    arguments = CASES["offset table"](kernel)
    found = jattn.explain(**inputs(kernel), **arguments, implementation="triton")
    assert (found.chosen, found.reason) == ("triton", "asked for")
    found = jattn.explain(**inputs(kernel), **arguments, **positions(kernel), implementation="triton")
    assert found.chosen == "triton"
    assert found.reason.endswith("positions or a layout that permutes tokens, the backward pass is that of 'blockwise'")
