"""The tolerance policy accepts what it promises to accept and nothing more."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jattn.testing import tolerance


def _truth(seed=0, shape=(64,)):
    return np.random.default_rng(seed).normal(size=shape)


def test_twice_the_plain_rms_passes_and_more_fails():
    truth = _truth()
    noise = np.random.default_rng(1).normal(size=truth.shape) * 1e-3
    assert tolerance.within_policy(truth + 1.99 * noise, truth, truth + noise) == ""
    assert "RMS" in tolerance.within_policy(truth + 2.01 * noise, truth, truth + noise)


def test_one_large_error_fails_although_the_rms_is_small():
    truth = _truth(shape=(10_000,))
    noise = np.where(np.arange(10_000) % 2, 1e-3, -1e-3)
    candidate = truth.copy()
    candidate[3] += 4.1e-3
    assert "largest error" in tolerance.within_policy(candidate, truth, truth + noise)
    candidate[3] = truth[3] + 3.9e-3
    assert tolerance.within_policy(candidate, truth, truth + noise) == ""


def test_rounding_is_allowed_when_the_plain_program_happens_to_be_exact():
    truth = _truth()
    assert tolerance.within_policy(jnp.asarray(truth, jnp.bfloat16), truth, truth) == ""
    assert tolerance.within_policy(jnp.asarray(truth * 1.02, jnp.bfloat16), truth, truth) != ""


def test_nan_and_misplaced_infinities_fail():
    truth = np.array([1.0, -np.inf])
    assert tolerance.within_policy(truth, truth, truth) == ""
    assert tolerance.within_policy([np.nan, -np.inf], truth, truth) != ""
    assert tolerance.within_policy([1.0, -1e30], truth, truth) != ""
    assert tolerance.within_policy([1.0, np.inf], truth, truth) != ""


def test_ulp_is_the_spacing_at_the_largest_value():
    for value in (1.0, 1.5, 3.0, 1000.0, 0.1):
        assert tolerance.ulp([value, value / 3], np.float32) == np.spacing(np.float32(value))
    # numpy has no spacing for bfloat16, whose significand holds 8 bits
    assert tolerance.ulp([3.0], ml_dtypes.bfloat16) == 2**-6


def test_trees_are_compared_leaf_by_leaf_and_the_bad_leaf_is_named():
    truth = {"q": np.ones(3), "k": np.ones(3)}
    bad = {"q": np.ones(3, np.float32), "k": np.full(3, 2.0, np.float32)}
    tolerance.assert_within_policy(truth, truth, truth)
    with pytest.raises(AssertionError, match=r"gradient\['k'\]"):
        tolerance.assert_within_policy(bad, truth, truth, what="gradient")


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"candidate has shape \(3,\), expected .* \(2,\)"):
        tolerance.errors(np.ones(3), np.ones(2))
    with pytest.raises(ValueError, match="truth must not contain NaN"):
        tolerance.errors([1.0], [np.nan])
    with pytest.raises(ValueError, match="float dtype"):
        tolerance.ulp([1.0], int)
    with pytest.raises(ValueError, match="real array"):
        tolerance.errors(np.array([1j]), np.array([1j]))
    with pytest.raises(ValueError):
        tolerance.assert_within_policy({"a": 1.0}, {"b": 1.0}, {"a": 1.0})


def test_empty_arrays_have_no_error():
    assert tolerance.errors(np.zeros((0, 2)), np.zeros((0, 2))) == (0.0, 0.0)
    assert tolerance.within_policy(np.zeros(0), np.zeros(0), np.zeros(0)) == ""
