"""What the blockwise path costs, from the compiler and from counts: no clock."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.softmax.arguments import build_problem
from jattn.softmax.blockwise.schedule import make_schedule
from jattn.testing.compiling import usual_options


def compiled(length, gradient, **arguments):
    x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)

    def run(query, key, value):
        return jattn.dot_product_attention(
            query, key, value, implementation="blockwise", block_sizes=(64, 64), **arguments
        )

    program = jax.grad(lambda *x: run(*x).sum(), (0, 1, 2)) if gradient else run
    return jax.jit(program).lower(x, x, x).compile(usual_options())


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "with backward"])
def test_memory_is_linear(gradient):
    """Four times the length takes at most four times the temporary memory (and a constant), not sixteen times."""
    small, large = (compiled(n, gradient, is_causal=True).memory_analysis().temp_size_in_bytes for n in (1024, 4096))
    assert large <= 4.2 * small + 2**20
    assert large < 4096 * 4096 * 4 / 8, "a quadratic array must not be there"


def test_a_broadcast_bias_is_not_materialized():
    bias = jnp.zeros((1, 1, 1, 4096))
    used = compiled(4096, True, bias=bias).memory_analysis().temp_size_in_bytes
    assert used < 4096 * 4096


def test_the_program_does_not_grow_with_the_length():
    small, large = (len(compiled(n, True, is_causal=True).as_text().splitlines()) for n in (1024, 4096))
    assert large <= 1.02 * small


def visited(length, blocks=(64, 64), **arguments):
    x = jnp.zeros((1, length, 1, 4))
    problem, _ = build_problem(x, x, x, block_sizes=blocks, **arguments)
    schedule = make_schedule(problem, True)
    return int(schedule.full_count.sum()), int(schedule.partial_count.sum())


def test_only_live_tiles_are_visited():
    n = 2048 // 64
    assert visited(2048) == (n * n, 0)
    assert visited(2048, is_causal=True) == (n * (n - 1) // 2, n)
    assert visited(2048, mask=jattn.masks.sliding_window(64)) == (0, 2 * n - 1)
    ids = np.repeat(np.arange(8), 256)[None]
    assert visited(2048, segment_ids=ids) == (8 * 4 * 4, 0)
    assert sum(visited(2048, segment_ids=ids, is_causal=True)) == 8 * 10
    lengths = {"key_value_seq_lengths": np.array([640])}
    assert visited(2048, **lengths) == (n * 10, 0)


def test_dead_tiles_are_skipped_in_both_passes():
    """The number of loop steps that run is counted by a score mod that calls back."""
    steps = []

    def count(logit, b, h, i, j):
        jax.debug.callback(lambda: steps.append(1))
        return logit

    query = jnp.ones((1, 256, 1, 4))
    mask = jattn.masks.sliding_window(32)

    def loss(query):
        return jattn.dot_product_attention(
            query,
            query,
            query,
            mask=mask,
            score_mod=jattn.ScoreMod(count),
            implementation="blockwise",
            block_sizes=(32, 32),
        ).sum()

    jax.block_until_ready(loss(query))
    jax.effects_barrier()
    assert len(steps) == 15
    steps.clear()
    jax.block_until_ready(jax.jit(jax.grad(loss))(query))
    jax.effects_barrier()
    assert len(steps) == 30
