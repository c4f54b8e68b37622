import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.layers import Lrpe

N, D = 3, 5


def features(seed, length):
    return np.random.default_rng(seed).normal(size=(2, length, N, D))


def layer():
    return Lrpe(N, D, param_dtype=jnp.float64)


def scores(query, key, i, j):
    theta = 10000.0 ** (-2 * np.arange(N * D) / (N * D)).reshape(N, D)
    turned = np.cos(theta[:, None, None] * (i[:, None] - j)[..., None])
    return np.einsum("btnd,bsnd,ntsd->bnts", query, key, turned)


def test_products_see_the_distance_alone():
    with jax.enable_x64(True):
        query, key, i, j = features(0, 4), features(1, 6), np.arange(4) + 9, np.arange(6)
        for shift in (0, 1000):
            turned = layer().rotate(query, key, i + shift, j + shift)
            found = np.einsum("btnd,bsnd->bnts", *turned)
            np.testing.assert_allclose(found, scores(query, key, i, j), rtol=1e-9, atol=1e-9)


def test_at_equal_positions_nothing_changes():
    with jax.enable_x64(True):
        query, key = features(0, 4), features(1, 4)
        places = np.array([[3, 7, 1, 0], [5, 5, 2, 9]])
        found = np.multiply(*layer().rotate(query, key, places, places)).sum(-1)
        np.testing.assert_allclose(found, (query * key).sum(-1), rtol=1e-9, atol=1e-12)


def test_cosines_come_first_and_heads_own_bands():
    with jax.enable_x64(True):
        x = features(0, 2)
        found, theta = layer()(x, np.array([2, 3])), np.asarray(layer().theta.get_value())
        np.testing.assert_allclose(found[:, 1, :, :D], x[:, 1] * np.cos(3 * theta), rtol=1e-12)
        np.testing.assert_allclose(found[:, 1, :, D:], x[:, 1] * np.sin(3 * theta), rtol=1e-12)
        assert theta[0, 0] == 1
        assert (np.diff(theta.ravel()) < 0).all()


def test_frequencies_learn_and_angles_are_wide():
    x = jnp.asarray(features(0, 4), jnp.bfloat16)
    found = Lrpe(N, D)(x, np.arange(4) + 100_003)
    assert found.dtype == jnp.bfloat16
    with jax.enable_x64(True):
        exact = layer()(np.asarray(x, np.float64), np.arange(4) + 100_003)
    # A rounding of the result, and of an angle of a hundred thousand.
    allowed = jnp.finfo(jnp.bfloat16).eps + 100_007 * np.finfo(np.float32).eps
    np.testing.assert_array_less(abs(found.astype(np.float32) - exact), allowed * abs(np.asarray(x)).max())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="cannot share keys"):
        Lrpe(N, D).rotate(features(0, 4), features(0, 4)[:, :, :1], np.arange(4), np.arange(4))
    with pytest.raises(ValueError, match="positions must be"):
        Lrpe(N, D)(features(0, 4), np.arange(3))
