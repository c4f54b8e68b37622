"""The kernels of the recurrence engine, interpreted, against loops in float64 numpy and the gradients of XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.recurrence.api import linear_recurrence
from jattn.testing.tolerance import assert_within_policy
from tests.recurrence.truth import inputs, rng, truth

KERNELS = ("triton", "tpu")
CASES = {
    "none": {},
    "head": {},
    "token, rank 1": {"rank1": True, "strong": True},
    "channel": {"strong": True},
    "channel, rank 1, grouped": {"rank1": True, "queries": 6},
    "token, pre": {"read": "pre"},
    "channel, rank 1, pre, packed": {"rank1": True, "strong": True, "read": "pre", "packed": True},
}
IDS = np.array([[0, 0, 0, -1, 0, 3, 3, 3, 0, 0, 0], [2] * 5 + [-1] * 2 + [1] * 4])


def case(name):
    options = dict(CASES[name])
    queries, read, packed = (options.pop(name, None) for name in ("queries", "read", "packed"))
    made = inputs(name.split(",")[0], length=11, seed=4, **options)
    if queries:
        made["query"] = rng(1).normal(size=(2, 11, queries, 5))
    made["initial_state"] = rng(2).normal(size=(2, 2 if queries is None else queries, 5, 4))
    if queries:
        del made["initial_state"]
    static = {}
    if read:
        static["read"] = read
        made["bonus"] = rng(3).normal(size=(2, 5))
    if packed:
        static["segment_ids"] = IDS
    return made, static


@functools.partial(jax.jit, static_argnames=("implementation", "read"))
def both(arrays, weights, implementation, **options):
    def loss(arrays):
        found = linear_recurrence(
            **arrays, **options, implementation=implementation, chunk_size=4, return_final_state=True
        )
        return sum(jnp.sum(x * w) for x, w in zip(found, weights, strict=True)), found

    return jax.grad(loss, has_aux=True)(arrays)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", KERNELS)
def test_a_kernel_is_the_token_loop_with_every_gradient(implementation, name):
    given, options = case(name)
    spread = {x: np.repeat(given[x], 3, 2) for x in ("log_decay", "a", "b") if "grouped" in name}
    expected = truth(**{**given, **spread}, **options)
    weights = [rng(number).normal(size=x.shape) for number, x in enumerate(expected)]
    with jax.enable_x64(True):
        arrays, weights = jax.tree.map(jnp.asarray, (given, weights))
        gradients, found = both(arrays, weights, implementation, **options)
        plain, _ = both(arrays, weights, "xla", **options)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, plain[name], rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("implementation", KERNELS)
def test_bfloat16_stays_within_policy(implementation):
    given = inputs("token", rank1=True, length=20)
    half = {name: jnp.asarray(x, jnp.float32 if name == "log_decay" else jnp.bfloat16) for name, x in given.items()}
    expected = truth(**{name: np.asarray(x, np.float64) for name, x in half.items()})
    found = linear_recurrence(**half, implementation=implementation, chunk_size=8)
    plain = linear_recurrence(**half, mode="recurrent")
    assert found.dtype == jnp.bfloat16
    assert_within_policy(found, expected[0], plain)


@pytest.mark.parametrize("implementation", KERNELS)
def test_float32_keeps_its_digits_next_to_strong_gates(implementation):
    given = inputs("channel", rank1=True, length=20)
    given["log_decay"][0, 3], given["log_decay"][1, 9] = -1e4, -50
    expected, _ = truth(**given)
    given = {name: jnp.asarray(x, jnp.float32) for name, x in given.items()}
    found = linear_recurrence(**given, implementation=implementation, chunk_size=8)
    assert np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)) < 2e-6


@pytest.mark.parametrize("implementation", KERNELS)
def test_segments_reach_the_kernel(implementation):
    given = inputs("token", rank1=True, length=11)
    given["segment_ids"] = IDS
    with jax.enable_x64(True):
        found = linear_recurrence(**jax.tree.map(jnp.asarray, given), implementation=implementation, chunk_size=4)
    np.testing.assert_allclose(found, truth(**given)[0], rtol=1e-10, atol=1e-10)


def test_kernels_compute_chunks_only():
    with pytest.raises(ValueError, match="computes mode='chunk'"):
        linear_recurrence(**inputs("none"), implementation="triton", mode="recurrent")
