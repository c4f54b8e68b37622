import jax
import jax.numpy as jnp
import numpy as np

from jattn.layers import SimpleRMSNorm, simple_rms_norm

X = np.random.default_rng(0).normal(size=(2, 3, 7))


def test_vectors_get_the_length_of_their_root():
    with jax.enable_x64(True):
        found = SimpleRMSNorm(epsilon=0.0)(X)
        np.testing.assert_allclose(found, X / (np.linalg.norm(X, axis=-1, keepdims=True) / 7**0.5), rtol=1e-12)
        expected = X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-6)
        np.testing.assert_allclose(simple_rms_norm(X), expected, rtol=1e-12)


def test_positive_factors_change_nothing_but_for_epsilon():
    with jax.enable_x64(True):
        np.testing.assert_allclose(simple_rms_norm(50 * X, 0.0), simple_rms_norm(X, 0.0), rtol=1e-12)
        np.testing.assert_allclose(simple_rms_norm(50 * X), simple_rms_norm(X), rtol=1e-4)


def test_it_is_computed_in_float32_and_zeros_stay_zero():
    large = jnp.full((1, 4), 1e20, jnp.bfloat16)
    assert simple_rms_norm(large / 1e3).astype(jnp.float32).tolist() == [[1.0] * 4]
    assert simple_rms_norm(large).dtype == jnp.bfloat16
    zeros = jnp.zeros((1, 4))
    assert simple_rms_norm(zeros).tolist() == [[0.0] * 4]
    assert np.isfinite(jax.grad(lambda x: simple_rms_norm(x).sum())(zeros)).all()
