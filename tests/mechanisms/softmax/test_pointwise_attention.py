import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.mechanisms.softmax import pointwise_attention as module
from jattn.mechanisms.softmax.pointwise_attention import SIMILARITIES

# Under jit everything compiles once a shape, not operation by operation.
pointwise_attention = jax.jit(
    module.pointwise_attention, static_argnames=("is_causal", "sim", "normalize", "eps", "scale")
)

DEFINITIONS = {
    "sigmoid": lambda s: 1 / (1 + jnp.exp(-s)),
    "elu1": lambda s: jnp.where(s > 0, s + 1, jnp.exp(s)),
    "relu": lambda s: jnp.maximum(s, 0),
    "softplus": lambda s: jnp.log1p(jnp.exp(s)),
    "taylor2": lambda s: 1 + s + s**2 / 2,
}


def tensors(seed=0, length=6, dtype=jnp.float32):
    shapes = [(2, length, 4, 4), (2, length, 2, 4), (2, length, 2, 3)]
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def truth(q, k, v, sim, normalize, visible, bias=0.0):
    k, v = jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2)
    weights = DEFINITIONS[sim](jnp.einsum("btnd,bsnd->bnts", q, k) / 2 + bias) * visible
    if normalize is True:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-8)
    if normalize == "count":
        weights = weights / np.broadcast_to(visible, weights.shape).sum(-1, keepdims=True)
    return jnp.einsum("bnts,bsnd->btnd", weights, v)


def weights_of(q, k, **options):
    """Weights `[B, T, N, S]`, read with one-hot values."""
    one_hot = jnp.broadcast_to(jnp.eye(k.shape[1])[:, None], (*k.shape[:3], k.shape[1]))
    return pointwise_attention(q, k, one_hot, **options)


CASES = [
    ("sigmoid", False),
    ("sigmoid", True),
    ("elu1", False),
    ("relu", "count"),
    ("softplus", True),
    ("taylor2", True),
]


@pytest.mark.parametrize(("sim", "normalize"), CASES)
def test_float64_with_every_gradient(sim, normalize):
    with jax.enable_x64(True):
        q, k, v = tensors(dtype=jnp.float64)
        bias = np.random.default_rng(5).normal(0, 0.1, (4, 6, 6))
        visible = np.tril(np.ones((6, 6), bool))

        def got(q, k, v, bias):
            out = pointwise_attention(q, k, v, sim=sim, normalize=normalize, is_causal=True, bias=bias)
            return (out**2).sum(), out

        def expected(q, k, v, bias):
            out = truth(q, k, v, sim, normalize, visible, bias)
            return (out**2).sum(), out

        left, right = (jax.jit(jax.grad(f, (0, 1, 2, 3), has_aux=True))(q, k, v, bias) for f in (got, expected))
        for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-10, rtol=1e-10)


def test_keys_do_not_compete_without_a_sum():
    q, k, _ = tensors()
    other = k.at[:, 3].set(7.0)
    for options, competes in (({}, False), ({"sim": "elu1"}, False), ({"normalize": True}, True)):
        before, after = (weights_of(q, x, **options)[..., :3] for x in (k, other))
        assert np.array_equal(before, after) != competes
        shorter = weights_of(q, k[:, :3], **options)
        assert np.allclose(before, shorter, atol=1e-6) != competes


def test_elu1_of_positive_logits_is_linear_attention():
    q, k, v = (jnp.abs(x) for x in tensors())
    out = pointwise_attention(q, k, v, sim="elu1", is_causal=True)
    ones = jnp.ones((2, 6, 1, 1))
    queries = jnp.concatenate([q / 2, jnp.broadcast_to(ones, (2, 6, 4, 1))], -1)
    keys = jnp.concatenate([jnp.repeat(k, 2, 2), jnp.broadcast_to(ones, (2, 6, 4, 1))], -1)
    state = jnp.cumsum(jnp.einsum("bsnd,bsne->bsnde", keys, jnp.repeat(v, 2, 2)), axis=1)
    np.testing.assert_allclose(out, jnp.einsum("btnd,btnde->btne", queries, state), atol=1e-5)


def test_relu_rows():
    q, k, v = tensors()
    options = {"sim": "relu", "normalize": "count", "is_causal": True}
    weights, logits = weights_of(q, k, **options), jnp.einsum("btnd,bsnd->btns", q, jnp.repeat(k, 2, 2)) / 2
    visible = jnp.tril(jnp.ones((6, 6), bool))[:, None]
    largest = jnp.where(visible, jnp.maximum(logits, 0), 0).max(-1)
    assert np.all(weights.sum(-1) <= largest + 1e-6)
    np.testing.assert_array_equal(pointwise_attention(jnp.abs(q), -jnp.abs(k), v, **options), 0)
    mean = jnp.cumsum(v, 1) / jnp.arange(1, 7)[:, None, None]
    constant = pointwise_attention(jnp.ones_like(q), jnp.ones_like(k), v, **options)
    np.testing.assert_allclose(constant, 2 * jnp.repeat(mean, 2, 2), atol=1e-5)


def test_the_sigmoid_has_no_bias_by_length():
    q, k, v = tensors()
    out = pointwise_attention(q, k, v, scale=0.0)
    np.testing.assert_allclose(out, jnp.repeat(0.5 * v.sum(1, keepdims=True), 2, 2) + 0 * out, atol=1e-5)
    assert not np.allclose(pointwise_attention(q, k, v), jattn.dot_product_attention(q, k, v), atol=0.1)


@pytest.mark.parametrize("sim", ["sigmoid", "taylor2"])
def test_hidden_keys_weigh_nothing_and_empty_rows_are_zero(sim):
    q, k, v = tensors()
    ids = np.array([[-1, 0, 0, 0, 1, 1]] * 2)
    poisoned = [x.at[:, 0].set(jnp.nan) for x in (q, k, v)]

    def total(q, k, v):
        out = pointwise_attention(q, k, v, sim=sim, normalize=True, is_causal=True, segment_ids=ids)
        return (out**2).sum(), out

    run = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))
    (gradients, out), (clean, expected) = run(*poisoned), run(q, k, v)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(out[:, 0], 0)
    for one, other in zip(gradients, clean, strict=True):
        np.testing.assert_array_equal(one, other)
    alone = pointwise_attention(q[:, 4:], k[:, 4:], v[:, 4:], sim=sim, normalize=True, is_causal=True)
    np.testing.assert_allclose(out[:, 4:], alone, atol=1e-6)


@pytest.mark.parametrize("sim", SIMILARITIES)
def test_a_bias_of_minus_infinity_hides(sim):
    q, k, v = tensors()
    bias = np.where(np.arange(6) == 2, -np.inf, 0.0)
    hidden = pointwise_attention(q, k, v, sim=sim, bias=bias)
    mask = pointwise_attention(q, k, v, sim=sim, mask=np.arange(6) != 2)
    np.testing.assert_allclose(hidden, mask, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"sim": "softmax"}, "sim"), ({"normalize": "sum"}, "normalize"), ({"eps": -1.0}, "eps")],
)
def test_errors_name_the_argument(options, name):
    with pytest.raises(ValueError, match=name):
        pointwise_attention(*tensors(), **options)
