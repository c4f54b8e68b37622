"""The delta rule against a loop in float64, its closed form for a chunk, and everything that it must equal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.mechanisms.linear.delta_rule import DeltaRule, delta_rule
from jattn.mechanisms.linear.linear_attention import linear_attention
from jattn.models import DecoderLM, TransformerConfig
from tests.mechanisms.linear.delta_truth import (
    both,
    close,
    convolved,
    cotangents,
    delta_loop,
    in64,
    inputs,
    l2_norm,
    poisoned_like_clean,
    ratio,
    rms_norm,
    rng,
    runner,
    sigmoid,
    silu,
    unit,
)

run = runner(delta_rule)


def started(given, heads=2, width=5, v_dim=3):
    return {**given, "initial_state": rng(5).normal(size=(2, heads, width, v_dim))}


@pytest.mark.parametrize("options", [{"mode": "recurrent"}, {"mode": "parallel"}, {"chunk_size": 4}, {"chunk_size": 1}])
def test_it_is_the_loop_of_the_paper(options):
    given = started(inputs())
    close(in64(run, given, **options), delta_loop(**given))


def test_heads_are_repeated_not_tiled():
    given = inputs(heads=(4, 1, 2, 4))
    close(in64(run, given, chunk_size=4), delta_loop(**given))


def test_gradients_are_those_of_the_loop():
    given = started(inputs(heads=(4, 2, 2, 2)), heads=4)
    weights = cotangents(*delta_loop(**given))
    loop = both(lambda **arrays: delta_loop(**arrays, xp=jnp))
    fast = both(lambda **arrays: delta_rule(**arrays, chunk_size=4, return_final_state=True))
    close(in64(fast, given, weights), in64(loop, given, weights))


def test_it_is_the_closed_form_of_a_chunk():
    given = inputs(batch=1, heads=(1,) * 4)
    q, k, v, beta = (given[name][0, :, 0] for name in ("query", "key", "value", "beta"))
    state = rng(1).normal(size=(1, 1, 5, 3))
    solved = np.linalg.inv(np.eye(9) + np.tril(beta[:, None] * (k @ k.T), -1))
    values = solved @ (beta[:, None] * v) - solved @ (beta[:, None] * k) @ state[0, 0]
    out, last = in64(run, {**given, "initial_state": state}, scale=1.0, chunk_size=4)
    close(out[0, :, 0], q @ state[0, 0] + np.tril(q @ k.T) @ values)
    close(last[0, 0], state[0, 0] + k.T @ values)


def test_orthonormal_keys_are_recalled_and_a_key_written_twice_keeps_the_last_value():
    keys = np.linalg.qr(rng().normal(size=(5, 5)))[0][None, :, None]
    given = {"query": keys, "key": keys, "value": rng(1).normal(size=(1, 5, 1, 3)), "beta": np.ones((1, 5, 1))}
    _, state = in64(run, given, chunk_size=2)
    close(np.einsum("btnd,bndv->btnv", keys, state), given["value"])
    _, state = in64(run, {**given, "key": np.repeat(keys[:, :1], 5, 1)}, chunk_size=2)
    close(np.einsum("btnd,bndv->btnv", keys[:, :1], state), given["value"][:, -1:])


def test_a_small_beta_is_linear_attention_of_scaled_values():
    given = inputs(batch=1)

    def of(beta):
        arrays = {name: jnp.asarray(x) for name, x in given.items() if name != "beta"}
        return delta_rule(**arrays, beta=beta, scale=1.0, chunk_size=4)

    slope = in64(jax.jit(lambda beta: jax.jvp(of, (0 * beta,), (beta,))[1]), given["beta"])
    value = given["value"] * given["beta"][..., None]
    close(
        slope,
        in64(
            linear_attention,
            given["query"],
            given["key"],
            value,
            feature_map="identity",
            normalize=False,
            is_causal=True,
        ),
    )


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_steps_without_values_keep_project_or_reflect_the_state(beta):
    given = started(inputs())
    given["value"], given["beta"] = 0 * given["value"], np.full_like(given["beta"], beta)
    before, after = given["initial_state"], in64(run, given, chunk_size=4)[1]
    if beta == 0.0:
        close(after, before)
    norms = [np.linalg.norm(x, axis=(-2, -1)) for x in (before, after)]
    if beta == 1.0:
        assert np.all(norms[1] < norms[0])
        close(np.einsum("bnd,bndv->bnv", given["key"][:, -1], after), 0 * after[:, :, 0])
    else:
        close(norms[1], norms[0])


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_keys_that_resemble_each_other_stay_accurate(beta):
    keys = unit(rng().normal(size=(1, 1, 1, 5)) + 0.01 * rng(1).normal(size=(1, 16, 1, 5)))
    given = {"query": keys, "key": keys, "value": rng(2).normal(size=(1, 16, 1, 3)), "beta": np.full((1, 16, 1), beta)}
    single = {name: x.astype(np.float32) for name, x in given.items()}
    # Powers of the chunk's matrix, in place of forward substitution, would cost 9e-5 and 7e-3 here.
    assert ratio(run(single)[0], run(single, mode="recurrent")[0]) < 1e-5


def test_what_stands_in_padding_reaches_nothing():
    poisoned_like_clean(delta_rule, inputs())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"beta": np.zeros((2, 9, 3))}, "beta must be floats"),
        ({"beta": np.zeros((2, 9))}, "beta must be floats"),
        ({"beta": np.zeros((2, 8, 2))}, "beta must be floats"),
        ({"key": np.zeros((2, 9, 5))}, "key must be floats"),
        ({"key": np.zeros((2, 9, 2, 4))}, "key must be"),
        ({"segment_ids": np.zeros((2, 8), int)}, "segment_ids must be"),
        ({"mode": "associative"}, "associative"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change, match):
    with pytest.raises(ValueError, match=match):
        delta_rule(**{**inputs(), **change})


def layer_truth(layer, x, features, factor=1.0):
    query, key = (l2_norm(features(convolved(part, x))) for part in (layer.query, layer.key))
    beta = factor * sigmoid(x @ np.asarray(layer.beta.kernel.get_value(), np.float64))
    o = rms_norm(delta_loop(query, key, silu(convolved(layer.value, x)), beta)[0], layer.out.norm)
    if layer.out.gate is not None:
        o = o * silu(np.einsum("btm,mhd->bthd", x, layer.out.gate.kernel.get_value()))
    return np.einsum("bthd,hdm->btm", o, layer.out.kernel.get_value())


@pytest.mark.parametrize("options", [{}, {"use_gate": True, "allow_neg_eigval": True, "num_kv_heads": 1}], ids=str)
def test_the_layer_is_its_equations(options):
    with jax.enable_x64(True):
        layer = DeltaRule(6, 2, chunk_size=4, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)
        x = rng().normal(size=(2, 9, 6))
        expected = layer_truth(layer, x, silu, 2.0 if "allow_neg_eigval" in options else 1.0)
        close(nnx.jit(lambda layer, x: layer(x).output)(layer, x), expected)


def test_sums_normalize_positive_features():
    layer = DeltaRule(6, 2, qk_norm="sum", rngs=nnx.Rngs(0))
    x = jnp.asarray(rng().normal(size=(2, 9, 2, 3)), jnp.float32)
    expected = np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
    np.testing.assert_allclose(layer.normalized(x), expected / expected.sum(-1, keepdims=True), rtol=1e-5)
    assert np.isfinite(jax.grad(lambda x: layer.normalized(x).sum())(jnp.full((1, 3), -1e4))).all()
    assert layer.query.conv.activation is None
    assert layer.value.conv.activation == "silu"


def test_a_model_scales_the_last_projection():
    config = {"vocab_size": 5, "features": 8, "num_layers": 1, "num_heads": 2, "mlp": "none"}
    plain, scaled = (
        DecoderLM(TransformerConfig(**config, residual_scale=size), attention="DeltaRule", rngs=nnx.Rngs(0))
        for size in (1.0, 0.5)
    )
    kernels = [model.stack.blocks[0].attention.out.kernel.get_value() for model in (plain, scaled)]
    np.testing.assert_array_equal(0.5 * kernels[0], kernels[1])


def test_nan_in_padding_reaches_no_parameter():
    layer = DeltaRule(6, 2, rngs=nnx.Rngs(0))
    x, ids = rng().normal(size=(1, 7, 6)).astype(np.float32), np.array([[0, 0, -1, 0, 1, 1, -1]])

    @nnx.jit
    def pulled(layer, x):
        return nnx.value_and_grad(lambda layer: jnp.sum(layer(x, segment_ids=ids).output ** 2))(layer)

    hidden = (ids < 0)[..., None]
    clean, dirty = (jax.tree.leaves(pulled(layer, np.where(hidden, poison, x))) for poison in (0.0, np.nan))
    for x, y in zip(dirty, clean, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads must divide"),
        ({"qk_norm": "l1"}, "qk_norm must be one of l2, sum"),
        ({"conv_width": 0}, "width must be at least 1"),
        ({"head_dim": 0}, "at least 1"),
    ],
    ids=str,
)
def test_layers_that_cannot_be_built_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        DeltaRule(6, 2, rngs=nnx.Rngs(0), **options)
    with pytest.raises(ValueError, match="num_heads must divide features"):
        DeltaRule(7, 2, rngs=nnx.Rngs(0))
