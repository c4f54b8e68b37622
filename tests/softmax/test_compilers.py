import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.softmax import masks, tiling
from jattn.softmax.compilers import (
    from_block_mask,
    from_cumulative,
    from_mask_mod,
    from_token_selection,
    from_topk,
    tile_bits,
)

RNG = np.random.default_rng(0)


def odd(b, h, i, j, aux):
    return (i * j + b + h) % 3 == 0


def with_jax(b, h, i, j, aux):
    return jnp.less_equal(j, i + h)


IDS = np.array([[0] * 12 + [1] * 20 + [-1], [3] * 5 + [2] * 28])
MASKS = {
    "causal": masks.causal(),
    "window and sinks": masks.sliding_window(6, 3),
    "prefix": masks.prefix(np.array([3, 11])) | masks.causal(),
    "not": ~masks.local_window(5, 9) & masks.prefix(20),
    "full": masks.full(),
    "nothing": masks.prefix(0),
    "function": masks.mask_mod(odd),
    "jax function": masks.mask_mod(with_jax),
    "dense": masks.dense(RNG.random((2, 1, 33, 33)) < 0.3),
    "segments": masks.segment_mask(IDS) & masks.causal(),
    "selection": tiling.TokenSelection(RNG.integers(0, 8, (2, 2, 11, 1), dtype=np.uint32), 3, 9, 4, 4) & masks.causal(),
}


def brute_force(mask, batch, heads, num_heads, length, source, query_block, key_block):
    dense = np.asarray(mask.to_dense(batch, num_heads, length, source))
    tiles = (-(-length // query_block), -(-source // key_block))
    live, full = np.zeros((2, batch, heads, *tiles), bool)
    grouped = dense.reshape(batch, heads, -1, length, source)
    for q in range(tiles[0]):
        for k in range(tiles[1]):
            tile = grouped[..., q * query_block : (q + 1) * query_block, k * key_block : (k + 1) * key_block]
            live[..., q, k], full[..., q, k] = tile.any((2, 3, 4)), tile.all((2, 3, 4))
    return dense, live, full


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("length", "source", "blocks"), [(33, 33, (8, 16)), (7, 1, (16, 8)), (16, 33, (8, 8))])
def test_mask_compiles_to_exactly_its_tiles(name, length, source, blocks):
    mask = MASKS[name]
    dense, live, full = brute_force(mask, 2, 2, 4, length, source, *blocks)
    layout = from_mask_mod(mask, 2, 2, length, source, *blocks, num_heads=4)
    assert isinstance(layout.index, np.ndarray)
    np.testing.assert_array_equal(layout.live_map(), live)
    np.testing.assert_array_equal(layout.full_map(), full)
    np.testing.assert_array_equal(layout.to_dense(2, 4, length, source), dense)
    assert layout.index.shape[-1] == max(1, live.sum(-1).max())


@pytest.mark.parametrize("name", ["causal", "prefix", "dense", "segments", "selection", "not"])
def test_traced_mask_compiles_to_the_same_tiles(name, monkeypatch):
    monkeypatch.setattr(tiling, "PAIRS_AT_A_TIME", 4096)
    mask = MASKS[name]
    _, live, full = brute_force(mask, 2, 2, 4, 33, 33, 8, 16)

    @jax.jit
    def compiled(mask, positions):
        layout = from_mask_mod(mask, 2, 2, 33, 33, 8, 16, num_heads=4, query_positions=positions)
        return layout.live_map(), layout.full_map()

    ours = compiled(jax.tree.map(jnp.asarray, mask), jnp.arange(33)[None])
    np.testing.assert_array_equal(ours[0], live)
    np.testing.assert_array_equal(ours[1], full)


def test_static_masks_stay_constants_while_tracing():
    @jax.jit
    def constant(x):
        for mask in (MASKS["segments"], with_jax):
            layout = from_mask_mod(mask, 2, 1, 33, 33, 8, 8)
            assert all(isinstance(leaf, np.ndarray) for leaf in (layout.count, layout.index, layout.full))
        return x

    constant(0.0)


def test_only_unsure_tiles_have_their_pairs_evaluated(monkeypatch):
    seen = []
    plain = tiling.pairs_of_tiles
    monkeypatch.setattr(
        tiling, "pairs_of_tiles", lambda m, g, q, k: seen.extend(zip(q, k, strict=True)) or plain(m, g, q, k)
    )
    from_mask_mod(masks.causal(), 1, 1, 64, 64, 8, 8)
    assert seen == [(n, n) for n in range(8)]


def test_unsure_tiles_are_partial_when_pairs_may_not_be_looked_at():
    layout = from_mask_mod(odd, 1, 1, 16, 16, 8, 8, exact=False)
    assert layout.density == 1
    assert not layout.full.any()


def test_positions_and_perms_are_seen_by_the_mask():
    perm = np.array([[[4, -1, 0, 2, 1, 3, -1, -1]]])
    positions = np.array([[0, 10, 20, 30, 40]])
    options = {"query_perm": perm, "key_perm": perm, "query_positions": positions, "key_positions": positions}
    mask = masks.sliding_window(15)
    layout = from_mask_mod(mask, 1, 1, 8, 8, 2, 2, **options)
    expected = np.asarray(mask.to_dense(1, 1, 5, 5, query_positions=positions, key_positions=positions))
    np.testing.assert_array_equal(
        layout.to_dense(1, 1, 5, 5, query_positions=positions, key_positions=positions), expected
    )
    # Slots: [4 .] [0 2] [1 3] [. .]; token 1 is seen from 1 and 2, 0 from 0 and 1, 2 from 2 and 3, 3 from 3 and 4.
    assert layout.live_map()[0, 0].astype(int).tolist() == [[1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert layout.full_map()[0, 0].astype(int).tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("name", ["window and sinks", "function", "dense", "full", "nothing"])
def test_tile_bits_equal_their_mask(name):
    mask = MASKS[name]
    bits = tile_bits(mask, 2, 2, 33, 30, 8, 40)
    np.testing.assert_array_equal(bits.to_dense(2, 2, 33, 30), mask.to_dense(2, 2, 33, 30))
    one, two = from_mask_mod(bits, 2, 2, 33, 30, 8, 40), from_mask_mod(mask, 2, 2, 33, 30, 8, 40)
    np.testing.assert_array_equal(one.live_map(), two.live_map())
    np.testing.assert_array_equal(one.full_map(), two.full_map())


def test_equal_tiles_are_stored_once():
    bits = tile_bits(masks.sliding_window(8), 1, 1, 64, 64, 8, 8)
    assert bits.table.shape == (3, 8, 1)


def test_block_mask_takes_rank_two_and_full_defaults_to_live():
    live = RNG.random((2, 3)) < 0.5
    sizes = {"query_slots": 16, "key_slots": 20, "query_block": 8, "key_block": 8}
    layout = from_block_mask(live, **sizes)
    np.testing.assert_array_equal(layout.full_map()[0, 0], live)
    assert not from_block_mask(live, masks.causal(), **sizes).full.any()
    with pytest.raises(ValueError, match=r"block_mask has shape .* expected \(2, 3\)"):
        from_block_mask(np.ones((2, 2), bool), **sizes)
    with pytest.raises(ValueError, match="boolean"):
        from_block_mask(np.ones((2, 3)), **sizes)
    with pytest.raises(ValueError, match="query_block"):
        from_block_mask(live, **{**sizes, "query_block": 0})


SIX = {"query_slots": 12, "key_slots": 48, "query_block": 8, "key_block": 8}


def test_truncation_keeps_forced_then_best_and_says_so():
    live = np.ones((2, 6), bool)
    scores = np.array([[0.0, 5.0, 1.0, 4.0, np.nan, 3.0], [0.0] * 6])
    forced = np.array([[False] * 4 + [True, False], [False] * 6])

    def cut(capacity, **options):
        return jax.jit(lambda x: from_block_mask(x, capacity=capacity, **options, **SIX))(jnp.asarray(live))

    layout = cut(3, scores=scores, forced=forced)
    assert layout.index[0, 0].tolist() == [[1, 3, 4], [0, 1, 2]]
    assert layout.overflow[0, 0].tolist() == [3, 3]
    assert cut(2).index[0, 0].tolist() == [[0, 1], [0, 1]]
    assert cut(1, forced=forced | (np.arange(6) == 5)).index[0, 0].tolist() == [[4], [5]]
    assert not np.any(cut(9).overflow)
    with pytest.raises(ValueError, match="capacity 3 is too small: a row has 6"):
        from_block_mask(live, capacity=3, **SIX)


def test_topk_tiles_count_forced_ones():
    scores = np.array([[1.0, 9.0, 3.0, -np.inf, 3.0, np.nan], [0.0, 0, 0, 0, 0, 0]])
    allowed = np.array([[True] * 4 + [True, True], [False] * 5 + [True]])
    forced = np.array([[True, False, False, False, False, False], [True] + [False] * 5])
    layout = from_topk(scores, 3, forced=forced, allowed=allowed, **SIX)
    assert layout.live_map()[0, 0].astype(int).tolist() == [[1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]]
    traced = jax.jit(lambda s: from_topk(s, 3, forced=forced, allowed=allowed, **SIX))(scores)
    np.testing.assert_array_equal(traced.live_map(), layout.live_map())
    assert traced.index.shape[-1] == 6


def cumulative_by_hand(row, p, rule, min_k, max_k):
    order = sorted(range(len(row)), key=lambda n: (-row[n], n))
    sums = np.cumsum(row[order])
    if rule == "reach":
        reached = np.flatnonzero(sums >= p)
        number = reached[0] + 1 if reached.size else len(row)
    else:
        number = (sums <= p).sum() + (rule == "cross")
    number = min(max(number, min_k), max_k)
    return np.isin(np.arange(len(row)), order[:number])


@pytest.mark.parametrize("rule", ["cross", "reach", "below"])
@pytest.mark.parametrize("bounds", [(0, 6), (2, 4)])
def test_cumulative_rules_equal_counting_by_hand(rule, bounds):
    # Multiples of 1/32, so that the sums are exact and ties occur.
    rows = RNG.multinomial(32, np.ones(6) / 6, (3, 2, 2)) / 32
    for p in (0.0, 0.5, 0.75, 1.0):
        layout = from_cumulative(rows, p, *bounds, rule=rule, **SIX)
        expected = np.apply_along_axis(
            functools.partial(cumulative_by_hand, p=p, rule=rule, min_k=bounds[0], max_k=bounds[1]), -1, rows
        )
        np.testing.assert_array_equal(layout.live_map(), expected)
        traced = jax.jit(lambda x, p=p: from_cumulative(x, p, *bounds, rule=rule, **SIX).live_map())(rows)
        np.testing.assert_array_equal(traced, expected)


def test_cumulative_adds_forced_and_leaves_out_forbidden():
    row = np.array([[0.5, 0.25, 0.125, 0.125, 0.0, 0.0]] * 2)
    forced = np.array([False] * 4 + [True, True])[None]
    allowed = np.array([False, True, True, True, True, False])[None]
    layout = from_cumulative(row, 0.3, rule="reach", forced=forced, allowed=allowed, **SIX)
    assert layout.live_map()[0, 0].astype(int).tolist() == [[0, 1, 1, 0, 1, 0]] * 2
    with pytest.raises(ValueError, match="rule"):
        from_cumulative(row, 0.3, rule="over", **SIX)
    with pytest.raises(ValueError, match="min_k"):
        from_cumulative(row, 0.3, 3, 2, rule="reach", **SIX)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(("sel_q", "sel_block"), [(1, 4), (3, 8), (16, 2), (5, 16)])
def test_token_selection_is_restored_exactly(traced, sel_q, sel_block):
    sel = RNG.random((2, 2, -(-33 // sel_q), -(-29 // sel_block))) < 0.3
    options = {"query_slots": 33, "key_slots": 29, "query_block": 8, "key_block": 8, "num_heads": 4, "list_heads": 1}
    chosen = np.repeat(np.repeat(np.repeat(sel, 2, 1), sel_q, 2), sel_block, 3)[:, :, :33, :29]
    causal = masks.causal().to_dense(2, 4, 33, 29)
    cases = [
        ((None, None), chosen),
        ((masks.causal(), None), chosen & causal),
        (
            (masks.causal(), masks.local_window(2, 9)),
            (chosen | masks.local_window(2, 9).to_dense(2, 4, 33, 29)) & causal,
        ),
    ]
    for (extra, include), expected in cases:

        def build(sel, extra=extra, include=include):
            layout = from_token_selection(sel, sel_q, sel_block, extra, include=include, **options)
            return layout, layout.live_map(), layout.full_map(), layout.to_dense(2, 4, 33, 29)

        layout, live, full, dense = (jax.jit(build) if traced else build)(sel)
        np.testing.assert_array_equal(dense, expected)
        _, should_live, should_full = brute_force(masks.dense(expected), 2, 1, 4, 33, 29, 8, 8)
        np.testing.assert_array_equal(live, should_live)
        np.testing.assert_array_equal(full, should_full)
        assert layout.count.shape == (2, 1, 5)


def test_selection_of_a_wrong_size_is_refused():
    with pytest.raises(ValueError, match=r"sel has shape \(1, 1, 3, 2\); expected \[Bs, Hs, 4, 2\]"):
        from_token_selection(np.ones((1, 1, 3, 2), bool), 2, 4, query_slots=8, key_slots=8)
    with pytest.raises(ValueError, match="heads"):
        from_token_selection(np.ones((1, 2, 8, 2), bool), 1, 4, query_slots=8, key_slots=8, num_heads=4, list_heads=3)


def test_a_static_mask_is_refused_by_tile_bits_when_it_is_traced():
    with pytest.raises(ValueError, match="static"):
        jax.jit(lambda n: tile_bits(masks.prefix(n), 1, 1, 8, 8).table)(3)
