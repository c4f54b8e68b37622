"""The linear memory of Titans against a token scan in numpy, and against its identities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.cache import RecurrentState
from jattn.mechanisms.memory.titans_linear_memory import titans_linear_memory
from jattn.recurrence.api import linear_recurrence
from jattn.testing.tolerance import assert_within_policy
from tests.mechanisms.memory.memory_truth import inputs, scan

T = 11
IDS = np.array([[0, 0, 0, 1, 1, -1, 1, 1, 1, 1, 0], [-1, 3, -1, -1, 3, 3, 3, 3, 3, 7, 7]])
memory = jax.jit(titans_linear_memory, static_argnames=("chunk_size", "return_final_state"))


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-11)


def first(seed=5, memories=2, width=3, v_dim=4):
    return np.random.default_rng(seed).normal(size=(memories, width, v_dim))


def edges(given):
    """Some gates that forget or keep everything, exactly."""
    query, key, value, alpha, theta, eta = given
    alpha[:, 2], alpha[0, 5], eta[:, 4], eta[-1, 6], theta[:, 8] = 1.0, 0.0, 0.0, 1.0, 0.0
    return given


@pytest.mark.parametrize("chunk_size", [1, 3, 4, T, 16])
@pytest.mark.parametrize("ids", [None, IDS], ids=["row", "packed"])
def test_it_is_the_token_scan(chunk_size, ids):
    given, start = edges(inputs(heads=4, v_dim=4)), first()
    out, state = memory(*given, chunk_size=chunk_size, initial_memory=start, segment_ids=ids, return_final_state=True)
    expected, weights, momentum = scan(*given, [start], chunk_size=chunk_size, ids=ids)
    close(out, expected)
    close(state.state, weights[0])
    close(state.aux[1], momentum[0])


@pytest.mark.parametrize("chunk_size", [67, 128])
def test_chunks_longer_than_a_block(chunk_size):
    given = inputs(1, batch=1, length=140, memories=1, heads=1)
    out, state = memory(*given, chunk_size=chunk_size, return_final_state=True)
    expected, weights, momentum = scan(*given, [np.zeros((1, 3, 3))], chunk_size=chunk_size)
    close(out, expected)
    close(state.state, weights[0])
    close(state.aux[1], momentum[0])


@pytest.mark.parametrize("chunk_size", [1, 4, 5])
def test_split_anywhere(chunk_size):
    given, start = inputs(2, v_dim=4), first()
    whole, last = memory(*given, chunk_size=chunk_size, initial_memory=start, return_final_state=True)
    for cuts in ((4, 8), (1, 3, 6, 10), tuple(range(1, T))):
        state, parts = None, []
        for i, j in zip((0, *cuts), (*cuts, T), strict=True):
            out, state = memory(
                *(x[:, i:j] for x in given),
                chunk_size=chunk_size,
                initial_memory=start,
                initial_state=state,
                return_final_state=True,
            )
            parts.append(out)
        close(np.concatenate(parts, 1), whole)
        jax.tree.map(close, state, last)


def test_at_a_border_w_and_s_are_enough():
    given, start = inputs(2, v_dim=4), first()
    options = {"chunk_size": 4, "initial_memory": start, "return_final_state": True}
    whole, _ = memory(*given, **options)
    _, state = memory(*(x[:, :8] for x in given), **options)
    close(state.aux[0], state.state)
    bare = RecurrentState(state.state, (state.state, state.aux[1], jnp.zeros(2, jnp.int32)))
    out, _ = memory(*(x[:, 8:] for x in given), initial_state=bare, **options)
    close(out, whole[:, 8:])


def test_a_packed_row_goes_on_from_a_state():
    given, start = inputs(3, v_dim=4), first()
    options = {"chunk_size": 3, "initial_memory": start, "return_final_state": True}
    whole = np.concatenate([np.zeros((2, 5), int), np.array([[0, 0, -1, 0, 1, 1]] * 2)], 1)
    expected, last = memory(*given, segment_ids=whole, **options)
    _, state = memory(*(x[:, :5] for x in given), **options)
    rest = np.where(whole < 0, -1, whole + 8)[:, 5:]
    out, found = memory(*(x[:, 5:] for x in given), segment_ids=rest, initial_state=state, **options)
    close(out, expected[:, 5:])
    jax.tree.map(close, found, last)


def test_full_forgetting_without_momentum_leaves_the_last_gradient():
    query, key, value, _, theta, _ = given = inputs(4, v_dim=4)
    _, state = memory(*given[:3], 1.0, theta, 0.0, chunk_size=1, return_final_state=True)
    _, before = memory(*(x[:, :-1] for x in given[:3]), 1.0, theta[:, :-1], 0.0, chunk_size=1, return_final_state=True)
    missed = np.einsum("bhd,bhde->bhe", key[:, -1], before.state) - value[:, -1]
    close(state.state, -2 * theta[:, -1, :, None, None] * key[:, -1, :, :, None] * missed[:, :, None])


def test_without_steps_and_forgetting_nothing_changes():
    given, start = inputs(5, v_dim=4), first()
    out = memory(*given[:3], 0.0, 0.0, given[5], chunk_size=3, initial_memory=start)
    close(out, np.einsum("bthd,hde->bthe", given[0], start))


def test_one_token_chunks_without_momentum_are_the_delta_rule():
    query, key, value, alpha, theta, _ = inputs(6, v_dim=4)
    delta = functools.partial(linear_recurrence, scale=1.0, mode="recurrent")
    out = memory(query, key, value, 0.0, 0.5, 0.0, chunk_size=1)
    close(out, delta(query, key, value, a=-key, b=key))
    out = memory(query, key, value, 0.0, theta, 0.0, chunk_size=1)
    rate = 2 * theta[..., None] * key
    close(out, delta(query, rate, value, a=-key, b=rate))
    # The gradient sees the memory before it forgets, unlike that of the gated delta rule.
    out = memory(query, key, value, alpha, theta, 0.0, chunk_size=1)
    close(out, delta(query, rate, value, log_decay=np.log1p(-alpha), a=-key, b=rate))


def test_one_chunk_without_gates_is_linear_attention():
    query, key, value, _, theta, _ = inputs(7, v_dim=4)
    for chunk_size in (T, 40):
        out = memory(query, key, value, 0.0, theta, 0.0, chunk_size=chunk_size)
        scores = np.einsum("bthd,bshd->bhts", query, key) * np.tri(T)
        close(out, np.einsum("bhts,bshe->bthe", scores, 2 * theta[..., None] * value))


def test_momentum_makes_early_tokens_weigh_more():
    query, key, value, _, theta, _ = inputs(8, v_dim=4)
    _, state = memory(query, key, value, 0.0, theta, 0.6, chunk_size=T, return_final_state=True)
    weight = np.cumsum(0.6 ** np.arange(T))[::-1]
    close(state.state, np.einsum("t,bthd,bthe->bhde", weight, key, 2 * theta[..., None] * value))


def test_the_chunk_size_is_a_part_of_the_definition():
    given = inputs(9)
    assert np.abs(memory(*given, chunk_size=1) - memory(*given, chunk_size=4)).max() > 1e-3


def test_gradients_at_closed_gates_are_those_of_the_token_scan():
    given = edges(inputs(10, batch=1, length=9, memories=1, heads=1))
    start = first(memories=1, v_dim=3)
    cotangent = np.random.default_rng(0).normal(size=given[2].shape)

    def loss(alpha, eta):
        return jnp.sum(
            titans_linear_memory(*given[:3], alpha, given[4], eta, chunk_size=4, initial_memory=start) * cotangent
        )

    found = jax.jit(jax.grad(loss, (0, 1)))(given[3], given[5])
    for gradient, place, tokens in zip(found, (3, 5), ((1, 2, 5), (3, 4, 6)), strict=True):
        for t in tokens:
            sums = []
            for shift in (1e-6, -1e-6):
                moved = [np.array(x) for x in given]
                moved[place][0, t, 0] += shift
                sums.append(np.sum(scan(*moved, [start], chunk_size=4)[0] * cotangent))
            np.testing.assert_allclose(gradient[0, t, 0], (sums[0] - sums[1]) / 2e-6, rtol=1e-6, atol=1e-8)


def test_strong_gates_cost_no_digits():
    query, key, value, alpha, theta, eta = inputs(11, length=96)
    alpha[:, 20], alpha[:, 40:44], eta[:, 30], eta[:, 50:60] = 1 - 1e-7, 0.999, 1e-20, 1e-4
    alpha[:, 60:], eta[:, 60:] = 1e-4, 0.99
    arrays = [x.astype(np.float32) for x in (query, key, value, alpha, theta, eta)]

    def plain(query, key, value, alpha, theta, eta):
        def step(carry, token):
            weights, momentum, border, t = carry
            q, k, v, a, th, et = token
            border = jnp.where(t % 32 == 0, weights, border)
            missed = jnp.einsum("bhd,bhde->bhe", k, border) - v
            momentum = et[..., None, None] * momentum - jnp.einsum("bh,bhd,bhe->bhde", 2 * th, k, missed)
            weights = (1 - a)[..., None, None] * weights + momentum
            return (weights, momentum, border, t + 1), jnp.einsum("bhd,bhde->bhe", q, weights)

        zero = jnp.zeros((2, 2, 3, 3), query.dtype)
        tokens = [jnp.swapaxes(x, 0, 1) for x in (query, key, value, alpha, theta, eta)]
        return jax.lax.scan(step, (zero, zero, zero, 0), tokens)[1].swapaxes(0, 1)

    truth = plain(*[x.astype(np.float64) for x in arrays])
    assert_within_policy(memory(*arrays, chunk_size=32), truth, plain(*map(jnp.asarray, arrays)))


def test_nan_in_padding_reaches_nothing():
    given = inputs(12)
    poisoned = [np.where((IDS < 0).reshape(2, T, *(1,) * (x.ndim - 2)), np.nan, x) for x in given]
    options = {"chunk_size": 4, "segment_ids": IDS, "return_final_state": True}
    jax.tree.map(close, memory(*poisoned, **options), memory(*given, **options))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(titans_linear_memory(*x, chunk_size=4, segment_ids=IDS) ** 2)))(
        poisoned
    )
    assert all(np.isfinite(x).all() for x in gradient)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"alpha": np.ones((2, T, 3))}, "alpha must broadcast to"),
        ({"initial_memory": np.ones((2, 3, 5))}, "initial_memory must be"),
        ({"query": np.ones((2, 5, 2, 3))}, "query must have the length of key"),
        ({"initial_state": RecurrentState(np.ones((2, 1)), (0, 0, 0))}, "initial_state: state must be"),
        ({"segment_ids": np.ones((2, 3), int)}, "segment_ids must be integers"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    names = ("query", "key", "value", "alpha", "theta", "eta")
    with pytest.raises(ValueError, match=message):
        titans_linear_memory(**{**dict(zip(names, inputs(), strict=True)), "chunk_size": 4, **changes})
