import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.layers import LearnedAbs, QkNorm, make_norm, sinusoidal


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_sinusoidal_definition():
    table = np.asarray(sinusoidal(np.arange(7), 6))
    for position in range(7):
        for m in range(3):
            angle = position * 10000 ** (-2 * m / 6)
            np.testing.assert_allclose(table[position, 2 * m], math.sin(angle), atol=1e-6)
            np.testing.assert_allclose(table[position, 2 * m + 1], math.cos(angle), atol=1e-6)


def test_sinusoidal_shift_is_a_rotation_of_every_pair():
    with jax.enable_x64(True):
        near, far = (np.asarray(sinusoidal(np.arange(5.0) + d, 8)).reshape(5, 4, 2) for d in (0.0, 3.0))
        angle = 3.0 * 10000 ** (-np.arange(4) / 4)
        turned = np.stack(
            [
                near[..., 0] * np.cos(angle) + near[..., 1] * np.sin(angle),
                near[..., 1] * np.cos(angle) - near[..., 0] * np.sin(angle),
            ],
            -1,
        )
        np.testing.assert_allclose(far, turned, atol=1e-12)
    with pytest.raises(ValueError, match="features"):
        sinusoidal(np.arange(3), 5)


def test_learned_positions():
    table = LearnedAbs(4, 6, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(table(np.array([[2, 0]]))[0], table.table.embedding.get_value()[jnp.array([2, 0])])
    with pytest.raises(ValueError, match=r"0 \.\. 3"):
        table(np.arange(5))
    traced = jax.jit(lambda p: table(p))(jnp.arange(5))
    assert np.isnan(traced[4]).all()
    assert np.isfinite(traced[:4]).all()


def test_qk_norm_is_invariant_to_the_scale_of_queries_and_keys():
    q, k = normal(0, 1, 3, 4, 8), normal(1, 1, 3, 2, 8)
    for mode in ("l2", "layernorm", "rmsnorm", "rmsnorm_full"):
        norm = QkNorm(mode, 4, 2, 8, epsilon=1e-12, rngs=nnx.Rngs(0))
        for once, scaled in zip(norm(q, k), norm(100.0 * q, 0.01 * k), strict=True):
            np.testing.assert_allclose(once, scaled, atol=1e-5)


def test_qk_norm_bounds_the_logits():
    q, k = 50.0 * normal(2, 1, 9, 2, 8), 50.0 * normal(3, 1, 9, 2, 8)
    rms = QkNorm("rmsnorm", 2, 2, 8, rngs=nnx.Rngs(0))
    logits = jnp.einsum("btnd,bsnd->bnts", *rms(q, k)) * 8**-0.5
    assert np.abs(logits).max() <= math.sqrt(8) + 1e-5
    l2 = QkNorm("l2", 2, 2, 8, length=16, rngs=nnx.Rngs(0))
    assert l2.scale == 1.0
    gain = math.log2(16 * 16 - 16)
    assert np.abs(jnp.einsum("btnd,bsnd->bnts", *l2(q, k))).max() <= gain + 1e-4


def test_whole_width_norm_sees_all_heads():
    q, k = normal(4, 1, 2, 4, 8), normal(5, 1, 2, 2, 8)
    full = QkNorm("rmsnorm_full", 4, 2, 8, rngs=nnx.Rngs(0))
    assert full.query_norm.scale.shape == (32,)
    assert full.key_norm.scale.shape == (16,)
    flat = q.reshape(1, 2, 32)
    expected = flat / jnp.sqrt(jnp.mean(flat**2, -1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(full(q, k)[0], expected.reshape(q.shape), atol=1e-5)
    louder = q.at[:, :, 0].multiply(10.0)
    assert not np.allclose(full(louder, k)[0][:, :, 1], full(q, k)[0][:, :, 1])


def test_l2_norm_of_zero_has_finite_gradients():
    norm = QkNorm("l2", 1, 1, 4, rngs=nnx.Rngs(0))
    gradient = jax.grad(lambda q: norm(q, q)[0].sum())(jnp.zeros((1, 1, 1, 4)))
    assert np.isfinite(gradient).all()


def test_unknown_norms():
    with pytest.raises(ValueError, match="qk_norm"):
        QkNorm("batch", 1, 1, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="norm"):
        make_norm("batch", 4, rngs=nnx.Rngs(0))
