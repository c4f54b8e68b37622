"""The Mosaic GPU kernel compiles for Hopper, forward and backward, for every dtype, head dim and feature."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
import jattn.aot

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs pip install 'jattn[aot-cuda]'"
    ),
]
T, S, N, K = 1000, 900, 4, 2


def add_all(logit, b, h, i, j, slope, at_query, at_key, pair):
    return logit * (1 + at_query) + slope * at_key * pair * (j - i)


def mod():
    generator = np.random.default_rng(0)
    shapes = {"slope": (N,), "at_query": (N, T), "at_key": (1, S), "pair": (1, T, S)}
    kinds = {"slope": "head", "at_query": "query", "at_key": "key", "pair": "pair"}
    operands = {n: jattn.Operand(generator.random(x, np.float32), kinds[n]) for n, x in shapes.items()}
    return jattn.ScoreMod(add_all, operands)


# Name -> arguments, and the number of keys.
FEATURES = {
    "causal from itself": (lambda: {"is_causal": True}, T),
    "nothing": (lambda: {}, 1024),
    "window with sinks": (lambda: {"mask": jattn.masks.sliding_window(128, num_sinks=4)}, T),
    "segments and cap": (lambda: {"segment_ids": jnp.arange(T)[None] // 300, "logit_soft_cap": 30.0}, T),
    "key padding": (lambda: {"mask": jnp.arange(S)[None, None, None] < 700}, S),
    "learned sinks, lengths": (lambda: {"sinks": jnp.zeros(N), "key_value_seq_lengths": jnp.array([700])}, S),
    "mask of pairs and bias": (lambda: {"mask": jnp.ones((1, 1, T, S), bool), "bias": jnp.zeros((1, N, T, S))}, S),
    "score mod, positions": (
        lambda: {"score_mod": mod(), "query_positions": jnp.arange(T)[None], "is_causal": True},
        S,
    ),
    "sigmoid": (lambda: {"normalizer": jattn.normalizers.sigmoid()}, S),
    "dropout": (lambda: {"dropout_rate": 0.1, "dropout_key": jax.random.key(0), "is_causal": True}, T),
}


def check(target, dtype, dims, feature):
    make, source = FEATURES[feature]

    def forward(*arrays):
        return jattn.dot_product_attention(*arrays, implementation="mosaic_gpu", return_residual=True, **make())

    def both(*arrays):
        pulled = jax.grad(lambda *x: sum(y.astype(jnp.float32).sum() for y in forward(*x)), range(3))(*arrays)
        return forward(*arrays), pulled

    shapes = ((1, T, N, dims[0]), (1, source, K, dims[0]), (1, source, K, dims[1]))
    report = jattn.aot.compile_for(both, *(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes), target=target)
    assert report.compiles, report.error


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (80, 48)], ids=str)
def test_every_dtype_and_head_dim(dtype, dims):
    check("h100", dtype, dims, "causal from itself")


@pytest.mark.parametrize("feature", [name for name in FEATURES if name != "causal from itself"])
def test_every_feature(feature):
    check("h100", "bfloat16", (64, 64), feature)


def test_the_other_hopper():
    check("h200", "bfloat16", (128, 128), "causal from itself")


@pytest.mark.parametrize("target", ["a100", "b200", "rtx4090"])
def test_what_it_is_not_written_for_says_who_runs_there(target):
    array = jax.ShapeDtypeStruct((1, T, N, 64), jnp.bfloat16)
    attend = lambda x: jattn.dot_product_attention(x, x, x, implementation="mosaic_gpu")  # noqa: E731
    assert "'triton' runs here" in jattn.aot.compile_for(attend, array, target=target).error
