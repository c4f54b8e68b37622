import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jattn
from jattn.mechanisms.pooling import efficient_probing as module
from jattn.mechanisms.pooling.efficient_probing import EfficientProbing

# Under jit everything compiles once a shape, not operation by operation.
efficient_probing = jax.jit(module.efficient_probing)


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def arguments(queries=4, width=8, dtype=jnp.float32):
    return normal(0, 3, 5, 8, dtype=dtype), normal(1, queries, 8, dtype=dtype), normal(2, 8, width, dtype=dtype)


@pytest.mark.parametrize(("queries", "width"), [(4, 8), (2, 4), (8, 8), (1, 8)])
def test_float64_with_every_gradient(queries, width):
    mask = np.array([[True] * 5, [True] * 3 + [False] * 2, [False] * 5])

    def definition(x, u, w):
        logits = jnp.where(mask[:, None], jnp.einsum("md,bsd->bms", u, x) / jnp.sqrt(8.0), -1e30)
        weights = jax.nn.softmax(logits, -1) * mask[:, None]
        values = jnp.einsum("bsd,dw->bsw", x, w).reshape(3, 5, queries, -1)
        return jnp.einsum("bms,bsme->bme", weights, values).reshape(3, -1)

    with jax.enable_x64(True):
        x, u, w = arguments(queries, width, jnp.float64)
        left, right = (
            jax.jit(jax.grad(lambda *a, f=f: ((f(*a) ** 2).sum(), f(*a)), (0, 1, 2), has_aux=True))(x, u, w)
            for f in (lambda *a: efficient_probing(*a, mask=mask), definition)
        )
        for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-11)
        np.testing.assert_array_equal(left[1][2], 0)


def test_limits():
    x, u, w = arguments()
    mean = x.mean(1) @ w
    np.testing.assert_allclose(efficient_probing(x, 0 * u, w), mean, atol=1e-5)
    one = efficient_probing(x, u[:1], w)
    np.testing.assert_allclose(efficient_probing(x, jnp.broadcast_to(u[:1], u.shape), w), one, atol=1e-5)
    weights = jax.nn.softmax(jnp.einsum("d,bsd->bs", u[0], x) / np.sqrt(8))
    np.testing.assert_allclose(one, jnp.einsum("bs,bsd->bd", weights, x) @ w, atol=1e-5)
    maps = jax.nn.softmax(jnp.einsum("md,bsd->bms", normal(3, 8, 8), x) / np.sqrt(8))
    every = efficient_probing(x, normal(3, 8, 8), jnp.eye(8))
    np.testing.assert_allclose(every, jnp.einsum("bms,bsm->bm", maps, x), atol=1e-5)


def test_equals_one_learned_query_with_many_heads():
    x, _, w = arguments()
    q, w_k = normal(5, 4, 2), normal(6, 8, 4, 2)
    key, value = jnp.einsum("bsd,dme->bsme", x, w_k), jnp.einsum("bsd,dme->bsme", x, w.reshape(8, 4, 2))
    expected = jattn.dot_product_attention(jnp.broadcast_to(q, (3, 1, 4, 2)), key, value).reshape(3, 8)
    u = jnp.einsum("dme,me->md", w_k, q) * np.sqrt(8) / np.sqrt(2)
    np.testing.assert_allclose(efficient_probing(x, u, w), expected, atol=1e-5)


def test_order_and_hidden_tokens_do_not_matter():
    x, u, w = arguments()
    out = efficient_probing(x, u, w)
    np.testing.assert_allclose(efficient_probing(x[:, ::-1], u, w), out, atol=1e-6)
    longer = jnp.concatenate([x, jnp.full((3, 2, 8), jnp.nan)], 1)
    mask = np.broadcast_to(np.arange(7) < 5, (3, 7))

    def total(x, u, w):
        out = efficient_probing(x, u, w, mask=mask)
        return (out**2).sum(), out

    gradients, padded = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(longer, u, w)
    np.testing.assert_allclose(padded, out, atol=1e-6)
    np.testing.assert_array_equal(gradients[0][:, 5:], 0)
    assert all(np.isfinite(g).all() for g in gradients)


def test_layer_and_probe_head():
    pool = EfficientProbing(8, num_queries=2, reduction=2, rngs=nnx.Rngs(0))
    x = normal(0, 6, 5, 8)
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(pool, nnx.Param))) == 2 * 8 + 8 * 4
    parameters = pool.queries.get_value(), pool.value_kernel.get_value()
    np.testing.assert_array_equal(pool(x), efficient_probing(x, *parameters))
    assert 0 < np.abs(pool.queries.get_value()).max() < 0.1

    probe = EfficientProbing(8, num_queries=2, num_classes=3, rngs=nnx.Rngs(0))
    pooled = efficient_probing(x, probe.queries.get_value(), probe.value_kernel.get_value())
    centered = (pooled - pooled.mean(0)) / jnp.sqrt(pooled.var(0) + 1e-6)
    logits = nnx.jit(lambda m, x: m(x, deterministic=False))(probe, x)
    np.testing.assert_allclose(logits, probe.classifier(centered), atol=1e-3)
    np.testing.assert_allclose(probe.norm.mean.get_value(), 0.1 * pooled.mean(0), atol=1e-5)
    assert probe(x).shape == (6, 3)
    assert len(jax.tree.leaves(nnx.state(probe, nnx.Param))) == 4
    gradients = nnx.jit(nnx.grad(pool_loss))(probe, x)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


def pool_loss(layer, x):
    return jnp.sum(jnp.sin(layer(x, deterministic=False)) * jnp.arange(18.0).reshape(6, 3))


def test_errors_name_the_argument():
    x, u, w = arguments()
    for bad, name in (
        ((x[0], u, w), "x"),
        ((x, u[:, :3], w), "queries"),
        ((x, u, w[:, :6]), "value_kernel"),
        ((x, u, w[:6]), "value_kernel"),
    ):
        with pytest.raises(ValueError, match=name):
            efficient_probing(*bad)
    for mask in (np.ones((3, 4), bool), np.ones((3, 5))):
        with pytest.raises(ValueError, match="mask"):
            efficient_probing(x, u, w, mask=mask)
    with pytest.raises(ValueError, match="features"):
        EfficientProbing(8, num_queries=3, rngs=nnx.Rngs(0))
