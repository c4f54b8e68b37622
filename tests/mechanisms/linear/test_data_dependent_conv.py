import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import fft

from jattn import masks
from jattn.layers.neighbor_conv import NeighborConv
from jattn.layers.rope import Rope
from jattn.mechanisms.linear.data_dependent_conv import OrchidOperator, adaptive_kernel, data_dependent_conv

B, T, M = 2, 9, 4


def tokens(seed=0, length=T):
    return np.random.default_rng(seed).normal(size=(B, length, M))


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-11)


def circular(h, x):
    return sum(h[..., s : s + 1, :] * np.roll(x, s, axis=1) for s in range(x.shape[1]))


def correlation(k, q):
    """sum_s k_s q_{s + t}."""
    return np.stack([(k * np.roll(q, -t, axis=1)).sum(1) for t in range(q.shape[1])], 1)


def test_kernels_are_their_definitions():
    q, k = tokens(), tokens(1)
    with jax.enable_x64(True):
        close(adaptive_kernel(q, causal_kernel=False), correlation(q, q))
        close(adaptive_kernel(q, k, causal_kernel=False), correlation(k, q))
        close(adaptive_kernel(q, power=1, causal_kernel=False), fft.irfft(np.abs(fft.rfft(q, axis=1)), T, axis=1))
        wide = [np.pad(x, [(0, 0), (0, T), (0, 0)]) for x in (q, k)]
        close(adaptive_kernel(q), correlation(wide[0], wide[0])[:, :T])
        close(adaptive_kernel(q, k), correlation(wide[1], wide[0])[:, :T])
        cosines = [fft.dct(x, norm="ortho", axis=1) for x in (q, k)]
        for causal in (False, True):
            options = {"transform": "dct", "causal_kernel": causal}
            close(adaptive_kernel(q, **options), fft.idct(np.abs(cosines[0]), norm="ortho", axis=1))
            close(adaptive_kernel(q, k, **options), fft.idct(cosines[0] * cosines[1], norm="ortho", axis=1))
        spectrum = fft.rfft(q, axis=1)
        bent = np.conj(fft.rfft(k, axis=1)) * (np.tanh(spectrum.real) + 1j * np.tanh(spectrum.imag))
        close(adaptive_kernel(q, k, sigma="tanh", causal_kernel=False), fft.irfft(bent, T, axis=1))


@pytest.mark.parametrize("length", [T, 6])
def test_the_convolution_is_circular_and_follows_shifts(length):
    x, c, h = tokens(0, length), tokens(1, length), tokens(2, length)[0]

    def run(x, c, h):
        return data_dependent_conv(x, c, h, causal_kernel=False)

    with jax.enable_x64(True):
        close(run(x, c, h), circular(h[None] + correlation(c, c), x))
        close(run(x, np.roll(c, 2, 1), h), run(x, c, h))
        shifted = np.roll(x, 3, 1)
        close(run(shifted, shifted, h), np.roll(run(x, x, h), 3, 1))
        close(data_dependent_conv(x, c, np.zeros((length, M)), power=2), data_dependent_conv(x, c))


def test_type_2_with_equal_sequences_is_type_1():
    x, c = tokens(), tokens(1)
    with jax.enable_x64(True):
        for options in ({"causal_kernel": False}, {"causal_kernel": True}, {"transform": "dct", "power": 2}):
            close(
                data_dependent_conv(x, c, other=c, **{**options, "power": None}), data_dependent_conv(x, c, **options)
            )
        kernel = np.asarray(adaptive_kernel(c, c, causal_kernel=False))
        close(kernel, np.roll(kernel[:, ::-1], 1, axis=1))  # even


def test_a_static_kernel_alone_is_a_fixed_convolution():
    x, h = tokens(), tokens(1)[0]
    with jax.enable_x64(True):
        close(data_dependent_conv(x, 0 * x, h), circular(h[None], x))
        cosines = fft.idct(fft.dct(x, norm="ortho", axis=1) * fft.dct(h, norm="ortho", axis=0), norm="ortho", axis=1)
        close(data_dependent_conv(x, 0 * x, h, transform="dct"), cosines)
        delta = np.zeros((T, M))
        delta[0] = 1
        close(data_dependent_conv(x, 0 * x, delta), x)


def out(layer, x, context=None):
    graph, state = nnx.split(layer)
    return np.asarray(jax.jit(lambda state, x, c: nnx.merge(graph, state)(x, c).output)(state, x, context))


def made(**options):
    small = {"filter_dim": 5, "filter_layers": 1, "frequency": 2.0}
    return OrchidOperator(M, 2, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **small, **options)


def numbers(layer):
    """The parameters by path, as numpy arrays."""
    return {".".join(map(str, path)): np.asarray(p[...]) for path, p in nnx.to_flat_state(nnx.state(layer, nnx.Param))}


def neighbors(p, name, x, padding="constant"):
    """NeighborConv by its definition, `[B, T, M, i]` -> `[B, T, M, o]`."""
    kernel, bias = p[f"{name}.kernel"], p[f"{name}.bias"]
    around = np.pad(x, [(0, 0), (1, 1), (0, 0), (0, 0)], mode=padding)
    y = np.zeros((*x.shape[:3], kernel.shape[3])) + bias
    for n in range(x.shape[1]):
        for w in range(3):
            for i in range(kernel.shape[2]):
                y[:, n] += around[:, n + w, :, i, None] * kernel[w, :, i]
    flat = y.reshape(*y.shape[:2], -1)
    flat = (flat - flat.mean(-1, keepdims=True)) / np.sqrt(flat.var(-1, keepdims=True) + 1e-5)
    return (flat * p[f"{name}.norm.scale"] + p[f"{name}.norm.bias"]).reshape(y.shape)


def expected(layer, x, context, conditioning, transform, causal, padding):
    """The layer by its definition."""
    p = numbers(layer)
    is_fft = transform == "fft"

    def forward(x):
        return fft.rfft(x, 2 * T if causal else T, axis=1) if is_fft else fft.dct(x, norm="ortho", axis=1)

    def convolved(h, x):
        if is_fft:
            return circular(h, x)
        both = (fft.dct(a, norm="ortho", axis=-2) for a in (h, x))
        return fft.idct(np.multiply(*both), norm="ortho", axis=1)

    u, c = (a @ p["project.kernel"] + p["project.bias"] for a in (x, context))
    short = np.zeros_like(u) + p["short.bias"]
    for w in range(3):
        short[:, w:] += p["short.kernel"][2 - w] * u[:, : T - w]
    x0, x1, x2 = np.split(short, 3, axis=-1)
    wrap = "wrap" if padding == "circular" else "constant"
    c = c[..., 2 * M :, None]
    spectrum = forward(neighbors(p, "condition", c, wrap)[..., 0])
    if conditioning == "correlation":
        spectrum = np.conj(forward(neighbors(p, "other", c, wrap)[..., 0])) * spectrum
        parts = np.stack([spectrum.real, spectrum.imag], -1) if is_fft else spectrum[..., None]
    else:
        parts = np.abs(spectrum)[..., None] ** (2 if is_fft else 1)
    found = neighbors(p, "respond", parts)
    if is_fft:
        h = fft.irfft(found[..., 0] + 1j * found[..., 1], 2 * T if causal else T, axis=1)[:, :T]
    else:
        h = fft.idct(found[..., 0], norm="ortho", axis=1)
    h = h + np.asarray(layer.kernel(T))
    z = x1 * x2
    y = x0 * (convolved(h, z) + p["skip"] * z)
    y = y + convolved(np.asarray(layer.residual_kernel(T))[None], x) + p["residual_skip"] * x
    return y @ p["out.kernel"] + p["out.bias"]


@pytest.mark.parametrize(
    ("conditioning", "transform", "causal", "padding"),
    [
        ("magnitude", "fft", True, "zeros"),
        ("magnitude", "dct", True, "zeros"),
        ("correlation", "fft", False, "circular"),
        ("correlation", "fft", True, "zeros"),
        ("correlation", "dct", False, "zeros"),
    ],
)
def test_the_layer_is_its_definition(conditioning, transform, causal, padding):
    options = {"conditioning": conditioning, "transform": transform, "causal_kernel": causal, "padding": padding}
    with jax.enable_x64(True):
        layer, x, c = made(**options), tokens(), tokens(1)
        for name in ("project", "short", "out"):
            bias = getattr(layer, name).bias
            bias[...] = np.linspace(-1, 1, bias.size)
        close(out(layer, x), expected(layer, x, x, *options.values()))
        close(out(layer, x, c), expected(layer, x, c, *options.values()))


@pytest.mark.parametrize("conditioning", ["magnitude", "correlation"])
def test_the_layer_follows_circular_shifts(conditioning):
    with jax.enable_x64(True):
        options = {"conditioning": conditioning, "short_width": 1, "causal_kernel": False}
        x = tokens()
        exact, padded = made(padding="circular", **options), made(padding="zeros", **options)
        close(out(exact, np.roll(x, 4, 1)), np.roll(out(exact, x), 4, 1))
        assert not np.allclose(out(padded, np.roll(x, 4, 1)), np.roll(out(padded, x), 4, 1))


def test_without_projections_the_residual_convolution_is_left():
    with jax.enable_x64(True):
        layer, x = made(), tokens()
        for p in (layer.project.kernel, layer.project.bias, layer.short.bias):
            p[...] = np.zeros(p.shape)
        y = circular(np.asarray(layer.residual_kernel(T))[None], x) + np.asarray(layer.residual_skip[...]) * x
        close(out(layer, x), y @ np.asarray(layer.out.kernel[...]) + np.asarray(layer.out.bias[...]))


def test_without_the_response_the_static_kernel_is_left():
    with jax.enable_x64(True):
        layer, x = made(), tokens()
        layer.respond.norm.scale[...] = np.zeros(2 * M)
        layer.respond.norm.bias[...] = np.zeros(2 * M)
        close(out(layer, x, tokens(5)), out(layer, x))


def test_neighbors_of_a_short_row():
    with jax.enable_x64(True):
        for padding, mode in (("zeros", "constant"), ("circular", "wrap")):
            layer = NeighborConv(M, inputs=2, outputs=3, padding=padding, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
            p = {f"it.{name}": value for name, value in numbers(layer).items()}
            for length in (1, 4):
                x = np.random.default_rng(3).normal(size=(B, length, M, 2))
                close(layer(jnp.asarray(x)), neighbors(p, "it", x, mode))


@pytest.mark.slow
def test_heads_can_be_seen_and_replaced():
    layer = OrchidOperator(M, 2, residual_conv=False, rngs=nnx.Rngs(0))
    seen = []
    y = layer(tokens(), tap=lambda name, o: (seen.append((name, o.shape)), 0 * o)[1]).output
    assert seen == [("head_out", (B, T, 2, M // 2))]
    np.testing.assert_array_equal(y, np.broadcast_to(layer.out.bias[...], y.shape))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda layer, x: layer(x, mask=masks.causal()), "no mask"),
        (lambda layer, x: layer(x, segment_ids=np.zeros((B, T), int)), "no segment_ids"),
        (lambda layer, x: layer(x, x[:, :4]), "x and context must be"),
        (lambda layer, x: OrchidOperator(M, conditioning="phase", rngs=nnx.Rngs(0)), "conditioning must be"),
        (lambda layer, x: OrchidOperator(M, transform="dft", rngs=nnx.Rngs(0)), "transform must be"),
        (lambda layer, x: OrchidOperator(M, 3, rngs=nnx.Rngs(0)), "num_heads must divide"),
        (lambda layer, x: OrchidOperator(M, position=Rope(), rngs=nnx.Rngs(0)), "no position"),
        (lambda layer, x: OrchidOperator(M, padding="reflect", rngs=nnx.Rngs(0)), "padding must be"),
        (lambda layer, x: OrchidOperator(M, condition_width=4, rngs=nnx.Rngs(0)), "width must be odd"),
        (lambda layer, x: adaptive_kernel(x, x[:, :4]), "condition, and other"),
        (lambda layer, x: adaptive_kernel(x, x, sigma="relu"), "sigma must be"),
        (lambda layer, x: data_dependent_conv(x, x[:, :4]), "condition must be shaped like x"),
        (lambda layer, x: data_dependent_conv(x, x, x), "kernel must be"),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call(OrchidOperator(M, filter_dim=2, rngs=nnx.Rngs(0)), tokens())
