import numpy as np
import pytest

from jattn import masks
from jattn.softmax.counts import visible_counts

IDS = np.array([[0, 0, 1, -1, 1], [-1, -1, 0, 0, 0]])


def by_hand(visible):
    return np.swapaxes(np.asarray(visible).sum(-1), 1, 2)


@pytest.mark.parametrize("is_causal", [True, False])
def test_counts_equal_the_rows_of_the_dense_mask(is_causal):
    causal = (masks.causal() if is_causal else masks.full()).to_dense(2, 3, 5, 5)
    cases = {
        "plain": ({}, True),
        "segments": ({"segment_ids": IDS}, masks.segment_mask(IDS).to_dense(2, 3, 5, 5)),
        "padding": ({"mask": (IDS >= 0)[:, None, None]}, (IDS >= 0)[:, None, None]),
        "per head": ({"mask": np.tri(3, 5, dtype=bool)[:, None]}, np.tri(3, 5, dtype=bool)[:, None]),
        "window": ({"mask": masks.sliding_window(2)}, masks.sliding_window(2).to_dense(2, 3, 5, 5)),
    }
    for name, (options, visible) in cases.items():
        got = visible_counts(2, 3, 5, 5, is_causal=is_causal, **options)
        np.testing.assert_array_equal(np.broadcast_to(got, (2, 5, 3)), by_hand(causal & visible), err_msg=name)


def test_counts_follow_positions_and_lengths():
    np.testing.assert_array_equal(visible_counts(1, 2, 5, 3, is_causal=True)[0, :, 0], [1, 2, 3, 3, 3])
    np.testing.assert_array_equal(visible_counts(1, 2, 2, 3)[0, :, 0], [3, 3])
    decoding = {"query_positions": np.array([[3]]), "key_positions": np.array([[0, 1, 2, 3, 7]])}
    np.testing.assert_array_equal(visible_counts(1, 2, 1, 5, is_causal=True, **decoding)[0, :, 0], [4])
    assert visible_counts(4, 2, 5, 5, mask=np.ones((5, 5), bool)).shape == (4, 5, 1)
