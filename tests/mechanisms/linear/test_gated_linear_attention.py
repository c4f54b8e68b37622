"""Gated linear attention against loops in float64 numpy, its limit cases, and its layer by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.cache import FullCache
from jattn.layers import Rope
from jattn.mechanisms.linear.gated_linear_attention import GatedLinearAttention, gated_linear_attention
from jattn.mechanisms.linear.linear_attention import linear_attention
from tests.recurrence.truth import truth

T, N, K, D, V = 11, 4, 2, 5, 3


@functools.partial(jax.jit, static_argnames=("mode", "chunk_size", "scale"))
def attend(arrays, **options):
    return gated_linear_attention(**arrays, return_final_state=True, **options)


def arrays(seed=0):
    r = np.random.default_rng(seed)
    return {
        "query": r.normal(size=(2, T, N, D)),
        "key": r.normal(size=(2, T, K, D)),
        "value": r.normal(size=(2, T, K, V)),
        "log_decay": -np.abs(r.normal(size=(2, T, K, D))) / 4,
    }


def in64(given, **options):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, attend(jax.tree.map(jnp.asarray, given), **options))


def close(found, expected, tolerance=1e-11):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", ["chunk", "recurrent", "associative"])
def test_it_is_the_loop_over_tokens(mode):
    given = arrays()
    wide = {**given, "log_decay": np.repeat(given["log_decay"], N // K, 2)}
    for found, expected in zip(in64(given, mode=mode, chunk_size=4), truth(**wide), strict=True):
        close(found, expected)


def test_without_decay_it_is_plain_linear_attention():
    given = arrays()
    given["log_decay"] = 0 * given["log_decay"]
    found = in64(given, chunk_size=4, scale=1.0)[0]
    with jax.enable_x64(True):
        plain = (jnp.asarray(given[name]) for name in ("query", "key", "value"))
        close(found, linear_attention(*plain, is_causal=True, feature_map="identity", normalize=False))


def test_one_decay_for_all_channels_is_a_decay_a_token():
    given = arrays()
    one = given["log_decay"][..., :1]
    wide = in64({**given, "log_decay": np.broadcast_to(one, given["log_decay"].shape)}, chunk_size=4)
    for found, expected in zip(wide, in64({**given, "log_decay": one[..., 0]}, chunk_size=4), strict=True):
        close(found, expected)


def test_a_channel_that_forgets_everything_sees_the_token_alone():
    given = arrays()
    given["log_decay"][..., 0] = -np.inf
    rest = {**given, "query": given["query"] * (np.arange(D) > 0)}
    own = given["query"][..., 0] * np.repeat(given["key"], N // K, 2)[..., 0]
    alone = own[..., None] * np.repeat(given["value"], N // K, 2) / D**0.5
    close(in64(given, chunk_size=4)[0], in64(rest, chunk_size=4)[0] + alone)


def layer_of(**options):
    return GatedLinearAttention(8, N, num_kv_heads=K, gate_rank=2, chunk_size=4, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("options", [{}, {"min_log_decay": -0.02}, {"gate_normalizer": 1.0}], ids=str)
def test_the_layer_by_hand(options):
    layer = layer_of(**options)
    x = np.random.default_rng(1).normal(size=(2, T, 8))
    w = {name: np.asarray(getattr(layer, name).kernel[...], np.float64) for name in ("query", "key", "value", "out")}
    query, key, value = (np.einsum("btm,mhd->bthd", x, w[name]) for name in ("query", "key", "value"))
    down, up = (np.asarray(part.kernel[...], np.float64) for part in (layer.decay.down, layer.decay.up))
    logits = x @ down @ up + np.asarray(layer.decay.up.bias[...])
    gates = -np.logaddexp(0, -logits) / options.get("gate_normalizer", 16.0)
    gates = np.maximum(gates, options.get("min_log_decay", -np.inf)).reshape(key.shape)
    o, _ = truth(query, key, value, log_decay=np.repeat(gates, N // K, 2))
    o = o / np.sqrt(np.mean(o**2, -1, keepdims=True) + 1e-5) * np.asarray(layer.out.norm.scale[...])
    gate = np.einsum("btm,mhd->bthd", x, np.asarray(layer.out.gate.kernel[...], np.float64))
    expected = np.einsum("bthd,hdm->btm", o * gate / (1 + np.exp(-gate)), w["out"])
    np.testing.assert_allclose(layer(jnp.asarray(x, jnp.float32)).output, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.slow
def test_a_state_knows_its_positions():
    layer = layer_of(position=Rope(), head_dim=4)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, T, 8)), jnp.float32)
    policy = FullCache(T)
    first = layer(x[:, :5], cache=(policy, layer.init_cache(policy, 1)))
    second = layer(x[:, 5:], cache=(policy, first.cache))
    found = jnp.concatenate([first.output, second.output], 1)
    np.testing.assert_allclose(found, layer(x).output, rtol=2e-4, atol=2e-5)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="num_kv_heads must divide"):
        GatedLinearAttention(8, 4, num_kv_heads=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="num_heads must divide"):
        GatedLinearAttention(9, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="log_decay must be"):
        gated_linear_attention(**{**arrays(), "log_decay": np.zeros((2, T, K, D + 1))})
