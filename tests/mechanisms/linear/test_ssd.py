import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.cache import FullCache
from jattn.layers.rope import Rope
from jattn.mechanisms.linear.linear_attention import linear_attention
from jattn.mechanisms.linear.retention import retention
from jattn.mechanisms.linear.ssd import Ssd, ssd
from jattn.models import DecoderLM, TransformerConfig
from jattn.recurrence.api import MODES
from jattn.testing.tolerance import within_policy

T, N, G, D, P = 11, 4, 2, 5, 3


def arrays(seed=0, groups=G, length=T):
    """C, B, x, dt, A, D."""
    r = np.random.default_rng(seed)
    key, query = r.normal(size=(2, 2, length, groups, D))
    value, step = r.normal(size=(2, length, N, P)), r.uniform(0.01, 1.5, (2, length, N))
    return query, key, value, step, -r.uniform(0.1, 2, N), r.normal(size=N)


def loop(query, key, value, step, rate, skip=None, ids=None):
    """The recurrence of the paper, token by token, document by document."""
    query, key = (x.repeat(N // x.shape[2], 2) for x in (query, key))
    out, final = np.zeros(value.shape), np.zeros((2, N, D, P))
    for row in range(2):
        state, last = np.zeros((N, D, P)), None
        for t in range(value.shape[1]):
            own = 0 if ids is None else ids[row, t]
            if own < 0:
                continue
            state = state if last in (None, own) else np.zeros_like(state)
            x, dt, last = value[row, t], step[row, t][:, None, None], own
            state = np.exp(dt * rate[:, None, None]) * state + dt * key[row, t][:, :, None] * x[:, None]
            out[row, t] = np.einsum("nd,ndp->np", query[row, t], state)
            out[row, t] += 0 if skip is None else skip[:, None] * x
        final[row] = state
    return out, final


def close(actual, expected, rtol=1e-9, atol=1e-10):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("mode", MODES)
def test_it_is_its_recurrence(mode):
    with jax.enable_x64(True):
        given = arrays()
        out, state = ssd(*given, mode=mode, chunk_size=4, return_final_state=True)
        close(out, loop(*given)[0])
        close(state, loop(*given)[1])


def test_documents_and_padding():
    with jax.enable_x64(True):
        given = arrays(groups=1)
        ids = np.array([[0, 0, 0, 1, 1, -1, 1, 2, 2, 2, 2], [3, 3, -1, -1, 3, 3, 3, 3, 3, 3, -1]])
        expected, last = loop(*given, ids=ids)

        def dirty(x):
            return x if x.ndim == 1 else jnp.where((ids >= 0).reshape(2, T, *(1,) * (x.ndim - 2)), x, jnp.nan)

        def run(*given):
            return ssd(*map(dirty, given), segment_ids=ids, chunk_size=4, return_final_state=True)

        out, state = run(*given)
        close(out, expected)
        close(state, last)
        gradients = jax.jit(jax.grad(lambda *given: run(*given)[0].sum(), tuple(range(6))))(*map(jnp.asarray, given))
        assert all(np.isfinite(g).all() for g in gradients)


def test_gradients_of_steps_rates_and_skips():
    with jax.enable_x64(True):
        given = tuple(map(jnp.asarray, arrays()))

        def plain(query, key, value, step, rate, skip):
            query, key = (jnp.repeat(x, N // G, 2) for x in (query, key))
            sums = jnp.cumsum(step * rate, 1)
            decay = jnp.where(np.tri(T, dtype=bool)[:, :, None], jnp.exp(sums[:, :, None] - sums[:, None]), 0)
            weights = jnp.einsum("btnd,bsnd->btsn", query, key) * decay
            return jnp.einsum("btsn,bsn,bsnp->btnp", weights, step, value) + skip[:, None] * value

        def loss(function, *given):
            return jnp.sum(jnp.sin(function(*given)))

        found, expected = (
            jax.jit(jax.grad(functools.partial(loss, f), tuple(range(6))))(*given)
            for f in (functools.partial(ssd, chunk_size=4), plain)
        )
        jax.tree.map(functools.partial(close, rtol=1e-8), found, expected)


def test_without_decay_it_is_linear_attention():
    with jax.enable_x64(True):
        query, key, value, *_ = arrays(groups=N)
        expected = linear_attention(
            query, key, value, is_causal=True, feature_map="identity", normalize=False, scale=1.0
        )
        close(ssd(query, key, value, np.ones((2, T, N)), np.zeros(N)), expected)


def test_with_constant_steps_it_is_retention():
    with jax.enable_x64(True):
        query, key, value, _, rate, _ = arrays(groups=N)
        step = 0.7
        expected = step * D**0.5 * retention(query, key, value, log_decay=step * rate)
        close(ssd(query, key, value, np.full((2, T, N), step), rate), expected)


def test_the_skip_sees_the_value_itself():
    with jax.enable_x64(True):
        query, key, value, step, rate, skip = arrays()
        close(ssd(query, key, value, 0 * step, rate, skip), skip[:, None] * value)
        with_skip, without = (ssd(query, key, value, step, rate, s) for s in (skip, None))
        close(with_skip - without, skip[:, None] * value)


def test_strong_steps_leave_mild_ones_their_digits():
    query, key, value, step, rate, skip = arrays(length=64)
    step[:, 20], step[:, 33], step[:, 40, :2] = 1e4, 30 / abs(rate), 0
    exact, _ = loop(*(x.astype(np.float32).astype(np.float64) for x in (query, key, value, step, rate, skip)))
    narrow = tuple(jnp.asarray(x, jnp.float32) for x in (query, key, value, step, rate, skip))
    complaint = within_policy(np.asarray(ssd(*narrow)), exact, np.asarray(ssd(*narrow, mode="recurrent")))
    assert not complaint, complaint
    gradients = jax.jit(jax.grad(lambda *given: ssd(*given).sum(), tuple(range(6))))(*narrow)
    assert all(np.isfinite(g).all() for g in gradients)


def test_what_does_not_fit_is_refused():
    query, key, value, step, rate, skip = (x.astype(np.float32) for x in arrays())
    for given, word in (
        ((query[0], key, value, step, rate), "query"),
        ((query, key, value, step[..., :2], rate), "time_step"),
        ((query, key, value, step, rate[:2]), "decay_rate"),
        ((query, key, value, step, rate, skip[:1]), "skip"),
        ((query[:, :, [0, 0, 0]], key, value, step, rate), "heads of query"),
        ((query, key[..., :2], value, step, rate), "key"),
    ):
        with pytest.raises(ValueError, match=word):
            ssd(*given)
    for options, word in (
        ({"num_kv_heads": 2}, "num_groups"),
        ({"num_groups": 3}, "num_groups"),
        ({"dt_limit": (1.0, 0.5)}, "dt_limit"),
        ({"dt_range": (0.0, 0.5)}, "dt_range"),
        ({"expand": 1, "features": 6}, "num_heads must divide"),
    ):
        with pytest.raises(ValueError, match=word):
            Ssd(options.pop("features", 8), 4, **options, rngs=nnx.Rngs(0))


M = 6


def make(param_dtype=jnp.float64, **options):
    options = {"state_dim": D, "num_groups": G, "chunk_size": 4} | options
    return Ssd(M, N, param_dtype=param_dtype, rngs=nnx.Rngs(0), **options)


def tokens():
    return np.random.default_rng(5).normal(size=(2, T, M))


def silu(x):
    return x / (1 + np.exp(-x))


def by_hand(layer, u, limits=(0.0, np.inf)):
    """The layer in numpy."""
    p = {"/".join(map(str, path)): np.asarray(v.get_value()) for path, v in nnx.to_flat_state(nnx.state(layer))}
    inner = p["out/kernel"].shape[0]
    wide = np.concatenate([np.zeros((2, 3, inner + 2 * G * D)), u @ p["inputs/kernel"]], 1)
    mixed = silu(sum(p["conv/kernel"][w] * wide[:, w : w + T] for w in range(4)) + p["conv/bias"])
    x, key, query = mixed[..., :inner], mixed[..., inner : inner + G * D], mixed[..., inner + G * D :]
    step = np.clip(np.log1p(np.exp(u @ p["steps/kernel"] + p["step_bias"])), *limits)
    heads = (x.reshape(2, T, N, -1), step, -np.exp(p["log_rate"]), p["skip"])
    y = loop_of(query.reshape(2, T, G, D), key.reshape(2, T, G, D), *heads).reshape(2, T, inner)
    y = (y * silu(u @ p["gate/kernel"])).reshape(2, T, G, -1)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5)
    return (y.reshape(2, T, inner) * p["norm_scale"]) @ p["out/kernel"]


def loop_of(*given):
    return loop(*given)[0]


def test_the_layer_is_its_definition():
    with jax.enable_x64(True):
        for options in ({}, {"dt_limit": (0.02, 0.05)}):
            layer = make(head_dim=P, **options)
            layer.norm_scale[...] = jnp.linspace(0.5, 2, N * P)
            layer.skip[...] = jnp.linspace(-1, 2, N)
            close(layer(tokens()).output, by_hand(layer, tokens(), *options.values()))
        assert make().out.in_features == 2 * M


def test_it_decodes_from_its_state_and_the_tail_of_the_convolution():
    with jax.enable_x64(True):
        layer, x, policy = make(head_dim=P), tokens(), FullCache(T)
        expected = nnx.jit(lambda layer, x: layer(x).output)(layer, x)
        step = nnx.jit(lambda layer, x, cache, ids: layer(x, cache=(policy, cache), segment_ids=ids)[:2])
        cache = layer.init_cache(policy, 2, jnp.float64)
        assert (cache.state.shape, cache.conv.shape) == ((2, N, D, P), (2, 3, N * P + 2 * G * D))
        found = []
        for start, stop in ((0, 4), (4, 5), (5, T)):
            part = np.concatenate([np.full((2, 1, M), np.nan), x[:, start:stop]], 1)
            ids = np.array([[-1] + [0] * (stop - start)] * 2)
            y, cache = step(layer, part, cache, ids)
            assert not y[:, 0].any()
            found.append(y[:, 1:])
        close(np.concatenate(found, 1), expected)


def test_initial_values():
    layer = Ssd(64, 64, dt_range=(1e-2, 1e-1), rngs=nnx.Rngs(0))
    steps, rates = jax.nn.softplus(layer.step_bias.get_value()), jnp.exp(layer.log_rate.get_value())
    assert 0.0099 < steps.min() < 0.02
    assert 0.05 < steps.max() < 0.1001
    assert 1 <= rates.min() < 3
    assert 14 < rates.max() <= 16.001
    assert (layer.skip.get_value() == 1).all()


def test_it_stands_in_models_and_turns_with_their_positions():
    config = TransformerConfig(vocab_size=7, features=8, num_layers=1, num_heads=2, position="rope")
    model = DecoderLM(config, attention="Ssd", attention_options={"state_dim": 4}, rngs=nnx.Rngs(0))
    assert model(jnp.asarray([[3, 1, 4]])).logits.shape == (1, 3, 7)
    with jax.enable_x64(True):
        turned = make(state_dim=4, position=Rope())
        run = nnx.jit(lambda layer, x, start: layer(x, positions=start + np.arange(T)).output)
        out = run(turned, tokens(), 0)
        close(run(turned, tokens(), 70), out)
        assert abs(run(make(state_dim=4), tokens(), 0) - out).max() > 1e-3
