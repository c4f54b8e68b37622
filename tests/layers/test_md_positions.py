"""Positions on grids: rotations against their angles and against RoPE, decaying sums against loops in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.layers.md_positions import MdLrpe, MdTpe
from jattn.layers.rope import rope


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def angles(grid, per_axis, width, num_leading=0):
    theta = 1e4 ** (-2 * np.arange(per_axis) / width)
    rows = [np.concatenate([n * theta for n in place]) for place in np.ndindex(*grid)]
    return np.array([np.zeros(per_axis * len(grid))] * num_leading + rows)


@pytest.mark.parametrize("num_leading", [0, 2])
@pytest.mark.parametrize(("grid", "width"), [((2, 3), 8), ((6,), 6), ((2, 1, 3), 12)])
def test_rotations_turn_by_the_coordinates(grid, width, num_leading):
    with jax.enable_x64(True):
        tokens = 6 + num_leading
        x = normal(2, tokens, 3, width)
        turn = angles(grid, width // 2 // len(grid), width, num_leading)[:, None]
        first, second = x[..., : width // 2], x[..., width // 2 :]
        cos, sin = np.cos(turn), np.sin(turn)
        expected = np.concatenate([first * cos - second * sin, first * sin + second * cos], -1)
        found = MdLrpe(grid, num_leading=num_leading)(x, np.arange(tokens))
        np.testing.assert_allclose(found, expected, atol=1e-12)
        turn = angles(grid, width // len(grid), width, num_leading)[:, None]
        doubled = MdLrpe(grid, form="cosine", num_leading=num_leading)(x, np.arange(tokens))
        np.testing.assert_allclose(doubled, np.concatenate([x * np.cos(turn), x * np.sin(turn)], -1), atol=1e-12)


def test_one_axis_is_rope():
    x, places = normal(2, 5, 3, 8).astype(np.float32), np.array([[0, 1, 2, 3, 4], [7, 3, 9, 0, 1]])
    np.testing.assert_allclose(MdLrpe((10,))(x, places), rope(x, places), atol=1e-6)


@pytest.mark.parametrize("form", ["rope", "cosine"])
def test_products_depend_on_differences_of_coordinates(form):
    with jax.enable_x64(True):
        grid, (q, k) = (5, 7), normal(2, 1, 1, 1, 8)
        position = MdLrpe(grid, form=form)

        def product(one, other):
            places = [np.array([np.ravel_multi_index(x, grid)]) for x in (one, other)]
            return np.sum(np.multiply(*position.rotate(q, k, *places)))

        expected = product((1, 2), (0, 4))
        assert abs(product((4, 4), (3, 6)) - expected) < 1e-12
        assert abs(product((1, 3), (0, 4)) - expected) > 1e-3
        np.testing.assert_allclose(product((2, 2), (2, 2)), np.sum(q * k), rtol=1e-12)


def plain_sum(x, axis, coefficient, decay):
    """o_t = decay o_{t-1} + coefficient x_t along one axis, head by head; x [B, ..., N, M / N]."""
    rows, state = np.moveaxis(x, axis, 0), 0.0
    out = np.empty_like(rows)
    for t, row in enumerate(rows):
        state = decay[:, None] * state + coefficient[:, None] * row
        out[t] = state
    return np.moveaxis(out, 0, axis)


def tpe(num_axes):
    with jax.enable_x64(True):
        return MdTpe(6, 3, num_axes=num_axes, param_dtype=jnp.float64, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 3, 2)])
def test_decaying_sums_are_the_loop(grid):
    made = tpe(len(grid))
    with jax.enable_x64(True):
        x = normal(2, *grid, 6)
        y = np.zeros_like(x)
        for axis in range(len(grid)):
            q, k, p = (np.asarray(param[axis]) for param in (made.query, made.key, made.decay))
            o = plain_sum(x.reshape(2, *grid, 3, 2), axis + 1, (q * k).sum(-1), 1 / (1 + np.exp(-p)))
            np.testing.assert_allclose(made.summed(jnp.asarray(x), axis), o, atol=1e-12)
            o = o / np.sqrt((o**2).mean(-1, keepdims=True) + 1e-6)
            y += o.reshape(x.shape) @ np.asarray(made.outs[axis].kernel.get_value())
        np.testing.assert_allclose(made(x), y, atol=1e-10)


def test_decaying_sums_are_linear_and_equivariant_to_shifts():
    made = tpe(2)
    with jax.enable_x64(True):
        x, other = (jnp.asarray(normal(1, 4, 5, 6, seed=seed)) for seed in (0, 1))
        for axis in (0, 1):
            both = made.summed(2 * x - other, axis)
            np.testing.assert_allclose(both, 2 * made.summed(x, axis) - made.summed(other, axis), atol=1e-12)
            later = jnp.roll(x.at[:, -1:].set(0), 1, axis=1)
            expected = jnp.roll(made.summed(x, axis), 1, axis=1).at[:, 0].set(0)
            np.testing.assert_allclose(made.summed(later, axis), expected, atol=1e-12)


def test_padding_counts_as_zeros():
    made, x = tpe(1), normal(2, 5, 6)
    mask = np.array([[1, 1, 0, 1, 1], [0, 0, 1, 1, 1]], bool)
    with jax.enable_x64(True):
        found = made(np.where(mask[..., None], x, np.nan), mask)
        np.testing.assert_allclose(found[1, 2:], made(x[:, 2:])[1], atol=1e-12)
        assert np.isfinite(found).all()
        assert not found[~mask].any()


def test_errors():
    for make, message in (
        (lambda: MdLrpe(()), "grid"),
        (lambda: MdLrpe((2, 0)), "grid"),
        (lambda: MdLrpe((2,), form="turn"), "form"),
        (lambda: MdLrpe((2,), num_leading=-1), "num_leading"),
        (lambda: MdLrpe((2, 2))(np.ones((1, 4, 1, 6)), np.arange(4)), "must divide the 3 angles"),
        (lambda: MdLrpe((4,))(np.ones((1, 4, 1, 5)), np.arange(4)), "must divide"),
        (lambda: MdLrpe((2, 2), form="cosine")(np.ones((1, 4, 1, 5)), np.arange(4)), "must divide the 5"),
        (lambda: MdLrpe((4,))(np.ones((1, 4, 6)), np.arange(4)), "x must be"),
        (lambda: MdLrpe((4,))(np.ones((1, 4, 1, 6)), np.arange(3)), "positions"),
        (lambda: MdTpe(6, 4, rngs=nnx.Rngs(0)), "heads must divide"),
        (lambda: MdTpe(6, 3, num_axes=0, rngs=nnx.Rngs(0)), "num_axes"),
        (lambda: MdTpe(6, 3, rngs=nnx.Rngs(0))(np.ones((1, 2, 2, 6))), "x must be"),
        (lambda: MdTpe(6, 3, rngs=nnx.Rngs(0))(np.ones((1, 2, 6)), np.ones((1, 2))), "mask"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
