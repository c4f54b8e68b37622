"""Additive linear recurrence against loops in float64 numpy, softmaxes over time, and its identities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.cache import FullCache
from jattn.layers.md_positions import MdLrpe
from jattn.layers.rope import Rope
from jattn.mechanisms.linear.additive_linear_recurrence import LightNetAttention, additive_linear_recurrence
from jattn.softmax import masks

T, S, N, K, D, V = 11, 7, 4, 2, 3, 5
IDS = np.array([[0, 0, 0, 1, 1, -1, 1, 0, 0, 2, -1], [-1, 3, -1, -1, 3, 3, 3, 3, 3, 3, 7]])
STATIC = ("is_causal", "input_gate", "zero_sink", "mode", "chunk_size", "return_final_state")
run = jax.jit(additive_linear_recurrence, static_argnames=STATIC)


def arrays(source=T, seed=0):
    random = np.random.default_rng(seed)
    shapes = ((2, T, N, D), (2, source, K, D), (2, source, K, V))
    return tuple(random.normal(size=shape) * size for shape, size in zip(shapes, (1, 2, 1), strict=True))


def silu(x):
    return x / (1 + np.exp(-x))


def token_loop(query, key, value, ids=None, *, zero_sink=False, f=None, input_gate=True):
    """S_t = exp(z_{t-1} - z_t) S_{t-1} + exp(k_t - z_t) v_t^T, written out for every row, head and token."""
    out = np.zeros((*query.shape[:3], value.shape[3]))
    start = 0.0 if zero_sink else -np.inf
    for row in range(query.shape[0]):
        for head in range(query.shape[2]):
            kv, z, state, last = head // (query.shape[2] // key.shape[2]), start, 0.0, None
            for t in range(query.shape[1]):
                own = 0 if ids is None else ids[row, t]
                if own < 0:
                    continue
                if last is not None and own != last:
                    z, state = start, 0.0
                last = own
                logit = key[row, t, kv] if f is None else f[row, t, kv]
                new = np.logaddexp(z, logit)
                decay, weight = np.exp(z - new), np.exp(logit - new)
                if f is not None:
                    weight = key[row, t, kv] * (weight if input_gate else 1.0)
                decay = np.broadcast_to(decay, weight.shape)[:, None]
                state, z = decay * state + np.outer(weight, value[row, t, kv]), new
                out[row, t, head] = silu(query[row, t, head]) @ state
    return out


def over_all(query, key, value, visible=True, *, zero_sink=False, f=None):
    """One softmax over the keys for each channel; visible [B, T, S]."""
    visible = np.broadcast_to(visible, (2, query.shape[1], key.shape[1]))
    logits = (np.repeat(f[..., None], key.shape[3], 3) if f is not None else key)[:, None]
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        e = np.exp(np.where(visible[..., None, None], logits, -np.inf))
        total = e.sum(2, keepdims=True) + zero_sink
        weights = np.where(total > 0, e / np.where(total > 0, total, 1), 0)
    if f is not None:
        weights = weights * key[:, None]
    weights, value = weights.repeat(N // K, 3), value.repeat(N // K, 2)
    return np.einsum("btnd,btsnd,bsnv->btnv", silu(query), weights, value)


def close(found, expected, tolerance=1e-10):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("zero_sink", [False, True])
@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "packed"])
def test_causal_is_the_token_loop(ids, zero_sink):
    with jax.enable_x64(True):
        given = arrays()
        expected = token_loop(*given, ids, zero_sink=zero_sink)
        for options in ({"chunk_size": 4}, {"mode": "recurrent"}, {"mode": "associative"}):
            close(run(*given, segment_ids=ids, zero_sink=zero_sink, is_causal=True, **options), expected)


@pytest.mark.parametrize("input_gate", [False, True])
def test_causal_weights_of_tokens_are_the_token_loop(input_gate):
    with jax.enable_x64(True):
        given, f = arrays(), np.random.default_rng(5).normal(size=(2, T, K))
        options = {"is_causal": True, "input_gate": input_gate, "zero_sink": True}
        expected = token_loop(*given, IDS, zero_sink=True, f=f, input_gate=input_gate)
        close(run(*given, log_weights=f, segment_ids=IDS, chunk_size=4, **options), expected)


@pytest.mark.parametrize("zero_sink", [False, True])
@pytest.mark.parametrize("source", [T, S])
def test_noncausal_is_a_softmax_over_the_keys(source, zero_sink):
    with jax.enable_x64(True):
        given, f = arrays(source), np.random.default_rng(5).normal(size=(2, source, K))
        close(run(*given, zero_sink=zero_sink, chunk_size=4), over_all(*given, zero_sink=zero_sink))
        close(run(*given, log_weights=f, zero_sink=zero_sink), over_all(*given, f=f, zero_sink=zero_sink))
        mask = np.random.default_rng(6).random((2, 1, 1, source)) < 0.6
        mask[1] = False
        found = run(*given, mask=mask, zero_sink=zero_sink)
        close(found, over_all(*given, mask[:, 0], zero_sink=zero_sink))
        assert not found[1].any()


def test_noncausal_segments_are_separate_calls():
    with jax.enable_x64(True):
        given = arrays()
        runs = np.array([[0, 0, 0, 1, 1, -1, 1, 2, 2, 3, -1], IDS[1]])
        same = (runs[:, :, None] == runs[:, None]) & (runs[:, None] >= 0)
        close(run(*given, segment_ids=IDS, chunk_size=4), over_all(*given, same))
        given = arrays(S)
        keys = np.array([[2, 0, -1, 2, 9, 0, 1], [3, 3, 3, -1, 8, 8, 7]])
        same = (IDS[:, :, None] == keys[:, None]) & (keys[:, None] >= 0)
        # Nobody sees padding, nor the keys of ids 9 and 8: NaN there reaches neither outputs nor gradients.
        hidden = ~same.any(1)
        poisoned = [given[0], *(np.where(hidden[..., None, None], np.nan, x) for x in given[1:])]
        expected = over_all(*given, same)
        close(run(*poisoned, segment_ids=(IDS, keys), chunk_size=4), expected)
        gradients = jax.grad(lambda k, v: run(given[0], k, v, segment_ids=(IDS, keys), chunk_size=4).sum(), (0, 1))
        for gradient in gradients(*poisoned[1:]):
            assert np.isfinite(gradient).all()
            assert not gradient[hidden].any()


def test_padding_may_hold_anything_if_causal():
    with jax.enable_x64(True):
        given = arrays()
        options = {"segment_ids": IDS, "is_causal": True, "chunk_size": 4}
        poisoned = [np.where((IDS < 0)[..., None, None], np.nan, x) for x in given]
        found = run(*poisoned, **options)
        np.testing.assert_array_equal(found, run(*given, **options))
        assert not found[IDS < 0].any()
        for gradient in jax.grad(lambda *x: run(*x, **options).sum(), (0, 1, 2))(*poisoned):
            assert np.isfinite(gradient).all()


@pytest.mark.parametrize("zero_sink", [False, True])
def test_the_last_causal_row_is_the_noncausal_one_and_gradients_agree(zero_sink):
    with jax.enable_x64(True):
        given = tuple(map(jnp.asarray, arrays()))

        def last(is_causal, query, key, value):
            return run(query, key, value, is_causal=is_causal, zero_sink=zero_sink, chunk_size=4)[:, -1]

        both = [functools.partial(last, is_causal) for is_causal in (False, True)]
        close(*(f(*given) for f in both))
        gradients = (jax.grad(lambda *x, f=f: jnp.sum(jnp.sin(f(*x))), (0, 1, 2))(*given) for f in both)
        jax.tree.map(close, *gradients)


@pytest.mark.parametrize("is_causal", [False, True])
def test_identities(is_causal):
    with jax.enable_x64(True):
        query, key, value = arrays()
        own = functools.partial(run, is_causal=is_causal, chunk_size=4)
        out = own(query, key, value)
        # A constant added to a key channel changes nothing, however large.
        close(own(query, key + 1e3 * np.arange(D), value), out, 1e-8)
        # Weights sum to 1 in each channel.
        ones = np.ones((2, T, K, 1))
        close(own(query, key, ones), silu(query).sum(-1, keepdims=True))
        assert (own(np.full_like(query, 9.0), key, np.eye(T)[None, :, None].repeat(2, 0).repeat(K, 2)) >= 0).all()
        # Equal keys give means of the values.
        mean = np.cumsum(value, 1) / np.arange(1, T + 1)[:, None, None] if is_causal else value.mean(1, keepdims=True)
        expected = silu(query).sum(-1, keepdims=True) * mean.repeat(N // K, 2)
        close(own(query, np.ones_like(key), value), expected)
        # The sink is a first key of logit 0 and value 0.
        longer = [np.concatenate([np.zeros_like(x[:, :1]), x], 1) for x in (query, key, value)]
        close(run(query, key, value, is_causal=is_causal, zero_sink=True), own(*longer)[:, 1:])


def test_permuted_keys_change_nothing_without_a_direction():
    with jax.enable_x64(True):
        query, key, value = arrays()
        order = np.random.default_rng(3).permutation(T)
        close(run(query, key[:, order], value[:, order]), run(query, key, value))


@pytest.mark.parametrize("is_causal", [False, True])
def test_one_large_key_takes_all_the_weight(is_causal):
    given = [np.asarray(x, np.float32) for x in arrays()]
    given[1][:, 4] = 1e4

    def loss(*arrays):
        out = run(*arrays, is_causal=is_causal, chunk_size=4)
        return jnp.sum(out), out

    gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(*given)
    expected = silu(given[0]).sum(-1, keepdims=True) * given[2][:, 4:5].repeat(N // K, 2)
    np.testing.assert_allclose(out[:, 4:], expected[:, 4:], rtol=1e-5, atol=1e-5)
    assert all(np.isfinite(x).all() for x in gradients)


def test_strong_and_mild_keys_keep_their_digits():
    query, key, value = arrays(seed=4)
    key[:, 3], key[:, 6, :, 1], key[0, 8] = -3e3, 200.0, 195.0
    found = run(*(np.asarray(x, np.float32) for x in (query, key, value)), is_causal=True, chunk_size=4)
    close(found, token_loop(*(np.asarray(x, np.float32).astype(float) for x in (query, key, value))), 3e-5)


@pytest.mark.parametrize(
    "options", [{"log_weights": True}, {"position": MdLrpe((11,), form="cosine")}], ids=["f", "pos"]
)
def test_states_carry_everything_over(options):
    f = np.random.default_rng(5).normal(size=(2, T, K))

    @functools.partial(jax.jit, static_argnames=("stop",))
    def part(given, ids, state, stop):
        start = stop - ids.shape[1]
        own = {"log_weights": jnp.asarray(f)[:, start:stop]} if "log_weights" in options else options
        own = own | {"is_causal": True, "return_final_state": True, "zero_sink": True}
        return additive_linear_recurrence(*given, segment_ids=ids, initial_state=state, **own)

    with jax.enable_x64(True):
        given = arrays()

        def cut(start, stop):
            return [x[:, start:stop] for x in given], IDS[:, start:stop]

        whole, final = part(given, IDS, None, stop=T)
        # No cut where a new document begins: a state continues the first one of what follows.
        first, state = part(*cut(0, 2), None, stop=2)
        second, state = part(*cut(2, 3), state, stop=3)
        close(np.concatenate([first, second], 1), whole[:, :3])
        assert state.next.tolist() == [3, 1]
        assert final.next.tolist() == [9, 8]
        width = D if "log_weights" in options else 2 * D
        assert (final.state.shape, final.aux.shape[:2]) == ((2, K, width, V), (2, K))


def test_a_doubling_position_weighs_by_the_cosine_of_distances():
    with jax.enable_x64(True):
        query, key, value = (x[:, :6] for x in arrays())
        theta = 1e4 ** (-2 * np.arange(D) / D)
        distance = np.cos(np.subtract.outer(np.arange(6), np.arange(6))[..., None] * theta)
        e = np.exp(key)
        for is_causal in (False, True):
            seen = np.tri(6) if is_causal else np.ones((6, 6))
            weights = seen[None, :, :, None, None] * e[:, None]
            weights = (weights / weights.sum(2, keepdims=True)).repeat(2, 3)
            expected = np.einsum("btnd,btsnd,tsd,bsnv->btnv", silu(query), weights, distance, value.repeat(2, 2))
            position = MdLrpe((6,), form="cosine")
            found = jax.jit(functools.partial(additive_linear_recurrence, is_causal=is_causal, position=position))
            close(found(query, key, value), expected)


def layer(**options):
    return LightNetAttention(8, 2, rngs=nnx.Rngs(0), **options)


@functools.partial(nnx.jit, static_argnames=("is_causal",))
def apply(made, *args, is_causal=False, **call):
    return made(*args, mask=masks.causal() if is_causal else call.pop("mask", None), **call).output


X = np.random.default_rng(9).normal(size=(2, 6, 8)).astype(np.float32)


@pytest.mark.parametrize("gate_order", ["norm_first", "gate_first"])
def test_the_layer_is_its_equation(gate_order):
    made = layer(gate_order=gate_order, gate_rank=3, num_kv_heads=1)
    made.norm.scale[...] = jnp.linspace(0.5, 2.0, 8)
    o = np.asarray(additive_linear_recurrence(made.query(X), made.key(X), made.value(X), is_causal=True))
    gate = np.asarray(X @ made.gate.down.kernel.get_value() @ made.gate.up.kernel.get_value())
    scale = np.linspace(0.5, 2.0, 8)

    def norm(x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale

    flat = o.reshape(2, 6, 8)
    mixed = norm(flat) * silu(gate) if gate_order == "norm_first" else norm(flat / (1 + np.exp(-gate)))
    expected = mixed @ np.asarray(made.out.kernel.get_value()).reshape(8, 8)
    np.testing.assert_allclose(apply(made, X, is_causal=True), expected, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"scalar_decay": True, "num_kv_heads": 1}, {"scalar_decay": True, "input_gate": False, "zero_sink": True}],
    ids=str,
)
def test_layers_of_one_decay_a_head(options):
    made = layer(**options)
    key = silu(np.asarray(made.key(X)))
    f = np.asarray(made.log_weights(X))[..., 0]
    given = (np.asarray(made.query(X)), key, np.asarray(made.value(X)))
    rest = {n: x for n, x in options.items() if n in ("zero_sink", "input_gate")}
    o = token_loop(*given, f=f, **rest)
    seen = {}
    made(X, mask=masks.causal(), tap=lambda name, x: seen.setdefault(name, x))
    np.testing.assert_allclose(seen["head_out"], o, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"scalar_decay": True}, {"zero_sink": True, "position": MdLrpe((2, 3), form="cosine")}, {"position": Rope()}],
    ids=["scalar", "sink", "rope"],
)
def test_layers_decode_on_their_state(options):
    made = layer(**options)
    policy = FullCache(6)

    @nnx.jit
    def step(made, x, ids, cache):
        found = made(x, cache=(policy, cache), segment_ids=ids)
        return found.output, found.cache

    cache, rows = nnx.jit(lambda made: made.init_cache(policy, 2))(made), []
    for t in range(6):
        row, cache = step(made, X[:, t : t + 1], np.array([[0], [0 if t else -1]]), cache)
        rows.append(row)
    ids, places = np.array([[0] * 6, [-1] + [0] * 5]), np.array([range(6), [0, *range(5)]])
    whole = apply(made, X, is_causal=True, segment_ids=ids, positions=places)
    np.testing.assert_allclose(np.concatenate(rows, 1), whole, atol=1e-5)
    assert cache.next.tolist() == [6, 5]


def test_a_flattened_grid_has_no_order_but_that_of_its_position():
    order = np.random.default_rng(1).permutation(6)
    plain, placed = layer(), layer(position=MdLrpe((2, 3)))
    np.testing.assert_allclose(apply(plain, X[:, order]), apply(plain, X)[:, order], atol=1e-5)
    found = apply(placed, X[:, order], positions=order)
    np.testing.assert_allclose(found, apply(placed, X)[:, order], atol=1e-5)
    assert not np.allclose(apply(placed, X[:, order]), found)


def test_a_context_of_another_width():
    made = layer(context_features=5)
    context = np.random.default_rng(2).normal(size=(2, 4, 5)).astype(np.float32)
    ids = (np.zeros((2, 6), int), np.array([[0, 0, 0, -1], [0, -1, 0, 0]]))
    poisoned = np.where((ids[1] < 0)[..., None], np.nan, context)
    expected = apply(made, X[:1], context[:1, :3])[0]
    np.testing.assert_allclose(apply(made, X, poisoned, segment_ids=ids)[0], expected, atol=1e-5)
    np.testing.assert_allclose(apply(made, X, context, mask=(ids[1] >= 0)[:, None, None])[0], expected, atol=1e-5)


def test_errors():
    query, key, value = arrays()
    for arguments, message in (
        ({"log_weights": key}, "log_weights must be"),
        ({"return_final_state": True}, "is_causal=True"),
        ({"input_gate": False, "is_causal": True}, "needs log_weights"),
        ({"input_gate": False, "log_weights": key[..., 0]}, "order of tokens"),
        ({"position": object()}, "rotate"),
        ({"mask": np.ones((T, T), bool)}, "key mask"),
        ({"segment_ids": (IDS, IDS), "is_causal": True}, "one array"),
    ):
        with pytest.raises(ValueError, match=message):
            additive_linear_recurrence(query, key, value, **arguments)
    with pytest.raises(ValueError, match="as many keys"):
        additive_linear_recurrence(query, key[:, :3], value[:, :3], is_causal=True)
    _, state = run(query, key, value, is_causal=True, return_final_state=True)
    with pytest.raises(ValueError, match="log-sum-exp"):
        run(query, key, value, is_causal=True, initial_state=state, log_weights=key[..., 0])
    with pytest.raises(ValueError, match="gate_order"):
        layer(gate_order="both")
    with pytest.raises(ValueError, match="num_kv_heads"):
        layer(num_kv_heads=3)
    with pytest.raises(ValueError, match="scalar_decay"):
        layer(input_gate=False)
    with pytest.raises(ValueError, match="cross attention"):
        layer()(X, X, mask=masks.causal())
    with pytest.raises(ValueError, match="context must be"):
        layer()(X, X[..., :3])
    with pytest.raises(ValueError, match="hook"):
        layer()(X, hook=1)
    with pytest.raises(ValueError, match="x must be"):
        layer()(X[..., :3])
