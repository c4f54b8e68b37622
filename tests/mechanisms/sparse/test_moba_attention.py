import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jattn
from jattn.cache import FullCache
from jattn.layers.attention import MultiHeadAttention
from jattn.mechanisms.sparse import moba_attention as module
from jattn.mechanisms.sparse.moba_attention import moba_attention, moba_selection

T, N, K, D, V, C, TOPK = 19, 4, 2, 3, 5, 4, 3


def arrays(seed=0, length=T, dtype=np.float64):
    random = np.random.default_rng(seed)
    shapes = ((2, length, N, D), (2, length, K, D), (2, length, K, V))
    return tuple(random.normal(size=shape).astype(dtype) for shape in shapes)


def chosen(query, key, chunk_size=C, topk=TOPK):
    """The definition for one row and one head: visible keys of each query."""
    length = len(query)
    visible = np.zeros((length, length), bool)
    for t in range(length):
        own = t // chunk_size
        gates = [key[c * chunk_size : (c + 1) * chunk_size].mean(0) @ query[t] for c in range(own)]
        best = [*np.argsort(-np.array(gates), kind="stable")[: topk - 1], own]
        for c in best:
            visible[t, c * chunk_size : (c + 1) * chunk_size] = True
    return visible & np.tri(length, dtype=bool)


def every_mask(query, key, **options):
    return np.stack(
        [np.stack([chosen(query[b, :, n], key[b, :, n // 2], **options) for n in range(N)]) for b in range(len(query))]
    )


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_it_is_softmax_over_the_chosen_chunks_with_all_gradients(implementation):
    with jax.enable_x64(True):
        given = tuple(map(jnp.asarray, arrays()))
        mask = every_mask(*map(np.asarray, given[:2]))
        fast = functools.partial(moba_attention, chunk_size=C, topk=TOPK, implementation=implementation)
        slow = functools.partial(jattn.dot_product_attention, mask=mask, implementation="reference")
        results = (
            jax.jit(jax.value_and_grad(lambda *x, f=f: jnp.sum(jnp.sin(f(*x))), (0, 1, 2)))(*given)
            for f in (fast, slow)
        )
        jax.tree.map(close, *results)


def test_every_query_attends_to_exactly_topk_chunks_with_its_own():
    query, key, _ = arrays(dtype=np.float32)
    choice = np.asarray(moba_selection(query, key, chunk_size=C, topk=TOPK))
    own = np.arange(T) // C
    assert (choice.sum(-1) == np.minimum(TOPK, own + 1)).all()
    assert choice[:, :, np.arange(T), own].all()
    assert not (choice & (np.arange(5) > own[:, None])).any()


def test_limits_are_dense_and_block_diagonal_attention():
    with jax.enable_x64(True):
        given = arrays()
        causal = jattn.dot_product_attention(*given, is_causal=True)
        close(moba_attention(*given, chunk_size=C, topk=5), causal)
        close(moba_attention(*given, chunk_size=100, topk=1), causal)
        block = np.arange(T) // C
        diagonal = jattn.dot_product_attention(*given, mask=block[:, None] == block, is_causal=True)
        close(moba_attention(*given, chunk_size=C, topk=1), diagonal)


def test_own_chunk_and_past_chunks_merge_to_the_whole():
    with jax.enable_x64(True):
        given = arrays()
        mask = every_mask(*given[:2])
        block = np.arange(T) // C
        own = block[:, None] == block
        attend = functools.partial(jattn.dot_product_attention, *given, return_residual=True)
        out, lse = jattn.merge_lse(attend(mask=mask & own), attend(mask=mask & ~own))
        whole, whole_lse = moba_attention(*given, chunk_size=C, topk=TOPK, return_residual=True)
        close(whole, out)
        close(whole_lse, lse)


def test_equal_gates_go_to_the_earlier_chunk_and_scaling_changes_nothing():
    query, key, _ = arrays(dtype=np.float32)
    same = np.ones_like(key)
    choice = np.asarray(moba_selection(query, same, chunk_size=C, topk=TOPK))
    assert choice[0, 0, -1].tolist() == [True, True, False, False, True]
    select = functools.partial(moba_selection, key=key, chunk_size=C, topk=TOPK)
    np.testing.assert_array_equal(select(query), select(4 * query))
    np.testing.assert_array_equal(choice.shape, (2, N, T, 5))


def test_the_choice_does_not_see_the_future_and_decodes_row_by_row():
    query, key, _ = arrays(dtype=np.float32)
    select = functools.partial(moba_selection, chunk_size=C, topk=TOPK)
    whole = np.asarray(select(query, key))
    for t in (0, 3, 4, 10, T - 1):
        row = np.asarray(select(query[:, t : t + 1], key[:, : t + 1], query_positions=np.array([[t]])))
        np.testing.assert_array_equal(row[:, :, 0], whole[:, :, t, : row.shape[-1]])
    later = key.copy()
    later[:, 9:] = 100.0
    np.testing.assert_array_equal(select(query, later)[:, :, :9], whole[:, :, :9])


def test_each_query_head_chooses_for_itself():
    query, key, _ = arrays(dtype=np.float32)
    choice = np.asarray(moba_selection(query, key, chunk_size=C, topk=2))
    assert not np.array_equal(choice[:, 0], choice[:, 1])


IDS = np.array([[0] * 9 + [1] * 1 + [2] * 9, [5] * 3 + [-1] * 2 + [5] * 7 + [4] * 6 + [-1]])


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_segments_are_separate_runs_with_all_gradients(implementation):
    with jax.enable_x64(True):
        given = tuple(map(jnp.asarray, arrays()))
        fast = functools.partial(moba_attention, chunk_size=2, topk=2, segment_ids=IDS, implementation=implementation)
        mask = np.zeros((2, N, T, T), bool)
        for b in range(2):
            for one in set(IDS[b]) - {-1}:
                where = np.flatnonzero(IDS[b] == one)
                inside = every_mask(*(np.asarray(x)[b : b + 1, where] for x in given[:2]), chunk_size=2, topk=2)
                mask[b][:, where[:, None], where] = inside[0]
        slow = functools.partial(jattn.dot_product_attention, mask=mask, implementation="reference")
        close(fast(*given), slow(*given))
        gradients = (
            jax.jit(jax.grad(lambda *x, f=f: jnp.sum(jnp.sin(f(*x))), (0, 1, 2)))(*given) for f in (fast, slow)
        )
        jax.tree.map(close, *gradients)
        restarting = np.concatenate([np.arange(9), [0], np.arange(9)])[None]
        packed = tuple(x[:1] for x in given)
        places = {"query_positions": restarting, "key_positions": restarting, "segment_ids": IDS[:1]}
        close(moba_attention(*packed, chunk_size=2, topk=2, **places), fast(*given)[:1])


def test_hidden_keys_are_not_there_and_poison_nothing():
    query, key, value = arrays(dtype=np.float32)
    ok = np.ones((2, 1, 1, T), bool)
    ok[0, ..., 3:6] = False
    ok[1] = False
    run = jax.jit(functools.partial(moba_attention, chunk_size=C, topk=2, mask=ok))
    clean = run(query, key, value)
    kept = np.delete(np.arange(T), [3, 4, 5])
    alone = moba_attention(*(x[:1, kept] for x in (query, key, value)), chunk_size=C, topk=2)
    np.testing.assert_allclose(clean[:1, kept], alone, rtol=1e-5, atol=1e-6)
    assert not clean[1].any()
    key[0, 3:6], value[0, 3:6], key[1], value[1] = np.nan, np.inf, np.inf, np.nan
    np.testing.assert_array_equal(run(query, key, value), clean)


@pytest.mark.parametrize("chunk", [1, 4])
def test_decoding_on_a_cache_gives_the_rows_of_the_whole(chunk):
    with jax.enable_x64(True):
        function = functools.partial(moba_attention, chunk_size=3, topk=2)
        layer = MultiHeadAttention(8, 2, attention_fn=function, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        x = np.random.default_rng(0).normal(size=(2, 12, 8))
        whole = layer(x, mask=jattn.masks.causal()).output
        policy = FullCache(14)
        cache = layer.init_cache(policy, 2)
        step = nnx.jit(lambda layer, x, cache: layer(x, cache=(policy, cache)))
        rows = []
        for t in range(0, 12, chunk):
            result = step(layer, x[:, t : t + chunk], cache)
            cache = result.cache
            rows.append(result.output)
        close(np.concatenate(rows, 1), whole)


def test_work_follows_the_chosen_chunks():
    length, chunk = 2048, 64
    # Slowly turning directions: all queries of a tile choose alike.
    angle = np.linspace(0, np.pi, length)
    x = np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)[None, :, None]
    layout = module._plain_layout(jnp.asarray(x), jnp.asarray(x), None, chunk, 3)
    assert int(layout.count.max()) <= 4
    ids = jnp.zeros((1, length), jnp.int32)
    ordered = module._ordered_layout(jnp.asarray(x), jnp.asarray(x), ids, ids, None, None, ids >= 0, chunk, 3)
    np.testing.assert_array_equal(ordered.live_map(), layout.live_map())
    assert int(ordered.full.sum()) > length // 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_size": 0}, "chunk_size"),
        ({"topk": 0}, "topk"),
        ({"is_causal": False}, "is causal"),
        ({"mask": np.ones((1, N, 1, T), bool)}, "alike for all heads"),
        ({"mask": jattn.masks.sliding_window(3)}, "softmax_attention"),
        ({"segment_ids": np.zeros((2, 3), int)}, "segment_ids"),
        ({"key": np.ones((2, T, 3, D))}, "key must be"),
        ({"query_positions": np.zeros((2, 3), int)}, "query_positions"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    query, key, value = arrays()
    with pytest.raises(ValueError, match=message):
        moba_attention(**{"query": query, "key": key, "value": value, **changes})
