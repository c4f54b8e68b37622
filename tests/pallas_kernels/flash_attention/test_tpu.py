"""The TPU kernels in the interpreter that emulates memories, transfers and races; their walk and their tile sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention import tpu, tpu_backward, tpu_sizes
from pallas_kernels.flash_attention.pipeline import Backward, Pipeline, TileInput
from pallas_kernels.flash_attention.steps import BITS, FIRST, FULL, LAST, PARTIAL, make_steps

B, T, S, N, K, D = 1, 140, 150, 2, 1, 8
SIZES = tpu_sizes.TpuTiles(128, 128)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def causal_code():
    """Tiles of 128 of the causal pattern; the last ones reach beyond the ends."""
    return np.array([[[[1, 0], [1, 1]]]], np.int8)


PIPELINE = Pipeline(
    visible=lambda place, tiles: place.column <= place.row,
    modify=lambda logits, place, tiles: (logits + tiles["bias"] + tiles["table"]) * tiles["rows"] + tiles["columns"],
)
INPUTS = {
    "bias": TileInput(draw(1, 1, T, S, seed=3)),
    "table": TileInput(draw(1, N, 1, 40, seed=4), center=20),
    "rows": TileInput(1 + 0.1 * draw(B, N, T, 1, seed=5)),
    "columns": TileInput(draw(1, N, 1, S, seed=6)),
}


def arrays():
    return tuple(draw(B, n, heads, D, seed=n + heads) for n, heads in ((T, N), (S, K), (S, K)))


def plain(query, key, value, values):
    """Output and log-sum-exp, one equation at a time."""
    i, j = jnp.arange(T)[:, None], jnp.arange(S)[None]
    key, value = (jnp.repeat(x, N // K, axis=2) for x in (key, value))
    logits = jnp.einsum("btnd,bsnd->bnts", query, key) * 0.3
    table = values["table"][..., 0, jnp.clip(j - i + 20, 0, 39)]
    logits = (logits + values["bias"] + table) * values["rows"] + values["columns"]
    logits = jnp.where(j <= i, logits, -jnp.inf)
    return jnp.einsum("bnts,bsnd->btnd", jax.nn.softmax(logits), value), jax.nn.logsumexp(logits, axis=-1)


def test_no_races_and_nothing_is_read_before_it_is_written():
    # Two cores, as v4 and v5p have them, share the parallel axes of the grid.
    interpret = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise", num_cores_or_threads=2
    )
    query, key, value = arrays()
    values = {name: given.array for name, given in INPUTS.items()}
    settings = {"scale": 0.3, "interpret": interpret}
    out, lse = tpu.forward(query, key, value, causal_code(), INPUTS, PIPELINE, SIZES, **settings)
    expected, pull = jax.vjp(plain, query, key, value, values)
    np.testing.assert_allclose(out, expected[0], atol=1e-5)
    np.testing.assert_allclose(lse, expected[1], atol=1e-5)

    out_ct, lse_ct = draw(*out.shape, seed=7), draw(*lse.shape, seed=8)
    # The kernel's sums of weights are lse's derivative once what the output loses by it is taken off.
    total = lse_ct - jnp.einsum("btnd,btnd->bnt", out_ct, out)
    given = Backward(out_ct, lse, total, causal_code())
    *found, inputs = tpu_backward.backward(query, key, value, INPUTS, PIPELINE, SIZES, given, tuple(INPUTS), **settings)
    *wanted, wanted_inputs = pull((out_ct, lse_ct))
    for got, want in zip(jax.tree.leaves((found, inputs)), jax.tree.leaves((wanted, wanted_inputs)), strict=True):
        np.testing.assert_allclose(got, want, atol=3e-5, rtol=1e-4)
    assert not interpreter.races.races_found


@pytest.mark.parametrize("seed", range(3))
def test_steps_are_the_live_tiles_in_order(seed):
    code = np.random.default_rng(seed).integers(0, 3, (2, 1, 4, 5)).astype(np.int8)
    code[0, 0, 2] = 0
    steps = make_steps(code)
    assert steps.dtype == np.int32
    for walk, classes in zip(steps[:, 0], code[:, 0], strict=True):
        live = [int(x) for x in walk if x & (PARTIAL | FULL)]
        expected = [n for n in range(20) if classes.reshape(-1)[n]]
        assert [x >> BITS for x in live] == expected
        assert [bool(x & FULL) for x in live] == [classes.reshape(-1)[n] == 2 for n in expected]
        firsts, lasts = ([(int(x) >> BITS) // 5 for x in walk if x & flag] for flag in (FIRST, LAST))
        assert firsts == lasts == [0, 1, 2, 3]
    traced = jax.jit(make_steps)(code)
    np.testing.assert_array_equal(traced[..., : steps.shape[-1]], steps)
    assert not (traced[..., steps.shape[-1] :] & 15).any()


@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (512, 512)], ids=str)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("backward", [False, True])
def test_chosen_tiles_fit(dims, itemsize, backward):
    tiles = tpu_sizes.choose(*dims, itemsize, backward)
    tpu_sizes.check(tiles, *dims, itemsize, backward)
    assert tpu_sizes.vector_bytes(tiles, *dims, itemsize, backward) <= tpu_sizes.VECTOR_MEMORY


def test_tiles_that_do_not_fit_name_some_that_do():
    with pytest.raises(ValueError, match=r"ask for \d+ bytes of vector memory, a kernel has 16777216; TpuTiles"):
        tpu_sizes.check(tpu_sizes.TpuTiles(2048, 2048), 128, 128, 2, False)
    with pytest.raises(ValueError, match="block_k must be a multiple of 128 on TPUs, got 100"):
        tpu_sizes.check(tpu_sizes.TpuTiles(128, 100), 128, 128, 2, False)


def test_a_list_that_scalar_memory_cannot_hold_is_refused():
    query, key, value = (jax.ShapeDtypeStruct((1, 128 * 300, 1, 8), jnp.float32) for _ in range(3))
    code = np.ones((1, 1, 300, 300), np.int8)

    def run(query, key, value):
        return tpu.forward(query, key, value, code, {}, PIPELINE, SIZES, scale=1.0)

    with pytest.raises(NotImplementedError, match="360000 bytes.*it may take 262144"):
        jax.eval_shape(run, query, key, value)
