import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jattn.softmax.topk import topk_mask

SCORES = st.sampled_from([-np.inf, np.nan, -1.0, -0.0, 0.0, 1.0, 2.0, np.inf])


def by_hand(scores, k, forced, allowed):
    chosen = [n for n in range(len(scores)) if forced[n] and allowed[n]]
    rest = [n for n in range(len(scores)) if allowed[n] and n not in chosen and scores[n] > -np.inf]
    rest.sort(key=lambda n: (-scores[n], n))
    chosen += rest[: max(k - len(chosen), 0)]
    return np.isin(np.arange(len(scores)), chosen)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(SCORES, st.booleans(), st.booleans()), min_size=1, max_size=7), st.integers(0, 8))
def test_selection_equals_sorting_by_hand(entries, k):
    scores, forced, allowed = (np.array(x) for x in zip(*entries, strict=True))
    np.testing.assert_array_equal(
        topk_mask(scores, k, forced=forced, allowed=allowed), by_hand(scores, k, forced, allowed)
    )
    none, every = np.zeros(len(scores), bool), np.ones(len(scores), bool)
    np.testing.assert_array_equal(topk_mask(scores, k), by_hand(scores, k, none, every))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_traced_selection_equals_the_static_one(dtype):
    rng = np.random.default_rng(0)
    scores = rng.integers(-3, 3, (4, 3, 11))
    forced, allowed = rng.random((2, 4, 3, 11)) < np.array([0.2, 0.7])[:, None, None, None]
    k = rng.integers(0, 9, (4, 3))
    traced = jnp.asarray(scores, dtype)
    np.testing.assert_array_equal(
        jax.jit(lambda s, k: topk_mask(s, k, forced=forced, allowed=allowed))(traced, jnp.asarray(k)),
        topk_mask(scores, k, forced=forced, allowed=allowed),
    )
    np.testing.assert_array_equal(jax.jit(lambda s: topk_mask(s, 4))(traced), topk_mask(scores, 4))


def test_lowest_integer_is_an_ordinary_score():
    lowest = np.iinfo(np.int32).min
    scores = np.array([lowest, lowest, lowest], np.int32)
    chosen = topk_mask(scores, 1, allowed=np.array([False, True, True]))
    assert chosen.tolist() == [False, True, False]


def test_static_scores_stay_static_while_tracing():
    def constant(x):
        assert isinstance(topk_mask(np.arange(4.0), 2), np.ndarray)
        return x

    jax.jit(constant)(0.0)


def test_selection_is_no_path_for_gradients():
    def loss(x):
        return jnp.where(topk_mask(x, 2), x, 0.0).sum()

    np.testing.assert_array_equal(jax.grad(loss)(jnp.array([3.0, 1.0, 2.0])), [1.0, 0.0, 1.0])


@pytest.mark.parametrize(
    ("arguments", "options", "named"),
    [
        ((np.float32(1.0), 1), {}, "scores"),
        ((np.ones(3, bool), 1), {}, "scores"),
        ((np.ones(3), -1), {}, "k must"),
        ((np.ones(3), np.ones(3)), {}, "k must"),
        ((np.ones(3), 1), {"forced": np.ones(3)}, "forced"),
        ((np.ones(3), 1), {"allowed": np.ones(2, bool)}, "allowed"),
    ],
)
def test_bad_arguments_are_named(arguments, options, named):
    with pytest.raises(ValueError, match=named):
        topk_mask(*arguments, **options)
