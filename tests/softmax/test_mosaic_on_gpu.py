"""The Mosaic GPU kernel compiled and run, where a Hopper GPU is attached: what its being chosen unasked waits for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.softmax import platforms
from jattn.testing.tolerance import assert_within_policy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not platforms.current().capability.startswith("9."), reason="needs an NVIDIA GPU of the Hopper generation"
    ),
]
B, N, K = 2, 4, 2


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tilted(logit, b, h, i, j, slope, at_key):
    return logit + slope * (j - i) * at_key / 64


# Name -> lengths of queries and of keys, arguments.
CASES = {
    "causal from itself": ((1024, 1024), {"is_causal": True}),
    "no tile is partial": ((512, 768), {}),
    "causal, ragged": ((515, 387), {"is_causal": True}),
    "fewer rows than a warpgroup has": ((37, 1000), {}),
    "window": ((1000, 1000), {"mask": jattn.masks.sliding_window(100, num_sinks=4)}),
    "segments": ((1000, 1000), {"segment_ids": np.arange(1000)[None] // 300, "is_causal": True}),
    "key padding": ((515, 387), {"key_value_seq_lengths": np.array([387, 11])}),
    "rows that see nothing": ((515, 387), {"mask": (np.arange(515) < 60)[:, None] & np.ones(387, bool)}),
    "cap and sinks": ((515, 387), {"logit_soft_cap": 5.0, "sinks": np.array([0.3, -1.0, 0.0, 2.0], np.float32)}),
    "bias": ((515, 387), {"bias": draw(1, N, 515, 387, seed=4), "is_causal": True}),
    "score mod": (
        (515, 387),
        {
            "score_mod": jattn.ScoreMod(
                tilted,
                {"slope": jattn.Operand(draw(N, seed=5), "head"), "at_key": jattn.Operand(draw(1, 387, seed=6), "key")},
            )
        },
    ),
    "sigmoid": ((515, 387), {"normalizer": jattn.normalizers.sigmoid(), "is_causal": True}),
    "dropout": ((515, 515), {"dropout_rate": 0.2, "dropout_key": jax.random.key(1), "is_causal": True}),
}


def everything(implementation, arrays, arguments):
    """Output, lse and gradients of queries, keys and values."""

    def loss(arrays):
        out, lse = jattn.dot_product_attention(
            **arrays, **arguments, implementation=implementation, return_residual=True, precision="highest"
        )
        finite = jnp.where(jnp.isfinite(lse), lse, 0)
        return jnp.sin(out.astype(jnp.float32)).sum() + (finite**2).sum(), (out, finite)

    return jax.tree.leaves(jax.jit(jax.grad(loss, has_aux=True))(arrays))


def make(dims, dtype, lengths):
    length, source = lengths
    shapes = {"query": (B, length, N, dims[0]), "key": (B, source, K, dims[0]), "value": (B, source, K, dims[1])}
    return {n: jnp.asarray(draw(*shape, seed=i), dtype) for i, (n, shape) in enumerate(shapes.items())}


def check(dims, dtype, case):
    lengths, arguments = CASES[case]
    arrays = make(dims, dtype, lengths)
    found, plain = (everything(name, arrays, arguments) for name in ("mosaic_gpu", "reference"))
    with jax.enable_x64(True):
        wide = {n: jnp.asarray(np.asarray(x, np.float64)) for n, x in arrays.items()}
        truth = everything("reference", wide, arguments)
    for candidate, exact, ordinary in zip(found, truth, plain, strict=True):
        assert_within_policy(candidate, exact, ordinary)


@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (80, 48)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_every_head_dim_is_within_the_policy(dims, dtype):
    check(dims, dtype, "causal, ragged")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128)], ids=str)
def test_every_feature_is_within_the_policy(case, dims):
    check(dims, jnp.bfloat16, case)


def test_what_nobody_sees_reaches_nothing():
    arrays = make((64, 64), jnp.bfloat16, (515, 387))
    arguments = {"is_causal": True, "mask": np.arange(387)[None, None, None] < 200}
    poisoned = {n: x if n == "query" else x.at[:, 200:].set(jnp.nan) for n, x in arrays.items()}
    found, clean = (everything("mosaic_gpu", x, arguments) for x in (poisoned, arrays))
    for one, other in zip(found, clean, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("case", ["causal from itself", "segments", "window"])
def test_many_runs_agree_bit_for_bit(case):
    """Warpgroups that passed each other would show as a difference, or never return."""
    lengths, arguments = CASES[case]
    arrays = make((128, 128), jnp.bfloat16, lengths)
    first = everything("mosaic_gpu", arrays, arguments)
    for _ in range(20):
        for one, other in zip(first, everything("mosaic_gpu", arrays, arguments), strict=True):
            np.testing.assert_array_equal(one, other)
