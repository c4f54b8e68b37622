"""The TPU kernel for one new token compiles for every TPU, over contiguous caches and over pages."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

import jattn
import jattn.aot
from jattn.softmax.arguments import build_problem
from jattn.softmax.decoding import live_tiles
from jattn.softmax.kernel_arguments import make_inputs, make_pipeline
from pallas_kernels.flash_decode import tpu

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs pip install 'jattn[aot-tpu]'"),
]
TPUS = ["v4", "v5e", "v5p", "v6e"]
B, N, K, S, PAGE = 2, 8, 2, 1280, 128


def add_all(logit, b, h, i, j, slope, at_key, table):
    return logit + slope * (j - i) + at_key + table


def mod():
    operands = {"slope": ((N,), "head"), "at_key": ((B, 1, S), "key"), "table": ((N, 9), "offset")}
    return jattn.ScoreMod(add_all, {n: jattn.Operand(jnp.ones(shape), kind) for n, (shape, kind) in operands.items()})


FEATURES = {
    "plain": dict,
    "window, cap and sinks": lambda: {
        "mask": jattn.masks.sliding_window(1000, num_sinks=4),
        "logit_soft_cap": 30.0,
        "sinks": jnp.zeros(N),
    },
    "score mod": lambda: {"score_mod": mod()},
    "key bias by head and sigmoid": lambda: {
        "bias": jnp.zeros((1, N, 1, S)),
        "normalizer": jattn.normalizers.sigmoid(),
    },
    "mask that holds arrays": lambda: {"mask": jattn.masks.prefix(jnp.array([3, 900]))},
}


def shape(*sizes, dtype="int32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize("target", TPUS)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_compiles_for_pages(target, feature, dtype):
    arrays = [shape(*s, dtype=dtype) for s in ((B, 1, N, 128), (30, PAGE, K, 128), (30, PAGE, K, 80))]

    def run(*arrays):
        return jattn.paged_attention(*arrays, implementation="tpu", **FEATURES[feature]())

    report = jattn.aot.compile_for(run, *arrays, shape(B, S // PAGE), shape(B), target=target)
    assert report.compiles, report.error


@pytest.mark.parametrize("target", TPUS)
@pytest.mark.parametrize(
    ("dtype", "heads", "dims"),
    [
        ("bfloat16", (32, 8), (128, 128)),
        ("bfloat16", (16, 16), (96, 96)),
        ("bfloat16", (6, 3), (192, 128)),
        ("float32", (8, 8), (64, 64)),
        ("float32", (16, 1), (256, 256)),
    ],
)
def test_it_compiles_for_a_contiguous_cache(target, dtype, heads, dims):
    source = 1000

    def run(query, key, value, lengths, dropout_key):
        problem, _ = build_problem(
            query, key, value, key_value_seq_lengths=lengths, dropout_rate=0.1, dropout_key=dropout_key
        )
        block = tpu.tile_keys(heads[1], *dims, key.dtype.itemsize)
        inputs, pipeline = make_inputs(problem, {}), make_pipeline(problem, False)
        return tpu.forward(query, key, value, live_tiles(problem, block), inputs, pipeline, block, scale=problem.scale)

    arrays = [(B, 1, heads[0], dims[0]), (B, source, heads[1], dims[0]), (B, source, heads[1], dims[1])]
    arrays = [shape(*s, dtype=dtype) for s in arrays]
    report = jattn.aot.compile_for(run, *arrays, shape(B), shape(2, dtype="uint32"), target=target)
    assert report.compiles, report.error


def test_a_cache_is_read_as_it_lies():
    # 8 heads of 128 channels fill the tiles of memory: a copy of the pools would show among the temporaries.
    arrays = [shape(*s, dtype="bfloat16") for s in ((4, 1, 32, 128), (256, PAGE, 8, 128), (256, PAGE, 8, 128))]
    report = jattn.aot.compile_for(
        lambda *x: jattn.paged_attention(*x, implementation="tpu"), *arrays, shape(4, 64), shape(4), target="v5e"
    )
    assert report.compiles, report.error
    assert report.temp_bytes < arrays[1].size * 2 / 10
