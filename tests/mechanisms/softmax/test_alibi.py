import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.mechanisms.softmax.alibi import Alibi, alibi, alibi_slopes


def tensors(seed=0, length=6, heads=3):
    return [jax.random.normal(key, (2, length, heads, 4)) for key in jax.random.split(jax.random.key(seed), 3)]


def test_slopes():
    np.testing.assert_array_equal(alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    np.testing.assert_allclose(alibi_slopes(12)[:8], alibi_slopes(8))
    np.testing.assert_allclose(alibi_slopes(12)[8:], 2.0 ** -np.array([0.5, 1.5, 2.5, 3.5]))
    assert alibi_slopes(1).tolist() == [2.0**-8]
    assert all(len(alibi_slopes(n)) == n for n in range(1, 20))
    with pytest.raises(ValueError, match="num_heads"):
        alibi_slopes(0)


@pytest.mark.parametrize("is_causal", [True, False])
def test_equals_a_bias(is_causal):
    q, k, v = tensors()
    distance = np.abs(np.arange(6)[:, None] - np.arange(6))
    bias = jnp.asarray(-alibi_slopes(3)[:, None, None] * distance, jnp.float32)
    expected = jattn.dot_product_attention(q, k, v, bias=bias, is_causal=is_causal)
    got = jattn.dot_product_attention(q, k, v, score_mod=alibi(3), is_causal=is_causal)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    np.testing.assert_allclose(Alibi().bias(3, jnp.arange(6)[:, None], jnp.arange(6)[None]), bias, atol=1e-6)


def test_zero_slopes_are_no_position():
    q, k, v = tensors()
    got = jattn.dot_product_attention(q, k, v, score_mod=alibi(3, slopes=np.zeros(3)))
    np.testing.assert_allclose(got, jattn.dot_product_attention(q, k, v), atol=1e-6)


def test_causal_rows_need_the_key_position_alone():
    q, k, v = tensors()
    bias = jnp.asarray(alibi_slopes(3)[:, None, None] * np.arange(6), jnp.float32)
    got = jattn.dot_product_attention(q, k, v, score_mod=alibi(3), is_causal=True)
    np.testing.assert_allclose(got, jattn.dot_product_attention(q, k, v, bias=bias, is_causal=True), atol=1e-6)


def test_ratio_of_neighbors_is_exp_of_minus_the_slope():
    zeros, values = jnp.zeros((1, 5, 2, 4)), jnp.broadcast_to(jnp.eye(5)[:, None], (1, 5, 2, 5))
    weights = jattn.dot_product_attention(zeros, zeros, values, score_mod=alibi(2), is_causal=True)[0, 4]
    ratios = weights[:, :-1] / weights[:, 1:]
    np.testing.assert_allclose(ratios, np.exp(-alibi_slopes(2))[:, None] * np.ones(4), rtol=1e-5)


def test_gradient_reaches_the_slopes():
    q, k, v = tensors()

    def loss(slopes):
        return (jattn.dot_product_attention(q, k, v, score_mod=alibi(3, slopes=slopes), is_causal=True) ** 2).sum()

    slopes = jnp.asarray(alibi_slopes(3), jnp.float32)
    gradient = jax.grad(loss)(slopes)
    step = 1e-2 * jnp.eye(3)
    numeric = [(loss(slopes + s) - loss(slopes - s)) / 2e-2 for s in step]
    np.testing.assert_allclose(gradient, numeric, rtol=0.02, atol=0.02)
    with pytest.raises(ValueError, match="slopes"):
        alibi(3, slopes=np.ones(2))
