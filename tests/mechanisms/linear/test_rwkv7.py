"""RWKV-7 against loops in float64, and everything that it must equal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.cache import FullCache
from jattn.layers.rope import Rope
from jattn.mechanisms.linear.delta_rule import delta_rule
from jattn.mechanisms.linear.gated_linear_attention import gated_linear_attention
from jattn.mechanisms.linear.rwkv7 import Rwkv7, rwkv7
from tests.mechanisms.linear.delta_truth import (
    both,
    close,
    cotangents,
    in64,
    poisoned_like_clean,
    rng,
    runner,
    sigmoid,
    unit,
)

run = runner(rwkv7)


def inputs(*, seed=0, heads=2, kv_heads=2):
    r = rng(seed)
    shape = (2, 9, kv_heads, 5)
    return {
        "query": r.normal(size=(2, 9, heads, 5)),
        "key": r.normal(size=shape),
        "value": r.normal(size=(2, 9, kv_heads, 3)),
        "removal_key": unit(r.normal(size=shape)),
        "rate": r.uniform(size=shape),
        "log_decay": -0.6 * r.uniform(size=shape),
    }


def started(given, heads=2):
    return {**given, "initial_state": rng(5).normal(size=(2, heads, 5, 3))}


def loop(query, key, value, removal_key, rate, log_decay, *, initial_state=None, xp=np):
    """Output and final state; the state stands as the published code has it, values before keys."""
    heads = query.shape[2]
    rest = (key, value, removal_key, rate, log_decay)
    key, value, removal_key, rate, log_decay = (xp.repeat(x, heads // x.shape[2], axis=2) for x in rest)
    state = xp.zeros((len(query), heads, value.shape[3], key.shape[3]))
    state = state if initial_state is None else xp.swapaxes(initial_state, -1, -2)
    out = []
    for t in range(query.shape[1]):
        seen = (state @ removal_key[:, t, :, :, None])[..., 0]
        state = state * xp.exp(log_decay[:, t])[:, :, None] - seen[..., None] * (removal_key * rate)[:, t, :, None]
        state = state + value[:, t, :, :, None] * key[:, t, :, None]
        out.append((state @ query[:, t, :, :, None])[..., 0])
    return xp.stack(out, 1), xp.swapaxes(state, -1, -2)


@pytest.mark.parametrize("options", [{"mode": "recurrent"}, {"mode": "parallel"}, {"chunk_size": 4}, {"chunk_size": 1}])
def test_it_is_the_loop_of_the_paper(options):
    given = started(inputs())
    close(in64(run, given, **options), loop(**given))


def test_heads_are_repeated_not_tiled():
    given = inputs(heads=4)
    given["rate"] = given["rate"][:, :, :1]
    close(in64(run, given, chunk_size=4), loop(**given))


def test_gradients_are_those_of_the_loop():
    given = started(inputs(heads=4), heads=4)
    weights = cotangents(*loop(**given))
    slow = both(lambda **arrays: loop(**arrays, xp=jnp))
    fast = both(lambda **arrays: rwkv7(**arrays, chunk_size=4, return_final_state=True))
    close(in64(fast, given, weights), in64(slow, given, weights))


def test_without_removal_it_is_gated_linear_attention():
    given = started(inputs())
    given["rate"] *= 0
    names = ("query", "key", "value", "log_decay", "initial_state")
    plain = {name: given[name] for name in names}
    close(in64(run, given, chunk_size=4), in64(runner(gated_linear_attention), plain, scale=1.0, chunk_size=4))


def test_without_decay_and_with_full_removal_it_is_the_delta_rule():
    given = started(inputs())
    given["key"] = given["removal_key"]
    given["rate"], given["log_decay"] = given["rate"] * 0 + 1, given["log_decay"] * 0
    plain = {name: given[name] for name in ("query", "key", "value", "initial_state")} | {"beta": np.ones((2, 9, 2))}
    close(in64(run, given, chunk_size=4), in64(runner(delta_rule), plain, scale=1.0, chunk_size=4))


def test_what_stands_in_padding_reaches_nothing():
    poisoned_like_clean(rwkv7, inputs())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"removal_key": np.zeros((2, 9, 2, 4))}, "removal_key must be floats"),
        ({"rate": np.zeros((2, 9, 2))}, "rate must be floats"),
        ({"rate": np.zeros((2, 9, 3, 5))}, "rate must be floats"),
        ({"log_decay": np.zeros((2, 9, 2))}, "log_decay must be floats"),
        ({"query": np.zeros((2, 9, 5))}, "query must be floats"),
        ({"mode": "associative"}, "associative"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change, match):
    with pytest.raises(ValueError, match=match):
        rwkv7(**{**inputs(), **change})


RANKS = {"decay_rank": 2, "rate_rank": 3, "value_rank": 2, "gate_rank": 2}


def layer_of(**options):
    """A layer whose parameters are all random: half of them start at 0 or at a constant."""
    layer = Rwkv7(6, 2, chunk_size=4, rngs=nnx.Rngs(0), **RANKS, **options)
    graph, state = nnx.split(layer)
    r = rng(3)
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(0.5 * r.normal(size=x.shape), x.dtype), state))


def numbers(parameter):
    return np.asarray(parameter.get_value(), np.float64)


def layer_truth(layer, x, v_first=None):
    before = np.concatenate([0 * x[:, :1], x[:, :-1]], 1)

    def mixed(name):
        return x + (before - x) * numbers(getattr(layer, f"mix_{name}"))

    def projected(name):
        return mixed(name) @ numbers(getattr(layer, name).kernel).reshape(6, 6)

    def network(part, name, activation=lambda x: x):
        y = activation(mixed(name) @ numbers(part.down.kernel)) @ numbers(part.up.kernel)
        return y if part.up.bias is None else y + numbers(part.up.bias)

    r, k, v = (projected(name) for name in ("query", "key", "value"))
    if v_first is not None:
        v = v + (v_first.reshape(v.shape) - v) * sigmoid(network(layer.residual, "value"))
    a = sigmoid(network(layer.rate, "rate"))
    g = -np.exp(-0.5) * sigmoid(network(layer.decay, "decay", np.tanh))
    kk, k = k * numbers(layer.removal_scale), k * (1 + (a - 1) * numbers(layer.rate_scale))
    bonus = r * k * numbers(layer.bonus)
    r, k, v, kk, a, g, bonus = (y.reshape(2, -1, 2, 3) for y in (r, k, v, kk, a, g, bonus))
    o = loop(r, k, v, unit(kk), a, g)[0]
    o = (o - o.mean(-1, keepdims=True)) / np.sqrt(o.var(-1, keepdims=True) + 3e-5)
    o = o * numbers(layer.norm_scale).reshape(2, 3) + numbers(layer.norm_bias).reshape(2, 3)
    o = (o + bonus.sum(-1, keepdims=True) * v).reshape(*x.shape[:2], 6)
    return (o * network(layer.gate, "gate", sigmoid)) @ numbers(layer.out.kernel).reshape(6, 6)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_layer_is_its_equations(layer):
    with jax.enable_x64(True):
        module = layer_of(layer=layer, num_layers=2, param_dtype=jnp.float64)
        x, v_first = rng().normal(size=(2, 9, 6)), rng(1).normal(size=(2, 9, 2, 3))
        beside = {"v_first": v_first} if layer else {}
        found = nnx.jit(lambda module, x, beside: module(x, **beside))(module, x, beside)
        close(found.output, layer_truth(module, x, **beside))
        if layer:
            assert not found.aux
        else:
            before = np.concatenate([0 * x[:, :1], x[:, :-1]], 1)
            own = (x + (before - x) * numbers(module.mix_value)) @ numbers(module.value.kernel).reshape(6, 6)
            close(found.aux["v_first"], own.reshape(2, 9, 2, 3))


def chain(layers, x, *, caches=(None, None), **call):
    policy, found, values = FullCache(9), [], {}
    for layer, cache in zip(layers, caches, strict=True):
        more = {} if cache is None else {"cache": (policy, cache)}
        found.append(layer(x, **values, **more, **call))
        x, values = x + found[-1].output, values or found[-1].aux
    return x, [done.cache for done in found]


def test_a_stack_decodes_with_the_values_of_its_first_layer():
    layers = [layer_of(layer=i, num_layers=2) for i in range(2)]
    x = jnp.asarray(rng().normal(size=(2, 9, 6)), jnp.float32)

    @nnx.jit
    def stepwise(layers, x):
        caches = [layer.init_cache(FullCache(9), 2) for layer in layers]
        outputs = []
        for start, stop in ((0, 6), (6, 7), (7, 9)):
            y, caches = chain(layers, x[:, start:stop], caches=caches)
            outputs.append(y)
        return jnp.concatenate(outputs, 1)

    whole = nnx.jit(lambda layers, x: chain(layers, x)[0])(layers, x)
    np.testing.assert_allclose(stepwise(layers, x), whole, rtol=1e-4, atol=1e-5)


def test_documents_are_separate_and_nan_in_padding_is_not_read():
    layers = [layer_of(layer=i, num_layers=2) for i in range(2)]
    x = rng().normal(size=(1, 9, 6)).astype(np.float32)
    ids = np.array([[3, 3, -1, 3, 0, 0, 0, -1, -1]])
    run = nnx.jit(lambda layers, x, ids: chain(layers, x, segment_ids=ids)[0])
    found = np.asarray(run(layers, np.where((ids < 0)[..., None], np.nan, x), ids))
    for places in ([0, 1, 3], [4, 5, 6]):
        alone = run(layers, x[:, places], np.zeros((1, 3), int))
        np.testing.assert_allclose(found[:, places], alone, rtol=1e-4, atol=1e-5)
    values = rng(1).normal(size=(1, 9, 2, 3)).astype(np.float32)
    later = nnx.jit(lambda layer, x, values: layer(x, segment_ids=ids, v_first=values).output)
    poisoned = np.where((ids < 0)[..., None, None], np.nan, values)
    np.testing.assert_array_equal(later(layers[1], x, poisoned), later(layers[1], x, values))


def test_rotary_positions_turn_both_keys_alike():
    layer = layer_of(head_dim=4, position=Rope())
    # Only where channels of a pair decay and lose alike does a turn of the whole sequence change nothing.
    for part in (layer.decay, layer.rate):
        part.up.kernel[...] *= 0
        part.up.bias[...] = jnp.full(8, -0.5)
    x = jnp.asarray(rng().normal(size=(1, 6, 6)), jnp.float32)
    run = nnx.jit(lambda layer, x, positions: layer(x, positions=positions).output)
    still, turned, moving = (run(layer, x, p) for p in (jnp.zeros(6, int), jnp.full(6, 3), jnp.arange(6)))
    np.testing.assert_allclose(turned, still, rtol=1e-4, atol=1e-4 * np.abs(still).max())
    np.testing.assert_allclose(run(layer, x, 5 + jnp.arange(6)), moving, rtol=1e-4, atol=1e-4 * np.abs(moving).max())
    assert np.abs(moving - still).max() > 1e-2


def test_initial_values_are_the_published_ones():
    layer = Rwkv7(64, 2, layer=1, num_layers=4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    first = Rwkv7(64, 2, rngs=nnx.Rngs(0))
    n = np.arange(64)
    np.testing.assert_allclose(first.mix_key.get_value(), 1 - (n / 64) ** 0.7, atol=1e-6)
    np.testing.assert_allclose(layer.mix_gate.get_value(), 1 - (n / 64) ** (0.2 * 0.75), atol=1e-2)
    zigzag = ((n % 32) - 15.5) / 15.5
    zigzag *= np.abs(zigzag)
    np.testing.assert_allclose(first.decay.up.bias.get_value(), -5.5 + 6 * n / 63 + 2.5 * zigzag, atol=1e-5)
    np.testing.assert_allclose(first.removal_scale.get_value(), 0.71 - 0.1 * (n / 63 - 0.5), atol=1e-6)
    up = np.asarray(first.decay.up.kernel.get_value())
    np.testing.assert_allclose(up @ up.T, 0.01 * np.eye(32), atol=1e-6)
    for part in (first.out.kernel, first.decay.down.kernel, first.gate.down.kernel):
        assert not part.get_value().any()
    assert np.abs(first.key.kernel.get_value()).max() <= 0.05 / 8 < np.abs(first.query.kernel.get_value()).max()
    np.testing.assert_allclose(layer.norm_scale.get_value(), np.full(64, 0.5**0.7), atol=1e-2)
    assert (first.residual, layer.residual.up.bias.shape) == (None, (64,))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_kv_heads": 1}, "num_kv_heads must be num_heads = 2 or None"),
        ({"layer": 1}, "layer must be in"),
        ({"layer": -1}, "layer must be in"),
    ],
    ids=str,
)
def test_layers_that_cannot_be_built_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        Rwkv7(6, 2, rngs=nnx.Rngs(0), **options)
    with pytest.raises(ValueError, match="num_heads must divide features"):
        Rwkv7(7, 2, rngs=nnx.Rngs(0))


def test_first_values_are_wanted_by_later_layers_alone():
    x, values = jnp.ones((1, 3, 6)), jnp.ones((1, 3, 2, 3))
    later = layer_of(layer=1, num_layers=2)
    for call in (lambda: later(x), lambda: layer_of()(x, v_first=values), lambda: later(x, first=values)):
        with pytest.raises(ValueError, match="beside x"):
            call()
    with pytest.raises(ValueError, match="v_first must be"):
        later(x, v_first=values[:, :2])
    with pytest.raises(ValueError, match="v_first must be"):
        later(x, v_first=values[..., :2])
