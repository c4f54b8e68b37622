import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import special

from jattn.mechanisms.vision.nin_block import NiNBlock

B, T, M, H = 2, 7, 4, 5


def tokens(seed=0):
    return np.random.default_rng(seed).normal(size=(B, T, M))


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


def made(**options):
    """A block whose parameters are all drawn, norms and biases too."""
    layer = NiNBlock(M, T, hidden=H, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)
    random = np.random.default_rng(1)
    state = nnx.state(layer, nnx.Param)
    nnx.update(layer, jax.tree.map(lambda a: jnp.asarray(0.5 * random.normal(size=a.shape)), state))
    return layer


def run(layer, x):
    graph, state = nnx.split(layer)
    return np.asarray(jax.jit(lambda state, x: nnx.merge(graph, state)(x).output)(state, x))


def numbers(layer):
    return {".".join(map(str, path)): np.asarray(p[...]) for path, p in nnx.to_flat_state(nnx.state(layer, nnx.Param))}


def norm(p, name, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * p[f"{name}.scale"] + p[f"{name}.bias"]


def linear(p, name, x):
    return x @ p[f"{name}.kernel"] + p[f"{name}.bias"]


def mlp(p, name, x):
    x = linear(p, f"{name}.up", x)
    return linear(p, f"{name}.down", x * 0.5 * (1 + special.erf(x / np.sqrt(2))))


def mixer(p, v):
    v = v + mlp(p, "token_mix", norm(p, "token_norm", v).swapaxes(1, 2)).swapaxes(1, 2)
    return v + mlp(p, "channel_mix", norm(p, "channel_norm", v))


def block(p, x, gate=None):
    inner = norm(p, "norm", x)
    x = x + (linear(p, "project", inner) if gate is None else gate) * mixer(p, inner)
    return x + mlp(p, "feed_forward", norm(p, "norm", x))


def test_it_is_its_definition():
    with jax.enable_x64(True):
        layer = made(token_hidden=3, channel_hidden=6)
        assert layer.token_mix.up.kernel.shape == (T, 3) and layer.channel_mix.up.kernel.shape == (M, 6)
        close(run(layer, tokens()), block(numbers(layer), tokens()))


def test_with_an_open_gate_it_is_an_mlp_mixer():
    with jax.enable_x64(True):
        layer = made()
        layer.project.kernel[...] = np.zeros((M, M))
        layer.project.bias[...] = np.ones(M)
        close(run(layer, tokens()), block(numbers(layer), tokens(), gate=1.0))


def test_with_a_silent_mixer_it_gates_the_token_by_itself():
    with jax.enable_x64(True):
        layer = made()
        for part in (layer.token_mix.down, layer.channel_mix.down):
            part.kernel[...], part.bias[...] = np.zeros(part.kernel.shape), np.zeros(part.bias.shape)
        p, x = numbers(layer), tokens()
        inner = norm(p, "norm", x)
        close(mixer(p, inner), inner)
        half = x + linear(p, "project", inner) * inner
        close(run(layer, x), half + mlp(p, "feed_forward", norm(p, "norm", half)))


def test_tokens_are_permuted_with_a_silent_token_mixer_only():
    with jax.enable_x64(True):
        layer, x, order = made(), tokens(), np.random.default_rng(2).permutation(T)
        assert not np.allclose(run(layer, x[:, order]), run(layer, x)[:, order])
        down = layer.token_mix.down
        down.kernel[...], down.bias[...] = np.zeros(down.kernel.shape), np.zeros(down.bias.shape)
        close(run(layer, x[:, order]), run(layer, x)[:, order])


def test_the_two_halves_share_one_norm():
    names = [path for path in numbers(NiNBlock(M, T, rngs=nnx.Rngs(0))) if path.endswith("norm.scale")]
    assert sorted(names) == ["channel_norm.scale", "norm.scale", "token_norm.scale"]


def test_dropout_draws_and_repeats():
    layer = NiNBlock(M, T, dropout_rate=0.5, rngs=nnx.Rngs(0))
    x = tokens()
    first, again, other = (layer(x, deterministic=False, rngs=jax.random.key(seed)).output for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other) and not np.allclose(first, layer(x).output)
    with pytest.raises(ValueError, match="rngs must be given"):
        layer(x, deterministic=False)


def test_errors():
    with pytest.raises(ValueError, match=r"x must be \[B, 7, 4\]"):
        NiNBlock(M, T, rngs=nnx.Rngs(0))(tokens()[:, :5])
    with pytest.raises(ValueError, match="token_hidden must be at least 1"):
        NiNBlock(M, T, token_hidden=0, rngs=nnx.Rngs(0))
