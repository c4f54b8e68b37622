"""What every block layout must satisfy, on every implementation that takes layouts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn import dot_product_attention, masks, merge_lse
from jattn.softmax.compilers import from_block_mask, from_mask_mod, from_token_selection, from_topk
from jattn.softmax.gather import gather_attention
from jattn.softmax.predicates import token_selection
from jattn.testing.tolerance import assert_within_policy
from jattn.testing.workbench import quick_jit

B, N, K, D, DV = 2, 6, 2, 8, 5
IMPLEMENTATIONS = ("reference", "blockwise")
over_implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def inputs(length=33, source=40, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"query": (B, length, N, D), "key": (B, source, K, D), "value": (B, source, K, DV)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def objective(out, lse):
    """A loss that takes part of both results, leaving out what is -inf."""
    return (out * jnp.sin(jnp.arange(out.size).reshape(out.shape))).sum() + jnp.where(lse > -jnp.inf, lse, 0).sum()


def with_gradients(attend):
    """One compiled function (arrays, *rest) -> ((out, lse), gradients)."""

    def loss(arrays, *rest):
        out, lse = attend(arrays, *rest)
        return objective(out, lse), (out, lse)

    def run(arrays, *rest):
        gradients, results = jax.grad(loss, has_aux=True)(arrays, *rest)
        return results, gradients

    return quick_jit(run)


@functools.cache
def sparse(implementation):
    return with_gradients(
        lambda arrays, layout: dot_product_attention(
            **arrays, layout=layout, implementation=implementation, return_residual=True
        )
    )


@functools.cache
def dense():
    return with_gradients(
        lambda arrays, mask: dot_product_attention(
            **arrays, mask=mask, implementation="reference", return_residual=True
        )
    )


def check(found, arrays, mask, reference=None):
    """Compares outputs, lse and gradients with dense masked softmax, by the tolerance policy."""
    reference = dense() if reference is None else reference
    with jax.enable_x64(True):
        truth = reference(jax.tree.map(lambda x: x.astype(np.float64), arrays), mask)
    plain = reference(arrays, mask)
    alive = np.isfinite(truth[0][1])
    np.testing.assert_array_equal(np.isfinite(found[0][1]), alive)
    assert not np.asarray(found[0][0])[~alive].any()

    def finite(result):
        (out, lse), gradients = result
        return np.asarray(out), np.where(alive, lse, 0), jax.tree.map(np.asarray, gradients)

    assert_within_policy(finite(found), finite(truth), finite(plain), what="block-sparse attention")


def sizes(length=33, source=40):
    return {"query_slots": length, "key_slots": source, "query_block": 8, "key_block": 16}


def random_live(rng, lead=(B, N), length=33, source=40, share=0.5):
    return rng.random((*lead, -(-length // 8), -(-source // 16))) < share


def equal(one, two):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), one, two)


@over_implementations
def test_a_all_tiles_live_is_dense_softmax(implementation):
    arrays = inputs()
    layout = from_block_mask(np.ones((B, N, 5, 3), bool), **sizes())
    check(sparse(implementation)(arrays, layout), arrays, np.ones((B, N, 33, 40), bool))


@over_implementations
@pytest.mark.parametrize(("length", "source"), [(33, 40), (1, 7), (7, 33)])
def test_b_equals_its_dense_form(implementation, length, source):
    rng = np.random.default_rng(length)
    arrays = inputs(length, source)
    live = random_live(rng, (B, N), length, source, 0.7)
    full = random_live(rng, (B, N), length, source)
    layout = from_block_mask(live, masks.sliding_window(9), full=full, **sizes(length, source))
    check(sparse(implementation)(arrays, layout), arrays, np.asarray(layout.to_dense(B, N, length, source)))


@over_implementations
def test_c_the_order_of_the_tiles_does_not_matter(implementation):
    layout = from_block_mask(random_live(np.random.default_rng(1), share=0.8), masks.prefix(30), **sizes())
    count = layout.count[..., None]
    # Reverses the live entries; what stands behind them stays.
    place = np.where(np.arange(3) < count, count - 1 - np.arange(3), np.arange(3))
    index, full = (np.take_along_axis(x, place, -1) for x in (layout.index, layout.full))
    assert (index != layout.index).any()
    shuffled = dataclasses.replace(layout, index=index, full=full)
    run = sparse(implementation)
    equal(run(inputs(), shuffled), run(inputs(), layout))


@over_implementations
def test_d_full_tiles_may_be_called_partial(implementation):
    mask = masks.sliding_window(25)
    layout = from_mask_mod(mask, B, N, 33, 40, 8, 16, capacity=3)
    assert layout.full.any()
    partial = dataclasses.replace(layout, full=np.zeros_like(layout.full))
    run = sparse(implementation)
    equal(run(inputs(), partial), run(inputs(), layout))
    check(run(inputs(), layout), inputs(), mask.to_dense(B, N, 33, 40))


@over_implementations
def test_e_disjoint_layouts_merge_to_their_union(implementation):
    rng = np.random.default_rng(2)
    one, two = random_live(rng), random_live(rng)
    two &= ~one
    layouts = [from_block_mask(live, **sizes()) for live in (one, two)]

    def merged(arrays, first, second):
        options = {"implementation": implementation, "return_residual": True}
        return merge_lse(*[dot_product_attention(**arrays, layout=x, **options) for x in (first, second)])

    union = from_block_mask(one | two, **sizes())
    found = with_gradients(merged)(inputs(), *layouts)
    check(found, inputs(), np.asarray(union.to_dense(B, N, 33, 40)))


@over_implementations
def test_g_rows_without_tiles_give_zeros_and_no_gradient(implementation):
    live = random_live(np.random.default_rng(3))
    live[:, :, 2] = False
    live[1, 3] = False
    layout = from_block_mask(live, **sizes())
    arrays = inputs()
    arrays["query"][:, 16:24] = np.nan
    (out, lse), gradients = sparse(implementation)(arrays, layout)
    assert not np.asarray(out)[:, 16:24].any()
    assert not np.asarray(out)[1, :, 3].any()
    assert (np.asarray(lse)[:, 16:24] == -np.inf).all()
    assert not np.asarray(gradients["query"])[:, 16:24].any()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


@over_implementations
@pytest.mark.parametrize("heads", [1, K])
def test_h_perms_change_nothing_when_all_tiles_are_live(implementation, heads):
    rng = np.random.default_rng(4)
    length, slots = 21, 32

    def perm():
        perm = np.full((B, heads, slots), -1, np.int32)
        for row in perm.reshape(-1, slots):
            row[rng.permutation(slots)[:length]] = rng.permutation(length)
        return perm

    layout = from_block_mask(
        np.ones((B, N, 4, 2), bool), masks.causal(), query_perm=perm(), key_perm=perm(), **sizes(slots, slots)
    )
    arrays = inputs(length, length)
    check(sparse(implementation)(arrays, layout), arrays, masks.causal().to_dense(B, N, length, length))


@over_implementations
@pytest.mark.parametrize("lead", [(1, 1), (B, K)])
def test_i_leading_axes_broadcast(implementation, lead):
    rng = np.random.default_rng(5)
    live, full = random_live(rng, lead, share=0.7), random_live(rng, lead)
    sel = rng.random((1, N, 33, 10)) < 0.6
    predicate = token_selection(sel, 1, 4, num_heads=N) & masks.causal()
    small = from_block_mask(live, predicate, full=full, **sizes())

    def tiled(x):
        return np.repeat(np.broadcast_to(x, (B, *x.shape[1:])), N // lead[1], 1)

    large = from_block_mask(tiled(live), predicate, full=tiled(full), **sizes())
    run = sparse(implementation)
    found = run(inputs(), small)
    equal(found, run(inputs(), large))
    check(found, inputs(), np.asarray(large.to_dense(B, N, 33, 40)))


@over_implementations
def test_j_truncated_layouts_are_differentiated_as_they_are(implementation):
    scores = np.random.default_rng(6).normal(size=(B, K, 5, 3))
    layout = jax.jit(lambda s: from_topk(s, 3, capacity=2, predicate=masks.causal(), **sizes()))(scores)
    assert np.asarray(layout.overflow).all()
    check(sparse(implementation)(inputs(), layout), inputs(), np.asarray(layout.to_dense(B, N, 33, 40)))


@over_implementations
def test_k_weights_of_keys_are_multiplicities(implementation):
    rng = np.random.default_rng(7)
    counts = rng.integers(0, 4, 40)
    with np.errstate(divide="ignore"):
        weight = np.log(counts).astype(np.float32)[None, None, None]
    layout = from_block_mask(np.ones((B, N, 5, 3), bool), **sizes())
    arrays = inputs()
    arrays["value"][:, counts == 0] = 1e4

    def weighted(arrays):
        return dot_product_attention(
            **arrays, bias=weight, layout=layout, implementation=implementation, return_residual=True
        )

    def repeated(arrays, mask):
        longer = {n: x if n == "query" else jnp.repeat(x, counts, 1) for n, x in arrays.items()}
        return dot_product_attention(**longer, implementation="reference", return_residual=True)

    check(with_gradients(weighted)(arrays), arrays, None, with_gradients(repeated))


@over_implementations
def test_l_token_selection_is_gather_attention_is_a_dense_mask(implementation):
    rng = np.random.default_rng(8)
    index = rng.permuted(np.broadcast_to(np.arange(40), (B, K, 33, 40)), axis=-1)[..., :6]
    valid = rng.random(index.shape) < 0.8
    sel = np.zeros((B, K, 33, 40), bool)
    np.put_along_axis(sel, index, valid, -1)
    layout = from_token_selection(sel, 1, 1, num_heads=N, **sizes())
    mask = np.repeat(sel, N // K, 1)
    check(sparse(implementation)(inputs(), layout), inputs(), mask)
    if implementation == "reference":
        gathered = with_gradients(
            lambda arrays: gather_attention(**arrays, index=index, valid=valid, return_residual=True)
        )
        check(gathered(inputs()), inputs(), mask)


@over_implementations
def test_m_nan_where_nobody_looks_changes_nothing(implementation):
    rng = np.random.default_rng(9)
    live = random_live(rng, (B, K))
    live[0, 0, :, 1] = False
    live[1, 1] &= np.array([False, True, True])
    layout = from_block_mask(live, ~masks.mask_mod(one_key), **sizes())
    poisoned = inputs()
    for name in ("key", "value"):
        poisoned[name][:, 20] = np.nan
        poisoned[name][0, 16:32, 0] = np.inf
        poisoned[name][1, :16, 1] = np.nan
    run = sparse(implementation)
    calm = inputs()
    for name in ("key", "value"):
        calm[name] = np.where(np.isfinite(poisoned[name]), calm[name], 1.0)
    jax.tree.map(np.testing.assert_array_equal, run(poisoned, layout), run(calm, layout))


def one_key(b, h, i, j, aux):
    return j == 20


@over_implementations
def test_layouts_are_arguments_of_vmap_and_scan(implementation):
    rng = np.random.default_rng(10)
    layouts = [from_block_mask(random_live(rng, (1, 1)), masks.causal(), **sizes()) for _ in range(3)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *layouts)
    arrays = inputs()

    def attend(layout):
        return dot_product_attention(**arrays, layout=layout, implementation=implementation)

    expected = [np.asarray(quick_jit(attend)(layout)) for layout in layouts]
    mapped = quick_jit(jax.vmap(attend))(stacked)
    _, scanned = quick_jit(lambda x: jax.lax.scan(lambda carry, y: (carry, attend(y)), 0, x))(stacked)
    np.testing.assert_allclose(mapped, np.stack(expected), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scanned, np.stack(expected), rtol=1e-5, atol=1e-6)


def test_a_layout_that_does_not_fit_is_refused():
    layout = from_block_mask(np.ones((1, 1, 5, 3), bool), **sizes())
    with pytest.raises(ValueError, match="query_slots is 33, but there are 32"):
        dot_product_attention(**inputs(32), layout=layout)
    with pytest.raises(ValueError, match="head axis"):
        dot_product_attention(**inputs(), layout=from_block_mask(np.ones((1, 3, 5, 3), bool), **sizes()))
