import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import fft

from jattn.layers.long_conv import HyenaFilter, ImplicitFilterRelu, causal_long_conv, fft_conv, filter_features

# 137 tokens: blocks of blocks, none of them full.
T, M = 137, 3


def rng(seed=0):
    return np.random.default_rng(seed)


def direct(u, h, ids=None):
    """The definition, token by token; a row of h for each row of u."""
    y = np.zeros_like(u)
    for row in range(len(u)):
        places = [t for t in range(u.shape[1]) if ids is None or ids[row, t] >= 0]
        run, runs = 0, []
        for n, t in enumerate(places):
            run += bool(n and ids is not None and ids[row, t] != ids[row, places[n - 1]])
            runs.append(run)
        for n, t in enumerate(places):
            for m in range(max(0, n + 1 - h.shape[-2]), n + 1):
                if runs[n] == runs[m]:
                    y[row, t] += h[row, n - m] * u[row, places[m]]
    return y


def packed(length, seed=1):
    """Documents with padding before, between and behind them; the second row is padding alone."""
    r = rng(seed)
    ids = np.sort(r.integers(0, 5, size=(2, length)), 1)
    ids[0, r.random(length) < 0.2] = -1
    ids[1] = -1
    ids[0, : length // 8] = -1
    return ids


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("length", "has_rows", "is_packed"),
    [(1, False, True), (64, False, True), (T, True, True), (6, True, False), (T, False, False)],
)
def test_the_causal_form_is_its_definition(length, has_rows, is_packed):
    r = rng()
    u, h = r.normal(size=(2, length, M)), r.normal(size=(2, length, M) if has_rows else (length, M))
    ids = packed(length) if is_packed else None
    with jax.enable_x64(True):
        close(jax.jit(fft_conv)(u, h, segment_ids=ids), direct(u, np.broadcast_to(h, (2, length, M)), ids))


def test_taps_may_be_fewer_or_more_than_tokens():
    u, h = rng().normal(size=(1, 70, M)), rng(1).normal(size=(90, M))
    run = jax.jit(fft_conv, static_argnames="mode")
    with jax.enable_x64(True):
        close(run(u, h[:5]), direct(u, h[None, :5]))
        close(run(u, h), direct(u, h[None, :70]))
        close(run(u, np.pad(h[:5], [(0, 65), (0, 0)]), "circular"), run(u, h[:5], "circular"))


def test_circular_and_dct_are_their_definitions():
    u, h = rng().normal(size=(2, 11, M)), rng(1).normal(size=(11, M))
    rolled = sum(h[s][None, None] * np.roll(u, s, axis=1) for s in range(11))
    spectrum = fft.dct(u, norm="ortho", axis=1) * fft.dct(h, norm="ortho", axis=0)
    run = jax.jit(fft_conv, static_argnames="mode")
    with jax.enable_x64(True):
        close(run(u, h, "circular"), rolled)
        close(run(u, h, "dct"), fft.idct(spectrum, norm="ortho", axis=1))
        both = np.stack([h, 2 * h])
        close(run(u, both, "circular"), np.array([1, 2])[:, None, None] * rolled)


def test_causal_means_causal_bit_for_bit():
    u, h = rng().normal(size=(2, T, M)).astype(np.float32), rng(1).normal(size=(T, M)).astype(np.float32)
    run = jax.jit(fft_conv)
    for start in (1, 64, 100):
        changed = u.copy()
        changed[:, start:] *= 1e20
        np.testing.assert_array_equal(run(changed, h)[:, :start], run(u, h)[:, :start])
    gradient = jax.jit(jax.grad(lambda u: jnp.sum(fft_conv(u, h)[:, :77] ** 2)))(u)
    assert not np.asarray(gradient)[:, 77:].any()


def test_padding_reaches_nothing():
    u, h, ids = rng().normal(size=(2, T, M)), rng(1).normal(size=(T, M)), packed(T)
    poisoned = np.where(ids[..., None] >= 0, u, np.nan)
    run = jax.jit(jax.value_and_grad(lambda u, h: jnp.sum(jnp.sin(fft_conv(u, h, segment_ids=ids))), (0, 1)))
    jax.tree.map(np.testing.assert_array_equal, run(poisoned, h), run(u, h))


def test_gradients_are_those_of_the_definition():
    u, h, ids = rng().normal(size=(2, T, M)), rng(1).normal(size=(T, M)), packed(T)
    same = (ids[:, :, None] == ids[:, None]) & (ids >= 0)[:, None]
    place = np.cumsum(ids >= 0, axis=1)
    distance = place[:, :, None] - place[:, None]
    seen = same & (distance >= 0) & (ids >= 0)[..., None]

    def dense(u, h):
        return jnp.einsum("bts,btsm,bsm->btm", seen, h[np.clip(distance, 0, None)], u)

    def loss(f, u, h):
        return jnp.sum(jnp.sin(f(u, h)))

    with jax.enable_x64(True):
        fast = jax.jit(jax.grad(lambda *x: loss(lambda u, h: fft_conv(u, h, segment_ids=ids), *x), (0, 1)))(u, h)
        jax.tree.map(close, fast, jax.jit(jax.grad(lambda *x: loss(dense, *x), (0, 1)))(u, h))


def test_in_float32_it_is_as_exact_as_one_transform():
    u, h = rng().normal(size=(2, 512, M)), rng(1).normal(size=(512, M))
    narrow = [x.astype(np.float32) for x in (u, h)]
    run = jax.jit(fft_conv)
    with jax.enable_x64(True):
        truth = run(u, h)

    def whole(u, h):
        return jnp.fft.irfft(jnp.fft.rfft(u, 1024, axis=1) * jnp.fft.rfft(h, 1024, axis=0), 1024, axis=1)[:, :512]

    errors = [np.sqrt(np.mean((f(*narrow) - truth) ** 2)) for f in (run, jax.jit(whole))]
    assert errors[0] <= errors[1]
    assert jax.eval_shape(fft_conv, jnp.asarray(narrow[0], jnp.bfloat16), narrow[1]).dtype == jnp.bfloat16


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_tail_continues_exactly(is_packed):
    length, taps = 23, 9
    x, h = rng().normal(size=(2, length, M)), rng(1).normal(size=(taps, M))
    ids = np.where(packed(length) >= 0, 0, -1) if is_packed else None

    @jax.jit
    def run(x, ids, tail):
        return causal_long_conv(x, h, segment_ids=ids, tail=tail)

    with jax.enable_x64(True):
        whole, last = run(x, ids, None)
        close(whole, direct(x, np.broadcast_to(h, (2, taps, M)), ids))
        for parts in ((5, 6, length), tuple(range(1, length + 1))):
            tail, outputs, start = np.zeros((2, taps - 1, M)), [], 0
            for stop in parts:
                y, tail = run(x[:, start:stop], None if ids is None else ids[:, start:stop], tail)
                outputs.append(y)
                start = stop
            close(np.concatenate(outputs, 1), whole)
            close(tail, last)


def test_a_tail_belongs_to_the_first_document():
    x, h = rng().normal(size=(1, 8, M)), rng(1).normal(size=(5, M))
    ids = np.array([[2, 2, 2, -1, 2, 7, 7, -1]])
    tail = np.concatenate([np.zeros((1, 1, M)), x[:, :3]], 1)
    run = jax.jit(lambda x, ids: causal_long_conv(x, h, segment_ids=ids, tail=tail))
    with jax.enable_x64(True):
        y, last = run(x[:, 3:], ids[:, 3:])
        close(y, direct(x, h[None], ids)[:, 3:])
        close(last, np.concatenate([np.zeros((1, 2, M)), x[:, 5:7]], 1))


def test_features_of_places():
    features = filter_features(4, 5, 6)
    t = np.arange(4) / 5
    waves = 2 * np.pi * np.arange(4)[:, None] / 6 * np.array([1e-4, 1.0])
    close(features, np.concatenate([t[:, None], np.cos(waves), -np.sin(waves)], 1))
    assert filter_features(1, 3).tolist() == [[0.0, 1.0, -0.0]]


def test_filters_are_their_definitions():
    with jax.enable_x64(True):
        double = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        small = ImplicitFilterRelu(M, max_length=9, **double)
        (w1, b1), (w2, b2) = (
            (np.asarray(x.kernel[...]), np.asarray(x.bias[...]) + 0.1) for x in (small.up, small.down)
        )
        small.up.bias[...], small.down.bias[...] = b1, b2
        z = filter_features(5, 3, 9)
        close(small(5), np.maximum(z @ w1 + b1, 0) @ w2 + b2)

        sines = HyenaFilter(M, emb_dim=5, hidden=4, inner_layers=1, **double)
        assert [p.size for p in jax.tree.leaves(nnx.state(sines, nnx.Param)) if p.shape == (4,)] == [4, 4, 4]
        sines.frequency[...] = np.array([10.0, 3.0, 1.0, 0.5])
        z = filter_features(7, 5)
        y = z
        for layer in sines.layers:
            y = np.sin(np.array([10.0, 3.0, 1.0, 0.5]) * (y @ np.asarray(layer.kernel[...]) + layer.bias[...]))
        window = np.exp(-z[:, :1] * np.linspace(-np.log(0.01) / 1.5, -np.log(0.01) / 0.3, M))
        close(sines(7), y @ np.asarray(sines.down.kernel[...]) * window)
        close(window[-1, [0, -1]], [0.01 ** (1 / 1.5), 0.01 ** (1 / 0.3)])
        bare = HyenaFilter(M, emb_dim=5, hidden=4, inner_layers=1, window=False, **{**double, "rngs": nnx.Rngs(0)})
        assert bare(7).shape == (7, M) and sines.down.bias is None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fft_conv(np.ones((1, 4, 2)), np.ones((4, 3))), "u must be"),
        (lambda: fft_conv(np.ones((2, 4, 2)), np.ones((3, 4, 2))), "u must be"),
        (lambda: fft_conv(np.ones((1, 4, 2)), np.ones((4, 2)), "full"), "mode must be"),
        (lambda: fft_conv(np.ones((1, 4, 2)), np.ones((5, 2)), "circular"), "at most 4 taps"),
        (lambda: fft_conv(np.ones((1, 4, 2)), np.ones((4, 2)), "dct", segment_ids=np.zeros((1, 4), int)), "mixes"),
        (lambda: causal_long_conv(np.ones((1, 4, 2)), np.ones((4, 3))), "kernel"),
        (lambda: causal_long_conv(np.ones((1, 4, 2)), np.ones((4, 2)), tail=np.ones((1, 4, 2))), "tail must be"),
        (lambda: filter_features(4, 4), "emb_dim must be odd"),
        (lambda: filter_features(4, 3, 3), "length at most 3"),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()
