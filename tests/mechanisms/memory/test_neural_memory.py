"""Memories that learn, deep ones too, against a token scan in numpy; the layer against its parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.cache import FullCache, nbytes
from jattn.layers.rope import Rope
from jattn.mechanisms.memory.neural_memory import NeuralMemory
from jattn.recurrence.learning_memory import apply_memory, log_gates, run_memory
from tests.mechanisms.memory.memory_truth import answer, inputs, scan

T = 11
IDS = np.array([[0, 0, 0, 1, 1, -1, 1, 1, 1, 1, 0], [-1, 3, -1, -1, 3, 3, 3, 3, 3, 7, 7]])


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-8, atol=1e-10)


@functools.partial(jax.jit, static_argnames=("chunk_size", "update", "residual", "one_run"))
def memory(query, key, value, alpha, theta, eta, weights, **options):
    log_keep, log_momentum = log_gates(alpha, eta)
    return run_memory(query, key, value, log_keep, log_momentum, theta, weights, **options)


def matrices(*widths, memories=2, seed=3):
    random = np.random.default_rng(seed)
    return tuple(random.normal(size=(memories, *size)) * 0.7 for size in zip(widths, widths[1:], strict=False))


@pytest.mark.parametrize("update", ["token", "chunk"])
@pytest.mark.parametrize(
    ("widths", "residual"),
    [((3, 5, 3), True), ((3, 5, 3), False), ((3, 4, 5, 2), False), ((3, 3), True)],
    ids=["wrapped", "bare", "depth 3", "depth 1"],
)
def test_the_dual_form_is_the_token_scan(widths, residual, update):
    given, weights = inputs(heads=4, v_dim=widths[-1]), matrices(*widths)
    for ids in (None, IDS):
        options = {"chunk_size": 4, "update": update, "residual": residual}
        out, state = memory(*given, weights, segment_ids=ids, **options)
        expected, last, momentum = scan(*given, weights, ids=ids, **options)
        close(out, expected)
        jax.tree.map(close, state.weights, tuple(last))
        jax.tree.map(close, state.momentum, tuple(momentum))


@pytest.mark.parametrize("update", ["token", "chunk"])
@pytest.mark.parametrize("chunk_size", [3, 67])
def test_any_chunk_size_and_any_split(update, chunk_size):
    length = T if chunk_size == 3 else 75
    given, weights = inputs(1, batch=1, memories=1, heads=1, length=length), matrices(3, 4, 3, memories=1)
    options = {"chunk_size": chunk_size, "update": update, "residual": True}
    whole, last = memory(*given, weights, **options)
    close(whole, scan(*given, weights, **options)[0])
    state, parts = None, []
    for i, j in zip((0, length - 7, length - 4, length - 1), (length - 7, length - 4, length - 1, length), strict=True):
        out, state = memory(*(x[:, i:j] for x in given), weights, state=state, **options)
        parts.append(out)
    close(np.concatenate(parts, 1), whole)
    jax.tree.map(close, state, last)


def test_with_one_token_a_chunk_both_updates_are_one():
    given, weights = inputs(2), matrices(3, 4, 3)
    both = [memory(*given, weights, chunk_size=1, update=update)[0] for update in ("token", "chunk")]
    close(*both)
    other = memory(*given, weights, chunk_size=4, update="token")[0]
    assert np.abs(both[0] - other).max() > 1e-3
    assert np.abs(other - memory(*given, weights, chunk_size=4, update="chunk")[0]).max() > 1e-3


def test_in_chunks_the_last_token_is_the_first_to_see():
    given, weights = inputs(3), matrices(3, 4, 3)
    out = memory(*given, weights, chunk_size=4, update="chunk")[0]
    still = np.stack([[answer([w[h] for w in weights], given[0][0, t, h]) for h in range(2)] for t in range(4)])
    close(out[0, :3], still[:3])
    assert np.abs(out[0, 3] - still[3]).max() > 1e-3


@pytest.mark.parametrize("residual", [True, False])
def test_without_steps_and_forgetting_the_first_memory_answers(residual):
    given, weights = inputs(4), matrices(3, 4, 3)
    still = given[:3] + (0 * given[3], 0 * given[4], given[5])
    out, _ = memory(*still, weights, chunk_size=4, residual=residual)
    expected = [[[answer([w[h] for w in weights], x, residual) for h, x in enumerate(t)] for t in b] for b in given[0]]
    close(out, expected)


def test_a_deep_bare_memory_of_zeros_never_moves():
    given, weights = inputs(5), tuple(0 * w for w in matrices(3, 4, 3))
    out, state = memory(*given, weights, chunk_size=4)
    assert not out.any() and not any(w.any() for w in state.weights)
    start = (matrices(3, 4, 3)[0], weights[1])
    assert memory(*given, start, chunk_size=4)[0].any()


def test_outer_gradients_are_slopes_of_the_token_scan():
    given, weights = inputs(6, batch=1, length=5, memories=1, heads=1), matrices(3, 2, 3, memories=1)
    cotangent = np.random.default_rng(1).normal(size=given[2].shape)
    options = {"chunk_size": 2, "residual": True}

    def value(given, weights):
        return jnp.sum(memory(*given, weights, **options)[0] * cotangent)

    found = jax.tree.leaves(jax.jit(jax.grad(value, (0, 1)))(given, weights))
    leaves, structure = jax.tree.flatten((given, weights))
    random = np.random.default_rng(2)
    for place, gradient in enumerate(found):
        direction = random.normal(size=gradient.shape)
        sums = []
        for sign in (1e-6, -1e-6):
            moved = [x + sign * direction if i == place else x for i, x in enumerate(leaves)]
            arrays, start = structure.unflatten(moved)
            sums.append(np.sum(scan(*arrays, start, **options)[0] * cotangent))
        np.testing.assert_allclose(np.sum(gradient * direction), (sums[0] - sums[1]) / 2e-6, rtol=1e-6, atol=1e-8)


def silu(x):
    return x / (1 + np.exp(-x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def convolved(x, conv):
    """silu of the causal convolution of heads `[B, T, heads, width]`."""
    kernel = np.asarray(conv.kernel[...])
    flat = np.pad(x.reshape(*x.shape[:2], -1), [(0, 0), (len(kernel) - 1, 0), (0, 0)])
    y = sum(kernel[w] * flat[:, w : w + x.shape[1]] for w in range(len(kernel)))
    return silu(y).reshape(x.shape)


def unit(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"linear": True, "value_dim": 5}, {"residual": False, "update": "chunk", "num_kv_heads": 1}]
)
def test_the_layer_is_its_parts(options):
    layer = NeuralMemory(
        8, 2, head_dim=4, expansion=2, chunk_size=3, **options, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    x = np.random.default_rng(0).normal(size=(2, 7, 8))
    query, key, value = (np.einsum("btm,mhd->bthd", x, p.kernel[...]) for p in (layer.query, layer.key, layer.value))
    query, key = unit(convolved(query, layer.query_conv)), unit(convolved(key, layer.key_conv))
    value = convolved(value, layer.value_conv)
    alpha, theta, eta = (sigmoid(x @ g.kernel[...] + g.bias[...]) for g in (layer.alpha, layer.theta, layer.eta))
    weights = [np.asarray(w[...]) for w in layer.memory]
    assert len(weights) == (1 if "linear" in options else 2)
    o, _, _ = scan(
        query,
        key,
        value,
        alpha,
        0.1 * theta,
        eta,
        weights,
        chunk_size=3,
        update=options.get("update", "token"),
        residual=layer.residual,
    )
    o = o / np.sqrt((o * o).mean(-1, keepdims=True) + 1e-5) * layer.out.norm.scale[...]
    o = o * silu(np.einsum("btm,mhd->bthd", x, layer.out.gate.kernel[...]))
    close(layer(x).output, np.einsum("bthd,hdm->btm", o, layer.out.kernel[...]))


@pytest.mark.slow
def test_packed_documents_are_alone_and_a_state_carries_over():
    layer = NeuralMemory(8, 2, chunk_size=3, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, T, 8))
    run = nnx.jit(lambda layer, x, ids: layer(x, segment_ids=ids).output)
    whole = run(layer, x, IDS)
    assert not whole[IDS < 0].any()
    for one in (IDS == 1, IDS == 3, (IDS == 0) & (np.arange(T) < 5), IDS == 7):
        close(whole[one], run(layer, np.where(one[..., None], x, np.nan), np.where(one, 0, -1))[one])
    policy, real = FullCache(T), IDS >= 0
    cache = first = layer.init_cache(policy, 2, jnp.float64)
    step = nnx.jit(lambda layer, x, ids, cache: layer(x, segment_ids=ids, cache=(policy, cache))[:2])
    parts = []
    for start in (0, 5):
        part = slice(start, start + 5)
        out, cache = step(layer, x[:, part], np.where(real, 0, -1)[:, part], cache)
        parts.append(out)
    close(np.concatenate(parts, 1)[real[:, :10]], run(layer, x, np.where(real, 0, -1))[:, :10][real[:, :10]])
    assert nbytes(cache) == nbytes(first)
    assert cache.next.tolist() == real[:, :10].sum(1).tolist()
    out, after = step(layer, x[:, :5] * np.nan, np.full((2, 5), -1), cache)
    jax.tree.map(np.testing.assert_array_equal, after, cache)
    assert not out.any()


def test_a_linear_memory_with_rotary_positions_sees_distances():
    layer = NeuralMemory(8, 2, linear=True, position=Rope(), param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(1, T, 8))
    run = nnx.jit(lambda layer, x, positions: layer(x, positions=positions).output)
    near, far, spread = (run(layer, x, places) for places in (np.arange(T), np.arange(T) + 90, 3 * np.arange(T)))
    close(near, far)
    assert np.abs(near - spread).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads must divide"),
        ({"value_dim": 3}, "value_dim must be head_dim"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"update": "row"}, "update must be one of token, chunk"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NeuralMemory(8, 2, **options, rngs=nnx.Rngs(0))


def test_one_set_of_weights_answers_all():
    weights = matrices(3, 4, 3)
    x = jnp.asarray(np.random.default_rng(7).normal(size=(1, 2, 1, 5, 3)))
    out = apply_memory([jnp.asarray(w[None]) for w in weights], x, residual=True)
    close(out[0, 1, 0, 2], answer([w[1] for w in weights], x[0, 1, 0, 2], True))
