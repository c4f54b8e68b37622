"""The TPU kernel for one query in the interpreter that emulates memories, transfers and races, on contiguous caches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

import jattn
from jattn.softmax.arguments import build_problem
from jattn.softmax.decoding import live_tiles
from jattn.softmax.kernel_arguments import make_inputs, make_pipeline
from jattn.testing.tolerance import assert_within_policy
from pallas_kernels.flash_decode.tpu import check_scalars, forward

B, S, N, K, D, DV = 3, 37, 6, 2, 24, 20
# Two cores, as v4 and v5p have them, share the parallel axes of the grid.
STRICT = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise", num_cores_or_threads=2
)


def draw(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


ARRAYS = [draw(B, 1, N, D, seed=8), draw(B, S, K, D, seed=9), draw(B, S, K, DV, seed=10)]


def launch(options, block_k, arrays=ARRAYS, **more):
    """What the kernel makes of the arguments of `dot_product_attention`, without the steps around it."""
    problem, _ = build_problem(*arrays, **options)
    sources = {"operands": problem.operands} | ({} if problem.bias is None else {"bias": problem.bias})
    return forward(
        *(jnp.asarray(x) for x in (problem.query, problem.key, problem.value)),
        live_tiles(problem, block_k),
        make_inputs(problem, sources),
        make_pipeline(problem, problem.bias is not None),
        block_k,
        scale=problem.scale,
        precision="highest",
        **more,
    )


CASES = {
    "ragged, two parts": ({"key_value_seq_lengths": np.array([5, 0, 37])}, {"splits": 2, "interpret": STRICT}),
    "window, bias and cap": (
        {
            "mask": jattn.masks.sliding_window(20, num_sinks=3),
            "query_positions": np.array([[36], [30], [4]]),
            "bias": draw(B, N, 1, S, seed=6),
            "logit_soft_cap": 2.0,
        },
        {"interpret": STRICT},
    ),
    "mask by head": ({"mask": draw(B, N, 1, S) < 0.3}, {"interpret": True}),
    "dropout": ({"dropout_rate": 0.3, "dropout_key": jax.random.key(2)}, {"splits": 3, "interpret": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_attention_without_races_and_nothing_is_read_before_it_is_written(name):
    options, more = CASES[name]
    out, lse = launch(options, 16, **more)
    assert more["interpret"] is True or not interpreter.races.races_found
    with jax.enable_x64(True):
        wide = [x.astype(np.float64) for x in ARRAYS]
        truth = jattn.dot_product_attention(
            *wide, **options, scale=float(np.float32(D**-0.5)), implementation="reference", return_residual=True
        )
    plain = jattn.dot_product_attention(
        *ARRAYS, **options, implementation="reference", return_residual=True, precision="highest"
    )
    alive = np.isfinite(np.asarray(truth[1]))
    assert_within_policy(np.asarray(out), np.asarray(plain[0]), np.asarray(truth[0]))
    np.testing.assert_array_equal(np.isfinite(lse[:, :, 0]), alive[:, 0])
    np.testing.assert_allclose(np.asarray(lse)[:, :, 0][alive[:, 0]], truth[1][:, 0][alive[:, 0]], rtol=1e-6)


def test_the_pages_of_a_pool_without_races():
    page, table = 16, np.array([[3, 0, 99], [-5, 4, 2]], np.int32)
    query, lengths = draw(2, 1, N, D), np.array([20, 40])
    key, value = draw(5, page, K, D, seed=1), draw(5, page, K, DV, seed=2)
    table[1, 0] = 1
    together = [x[np.minimum(table, 4)].reshape(2, -1, *x.shape[2:]) for x in (key, value)]
    problem, _ = build_problem(query, *together, key_value_seq_lengths=lengths)
    problem = dataclasses.replace(problem, key=jnp.asarray(key), value=jnp.asarray(value))
    key[2, 8:], value[2, 8:] = np.nan, np.inf
    out, _ = forward(
        *(jnp.asarray(x) for x in (query, key, value)),
        live_tiles(problem, page),
        make_inputs(problem, {}),
        make_pipeline(problem, False),
        page,
        scale=problem.scale,
        block_table=jnp.asarray(table),
        interpret=STRICT,
    )
    assert not interpreter.races.races_found
    wanted = jattn.dot_product_attention(query, *together, key_value_seq_lengths=lengths)
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-6)


def test_hidden_keys_poison_nothing():
    options = {"key_value_seq_lengths": np.array([5, 37, 37])}
    clean = launch(options, 16, interpret=True)
    key, value = ARRAYS[1].copy(), ARRAYS[2].copy()
    key[0, 5:], value[0, 5:] = np.nan, np.inf
    for got, wanted in zip(launch(options, 16, [ARRAYS[0], key, value], interpret=True), clean, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_a_tile_may_be_longer_than_the_cache():
    options = {"key_value_seq_lengths": np.array([5, 37, 37])}
    parts = [launch(options, block, interpret=True) for block in (16, 64)]
    for got, wanted in zip(*parts, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_lists_that_do_not_fit_in_scalar_memory_are_refused():
    lists = [jax.ShapeDtypeStruct((64, 2048), jnp.int32)]
    check_scalars(lists, 16)
    with pytest.raises(ValueError, match="take 1048576 bytes.* of 32 keys in place of 16 would do"):
        check_scalars(lists * 2, 16)


def test_tiles_must_divide_pages():
    with pytest.raises(ValueError, match="tiles of 16 keys do not divide pages of 37"):
        launch({}, 16, interpret=True, block_table=jnp.zeros((B, 1), jnp.int32))
