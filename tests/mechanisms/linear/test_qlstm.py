import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import special

from jattn.cache import FullCache, nbytes
from jattn.layers.rope import Rope
from jattn.mechanisms.linear.qlstm import QLstm, qlstm, qlstm_log_decay
from jattn.recurrence.diagonal import MODES

B, T, C = 2, 11, 4
IDS = np.array([[1, 1, -1, 1, 2, 2, 1, -1, 1, 1, -1], [-1, 0, 0, 0, 0, 0, 0, 0, 0, 3, 3]])


def inputs(seed=0):
    r = np.random.default_rng(seed)
    return tuple(r.normal(size=(B, T, C)) for _ in range(4))


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def truth(x, forget, write, read, alpha=None, ids=None):
    y = np.zeros_like(x)
    for row in range(B):
        h, before = np.zeros(x.shape[2]), None
        for t in range(T):
            own = 0 if ids is None else ids[row, t]
            if own < 0:
                continue
            h, before = (h if before in (None, own) else 0 * h), own
            kept = sigmoid(forget[row, t]) if alpha is None else sigmoid(-forget[row, t]) ** max(alpha, 0)
            h = kept * h + sigmoid(write[row, t]) * x[row, t]
            y[row, t] = sigmoid(read[row, t]) * h
    return y


@pytest.mark.parametrize("alpha", [None, 0.0, 1.0, 2.5, -1.0])
def test_it_is_its_definition(alpha):
    run = jax.jit(qlstm, static_argnames=("mode", "chunk_size"))
    with jax.enable_x64(True):
        given = inputs()
        for mode in MODES if alpha == 2.5 else ("chunk",):
            close(run(*given, alpha=alpha, mode=mode, chunk_size=4), truth(*given, alpha))


def test_documents_padding_and_the_state():
    run = jax.jit(qlstm, static_argnames=("chunk_size", "return_final_state"))
    with jax.enable_x64(True):
        given = inputs()
        poisoned = [np.where(IDS[..., None] >= 0, x, np.nan) for x in given]
        close(run(*poisoned, segment_ids=IDS, chunk_size=4), truth(*given, ids=IDS))
        whole, last = run(*given, return_final_state=True)
        first, state = run(*(x[:, :5] for x in given), return_final_state=True)
        second, end = run(*(x[:, 5:] for x in given), initial_state=state, return_final_state=True)
        close(np.concatenate([first, second], 1), whole)
        close(end, last)


def test_the_reversed_gate_is_the_decay_of_state_space_models():
    forget = np.linspace(-30, 30, 7)
    with jax.enable_x64(True):
        for alpha in (0.3, 1.0, 4.0):
            close(np.exp(qlstm_log_decay(forget, alpha)), sigmoid(-forget) ** alpha)
        close(qlstm_log_decay(forget, 1.0), qlstm_log_decay(-forget))
        x, f, i, o = inputs()
        close(qlstm(x, f, i, o, alpha=1.0), qlstm(x, -f, i, o))


def test_extreme_gates():
    x, f, i, o = inputs()
    with jax.enable_x64(True):
        shut, wide = np.full_like(f, -1e4), np.full_like(f, 1e4)
        close(qlstm(x, shut, wide, wide), x)
        close(qlstm(x, wide, wide, wide), np.cumsum(x, 1))
        close(qlstm(x, f, shut, o), 0 * x)
        for gate in (shut, wide):
            for alpha in (None, 1.0):
                gradients = jax.grad(lambda *a, alpha=alpha: jnp.sum(qlstm(*a, alpha=alpha)), (0, 1, 2, 3))(
                    x, gate, i, o
                )
                assert all(np.isfinite(g).all() for g in gradients)


def test_gradients_are_those_of_the_definition():
    def dense(x, forget, write, read, alpha):
        """All pairs at once."""
        g = jnp.cumsum(-alpha * jax.nn.softplus(forget), 1)
        seen = np.tri(T, dtype=bool)[None, :, :, None]
        weights = jnp.where(seen, jnp.exp(jnp.where(seen, g[:, :, None] - g[:, None], 0)), 0)
        return jax.nn.sigmoid(read) * jnp.einsum("btsc,bsc->btc", weights, jax.nn.sigmoid(write) * x)

    with jax.enable_x64(True):
        given = *inputs(), np.asarray(1.3)
        fast, slow = (
            jax.jit(jax.grad(lambda *x, f=f: jnp.sum(jnp.sin(f(*x))), tuple(range(5))))(*given)
            for f in (lambda *x: qlstm(*x[:4], alpha=x[4], chunk_size=4), dense)
        )
        jax.tree.map(close, fast, slow)


@pytest.mark.parametrize("reversed_gate", [False, True])
def test_the_layer_is_its_definition(reversed_gate):
    with jax.enable_x64(True):
        layer = QLstm(4, 2, reversed_gate=reversed_gate, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        layer.gates.bias[...] = np.linspace(-1, 1, 24)
        if reversed_gate:
            assert float(layer.alpha[...]) == 1.0
            layer.alpha[...] = 0.7
        u = np.random.default_rng(3).normal(size=(B, T, 4))
        kernel, bias = (np.asarray(p[...]) for p in (layer.conv.kernel, layer.conv.bias))
        raw = u @ np.asarray(layer.input.kernel[...])
        x = np.zeros_like(raw) + bias
        for w in range(4):
            x[:, w:] += kernel[3 - w] * raw[:, : T - w]
        gates = x @ np.asarray(layer.gates.kernel[...]) + np.asarray(layer.gates.bias[...])
        y = truth(x, *np.split(gates, 3, -1), 0.7 if reversed_gate else None)
        gate = u @ np.asarray(layer.gate.kernel[...])
        gelu = gate * 0.5 * (1 + special.erf(gate / np.sqrt(2)))
        close(layer(u).output, (gelu * y) @ np.asarray(layer.out.kernel[...]))
        assert layer.out.bias is None and layer.input.bias is None


def test_decoding_with_padding_gives_the_whole_row():
    with jax.enable_x64(True):
        layer = QLstm(4, 2, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        u = np.random.default_rng(3).normal(size=(B, T, 4))
        ids = np.where(IDS >= 0, 0, -1)
        graph, state = nnx.split(layer)
        whole = jax.jit(lambda s, u: nnx.merge(graph, s)(u, segment_ids=ids).output)(state, u)
        step = jax.jit(lambda s, u, ids, cache: nnx.merge(graph, s)(u, segment_ids=ids, cache=(FullCache(T), cache)))
        cache, outputs = layer.init_cache(FullCache(T), B, jnp.float64), []
        size = nbytes(cache)
        for t in range(T):
            found = step(state, u[:, t : t + 1], ids[:, t : t + 1], cache)
            cache = found.cache
            outputs.append(found.output)
        close(np.concatenate(outputs, 1), whole)
        assert nbytes(cache) == size and cache.next.tolist() == (ids >= 0).sum(1).tolist()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: qlstm(x, x, x, x[:, :3]), "must all be"),
        (lambda x: qlstm(x, x, x, x, mode="fast"), "mode must be"),
        (lambda x: QLstm(4, 3, rngs=nnx.Rngs(0)), "num_heads must divide"),
        (lambda x: QLstm(4, 2, num_kv_heads=1, rngs=nnx.Rngs(0)), "be the same"),
        (lambda x: QLstm(4, 2, position=Rope(), rngs=nnx.Rngs(0)), "no position"),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call(inputs()[0])
