import itertools

import numpy as np
import pytest

from jattn.mechanisms.sparse.gna_mask import gna_layout, gna_mask
from jattn.softmax import masks
from jattn.softmax.compilers import from_mask_mod
from jattn.softmax.masks import DEAD, FULL


def line(size, window, stride=1, dilation=1, causal=False):
    """The definition, one query at a time."""
    visible = np.zeros((size, size), bool)
    for x in range(size):
        g, i = x % dilation, x // dilation
        length = len(range(g, size, dilation))
        if causal:
            leader = min(i // stride * stride + stride - 1, length - 1)
            keys = range(max(leader - (window - 1), 0), i + 1)
        else:
            leader = min(i // stride * stride + stride // 2, length - 1)
            start = min(max(leader - window // 2, 0), length - window)
            keys = range(start, start + window)
        visible[x, [g + dilation * k for k in keys]] = True
    return visible


def shown(grid, *args, **kwargs):
    size = int(np.prod(grid))
    return np.asarray(gna_mask(grid, *args, **kwargs).to_dense(1, 1, size, size))[0, 0]


def every_line(limit=12):
    for size in range(1, limit):
        for window, dilation in itertools.product(range(1, size + 1), (1, 2, 3)):
            if window * dilation <= size:
                for stride in range(1, window + 1):
                    for causal in (False, True):
                        yield size, window, stride, dilation, causal


def test_lines_are_their_definition():
    for size, window, stride, dilation, causal in every_line():
        got = shown(size, window, stride=stride, dilation=dilation, is_causal=causal)
        np.testing.assert_array_equal(got, line(size, window, stride, dilation, causal))


def test_whole_windows_are_dense():
    assert shown(9, 9).all()
    np.testing.assert_array_equal(shown(9, 9, is_causal=True), np.tri(9, dtype=bool))


def test_stride_of_the_window_is_blocked_attention():
    block = np.arange(12) // 4
    np.testing.assert_array_equal(shown(12, 4, stride=4), block[:, None] == block)


def test_every_query_has_a_whole_window_with_itself_inside():
    for size, window, stride, dilation, causal in every_line():
        visible = shown(size, window, stride=stride, dilation=dilation, is_causal=causal)
        assert visible.diagonal().all()
        assert causal or (visible.sum(1) == window).all()
    assert (shown((5, 7), (3, 4), stride=(2, 4)).sum(1) == 12).all()


def test_groups_of_the_stride_share_their_keys():
    visible = shown(23, 7, stride=3)
    for x in range(23):
        np.testing.assert_array_equal(visible[x], visible[x // 3 * 3])
    first = shown(23, 7, stride=3, is_causal=True).argmax(1)
    assert all(first[x] == first[x // 3 * 3] for x in range(23))
    assert np.flatnonzero(shown(8, 4, stride=3, is_causal=True)[6]).tolist() == [4, 5, 6]


def test_dilation_is_attention_on_each_residue_grid():
    visible = shown((7, 9), (3, 2), stride=(2, 1), dilation=(2, 3))
    x, y = np.divmod(np.arange(63), 9)
    for a, b in itertools.product(range(2), range(3)):
        inside = (x % 2 == a) & (y % 3 == b)
        sub = (len(range(a, 7, 2)), 3)
        np.testing.assert_array_equal(visible[np.ix_(inside, inside)], shown(sub, (3, 2), stride=(2, 1)))
        assert not visible[np.ix_(inside, ~inside)].any()


def test_causal_strides_cycle_the_number_of_keys():
    assert shown(18, 6, stride=3, is_causal=True).sum(1)[6:12].tolist() == [4, 5, 6, 4, 5, 6]


def test_dimensions_multiply():
    one, two, three = line(4, 3), line(5, 4, 2, causal=True), line(6, 2, dilation=3)
    np.testing.assert_array_equal(shown((4, 5), (3, 4), stride=(1, 2), is_causal=(False, True)), np.kron(one, two))
    got = shown((4, 5, 6), (3, 4, 2), stride=(1, 2, 1), dilation=(1, 1, 3), is_causal=(False, True, False))
    np.testing.assert_array_equal(got, np.kron(np.kron(one, two), three))


def test_windows_are_shifted_inside_not_cut():
    assert np.flatnonzero(shown(22, 6, stride=6)[20]).tolist() == list(range(16, 22))


def test_the_causal_line_is_a_sliding_window():
    np.testing.assert_array_equal(shown(11, 4, is_causal=True), masks.sliding_window(4).to_dense(1, 1, 11, 11)[0, 0])
    endless = gna_mask(None, 4, is_causal=True).to_dense(1, 1, 11, 11)[0, 0]
    np.testing.assert_array_equal(endless, shown(11, 4, is_causal=True))
    video = gna_mask((None, 3), (2, 2), is_causal=(True, False)).to_dense(1, 1, 12, 12)[0, 0]
    np.testing.assert_array_equal(video, shown((4, 3), (2, 2), is_causal=(True, False)))


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        (23, {"window": 5}),
        (23, {"window": 6, "stride": 4}),
        (23, {"window": 6, "stride": 4, "is_causal": True}),
        (23, {"window": 3, "stride": 2, "dilation": 4}),
        ((6, 5), {"window": (3, 2), "stride": (1, 2), "is_causal": (True, False)}),
        ((3, 4, 3), {"window": (2, 3, 3), "dilation": (1, 1, 1)}),
    ],
)
def test_rectangles_are_classified(grid, options):
    mask, visible = gna_mask(grid, **options), shown(grid, **options)
    size = len(visible)
    for rows, columns in ((1, 1), (3, 5), (5, 3), (8, 8), (size, 2)):
        i, j = np.arange(0, size, rows)[:, None], np.arange(0, size, columns)[None]
        code = mask.classify(i, np.minimum(i + rows, size) - 1, j, np.minimum(j + columns, size) - 1)
        for (a, b), verdict in np.ndenumerate(code):
            tile = visible[a * rows : (a + 1) * rows, b * columns : (b + 1) * columns]
            assert verdict != DEAD or not tile.any()
            assert verdict != FULL or tile.all()
            if np.ndim(grid) == 0 and options.get("dilation", 1) == 1:
                assert (verdict == DEAD) == (not tile.any())
                assert (verdict == FULL) == tile.all()


@pytest.mark.parametrize(
    ("grid", "tile", "options"),
    [
        ((8, 8), (4, 4), {"window": (3, 5)}),
        ((7, 10), (3, 4), {"window": (5, 4), "stride": (2, 4), "is_causal": (True, False)}),
        (23, (4,), {"window": 3, "stride": 2, "dilation": 4}),
        ((5, 6), (2, 3), {"window": (2, 2), "dilation": (2, 3)}),
        ((3, 4, 5), (2, 2, 3), {"window": (2, 3, 3), "stride": (1, 1, 2)}),
    ],
)
def test_boxes_are_what_looking_at_all_pairs_finds(grid, tile, options):
    mask, visible = gna_mask(grid, **options), shown(grid, **options)
    layout = gna_layout(mask, tile).validate()
    size = len(visible)
    np.testing.assert_array_equal(layout.to_dense(1, 1, size, size)[0, 0], visible)
    slots, block = layout.query_slots, layout.query_block
    perms = {"query_perm": layout.query_perm, "key_perm": layout.key_perm}
    searched = from_mask_mod(mask, 1, 1, slots, slots, block, block, **perms)
    np.testing.assert_array_equal(layout.live_map(), searched.live_map())
    np.testing.assert_array_equal(layout.full_map(), searched.full_map())


def test_aligned_strides_are_perfectly_block_sparse():
    layout = gna_layout(gna_mask((16, 16), (8, 8), stride=(8, 8)), (8, 8))
    assert (layout.count == 1).all()
    assert layout.full.all()


@pytest.mark.parametrize(
    ("grid", "options", "message"),
    [
        (8, {"window": 9}, "at most the grid's 8"),
        (8, {"window": 3, "dilation": 3}, "at most the grid's 8"),
        ((8, 4), {"window": (3, 5)}, "dimension 1 of 2"),
        (8, {"window": 0}, "at least 1"),
        (8, {"window": 3, "stride": 4}, "stride must be between"),
        (8, {"window": 3, "stride": 0}, "stride must be between"),
        (8, {"window": 3, "dilation": 0}, "at least 1"),
        (8, {"window": (3, 3)}, "window must be one int"),
        (8, {"window": 3.0}, "window must be one int"),
        (8, {"window": 3, "is_causal": 1}, "is_causal must be one bool"),
        ((2, 2, 2, 2), {"window": 2}, "grid must be one to three"),
        ((2, None), {"window": 2}, "grid must be one to three"),
        (None, {"window": 2}, "only where is_causal"),
        (None, {"window": 2, "stride": 2, "is_causal": True}, "only where is_causal"),
    ],
)
def test_bad_parameters_are_named(grid, options, message):
    with pytest.raises(ValueError, match=message):
        gna_mask(grid, **options)
