import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import cache as caches
from jattn import masks
from jattn.cache import FullCache, KVCache, SinkWindowCache, WindowCache

B, K, N, D, DV, T = 2, 2, 4, 4, 3, 11


def tensors(seed=0, length=T):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((B, length, N, D), (B, length, K, D), (B, length, K, DV))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def read(policy, cache, query, positions):
    mask = caches.slots_for_heads(policy.mask(cache, positions), N)
    return jattn.dot_product_attention(query, cache.key, cache.value, mask=mask)


def stream(policy, query, key, value, chunks, valid=None, between=lambda cache: cache):
    """append -> attention -> evict over chunks; returns all rows and the last cache."""
    cache, rows, start = policy.init(B, K, D, DV), [], 0
    for size in chunks:
        part = slice(start, start + size)
        cache, positions = policy.append(cache, key[:, part], value[:, part], None if valid is None else valid[:, part])
        cache = between(cache)
        rows.append(read(policy, cache, query[:, part], positions))
        cache, start = policy.evict(cache, None), start + size
    return jnp.concatenate(rows, 1), cache


def chunkings(window):
    return {
        "ones": (1,) * T,
        "threes": (3, 3, 3, 2),
        "window": (window, window, T - 2 * window),
        "uneven": (2, 1, 4, 4),
    }


POLICIES = {
    "full": (lambda chunk: FullCache(16), masks.causal()),
    "window": (lambda chunk: WindowCache(4, chunk=chunk), masks.sliding_window(4)),
    "sinks": (
        lambda chunk: SinkWindowCache(4, num_sinks=2, chunk=chunk, positions="original"),
        masks.sliding_window(4, num_sinks=2),
    ),
    "no sinks": (lambda chunk: SinkWindowCache(4, num_sinks=0, chunk=chunk), masks.sliding_window(4)),
}


@pytest.mark.parametrize("name", list(POLICIES))
@pytest.mark.parametrize("chunking", list(chunkings(4)))
def test_any_chunking_equals_the_mask_on_full_attention(name, chunking):
    make, mask = POLICIES[name]
    chunks = chunkings(4)[chunking]
    query, key, value = tensors()
    got, cache = stream(make(max(chunks)), query, key, value, chunks)
    np.testing.assert_allclose(got, jattn.dot_product_attention(query, key, value, mask=mask), atol=1e-5)
    np.testing.assert_array_equal(cache.next, [T, T])


@pytest.mark.parametrize(
    "policy", [WindowCache(T), SinkWindowCache(T, num_sinks=1), SinkWindowCache(T - 3, num_sinks=3)]
)
def test_capacity_for_all_tokens_equals_the_full_cache(policy):
    query, key, value = tensors()
    got, _ = stream(policy, query, key, value, (1,) * T)
    expected, _ = stream(FullCache(T), query, key, value, (1,) * T)
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("name", list(POLICIES))
def test_permuted_slots_read_the_same(name):
    policy = POLICIES[name][0](3)
    query, key, value = tensors()
    _, cache = stream(policy, query, key, value, (3, 3, 3))
    cache, positions = policy.append(cache, key[:, 9:], value[:, 9:])
    order = np.random.default_rng(0).permutation(policy.capacity)
    permuted = dataclasses.replace(
        cache,
        key=cache.key[:, order],
        value=cache.value[:, order],
        key_positions=cache.key_positions[:, :, order],
    )
    rows = [read(policy, c, query[:, 9:], positions) for c in (cache, permuted)]
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-6)


@pytest.mark.parametrize("name", list(POLICIES))
def test_invalid_tokens_write_nothing_and_touch_no_other_row(name):
    policy = POLICIES[name][0](4)
    query, key, value = tensors()
    valid = np.ones((B, T), bool)
    valid[0, [0, 1, 5, 10]] = False
    poisoned = [jnp.where(valid[:, :, None, None], x, jnp.nan) for x in (key, value)]
    chunks = (4, 4, 3)
    got, cache = stream(policy, query, *poisoned, chunks, valid)
    plain, _ = stream(policy, query, key, value, chunks)
    np.testing.assert_array_equal(got[1], plain[1])
    np.testing.assert_array_equal(cache.next, [T - 4, T])
    np.testing.assert_array_equal(got[0, ~valid[0]], 0)
    kept = np.flatnonzero(valid[0])
    short, _ = stream(policy, query[:, kept], key[:, kept], value[:, kept], (2, 2, 2, 1))
    np.testing.assert_allclose(got[0, kept], short[0], atol=1e-5)


def test_positions_of_new_tokens():
    policy = FullCache(8)
    _, key, value = tensors(length=3)
    valid = np.array([[False, True, True], [True, False, True]])
    cache, positions = policy.append(policy.init(B, K, D, DV), key, value, valid)
    np.testing.assert_array_equal(positions, [[-1, 0, 1], [0, -1, 1]])
    cache, positions = policy.append(cache, key, value)
    np.testing.assert_array_equal(positions, [[2, 3, 4], [2, 3, 4]])
    np.testing.assert_array_equal(cache.key_positions[:, 0], [[0, 1, 2, 3, 4, -1, -1, -1]] * 2)
    np.testing.assert_array_equal(cache.key[0, 0], key[0, 1])


def test_a_full_cache_never_overwrites():
    policy = FullCache(4)
    _, key, value = tensors()
    first, _ = policy.append(policy.init(B, K, D, DV), key[:, :3], value[:, :3])
    cache, positions = policy.append(first, key[:, 3:6], value[:, 3:6])
    np.testing.assert_array_equal(cache.key[:, :3], first.key[:, :3])
    np.testing.assert_array_equal(cache.key[:, 3], key[:, 3])
    np.testing.assert_array_equal(cache.key_positions[0, 0], [0, 1, 2, 3])
    np.testing.assert_array_equal(positions[0], [3, 4, 5])
    assert (cache.next > policy.capacity).all()
    again, _ = policy.append(cache, key[:, 6:], value[:, 6:])
    np.testing.assert_array_equal(again.key, cache.key)


def test_sinks_are_the_first_tokens_of_the_stream():
    policy = SinkWindowCache(3, num_sinks=2, chunk=2)
    _, key, value = tensors()
    _, cache = stream(policy, *tensors(), (2,) * 5)
    held = {int(p): s for s, p in enumerate(cache.key_positions[0, 0])}
    assert set(held) == {0, 1, 6, 7, 8, 9}
    for position, slot in held.items():
        np.testing.assert_array_equal(cache.key[0, slot], key[0, position])


def test_chunks_that_are_too_long_are_refused():
    _, key, value = tensors()
    for policy in (WindowCache(4, chunk=2), SinkWindowCache(4, chunk=2)):
        with pytest.raises(ValueError, match="chunk"):
            policy.append(policy.init(B, K, D, DV), key[:, :3], value[:, :3])


def test_reorder_truncate_bytes():
    policy = FullCache(8)
    query, key, value = tensors()
    _, cache = stream(policy, query, key, value, (5,))
    swapped = caches.reorder(cache, np.array([1, 1, 0]))
    np.testing.assert_array_equal(swapped.key[2], cache.key[0])
    np.testing.assert_array_equal(swapped.next, [5, 5, 5])
    shorter = policy.truncate(cache, np.array([3, 9]))
    np.testing.assert_array_equal(shorter.next, [3, 5])
    np.testing.assert_array_equal(shorter.key_positions[0, 0], [0, 1, 2, -1, -1, -1, -1, -1])
    redone, positions = policy.append(policy.truncate(cache, 3), key[:, 3:5], value[:, 3:5])
    for one, other in zip(jax.tree.leaves(redone), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(one, other)
    for forgetful in (WindowCache(4), SinkWindowCache(4)):
        with pytest.raises(ValueError, match="forgets nothing"):
            forgetful.truncate(forgetful.init(B, K, D, DV), 1)
    assert caches.nbytes(cache) == 4 * (B * 8 * K * (D + DV) + B * 8 + B)
    assert caches.nbytes(jax.eval_shape(lambda: cache)) == caches.nbytes(cache)


def test_one_compilation_serves_all_steps():
    policy = SinkWindowCache(3, num_sinks=1)
    query, key, value = tensors()
    traces = []

    @jax.jit
    def step(cache, query, key, value):
        traces.append(1)
        cache, positions = policy.append(cache, key, value)
        return cache, read(policy, cache, query, positions)

    cache = policy.init(B, K, D, DV)
    for t in range(5):
        cache, _ = step(cache, query[:, t : t + 1], key[:, t : t + 1], value[:, t : t + 1])
    assert len(traces) == 1
    scanned, _ = jax.lax.scan(
        lambda c, kv: (policy.append(c, *kv)[0], None),
        policy.init(B, K, D, DV),
        tuple(jnp.swapaxes(x[:, :5, None], 0, 1) for x in (key, value)),
    )
    for one, other in zip(jax.tree.leaves(scanned), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(one, other)


def test_condition_cache_has_no_causal_term():
    policy = FullCache(6, causal=False)
    query, key, value = tensors()
    cache, _ = policy.append(policy.init(B, K, D, DV), key[:, :5], value[:, :5])
    got = read(policy, cache, query[:, :2], jnp.zeros((B, 2), jnp.int32))
    np.testing.assert_allclose(got, jattn.dot_product_attention(query[:, :2], key[:, :5], value[:, :5]), atol=1e-6)


def test_dtype_is_the_cache_s():
    policy = FullCache(4)
    _, key, value = tensors(length=2)
    cache, _ = policy.append(policy.init(B, K, D, DV, jnp.bfloat16), key, value)
    assert cache.key.dtype == cache.value.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: FullCache(0), "max_tokens"),
        (lambda: WindowCache(0), "window"),
        (lambda: WindowCache(2, chunk=0), "chunk"),
        (lambda: SinkWindowCache(2, num_sinks=-1), "num_sinks"),
        (lambda: SinkWindowCache(2, positions="raw"), "positions"),
        (lambda: FullCache(2).init(0, 1, 1, 1), "batch"),
        (
            lambda: FullCache(2).append(FullCache(2).init(1, 1, 2, 2), np.ones((1, 1, 1, 3)), np.ones((1, 1, 1, 2))),
            "key",
        ),
        (
            lambda: FullCache(2).append(FullCache(2).init(1, 1, 2, 2), np.ones((1, 1, 1, 2)), np.ones((1, 2, 1, 2))),
            "value",
        ),
        (lambda: caches.token_positions(FullCache(2).init(1, 1, 2, 2), 2, np.ones((1, 2))), "valid"),
    ],
)
def test_bad_arguments_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_per_head_positions_reach_the_mask_alone():
    cache = FullCache(3).init(B, K, D, DV)
    per_head = dataclasses.replace(cache, key_positions=jnp.zeros((B, K, 3), jnp.int32))
    assert isinstance(per_head, KVCache)
    mask = FullCache(3).mask(per_head, jnp.zeros((B, 1), jnp.int32))
    assert caches.slots_for_heads(mask, N).shape == (B, N, 1, 3)
    with pytest.raises(ValueError, match="kv head"):
        FullCache(3).seen_positions(per_head, jnp.zeros((B, 1), jnp.int32))
