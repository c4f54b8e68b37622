import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jattn
from jattn.cache import FullCache, RecurrentState
from jattn.layers.rope import Rope
from jattn.mechanisms.linear.linear_attention import linear_attention
from jattn.mechanisms.linear.retention import Retention, retention
from jattn.models import DecoderLM, TransformerConfig
from jattn.recurrence.api import MODES
from jattn.recurrence.decay_schedules import retention_log_decay

T, N, K, D, V = 11, 4, 2, 3, 5
IDS = np.array([[0, 0, 0, 1, 1, -1, 1, 2, 2, 2, 2], [3, 3, -1, -1, 3, 3, 3, 3, 3, 3, -1]])
ONE = np.zeros((2, T), int)
GAMMA = 1 - 2.0 ** (-5.0 - np.arange(N))


def arrays(seed=0, length=T, heads=K):
    random = np.random.default_rng(seed)
    return tuple(random.normal(size=(2, length, *shape)) for shape in ((N, D), (heads, D), (heads, V)))


def ages(ids):
    """How many real tokens stand between j and i, and whether i sees j: in its document, no later, no padding."""
    runs, real = np.zeros_like(ids), ids >= 0
    for row, own in enumerate(ids):  # Padding is not there: documents are what is left without it.
        places = np.flatnonzero(real[row])
        runs[row, places] = np.cumsum([0, *(own[places[1:]] != own[places[:-1]])])
    count = np.cumsum(real, 1)
    sees = (runs[:, :, None] == runs[:, None]) & real[:, :, None] & real[:, None] & np.tri(ids.shape[1], dtype=bool)
    return np.maximum(count[:, :, None] - count[:, None], 0), sees


def dense(query, key, value, gamma=GAMMA, ids=ONE, paper_norms=False, xp=np, stop=lambda x: x):
    """The parallel form of the paper: every weight of every pair."""
    distance, sees = ages(ids)
    decay = xp.where(sees[:, None], gamma[:, None, None] ** distance[:, None], 0)
    if paper_norms:
        decay = decay / xp.sqrt(xp.maximum(decay.sum(-1, keepdims=True), 1))
    key, value = (xp.repeat(x, N // x.shape[2], axis=2) for x in (key, value))
    weights = D**-0.5 * xp.einsum("btnd,bsnd->bnts", query, key) * decay
    if paper_norms:
        weights = weights / stop(xp.maximum(xp.abs(weights.sum(-1, keepdims=True)), 1))
    return xp.einsum("bnts,bsnv->btnv", weights, value)


def loop(query, key, value, gamma=GAMMA):
    """The recurrence of the paper, token by token."""
    key, value = (x.repeat(N // x.shape[2], 2) for x in (key, value))
    state, out = np.zeros((2, N, D, V)), []
    for t in range(query.shape[1]):
        state = gamma[:, None, None] * state + key[:, t, :, :, None] * value[:, t, :, None]
        out.append(D**-0.5 * np.einsum("bnd,bndv->bnv", query[:, t], state))
    return np.stack(out, 1), state


def close(actual, expected, rtol=1e-9, atol=1e-11):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("mode", MODES)
def test_it_is_the_recurrence_and_the_parallel_form(mode):
    with jax.enable_x64(True):
        given = arrays()
        out, state = retention(*given, mode=mode, chunk_size=4, return_final_state=True)
        close(out, loop(*given)[0])
        close(state, loop(*given)[1])
        close(out, dense(*given))
        close(retention(*given, mode=mode, chunk_size=4, segment_ids=IDS), dense(*given, ids=IDS))


@pytest.mark.parametrize("mode", MODES)
def test_the_norms_of_the_paper(mode):
    with jax.enable_x64(True):
        given = tuple(3 * x for x in arrays())
        assert abs(dense(*given) - dense(*given, paper_norms=True)).max() > 1
        for ids in (ONE, IDS):
            found = retention(*given, paper_norms=True, mode=mode, chunk_size=4, segment_ids=ids)
            close(found, dense(*given, ids=ids, paper_norms=True))


def test_the_norms_of_the_paper_without_decay_and_with_a_state():
    with jax.enable_x64(True):
        given = tuple(3 * x for x in arrays())
        none = np.zeros(N)
        close(retention(*given, log_decay=none, paper_norms=True), dense(*given, np.ones(N), paper_norms=True))
        ids = IDS[1:].repeat(2, 0)  # one document, with padding inside and at its end
        whole = dense(*given, ids=ids, paper_norms=True)
        options = {"paper_norms": True, "chunk_size": 4, "return_final_state": True}
        first, state = retention(*(x[:, :3] for x in given), segment_ids=ids[:, :3], **options)
        second, _ = retention(*(x[:, 3:] for x in given), segment_ids=ids[:, 3:], initial_state=state, **options)
        close(np.concatenate([first, second], 1), whole)


def test_gradients_and_the_divisor_without_one():
    with jax.enable_x64(True):
        given = tuple(3 * jnp.asarray(x) for x in arrays())
        log_decay = jnp.asarray(retention_log_decay(N))

        def loss(function, *given):
            return jnp.sum(jnp.sin(function(*given)))

        def ours(query, key, value, log_decay):
            return retention(query, key, value, log_decay=log_decay, paper_norms=True, segment_ids=IDS, chunk_size=4)

        def plain(query, key, value, log_decay, stop):
            return dense(query, key, value, jnp.exp(log_decay), IDS, True, jnp, stop)

        def gradients(function, **options):
            grad = jax.grad(functools.partial(loss, functools.partial(function, **options)), (0, 1, 2, 3))
            return jax.jit(grad)(*given, log_decay)

        found = gradients(ours)
        jax.tree.map(functools.partial(close, rtol=1e-8), found, gradients(plain, stop=jax.lax.stop_gradient))
        assert abs(found[0] - gradients(plain, stop=lambda x: x)[0]).max() > 1e-2


def test_without_forgetting_it_is_linear_attention():
    with jax.enable_x64(True):
        given = arrays()
        expected = linear_attention(*given, is_causal=True, feature_map="identity", normalize=False, scale=D**-0.5)
        close(retention(*given, log_decay=np.zeros(N)), expected)


def test_forgetting_everything_leaves_the_token_itself():
    query, key, value = (jnp.asarray(x, jnp.float32) for x in arrays(heads=N))

    def run(query, key, value):
        return retention(query, key, value, log_decay=jnp.full(N, -1e4), chunk_size=4)

    expected = D**-0.5 * (query * key).sum(-1, keepdims=True) * value
    close(run(query, key, value), expected, 1e-5, 1e-6)
    gradients = jax.grad(lambda *x: run(*x).sum(), (0, 1, 2))(query, key, value)
    assert all(np.isfinite(g).all() for g in gradients)


def test_head_zero_forgets_fastest():
    decays = np.exp(retention_log_decay(8))
    close(1 - decays[0], 1 / 32)
    assert (np.diff(decays) > 0).all()
    assert retention_log_decay(64)[-1] < 0


def test_what_does_not_fit_is_refused():
    query, key, value = (x.astype(np.float32) for x in arrays())
    with pytest.raises(ValueError, match="is_causal"):
        retention(query, key, value, is_causal=False)
    with pytest.raises(ValueError, match=r"log_decay must be \[N\]"):
        retention(query, key, value, log_decay=np.zeros(3))
    with pytest.raises(ValueError, match="paper_norms"):
        retention(query, key, value, initial_state=np.zeros((2, N, D, V)), paper_norms=True)
    with pytest.raises(ValueError, match="paper_norms"):
        retention(query, key, value, initial_state=RecurrentState(np.zeros((2, N, D, V))))
    with pytest.raises(ValueError, match="query must be"):
        retention(query[0], key, value)
    with pytest.raises(ValueError, match="key must be"):
        retention(query, key[:, 1:], value)
    for options, word in (
        ({"head_dim": 3}, "even"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"position": Rope(), "use_rotation": False}, "use_rotation"),
        ({"norm": "batchnorm"}, "norm"),
    ):
        with pytest.raises(ValueError, match=word):
            Retention(8, 4, **options, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="divide features"):
        Retention(9, 4, rngs=nnx.Rngs(0))


def make(**options):
    return Retention(12, 3, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)


def tokens(length=T):
    return np.random.default_rng(5).normal(size=(2, length, 12))


def by_hand(layer, x):
    """The layer in numpy: projections, rotation of pairs by angles, recurrence, norm of each head, gate."""
    parameters = {
        "/".join(map(str, path)): np.asarray(v.get_value()) for path, v in nnx.to_flat_state(nnx.state(layer))
    }
    query, key, value, gate = (
        np.einsum("btm,mhd->bthd", x, parameters[f"{name}/kernel"]) for name in ("query", "key", "value", "out/gate")
    )
    half = query.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angles), np.sin(angles)
    query, key = (
        np.concatenate([y[..., :half] * cos - y[..., half:] * sin, y[..., half:] * cos + y[..., :half] * sin], -1)
        for y in (query, key)
    )
    gamma = 1 - 2.0 ** (-5.0 - np.arange(3))
    distance = np.subtract.outer(np.arange(x.shape[1]), np.arange(x.shape[1]))
    decay = np.where(distance >= 0, gamma[:, None, None] ** np.maximum(distance, 0), 0)
    weights = np.einsum("bthd,bshd->bhts", query, key) * decay / query.shape[-1] ** 0.5
    o = np.einsum("bhts,bshv->bthv", weights, value)
    o = o / np.sqrt((o**2).mean(-1, keepdims=True) + 1e-5) * parameters["out/norm/scale"]
    return np.einsum("bthv,hvm->btm", o * gate / (1 + np.exp(-gate)), parameters["out/kernel"])


def test_the_layer_is_its_definition_and_shift_invariant():
    with jax.enable_x64(True):
        layer, x = make(), tokens()
        out = layer(x).output
        close(out, by_hand(layer, x))
        assert layer.value.out_features == (3, 8)
        close(layer(x, positions=np.arange(T) + 1000).output, out, 1e-8, 1e-9)
        assert abs(make(use_rotation=False)(x).output - out).max() > 1e-3


def test_the_norms_of_the_paper_do_not_change_a_layer_with_a_norm():
    with jax.enable_x64(True):
        x = tokens()
        close(make(paper_norms=True, epsilon=1e-14)(x).output, make(epsilon=1e-14)(x).output, 1e-7, 1e-8)


@pytest.mark.parametrize("paper_norms", [False, True])
def test_decoding_continues_the_positions(paper_norms):
    with jax.enable_x64(True):
        layer, x, policy = make(paper_norms=paper_norms), tokens(), FullCache(T)
        expected = nnx.jit(lambda layer, x: layer(x).output)(layer, x)
        step = nnx.jit(lambda layer, x, cache, ids: layer(x, cache=(policy, cache), segment_ids=ids)[:2])
        cache = layer.init_cache(policy, 2, jnp.float64)
        found = []
        for start, stop in ((0, 4), (4, 5), (5, T)):
            part = np.concatenate([x[:, start:stop], np.full((2, 1, 12), np.nan)], 1)
            ids = np.array([[0] * (stop - start) + [-1]] * 2)
            out, cache = step(layer, part, cache, ids)
            assert not out[:, -1].any()
            found.append(out[:, :-1])
        close(np.concatenate(found, 1), expected, 1e-8, 1e-9)
        assert cache.next.tolist() == [T, T]


def test_it_stands_in_models():
    given = jnp.asarray([[3, 1, 4, 1, 5]])
    for position in ("rope", "none"):
        config = TransformerConfig(vocab_size=7, features=8, num_layers=1, num_heads=2, position=position)
        for attention in ("Retention", "retention"):
            model = DecoderLM(config, attention=attention, rngs=nnx.Rngs(0))
            assert model(given).logits.shape == (1, 5, 7)
    assert jattn.get("retention") is retention
