import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jattn.softmax.segments import (
    cu_seqlens_from_segment_ids,
    pack_cu_seqlens,
    positions_from_segments,
    renumber_segments,
    segment_ids_from_cu_seqlens,
    segment_tile_ranges,
    unpack_cu_seqlens,
)


def by_hand(ids):
    run, previous, start, runs, positions = -1, None, 0, [], []
    for t, name in enumerate(ids):
        if name >= 0 and name != previous:
            run, previous, start = run + 1, name, t
        runs.append(run if name >= 0 else name)
        positions.append(t - start if name >= 0 else 0)
    return runs, positions


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-2, 2), min_size=1, max_size=9))
def test_runs_and_positions_equal_counting_by_hand(ids):
    runs, positions = by_hand(ids)
    assert renumber_segments(np.array(ids)).tolist() == runs
    assert positions_from_segments(np.array(ids)).tolist() == positions


def test_traced_ids_give_the_same_runs_row_by_row():
    ids = np.random.default_rng(0).integers(-1, 3, (2, 3, 17))
    for function in (renumber_segments, positions_from_segments):
        traced = jax.jit(function)(jnp.asarray(ids))
        np.testing.assert_array_equal(traced, function(ids))
        np.testing.assert_array_equal(function(ids)[1, 2], function(ids[1, 2]))
        assert traced.dtype == function(ids).dtype == np.int32


def test_renumbering_twice_changes_nothing():
    runs = renumber_segments(np.random.default_rng(1).integers(-1, 3, 40))
    np.testing.assert_array_equal(renumber_segments(runs), runs)


@pytest.mark.parametrize("lengths", [[3], [1, 1, 1], [4, 2, 5], [33]])
@pytest.mark.parametrize("padding", [0, 3])
def test_cumulative_lengths_round_trip(lengths, padding):
    ends = np.concatenate([[0], np.cumsum(lengths)])
    ids = segment_ids_from_cu_seqlens(ends, ends[-1] + padding)
    np.testing.assert_array_equal(cu_seqlens_from_segment_ids(ids), ends)
    np.testing.assert_array_equal(ids, np.repeat([*range(len(lengths)), -1], [*lengths, padding]))
    room = len(lengths) + 2
    traced = jax.jit(lambda x: cu_seqlens_from_segment_ids(x, room))(jnp.asarray(ids))
    np.testing.assert_array_equal(traced, [*ends, ends[-1], ends[-1]])
    back = jax.jit(lambda x: segment_ids_from_cu_seqlens(x, ends[-1] + padding))(traced)
    np.testing.assert_array_equal(back, ids)


def test_empty_documents_have_no_tokens():
    assert segment_ids_from_cu_seqlens(np.array([0, 2, 2, 3]), 3).tolist() == [0, 0, 2]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("lengths", [[3], [2, 0, 5, 1], [0, 4]])
def test_unpacked_documents_are_rows_and_pack_again(lengths, axis):
    ends, total = np.concatenate([[0], np.cumsum(lengths)]), sum(lengths) + 2
    tokens = np.random.default_rng(0).normal(size=(total, 2, 3))
    numbers = np.arange(1, total + 1)
    packed = tuple(x if axis == 0 else x[None] for x in (tokens, numbers))
    traced = jax.jit(unpack_cu_seqlens, static_argnums=2, static_argnames="axis")
    back = jax.jit(pack_cu_seqlens, static_argnums=2, static_argnames="axis")
    for unpack, pack in ((unpack_cu_seqlens, pack_cu_seqlens), (traced, back)):
        (rows, row_numbers), ids = unpack(packed, ends, 5, axis=axis)
        assert rows.shape == (len(lengths), 5, 2, 3) and ids.dtype == np.int32
        for m, length in enumerate(lengths):
            np.testing.assert_array_equal(ids[m], [m] * length + [-1] * (5 - length))
            np.testing.assert_array_equal(row_numbers[m, :length], numbers[ends[m] : ends[m + 1]])
            np.testing.assert_allclose(rows[m, :length], tokens[ends[m] : ends[m + 1]], rtol=1e-6)
            assert not np.asarray(rows[m, length:]).any()
        again = pack((rows, row_numbers), ends, total, axis=axis)
        for x, y in zip(again, packed, strict=True):
            assert x.shape == y.shape
            filled = np.where((np.arange(total) < ends[-1]).reshape((-1,) + (1,) * (y.ndim - axis - 1)), y, 0)
            np.testing.assert_allclose(x, filled, rtol=1e-6)


def test_unpacking_takes_the_longest_document_and_cuts_off_under_jit_only():
    tokens, ends = np.arange(1, 7), np.array([0, 4, 6])
    assert unpack_cu_seqlens(tokens, ends)[0].tolist() == [[1, 2, 3, 4], [5, 6, 0, 0]]
    rows, ids = jax.jit(lambda ends: unpack_cu_seqlens(tokens, ends, 3))(ends)
    assert rows.tolist() == [[1, 2, 3], [5, 6, 0]] and ids.tolist() == [[0, 0, 0], [1, 1, -1]]
    assert jax.jit(lambda ends: pack_cu_seqlens(rows, ends, 7))(ends).tolist() == [1, 2, 3, 0, 5, 6, 0]


def test_tile_ranges_leave_padding_out():
    ids = np.array([[0, 0, 1, 1, 1, -1, -1], [2, 1, -1, -1, -1, -1, 4]])
    for function in (segment_tile_ranges, jax.jit(segment_tile_ranges, static_argnums=1)):
        low, high, padded = function(ids, 2)
        top = np.iinfo(np.int32).max
        np.testing.assert_array_equal(low, [[0, 1, 1, top], [1, top, top, 4]])
        np.testing.assert_array_equal(high, [[0, 1, 1, -1], [2, -1, -1, 4]])
        np.testing.assert_array_equal(padded, [[False, False, True, True], [False, True, True, False]])


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: renumber_segments(np.ones(3)), "segment_ids"),
        (lambda: positions_from_segments(np.int32(1)), "segment_ids"),
        (lambda: segment_ids_from_cu_seqlens(np.array([0, 5]), 4), "cu_seqlens"),
        (lambda: segment_ids_from_cu_seqlens(np.array([1, 3]), 4), "cu_seqlens"),
        (lambda: segment_ids_from_cu_seqlens(np.array([0, 3, 2]), 4), "cu_seqlens"),
        (lambda: segment_ids_from_cu_seqlens(np.array([[0, 3]]), 4), "cu_seqlens"),
        (lambda: cu_seqlens_from_segment_ids(np.array([0, -1, 1])), "padding"),
        (lambda: cu_seqlens_from_segment_ids(np.array([0, 1, 2]), 2), "num_segments"),
        (lambda: cu_seqlens_from_segment_ids(np.array([[0, 1]])), "segment_ids"),
        (lambda: jax.jit(cu_seqlens_from_segment_ids)(jnp.array([0, 1])), "num_segments"),
        (lambda: segment_tile_ranges(np.array([0, 1]), 0), "block"),
        (lambda: unpack_cu_seqlens(np.ones(4), np.array([0, 5])), "cu_seqlens"),
        (lambda: unpack_cu_seqlens(np.ones(4), np.array([0, 4]), 3), "max_length"),
        (lambda: unpack_cu_seqlens(np.ones(4), np.array([0, 4]), 0), "max_length"),
        (lambda: jax.jit(lambda ends: unpack_cu_seqlens(np.ones(4), ends))(np.array([0, 4])), "max_length"),
        (lambda: unpack_cu_seqlens(np.ones((2, 4)), np.array([0, 4]), axis=1), "packed"),
        (lambda: unpack_cu_seqlens((np.ones(4), np.ones(3)), np.array([0, 3])), "packed"),
        (lambda: unpack_cu_seqlens(np.ones((1, 1, 4)), np.array([0, 4]), axis=2), "axis"),
        (lambda: pack_cu_seqlens(np.ones((1, 1, 4)), np.array([0, 1]), 4, axis=2), "axis"),
        (lambda: pack_cu_seqlens(np.ones((2, 4)), np.array([0, 4]), 4), "rows"),
        (lambda: pack_cu_seqlens(np.ones((1, 3)), np.array([0, 4]), 4), "rows"),
        (lambda: pack_cu_seqlens(np.ones((1, 4)), np.array([0, 4]), 3), "cu_seqlens"),
    ],
)
def test_bad_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
