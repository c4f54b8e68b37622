import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.recurrence.diagonal import MODES, diagonal_recurrence

B, T, C = 2, 11, 3
IDS = np.array([[-1, 4, 4, -1, 4, 2, 2, 4, 4, -1, 4], [1, 1, 1, 1, -1, -1, 1, 1, 1, 7, -1]])


def inputs(seed=0):
    r = np.random.default_rng(seed)
    g = -np.abs(r.normal(size=(B, T, C)))
    g[:, 2], g[:, 5], g[:, 7, 0], g[0, 8] = -1e4, -50, 0, -np.inf
    return r.normal(size=(B, T, C)), g, r.normal(size=(B, C))


def truth(x, g, state, ids=None):
    h, last = np.zeros_like(x), state.copy()
    for row in range(len(x)):
        before = None
        for t in range(x.shape[1]):
            own = 0 if ids is None else ids[row, t]
            if own < 0:
                continue
            if before is not None and own != before:
                last[row] = 0
            before = own
            last[row] = np.exp(g[row, t]) * last[row] + x[row, t]
            h[row, t] = last[row]
    return h, last


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ids", [None, IDS])
@pytest.mark.parametrize(("mode", "chunk_size"), [*((mode, 4) for mode in MODES), ("chunk", 1), ("chunk", 11)])
def test_it_is_its_definition(mode, chunk_size, ids):
    x, g, state = inputs()
    run = jax.jit(diagonal_recurrence, static_argnames=("mode", "chunk_size"))
    with jax.enable_x64(True):
        found = run(x, g, initial_state=state, segment_ids=ids, mode=mode, chunk_size=chunk_size)
        jax.tree.map(close, found, truth(x, g, state, ids))


def test_in_float32_strong_gates_leave_mild_ones_alone():
    x, g, state = inputs()
    expected = truth(x, g, state)[0]
    run = jax.jit(diagonal_recurrence, static_argnames="mode")
    for mode in MODES:
        found = run(*(a.astype(np.float32) for a in (x, g)), initial_state=state, mode=mode)[0]
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def test_gradients_agree_and_poison_in_padding_reaches_nothing():
    x, g, state = inputs()
    g = np.maximum(g, -1e4)
    poisoned = [np.where(IDS[..., None] >= 0, a, np.nan) for a in (x, g)]

    def gradient(mode, x, g, state):
        def loss(x, g, state):
            h, last = diagonal_recurrence(x, g, initial_state=state, segment_ids=IDS, mode=mode, chunk_size=4)
            return jnp.sum(jnp.sin(h)) + jnp.sum(last**2)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(x, g, state)

    with jax.enable_x64(True):
        expected = gradient("recurrent", x, g, state)
        assert all(np.isfinite(a).all() for a in expected)
        jax.tree.map(close, gradient("chunk", x, g, state), expected)
        jax.tree.map(close, gradient("chunk", *poisoned, state), expected)


def test_errors():
    x, g, state = inputs()
    for call, words in (
        (lambda: diagonal_recurrence(x, g[:, :4]), "must both be"),
        (lambda: diagonal_recurrence(x, g, mode="fast"), "mode must be"),
        (lambda: diagonal_recurrence(x, g, chunk_size=0), "chunk_size at least 1"),
        (lambda: diagonal_recurrence(x, g, initial_state=state[:1]), "initial_state must be"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
