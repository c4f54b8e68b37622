import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jattn
from jattn import masks
from jattn.cache import FullCache
from jattn.layers import Rope
from jattn.mechanisms.softmax import kv_bias as module
from jattn.mechanisms.softmax.kv_bias import KvBias
from jattn.mechanisms.softmax.pointwise_attention import pointwise_attention

# Under jit everything compiles once a shape, not operation by operation.
kv_bias = jax.jit(module.kv_bias, static_argnames=("is_causal", "logit_soft_cap", "return_residual"))
attend = nnx.jit(lambda layer, *tokens, **options: layer(*tokens, **options).output)


def tensors(seed=0, length=6, dtype=jnp.float32):
    shapes = [(2, length, 4, 4), (2, length, 2, 4), (2, length, 2, 3), (2, 4), (2, 3)]
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("cap", [None, 1.5])
def test_float64_with_every_gradient(cap):
    """The truth prepends a real key and value to which everything is visible."""
    with jax.enable_x64(True):
        arguments = tensors(dtype=jnp.float64)
        visible = np.concatenate([np.ones((6, 1), bool), np.tri(6, dtype=bool)], 1)

        def definition(q, k, v, b_k, b_v):
            k, v = (
                jnp.concatenate([jnp.broadcast_to(b[None, None], (2, 1, *b.shape)), x], 1)
                for b, x in ((b_k, k), (b_v, v))
            )
            return jattn.dot_product_attention(q, k, v, mask=visible, logit_soft_cap=cap, return_residual=True)

        def mechanism(q, k, v, b_k, b_v):
            own = {"key_bias": b_k, "value_bias": b_v, "logit_soft_cap": cap, "return_residual": True}
            return kv_bias(q, k, v, is_causal=True, **own)

        def total(f, *a):
            out, lse = f(*a)
            return (out**2).sum() + jnp.sin(lse).sum(), (out, lse)

        left, right = (
            jax.jit(jax.grad(lambda *a, f=f: total(f, *a), tuple(range(5)), has_aux=True))(*arguments)
            for f in (mechanism, definition)
        )
        for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-11)


def test_zero_biases_are_softmax1():
    q, k, v, b_k, _ = tensors()
    out = kv_bias(q, k, v, key_bias=0 * b_k, is_causal=True)
    expected = jattn.dot_product_attention(q, k, v, sinks=jnp.zeros(4), is_causal=True)
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_weight_of_the_virtual_key():
    q, k, v, b_k, b_v = tensors()
    plain, lse = jattn.dot_product_attention(q, k, v, return_residual=True)
    virtual = jax.nn.sigmoid(jnp.einsum("btnd,nd->btn", q, jnp.repeat(b_k, 2, 0)) / 2 - lse)[..., None]
    np.testing.assert_allclose(kv_bias(q, k, v, key_bias=b_k), (1 - virtual) * plain, atol=1e-6)
    both = kv_bias(q, k, v, key_bias=b_k, value_bias=b_v)
    np.testing.assert_allclose(both, (1 - virtual) * plain + virtual * jnp.repeat(b_v, 2, 0), atol=1e-6)
    same = jnp.broadcast_to(b_k[0], b_k.shape)
    np.testing.assert_array_equal(kv_bias(q, k, v, key_bias=b_k[0]), kv_bias(q, k, v, key_bias=same))


def test_value_bias_alone_is_added_to_every_value():
    q, k, v, _, b_v = tensors()
    ids = np.array([[0, 0, 1, 1, -1, -1]] * 2)
    options = {"segment_ids": ids, "is_causal": True}
    out = kv_bias(q, k, v, value_bias=b_v, **options)
    np.testing.assert_allclose(out, jattn.dot_product_attention(q, k, v + b_v, **options), atol=1e-6)
    # Rows of unnormalized weights do not sum to 1, so there it is something else.
    inside = pointwise_attention(q, k, v + b_v)
    assert not np.allclose(inside, pointwise_attention(q, k, v) + jnp.repeat(b_v, 2, 0), atol=0.1)


def test_who_sees_the_virtual_key():
    q, k, v, b_k, b_v = tensors()
    own = {"key_bias": b_k, "value_bias": b_v}
    hidden = kv_bias(q, k, v, mask=np.zeros((6, 6), bool), **own)
    np.testing.assert_allclose(hidden, jnp.broadcast_to(jnp.repeat(b_v, 2, 0), (2, 6, 4, 3)), atol=1e-6)
    ids = np.array([[0, 0, 0, 0, -1, -1]] * 2)
    padded, lse = kv_bias(q, k, v, segment_ids=ids, is_causal=True, return_residual=True, **own)
    np.testing.assert_array_equal(padded[:, 4:], 0)
    np.testing.assert_array_equal(lse[:, 4:], -np.inf)
    alone = kv_bias(q[:, :4], k[:, :4], v[:, :4], is_causal=True, **own)
    np.testing.assert_allclose(padded[:, :4], alone, atol=1e-6)


def test_poisoned_padding_reaches_nothing():
    q, k, v, b_k, b_v = tensors()
    ids = np.array([[-1, 0, 0, 0, 0, -1]] * 2)

    def total(q, k, v, b_k, b_v):
        out = kv_bias(q, k, v, key_bias=b_k, value_bias=b_v, segment_ids=ids)
        return (out**2).sum(), out

    run = jax.jit(jax.grad(total, tuple(range(5)), has_aux=True))
    poisoned = [x.at[:, np.array([0, 5])].set(jnp.nan) for x in (q, k, v)]
    one, other = run(*poisoned, b_k, b_v), run(q, k, v, b_k, b_v)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("mode", ["k", "kv", "v"])
def test_layer(mode):
    layer = KvBias(16, 4, num_kv_heads=2, mode=mode, shared=mode == "k", position=Rope(), rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 16)), jnp.float32)
    own = {}
    for name in ("key_bias", "value_bias"):
        parameter = getattr(layer, name)
        assert (parameter is not None) == (name[0] in mode)
        if parameter is not None:
            assert parameter.get_value().shape == ((4,) if mode == "k" else (2, 4))
            parameter.set_value(30 * parameter.get_value())
            own[name] = parameter.get_value()
    query, key = Rope().rotate(layer.query(x), layer.key(x), jnp.arange(6), jnp.arange(6))
    whole = attend(layer, x, mask=masks.causal())
    expected = layer.out(kv_bias(query, key, layer.value(x), is_causal=True, **own))
    np.testing.assert_allclose(whole, expected, atol=1e-5)
    gradients = nnx.jit(nnx.grad(lambda m: (m(x, mask=masks.causal()).output ** 2).sum()))(layer)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))

    policy = FullCache(8)
    cache, rows = layer.init_cache(policy, 2), []
    step = nnx.jit(lambda m, x, ids, cache: m(x, segment_ids=ids, cache=(policy, cache))[:2])
    for t in (0, 2, 4):
        row, cache = step(layer, x[:, t : t + 2], jnp.zeros((2, 2), int), cache)
        rows.append(row)
    np.testing.assert_allclose(jnp.concatenate(rows, 1), whole, atol=1e-5)
    padding, cache = step(layer, x[:, :2], jnp.full((2, 2), -1), cache)
    np.testing.assert_array_equal(padding, 0)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "key_bias and value_bias"),
        ({"key_bias": np.zeros((4, 4))}, "key_bias"),
        ({"value_bias": np.zeros(4)}, "value_bias"),
    ],
)
def test_errors_name_the_argument(options, name):
    with pytest.raises(ValueError, match=name):
        kv_bias(*tensors()[:3], **options)
    with pytest.raises(ValueError, match="mode"):
        KvBias(8, 2, mode="q", rngs=nnx.Rngs(0))
