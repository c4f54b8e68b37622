"""How close is close enough: one policy for the whole library, without magic numbers.

The truth is computed in float64. A named plain program (the short reference in the working precision, logits in
float32) sets the scale: its errors are what the precision costs anybody. A candidate may have

    RMS error <= 2 e            with e the RMS error of the plain program,
    largest error <= 4 m + u    with m its largest error and u one ulp, in the working precision, of the largest value.

The same holds for every gradient. No program beats the truth rounded to the working precision, so e is at least the
error of that: a plain program that happens to be exact does not forbid rounding.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

RMS_FACTOR = 2.0
MAX_FACTOR = 4.0


class Errors(NamedTuple):
    """Root-mean-square and largest error of an array against the truth."""

    rms: float
    largest: float


def _float64(name: str, x: Any) -> np.ndarray:
    array = np.asarray(x)
    if array.dtype.kind not in "fiubV":  # V: bfloat16 and the float8 family, as numpy sees them
        raise ValueError(f"{name} must be a real array, got dtype {array.dtype} and shape {array.shape}")
    return array.astype(np.float64)


def errors(candidate: Any, truth: Any) -> Errors:
    """Measure an array against the truth, in float64.

    Args:
        candidate: array of any float dtype.
        truth: array of the same shape. Infinities must stand at the same places in both; they count as no error.

    Returns:
        The root-mean-square and the largest error; infinite if the candidate is NaN somewhere or its infinities differ.

    Raises:
        ValueError: the shapes differ, or the truth is NaN somewhere.

    Example:
        >>> errors([1.0, 2.5], [1.0, 2.0]).largest
        0.5
    """
    x, y = _float64("candidate", candidate), _float64("truth", truth)
    if x.shape != y.shape:
        raise ValueError(f"candidate has shape {x.shape}, expected the shape of the truth, {y.shape}")
    if np.isnan(y).any():
        raise ValueError("truth must not contain NaN")
    if not x.size:
        return Errors(0.0, 0.0)
    infinite = np.isinf(y)
    if not np.array_equal(x[infinite], y[infinite]) or not np.isfinite(x[~infinite]).all():
        return Errors(np.inf, np.inf)
    difference = np.where(infinite, 0.0, x - np.where(infinite, 0.0, y))
    return Errors(float(np.sqrt(np.mean(difference**2))), float(np.abs(difference).max()))


def ulp(truth: Any, dtype: Any) -> float:
    """One unit in the last place of the largest finite value of `truth`, in precision `dtype`.

    Args:
        truth: array.
        dtype: a float dtype.

    Returns:
        The spacing of numbers of `dtype` at that value.

    Raises:
        ValueError: `dtype` is not a float dtype.

    Example:
        >>> ulp([0.5, -1.0], "bfloat16")
        0.0078125
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a float dtype, got {dtype}")
    values = np.abs(_float64("truth", truth))
    largest = np.max(values, where=np.isfinite(values), initial=0.0)
    info = jnp.finfo(dtype)
    return float(info.eps) * 2.0 ** float(np.floor(np.log2(max(largest, float(info.tiny)))))


def within_policy(candidate: Any, truth: Any, plain: Any, *, dtype: Any = None) -> str:
    """Judge one array by the tolerance policy.

    Args:
        candidate: the array under test.
        truth: the same computed in float64.
        plain: the same computed by the plain program in the working precision.
        dtype: the working precision, where it is coarser than the candidate's (gradients of a bfloat16 program).

    Returns:
        "" when it is within policy, else a sentence with the measured and the allowed errors.

    Raises:
        ValueError: the shapes differ, or the truth is NaN somewhere.

    Example:
        >>> within_policy([1.0, 2.0], [1.0, 2.0], [1.0, 2.1])
        ''
    """
    working = jnp.dtype(getattr(candidate, "dtype", jnp.float32) if dtype is None else dtype)
    if not jnp.issubdtype(working, jnp.floating):
        working = jnp.dtype(jnp.float32)
    mine, theirs, unit = errors(candidate, truth), errors(plain, truth), ulp(truth, working)
    rounded = errors(_float64("truth", truth).astype(working), truth)
    allowed = Errors(RMS_FACTOR * max(theirs.rms, rounded.rms), MAX_FACTOR * theirs.largest + unit)
    if mine.rms <= allowed.rms and mine.largest <= allowed.largest:
        return ""
    return (
        f"RMS error {mine.rms:.3g} (allowed {allowed.rms:.3g}), largest error {mine.largest:.3g} (allowed "
        f"{allowed.largest:.3g}); plain program: {theirs.rms:.3g} and {theirs.largest:.3g}; working precision {working}"
    )


def assert_within_policy(candidate: Any, truth: Any, plain: Any, *, dtype: Any = None, what: str = "result") -> None:
    """Assert that every array of a tree is within the tolerance policy.

    Args:
        candidate: tree of arrays under test.
        truth: tree of the same structure, computed in float64.
        plain: tree of the same structure, by the plain program in the working precision.
        dtype: the working precision, where it is coarser than the candidate's dtype.
        what: what the tree is, for the message.

    Raises:
        AssertionError: an array exceeds the policy; the message names it, with measured and allowed errors.
        ValueError: the structures or the shapes differ.

    Example:
        >>> assert_within_policy({"out": 1.0}, {"out": 1.0}, {"out": 1.0}, what="forward")
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(candidate)
    truths, plains = structure.flatten_up_to(truth), structure.flatten_up_to(plain)
    for (path, leaf), true, base in zip(leaves, truths, plains, strict=True):
        complaint = within_policy(leaf, true, base, dtype=dtype)
        if complaint:
            raise AssertionError(f"{what}{jax.tree_util.keystr(path)}: {complaint}")
