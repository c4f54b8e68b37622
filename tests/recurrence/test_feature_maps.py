import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.recurrence import feature_maps as maps


@pytest.fixture
def pair():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 5)), jnp.float32)


def test_taylor2_is_the_second_order_kernel(pair):
    q, k = pair
    u = q @ k / 5**0.5
    np.testing.assert_allclose(maps.taylor2(q) @ maps.taylor2(k), 1 + u + u**2 / 2, rtol=1e-5)
    assert maps.num_features(maps.taylor2, 5) == 1 + 5 + 15


def test_dpfp_multiplies_rolled_halves(pair):
    x = pair[0]
    z = np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)])
    expected = np.concatenate([z * np.roll(z, j) for j in (1, 2, 3)])
    np.testing.assert_allclose(maps.dpfp(jnp.asarray(x), nu=3), expected)
    assert maps.num_features(maps.dpfp, 5) == 2 * 5 * 4


def test_cosine_weights_by_distance(pair):
    x = jnp.asarray(np.abs(pair))[:, None, None, :]
    phi = maps.Cosine(8)
    q, k = phi(x, jnp.array([[6], [2]]))[:, 0, 0]
    np.testing.assert_allclose(q @ k, np.abs(pair[0]) @ np.abs(pair[1]) * np.cos(np.pi / 2 * 4 / 8), rtol=1e-5)


def test_elu1_has_finite_gradients_far_out():
    slope = jax.grad(lambda x: maps.elu1(x).sum())(jnp.array([-200.0, 0.0, 200.0]))
    assert slope.tolist() == [0.0, 1.0, 1.0]
    np.testing.assert_allclose(maps.elu1(jnp.array([-1.5, 3.0])), [np.exp(-1.5), 4.0], rtol=1e-6)


def test_names_are_resolved_and_misspelled_ones_answered():
    assert maps.get_feature_map("relu") is maps.relu
    assert maps.get_feature_map("cosine", 7) == maps.Cosine(7)
    with pytest.raises(ValueError, match="did you mean taylor2"):
        maps.get_feature_map("tailor2")
    with pytest.raises(ValueError, match="fixed length"):
        maps.get_feature_map("cosine")
    with pytest.raises(ValueError, match="max_length"):
        maps.Cosine(0)
    with pytest.raises(TypeError, match="feature_map"):
        maps.get_feature_map(3)
