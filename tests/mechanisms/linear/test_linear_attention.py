import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jattn
from jattn.cache import nbytes, reorder
from jattn.cache.recurrent import RecurrentState
from jattn.layers.attention import MultiHeadAttention
from jattn.mechanisms.linear.linear_attention import linear_attention, linear_attention_state, linear_attention_step
from jattn.recurrence.feature_maps import FEATURE_MAPS, Cosine, apply_feature_map, elu1
from jattn.testing.compiling import usual_options

T, S, N, K, D, V = 11, 13, 4, 2, 3, 5
CAUSAL = np.tri(T, S, dtype=bool)
IDS = np.array([[0, 0, 0, 1, 1, -1, 1, 2, 2, 2, 2], [3, 3, -1, -1, 3, 3, 3, 3, 3, 3, 7]])


def arrays(seed=0, length=T, source=S, dtype=np.float64):
    random = np.random.default_rng(seed)
    shapes = ((2, length, N, D), (2, source, K, D), (2, source, K, V))
    return tuple(random.normal(size=shape).astype(dtype) for shape in shapes)


def dense(query, key, value, visible=True, phi=elu1, normalize=True, eps=1e-6):
    """The definition: all weights at once."""
    query, key, value = map(jnp.asarray, (query, key.repeat(N // K, 2), value.repeat(N // K, 2)))
    places = [jnp.arange(x.shape[1])[None] for x in (query, key)]
    features = [apply_feature_map(phi, x, p) for x, p in zip((query, key), places, strict=True)]
    weights = jnp.einsum("btnf,bsnf->bnts", *features) * visible
    out = jnp.einsum("bnts,bsnd->btnd", weights, value)
    return out / (weights.sum(-1).swapaxes(1, 2)[..., None] + eps) if normalize else out


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
@pytest.mark.parametrize("source", [T, S])
@pytest.mark.parametrize("is_causal", [False, True])
def test_it_is_its_definition(is_causal, source, chunk_size):
    with jax.enable_x64(True):
        given = arrays(source=source)
        visible = CAUSAL[:, :source] if is_causal else True
        close(linear_attention(*given, is_causal=is_causal, chunk_size=chunk_size), dense(*given, visible))


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_are_those_of_the_definition(is_causal):
    with jax.enable_x64(True):
        given = tuple(map(jnp.asarray, arrays(source=T)))
        ids = IDS.copy()
        ids[1, -1] = -1
        visible = ((ids[:, :, None] == ids[:, None]) & (ids >= 0)[:, None])[:, None] & (CAUSAL[:, :T] | (not is_causal))

        def loss(function, *given):
            return jnp.sum(jnp.sin(function(*given)))

        def fast(*given):
            return linear_attention(*given, is_causal=is_causal, segment_ids=ids, chunk_size=4)

        gradients = (
            jax.jit(jax.grad(functools.partial(loss, f), (0, 1, 2)))(*given)
            for f in (fast, functools.partial(dense, visible=visible))
        )
        jax.tree.map(close, *gradients)


@pytest.mark.parametrize("name", sorted(FEATURE_MAPS))
def test_every_feature_map_and_none_of_the_division(name):
    with jax.enable_x64(True):
        given = arrays(source=T)
        phi = Cosine(T) if name == "cosine" else FEATURE_MAPS[name]
        for is_causal in (False, True):
            visible = CAUSAL[:, :T] if is_causal else True
            out = linear_attention(*given, is_causal=is_causal, feature_map=name, normalize=False, chunk_size=4)
            close(out, dense(*given, visible, phi, normalize=False))


def test_identity_without_division_is_the_masked_product():
    with jax.enable_x64(True):
        query, key, value = arrays(source=T)
        product = np.einsum("btnd,bsnd->bnts", query, key.repeat(2, 2)) * CAUSAL[:, :T]
        expected = np.einsum("bnts,bsnd->btnd", product, value.repeat(2, 2))
        out = linear_attention(query, key, value, is_causal=True, feature_map="identity", normalize=False)
        close(out, expected)
        close(
            linear_attention(query, key, value, is_causal=True, feature_map="identity", normalize=False, scale=0.5),
            expected / 2,
        )


def test_weights_sum_to_one_and_equal_keys_give_running_means():
    with jax.enable_x64(True):
        query, key, value = arrays(source=T)
        ones = np.ones((2, T, K, 1))
        close(linear_attention(query, key, ones, is_causal=True, eps=0.0), np.ones((2, T, N, 1)))
        same = np.broadcast_to(key[:, :1], key.shape)
        mean = np.cumsum(value, 1) / np.arange(1, T + 1)[:, None, None]
        close(linear_attention(query, same, value, is_causal=True, eps=0.0), mean.repeat(2, 2))


def test_the_last_causal_row_is_the_noncausal_one():
    with jax.enable_x64(True):
        query, key, value = arrays(source=T)
        last = linear_attention(query[:, -1:], key, value)
        close(linear_attention(query, key, value, is_causal=True)[:, -1:], last)


@pytest.mark.parametrize("is_causal", [False, True])
def test_segments_are_separate_calls(is_causal):
    with jax.enable_x64(True):
        given = arrays(source=T)
        out = linear_attention(*given, is_causal=is_causal, segment_ids=IDS, chunk_size=4)
        for row in range(2):
            for one in np.unique(IDS[row]):
                where = np.flatnonzero(IDS[row] == one)
                if one < 0:
                    assert not out[row, where].any()
                    continue
                alone = (x[row : row + 1, where] for x in given)
                close(out[row, where], jax.jit(functools.partial(linear_attention, is_causal=is_causal))(*alone)[0])


@pytest.mark.slow
def test_an_id_that_returns_is_a_new_segment():
    with jax.enable_x64(True):
        given = tuple(x[:1, :4] for x in arrays(source=T))
        for is_causal in (False, True):
            out = linear_attention(*given, is_causal=is_causal, segment_ids=np.array([[0, 0, 3, 0]]))
            alone = linear_attention(*(x[:, 3:] for x in given))
            close(out[:, 3:], alone)


def test_pairs_of_segments_and_positions_of_ones_own():
    with jax.enable_x64(True):
        given = arrays()
        random = np.random.default_rng(5)
        ids = random.integers(-1, 3, (2, T)), random.integers(-1, 3, (2, S))
        same = ((ids[0][:, :, None] == ids[1][:, None]) & (ids[0] >= 0)[:, :, None])[:, None]
        close(linear_attention(*given, segment_ids=ids, chunk_size=4), dense(*given, same))
        places = random.permutation(20)[None, :T], random.permutation(20)[None, :S]
        seen = (places[1][0] <= places[0][0][:, None])[None, None]
        out = linear_attention(
            *given, is_causal=True, segment_ids=ids, query_positions=places[0], key_positions=places[1], chunk_size=4
        )
        close(out, dense(*given, same & seen))


@pytest.mark.parametrize("is_causal", [False, True])
def test_key_masks_hide_and_poison_stays_where_it_is(is_causal):
    query, key, value = arrays(source=T, dtype=np.float32)
    mask = np.ones((2, 1, 1, T), bool)
    mask[0, ..., 2:5] = False
    mask[1] = False
    dirty = [np.where(mask[:, 0, 0, :, None, None], x, np.nan).astype(np.float32) for x in (key, value)]

    def loss(query, key, value):
        out = linear_attention(query, key, value, mask=mask, is_causal=is_causal, chunk_size=4)
        return jnp.sum(out**2), out

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    clean, poisoned = run(query, key, value), run(query, *dirty)
    jax.tree.map(np.testing.assert_array_equal, poisoned, clean)
    assert not np.asarray(clean[0][1][1]).any()
    assert not any(np.asarray(g[1]).any() for g in clean[1])
    rest = linear_attention(query[:1], *(np.delete(x[:1], [2, 3, 4], 1) for x in (key, value)))
    if not is_causal:
        np.testing.assert_allclose(clean[0][1][:1], rest, rtol=1e-5, atol=1e-6)


def test_unseen_keys_of_a_causal_cross_call_poison_nothing():
    query, key, value = arrays(dtype=np.float32)
    clean = linear_attention(query, key, value, is_causal=True)
    key[:, T:], value[:, T:] = np.nan, np.inf
    np.testing.assert_array_equal(linear_attention(query, key, value, is_causal=True), clean)


def test_decoding_gives_the_parallel_rows_and_splits_continue():
    with jax.enable_x64(True):
        given = arrays(source=T)
        whole, last = linear_attention(*given, is_causal=True, return_final_state=True)
        state = linear_attention_state(2, K, D, V, dtype=jnp.float64)
        size = nbytes(state)
        step = jax.jit(linear_attention_step)
        rows = []
        for t in range(T):
            out, state = step(*(x[:, t : t + 1] for x in given), state)
            rows.append(out)
        close(np.concatenate(rows, 1), whole)
        jax.tree.map(close, state, last)
        assert nbytes(state) == size == 2 * K * D * (V + 1) * 8 + 2 * 4
        first, state = linear_attention(*(x[:, :5] for x in given), is_causal=True, return_final_state=True)
        second = linear_attention(*(x[:, 5:] for x in given), is_causal=True, initial_state=state)
        close(np.concatenate([first, second], 1), whole)


@pytest.mark.slow
def test_invalid_tokens_leave_a_state_alone_and_states_carry_gradients():
    with jax.enable_x64(True):
        query, key, value = (x[:, :3] for x in arrays(source=T))
        ok = np.array([[True, False, True], [True, True, True]])
        start = linear_attention_state(2, K, D, V, feature_map=Cosine(8), dtype=jnp.float64)
        out, state = linear_attention_step(query, key, value, start, valid=ok, feature_map=Cosine(8))
        kept = [x[:1, [0, 2]] for x in (query, key, value)]
        alone, final = linear_attention(*kept, is_causal=True, feature_map=Cosine(8), return_final_state=True)
        close(out[:1, [0, 2]], alone)
        assert not out[0, 1].any()
        close(state.state[:1], final.state)
        assert state.next.tolist() == [2, 3]

        def later(state):
            return linear_attention_step(query, key, value, state, feature_map=Cosine(8))[0].sum()

        assert np.abs(jax.jit(jax.grad(later, allow_int=True))(state).state).min() > 0


def test_states_are_caches():
    state = linear_attention_state(2, K, D, V, normalize=False)
    assert state.aux == ()
    assert reorder(state, np.array([1, 0, 1])).state.shape[0] == 3
    with pytest.raises(ValueError, match="cannot forget"):
        state.truncate(1)
    with pytest.raises(ValueError, match="float32 or float64"):
        RecurrentState.init(1, 1, 1, 1, jnp.bfloat16)
    with pytest.raises(ValueError, match="v_dim"):
        linear_attention_state(1, 1, 1, 0)


@pytest.mark.slow
def test_memory_is_linear_in_the_length_forward_and_backward():
    def bytes_of(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        loss = jax.grad(lambda q, k, v: linear_attention(q, k, v, is_causal=True).sum(), (0, 1, 2))
        return jax.jit(loss).lower(x, x, x).compile(usual_options()).memory_analysis().temp_size_in_bytes

    assert bytes_of(4096) < 4.4 * bytes_of(1024)


@pytest.mark.slow
def test_it_serves_a_layer_and_a_sharded_batch(run_with_devices):
    layer = MultiHeadAttention(8, 2, attention_fn=linear_attention, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(1, T, 8)).astype(np.float32)
    whole = layer(x, mask=jattn.masks.causal()).output
    np.testing.assert_allclose(layer(x[:, :5], mask=jattn.masks.causal()).output, whole[:, :5], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="softmax_attention"):
        layer(x, mask=jattn.masks.sliding_window(2))
    run_with_devices(
        2,
        """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import PartitionSpec as P
        from jattn.mechanisms.linear.linear_attention import linear_attention
        x = jax.random.normal(jax.random.key(0), (2, 9, 2, 4))
        ids = jnp.array([[0, 0, 1, 1, 1, 1, 2, 2, 2]] * 2)
        mesh = jax.make_mesh((2,), ("b",), axis_types=(jax.sharding.AxisType.Auto,))
        for causal in (False, True):
            for given in ((x,) * 3, (x,) * 3 + (ids,)):
                def f(q, k, v, ids=None):
                    return linear_attention(q, k, v, is_causal=causal, segment_ids=ids, chunk_size=4)
                sharded = jax.shard_map(f, mesh=mesh, in_specs=P("b"), out_specs=P("b"))
                np.testing.assert_allclose(jax.jit(sharded)(*given), f(*given), rtol=1e-5, atol=1e-6)
        """,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": np.zeros((1, 1, T, S))}, "softmax_attention takes a bias"),
        ({"mask": np.ones((T, S), bool)}, "softmax_attention takes any mask"),
        ({"mask": np.ones((2, 1, 1, S))}, "booleans"),
        ({"segment_ids": np.zeros((2, T), int)}, "pair"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"eps": -1.0}, "eps"),
        ({"return_final_state": True}, "causal self attention"),
        ({"query_positions": np.zeros((2, 3), int)}, "query_positions"),
        ({"key": np.zeros((2, S, 3, D))}, "key must be"),
        ({"value": np.zeros((2, S, 1, D))}, "value must be"),
        ({"query": np.zeros((T, N, D))}, "query must be"),
        ({"feature_map": "elu"}, "did you mean relu or elu1"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    query, key, value = arrays(dtype=np.float32)
    with pytest.raises(ValueError, match=message):
        linear_attention(**{"query": query, "key": key, "value": value, **changes})
    with pytest.raises(ValueError, match="linear_attention_state"):
        linear_attention_step(query, key[:, :T], value[:, :T], linear_attention_state(2, K, D, V + 1))
