"""The Triton kernel compiled and run, where a GPU is attached: a canary for the compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.softmax import dispatch
from jattn.softmax.compilers import from_token_selection
from jattn.testing.tolerance import assert_within_policy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
B, T, S, N, K = 2, 515, 387, 4, 2


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


CASES = {
    "causal": {"is_causal": True},
    "window": {"mask": jattn.masks.sliding_window(100, num_sinks=4)},
    "segments": {"segment_ids": (np.arange(T)[None] // 200, np.arange(S)[None] // 200)},
    "key padding": {"key_value_seq_lengths": np.array([S, 11])},
    "cap and sinks": {"logit_soft_cap": 5.0, "sinks": np.array([0.3, -1.0, 0.0, 2.0], np.float32)},
    "bias": {"bias": draw(1, N, T, S, seed=4), "is_causal": True},
    "prefix lengths": {"mask": jattn.masks.prefix_lm_mask(np.array([40, 300]))},
    "token selection": {
        "layout": from_token_selection(
            np.random.default_rng(5).random((B, K, T, 8)) < 0.4,
            1,
            49,
            jattn.masks.causal(),
            num_heads=N,
            query_slots=T,
            key_slots=S,
            query_block=64,
            key_block=64,
        )
    },
    "sigmoid": {"normalizer": jattn.normalizers.sigmoid(), "is_causal": True},
    "dropout": {"dropout_rate": 0.2, "dropout_key": jax.random.key(1), "is_causal": True},
}


def everything(implementation, arrays, arguments):
    """Output, lse and gradients of queries, keys and values; products of float32 in full precision."""

    def loss(arrays):
        out, lse = jattn.dot_product_attention(
            **arrays, **arguments, implementation=implementation, return_residual=True, precision="highest"
        )
        finite = jnp.where(jnp.isfinite(lse), lse, 0)
        return jnp.sin(out.astype(jnp.float32)).sum() + (finite**2).sum(), (out, finite)

    return jax.tree.leaves(jax.jit(jax.grad(loss, has_aux=True))(arrays))


@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_head_dim_is_within_the_policy(dims, dtype):
    check(dims, dtype, CASES["causal"])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_feature_is_within_the_policy(name, dtype):
    check((64, 64), dtype, CASES[name])


def check(dims, dtype, arguments):
    shapes = {"query": (B, T, N, dims[0]), "key": (B, S, K, dims[0]), "value": (B, S, K, dims[1])}
    arrays = {n: jnp.asarray(draw(*shape, seed=i), dtype) for i, (n, shape) in enumerate(shapes.items())}
    found, plain = (everything(name, arrays, arguments) for name in ("triton", "reference"))
    with jax.enable_x64(True):
        wide = {n: jnp.asarray(np.asarray(x, np.float64)) for n, x in arrays.items()}
        truth = everything("reference", wide, arguments)
    for candidate, exact, ordinary in zip(found, truth, plain, strict=True):
        assert_within_policy(candidate, exact, ordinary)


def add_offset(logit, b, h, i, j, table):
    return logit + table


def test_gradients_of_offset_tables_are_within_the_policy_and_repeat_bit_for_bit():
    arrays = {n: draw(B, 387, N, 64, seed=i) for i, n in enumerate(("query", "key", "value"))}

    def gradient(implementation, arrays, table):
        def loss(table):
            mod = jattn.ScoreMod(add_offset, {"table": jattn.Operand(table, "offset")})
            out = jattn.dot_product_attention(
                **arrays, score_mod=mod, implementation=implementation, precision="highest"
            )
            return jnp.sin(out).sum()

        return jax.jit(jax.grad(loss))(table)

    table = draw(N, 101, seed=6)
    found, again, plain = (gradient(name, arrays, table) for name in ("triton", "triton", "reference"))
    np.testing.assert_array_equal(found, again)
    with jax.enable_x64(True):
        wide = {n: np.asarray(x, np.float64) for n, x in arrays.items()}
        truth = gradient("reference", wide, np.asarray(table, np.float64))
    assert_within_policy(found, truth, plain)


def test_two_runs_agree_bit_for_bit():
    arrays = {n: draw(1, 700, N, 64, seed=i) for i, n in enumerate(("query", "key", "value"))}
    first, second = (everything("triton", arrays, CASES["causal"]) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_explain_says_on_a_gpu(monkeypatch):
    query = jax.ShapeDtypeStruct((1, 4096, 8, 64), jnp.bfloat16)
    assert "no run on hardware has verified it" in jattn.explain(query, query, query).others["triton"]
    monkeypatch.setattr(dispatch, "VERIFIED", frozenset({"triton"}))
    assert jattn.explain(query, query, query).chosen == "triton"
