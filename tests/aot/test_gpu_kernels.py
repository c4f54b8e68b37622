"""Every kernel compiles for every GPU, dtype and head dim, and with every feature: for real, without the GPU."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
import jattn.aot
from jattn.softmax.compilers import from_block_mask, from_mask_mod, from_token_selection, tile_bits

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs pip install 'jattn[aot-cuda]'"
    ),
]
GPUS = [name for name, target in jattn.aot.TARGETS.items() if target.platform == "gpu"]
HEAD_DIMS = [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)]
T, S, N, K = 1000, 900, 4, 2


def add_all(logit, b, h, i, j, slope, at_query, at_key, pair, table):
    return logit * (1 + at_query) + slope * at_key * pair + table


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def mod(slope, at_query, at_key, pair, table):
    kinds = {"slope": "head", "at_query": "query", "at_key": "key", "pair": "pair", "table": "offset"}
    arrays = {"slope": slope, "at_query": at_query, "at_key": at_key, "pair": pair, "table": table}
    return jattn.ScoreMod(add_all, {n: jattn.Operand(arrays[n], kind) for n, kind in kinds.items()})


def of_arrays(b, h, i, j, aux):
    return (j < aux["length"][b - 1]) & (aux["open"][h, j] | (j <= i))


def held_by_a_mask():
    lengths, opened = np.array([300, 700]), np.random.default_rng(0).random((N, S)) < 0.5
    ids = [np.arange(n)[None] // 300 for n in (T, S)]
    mask = jattn.masks.mask_mod(of_arrays, {"length": lengths, "open": opened})
    return {"mask": mask & jattn.masks.segment_mask(*ids) | jattn.masks.prefix(np.array([64]))}


SIZES = {"query_slots": T, "key_slots": S, "query_block": 64, "key_block": 64}


def selection():
    chosen = np.random.default_rng(0).random((1, K, T, S // 50)) < 0.3
    return {"layout": from_token_selection(chosen, 1, 50, jattn.masks.causal(), num_heads=N, **SIZES)}


def bits():
    odd = jattn.masks.dense(np.random.default_rng(0).random((1, 1, T, S)) < 0.5) & jattn.masks.sliding_window(200)
    return {"layout": from_mask_mod(tile_bits(odd, 1, 1, T, S, 64, 64), 1, 1, T, S, 64, 64)}


def permuted(bias):
    draws = np.random.default_rng(0)
    perms = [draws.permutation(np.r_[:n, np.full(1024 - n, -1)])[None, None].astype(np.int32) for n in (T, S)]
    layout = from_block_mask(
        draws.random((1, K, 16, 16)) < 0.5,
        query_slots=1024,
        key_slots=1024,
        query_block=64,
        key_block=64,
        query_perm=perms[0],
        key_perm=perms[1],
    )
    return {"layout": layout, "is_causal": True, "bias": bias, "mask": draws.random((1, N, T, S)) < 0.5}


def add_offset(logit, b, h, i, j, table):
    return logit + table


def of_offsets(table):
    return {"score_mod": jattn.ScoreMod(add_offset, {"table": jattn.Operand(table, "offset")}), "is_causal": True}


# Name -> (shapes of what is differentiated besides, arguments from it).
FEATURES = {
    "causal": ((), lambda: {"is_causal": True}),
    "window with sinks": ((), lambda: {"mask": jattn.masks.sliding_window(128, num_sinks=4)}),
    "segments and cap": (
        (),
        lambda: {
            "segment_ids": (jnp.asarray(np.arange(T)[None] // 300), jnp.asarray(np.arange(S)[None] // 300)),
            "logit_soft_cap": 30.0,
        },
    ),
    "key padding": ((), lambda: {"mask": jnp.arange(S)[None, None, None] < 700}),
    "learned sinks": ((shape(N),), lambda sinks: {"sinks": sinks}),
    "pair bias": ((shape(1, N, T, S),), lambda bias: {"bias": bias}),
    "key bias": ((shape(1, 1, 1, S),), lambda bias: {"bias": bias, "is_causal": True}),
    "score mod": (
        (shape(N), shape(N, T), shape(1, S), shape(1, T, S), shape(N, 64)),
        lambda *arrays: {"score_mod": mod(*arrays)},
    ),
    "offset table": ((shape(1, 255),), of_offsets),
    "sigmoid": ((), lambda: {"normalizer": jattn.normalizers.sigmoid()}),
    "block layout": (
        (),
        lambda: {"layout": from_mask_mod(jattn.masks.sliding_window(200), 1, 1, T, S, 64, 64), "is_causal": True},
    ),
    "prefix lengths": ((), lambda: {"mask": jattn.masks.prefix_lm_mask(np.array([300]))}),
    "mask with arrays": ((), held_by_a_mask),
    "token selection": ((), selection),
    "tile bits": ((), bits),
    "permuted layout": ((shape(1, N, 1, S),), permuted),
    "dropout": ((), lambda: {"dropout_rate": 0.1, "dropout_key": jax.random.key(0), "is_causal": True}),
}


def check(target, dtype, dims, feature):
    shapes, make = FEATURES[feature]

    def forward(query, key, value, *more):
        return jattn.dot_product_attention(query, key, value, implementation="triton", **make(*more))

    def gradients(*arrays):
        return jax.grad(lambda *x: forward(*x).sum().astype(jnp.float32), range(len(arrays)))(*arrays)

    arrays = (shape(1, T, N, dims[0], dtype=dtype), shape(1, S, K, dims[0], dtype=dtype))
    arrays = (*arrays, shape(1, S, K, dims[1], dtype=dtype), *shapes)
    report = jattn.aot.compile_for(lambda *x: (forward(*x), gradients(*x)), *arrays, target=target)
    assert report.compiles, report.error


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
def test_every_dtype_and_head_dim(target, dtype, dims):
    check(target, dtype, dims, "causal")


@pytest.mark.parametrize("target", GPUS)
def test_offset_tables_in_the_oblong_tiles_of_float32(target):
    check(target, "float32", (64, 64), "offset table")


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("feature", [name for name in FEATURES if name != "causal"])
def test_every_feature(target, feature):
    check(target, "bfloat16", (64, 64), feature)
