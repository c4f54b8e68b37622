"""Hedgehog feature maps: each variant against its formula, and what tells the variants apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.mechanisms.linear.linear_attention import linear_attention
from jattn.recurrence.hedgehog import VARIANTS, HedgehogFeatureMap, hedgehog_feature_map

RANDOM = np.random.default_rng(0)
Q, K = RANDOM.normal(size=(2, 2, 6, 3, 5))
W = RANDOM.normal(size=(2, 3, 5, 4))
V = RANDOM.normal(size=(2, 6, 3, 2))


def softmax(x):
    e = np.exp(x)
    return e / e.sum(-1, keepdims=True)


def features(variant, x=Q, weight=W[0], **options):
    with jax.enable_x64(True):
        return np.asarray(hedgehog_feature_map(x, weight, variant=variant, **options))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_their_formulas(variant):
    bias = RANDOM.normal(size=(3, 4))
    y = np.einsum("btnd,ndf->btnf", Q, W[0]) + bias
    expected = {
        "exp_raw": [np.exp(y), np.exp(-y)],
        "exp": [np.exp(y - y.max(-1, keepdims=True)), np.exp(y.min(-1, keepdims=True) - y)],
        "softmax_dim": [softmax(y), softmax(-y)],
        "fla": [softmax(np.concatenate([2 * y, -2 * y], -1))],
    }[variant]
    np.testing.assert_allclose(features(variant, bias=bias), np.concatenate(expected, -1), rtol=1e-10, atol=1e-12)
    shared = features(variant, weight=W[0, 0])
    np.testing.assert_allclose(shared[:, :, 0], features(variant)[:, :, 0], rtol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_negation_swaps_the_halves(variant):
    first, second = np.split(features(variant), 2, axis=-1)
    np.testing.assert_allclose(features(variant, -Q), np.concatenate([second, first], -1), rtol=1e-10)


def test_sums_of_features_and_the_least_one():
    np.testing.assert_allclose(features("softmax_dim").sum(-1), 2, rtol=1e-10)
    np.testing.assert_allclose(features("fla").sum(-1), 1, rtol=1e-10)
    assert features("softmax_dim", 100 * Q).min() == 1e-12
    assert features("fla", 1000 * Q).min() == 0
    slope = jax.grad(lambda x: hedgehog_feature_map(x, W[0], variant="exp").sum())(np.asarray(1e4 * Q, np.float32))
    assert np.isfinite(slope).all()


def test_the_raw_kernel_is_a_sum_of_hyperbolic_cosines():
    products = np.einsum("btnf,bsnf->bnts", features("exp_raw"), features("exp_raw", K, W[1]))
    yq, yk = (np.einsum("btnd,ndf->bntf", x, w) for x, w in zip((Q, K), W, strict=True))
    expected = 2 * np.cosh(yq[:, :, :, None] + yk[:, :, None]).sum(-1)
    np.testing.assert_allclose(products, expected, rtol=1e-10)


def attend(rows, columns):
    with jax.enable_x64(True):
        return np.asarray(linear_attention(rows, columns, V, feature_map="identity", is_causal=True, eps=0.0))


def test_variants_are_different_maps():
    raw = [features("exp_raw"), features("exp_raw", K, W[1])]
    outputs = {name: attend(features(name), features(name, K, W[1])) for name in VARIANTS}
    # One factor a head cancels, one a query as well; one a key reweighs it.
    head, token = np.exp(RANDOM.normal(size=(2, 1, 3, 1))), np.exp(RANDOM.normal(size=(2, 6, 3, 1)))
    np.testing.assert_allclose(attend(raw[0] * head, raw[1] * head), outputs["exp_raw"], rtol=1e-9)
    np.testing.assert_allclose(attend(raw[0] * token, raw[1]), outputs["exp_raw"], rtol=1e-9)
    assert not np.allclose(attend(raw[0], raw[1] * token), outputs["exp_raw"], rtol=1e-2)
    for name in ("exp", "softmax_dim", "fla"):
        assert not np.allclose(outputs[name], outputs["exp_raw"], rtol=1e-2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_maps_of_nothing_give_the_running_mean(variant):
    nothing = [features(variant, x, 0 * W[0]) for x in (Q, K)]
    mean = np.cumsum(V, 1) / np.arange(1, 7)[:, None, None]
    np.testing.assert_allclose(attend(*nothing), mean, rtol=1e-9)


def test_modules_start_from_the_identity():
    x = np.asarray(Q, np.float32)
    plain = hedgehog_feature_map(x, np.eye(5, dtype=np.float32))
    for options in ({}, {"skip": True}, {"use_bias": True}, {"shared": True, "use_bias": True}):
        np.testing.assert_allclose(HedgehogFeatureMap(3, 5, **options)(x), plain, atol=1e-6)
    assert HedgehogFeatureMap(3, 5, num_features=2)(x).shape == (2, 6, 3, 4)
    assert hedgehog_feature_map(x.astype(jnp.bfloat16), W[0]).dtype == jnp.bfloat16


def test_errors():
    for call, message in (
        (lambda: hedgehog_feature_map(Q, W[0], variant="softplus"), "variant"),
        (lambda: hedgehog_feature_map(Q, W[0, :2]), r"weight must be \[3, 5, F\]"),
        (lambda: hedgehog_feature_map(Q, W[0, :, :4]), "weight must be"),
        (lambda: hedgehog_feature_map(Q, W[0], skip=True), "as many features"),
        (lambda: HedgehogFeatureMap(3, 5, variant="relu"), "variant"),
        (lambda: HedgehogFeatureMap(3, 5, num_features=4, skip=True), "as many features"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
