"""What the tests of the hook share: inputs, a dense truth, and equality of values and gradients in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.testing.compiling import quick_jit

B, T, S, N, K, D, DV = 2, 5, 7, 4, 2, 4, 3


@pytest.fixture
def arrays():
    random = np.random.default_rng(0)
    shapes = {"query": (B, T, N, D), "key": (B, S, K, D), "value": (B, S, K, DV)}
    return {name: random.normal(size=shape) for name, shape in shapes.items()}


@pytest.fixture
def square():
    """Self attention: T = S, and as many key heads as query heads."""
    random = np.random.default_rng(1)
    return {name: random.normal(size=(B, T, N, D)) for name in ("query", "key", "value")}


@pytest.fixture
def mask():
    """[B, N, T, S] with a row that sees nothing (query 2 of batch row 0) and a key that nobody sees (key 3)."""
    visible = np.random.default_rng(2).random((B, N, T, S)) < 0.7
    visible[..., 0] = True
    visible[0, :, 2] = False
    visible[..., 3] = False
    return visible


def _dense(query, key, mask=None, *, bias=0.0, cap=None, sinks=None):
    """Softmax weights [B, N, T, S] by definition."""
    key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
    logits = jnp.einsum("btnd,bsnd->bnts", query, key) / np.sqrt(query.shape[-1])
    logits = (logits if cap is None else cap * jnp.tanh(logits / cap)) + bias
    raw = jnp.exp(logits) if mask is None else jnp.where(mask, jnp.exp(logits), 0)
    total = raw.sum(-1, keepdims=True) + (0 if sinks is None else jnp.exp(sinks)[:, None, None])
    return raw / jnp.where(total == 0, 1, total)


def _mixed(weights, value):
    """Weights [B, N, T, S] on values [B, S, K, Dv]."""
    value = jnp.repeat(value, weights.shape[1] // value.shape[2], axis=2)
    return jnp.einsum("bnts,bsnd->btnd", weights, value)


@pytest.fixture
def dense():
    return _dense


@pytest.fixture
def mixed():
    return _mixed


@pytest.fixture
def equal():
    """`equal(first, second, arrays)`: two functions of a dictionary of arrays have the same values and gradients."""

    def run(function, arrays):
        def loss(arrays):
            found = function(arrays)
            finite = [jnp.where(jnp.isfinite(x), x, 0) for x in jax.tree.leaves(found)]
            return sum(jnp.sum(x * jnp.cos(jnp.arange(x.size)).reshape(x.shape)) for x in finite), found

        (_, found), gradients = quick_jit(jax.value_and_grad(loss, has_aux=True))(arrays)
        return jax.tree.map(np.asarray, (found, gradients))

    def equal(first, second, arrays, tolerance=1e-10):
        with jax.enable_x64(True):
            arrays = jax.tree.map(jnp.asarray, arrays)
            one, two = run(first, arrays), run(second, arrays)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), one, two)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(one[1])), "a gradient is not finite"
        return one[0]

    return equal
