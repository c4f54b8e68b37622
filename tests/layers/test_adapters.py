import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jattn
from jattn.layers import as_flax_attention_fn

ADAPTED = as_flax_attention_fn(jattn.dot_product_attention)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def two_layers(**options):
    """The same flax layer with flax's own attention and with ours."""
    return [
        nnx.MultiHeadAttention(4, 16, rngs=nnx.Rngs(0), **{"decode": False, **options, **extra})
        for extra in ({}, {"attention_fn": ADAPTED})
    ]


@pytest.mark.parametrize("shape", [(5, 16), (2, 5, 16), (2, 3, 5, 16)])
def test_swapped_into_flax(shape):
    theirs, ours = two_layers()
    x = normal(1, *shape)
    np.testing.assert_allclose(ours(x), theirs(x), atol=1e-5)
    mask = nnx.make_causal_mask(jnp.ones(shape[:-1]))  # 0.0 and 1.0
    np.testing.assert_allclose(ours(x, mask=mask), theirs(x, mask=mask), atol=1e-5)


def test_cross_attention_with_padding():
    theirs, ours = two_layers()
    x, context = normal(1, 2, 5, 16), normal(2, 2, 7, 16)
    mask = (jnp.arange(7) < jnp.array([7, 4])[:, None])[:, None, None]
    np.testing.assert_allclose(ours(x, context, mask=mask), theirs(x, context, mask=mask), atol=1e-5)


def test_grouped_heads_and_causal():
    theirs, ours = two_layers(num_kv_heads=2)
    x = normal(1, 2, 5, 16)
    np.testing.assert_allclose(ours(x, is_causal=True), theirs(x, is_causal=True), atol=1e-5)


def test_bias_and_dtype():
    q, k, v = (normal(s, 2, 5, 4, 8) for s in range(3))
    bias = normal(3, 4, 5, 5)
    theirs = nnx.dot_product_attention(q, k, v, bias=bias[None])
    np.testing.assert_allclose(ADAPTED(q, k, v, bias=bias), theirs, atol=1e-5)
    assert ADAPTED(q, k, v, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    assert ADAPTED(q, k, v, precision="highest").dtype == jnp.float32


def test_decoding_in_flax():
    theirs, ours = two_layers(decode=True)
    x = normal(1, 2, 4, 16)
    for layer in (theirs, ours):
        layer.init_cache(x.shape)
    for t in range(4):
        np.testing.assert_allclose(ours(x[:, t : t + 1]), theirs(x[:, t : t + 1]), atol=1e-5)


def test_sown_weights():
    theirs, ours = two_layers(num_kv_heads=2)
    x = normal(1, 2, 5, 16)
    sown = []
    for layer in (theirs, ours):
        layer(x, is_causal=True, sow_weights=True)
        sown.append(nnx.pop(layer, nnx.Intermediate)["attention_weights"].get_value()[0])
    np.testing.assert_allclose(sown[1], sown[0], atol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_broadcast_dropout_is_one_pattern_for_all_heads_and_rows(kv_heads):
    # Values that are the identity show the weights; equal logits make every kept weight the same number.
    q, k = jnp.zeros((2, 6, 4, 8)), jnp.zeros((2, 6, kv_heads, 8))
    v = jnp.broadcast_to(jnp.eye(6)[:, None], (2, 6, kv_heads, 6))
    call = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(3), "is_causal": True}
    shared = ADAPTED(q, k, v, **call)
    np.testing.assert_array_equal(shared, jnp.broadcast_to(shared[:1, :, :1], shared.shape))
    assert (shared > 0).any()
    own = ADAPTED(q, k, v, broadcast_dropout=False, **call)
    assert not np.array_equal(own[0], own[1])
    np.testing.assert_array_equal(ADAPTED(q, k, v, deterministic=True, **call), ADAPTED(q, k, v, is_causal=True))


def test_broadcast_dropout_with_mask_and_bias():
    q, k, v = (normal(s, 2, 5, 4, 8) for s in range(3))
    call = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(3)}
    bias, mask = normal(4, 4, 5, 5), (normal(5, 2, 1, 1, 5) > -1)
    got = ADAPTED(q, k, v, bias=bias, mask=mask, **call)
    for b in range(2):
        for n in range(4):
            alone = ADAPTED(
                q[b : b + 1, :, n : n + 1], k[b : b + 1, :, n : n + 1], v[b : b + 1, :, n : n + 1],
                bias=bias[n : n + 1], mask=mask[b : b + 1], broadcast_dropout=False, **call,
            )  # fmt: skip
            np.testing.assert_allclose(got[b, :, n], alone[0, :, 0], atol=1e-6)


def test_dropout_through_flax():
    _, ours = two_layers(dropout_rate=0.5)
    x = normal(1, 2, 5, 16)
    dropped = ours(x, deterministic=False, rngs=nnx.Rngs(1))
    assert not np.allclose(dropped, ours(x, deterministic=True))


def test_refusals():
    def bare(query, key, value, *, mask=None):
        return value

    q = jnp.ones((1, 3, 2, 4))
    with pytest.raises(ValueError, match="bare does not take window"):
        as_flax_attention_fn(bare, window=3)
    with pytest.raises(ValueError, match="is_causal"):
        as_flax_attention_fn(bare)(q, q, q, is_causal=True)
    with pytest.raises(ValueError, match="dropout_rng"):
        ADAPTED(q, q, q, dropout_rate=0.5)
    with pytest.raises(ValueError, match="broadcast_dropout"):
        as_flax_attention_fn(jattn.dot_product_attention, sinks=jnp.zeros(2))(
            q, q, q, dropout_rate=0.5, dropout_rng=jax.random.key(0)
        )
