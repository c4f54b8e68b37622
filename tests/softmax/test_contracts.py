"""The engine's contracts, each with a test of its own, on every implementation that runs here."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from tests.grids import mostly_slow

IMPLEMENTATIONS = ("reference", "blockwise", "triton", "tpu")
BLOCKS = {"reference": None, "blockwise": (8, 8), "triton": (16, 16), "tpu": (128, 128)}
T, S, N, K, D = 19, 19, 4, 2, 8


def length_of(implementation):
    """Tokens in more than one tile, the last one cut off."""
    return 150 if implementation == "tpu" else T


def attend(query, key, value, implementation, bias=None, blocks=None, **arguments):
    return jattn.dot_product_attention(
        query,
        key,
        value,
        bias,
        implementation=implementation,
        block_sizes=blocks or BLOCKS[implementation],
        return_residual=True,
        **arguments,
    )


def value_and_grads(implementation, arrays, **arguments):
    def loss(arrays):
        out, lse = attend(*arrays[:3], implementation, *arrays[3:], **arguments)
        return jnp.sin(out).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum(), (out, lse)

    return jax.jit(jax.grad(loss, has_aux=True))(arrays)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("poison", mostly_slow(["nan", "inf"], ["nan"]))
def test_1_what_nobody_may_see_reaches_nothing(implementation, poison, draw):
    """Padding holds NaN or inf in queries, keys, values and bias; a row without keys gives 0 and -inf."""
    length = length_of(implementation)
    poison = float(poison)
    query, key, value = draw(length, length, N, K, D, D)
    ids = np.array([[0] * 7 + [-1] * 4 + [1] * (length - 14) + [-1] * 3, [-1] * length])
    padding = ids < 0
    bias = jnp.zeros((2, 1, length, length))
    clean = value_and_grads(implementation, (query, key, value, bias), segment_ids=ids, is_causal=True)
    spoil = lambda x: jnp.where(padding[..., None, None], poison, x)  # noqa: E731
    hidden = padding[:, None, :, None] | padding[:, None, None, :]
    dirty = (spoil(query), spoil(key), spoil(value), jnp.where(hidden, poison, bias))
    grads, (out, lse) = value_and_grads(implementation, dirty, segment_ids=ids, is_causal=True)
    for x, y in zip(jax.tree.leaves((grads, out)), jax.tree.leaves((clean[0], clean[1][0])), strict=True):
        assert np.isfinite(x).all()
        np.testing.assert_allclose(x, y, atol=1e-5)
    assert (np.asarray(out)[padding] == 0).all() and (np.asarray(lse)[padding] == -np.inf).all()
    assert (np.asarray(grads[0])[padding] == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_1_cotangents_of_empty_rows_are_ignored(implementation, draw):
    length = length_of(implementation)
    query, key, value = draw(length, length, N, K, D, D)
    ids = np.array([[0] * 7 + [-1] * (length - 7)] * 2)
    pull = jax.vjp(lambda *x: attend(*x, implementation, segment_ids=ids)[0], query, key, value)[1]
    cotangent = jnp.where((ids < 0)[..., None, None], jnp.nan, jnp.ones((2, length, N, D)))
    assert all(np.isfinite(x).all() for x in pull(cotangent))


SHAPES = list(itertools.product((1, 2), (1, N), (1, T), (1, S)))


@pytest.mark.parametrize(
    "shape", mostly_slow(SHAPES, [(1, 1, 1, S), (1, N, T, 1), (2, 1, 1, 1), (2, N, T, S)]), ids=str
)
def test_2_every_broadcast_shape_of_bias_and_mask(shape, draw, x64):
    """Bias with its gradient, and the mask of the same shape, against the reference at full size."""
    query, key, value = draw(T, S, N, K, D, D, jnp.float64)
    rng = np.random.default_rng(2)
    bias, mask = jnp.asarray(rng.standard_normal(shape)), rng.random(shape) < 0.7
    fast = value_and_grads("blockwise", (query, key, value, bias), mask=mask)
    full = (query, key, value, jnp.broadcast_to(bias, (2, N, T, S)))
    grads, values = value_and_grads("reference", full, mask=np.broadcast_to(mask, (2, N, T, S)))
    summed = grads[3].sum(tuple(n for n in range(4) if shape[n] == 1), keepdims=True)
    for x, y in zip(jax.tree.leaves(fast), jax.tree.leaves(((*grads[:3], summed), values)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-11)


@pytest.mark.parametrize("blocks", mostly_slow([(4, 16), (5, 3), (19, 7), (64, 64)], [(5, 3), (64, 64)]), ids=str)
def test_3_tile_sizes_change_nothing_beyond_rounding(blocks, draw, x64):
    query, key, value = draw(T, S, N, K, D, D, jnp.float64)
    arguments = {"mask": jattn.masks.sliding_window(5), "dropout_rate": 0.3, "dropout_key": jax.random.key(3)}
    expected = value_and_grads("reference", (query, key, value), **arguments)
    actual = value_and_grads("blockwise", (query, key, value), blocks=blocks, **arguments)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-11)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_3_two_runs_are_bit_equal(implementation, draw):
    length = length_of(implementation)
    arrays = (*draw(length, length, N, K, D, D), jnp.ones((1, N, length, length)))
    first = value_and_grads(implementation, arrays, is_causal=True)
    second = value_and_grads(implementation, arrays, is_causal=True)
    assert all(
        (np.asarray(x) == np.asarray(y)).all() for x, y in zip(*map(jax.tree.leaves, (first, second)), strict=True)
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_5_dtypes(implementation, draw):
    """The output has the query's dtype; lse is float32, and logits are too: large ones survive bfloat16 inputs."""
    length = length_of(implementation)
    query, key, value = draw(length, length, N, K, D, D, jnp.bfloat16)
    out, lse = attend(query, key, value, implementation)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    exact = attend(*(x.astype(jnp.float32) for x in (query, key, value)), implementation)[1]
    np.testing.assert_allclose(lse, exact, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_7_the_future_changes_no_earlier_bit(implementation, draw):
    length = length_of(implementation)
    query, key, value = draw(length, length, N, K, D, D)
    run = jax.jit(lambda q, k, v: attend(q, k, v, implementation, is_causal=True))
    out, lse = run(query, key, value)
    for cut in (1, 8, length - 6):
        changed = [x.at[:, cut:].set(1e30 * (n + 1)) for n, x in enumerate((query, key, value))]
        other = run(*changed)
        assert (np.asarray(other[0])[:, :cut] == np.asarray(out)[:, :cut]).all()
        assert (np.asarray(other[1])[:, :cut] == np.asarray(lse)[:, :cut]).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_8_one_row_at_a_time_is_the_parallel_result(implementation, draw, x64):
    length = length_of(implementation)
    query, key, value = draw(length, length, N, K, D, D, jnp.float64)
    blocks = (1, 8) if implementation == "blockwise" else None
    run = jax.jit(
        lambda q, k, v, at: attend(q, k, v, implementation, is_causal=True, query_positions=at, blocks=blocks)[0]
    )
    whole = attend(query, key, value, implementation, is_causal=True)[0]
    for t in (0, 7, 8, length - 1):
        row = run(query[:, t : t + 1], key, value, jnp.full((1, 1), t))
        np.testing.assert_allclose(row[:, 0], whole[:, t], atol=1e-13)


def test_9_unknown_implementations_are_named(draw):
    with pytest.raises(ValueError, match="unknown implementation 'flash'.*reference, blockwise"):
        jattn.dot_product_attention(*draw(4, 4, 2, 2, 4, 4), implementation="flash")
