"""Kimi delta attention against a loop in float64, and everything that it must equal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.mechanisms.linear.gated_delta_rule import gated_delta_rule
from jattn.mechanisms.linear.kda import Kda, kda
from tests.mechanisms.linear.delta_truth import (
    both,
    close,
    convolved,
    cotangents,
    delta_loop,
    in64,
    inputs,
    l2_norm,
    poisoned_like_clean,
    rms_norm,
    rng,
    runner,
    sigmoid,
    silu,
    softplus,
)

run = runner(kda)
GROUPED_VALUES = (2, 2, 4, 4, 2)


def started(given, heads=2):
    return {**given, "initial_state": rng(5).normal(size=(2, heads, 5, 3))}


@pytest.mark.parametrize("options", [{"mode": "recurrent"}, {"mode": "parallel"}, {"chunk_size": 4}, {"chunk_size": 1}])
def test_it_is_the_loop_of_the_paper(options):
    given = started(inputs("channel"))
    close(in64(run, given, **options), delta_loop(**given))


@pytest.mark.parametrize("heads", [GROUPED_VALUES, (4, 2, 2, 4, 1)], ids=str)
def test_heads_are_repeated_not_tiled(heads):
    given = inputs("channel", heads=heads)
    close(in64(run, given, chunk_size=4), delta_loop(**given))


def test_gradients_are_those_of_the_loop():
    given = started(inputs("channel", heads=GROUPED_VALUES), heads=4)
    weights = cotangents(*delta_loop(**given))
    loop = both(lambda **arrays: delta_loop(**arrays, xp=jnp))
    fast = both(lambda **arrays: kda(**arrays, chunk_size=4, return_final_state=True))
    close(in64(fast, given, weights), in64(loop, given, weights))


def test_one_decay_for_all_channels_is_the_gated_delta_rule():
    given = started(inputs("token"))
    wide = {**given, "log_decay": np.repeat(given["log_decay"][..., None], 5, -1)}
    close(in64(run, wide, chunk_size=4), in64(runner(gated_delta_rule), given, chunk_size=4))


def test_without_beta_every_channel_only_decays():
    given = started(inputs("channel"))
    given["beta"] *= 0
    close(in64(run, given, chunk_size=4)[1], np.exp(given["log_decay"].sum(1))[..., None] * given["initial_state"])


def test_what_stands_in_padding_reaches_nothing():
    poisoned_like_clean(kda, inputs("channel"))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"log_decay": np.zeros((2, 9, 2))}, "gated_delta_rule takes one a head"),
        ({"log_decay": np.zeros((2, 9, 2, 4))}, "log_decay must be floats"),
        ({"beta": np.zeros((2, 9, 2, 1))}, "beta must be floats"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change, match):
    with pytest.raises(ValueError, match=match):
        kda(**{**inputs("channel"), **change})


@pytest.mark.parametrize("options", [{"num_v_heads": 4, "rank": 1}, {"allow_neg_eigval": True}], ids=str)
def test_the_layer_is_its_equations(options):
    with jax.enable_x64(True):
        layer = Kda(6, 2, chunk_size=4, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)
        heads = options.get("num_v_heads", 2)
        layer.out.gate.up.bias[...] = jnp.asarray(rng(3).normal(size=heads * 3))
        x = rng().normal(size=(2, 9, 6))

        def low_rank(part):
            y = x @ np.asarray(part.down.kernel.get_value()) @ np.asarray(part.up.kernel.get_value())
            return y if part.up.bias is None else y + np.asarray(part.up.bias.get_value())

        query, key = (l2_norm(silu(convolved(part, x))) for part in (layer.query, layer.key))
        beta = sigmoid(x @ np.asarray(layer.beta.kernel.get_value())) * (2 if "allow_neg_eigval" in options else 1)
        rates, bias = (np.asarray(p.get_value()) for p in (layer.decay.A_log, layer.decay.dt_bias))
        decay = -np.exp(rates)[:, None] * softplus(low_rank(layer.rate) + bias).reshape(2, 9, heads, 3)
        o = delta_loop(query, key, silu(convolved(layer.value, x)), beta, decay)[0]
        o = rms_norm(o, layer.out.norm) * sigmoid(low_rank(layer.out.gate)).reshape(o.shape)
        expected = np.einsum("bthd,hdm->btm", o, layer.out.kernel.get_value())
        close(nnx.jit(lambda layer, x: layer(x).output)(layer, x), expected)


def test_rates_start_where_the_published_ones_do():
    layer = Kda(64, 32, rngs=nnx.Rngs(0))
    amounts = np.exp(layer.decay.A_log.get_value())
    assert 1 <= amounts.min() < amounts.max() <= 16
    # A vector, which weight decay leaves alone.
    assert layer.decay.dt_bias.shape == (64,)


def test_layers_that_cannot_be_built_are_refused():
    with pytest.raises(ValueError, match="num_heads must divide features"):
        Kda(7, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="num_v_heads must be a multiple"):
        Kda(8, 2, num_v_heads=3, rngs=nnx.Rngs(0))
