"""Every kernel compiles for every device, dtype and head dim, and with every feature: for real, without the device.

An environment holds the compiler of one kind of device; tests are made for the devices that it can compile for.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
import jattn.aot
from jattn.softmax import platforms
from jattn.softmax.compilers import from_block_mask, from_mask_mod, from_token_selection, tile_bits

COMPILERS = {"gpu": "jax_cuda13_plugin", "tpu": "libtpu"}
KERNELS = {"gpu": "triton", "tpu": "tpu"}
DTYPES = {"gpu": ("bfloat16", "float16", "float32"), "tpu": ("bfloat16", "float32")}
TARGETS = {
    name: target.platform
    for name, target in jattn.aot.TARGETS.items()
    if importlib.util.find_spec(COMPILERS[target.platform])
}
# What a chip of a slice compiles, a chip alone compiles, too.
DEVICES = [name for name in TARGETS if not name.endswith("-256")]
pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(not TARGETS, reason="needs pip install 'jattn[aot-cuda]' or 'jattn[aot-tpu]'"),
]
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


def of_blocks(b, h, i, j, aux):
    return (j // 3 + b % 2 + (i // 4) % 5) % 2 == 0


def of_arrays(b, h, i, j, aux):
    return (j < aux["length"][b - 1]) & (aux["open"][h, j] | (j <= i))


def held_by_a_mask():
    lengths, opened = np.array([300, 700]), np.random.default_rng(0).random((N, S)) < 0.5
    ids = [np.arange(n)[None] // 300 for n in (T, S)]
    mask = jattn.masks.mask_mod(of_arrays, {"length": lengths, "open": opened})
    return {"mask": mask & jattn.masks.segment_mask(*ids) | jattn.masks.prefix(np.array([64]))}


def blocks():
    """Tile sizes of layouts: the smallest of a TPU, and what the backward kernels hold on a GPU."""
    size = 128 if platforms.current().name == "tpu" else 64
    return {"query_block": size, "key_block": size}


def block_layout():
    layout = from_mask_mod(jattn.masks.sliding_window(200), 1, 1, T, S, **blocks())
    return {"layout": layout, "is_causal": True}


def selection():
    chosen = np.random.default_rng(0).random((1, K, T, S // 50)) < 0.3
    sizes = {"query_slots": T, "key_slots": S, **blocks()}
    return {"layout": from_token_selection(chosen, 1, 50, jattn.masks.causal(), num_heads=N, **sizes)}


def bits():
    odd = jattn.masks.dense(np.random.default_rng(0).random((1, 1, T, S)) < 0.5) & jattn.masks.sliding_window(200)
    cut = (1, 1, T, S, *blocks().values())
    return {"layout": from_mask_mod(tile_bits(odd, *cut), *cut)}


def permuted(bias):
    draws = np.random.default_rng(0)
    perms = [draws.permutation(np.r_[:n, np.full(1024 - n, -1)])[None, None].astype(np.int32) for n in (T, S)]
    tiles = 1024 // blocks()["query_block"]
    layout = from_block_mask(
        draws.random((1, K, tiles, tiles)) < 0.5,
        query_slots=1024,
        key_slots=1024,
        query_perm=perms[0],
        key_perm=perms[1],
        **blocks(),
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
    "float16 bias and table": (
        (shape(1, N, T, S, dtype="float16"), shape(1, 255, dtype="float16")),
        lambda bias, table: {"bias": bias, **of_offsets(table)},
    ),
    "sigmoid": ((), lambda: {"normalizer": jattn.normalizers.sigmoid()}),
    "block layout": ((), block_layout),
    "mask of one's own": ((), lambda: {"mask": jattn.masks.mask_mod(of_blocks)}),
    "prefix lengths": ((), lambda: {"mask": jattn.masks.prefix_lm_mask(np.array([300]))}),
    "mask with arrays": ((), held_by_a_mask),
    "token selection": ((), selection),
    "tile bits": ((), bits),
    "permuted layout": ((shape(1, N, 1, S),), permuted),
    "dropout": ((), lambda: {"dropout_rate": 0.1, "dropout_key": jax.random.key(0), "is_causal": True}),
}


def compile_it(target, dtype, dims, feature):
    shapes, make = FEATURES[feature]
    kernel = KERNELS[TARGETS[target]]

    def forward(query, key, value, *more):
        return jattn.dot_product_attention(query, key, value, implementation=kernel, **make(*more))

    def gradients(*arrays):
        return jax.grad(lambda *x: forward(*x).sum().astype(jnp.float32), range(len(arrays)))(*arrays)

    arrays = (shape(1, T, N, dims[0], dtype=dtype), shape(1, S, K, dims[0], dtype=dtype))
    arrays = (*arrays, shape(1, S, K, dims[1], dtype=dtype), *shapes)
    return jattn.aot.compile_for(lambda *x: (forward(*x), gradients(*x)), *arrays, target=target)


@pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
@pytest.mark.parametrize(
    ("target", "dtype"), [(target, dtype) for target in DEVICES for dtype in DTYPES[TARGETS[target]]]
)
def test_every_dtype_and_head_dim(target, dtype, dims):
    report = compile_it(target, dtype, dims, "causal")
    assert report.compiles, report.error


@pytest.mark.parametrize("target", DEVICES)
def test_offset_tables_in_the_oblong_tiles_of_float32(target):
    report = compile_it(target, "float32", (64, 64), "offset table")
    assert report.compiles, report.error


@pytest.mark.parametrize("target", DEVICES)
@pytest.mark.parametrize("feature", [name for name in FEATURES if name != "causal"])
def test_every_feature(target, feature):
    report = compile_it(target, "bfloat16", (64, 64), feature)
    assert report.compiles, report.error


@pytest.mark.parametrize("target", [name for name in ("h100", "v5e") if name in TARGETS])
@pytest.mark.parametrize(
    ("dtype", "precision", "default"),
    [
        ("bfloat16", "highest", None),
        ("bfloat16", None, "highest"),
        ("float32", "highest", None),
        ("float32", "high", None),
        ("float32", None, "tensorfloat32"),
    ],
)
@pytest.mark.parametrize("length", [T, 1])
def test_every_precision(target, dtype, precision, default, length):
    """Asked for in the call, or set as JAX's default."""

    def loss(*arrays):
        out = jattn.dot_product_attention(*arrays, precision=precision, implementation=KERNELS[TARGETS[target]])
        return out.sum().astype(jnp.float32)

    arrays = [shape(1, rows, heads, 64, dtype=dtype) for rows, heads in ((length, N), (S, K), (S, K))]
    with jax.default_matmul_precision(default):
        report = jattn.aot.compile_for(jax.value_and_grad(loss, range(3)), *arrays, target=target)
    assert report.compiles, report.error


@pytest.mark.skipif("v5e" not in TARGETS, reason="needs pip install 'jattn[aot-tpu]'")
def test_scalar_memory_holds_many_short_lists_of_tiles():
    """A list of its own for each of 4,096 heads, in as many bytes as `SCALAR_MEMORY` is compared with."""
    batch, heads, rows = 64, 64, 256
    live = np.arange(batch * heads * 4).reshape(batch, heads, 2, 2) % 3 > 0
    layout = from_block_mask(live, query_slots=rows, key_slots=rows, query_block=128, key_block=128)

    def forward(*arrays):
        return jattn.dot_product_attention(*arrays, layout=layout, implementation="tpu")

    arrays = [shape(batch, rows, heads, 64, dtype="bfloat16")] * 3
    report = jattn.aot.compile_for(forward, *arrays, target="v5e")
    assert report.compiles, report.error


@pytest.mark.parametrize("target", [name for name in TARGETS if name not in DEVICES])
def test_slices_of_a_pod(target):
    report = compile_it(target, "bfloat16", (128, 128), "causal")
    assert report.compiles, report.error


@pytest.mark.parametrize("target", [name for name in ("h100", "v5e") if name in TARGETS])
def test_under_shard_map_nothing_is_gathered(target):
    """Each device runs the kernel on its own batch rows; the types of results vary as those of operands do."""
    found = jattn.aot.find_target(target)
    mesh = jax.sharding.Mesh(np.array(jattn.aot.devices(found)[:2]), "x")

    def loss(slope, query, key, value):
        mod = jattn.ScoreMod(add_offset, {"table": jattn.Operand(slope, "head")})
        out = jattn.dot_product_attention(
            query, key, value, is_causal=True, score_mod=mod, implementation=KERNELS[found.platform]
        )
        return jnp.sin(out).sum()

    by_row, alone = jax.sharding.PartitionSpec("x"), jax.sharding.PartitionSpec()
    specs = (alone, by_row, by_row, by_row)
    gradient = jax.shard_map(jax.grad(loss, range(4)), mesh=mesh, in_specs=specs, out_specs=specs, check_vma=True)
    sizes = ((N,), (4, 256, N, 64), (4, 256, K, 64), (4, 256, K, 64))
    arrays = [
        jax.ShapeDtypeStruct(size, "float32", sharding=jax.sharding.NamedSharding(mesh, spec))
        for size, spec in zip(sizes, specs, strict=True)
    ]
    with platforms.compiling_for(found.platform, found.capability):
        lowered = jax.jit(gradient).trace(*arrays).lower(lowering_platforms=(found.platform.replace("gpu", "cuda"),))
    text = lowered.compile().as_text()
    for name in ("forward", "backward_query", "backward_key"):
        assert f"flash_attention_{name}" in text
    assert "all-gather" not in text


@pytest.mark.parametrize("target", [name for name in ("a100", "h100") if name in TARGETS])
def test_nothing_but_output_and_lse_is_kept(target):
    """With a backward pass: the output, numbers a row, and no arrays in float32 of the size of the queries."""
    query = shape(2, 2048, 8, 128, dtype=jnp.bfloat16)

    def both(query, key, value, output):
        attend = functools.partial(jattn.dot_product_attention, is_causal=True, implementation="triton")
        out, pull = jax.vjp(attend, query, key, value)
        return out, pull(output)

    report = jattn.aot.compile_for(both, query, query, query, query, target=target)
    assert report.compiles, report.error
    assert report.temp_bytes <= 1.1 * query.size * query.dtype.itemsize
