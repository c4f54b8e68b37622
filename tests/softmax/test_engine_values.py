"""The engine against a float64 truth written row by row: every feature, both implementations, all gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jattn
from jattn.testing.compiling import usual_options
from jattn.testing.tolerance import assert_within_policy
from tests.grids import mostly_slow

IMPLEMENTATIONS = ("reference", "blockwise")
T, S, N, K, D, DV = 21, 18, 4, 2, 8, 6


def run(query, key, value, implementation, **arguments):
    blocks = (8, 8) if implementation == "blockwise" and "layout" not in arguments else None
    return jattn.dot_product_attention(
        query, key, value, implementation=implementation, block_sizes=blocks, return_residual=True, **arguments
    )


def add_slope(logit, b, h, i, j, slope):
    return logit + slope * (j - i)


def _segments():
    query_ids = np.array([[0] * 9 + [1] * 8 + [-1] * 4, [3] * 21])
    key_ids = np.array([[0] * 5 + [1] * 10 + [-1] * 3, [3] * 10 + [7] * 8])
    return query_ids, key_ids


def cases():
    rng = np.random.default_rng(1)
    rows, columns = np.arange(T)[:, None], np.arange(S)
    causal = columns <= rows
    bias = rng.standard_normal((1, N, T, S))
    hidden = np.where(rng.random((2, 1, T, S)) < 0.3, -np.inf, 0.0)
    array = rng.random((2, N, T, S)) < 0.5
    query_ids, key_ids = _segments()
    same = (query_ids[:, None, :, None] == key_ids[:, None, None]) & (query_ids >= 0)[:, None, :, None]
    slopes = np.array([0.5, 0.25, 0.1, 0.0])
    positions = np.stack([np.arange(T) + 3, np.arange(T)[::-1]])
    window = (columns <= rows) & ((rows - columns < 4) | (columns < 2))
    mod = jattn.ScoreMod(add_slope, {"slope": jattn.Operand(slopes, "head")})
    return {
        "plain": ({}, {}),
        "causal": ({"is_causal": True}, {"visible": causal}),
        "window with sinks": ({"mask": jattn.masks.sliding_window(4, num_sinks=2)}, {"visible": window}),
        "local window": ({"local_window_size": (3, 2)}, {"visible": (columns >= rows - 3) & (columns <= rows + 2)}),
        "array mask": ({"mask": array}, {"visible": array}),
        "bias": ({"bias": bias}, {"bias": bias}),
        "bias of -inf": ({"bias": hidden}, {"bias": hidden}),
        "segments": ({"segment_ids": (query_ids, key_ids)}, {"visible": same}),
        "lengths": (
            {"query_seq_lengths": np.array([5, 21]), "key_value_seq_lengths": np.array([18, 0])},
            {"visible": np.stack([np.broadcast_to(rows < 5, (T, S)), np.zeros((T, S), bool)])[:, None]},
        ),
        "cap": ({"logit_soft_cap": 0.7}, {"cap": 0.7}),
        "cap before bias": ({"logit_soft_cap": 0.7, "bias": hidden}, {"cap": 0.7, "bias": hidden}),
        "sinks": ({"sinks": jnp.array([0.3, -1.0, 0.0, -np.inf]), "is_causal": True},
                  {"sinks": [0.3, -1.0, 0.0, -np.inf], "visible": causal}),
        "score mod": ({"score_mod": mod}, {"modify": lambda x, b, h, t, j: x + slopes[h] * (j - t)}),
        "positions": (
            {"is_causal": True, "query_positions": positions},
            {"visible": (columns <= positions[:, None, :, None])},
        ),
        "prefix by row": ({"mask": jattn.masks.prefix(np.array([3, 9]))},
                          {"visible": (columns < np.array([3, 9])[:, None, None, None])}),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(cases()))
def test_values_and_gradients(name, attention_truth, draw, x64):
    arguments, definition = cases()[name]
    query, key, value = draw(T, S, N, K, D, DV, jnp.float64)
    expected = attention_truth(query, key, value, **definition)
    grads = {}
    for implementation in IMPLEMENTATIONS:

        @jax.jit
        def loss(query, key, value, implementation=implementation):
            out, lse = run(query, key, value, implementation, **arguments)
            finite = jnp.where(jnp.isfinite(lse), lse, 0)
            return (jnp.sin(out) * jnp.arange(DV)).sum() + (finite**2).sum(), (out, lse)

        grads[implementation], actual = jax.grad(loss, (0, 1, 2), has_aux=True)(query, key, value)
        for x, y in zip(actual, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)
    for x, y in zip(grads["blockwise"], grads["reference"], strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-11)


NORMALIZERS = {
    "sigmoid": (jattn.normalizers.sigmoid(), lambda s: 1 / (1 + np.exp(-s))),
    "sigmoid, normalized": (jattn.normalizers.sigmoid(True), lambda s: _share(1 / (1 + np.exp(-s)))),
    "elu1": (jattn.normalizers.elu1(), lambda s: np.where(s > 0, s + 1, np.exp(s))),
    "elu1, normalized": (jattn.normalizers.elu1(True), lambda s: _share(np.where(s > 0, s + 1, np.exp(s)))),
    "relu / n": (jattn.normalizers.relu_over_n(), lambda s: np.maximum(s, 0) / len(s)),
    "softplus": (jattn.normalizers.softplus_l1(), lambda s: _share(np.log1p(np.exp(s)))),
    "taylor2": (jattn.normalizers.taylor2(), lambda s: _share(1 + s + s * s / 2, 0)),
    "reweighted softplus": (
        jattn.normalizers.reweighted(jattn.normalizers.softplus_l1(), 3),
        lambda s: _reweight(_share(np.log1p(np.exp(s))), 3),
    ),
    "reweighted softmax": (
        jattn.normalizers.reweighted(jattn.normalizers.softmax(), 15),
        lambda s: _reweight(_share(np.exp(s), 0), 15),
    ),
}


def _share(weights, eps=1e-8):
    return weights / (weights.sum() + eps)


def _reweight(weights, power):
    excess = np.maximum(len(weights) * weights - (0 if len(weights) <= 3 else 1), 0)
    return excess**power / (excess**power).sum()


@pytest.mark.parametrize("name", list(NORMALIZERS))
def test_normalizers(name, attention_truth, draw, x64):
    normalizer, weigh = NORMALIZERS[name]
    query, key, value = draw(T, S, N, K, D, DV, jnp.float64)
    causal = np.arange(S) <= np.arange(T)[:, None]
    expected = attention_truth(query, key, value, visible=causal, weigh=weigh)
    grads = []
    for implementation in IMPLEMENTATIONS:

        @jax.jit
        def loss(query, key, value, implementation=implementation):
            out, lse = run(query, key, value, implementation, is_causal=True, normalizer=normalizer)
            return jnp.sin(out).sum(), (out, lse)

        grad, actual = jax.grad(loss, (0, 1, 2), has_aux=True)(query, key, value)
        grads.append(grad)
        for x, y in zip(actual, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-11)
    for x, y in zip(*grads, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-10)


@pytest.mark.parametrize("group", mostly_slow([1, 2, 3, 7], [1, 3]))
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tolerance_policy_for_every_head_ratio(group, dtype, attention_truth, draw):
    query, key, value = draw(19, 23, 2 * group, 2, 8, 5, dtype)

    def loss(implementation, query, key, value):
        out, lse = run(query, key, value, implementation, is_causal=True)
        return (out.astype(jnp.float32) * jnp.cos(jnp.arange(5.0))).sum() + lse.sum(), (out, lse)

    def with_grads(implementation, *arrays):
        gradient = jax.grad(functools.partial(loss, implementation), (0, 1, 2), has_aux=True)
        # Errors are compared as users have them.
        value_and_grad = jax.jit(gradient, compiler_options=usual_options())
        return jax.tree.leaves(value_and_grad(*arrays))

    plain, fast = with_grads("reference", query, key, value), with_grads("blockwise", query, key, value)
    with jax.enable_x64(True):
        wide = tuple(jnp.asarray(np.asarray(x, np.float64)) for x in (query, key, value))
        truth = with_grads("reference", *wide)
    visible = np.arange(23) <= np.arange(19)[:, None]
    np.testing.assert_allclose(truth[3], attention_truth(*wide, visible=visible)[0], atol=1e-12)
    for candidate, exact, ordinary in zip(fast, truth, plain, strict=True):
        assert candidate.dtype == ordinary.dtype
        assert_within_policy(candidate, exact, ordinary)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_by_finite_differences(implementation, draw, x64):
    query, key, value = draw(5, 6, 2, 1, 4, 3, jnp.float64)
    table = jnp.linspace(-1.0, 1.0, 7)
    sinks, bias = jnp.array([0.2, -0.4]), jnp.ones((1, 2, 5, 1)) * 0.3

    def f(query, key, value, bias, sinks, table):
        mod = jattn.ScoreMod(add_table, {"table": jattn.Operand(table, "offset")})
        return run(
            query, key, value, implementation, bias=bias, sinks=sinks, score_mod=mod, is_causal=True, logit_soft_cap=3.0
        )

    check_grads(jax.jit(f), (query, key, value, bias, sinks, table), order=1, modes=("fwd", "rev"))


def add_table(logit, b, h, i, j, table):
    return logit + table


@pytest.mark.parametrize("length", mostly_slow([1, 7, 8, 9, 13], [1, 7, 8]))
@pytest.mark.parametrize("source", mostly_slow([1, 8, 17], [1, 17]))
def test_lengths_that_divide_nothing(length, source, attention_truth, draw, x64):
    query, key, value = draw(length, source, 2, 1, 4, 4, jnp.float64)
    out, lse = run(query, key, value, "blockwise", is_causal=True)
    visible = np.arange(source) <= np.arange(length)[:, None]
    expected = attention_truth(query, key, value, visible=visible)
    np.testing.assert_allclose(out, expected[0], atol=1e-13)
    np.testing.assert_allclose(lse, expected[1], atol=1e-13)
