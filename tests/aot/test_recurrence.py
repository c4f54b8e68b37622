"""The kernels of the recurrence engine compile for every GPU and TPU, forward and backward."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

import jattn.aot

pytestmark = pytest.mark.aot
GPUS = ["a100", "h100", "h200", "b200", "rtx4090"]
TPUS = ["v4", "v5e", "v5p", "v6e"]
B, T, N = 1, 200, 2
WITHOUT_CUDA = importlib.util.find_spec("jax_cuda13_plugin") is None
WITHOUT_TPU = importlib.util.find_spec("libtpu") is None


def report_of(implementation, target, dtype, dims, features):
    width, v_dim = dims
    shapes = {"query": (B, T, N, width), "key": (B, T, N, width), "value": (B, T, N, v_dim)}
    if "gates" in features:
        shapes["log_decay"] = (B, T, N, width) if "channel" in features else (B, T, N)
    if "correction" in features:
        shapes |= {"a": (B, T, N, width), "b": (B, T, N, width)}
    names = list(shapes)

    def run(*arrays):
        def loss(*arrays):
            found = jattn.linear_recurrence(
                **dict(zip(names, arrays, strict=True)), implementation=implementation, return_final_state=True
            )
            return sum(jnp.sum(x.astype(jnp.float32)) for x in found)

        return jax.grad(loss, tuple(range(len(arrays))))(*arrays)

    arrays = [jax.ShapeDtypeStruct(s, "float32" if n == "log_decay" else dtype) for n, s in shapes.items()]
    return jattn.aot.compile_for(run, *arrays, target=target)


CASES = [
    ("bfloat16", (64, 64), ""),
    ("bfloat16", (128, 128), "gates"),
    ("float32", (96, 80), "channel gates"),
    ("bfloat16", (128, 256), "channel gates, correction"),
    ("float32", (64, 64), "gates, correction"),
]


@pytest.mark.skipif(WITHOUT_CUDA, reason="needs pip install 'jattn[aot-cuda]'")
@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize(("dtype", "dims", "features"), CASES)
def test_it_compiles_for_gpus(target, dtype, dims, features):
    report = report_of("triton", target, dtype, dims, features)
    assert report.compiles, report.error


@pytest.mark.skipif(WITHOUT_TPU, reason="needs pip install 'jattn[aot-tpu]'")
@pytest.mark.parametrize("target", TPUS)
@pytest.mark.parametrize(("dtype", "dims", "features"), CASES)
def test_it_compiles_for_tpus(target, dtype, dims, features):
    report = report_of("tpu", target, dtype, dims, features)
    assert report.compiles, report.error
