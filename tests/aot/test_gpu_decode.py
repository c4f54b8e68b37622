"""The kernel for one new token compiles for every GPU."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

import jattn
import jattn.aot

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs pip install 'jattn[aot-cuda]'"
    ),
]
S, N, K = 5000, 8, 2


def add_slope(logit, b, h, i, j, slope):
    return logit + slope * (j - i)


FEATURES = {
    "ragged": lambda: {"key_value_seq_lengths": jnp.array([5000, 77])},
    "window, cap and sinks": lambda: {
        "mask": jattn.masks.sliding_window(1000, num_sinks=4),
        "query_positions": jnp.array([[4999], [70]]),
        "logit_soft_cap": 30.0,
        "sinks": jnp.zeros(N),
    },
    "slopes": lambda: {"score_mod": jattn.ScoreMod(add_slope, {"slope": jattn.Operand(jnp.ones(N), "head")})},
    "key bias by head": lambda: {"bias": jnp.zeros((1, N, 1, S))},
}
PAGED_KEYS = 1280
PAGED = {
    "plain": dict,
    "window, cap and sinks": lambda: {
        "mask": jattn.masks.sliding_window(1000, num_sinks=4),
        "logit_soft_cap": 30.0,
        "sinks": jnp.zeros(N),
    },
    "mask that holds arrays and slopes": lambda: {
        "mask": jattn.masks.prefix(jnp.array([3, 900])),
        "score_mod": jattn.ScoreMod(add_slope, {"slope": jattn.Operand(jnp.ones(N), "head")}),
    },
    "key bias by head and sigmoid": lambda: {
        "bias": jnp.zeros((1, N, 1, PAGED_KEYS)),
        "normalizer": jattn.normalizers.sigmoid(),
    },
}
GPUS = [name for name, target in jattn.aot.TARGETS.items() if target.platform == "gpu"]


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(("dtype", "dims"), [("bfloat16", (128, 128)), ("float16", (192, 128)), ("float32", (64, 64))])
def test_it_compiles(target, feature, dtype, dims):
    query, key, value = (
        jax.ShapeDtypeStruct((2, *shape), dtype) for shape in ((1, N, dims[0]), (S, K, dims[0]), (S, K, dims[1]))
    )

    def run(query, key, value):
        return jattn.dot_product_attention(query, key, value, implementation="triton", **FEATURES[feature]())

    report = jattn.aot.compile_for(run, query, key, value, target=target)
    assert report.compiles, report.error


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("feature", PAGED)
@pytest.mark.parametrize(("dtype", "dims"), [("bfloat16", (128, 128)), ("float16", (192, 128)), ("float32", (64, 80))])
def test_it_compiles_for_pages(target, feature, dtype, dims):
    page = 16 if dtype == "float32" else 128
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape in ((2, 1, N, dims[0]), (100, page, K, dims[0]), (100, page, K, dims[1]))
    ]
    arrays += [jax.ShapeDtypeStruct((2, PAGED_KEYS // page), "int32"), jax.ShapeDtypeStruct((2,), "int32")]

    def run(*arrays):
        return jattn.paged_attention(*arrays, implementation="triton", **PAGED[feature]())

    report = jattn.aot.compile_for(run, *arrays, target=target)
    assert report.compiles, report.error
