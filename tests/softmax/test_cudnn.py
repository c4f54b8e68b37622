"""The way to cuDNN: what it refuses, what it hands over, and that the contracts hold around the call.

cuDNN runs on GPUs only. Here the plain program of JAX takes its place: what stands around the call is what is tested.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.softmax import platforms
from jattn.testing.tolerance import assert_within_policy

B, T, S, N, K, D = 2, 12, 12, 4, 2, 8


def shaped(length=T, source=S, dims=(D, D), dtype="bfloat16"):
    shapes = ((B, length, N, dims[0]), (B, source, K, dims[0]), (B, source, K, dims[1]))
    return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)


def draw(length=T, source=S):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(x.shape).astype(np.float32) for x in shaped(length, source)]


def attend(*arrays, implementation="cudnn", **arguments):
    return jattn.dot_product_attention(*arrays, implementation=implementation, **arguments)


@pytest.fixture
def stand_in(monkeypatch):
    """JAX's plain program in cuDNN's place, on a GPU that is not there."""
    plain = jax.nn.dot_product_attention

    def run(*arrays, implementation, **arguments):
        assert implementation == "cudnn"
        return plain(*arrays, implementation="xla", **arguments)

    monkeypatch.setattr(jax.nn, "dot_product_attention", run)
    with platforms.compiling_for("gpu", "9.0"):
        yield


def test_without_a_gpu_it_says_so():
    with pytest.raises(NotImplementedError, match="it runs on NVIDIA GPUs .* this is a cpu; 'blockwise' does"):
        attend(*draw())
    with platforms.compiling_for("gpu", "7.5"), pytest.raises(NotImplementedError, match="8.0 or later"):
        jattn.explain(*shaped(), implementation="cudnn")


REFUSED = {
    "float32": (shaped(dtype="float32"), {}),
    "values of another width": (shaped(dims=(8, 16)), {}),
    "head dim 12": (shaped(dims=(12, 12)), {}),
    "head dim 136": (shaped(dims=(136, 136)), {}),
    "a bias": (shaped(), {"bias": jnp.zeros((T, S))}),
    "a soft cap": (shaped(), {"logit_soft_cap": 5.0}),
    "a score mod": (shaped(), {"score_mod": jattn.ScoreMod(lambda logit, b, h, i, j: logit, {})}),
    "the dropout": (shaped(), {"dropout_rate": 0.5, "dropout_key": jax.random.key(0)}),
    "a block layout": (
        shaped(),
        {"layout": jattn.layouts.from_block_mask(np.ones((1, 1), bool), query_slots=T, key_slots=S)},
    ),
    "segment ids": (shaped(), {"segment_ids": np.zeros((1, T), int)}),
    "positions": (shaped(), {"query_positions": np.arange(T)}),
    "block sizes": (shaped(), {"block_sizes": (16, 16)}),
    "the normalizer Pointwise": (shaped(), {"normalizer": jattn.normalizers.sigmoid()}),
    "boolean masks": (shaped(), {"mask": np.ones((T, S), bool)}),
    "query lengths": (shaped(), {"query_seq_lengths": np.array([T, 3]), "is_causal": True}),
    "other than causal ones": (shaped(), {"mask": jattn.masks.sliding_window(4, num_sinks=1)}),
    "causal windows and": (shaped(), {"local_window_size": (3, 3)}),
    "more queries": (shaped(length=13), {"is_causal": True}),
    "a window together with": (
        shaped(),
        {"mask": jattn.masks.sliding_window(4), "key_value_seq_lengths": np.array([S, 3])},
    ),
    "no residual": (shaped(), {"return_residual": True}),
    "no sinks": (shaped(), {"sinks": np.zeros(N, np.float32)}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_does_not_take_is_refused_with_who_does(reason):
    arrays, arguments = REFUSED[reason]
    with platforms.compiling_for("gpu", "9.0"), pytest.raises(NotImplementedError) as found:
        jattn.explain(*arrays, implementation="cudnn", **arguments)
    assert reason in str(found.value)
    assert str(found.value).endswith("'blockwise' does")


def test_wide_heads_are_for_an_attached_hopper(monkeypatch):
    monkeypatch.setattr(platforms, "current", lambda: platforms.Platform("gpu", "9.0"))
    assert jattn.explain(*shaped(dims=(256, 256)), implementation="cudnn").chosen == "cudnn"
    monkeypatch.setattr(platforms, "current", lambda: platforms.Platform("gpu", "8.0"))
    with pytest.raises(NotImplementedError, match="multiples of 8 up to 128"):
        jattn.explain(*shaped(dims=(256, 256)), implementation="cudnn")


def test_explain_tells_what_differs_and_that_it_is_not_chosen_unasked():
    with platforms.compiling_for("gpu", "9.0"):
        asked = jattn.explain(*shaped(), implementation="cudnn", is_causal=True)
        assert asked.chosen == "cudnn" and "no second derivatives" in asked.reason
        assert "no run on hardware" in jattn.explain(*shaped()).others["cudnn"]


TAKEN = {
    "everything": ((T, S), {}),
    "scaled": ((T, S), {"scale": 0.3}),
    "fewer queries than keys": ((5, S), {}),
    "causal": ((T, S), {"is_causal": True}),
    "causal, fewer queries": ((5, S), {"is_causal": True}),
    "window": ((T, S), {"is_causal": True, "local_window_size": (3, 2)}),
    "two windows": ((T, S), {"mask": jattn.masks.sliding_window(4) & jattn.masks.sliding_window(6)}),
    "window, fewer queries": ((5, S), {"mask": jattn.masks.sliding_window(3)}),
    "key lengths": ((T, S), {"key_value_seq_lengths": np.array([7, 0])}),
    "causal with key lengths": ((T, S), {"key_value_seq_lengths": np.array([S + 3, 4]), "is_causal": True}),
}


@pytest.mark.parametrize("name", TAKEN)
def test_values_and_gradients_are_those_of_the_reference(stand_in, name):
    sizes, arguments = TAKEN[name]
    arrays = draw(*sizes)

    def everything(implementation, *arrays):
        run = lambda *x: jnp.sin(attend(*x, implementation=implementation, **arguments).astype(jnp.float32))  # noqa: E731
        gradients = jax.grad(lambda *x: run(*x).sum(), argnums=(0, 1, 2))
        return run(*arrays), *gradients(*arrays)

    with jax.enable_x64(True):
        truth = everything("reference", *(np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in arrays))
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    found, plain = everything("cudnn", *narrow), everything("reference", *narrow)
    for candidate, exact, ordinary in zip(found, truth, plain, strict=True):
        assert_within_policy(candidate, exact, ordinary)


@pytest.mark.parametrize("name", ["causal, fewer queries", "window, fewer queries", "key lengths"])
def test_what_nobody_sees_reaches_nothing(stand_in, name):
    sizes, arguments = TAKEN[name]
    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in draw(*sizes))
    lengths = arguments.get("key_value_seq_lengths", np.full(B, sizes[0]))
    hidden = (np.arange(S) >= lengths[:, None])[:, :, None, None]
    assert hidden.any()

    def everything(key, value):
        loss = lambda *x: attend(*x, **arguments).astype(jnp.float32).sum()  # noqa: E731
        return attend(query, key, value, **arguments), *jax.grad(loss, argnums=(0, 1, 2))(query, key, value)

    clean = everything(key, value)
    for poison in (np.nan, np.inf):
        poisoned = everything(*(jnp.where(hidden, jnp.asarray(poison, x.dtype), x) for x in (key, value)))
        for one, other in zip(clean, poisoned, strict=True):
            np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))
    if "lengths" in name:
        assert not np.asarray(clean[0], np.float32)[1].any()


@pytest.mark.parametrize("arguments", [{}, {"is_causal": True}, {"key_value_seq_lengths": np.array([7, 0])}], ids=str)
def test_it_lowers_to_calls_of_cudnn(monkeypatch, arguments):
    """JAX asks for the library's version while tracing, and the library is not there."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    loss = lambda *x: attend(*x, **arguments).astype(jnp.float32).sum()  # noqa: E731
    with platforms.compiling_for("gpu", "9.0"):
        traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).trace(*shaped(16, 16))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text
