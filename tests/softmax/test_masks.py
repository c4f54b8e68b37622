"""Masks: what they say about pairs, what they promise about rectangles, and how they combine."""

import itertools

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jattn import masks
from jattn.softmax.masks import DEAD, FULL, PARTIAL, Mask

B, N, T, S = 2, 3, 11, 13
ROWS, COLUMNS = np.arange(T)[:, None], np.arange(S)
TABLE = np.random.default_rng(0).random((B, 1, T, S)) < 0.5
IDS = (
    np.sort(np.random.default_rng(1).integers(-1, 3, (B, T))),
    np.sort(np.random.default_rng(2).integers(-1, 3, (1, S))),
)


def diagonal(b, h, i, j, aux):
    return (i + j + h + aux["shift"][b]) % 2 == 0


def same_parity(b, h, i, j, aux):
    return i % 2 == j % 2


def _catalogue():
    """name -> (mask, its dense form by definition)."""
    heads, shift = np.arange(N)[None, :, None, None], np.array([0, 1])
    lengths = np.array([2, 7])
    same = (IDS[0][:, None, :, None] == IDS[1][:, None, None]) & (IDS[0] >= 0)[:, None, :, None]
    return {
        "full": (masks.full(), True),
        "causal": (masks.causal(), COLUMNS <= ROWS),
        "window": (masks.sliding_window(3), (COLUMNS <= ROWS) & (ROWS - COLUMNS < 3)),
        "sinks": (masks.sliding_window(2, 2), (COLUMNS <= ROWS) & ((ROWS - COLUMNS < 2) | (COLUMNS < 2))),
        "local": (masks.local_window(2, 4), (COLUMNS >= ROWS - 2) & (COLUMNS <= ROWS + 4)),
        "open left": (masks.local_window(None, 1), COLUMNS <= ROWS + 1),
        "open right": (masks.local_window(1, None), COLUMNS >= ROWS - 1),
        "prefix": (masks.prefix(4), COLUMNS < 4),
        "no prefix": (masks.prefix(0), False),
        "prefix by row": (masks.prefix(lengths), lengths[:, None, None, None] > COLUMNS),
        "prefix lm": (masks.prefix_lm_mask(4), (COLUMNS < 4) | (COLUMNS <= ROWS)),
        "dense": (masks.dense(TABLE), TABLE),
        "segments": (masks.segment_mask(*IDS), same),
        "function": (masks.mask_mod(same_parity), ROWS % 2 == COLUMNS % 2),
        "function with arrays": (
            masks.mask_mod(diagonal, {"shift": shift}),
            (ROWS + COLUMNS + heads + shift[:, None, None, None]) % 2 == 0,
        ),
    }


CATALOGUE = {name: (mask, np.broadcast_to(dense, (B, N, T, S))) for name, (mask, dense) in _catalogue().items()}
over_masks = pytest.mark.parametrize("name", list(CATALOGUE))


@over_masks
def test_dense_form_and_count(name):
    mask, expected = CATALOGUE[name]
    dense = mask.to_dense(B, N, T, S)
    assert isinstance(dense, np.ndarray)
    assert dense.dtype == bool
    np.testing.assert_array_equal(dense, expected)
    np.testing.assert_array_equal(mask.count(B, N, T, S), expected.sum(-1))


@over_masks
def test_masks_of_device_arrays_are_traced_and_the_same(name):
    mask, expected = CATALOGUE[name]
    on_device = jax.tree.map(jnp.asarray, mask)
    if jax.tree.leaves(mask):
        assert isinstance(on_device.to_dense(B, N, T, S), jax.Array)
    np.testing.assert_array_equal(jax.jit(lambda m: m.to_dense(B, N, T, S))(on_device), expected)


# The function of a mask_mod reads its arrays itself.
@pytest.mark.parametrize("name", [name for name in CATALOGUE if name != "function with arrays"])
def test_a_host_mask_is_read_at_traced_places(name):
    mask, expected = CATALOGUE[name]
    places = np.meshgrid(*(np.arange(n) for n in (B, N, T, S)), indexing="ij")
    np.testing.assert_array_equal(jax.jit(mask.__call__)(*places), expected)


@over_masks
def test_positions(name):
    mask, dense = CATALOGUE[name]
    rng = np.random.default_rng(3)
    i, j = rng.integers(0, T, (B, 5)), rng.integers(0, S, (1, 4))
    found = mask.to_dense(B, N, 5, 4, query_positions=i, key_positions=j)
    expected = dense[
        np.arange(B)[:, None, None, None], np.arange(N)[:, None, None], i[:, None, :, None], j[:, None, None]
    ]
    np.testing.assert_array_equal(found, expected)
    counts = mask.count(B, N, 5, 4, query_positions=i, key_positions=j)
    np.testing.assert_array_equal(counts, expected.sum(-1))


def test_algebra():
    (left, one), (right, two) = CATALOGUE["sinks"], CATALOGUE["segments"]
    for mask, expected in (
        (left & right, one & two),
        (left | right, one | two),
        (~left, ~one),
        (~(left & ~right) | left, ~(one & ~two) | one),
    ):
        np.testing.assert_array_equal(mask.to_dense(B, N, T, S), np.broadcast_to(expected, (B, N, T, S)))


def test_de_morgan_also_holds_for_classes():
    bounds = np.array([0, 4]), np.array([3, 7]), np.array([0, 8]), np.array([7, 12])
    one, two = masks.causal(), masks.prefix(4)
    np.testing.assert_array_equal((~(one & two)).classify(*bounds), (~one | ~two).classify(*bounds))


EXACT = ("full", "causal", "window", "local", "open left", "open right", "prefix", "no prefix")


@over_masks
@pytest.mark.parametrize("kind", ["host", "device"])
def test_classes_are_never_wrong(name, kind):
    """DEAD and FULL against all pairs of every rectangle; single rectangles of the plain masks are exact."""
    mask, dense = CATALOGUE[name]
    ranges = [np.array(list(itertools.combinations_with_replacement(range(n), 2))) for n in (T, S)]
    (i_lo, i_hi), (j_lo, j_hi) = ranges[0].T[:, :, None], ranges[1].T[:, None, :]
    bounds = (i_lo, i_hi, j_lo, j_hi)
    if kind == "device":
        code = np.asarray(jax.jit(lambda m, *bounds: m.classify(*bounds))(mask, *bounds))
    else:
        code = mask.classify(*bounds)
        assert isinstance(code, np.ndarray)
    assert code.dtype == np.int8
    # Visible pairs of every rectangle, by sums over prefixes.
    sums = np.pad(dense.astype(int).cumsum(2).cumsum(3), [(0, 0), (0, 0), (1, 0), (1, 0)])
    visible = (
        sums[..., i_hi + 1, j_hi + 1] - sums[..., i_lo, j_hi + 1] - sums[..., i_hi + 1, j_lo] + sums[..., i_lo, j_lo]
    )
    pairs = (i_hi - i_lo + 1) * (j_hi - j_lo + 1)
    code = np.broadcast_to(code, pairs.shape)
    dead, full = (visible == 0).all((0, 1)), (visible == pairs).all((0, 1))
    assert not (code == DEAD)[~dead].any()
    assert not (code == FULL)[~full].any()
    if name in EXACT:
        np.testing.assert_array_equal(code == FULL, full)
        if name not in ("window", "local"):  # their corners may be empty though both bounds reach into the rectangle
            np.testing.assert_array_equal(code == DEAD, dead)


def _trees():
    leaves = st.sampled_from([name for name in CATALOGUE if name != "full"]).map(lambda name: CATALOGUE[name])
    join = lambda inner: st.one_of(  # noqa: E731
        st.tuples(inner, inner).map(lambda x: (x[0][0] & x[1][0], x[0][1] & x[1][1])),
        st.tuples(inner, inner).map(lambda x: (x[0][0] | x[1][0], x[0][1] | x[1][1])),
        inner.map(lambda x: (~x[0], ~x[1])),
    )
    return st.recursive(leaves, join, max_leaves=6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(_trees(), st.integers(0, T - 1), st.integers(0, T - 1), st.integers(0, S - 1), st.integers(0, S - 1))
def test_classes_of_combinations_are_never_wrong(tree, a, b, c, d):
    mask, dense = tree
    (i_lo, i_hi), (j_lo, j_hi) = sorted((a, b)), sorted((c, d))
    part = dense[:, :, i_lo : i_hi + 1, j_lo : j_hi + 1]
    code = mask.classify(*(np.array(x) for x in (i_lo, i_hi, j_lo, j_hi)))
    assert code != DEAD or not part.any()
    assert code != FULL or part.all()
    np.testing.assert_array_equal(mask.to_dense(B, N, T, S), dense)


def test_the_base_class_is_unsure():
    class Bare(Mask):
        pass

    assert Bare().classify(np.zeros(3, int), 1, 2, 3).tolist() == [PARTIAL] * 3
    with pytest.raises(NotImplementedError):
        Bare()(0, 0, 0, 0)


def test_masks_are_pytrees():
    mask = masks.prefix(np.array([1, 2])) & masks.causal()
    doubled = jax.tree.map(lambda x: 2 * x, mask)
    np.testing.assert_array_equal(
        doubled.to_dense(2, 1, 3, 6), (mask | masks.prefix(np.array([2, 4])) & masks.causal()).to_dense(2, 1, 3, 6)
    )
    assert masks.causal() == masks.local_window(None, 0)
    assert hash(masks.causal()) == hash(masks.local_window(None, 0))
    assert not jax.tree.leaves(masks.sliding_window(np.int64(4), 2))


def test_masks_through_vmap():
    lengths = jnp.array([[1, 2], [3, 4]])
    dense = jax.vmap(lambda n: masks.prefix(n).to_dense(2, 1, 2, 5))(lengths)
    np.testing.assert_array_equal(dense.sum(-1)[:, :, 0, 0], lengths)


def test_plot():
    matplotlib.use("Agg")
    mask = masks.mask_mod(diagonal, {"shift": np.array([0, 1])})
    for head in (0, 1):
        (image,) = mask.plot(T, S, batch_index=1, head=head).images
        np.testing.assert_array_equal(image.get_array(), CATALOGUE["function with arrays"][1][1, head])
    assert masks.causal().plot(5).images[0].get_array().shape == (5, 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: masks.sliding_window(0), "window .* >= 1, got 0"),
        (lambda: masks.sliding_window(2.5), "window .* must be an int >= 1, got 2.5"),
        (lambda: masks.sliding_window(2, -1), "num_sinks must be an int >= 0, got -1"),
        (lambda: masks.local_window(-1, 0), "left .* must be an int >= 0, got -1"),
        (lambda: masks.local_window(1, "2"), "right .* must be an int >= 0, got '2'"),
        (lambda: masks.prefix(1.5), r"length must be an int or integers \[B\], got float64"),
        (lambda: masks.prefix(np.zeros((2, 2), int)), r"shape \(2, 2\)"),
        (
            lambda: masks.dense(np.ones((2, 2), bool)),
            r"expected a boolean \[B\|1, N\|1, T\|1, S\|1\], got bool\[2, 2\]",
        ),
        (lambda: masks.dense(np.ones((1, 1, 2, 2))), "got float64"),
        (lambda: masks.segment_mask(np.zeros((1, 2))), "query_ids must be integers"),
        (lambda: masks.segment_mask(np.zeros((1, 2), int), np.zeros(2, int)), "key_ids must be integers of rank 2"),
        (
            lambda: masks.causal().to_dense(1, 1, 3, 3, query_positions=np.zeros((1, 2), int)),
            r"query_positions.*\(1, 2\)",
        ),
        (lambda: masks.causal().count(1, 1, 3, 3, key_positions=np.zeros((1, 3))), "key_positions.*expected integers"),
        (lambda: masks.prefix(np.array([1, 2, 3])).to_dense(2, 1, 3, 3), "prefix length has shape .*batch 2"),
        (lambda: masks.dense(TABLE).to_dense(B, N, T, S + 1), "dense array has shape .* at least 14 on axis 3"),
        (lambda: (~masks.dense(TABLE) | masks.causal()).to_dense(3, N, T, S), "expected leading axes of 1 or batch 3"),
        (
            lambda: (masks.full() & masks.segment_mask(*IDS)).to_dense(B, N, T + 1, S),
            "query_ids has shape .*at least 12",
        ),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: masks.causal() & np.ones((3, 3), bool), "masks combine with masks, got ndarray"),
        (lambda: masks.causal() | True, "masks combine with masks, got bool"),
        (lambda: masks.mask_mod(3), "function must be callable, got int"),
        (lambda: masks.mask_mod(remainder).to_dense(1, 1, 2, 2), "must return booleans, got int64"),
    ],
)
def test_bad_types_are_named(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def remainder(b, h, i, j, aux):
    return j % 2
