"""The way to cuDNN compiles, forward and backward, for an Ampere and a Hopper GPU."""

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
T, N, K = 512, 8, 2
FEATURES = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"mask": jattn.masks.sliding_window(100)},
    "key lengths": {"key_value_seq_lengths": np.array([500, 0]), "is_causal": True},
}


@pytest.mark.parametrize("target", ["a100", "h100"])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(("dtype", "dim"), [("bfloat16", 128), ("float16", 64)])
def test_it_compiles(target, feature, dtype, dim):
    query, key = (jax.ShapeDtypeStruct((2, T, heads, dim), dtype) for heads in (N, K))

    def loss(*arrays):
        out = jattn.dot_product_attention(*arrays, implementation="cudnn", **FEATURES[feature])
        return out.astype(jnp.float32).sum()

    report = jattn.aot.compile_for(jax.value_and_grad(loss, argnums=(0, 1, 2)), query, key, key, target=target)
    assert report.compiles, report.error
    # Neither pass holds the logits.
    assert report.temp_bytes < 2 * N * T * T * 2


def test_what_it_does_not_take_does_not_compile():
    query = jax.ShapeDtypeStruct((2, T, N, 256), "bfloat16")
    report = jattn.aot.compile_for(
        lambda *x: jattn.dot_product_attention(*x, implementation="cudnn"), query, query, query, target="a100"
    )
    assert "NotImplementedError" in report.error and "head dim 256" in report.error
