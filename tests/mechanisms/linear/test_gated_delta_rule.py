"""The gated delta rule against a loop in float64, its closed form for a chunk, and everything that it must equal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.layers.rope import Rope
from jattn.mechanisms.linear.delta_rule import delta_rule
from jattn.mechanisms.linear.gated_delta_rule import GatedDeltaRule, gated_delta_rule
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

run = runner(gated_delta_rule)
GROUPED_VALUES = (2, 2, 4, 4, 2)


def started(given, heads=2):
    return {**given, "initial_state": rng(5).normal(size=(2, heads, 5, 3))}


@pytest.mark.parametrize("options", [{"mode": "recurrent"}, {"mode": "parallel"}, {"chunk_size": 4}, {"chunk_size": 1}])
def test_it_is_the_loop_of_the_paper(options):
    given = started(inputs("token"))
    close(in64(run, given, **options), delta_loop(**given))


@pytest.mark.parametrize("heads", [GROUPED_VALUES, (4, 2, 2, 4, 1), (2, 1, 4, 2, 4)], ids=str)
def test_heads_are_repeated_not_tiled(heads):
    given = inputs("token", heads=heads)
    found = in64(run, given, chunk_size=4)
    assert found[1].shape == (2, 4, 5, 3)
    close(found, delta_loop(**given))


def test_gradients_are_those_of_the_loop():
    given = started(inputs("token", heads=GROUPED_VALUES), heads=4)
    weights = cotangents(*delta_loop(**given))
    loop = both(lambda **arrays: delta_loop(**arrays, xp=jnp))
    fast = both(lambda **arrays: gated_delta_rule(**arrays, chunk_size=4, return_final_state=True))
    close(in64(fast, given, weights), in64(loop, given, weights))


def test_it_is_the_closed_form_of_a_chunk():
    given = inputs("token", batch=1, heads=(1,) * 5)
    q, k, v, beta, g = (given[name][0, :, 0] for name in ("query", "key", "value", "beta", "log_decay"))
    state = rng(1).normal(size=(1, 1, 5, 3))
    sums = np.cumsum(g)
    decay = np.tril(np.exp(np.minimum(sums[:, None] - sums, 0)))
    solved = np.linalg.inv(np.eye(9) + np.tril(beta[:, None] * (k @ k.T) * decay, -1))
    values = solved @ (beta[:, None] * v) - solved @ ((beta * np.exp(sums))[:, None] * k) @ state[0, 0]
    out, last = in64(run, {**given, "initial_state": state}, scale=1.0, chunk_size=4)
    close(out[0, :, 0], np.exp(sums)[:, None] * q @ state[0, 0] + ((q @ k.T) * decay) @ values)
    left = np.exp(sums[-1] - sums)[:, None]
    close(last[0, 0], np.exp(sums[-1]) * state[0, 0] + (k * left).T @ values)


def test_without_decay_it_is_the_delta_rule():
    given = started(inputs("token"))
    given["log_decay"] *= 0
    plain = {name: x for name, x in given.items() if name != "log_decay"}
    close(in64(run, given, chunk_size=4), in64(runner(delta_rule), plain, chunk_size=4))


def test_without_beta_the_state_only_decays():
    given = started(inputs("token"))
    given["beta"] *= 0
    left = np.exp(given["log_decay"].sum(1))[..., None, None]
    close(in64(run, given, chunk_size=4)[1], left * given["initial_state"])


def test_a_token_that_forgets_everything_sees_itself_alone():
    given = started(inputs("token"))
    given["log_decay"] = np.full_like(given["log_decay"], -1e4)
    single = jax.tree.map(lambda x: x.astype(np.float32), given)
    weights = jax.tree.map(lambda x: x.astype(np.float32), cotangents(*delta_loop(**given)))
    done = both(lambda **arrays: gated_delta_rule(**arrays, chunk_size=4, return_final_state=True))
    (out, _), gradients = done(single, weights)
    own = np.einsum("btnd,btnd->btn", given["query"], given["key"]) * given["beta"]
    np.testing.assert_allclose(out, own[..., None] * given["value"] / 5**0.5, rtol=1e-5, atol=1e-6)
    assert all(np.isfinite(x).all() for x in gradients.values())


def test_what_stands_in_padding_reaches_nothing():
    poisoned_like_clean(gated_delta_rule, inputs("token", heads=GROUPED_VALUES))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"log_decay": np.zeros((2, 9, 2, 5))}, "kda takes one a channel"),
        ({"log_decay": np.zeros((2, 9, 3))}, "log_decay must be floats"),
        ({"log_decay": np.zeros((2, 9, 2), int)}, "log_decay must be floats"),
        ({"beta": np.zeros((2, 9, 5))}, "beta must be floats"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change, match):
    with pytest.raises(ValueError, match=match):
        gated_delta_rule(**{**inputs("token"), **change})


@pytest.mark.parametrize("options", [{"num_v_heads": 4}, {"use_gate": False, "allow_neg_eigval": True}], ids=str)
def test_the_layer_is_its_equations(options):
    with jax.enable_x64(True):
        layer = GatedDeltaRule(6, 2, head_dim=3, chunk_size=4, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)
        x = rng().normal(size=(2, 9, 6))
        query, key = (l2_norm(silu(convolved(part, x))) for part in (layer.query, layer.key))
        beta = sigmoid(x @ np.asarray(layer.beta.kernel.get_value()))
        beta *= 2 if "allow_neg_eigval" in options else 1
        rates, bias = (np.asarray(p.get_value()) for p in (layer.decay.A_log, layer.decay.dt_bias))
        decay = -np.exp(rates) * softplus(x @ np.asarray(layer.rate.kernel.get_value()) + bias)
        o = rms_norm(delta_loop(query, key, silu(convolved(layer.value, x)), beta, decay)[0], layer.out.norm)
        if layer.out.gate is not None:
            o = o * silu(np.einsum("btm,mhd->bthd", x, layer.out.gate.kernel.get_value()))
        expected = np.einsum("bthd,hdm->btm", o, layer.out.kernel.get_value())
        close(nnx.jit(lambda layer, x: layer(x).output)(layer, x), expected)


def test_rates_start_where_the_published_ones_do():
    layer = GatedDeltaRule(32, 2, num_v_heads=256, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    rates, bias = layer.decay.A_log.get_value(), layer.decay.dt_bias.get_value()
    assert (rates.dtype, bias.dtype, rates.shape, bias.shape) == (jnp.float32, jnp.float32, (256,), (256,))
    amounts, steps = np.exp(rates), softplus(np.asarray(bias, np.float64))
    assert 0 < amounts.min() < 1
    assert 15 < amounts.max() <= 16
    assert abs(amounts.mean() - 8) < 1
    assert 1e-3 * (1 - 1e-3) <= steps.min() < 2e-3
    assert 5e-2 < steps.max() <= 1e-1 * (1 + 1e-3)
    assert abs(np.log(steps).mean() - np.log(1e-2)) < 0.3
    assert layer(jnp.ones((1, 3, 32), jnp.bfloat16)).output.dtype == jnp.bfloat16


def test_published_sizes_are_the_default():
    layer = nnx.eval_shape(lambda: GatedDeltaRule(2048, 6, rngs=nnx.Rngs(0)))
    assert layer.query.kernel.shape == (2048, 6, 256)
    assert layer.value.kernel.shape == (2048, 6, 512)


def test_only_distances_count_for_rotary_positions():
    layer = GatedDeltaRule(8, 2, head_dim=4, position=Rope(), rngs=nnx.Rngs(0))
    x = jnp.asarray(rng().normal(size=(1, 6, 8)), jnp.float32)
    run = nnx.jit(lambda layer, x, positions: layer(x, positions=positions).output)
    near, far, other = (run(layer, x, p) for p in (jnp.arange(6), 7 + jnp.arange(6), 2 * jnp.arange(6)))
    np.testing.assert_allclose(near, far, rtol=1e-4, atol=1e-5)
    assert np.abs(near - other).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_v_heads": 3}, "num_v_heads must be a multiple"),
        ({"num_kv_heads": 4}, "num_kv_heads must divide"),
        ({"num_v_heads": 0}, "num_kv_heads must divide"),
    ],
    ids=str,
)
def test_layers_that_cannot_be_built_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        GatedDeltaRule(8, 2, rngs=nnx.Rngs(0), **options)
