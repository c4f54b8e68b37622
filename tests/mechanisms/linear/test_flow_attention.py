"""Flow attention against loops in float64 numpy, and against its identities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.mechanisms.linear.flow_attention import causal_flow_attention, flow_attention
from jattn.models import DecoderLM, Encoder, TransformerConfig

T, S, N, K, D, V, EPS = 11, 7, 4, 2, 3, 5, 1e-6
IDS = np.array([[0, 0, 0, 1, 1, -1, 1, 0, 0, 2, -1], [-1, 3, -1, -1, 3, 3, 3, 3, 3, 3, 7]])
RUNS = np.array([[0, 0, 0, 1, 1, -1, 1, 2, 2, 3, -1], IDS[1]])
SIGMOID_1 = 1 / (1 + np.exp(-1))
full = jax.jit(flow_attention, static_argnames=("clip", "competition", "allocation", "chunk_size"))
causal = jax.jit(
    causal_flow_attention,
    static_argnames=("clip", "competition", "allocation", "mode", "chunk_size", "return_final_state"),
)


def arrays(source=T, seed=0):
    random = np.random.default_rng(seed)
    return tuple(random.normal(size=shape) for shape in ((2, T, N, D), (2, source, K, D), (2, source, K, V)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def network(query, key, value, clip=(-1, 1), *, phi=sigmoid):
    """One segment and head, written out sum by sum: query [T, D], key [S, D], value [S, V]. Also I^ and O^."""
    q, k = phi(query), phi(key)
    inflow = np.array([(x + EPS) @ (k.sum(0) + EPS) for x in q])
    outflow = np.array([(x + EPS) @ (q.sum(0) + EPS) for x in k])
    taken = np.array([(x + EPS) @ ((k / outflow[:, None]).sum(0) + EPS) for x in q])
    kept = np.array([(x + EPS) @ ((q / inflow[:, None]).sum(0) + EPS) for x in k])
    e = np.exp(kept if clip is None else np.clip(kept, *clip))
    state = k.T @ (value * (e / e.sum() * len(k))[:, None])
    return sigmoid(taken * len(q) / len(k))[:, None] * (q / inflow[:, None]) @ state, taken, kept


def causal_network(query, key, value, clip=(-1, 1)):
    """Token by token, all sums carried along: one document and head."""
    keys, queries, given, taken, total = np.zeros(D), np.zeros(D), np.zeros(D), np.zeros(D), 0.0
    state, out = np.zeros((D, value.shape[1])), []
    for n, (x, y, v) in enumerate(zip(sigmoid(query), sigmoid(key), value, strict=True), 1):
        keys, queries = keys + y, queries + x
        inflow, outflow = (x + EPS) @ (keys + EPS), (y + EPS) @ (queries + EPS)
        given, taken = given + y * n / outflow, taken + x * n / inflow
        e = np.exp(np.clip((y + EPS) @ (taken + EPS) / n, *clip))
        total += e
        state = state + np.outer(y, e / total * n * v)
        out.append(sigmoid((x + EPS) @ (given + EPS) / n) * (x / inflow) @ state)
    return np.array(out)


def by_segment(function, query, key, value, ids=None, key_ids=None, **options):
    """Every segment and head by itself."""
    ids = np.zeros(query.shape[:2], int) if ids is None else ids
    key_ids = ids if key_ids is None else key_ids
    out = np.zeros((*query.shape[:3], V))
    for row, head in np.ndindex(2, N):
        for one in set(ids[row]) - {-1}:
            here, there = ids[row] == one, key_ids[row] == one
            if there.any():
                kv = head // (N // K)
                found = function(query[row, here, head], key[row, there, kv], value[row, there, kv], **options)
                out[row, here, head] = found[0] if isinstance(found, tuple) else found
    return out


def close(found, expected, tolerance=1e-10):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("clip", [(-1.0, 1.0), None])
@pytest.mark.parametrize("source", [T, S])
def test_it_is_its_network(source, clip):
    with jax.enable_x64(True):
        given = arrays(source)
        key_ids = np.zeros((2, source), int)
        close(full(*given, clip=clip), by_segment(network, *given, key_ids=key_ids, clip=clip))


@pytest.mark.slow
def test_segments_and_masked_keys_are_networks_of_their_own():
    with jax.enable_x64(True):
        given = arrays()
        poisoned = [np.where((IDS < 0)[..., None, None], np.nan, x) for x in given]
        expected = by_segment(network, *given, RUNS)
        close(full(*poisoned, segment_ids=IDS, chunk_size=4), expected)
        given = arrays(S)
        keys = np.array([[2, 0, -1, 2, 9, 0, 1], [3, 3, 3, -1, 8, 8, 7]])
        hidden = (keys < 0) | (keys > 7)
        poisoned = [given[0], *(np.where(hidden[..., None, None], np.nan, x) for x in given[1:])]
        expected = by_segment(network, *given, IDS, keys)
        close(full(*poisoned, segment_ids=(IDS, keys), chunk_size=4), expected)
        gradients = jax.grad(lambda k, v: full(given[0], k, v, segment_ids=(IDS, keys)).sum(), (0, 1))(*poisoned[1:])
        assert all(np.isfinite(x).all() and not x[hidden].any() for x in gradients)
        mask = ~hidden
        mask[1] = False
        found = full(*given, mask=mask[:, None, None])
        compacted = [given[0][:1], *(x[:1][:, mask[0]] for x in given[1:])]
        close(found[:1], full(*compacted))
        assert not found[1].any()


@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "packed"])
def test_causal_is_the_token_loop(ids):
    with jax.enable_x64(True):
        given = arrays()
        expected = by_segment(causal_network, *given, RUNS if ids is not None else None)
        if ids is not None:
            given = [np.where((IDS < 0)[..., None, None], np.nan, x) for x in given]
        close(causal(*given, segment_ids=ids, chunk_size=4), expected)
        close(causal(*given, segment_ids=ids, mode="recurrent"), expected)
        wide = by_segment(functools.partial(causal_network, clip=(-5, 5)), *arrays(), RUNS if ids is not None else None)
        close(causal(*given, segment_ids=ids, clip=(-5.0, 5.0)), wide)
        if ids is not None:
            gradients = jax.grad(lambda *x: causal(*x, segment_ids=ids, chunk_size=4).sum(), (0, 1, 2))(*given)
            assert all(np.isfinite(x).all() for x in gradients)


def test_flows_are_conserved():
    query, key, value = (x[0, :, 0] for x in arrays(S))
    _, taken, kept = network(query, key, value)
    np.testing.assert_allclose([taken.sum(), kept.sum()], [S, T], rtol=1e-5)


@pytest.mark.parametrize("function", [full, causal])
def test_identities(function):
    with jax.enable_x64(True):
        query, key, value = arrays()
        ones = np.ones_like(value)
        # What a sink takes in is 1: with c = s = 1, values of 1 come out as they are.
        close(function(query, key, ones, competition=False, allocation=False), np.ones((2, T, N, V)), 1e-5)
        # Equal keys do not compete.
        same = np.broadcast_to(key[:, :1], key.shape)
        close(function(query, same, value), function(query, same, value, competition=False), 1e-5)
        mean = (
            value.mean(1, keepdims=True)
            if function is full
            else np.cumsum(value, 1) / np.arange(1, T + 1)[:, None, None]
        )
        mean = mean.repeat(N // K, 2)
        close(function(query, same, value, allocation=False), np.broadcast_to(mean, (2, T, N, V)), 1e-5)
        alike = np.broadcast_to(query[:, :1], query.shape)
        close(function(alike, same, value), SIGMOID_1 * np.broadcast_to(mean, (2, T, N, V)), 1e-5)


def test_equal_keys_leave_the_allocation():
    with jax.enable_x64(True):
        query, key, value = arrays(S)
        same = np.broadcast_to(key[:, :1], key.shape)
        products = np.einsum("btnd,bnd->btn", sigmoid(query), sigmoid(key[:, 0]).repeat(N // K, 1))
        s = sigmoid(T * products / products.sum(1, keepdims=True))[..., None]
        close(full(query, same, value), s * value.mean(1, keepdims=True).repeat(N // K, 2), 1e-5)


def test_order_matters_to_the_causal_form_alone():
    with jax.enable_x64(True):
        query, key, value = arrays()
        order = np.random.default_rng(1).permutation(T)
        out = full(query, key, value)
        close(full(query, key[:, order], value[:, order]), out)
        first = causal(query, key, value)
        close(first[:, 0], SIGMOID_1 * value[:, 0].repeat(N // K, 1), 1e-5)
        assert not np.allclose(first[:, -1], out[:, -1])


def test_states_carry_everything_over():
    with jax.enable_x64(True):
        given = arrays()
        whole, final = causal(*given, segment_ids=IDS, return_final_state=True)
        # No cut where a new document begins: a state continues the first one of what follows.
        first, state = causal(*(x[:, :2] for x in given), segment_ids=IDS[:, :2], return_final_state=True)
        second, state = causal(
            *(x[:, 2:3] for x in given), segment_ids=IDS[:, 2:3], initial_state=state, return_final_state=True
        )
        close(np.concatenate([first, second], 1), whole[:, :3])
        assert (state.next.tolist(), final.next.tolist()) == ([3, 1], [9, 8])
        assert state.aux["count"].tolist() == [3.0, 1.0]
        assert final.aux["count"].tolist() == [1.0, 1.0]
        assert final.state.shape == (2, N, D, V)


def test_gradients_are_those_of_the_token_loop():
    with jax.enable_x64(True):
        query, key, value = (jnp.asarray(x[:1, :6, :2]) for x in arrays())

        def plain(query, key, value):
            """The causal form in masked products, all pairs at once."""
            q, k = jax.nn.sigmoid(query), jax.nn.sigmoid(key)
            n = jnp.arange(1.0, 7.0)[:, None]
            inflow = jnp.sum((q + EPS) * (jnp.cumsum(k, 1) + EPS), -1)
            outflow = jnp.sum((k + EPS) * (jnp.cumsum(q, 1) + EPS), -1)
            taken = jnp.sum((q + EPS) * (jnp.cumsum(k * (n / outflow)[..., None], 1) + EPS), -1) / n
            kept = jnp.sum((k + EPS) * (jnp.cumsum(q * (n / inflow)[..., None], 1) + EPS), -1) / n
            e = jnp.exp(jnp.clip(kept, -1, 1))
            c = e / jnp.cumsum(e, 1) * n
            weights = jnp.einsum("btnd,bsnd->bnts", q / inflow[..., None], k) * jnp.tri(6)
            return jax.nn.sigmoid(taken)[..., None] * jnp.einsum("bnts,bsnv->btnv", weights, value * c[..., None])

        gradients = (
            jax.jit(jax.grad(lambda *x, f=f: jnp.sum(jnp.sin(f(*x))), (0, 1, 2)))(query, key, value)
            for f in (plain, functools.partial(causal, chunk_size=4))
        )
        jax.tree.map(close, *gradients)


def test_models_run_on_both():
    from flax import nnx

    config = TransformerConfig(vocab_size=7, features=8, num_layers=1, num_heads=2, mlp_ratio=1.0)
    tokens = np.arange(10).reshape(2, 5) % 7
    for model in (
        DecoderLM(config, attention="causal_flow_attention", rngs=nnx.Rngs(0)),
        Encoder(config, attention="flow_attention", rngs=nnx.Rngs(0)),
    ):
        assert nnx.jit(lambda m: m(tokens).logits)(model).shape == (2, 5, 7)


def test_errors():
    query, key, value = arrays()
    for call, message in (
        (lambda: flow_attention(query, key, value, clip=(1.0, -1.0)), "clip"),
        (lambda: flow_attention(query, key, value, eps=0.0), "eps"),
        (lambda: flow_attention(query, key, value, mask=np.ones((T, T), bool)), "key mask"),
        (lambda: causal_flow_attention(query, key, value, is_causal=False), "other form"),
        (lambda: causal_flow_attention(query, key[:, :3], value[:, :3]), "self attention"),
        (lambda: causal_flow_attention(query, key, value, segment_ids=(IDS, IDS)), "one array"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    _, state = causal(query, key, value, return_final_state=True)
    with pytest.raises(ValueError, match="aux"):
        causal(query[..., :2], key[..., :2], value, initial_state=state)
