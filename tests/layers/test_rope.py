import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.layers import Rope, rope
from jattn.layers.rope_scaling import (
    SCALINGS,
    DynamicNtkScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NtkScaling,
    YarnScaling,
    plain_frequencies,
)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def plain_rope(x, positions, dim, base, layout):
    """The definition, channel pair by channel pair, in float64."""
    out = np.array(x, np.float64)
    for m in range(dim // 2):
        a, b = (m, m + dim // 2) if layout == "half" else (2 * m, 2 * m + 1)
        angle = np.broadcast_to(positions, x.shape[:2])[..., None] * base ** (-2 * m / dim)
        out[..., a] = x[..., a] * np.cos(angle) - x[..., b] * np.sin(angle)
        out[..., b] = x[..., a] * np.sin(angle) + x[..., b] * np.cos(angle)
    return out


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dim", [8, 6])
def test_definition(layout, dim):
    x = np.asarray(normal(0, 2, 5, 3, 8))
    positions = np.array([[0, 1, 2, 3, 4], [7, 7, 100, 0.5, 3]])
    got = rope(x, positions, base=100.0, layout=layout, rotary_dim=dim)
    np.testing.assert_allclose(got, plain_rope(x, positions, dim, 100.0, layout), atol=2e-5)
    np.testing.assert_array_equal(got[..., dim:], x[..., dim:])


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_logits_depend_on_the_difference_alone(layout):
    with jax.enable_x64(True):
        q, k = (np.random.default_rng(s).normal(size=(1, 6, 1, 8)) for s in range(2))
        pos = np.arange(6.0)
        logits = [
            jnp.einsum("btnd,bsnd->ts", rope(q, pos + shift, layout=layout), rope(k, pos + shift, layout=layout))
            for shift in (0.0, 17.0)
        ]
        np.testing.assert_allclose(logits[0], logits[1], atol=1e-12)
        turned = rope(q, pos, layout=layout)
        np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), np.linalg.norm(q, axis=-1), atol=1e-12)
        np.testing.assert_array_equal(turned[:, 0], q[:, 0])


def test_layouts_differ_by_a_permutation():
    x = normal(1, 1, 4, 2, 8)
    order = np.arange(8).reshape(2, 4).T.ravel()  # half -> interleaved
    half = rope(x, jnp.arange(4))
    other = rope(x[..., order], jnp.arange(4), layout="interleaved")
    np.testing.assert_array_equal(half[..., order], other)


@pytest.mark.parametrize(
    "scaling",
    [
        LinearScaling(1.0),
        NtkScaling(1.0),
        DynamicNtkScaling(1.0, 64, 64),
        DynamicNtkScaling(4.0, 64, 32),
        YarnScaling(1.0, 64),
        YarnScaling(1.0, 64, mscale=0.7, mscale_all_dim=1.0, ramp="turns"),
        Llama3Scaling(1.0, 64),
        LongRopeScaling((1.0,) * 8, 64, 64),
    ],
)
def test_factor_one_is_plain_rope(scaling):
    frequencies, factor = scaling.frequencies(16, 10000.0)
    np.testing.assert_allclose(frequencies, plain_frequencies(16, 10000.0), rtol=1e-14)
    assert factor == 1.0


def test_linear_is_plain_rope_at_positions_over_s():
    x = normal(2, 1, 9, 1, 8)
    got = rope(x, jnp.arange(9), scaling=LinearScaling(4.0))
    np.testing.assert_allclose(got, rope(x, jnp.arange(9) / 4.0), atol=1e-6)


def test_ntk_ends():
    frequencies, _ = NtkScaling(8.0).frequencies(16, 10000.0)
    plain = plain_frequencies(16, 10000.0)
    assert frequencies[0] == 1.0
    np.testing.assert_allclose(frequencies[-1], plain[-1] / 8.0, rtol=1e-12)
    dynamic, _ = DynamicNtkScaling(1.0, 32, 256).frequencies(16, 10000.0)
    np.testing.assert_allclose(dynamic, frequencies, rtol=1e-12)


def test_yarn():
    rule = YarnScaling(32.0, 2048)
    assert rule.bounds(64, 1e4) == (8, 21)
    frequencies, factor = rule.frequencies(64, 1e4)
    plain = plain_frequencies(64, 1e4)
    np.testing.assert_array_equal(frequencies[:9], plain[:9])
    np.testing.assert_allclose(frequencies[21:], plain[21:] / 32.0, rtol=1e-14)
    assert (np.diff(frequencies) < 0).all()
    assert abs(factor - 1.34657) < 5e-6
    assert YarnScaling(4.0, 64, attention_factor=2.0).frequencies(8, 1e4)[1] == 2.0
    ratio = YarnScaling(40.0, 4096, mscale=0.707, mscale_all_dim=1.0).frequencies(64, 1e4)[1]
    assert abs(ratio - (0.0707 * math.log(40) + 1) / (0.1 * math.log(40) + 1)) < 1e-12
    low, high = YarnScaling(32.0, 4096, truncate=False).bounds(64, 150000.0)
    assert low != int(low)
    assert high != int(high)
    # The paper's ramp: frequencies of at least 32 turns within L0 stay, of at most one turn are divided.
    turns = 2048 * plain / (2 * math.pi)
    paper, _ = YarnScaling(32.0, 2048, ramp="turns").frequencies(64, 1e4)
    np.testing.assert_array_equal(paper[turns >= 32], plain[turns >= 32])
    np.testing.assert_allclose(paper[turns <= 1], plain[turns <= 1] / 32.0, rtol=1e-14)


def test_attention_factor_scales_logits_by_its_square():
    q, k = normal(3, 1, 4, 1, 8), normal(4, 1, 4, 1, 8)
    with_c = YarnScaling(8.0, 16, attention_factor=3.0)
    without = YarnScaling(8.0, 16, attention_factor=1.0)
    logits = [
        jnp.einsum("btnd,bsnd->ts", *Rope(scaling=s).rotate(q, k, jnp.arange(4), jnp.arange(4)))
        for s in (with_c, without)
    ]
    np.testing.assert_allclose(logits[0], 9.0 * logits[1], rtol=1e-5, atol=1e-5)


def test_llama3():
    frequencies, _ = Llama3Scaling().frequencies(128, 5e5)
    plain = plain_frequencies(128, 5e5)
    wavelength = 2 * math.pi / plain
    np.testing.assert_array_equal(frequencies[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    long = wavelength > 8192
    np.testing.assert_allclose(frequencies[long], plain[long] / 8.0, rtol=1e-14)
    assert (np.diff(frequencies) < 0).all()


def test_longrope():
    frequencies, factor = LongRopeScaling((1.0, 2.0, 4.0, 8.0), 64, 512).frequencies(8, 1e4)
    np.testing.assert_allclose(frequencies, plain_frequencies(8, 1e4) / [1, 2, 4, 8], rtol=1e-14)
    assert abs(factor - math.sqrt(1 + math.log(8) / math.log(64))) < 1e-12


def test_dtype_is_kept_and_angles_are_float32():
    x = normal(5, 1, 3, 1, 8).astype(jnp.bfloat16)
    got = rope(x, jnp.array([0, 1000, 30000]))
    assert got.dtype == jnp.bfloat16
    truth = plain_rope(np.asarray(x, np.float64), np.array([0, 1000, 30000]), 8, 1e4, "half")
    np.testing.assert_allclose(np.asarray(got, np.float64), truth, atol=0.03)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"x": np.zeros((3, 4, 8))}, "x"),
        ({"positions": np.zeros(4)}, "positions"),
        ({"layout": "pairs"}, "layout"),
        ({"rotary_dim": 3}, "rotary_dim"),
        ({"rotary_dim": 10}, "rotary_dim"),
        ({"scaling": LongRopeScaling((1.0,), 64, 64)}, "factors"),
    ],
)
def test_bad_input_names_the_argument(change, name):
    arguments = {"x": np.zeros((1, 3, 2, 8)), "positions": np.arange(3), **change}
    with pytest.raises(ValueError, match=name):
        rope(**arguments)


def test_bad_rules():
    for make in (
        lambda: LinearScaling(0.0),
        lambda: YarnScaling(2.0, 64, ramp="x"),
        lambda: YarnScaling(2.0, 64, mscale=1.0),
    ):
        with pytest.raises(ValueError, match="Scaling"):
            make()
    assert set(SCALINGS) == {"linear", "ntk", "dynamic_ntk", "yarn", "llama3", "longrope"}
