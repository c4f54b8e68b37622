"""Normalizers: their streaming form is their dense one, hidden and -inf keys weigh nothing, and bad values are named.

(Values and gradients of each on both implementations stand in test_engine_values.py.)
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn import normalizers

ONE_PASS = {
    "softmax": normalizers.softmax(),
    "sigmoid": normalizers.sigmoid(),
    "sigmoid, normalized": normalizers.sigmoid(True),
    "elu1": normalizers.elu1(),
    "elu1, normalized": normalizers.elu1(True),
    "relu": normalizers.relu_over_n(),
    "softplus": normalizers.softplus_l1(),
    "taylor2": normalizers.taylor2(),
}
TWO_PASSES = {
    "reweighted softplus": normalizers.reweighted(normalizers.softplus_l1()),
    "reweighted softmax": normalizers.reweighted(normalizers.softmax(), 3),
}
ALL = {**ONE_PASS, **TWO_PASSES}
NORMALIZED = [name for name in ALL if name not in ("sigmoid", "elu1", "relu")]

rng = np.random.default_rng(0)
LOGITS = rng.normal(size=(6, 20)).astype(np.float32) * 3
VISIBLE = rng.random((6, 20)) < 0.6
VISIBLE[2] = False
VALUE = rng.normal(size=(20, 5)).astype(np.float32)
COUNT = VISIBLE.sum(-1, keepdims=True)


def dense(normalizer, logits=LOGITS):
    return np.asarray(normalizer.weights(jnp.asarray(logits), VISIBLE, COUNT))


@pytest.mark.parametrize("name", list(ONE_PASS))
def test_streaming_is_dense(name):
    normalizer = ONE_PASS[name]
    states = []
    for part in (slice(0, 7), slice(7, 20)):
        state = normalizer.init(6, 5)
        for tile in np.array_split(np.arange(20)[part], 3):
            state = normalizer.update(state, LOGITS[:, tile], VISIBLE[:, tile], VALUE[tile])
        states.append(state)
    out = normalizer.finish(normalizer.merge(*states), COUNT[:, 0])
    np.testing.assert_allclose(out, dense(normalizer) @ VALUE, rtol=1e-5, atol=1e-6)
    nothing = normalizer.merge(normalizer.init(6, 5), normalizer.init(6, 5))
    assert not np.asarray(normalizer.finish(nothing, 0 * COUNT[:, 0])).any()


@pytest.mark.parametrize("name", list(ALL))
def test_hidden_keys_and_empty_rows_weigh_nothing(name):
    weights = dense(ALL[name])
    assert not weights[~VISIBLE].any()
    spoiled = dense(ALL[name], np.where(VISIBLE, LOGITS, np.nan))
    np.testing.assert_array_equal(spoiled, weights)
    if name in NORMALIZED:
        np.testing.assert_allclose(weights.sum(-1), COUNT[:, 0] > 0, rtol=1e-5)


@pytest.mark.parametrize("name", list(ALL))
def test_a_key_at_minus_infinity_weighs_nothing_and_gradients_are_finite(name):
    logits = np.where(rng.random(LOGITS.shape) < 0.3, -np.inf, LOGITS)
    logits[4] = -np.inf

    def loss(logits):
        weights = ALL[name].weights(logits, VISIBLE, COUNT)
        return (weights @ VALUE).sum(), weights

    found, weights = jax.grad(loss, has_aux=True)(jnp.asarray(logits, jnp.float32))
    assert not np.asarray(weights)[logits == -np.inf].any()
    assert np.isfinite(found).all()
    assert not np.asarray(found)[~VISIBLE].any()


@pytest.mark.parametrize("name", NORMALIZED)
def test_large_logits_stay_finite(name):
    weights = dense(ALL[name], LOGITS * 1e4)
    assert np.isfinite(weights).all()


def test_kinks_have_the_derivative_of_one_side():
    """elu(x) + 1 is smooth at 0; relu has derivative 0 there, as everywhere in JAX."""
    slope = {name: float(jax.grad(ALL[name].phi)(0.0)) for name in ("elu1", "relu")}
    assert slope == {"elu1": 1.0, "relu": 0.0}


def test_normalizers_are_values():
    assert normalizers.sigmoid() == normalizers.sigmoid()
    assert len({*ALL.values(), normalizers.softmax()}) == len(ALL)
    assert [x.passes for x in TWO_PASSES.values()] == [2, 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: normalizers.reweighted(TWO_PASSES["reweighted softmax"]), "base must be a one-pass normalizer"),
        (lambda: normalizers.reweighted("softmax"), "base must be a one-pass normalizer, got 'softmax'"),
        (lambda: normalizers.reweighted(normalizers.softmax(), 0.5), "power must be at least 1, got 0.5"),
        (lambda: normalizers.softplus_l1(-1.0), "eps must be >= 0, got -1.0"),
        (lambda: normalizers.Pointwise("tanh"), "similarity must be one of sigmoid, .*, got 'tanh'"),
        (lambda: normalizers.Pointwise("relu", "max"), "norm must be one of none, sum, count, got 'max'"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
