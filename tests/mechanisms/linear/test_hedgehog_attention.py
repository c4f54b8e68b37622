"""Multi-head linear attention under Hedgehog maps: against its quadratic form, on its state, and while it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jattn
from jattn.cache import FullCache
from jattn.layers import MultiHeadAttention, Rope
from jattn.mechanisms.linear.attention_distill_loss import attention_distill_loss
from jattn.mechanisms.linear.hedgehog_attention import HedgehogAttention
from jattn.mechanisms.softmax.alibi import Alibi

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 8)), jnp.float32)
CAUSAL = jattn.masks.causal()


def layer(**options):
    made = HedgehogAttention(8, 4, num_kv_heads=2, position=Rope(), rngs=nnx.Rngs(0), **options)
    for part, seed in ((made.query_map, 1), (made.key_map, 2)):
        weight = part.weight.get_value()
        part.weight[...] = weight + 0.5 * np.random.default_rng(seed).normal(size=weight.shape)
    return made


def arrays(made):
    query, key, value = made.project(X, X)
    return *made.position.rotate(query, key, jnp.arange(6), jnp.arange(6)), value


@pytest.mark.parametrize("variant", ["softmax_dim", "exp", "fla"])
@pytest.mark.parametrize("mask", [None, CAUSAL], ids=["all", "causal"])
def test_the_linear_form_is_the_quadratic_one(mask, variant):
    made = layer(variant=variant, num_features=3)
    query, key, value = arrays(made)
    weights = np.einsum("btnf,bsnf->bnts", made.query_map(query), np.repeat(made.key_map(key), 2, axis=2))
    weights = weights * np.tri(6) if mask is not None else weights
    weights = weights / weights.sum(-1, keepdims=True)
    expected = made.out(np.einsum("bnts,bsnv->btnv", weights, np.repeat(value, 2, axis=2)))
    np.testing.assert_allclose(nnx.jit(lambda made: made(X, mask=mask).output)(made), expected, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"skip": True, "map_bias": True}, {"shared_maps": True, "num_features": 3}])
def test_decoding_on_a_state(options):
    made = layer(**options)
    policy = FullCache(6)

    @nnx.jit
    def step(made, x, cache):
        found = made(x, cache=(policy, cache))
        return found.output, found.cache

    cache, rows = made.init_cache(policy, 2), []
    assert cache.state.state.shape == (2, 2, 6 if "num_features" in options else 4, 2)
    for t in range(6):
        row, cache = step(made, X[:, t : t + 1], cache)
        rows.append(row)
    np.testing.assert_allclose(np.concatenate(rows, 1), made(X, mask=CAUSAL).output, atol=1e-5)
    assert cache.next.tolist() == [6, 6]


@pytest.mark.slow
def test_a_policy_that_forgets_keeps_keys():
    made, policy = layer(), jattn.get("window_cache")(window=3)
    cache, rows = made.init_cache(policy, 2), []
    for t in range(6):
        found = made(X[:, t : t + 1], cache=(policy, cache))
        cache = found.cache
        rows.append(found.output)
    query, key, value = arrays(made)
    weights = np.einsum("btnf,bsnf->bnts", made.query_map(query), np.repeat(made.key_map(key), 2, axis=2))
    weights = weights * (np.tri(6) - np.tri(6, k=-3))
    weights = weights / weights.sum(-1, keepdims=True)
    expected = made.out(np.einsum("bnts,bsnv->btnv", weights, np.repeat(value, 2, axis=2)))
    np.testing.assert_allclose(np.concatenate(rows, 1), expected, atol=1e-5)


@pytest.mark.parametrize("mask", [None, CAUSAL], ids=["all", "causal"])
def test_while_distilling_it_is_softmax_attention(mask):
    made = layer()
    made.is_distilling = True
    teacher = MultiHeadAttention(8, 4, num_kv_heads=2, position=Rope(), rngs=nnx.Rngs(0))
    ids = np.array([[0] * 4 + [1] * 2, [-1] + [0] * 5])
    found, expected = (m(X, mask=mask, segment_ids=ids) for m in (made, teacher))
    np.testing.assert_array_equal(found.output, expected.output)
    query, key, _ = arrays(made)
    features = made.query_map(query), made.key_map(key)
    loss = attention_distill_loss(query, key, *features, is_causal=mask is not None, segment_ids=ids)
    np.testing.assert_allclose(found.aux["distill_loss"], loss, rtol=1e-6)


def test_while_distilling_only_maps_have_gradients_of_the_loss():
    made = layer()
    made.is_distilling = True
    graph, parameters, rest = nnx.split(made, nnx.Param, ...)

    def loss(parameters):
        return nnx.merge(graph, parameters, rest)(X, mask=CAUSAL).aux["distill_loss"]

    for path, gradient in nnx.to_flat_state(jax.jit(jax.grad(loss))(parameters)):
        assert np.any(gradient.get_value()) == (path[0] in ("query_map", "key_map")), path


def test_errors():
    for options, message in (
        ({"position": Alibi()}, "Alibi"),
        ({"use_sinks": True}, "use_sinks"),
        ({"logit_soft_cap": 5.0}, "logit_soft_cap"),
        ({"dropout_rate": 0.1}, "dropout_rate"),
        ({"attention_fn": jattn.dot_product_attention}, "attention_fn"),
        ({"variant": "x"}, "variant"),
    ):
        with pytest.raises(ValueError, match=message):
            HedgehogAttention(8, 4, rngs=nnx.Rngs(0), **options)
    made = layer()
    made.is_distilling = True
    policy = FullCache(6)
    with pytest.raises(ValueError, match="neither a cache nor a hook"):
        made(X[:, :1], cache=(policy, made.init_cache(policy, 2)))
    with pytest.raises(ValueError, match="neither a cache nor a hook"):
        made(X, hook=jattn.probes.AttnHook(observe={"lse"}))
