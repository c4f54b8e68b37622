import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.softmax import masks
from jattn.softmax.compilers import from_block_mask, from_mask_mod, tile_bits
from jattn.softmax.layout import lists_from_live
from jattn.softmax.predicates import head_entry, pack_bits, token_selection, unpack_bits

SIZES = {"query_slots": 33, "key_slots": 40, "query_block": 8, "key_block": 16}


def random_layout(rng, lead=(2, 3), predicate=None, **options):
    live = rng.random((*lead, 5, 3)) < 0.5
    return live, from_block_mask(live, predicate, **SIZES, **options)


def spread(tiles, num_heads):
    tiles = np.repeat(tiles, num_heads // tiles.shape[1], 1)
    return np.repeat(np.repeat(tiles, 8, -2), 16, -1)[..., :33, :40]


def test_lists_are_ascending_and_their_tail_repeats_the_last_tile():
    live, layout = random_layout(np.random.default_rng(0))
    layout.validate(batch=2, num_heads=6, num_kv_heads=3, query_length=33, key_length=40)
    np.testing.assert_array_equal(layout.count, live.sum(-1))
    for row, count, index in zip(
        live.reshape(-1, 3), layout.count.reshape(-1), layout.index.reshape(-1, 3), strict=True
    ):
        ids = np.flatnonzero(row).tolist()
        assert index.tolist() == ids + [ids[-1] if ids else 0] * (3 - count)
    np.testing.assert_array_equal(layout.live_map(), live)
    assert layout.density == pytest.approx(live.mean())
    assert layout.live_tiles(2, 6) == 2 * live.sum()
    assert layout.flops(2, 6, 4, 8) == 2 * 12 * 8 * 16 * 2 * live.sum()


def test_dense_form_spreads_tiles_over_tokens_and_heads():
    live, layout = random_layout(np.random.default_rng(1))
    np.testing.assert_array_equal(layout.to_dense(2, 6, 33, 40), spread(live, 6))


def test_full_tiles_skip_the_predicate():
    rng = np.random.default_rng(2)
    full = rng.random((2, 3, 5, 3)) < 0.5
    live, layout = random_layout(np.random.default_rng(3), predicate=masks.causal(), full=full)
    causal = np.arange(40) <= np.arange(33)[:, None]
    np.testing.assert_array_equal(
        layout.to_dense(2, 3, 33, 40), spread(live, 3) & (spread(full, 3) | causal[None, None])
    )
    np.testing.assert_array_equal(layout.full_map(), live & full)


def test_predicate_sees_positions():
    live, layout = random_layout(np.random.default_rng(4), lead=(1, 1), predicate=masks.causal())
    query, key = np.arange(33)[None] + np.array([[0], [7]]), np.arange(40)[None]
    dense = layout.to_dense(2, 2, 33, 40, query_positions=query, key_positions=key)
    expected = spread(live, 2) & (key[:, None, None, :] <= query[:, None, :, None])
    np.testing.assert_array_equal(dense, expected)


def test_perms_place_tokens_and_leave_slots_empty():
    rng = np.random.default_rng(5)
    slots, tokens = 24, 19
    perms = []
    for _ in range(2 * 2):
        perm = np.full(slots, -1)
        perm[rng.permutation(slots)[:tokens]] = rng.permutation(tokens)
        perms.append(perm)
    perm = np.array(perms, np.int32).reshape(2, 2, slots)
    live = rng.random((1, 1, 3, 3)) < 0.6
    layout = from_block_mask(
        live,
        masks.causal(),
        query_slots=slots,
        key_slots=slots,
        query_block=8,
        key_block=8,
        query_perm=perm,
        key_perm=perm[:, :1],
    ).validate(batch=2, num_heads=4, num_kv_heads=2, query_length=tokens, key_length=tokens)
    dense = np.asarray(layout.to_dense(2, 4, tokens, tokens))
    expected = np.zeros((2, 4, tokens, tokens), bool)
    for b in range(2):
        for n in range(4):
            for p, i in enumerate(perm[b, n // 2]):
                for r, j in enumerate(perm[b, 0]):
                    if i >= 0 and j >= 0:
                        expected[b, n, i, j] = live[0, 0, p // 8, r // 8] and j <= i
    np.testing.assert_array_equal(dense, expected)


@pytest.mark.parametrize("traced", [False, True])
def test_transposed_lists_describe_the_same_tiles(traced):
    live, layout = random_layout(np.random.default_rng(6), full=np.random.default_rng(7).random((2, 3, 5, 3)) < 0.5)
    lists = jax.jit(lambda x: x.transposed())(layout) if traced else layout.transposed()
    assert isinstance(lists.t_count, np.ndarray) is not traced
    back = dataclasses.replace(
        layout,
        count=lists.t_count,
        index=lists.t_index,
        full=lists.t_full,
        query_block=16,
        key_block=8,
        query_slots=40,
        key_slots=33,
    ).validate()
    np.testing.assert_array_equal(back.live_map(), live.swapaxes(-1, -2))
    np.testing.assert_array_equal(back.full_map(), layout.full_map().swapaxes(-1, -2))


def test_transposed_tile_ids_follow_their_lists():
    layout = from_mask_mod(tile_bits(masks.sliding_window(5), 1, 2, 33, 40, 8, 16), 1, 1, 33, 40, 8, 16, num_heads=2)
    lists = layout.transposed()
    ids = layout.predicate.tile_id
    assert lists.t_tile_id.shape == (1, 2, 3, 5)
    for k in range(3):
        for m in range(lists.t_count[0, 0, k]):
            np.testing.assert_array_equal(lists.t_tile_id[0, :, k, m], ids[0, :, lists.t_index[0, 0, k, m], k])


def test_layouts_pass_through_jit_scan_and_vmap():
    rng = np.random.default_rng(8)
    lives = rng.random((4, 1, 1, 5, 3)) < 0.5
    layouts = jax.tree.map(lambda *x: jnp.stack(x), *[from_block_mask(live, masks.causal(), **SIZES) for live in lives])
    dense = [np.asarray(from_block_mask(live, masks.causal(), **SIZES).to_dense(1, 1, 33, 40)) for live in lives]
    _, scanned = jax.jit(lambda x: jax.lax.scan(lambda c, y: (c, y.to_dense(1, 1, 33, 40)), 0, x))(layouts)
    mapped = jax.jit(jax.vmap(lambda y: y.to_dense(1, 1, 33, 40)))(layouts)
    np.testing.assert_array_equal(scanned, np.stack(dense))
    np.testing.assert_array_equal(mapped, np.stack(dense))


def test_traced_lists_equal_static_ones():
    rng = np.random.default_rng(9)
    live, full = rng.random((2, 2, 3, 5, 4)) < 0.5
    for ours, theirs in zip(
        jax.jit(lists_from_live, static_argnums=2)(live, full, 4), lists_from_live(live, full, 4), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"count": np.zeros((2, 3, 4), np.int32)}, "count"),
        ({"count": np.full((2, 3, 5), 4, np.int32)}, "count"),
        ({"count": np.zeros((2, 3, 5), np.float32)}, "count"),
        ({"index": np.zeros((2, 3, 5), np.int32)}, "index"),
        ({"index": np.full((2, 3, 5, 3), 7, np.int32)}, "index"),
        ({"full": np.ones((2, 3, 5, 3), bool), "count": np.zeros((2, 3, 5), np.int32)}, "index|full"),
        ({"full": np.ones((2, 3, 5, 3), np.int32)}, "full"),
        ({"query_block": 0}, "query_block"),
        ({"query_perm": np.zeros((1, 1, 33), np.int32)}, "two slots"),
        ({"query_perm": np.arange(34)[None, None]}, "query_perm"),
        ({"key_perm": np.arange(40)[None, None] + 1}, "key_perm"),
        ({"key_perm": np.full((1, 4, 40), -1)}, "key_perm"),
        ({"query_perm": np.r_[:32, -1][None, None]}, "query_perm"),
    ],
)
def test_bad_layouts_are_refused_with_the_field(change, named):
    layout = random_layout(np.random.default_rng(0))[1]
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(layout, **change).validate(
            batch=2, num_heads=6, num_kv_heads=3, query_length=33, key_length=40
        )


@pytest.mark.parametrize(
    "sizes", [{"batch": 3}, {"num_heads": 4}, {"num_heads": 12, "num_kv_heads": 4}, {"query_length": 32}]
)
def test_layouts_that_do_not_fit_the_call_are_refused(sizes):
    with pytest.raises(ValueError, match="layout"):
        random_layout(np.random.default_rng(0))[1].validate(**sizes)


def test_packed_bits_round_trip():
    bits = np.random.default_rng(0).random((3, 70)) < 0.5
    np.testing.assert_array_equal(unpack_bits(pack_bits(bits), 70), bits)
    np.testing.assert_array_equal(pack_bits(jnp.asarray(bits)), pack_bits(bits))


def test_token_selection_reads_slots_and_heads():
    sel = np.random.default_rng(0).random((2, 2, 5, 9)) < 0.5
    mask = token_selection(sel, 3, 4, num_heads=6)
    expected = np.repeat(np.repeat(np.repeat(sel, 3, 1), 3, 2), 4, 3)[:, :, :14, :35]
    np.testing.assert_array_equal(mask.to_dense(2, 6, 14, 35), expected)
    traced = jax.tree.map(jnp.asarray, mask)
    np.testing.assert_array_equal(traced.to_dense(2, 6, 14, 35), expected)


def test_selections_of_a_wrong_kind_are_refused():
    with pytest.raises(ValueError, match="sel"):
        token_selection(np.ones((1, 1, 2, 2)))
    with pytest.raises(ValueError, match="sel_q"):
        token_selection(np.ones((1, 1, 2, 2), bool), 0)
    with pytest.raises(ValueError, match="heads"):
        head_entry(0, 4, 3)


def test_plot_draws_one_cell_a_tile():
    axes = random_layout(np.random.default_rng(0))[1].plot(head=2)
    assert axes.images[0].get_array().shape == (5, 3)
