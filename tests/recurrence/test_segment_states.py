"""The states after segments against separate loops in float64 numpy, in all modes and directions, with gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.recurrence.api import linear_recurrence
from jattn.softmax.segments import renumber_segments, segment_ids_from_cu_seqlens, unpack_cu_seqlens
from jattn.testing.compiling import usual_options
from tests.recurrence.truth import KINDS, inputs, rng, truth

LENGTH = 23
STATIC = ("mode", "chunk_size", "reverse", "read", "implementation", "max_segments", "return_final_state")


@functools.partial(jax.jit, static_argnames=STATIC)
def states(arrays, **options):
    return linear_recurrence(**arrays, segment_final_state=True, **options)[-1]


@functools.partial(jax.jit, static_argnames=STATIC)
def gradients(arrays, weights, ids, **options):
    def loss(arrays):
        found = linear_recurrence(**arrays, segment_ids=ids, segment_final_state=True, **options)
        return sum(jnp.sum(x * w) for x, w in zip(found, weights, strict=True))

    return jax.grad(loss)(arrays)


def in64(function, *args, **options):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, function(*jax.tree.map(jnp.asarray, args), **options))


def close(found, expected, tolerance=1e-11):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * max(1.0, np.abs(expected).max()))


def ids():
    """A run over several chunks, several in one, one of a single token, padding at all places, an id that returns."""
    rows = np.zeros((3, LENGTH), int)
    rows[0, 11:], rows[0, 13:], rows[0, 14:19], rows[0, 20:] = 4, 2, -1, 0
    rows[1, :2], rows[1, 9:], rows[1, 6:9], rows[1, 21:] = -3, 0, 1, -1
    rows[2] = -1
    return rows


def given(kind, rank1, seed=2, **options):
    made = inputs(kind, rank1=rank1, seed=seed, batch=3, length=LENGTH, **options)
    made["initial_state"] = rng(seed + 1).normal(size=(3, 2, 5, 4))
    return made


def separate(arrays, rows, count, reverse=False, **options):
    """Each run by a loop of its own, without its padding, the first in the direction of the scan from the state."""
    arrays = dict(arrays)
    first = arrays.pop("initial_state")
    runs = renumber_segments(rows)
    out = np.zeros((rows.shape[0], count, *first.shape[1:]))
    for row in range(rows.shape[0]):
        total = runs[row].max() + 1
        out[row, 0] = first[row] if total < 1 else out[row, 0]
        for number in range(min(total, count)):
            here = runs[row] == number
            own = {name: x if x.ndim == 1 or name == "bonus" else x[row : row + 1, here] for name, x in arrays.items()}
            is_first = number == (total - 1 if reverse else 0)
            own["initial_state"] = first[row : row + 1] if is_first else None
            out[row, number] = truth(**own, reverse=reverse, **options)[1][0]
    return out


def ways(kind, rank1):
    """Modes and cuts; those that differ by the cut alone for one kind of problem."""
    yield from ({"mode": "recurrent"}, {"chunk_size": 4})
    if not rank1:
        yield {"mode": "associative"}
    if (kind, rank1) == ("channel", True):
        yield {"mode": "parallel", "chunk_size": 5}
        yield from ({"chunk_size": size} for size in (1, 2, 64))


@pytest.mark.parametrize("rank1", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_separate_loops(kind, rank1):
    arrays, rows = given(kind, rank1, strong=True), ids()
    expected = separate(arrays, rows, 7)
    assert np.all(expected[0, 4:] == 0)
    poisoned = {
        name: np.where((rows < 0).reshape(3, LENGTH, *(1,) * (x.ndim - 2)), np.nan, x)
        if x.ndim > 2 and x.shape[1] == LENGTH
        else x
        for name, x in arrays.items()
    }
    for options in ways(kind, rank1):
        close(in64(states, poisoned | {"segment_ids": rows}, max_segments=7, **options), expected)


@pytest.mark.parametrize("count", [2, 9])
def test_reversed_scans_number_segments_from_the_left(count):
    arrays, rows = given("channel", True), ids()
    expected = separate(arrays, rows, count, reverse=True)
    for options in ({"mode": "recurrent"}, {"chunk_size": 4}, {"chunk_size": 3, "read": "pre"}):
        found = in64(states, arrays | {"segment_ids": rows}, max_segments=count, reverse=True, **options)
        close(found, expected)
    plain = {name: x for name, x in arrays.items() if name not in "ab"}
    found = in64(states, plain | {"segment_ids": rows}, max_segments=count, reverse=True, mode="associative")
    close(found, separate(plain, rows, count, reverse=True))


WEIGHTS = [rng(5).normal(size=(3, LENGTH, 2, 4)), rng(6).normal(size=(3, 4, 2, 5, 4))]


def test_gradients_of_the_token_loop_are_those_of_separate_calls():
    arrays, rows = given("channel", True), ids()
    runs = renumber_segments(rows)

    def loss(arrays):
        total = jnp.sum(arrays["initial_state"][2] * WEIGHTS[1][2, 0])
        for row, number in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2)]:
            here = np.flatnonzero(runs[row] == number)
            own = {name: x[row : row + 1, here] for name, x in arrays.items() if name != "initial_state"}
            own["initial_state"] = arrays["initial_state"][row : row + 1] if number == 0 else None
            out, state = linear_recurrence(**own, mode="recurrent", return_final_state=True)
            total += jnp.sum(out[0] * WEIGHTS[0][row, here]) + jnp.sum(state[0] * WEIGHTS[1][row, number])
        return total

    assert runs.max(1).tolist() == [3, 2, -1]
    expected = in64(jax.jit(jax.grad(loss)), arrays)
    found = in64(gradients, arrays, WEIGHTS, rows, max_segments=4, mode="recurrent")
    for name, gradient in found.items():
        close(gradient, expected[name], 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rank1"), [("none", False), ("head", True), ("token", False), ("channel", True)])
def test_gradients_of_all_modes_are_those_of_the_token_loop(kind, rank1):
    arrays, rows = given(kind, rank1, strong=True), ids()
    first, *others = ways(kind, rank1)
    expected = in64(gradients, arrays, WEIGHTS, rows, max_segments=4, **first)
    assert all(np.abs(x).max() > 0 for x in expected.values())
    for options in others:
        if options.get("chunk_size") in (1, 2, 64):
            continue
        for name, gradient in in64(gradients, arrays, WEIGHTS, rows, max_segments=4, **options).items():
            close(gradient, expected[name], 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["triton", "tpu"])
def test_kernels_return_them_too(implementation):
    arrays, rows = given("token", True), ids()
    options = {"chunk_size": 8, "max_segments": 4}
    found = in64(states, arrays | {"segment_ids": rows}, implementation=implementation, **options)
    close(found, separate(arrays, rows, 4))
    if implementation == "triton":
        return  # What gradients need is the same for both, and slow in the interpreter.
    expected = in64(gradients, arrays, WEIGHTS, rows, **options)
    for name, gradient in in64(gradients, arrays, WEIGHTS, rows, implementation=implementation, **options).items():
        close(gradient, expected[name], 1e-9)


def test_one_token_and_grouped_heads():
    arrays = inputs("token", rank1=True, length=1)
    arrays["query"] = rng(1).normal(size=(2, 1, 6, 5))
    repeated = {name: x if name in ("query", "key", "value") else np.repeat(x, 3, 2) for name, x in arrays.items()}
    for mode in ("recurrent", "chunk"):
        rows = np.array([[3], [-1]])
        options = {"return_final_state": True, "segment_final_state": True, "max_segments": 2, "mode": mode}
        out, final, found = linear_recurrence(**arrays, segment_ids=rows, **options)
        assert out.shape == (2, 1, 6, 4)
        np.testing.assert_allclose(found[:, 0], final, rtol=1e-6)
        np.testing.assert_allclose(final, truth(**repeated, segment_ids=rows)[1], rtol=1e-5, atol=1e-6)
        assert not found[:, 1].any()


@pytest.mark.parametrize("kind", ["none", "head"])
@pytest.mark.parametrize("mode", ["recurrent", "chunk", "parallel", "associative"])
def test_without_ids_a_row_is_one_segment(kind, mode):
    arrays = given(kind, False)
    found = in64(states, arrays, mode=mode, chunk_size=4, max_segments=3)
    close(found[:, 0], truth(**arrays)[1])
    assert found.shape == (3, 3, 2, 5, 4) and not found[:, 1:].any()


def test_segments_are_counted_where_ids_are_known():
    arrays = {name: jnp.asarray(x, jnp.bfloat16) for name, x in given("token", True).items()}
    out, found = linear_recurrence(**arrays, segment_ids=ids(), segment_final_state=True, chunk_size=4)
    assert (found.shape, found.dtype, out.dtype) == ((3, 4, 2, 5, 4), jnp.float32, jnp.bfloat16)
    known = jnp.asarray(ids())
    counted = jax.jit(lambda arrays: linear_recurrence(**arrays, segment_ids=known, segment_final_state=True)[1])
    assert counted(arrays).shape == found.shape
    with pytest.raises(ValueError, match="under jit"):
        jax.jit(lambda x: linear_recurrence(**arrays, segment_ids=x, segment_final_state=True))(known)
    for options in ({"max_segments": 2}, {"max_segments": 0, "segment_final_state": True}):
        with pytest.raises(ValueError, match="max_segments"):
            linear_recurrence(**arrays, segment_ids=known, **options)


def test_packed_documents_are_rows_of_their_own():
    arrays = inputs("channel", rank1=True, batch=1, length=LENGTH)
    ends = np.array([0, 5, 5, 18, 20])
    rows = segment_ids_from_cu_seqlens(ends, LENGTH)[None]
    apart, row_ids = unpack_cu_seqlens(arrays, ends, 13, axis=1)
    found = in64(states, arrays | {"segment_ids": rows}, chunk_size=4, max_segments=4)
    one_by_one = truth(**apart, segment_ids=row_ids)[1]
    # An empty document is no run: those behind it move up.
    close(found[0, :3], one_by_one[[0, 2, 3]])
    assert not found[0, 3].any() and not one_by_one[1].any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["token", "delta"])
def test_no_state_is_held_for_every_token(kind):
    heads, width = 4, 32

    def bytes_needed(length, count):
        shape = (1, length, heads, width)
        arrays = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name in ("query", "key", "value")}
        arrays["log_decay"] = jax.ShapeDtypeStruct(shape[:3], jnp.float32)
        if kind == "delta":
            arrays |= {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name in "ab"}
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def loss(arrays, ids):
            return sum(
                x.sum()
                for x in linear_recurrence(
                    **arrays, segment_ids=ids, segment_final_state=count > 0, max_segments=count or None
                )
            )

        compiled = jax.jit(jax.grad(loss)).lower(arrays, ids).compile(usual_options())
        return compiled.memory_analysis().temp_size_in_bytes

    length, count = 4096, 32
    all_states = length * heads * width * width * 4
    assert bytes_needed(length, count) - bytes_needed(length, 0) < 0.25 * all_states
