"""The Triton kernel behind the engine, in the interpreter of Pallas: every feature against the float64 truth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.softmax.block_masks import from_block_mask
from jattn.softmax.compilers import from_mask_mod
from jattn.testing.compiling import quick_jit
from jattn.testing.tolerance import assert_within_policy

B, T, S, N, K, D, DV = 2, 37, 29, 4, 2, 24, 20


def add_slope(logit, b, h, i, j, slope):
    return logit + slope * (j - i)


def add_all(logit, b, h, i, j, at_query, at_key, pair, table):
    return logit * (1 + at_query) + at_key * pair + table


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def mod_of_everything(offset=True):
    operands = {
        "at_query": jattn.Operand(0.1 * draw(N, T, seed=1), "query"),
        "at_key": jattn.Operand(draw(B, 1, S, seed=2), "key"),
        "pair": jattn.Operand(draw(1, N, T, S, seed=3), "pair"),
        "table": jattn.Operand(draw(N, 9, seed=4), "offset") if offset else jattn.Operand(draw(N, seed=4), "head"),
    }
    return jattn.ScoreMod(add_all, operands)


SEGMENTS = (
    np.array([[0] * 9 + [1] * 20 + [-1] * 8, [3] * 37]),
    np.array([[0] * 5 + [1] * 20 + [-1] * 4, [3] * 17 + [7] * 12]),
)
POSITIONS = {
    "query_positions": np.stack([np.arange(T) + 3, np.arange(T)[::-1]]),
    "key_positions": np.arange(S)[None] * 2,
}

CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"mask": jattn.masks.sliding_window(5, num_sinks=2)},
    "positions": {"is_causal": True, **POSITIONS},
    "segments": {"segment_ids": SEGMENTS},
    "array mask": {"mask": np.random.default_rng(5).random((B, N, T, S)) < 0.5},
    "key padding": {"key_value_seq_lengths": np.array([29, 11])},
    "cap and sinks": {"logit_soft_cap": 0.7, "sinks": jnp.array([0.3, -1.0, 0.0, -np.inf]), "is_causal": True},
    "bias of -inf": {"bias": np.where(np.random.default_rng(6).random((B, 1, T, S)) < 0.3, -np.inf, 0.0).astype("f")},
    "slopes": {"score_mod": jattn.ScoreMod(add_slope, {"slope": jattn.Operand(draw(N, seed=7), "head")})},
    "every operand": {"score_mod": mod_of_everything(offset=False), "is_causal": True},
    "offset table": {"score_mod": mod_of_everything()},
    "table of one entry": {"score_mod": jattn.ScoreMod(add_slope, {"slope": jattn.Operand(draw(N, 1), "offset")})},
    "sigmoid": {"normalizer": jattn.normalizers.sigmoid(), "is_causal": True},
    "relu / n": {"normalizer": jattn.normalizers.relu_over_n()},
    "softplus": {"normalizer": jattn.normalizers.softplus_l1(), "segment_ids": SEGMENTS},
}
BIASES = [(1, 1, 1, 1), (B, 1, 1, S), (1, N, T, 1), (1, N, T, S), (B, N, T, S), (1, 1, T, S), (1, N, 1, 1)]


def everything(implementation, arguments):
    """`f(arrays) -> (out, lse, gradients)`, with gradients of query, key, value, bias and operands."""
    floats = {n: arguments[n] for n in ("bias", "score_mod", "sinks") if n in arguments}
    rest = {n: x for n, x in arguments.items() if n not in floats}
    blocks = {"block_sizes": (16, 16)} if implementation == "triton" and "layout" not in arguments else {}

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


def inputs(dtype=jnp.float32):
    shapes = {"query": (B, T, N, D), "key": (B, S, K, D), "value": (B, S, K, DV)}
    return {n: jnp.asarray(draw(*s, seed=10 + i), dtype) for i, (n, s) in enumerate(shapes.items())}


def wide(tree):
    def cast(leaf):
        is_float = isinstance(leaf, np.ndarray | jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return np.asarray(leaf, np.float64) if is_float else leaf

    return jax.tree.map(cast, tree)


def compare(arguments, plain="reference"):
    """In float64, which the interpreter can: outputs, lse and every gradient against the reference."""
    with jax.enable_x64(True):
        arrays, arguments = wide(inputs()), wide(arguments)
        (run, floats), (expect, _) = everything("triton", arguments), everything(plain, arguments)
        found, expected = run(arrays, floats), expect(arrays, floats)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for got, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_values_and_all_gradients(name):
    compare(CASES[name])


@pytest.mark.parametrize("shape", BIASES)
def test_bias_of_every_shape(shape):
    compare({"bias": draw(*shape, seed=8), "is_causal": True})


LAYOUTS = {
    "causal": lambda: from_mask_mod(jattn.masks.causal(), 1, 1, T, S, 16, 16),
    "blocks": lambda: from_block_mask(
        np.random.default_rng(9).random((B, K, 3, 2)) < 0.6, query_slots=T, key_slots=S, query_block=16, key_block=16
    ),
    "whole and cut": lambda: from_mask_mod(jattn.masks.local_window(20, 3), 1, 1, T, S, 16, 16),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_block_layouts(name):
    layout = LAYOUTS[name]()
    compare({"layout": layout}, "blockwise")
    compare({"layout": layout, "is_causal": True, "segment_ids": SEGMENTS}, "blockwise")


@pytest.mark.parametrize("name", ["causal", "segments", "cap and sinks", "sigmoid"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tolerance_policy(name, dtype):
    arrays, arguments = inputs(dtype), CASES[name]
    run, floats = everything("triton", arguments)
    found, plain = run(arrays, floats), everything("reference", arguments)[0](arrays, floats)
    with jax.enable_x64(True):
        truth = everything("reference", wide(arguments))[0](wide(arrays), floats)
    alive = np.isfinite(truth[1])
    np.testing.assert_array_equal(np.isfinite(found[1]), alive)
    parts = [(out, np.where(alive, lse, 0), gradients) for out, lse, gradients in (found, truth, plain)]
    for candidate, exact, ordinary in zip(*map(jax.tree.leaves, parts), strict=True):
        assert candidate.dtype == ordinary.dtype
        assert_within_policy(candidate, exact, ordinary)


@pytest.mark.parametrize("lengths", [(1, 1), (15, 17), (16, 16), (17, 31)])
def test_any_length(lengths):
    query, key, value = (draw(1, n, 3, 8, seed=n) for n in (lengths[0], lengths[1], lengths[1]))
    out = jattn.dot_product_attention(query, key, value, is_causal=True, implementation="triton", block_sizes=(16, 16))
    expected = jattn.dot_product_attention(query, key, value, is_causal=True, implementation="reference")
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_dropout_is_that_of_the_other_paths():
    arrays = inputs()
    drop = {"dropout_rate": 0.4, "dropout_key": jax.random.key(3), "is_causal": True}
    kernel = jattn.dot_product_attention(**arrays, **drop, implementation="triton", block_sizes=(16, 16))
    blockwise = jattn.dot_product_attention(**arrays, **drop, implementation="blockwise", block_sizes=(8, 8))
    np.testing.assert_allclose(kernel, blockwise, atol=1e-5)
    compare(drop)


def test_poison_reaches_nothing():
    arrays = inputs()
    lengths = {"key_value_seq_lengths": np.array([29, 11]), "query_seq_lengths": np.array([20, 37])}
    run, floats = everything("triton", lengths)
    clean = run(arrays, floats)
    poisoned = {
        **arrays,
        "key": arrays["key"].at[1, 11:].set(jnp.nan),
        "value": arrays["value"].at[1, 11:].set(jnp.inf),
    }
    poisoned["query"] = arrays["query"].at[0, 20:].set(jnp.nan)
    for got, wanted in zip(jax.tree.leaves(run(poisoned, floats)), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_vmap_of_gradients_is_that_of_single_calls():
    arrays = {n: jnp.stack([x, 2 * x, -x]) for n, x in inputs().items()}

    def gradient(arrays):
        def loss(arrays):
            out = jattn.dot_product_attention(**arrays, is_causal=True, implementation="triton", block_sizes=(16, 16))
            return jnp.sin(out).sum()

        return jax.grad(loss)(arrays)

    batched = quick_jit(jax.vmap(gradient))(arrays)
    alone = quick_jit(gradient)
    for row in range(3):
        single = alone({n: x[row] for n, x in arrays.items()})
        for name, expected in single.items():
            np.testing.assert_allclose(batched[name][row], expected, atol=1e-5)


def test_forward_mode_and_second_derivatives_go_through_the_tiles():
    arrays = inputs()

    def loss(query, implementation):
        blocks = {"block_sizes": (16, 16)} if implementation == "triton" else {}
        out = jattn.dot_product_attention(
            query, arrays["key"], arrays["value"], implementation=implementation, **blocks
        )
        return jnp.sin(out).sum()

    query = arrays["query"]
    for transform in (
        lambda f: jax.jvp(f, (query,), (query,))[1],
        lambda f: jax.jvp(jax.grad(f), (query,), (query,))[1],
    ):
        found, expected = (transform(lambda q, name=name: loss(q, name)) for name in ("triton", "reference"))
        np.testing.assert_allclose(found, expected, atol=2e-4, rtol=2e-4)


def test_what_it_cannot_do_names_who_can():
    arrays = inputs()
    with pytest.raises(NotImplementedError, match="'triton'.*passes; 'blockwise' does"):
        jattn.dot_product_attention(
            **arrays, implementation="triton", normalizer=jattn.normalizers.reweighted(jattn.normalizers.softmax())
        )
    layout = from_mask_mod(jattn.masks.causal(), 1, 1, T, S, 8, 8)
    with pytest.raises(NotImplementedError, match="a block layout with these tiles .*power of two"):
        jattn.dot_product_attention(**arrays, implementation="triton", layout=layout)
    with pytest.raises(ValueError, match="shared memory"):
        jattn.dot_product_attention(**arrays, implementation="triton", block_sizes=(512, 512))


def test_explain_tells_where_it_runs():
    assert jattn.explain(**inputs()).others["triton"] == "it runs on a gpu, this is a cpu"
    assert jattn.explain(**inputs(), implementation="triton").reason == "asked for"
    found = jattn.explain(**inputs(), **CASES["offset table"], implementation="triton")
    assert (found.chosen, found.reason) == ("triton", "asked for")
    found = jattn.explain(**inputs(), **CASES["offset table"], **POSITIONS, implementation="triton")
    assert found.chosen == "triton"
    assert found.reason.endswith("positions or a layout that permutes tokens, the backward pass is that of 'blockwise'")
