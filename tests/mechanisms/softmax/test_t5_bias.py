import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jattn
from jattn.mechanisms.softmax.t5_bias import T5Bias, t5_bias, t5_bucket, t5_edges


def tensors(seed=0, length=40, heads=2):
    return [jax.random.normal(key, (1, length, heads, 4)) for key in jax.random.split(jax.random.key(seed), 3)]


def test_edges():
    assert t5_edges(32) == (*range(1, 17), 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113)
    assert t5_edges(16) == (*range(1, 9), 12, 16, 23, 32, 46, 64, 91)
    for buckets, longest in ((8, 20), (32, 256), (10, 1000)):
        edges, half = t5_edges(buckets, longest), buckets // 2
        for n in range(1, longest + 5):
            bucket = n
            if n >= half:
                steps = math.log(n / half) / math.log(longest / half) * (buckets - half)
                # The logarithm is only trusted away from an edge.
                if abs(steps - round(steps)) < 1e-9:
                    steps = round(steps)
                bucket = min(buckets - 1, half + math.floor(steps))
            assert sum(edge <= n for edge in edges) == bucket


def test_published_check_values():
    distances = np.array([0, 15, 16, 17, 20, 31, 32, 64, 127, 128])
    assert t5_bucket(-distances).tolist() == [0, 15, 16, 16, 17, 21, 21, 26, 31, 31]
    assert t5_bucket(distances).tolist() == [0] * 10
    past = np.array([8, 16, 32, 64, 128])
    assert t5_bucket(-past, bidirectional=True).tolist() == [8, 10, 12, 14, 15]
    assert t5_bucket(past, bidirectional=True).tolist() == [24, 26, 28, 30, 31]
    assert 16 not in t5_bucket(np.arange(-300, 300), bidirectional=True)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_score_mod_equals_the_gathered_bias(bidirectional):
    q, k, v = tensors()
    layer = T5Bias(2, bidirectional=bidirectional, max_distance=30, rngs=nnx.Rngs(0))
    i, j = jnp.arange(40)[:, None], jnp.arange(40)[None]
    bias = layer.bias(2, i, j)
    table = np.asarray(layer.table.get_value())
    buckets = np.asarray(t5_bucket(j - i, max_distance=30, bidirectional=bidirectional))
    np.testing.assert_array_equal(bias, np.moveaxis(table[buckets], -1, 0))
    for call in ({}, {"is_causal": True}):
        expected = jattn.dot_product_attention(q, k, v, bias=bias, scale=1.0, **call)
        got = jattn.dot_product_attention(q, k, v, score_mod=layer.score_mod(2), scale=1.0, **call)
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_bias_is_toeplitz_and_far_keys_share_a_bucket():
    table = jax.random.normal(jax.random.key(0), (32, 1))
    layer = T5Bias(1, rngs=nnx.Rngs(0))
    layer.table.set_value(table)
    bias = np.asarray(layer.bias(1, jnp.arange(300)[:, None], jnp.arange(300)[None]))[0]
    for offset in (-200, -3, 0, 7):
        assert len(np.unique(np.diagonal(bias, offset))) == 1
    assert bias[299, 299 - 128] == bias[299, 0]


def test_zero_table_is_no_position():
    q, k, v = tensors()
    got = jattn.dot_product_attention(q, k, v, score_mod=t5_bias(np.zeros((32, 2))))
    np.testing.assert_allclose(got, jattn.dot_product_attention(q, k, v), atol=1e-6)


def test_gradient_reaches_the_table():
    q, k, v = tensors(length=6)
    table = jax.random.normal(jax.random.key(1), (32, 2))
    i, j = jnp.arange(6)[:, None], jnp.arange(6)[None]

    def through_mod(table):
        return (jattn.dot_product_attention(q, k, v, score_mod=t5_bias(table), is_causal=True) ** 2).sum()

    def through_bias(table):
        bias = jnp.moveaxis(table[t5_bucket(j - i)], -1, 0)
        return (jattn.dot_product_attention(q, k, v, bias=bias, is_causal=True) ** 2).sum()

    np.testing.assert_allclose(jax.grad(through_mod)(table), jax.grad(through_bias)(table), atol=1e-5)


def test_bad_tables():
    with pytest.raises(ValueError, match="table"):
        t5_bias(np.zeros((31, 2)))
    with pytest.raises(ValueError, match="max_distance"):
        t5_edges(32, 16)
    with pytest.raises(ValueError, match="num_buckets"):
        t5_edges(1)
