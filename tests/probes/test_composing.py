"""Two hooks as one: what chains, adds, intersects and unites, and what may be there once only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.probes import AttnHook, Reweight, attention, compose, redistribute, renormalize


def scale_query(query, key, value, params):
    return query * params, key, value


def shift_value(query, key, value, params):
    return query, key, value + params


def scale(output, value, params):
    return output * params, params


def shift(output, value, params):
    return output + params, None


def add(logit, b, h, i, j, slope):
    return logit + slope * (j - i)


def cube(logit, b, h, i, j):
    return logit**3


def halve(weights, params):
    return weights * params


def test_functions_chain_with_their_own_params(square):
    first = AttnHook(qkv=scale_query, out=scale, params=2.0, score_mod=jattn.ScoreMod(cube))
    mod = jattn.ScoreMod(add, {"slope": jattn.Operand(np.float32(0.5), "scalar")})
    second = AttnHook(qkv=shift_value, out=shift, params=0.5, score_mod=mod)
    found, aux = attention(**square, hook=compose(first, second))
    expected = attention(
        2 * square["query"],
        square["key"],
        square["value"] + 0.5,
        score_mod=jattn.ScoreMod(cube) >> mod,
    )[0]
    np.testing.assert_allclose(found, 2 * expected + 0.5, rtol=1e-5, atol=1e-6)
    assert aux == {"out": (2.0, None)}
    found, aux = attention(**square, hook=compose(second, AttnHook(out=shift, params=1.0)))
    assert "out" not in aux


def test_terms_add_and_intersect_and_observations_unite(square):
    array, bias = np.random.default_rng(0).random((5, 5)) < 0.8, np.linspace(0, 1, 5)
    first = AttnHook(bias=bias, mask=jattn.masks.causal(), observe="lse")
    second = AttnHook(bias=2 * bias, mask=array, observe={"entropy"})
    third = AttnHook(bias=np.ones((4, 1, 1)), mask=jattn.masks.sliding_window(3))
    found, aux = attention(**square, hook=compose(compose(first, second), third))
    mask = jattn.masks.dense(array[None, None]) & jattn.masks.causal() & jattn.masks.sliding_window(3)
    hook = AttnHook(observe={"lse", "entropy"})
    expected, seen = attention(**square, bias=3 * bias + np.ones((4, 1, 1)), mask=mask, hook=hook)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert sorted(aux) == ["entropy", "lse"]
    np.testing.assert_allclose(aux["lse"], seen["lse"], rtol=1e-6)


def test_reweight_of_one_and_weights_of_the_other(square):
    groups = np.array([0, 1, 0, 1, 1])
    coef = redistribute((0,), (1,))
    first = AttnHook(reweight=Reweight(groups=groups, num_groups=2, coef=coef), params={"keep": 0.5})
    second = AttnHook(weights=halve, rows=np.array([1]), heads=(0, 2), params=3.0)
    for one, two in ((first, second), (second, first)):
        found = attention(**square, hook=compose(one, two))[0]
        expected = attention(**square, hook=first)[0]
        expected = expected.at[:, 1, np.array([0, 2])].multiply(3.0)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    # It stays a bias, whose factor may overflow.
    huge = AttnHook(reweight=Reweight(log_factor=np.float32(200), coef=renormalize))
    found = attention(**square, hook=compose(huge, AttnHook(observe="lse")))[0]
    np.testing.assert_allclose(found, attention(**square)[0], rtol=1e-4, atol=1e-4)


def test_rows_are_those_of_the_hook_that_uses_them(square):
    editing = AttnHook(weights=halve, params=0.0)
    hook = compose(AttnHook(rows=np.array([3]), heads=(1,), observe="lse"), editing)
    assert hook.rows is None and hook.heads is None
    assert not attention(**square, hook=hook)[0].any()
    last = AttnHook(rows=np.array([-1]), observe="row_weights", row_weight=np.ones(3))
    assert compose(last, AttnHook(bias=np.zeros(5))).rows is last.rows
    again = compose(last, AttnHook(rows=np.array([-1]), weights=halve, params=1.0))
    assert attention(**square, hook=again)[1]["row_weights"].shape == (2, 4, 1, 5)


def test_composed_hooks_are_equal_by_value(square):
    def make(number):
        return compose(AttnHook(out=scale, params=number), AttnHook(out=shift, params=-number))

    traces = []

    @jax.jit
    def run(hook):
        traces.append(hook)
        return attention(**square, hook=hook)[0]

    run(make(1.0)), run(make(2.0))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        (AttnHook(weights=halve), AttnHook(weights=halve), "weights"),
        (AttnHook(reweight=Reweight()), AttnHook(reweight=Reweight()), "reweight"),
        (AttnHook(weights=halve), AttnHook(observe="row_weights", rows=np.array([1])), "rows"),
        (AttnHook(weights=halve, heads=(0,)), AttnHook(observe="row_weights", heads=(1,)), "heads"),
        (
            AttnHook(observe="col_mass", row_weight=np.ones(3)),
            AttnHook(observe={"col_mass", "lse"}, row_weight=np.zeros(3)),
            "row_weight",
        ),
        (AttnHook(), jnp.zeros(3), "second"),
    ],
)
def test_what_may_be_there_once_only(first, second, named):
    with pytest.raises(ValueError, match=named):
        compose(first, second)
