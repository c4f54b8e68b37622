"""What the recurrence engine needs grows with T alone, and keeps states instead of matrices for the backward pass."""

import jax
import jax.numpy as jnp
import pytest

import jattn
from jattn.recurrence import chunk
from jattn.recurrence.api import run
from jattn.testing.compiling import usual_options
from jattn.testing.jaxprs import count_work

N, D = 4, 32


def arguments(length, kind):
    shape = (1, length, N, D)
    shapes = {"query": shape, "key": shape, "value": shape}
    if kind != "none":
        shapes["log_decay"] = shape if kind == "channel" else shape[:3]
    if kind == "delta":
        shapes |= {"a": shape, "b": shape}
    return {name: jax.ShapeDtypeStruct(x, jnp.float32) for name, x in shapes.items()}


def bytes_of_gradient(length, kind):
    def loss(arrays):
        return jattn.linear_recurrence(**arrays).sum()

    return jax.jit(jax.grad(loss)).lower(arguments(length, kind)).compile(usual_options()).memory_analysis()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "token", "channel", "delta"])
def test_matrices_of_chunks_are_computed_again(kind, monkeypatch):
    short, long = (bytes_of_gradient(length, kind).temp_size_in_bytes for length in (1024, 4096))
    assert long < 4.2 * short
    run.clear_cache()
    monkeypatch.setattr(chunk.jax, "checkpoint", lambda function, **_: function)
    kept = bytes_of_gradient(4096, kind).temp_size_in_bytes
    run.clear_cache()
    assert long < 0.4 * kept


@pytest.mark.parametrize("kind", ["none", "token"])
def test_a_forward_pass_copies_no_inputs(kind):
    given = arguments(4096, kind)
    program = jax.jit(lambda arrays: jattn.linear_recurrence(**arrays)).lower(given).compile(usual_options())
    # Copies of query, key and value would be three times the value.
    assert program.memory_analysis().temp_size_in_bytes < given["value"].size * 4


def test_work_grows_with_the_length_and_a_step_does_not_know_it():
    def work(length):
        arrays = {name: jnp.zeros(x.shape) for name, x in arguments(length, "channel").items()}
        return count_work(lambda arrays: jattn.linear_recurrence(**arrays), arrays)

    assert 3.9 < work(4096) / work(1024) < 4.1


def test_states_are_float32_and_as_large_as_their_heads():
    arrays = {name: jnp.zeros(x.shape, jnp.bfloat16) for name, x in arguments(8, "none").items()}
    _, state = jattn.linear_recurrence(**arrays, return_final_state=True)
    assert (state.shape, state.dtype) == ((1, N, D, D), jnp.float32)
