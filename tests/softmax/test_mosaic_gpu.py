"""The Mosaic GPU kernel without a GPU: what it refuses, its tile sizes, and its numbers in JAX's GPU interpreter."""

import jax
import numpy as np
import pytest

import jattn
from jattn.softmax import dispatch, platforms
from pallas_kernels.flash_attention import mosaic_gpu_sizes as sizes

HEAD_DIMS = [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (80, 48), (16, 256)]


def shaped(length=1024, dims=(64, 64), dtype="bfloat16"):
    shapes = ((4, dims[0]), (2, dims[0]), (2, dims[1]))
    return tuple(jax.ShapeDtypeStruct((1, length, *shape), dtype) for shape in shapes)


def explain(*arrays, capability="9.0", **arguments):
    with platforms.compiling_for("gpu", capability):
        return jattn.explain(*arrays, **arguments)


@pytest.mark.parametrize(
    ("arrays", "arguments", "text"),
    [
        (shaped(dtype="float32"), {}, "float32; it takes one of bfloat16, float16; 'triton' does"),
        (shaped(dims=(264, 64)), {}, "its tiles reach to 256; 'blockwise' does"),
        (shaped(), {"mask": jattn.masks.prefix(np.array([3]))}, "a mask that holds arrays.*'triton' does"),
        (shaped(dims=(128, 128)), {"block_sizes": (128, 256)}, "ask for .* bytes .* has 232448; .* fits"),
        (shaped(), {"block_sizes": (64, 64)}, "block_q must be 128"),
        (shaped(dims=(256, 256)), {"normalizer": jattn.normalizers.sigmoid()}, "no tile fits: .* 'triton' does"),
    ],
    ids=["float32", "wide heads", "mask with arrays", "large tiles", "odd tiles", "wide output"],
)
def test_what_it_does_not_take_is_refused_with_who_does(arrays, arguments, text):
    with pytest.raises(NotImplementedError, match=text):
        explain(*arrays, implementation="mosaic_gpu", **arguments)


def test_other_devices_are_refused_with_who_runs_there():
    query = np.zeros((1, 8, 2, 16), np.float32)
    with pytest.raises(NotImplementedError, match="runs on NVIDIA Hopper GPUs, this is a cpu; 'blockwise' runs here"):
        jattn.dot_product_attention(query, query, query, implementation="mosaic_gpu")
    for capability in ("8.0", "10.0"):
        with pytest.raises(NotImplementedError, match=f"this GPU has {capability}; 'triton' runs here"):
            explain(*shaped(), capability=capability, implementation="mosaic_gpu")


def test_it_is_preferred_once_it_was_verified(monkeypatch):
    assert "no run on hardware has verified it yet" in explain(*shaped()).others["mosaic_gpu"]
    assert explain(*shaped(), implementation="mosaic_gpu").reason == "asked for"
    monkeypatch.setattr(dispatch, "VERIFIED", frozenset({"mosaic_gpu", "triton"}))
    assert explain(*shaped()).chosen == "mosaic_gpu"
    narrow = explain(*shaped(dtype="float32"))
    assert narrow.chosen == "triton"
    assert "float32; it takes one of" in narrow.others["mosaic_gpu"]


def test_explain_tells_whose_backward_pass_runs():
    biased = explain(*shaped(), bias=np.zeros((1, 1, 1, 1024), np.float32), implementation="mosaic_gpu")
    assert "if the bias or operands are differentiated" in biased.reason


@pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
@pytest.mark.parametrize("of", sizes.PASSES)
@pytest.mark.parametrize("wide", [False, True])
def test_chosen_tiles_fit(dims, of, wide):
    if (dims, of, wide) == ((256, 256), "forward", True):
        with pytest.raises(ValueError, match="no tile fits: head dims 256 and 256"):
            sizes.choose(*dims, 2, of, wide)
        return
    found = sizes.choose(*dims, 2, of, wide)
    sizes.check(found, *dims, 2, of, wide)
    assert sizes.shared_bytes(found, *dims, 2, of, wide) <= sizes.AVAILABLE
    assert (found.block_k if of == "key" else found.block_q) == 128


def test_heads_too_wide_for_any_tile_are_refused():
    with pytest.raises(ValueError, match="no tile fits: head dims 1024 and 1024 at 2 bytes, 232448 bytes a block"):
        sizes.choose(1024, 1024, 2, "key")


# What a case computes in a process of its own: the interpreter runs every warpgroup in a thread of XLA's pool, and one
# that waits keeps its thread, so the pool must be larger than a small machine's. Its effects cannot pass through
# custom_jvp, so the adapter's passes are called as the engine calls them.
PROGRAM = """
    import jax, jax.numpy as jnp, numpy as np, jattn
    from jattn.softmax import mosaic_gpu, reference
    from jattn.softmax.arguments import build_problem
    from jattn.softmax.normalizers import Softmax
    from jattn.testing.tolerance import assert_within_policy

    mosaic_gpu.INTERPRET = True
    generator = np.random.default_rng(0)
    draw = lambda *shape: generator.standard_normal(shape).astype(np.float32)
    T, S, N, K, D, DV = {sizes}
    arrays = {{"query": draw(1, T, N, D), "key": draw(1, S, K, D), "value": draw(1, S, K, DV)}}
    # The output's cotangent comes in the dtype that the output is handed out in.
    cotangents = (draw(1, T, N, DV).astype({dtype!r}).astype("float32"), draw(1, T, N))

    # Logits of a few units: weights that are computed again from lse lose as many ulps as lse is large.
    def add(logit, b, h, i, j, slope, pair):
        return logit + slope * pair * (j - i) / 64

    arguments = {arguments}
    arrays = {{name: x.astype({dtype!r}) for name, x in arrays.items()}}
    hidden = np.s_[:, {hidden}]

    def kernel(arrays, cotangents):
        poisoned = {{n: x if n == "query" else x.at[hidden].set(jnp.nan) for n, x in arrays.items()}}
        problem, _ = build_problem(**poisoned, **arguments)
        sources = {{name: getattr(problem, name) for name in arrays}}
        sources |= {{"operands": problem.operands}} if problem.operands else {{}}
        out, lse = mosaic_gpu.forward(problem, sources, jnp.float32)
        total = cotangents[1] - (cotangents[0] * out).sum(-1)
        rows = {{"lse": jnp.where(lse == -jnp.inf, 0, lse)}} if isinstance(problem.normalizer, Softmax) else None
        total = total if rows else 0 * total
        like = {{name: sources[name] for name in arrays}}
        assert mosaic_gpu.pulls(problem, like)
        held = sources | ({{"rows": rows}} if rows else {{}})
        # As the engine hands it out.
        return out.astype(like["query"].dtype), mosaic_gpu.pull_back(problem, held, (cotangents[0], total), like)

    def plain(arrays, cotangents):
        def both(arrays):
            problem, _ = build_problem(**arrays, **arguments)
            out, lse = reference.attend(problem, True)
            softmax = isinstance(problem.normalizer, Softmax)
            return out, jnp.where(jnp.isfinite(lse), lse, 0) if softmax else 0 * lse
        (out, _), pull = jax.vjp(both, arrays)
        return out.astype(arrays["query"].dtype), pull(cotangents)[0]

    found = jax.jit(kernel)({{n: jnp.asarray(x) for n, x in arrays.items()}}, cotangents)
    ordinary = jax.jit(plain)(arrays, cotangents)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (arrays, cotangents))
        truth = jax.jit(plain)(*wide)
    for one, exact, other in zip(*map(jax.tree.leaves, (found, truth, ordinary)), strict=True):
        assert_within_policy(one, exact, other)
"""
NOTHING = "0:0"
CASES = {
    "causal, taking turns": ("(256, 256, 2, 1, 32, 16)", "{'is_causal': True}", NOTHING),
    "rings go around": ("(320, 384, 1, 1, 16, 16)", "{'block_sizes': (128, 64)}", NOTHING),
    "a hidden end, rows that see nothing": (
        "(136, 150, 2, 1, 16, 16)",
        "{'key_value_seq_lengths': np.array([70]), 'query_seq_lengths': np.array([40])}",
        "70:",
    ),
    "segments and cap": (
        "(200, 200, 1, 1, 16, 32)",
        "{'segment_ids': np.arange(200)[None] // 70, 'logit_soft_cap': 2.0}",
        NOTHING,
    ),
    "score mod and mask of pairs": (
        "(130, 70, 2, 2, 16, 16)",
        "{'mask': generator.random((1, 1, T, S)) < 0.3, 'score_mod': jattn.ScoreMod(add, {"
        "'slope': jattn.Operand(draw(N), 'head'), 'pair': jattn.Operand(draw(1, T, S), 'pair')})}",
        NOTHING,
    ),
    "sigmoid": ("(130, 64, 1, 1, 16, 16)", "{'normalizer': jattn.normalizers.sigmoid(), 'is_causal': True}", NOTHING),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_numbers_in_the_interpreter(case, run_with_devices):
    shapes, arguments, hidden = CASES[case]
    program = PROGRAM.format(sizes=shapes, arguments=arguments, hidden=hidden, dtype="float32")
    assert "RACE" not in run_with_devices(8, program)


# The second one's dK and dV come from programs of their own.
@pytest.mark.slow
@pytest.mark.parametrize("shapes", ["(64, 128, 1, 1, 16, 16)", "(72, 64, 2, 1, 192, 80)"])
def test_bfloat16_in_the_interpreter(shapes, run_with_devices):
    program = PROGRAM.format(sizes=shapes, arguments="{'is_causal': True}", hidden=NOTHING, dtype="bfloat16")
    assert "RACE" not in run_with_devices(8, program)
