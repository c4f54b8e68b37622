"""Joining partial attentions: the softmax over all keys, whatever the parts; and sinks, at the end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.softmax.merge import join_sinks
from jattn.testing.workbench import quick_jit

B, T, S, N, K, D = 2, 5, 12, 4, 2, 3


def arrays(dtype=np.float64):
    rng = np.random.default_rng(0)
    shapes = ((B, T, N, D), (B, S, K, D), (B, S, K, D))
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def merged(query, key, value, cuts, sinks):
    edges = (0, *cuts, S)
    parts = []
    for lo, hi in zip(edges, edges[1:], strict=False):
        # Causal, so that early rows see nothing of late parts.
        part = key[:, lo:hi], value[:, lo:hi]
        places = jnp.arange(lo, hi)[None]
        parts.append(attend(query, *part, key_positions=places))
    out, lse = jattn.merge_lse(*parts)
    return (out if sinks is None else join_sinks(out, lse, sinks)), lse


def attend(query, key, value, **arguments):
    return jattn.dot_product_attention(query, key, value, is_causal=True, return_residual=True, **arguments)


def results(call):
    """(gradients, (out, lse)) of call(query, key, value, sinks)."""

    def loss(inputs):
        out, lse = call(*inputs)
        return jnp.sin(out).sum() + (lse**2).sum(), (out, lse)

    return quick_jit(jax.grad(loss, has_aux=True))((*arrays(), jnp.arange(N) - 1.0))


@pytest.mark.parametrize("sinks", [False, True])
def test_parts_are_the_whole(sinks, x64):
    expected = results(lambda *x: attend(*x[:3], sinks=x[3] if sinks else None))
    for cuts in ((), (1,), (2, 3, 7, 11)):
        found = results(lambda *x, cuts=cuts: merged(*x[:3], cuts, x[3] if sinks else None))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-13), found, expected)


def some_parts():
    rng = np.random.default_rng(1)
    return [(rng.normal(size=(4, 2)), rng.normal(size=4) * 5) for _ in range(3)]


def test_definition_order_and_grouping(x64):
    parts = some_parts()
    lse = np.log(sum(np.exp(x) for _, x in parts))
    out = sum(np.exp(x - lse)[:, None] * o for o, x in parts)
    one, two, three = parts
    for found in (
        jattn.merge_lse(*parts),
        jattn.merge_lse(three, one, two),
        jattn.merge_lse(jattn.merge_lse(one, two), three),
        jattn.merge_lse(one, jattn.merge_lse(two, three)),
    ):
        np.testing.assert_allclose(found[0], out, atol=1e-14)
        np.testing.assert_allclose(found[1], lse, atol=1e-14)


def test_a_part_that_saw_nothing_changes_nothing_whatever_it_holds(x64):
    (out, lse), *_ = some_parts()
    nothing = (np.full((4, 2), np.nan), np.full(4, -np.inf))

    def loss(out, lse, blank):
        joined = jattn.merge_lse((blank, nothing[1]), (out, lse), (blank, nothing[1]))
        return jnp.sin(joined[0]).sum() + (joined[1] ** 2).sum(), joined

    found, joined = jax.grad(loss, (0, 1, 2), has_aux=True)(out, lse, nothing[0])
    np.testing.assert_array_equal(joined[0], out)
    np.testing.assert_array_equal(joined[1], lse)
    np.testing.assert_allclose(found[0], np.cos(out), atol=1e-14)
    np.testing.assert_allclose(found[1], 2 * lse, atol=1e-14)
    assert not np.asarray(found[2]).any()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_where_no_part_saw_anything(count):
    nothing = (jnp.full((3, 2), jnp.nan), jnp.full(3, -jnp.inf))

    def loss(out, lse):
        joined = jattn.merge_lse(*[(out, lse)] * count)
        return joined[0].sum() + jnp.where(jnp.isfinite(joined[1]), joined[1], 0).sum(), joined

    found, (out, lse) = jax.grad(loss, (0, 1), has_aux=True)(*nothing)
    assert not np.asarray(out).any()
    assert (np.asarray(lse) == -np.inf).all()
    assert not any(np.asarray(x).any() for x in found)


def test_far_apart_parts_do_not_overflow():
    out, lse = jattn.merge_lse((jnp.ones((1, 1)), jnp.array([1e30])), (jnp.zeros((1, 1)), jnp.array([-1e30])))
    assert out.tolist() == [[1.0]]
    assert lse.tolist() == [jnp.float32(1e30)]


def test_what_is_nan_and_seen_stays_nan():
    out, lse = jattn.merge_lse((jnp.full((1, 1), jnp.nan), jnp.array([jnp.nan])), (jnp.ones((1, 1)), jnp.zeros(1)))
    assert np.isnan(out).all()
    assert np.isnan(lse).all()


def test_many_parts_in_bfloat16_are_rounded_once():
    rng = np.random.default_rng(2)
    parts = [(jnp.asarray(rng.normal(size=(64, 8)), jnp.bfloat16), jnp.zeros(64)) for _ in range(40)]
    out, lse = jattn.merge_lse(*parts)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    exact = np.mean([np.asarray(x, np.float32) for x, _ in parts], axis=0)
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, rtol=2**-8, atol=1e-6)


def test_sinks_of_minus_infinity_are_none_and_zeros_are_softmax_off_by_one(x64):
    query, key, value = arrays()
    out, lse = attend(query, key, value)
    np.testing.assert_array_equal(join_sinks(out, lse, jnp.full(N, -jnp.inf)), out)
    total = np.exp(np.asarray(lse))
    np.testing.assert_allclose(join_sinks(out, lse, jnp.zeros(N)), out * (total / (1 + total))[..., None], atol=1e-14)
    found = jax.grad(lambda s: join_sinks(out, lse.at[0].set(-jnp.inf), s).sum())(jnp.array([0.0, -jnp.inf, 1.0, 2.0]))
    assert np.isfinite(found).all()
    assert found[1] == 0


def test_lists_serve_as_arrays():
    out, lse = jattn.merge_lse(([[1.0], [2.0]], [0.0, 0.0]), ([[3.0], [2.0]], [0.0, 0.0]))
    np.testing.assert_allclose(out, [[2.0], [2.0]])
    np.testing.assert_allclose(lse, np.log([2.0, 2.0]), rtol=1e-6)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((), "one .out, lse. pair or more, got 0 parts"),
        ((np.zeros((2, 3)),), "not all pairs"),
        ([(np.zeros((2, 3)), np.zeros(3))], r"part 0 has out \(2, 3\) and lse \(3,\); expected \(2, 3\) and \(2,\)"),
        ([(np.zeros((2, 3)), np.zeros(2)), (np.zeros((2, 4)), np.zeros(2))], r"part 1 has out \(2, 4\)"),
    ],
)
def test_errors(parts, message):
    with pytest.raises(ValueError, match=message):
        jattn.merge_lse(*parts)
