"""Dropout that depends on the seed and on indices only: the cipher, the rate, the mask of every implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32

import jattn
from jattn.softmax.dropout import keep_pairs, threefry2x32

IMPLEMENTATIONS = ("reference", "blockwise")
B, T, S, N, K, RATE = 2, 11, 13, 4, 2, 0.3
KEY = jax.random.key(7)


def test_the_cipher_is_that_of_jax():
    rng = np.random.default_rng(0)
    key, counter = (rng.integers(0, 2**32, (2, *n), dtype=np.uint32) for n in ((), (50,)))
    expected = threefry_2x32(jnp.asarray(key), jnp.asarray(counter.reshape(-1)))
    found = threefry2x32(tuple(jnp.asarray(key)), tuple(jnp.asarray(counter)))
    np.testing.assert_array_equal(np.concatenate(found), expected)


def test_known_answers_of_the_cipher():
    """The vectors that come with the authors' library Random123."""
    ones, pi = (0xFFFFFFFF,) * 2, ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3))
    for key, counter, expected in (
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        (ones, ones, (0x1CB996FC, 0xBB002BE7)),
        (*pi, (0xC4923A9C, 0x483DF7A0)),
    ):
        words = [tuple(jnp.uint32(x) for x in pair) for pair in (key, counter)]
        assert tuple(int(x) for x in threefry2x32(*words)) == expected


def dropped(implementation, key=KEY, blocks=(4, 4), batch=B, length=T, **arguments):
    """The weights after dropout, [B, N, T, S]: equal logits, and values that are the unit vectors."""
    query, keys = np.zeros((batch, length, N, 2), np.float32), np.zeros((batch, S, K, 2), np.float32)
    value = np.broadcast_to(np.eye(S, dtype=np.float32)[None, :, None], (batch, S, K, S))
    out = jattn.dot_product_attention(
        query,
        keys,
        value,
        implementation=implementation,
        block_sizes=blocks,
        dropout_rate=RATE,
        dropout_key=key,
        **arguments,
    )
    return np.swapaxes(np.asarray(out), 1, 2)


def kept(*arguments, **options):
    return dropped(*arguments, **options) != 0


def test_kept_weights_are_scaled_and_which_ones_is_the_definition():
    seed = jax.random.bits(KEY, (2,), jnp.uint32)
    index = np.meshgrid(*(np.arange(n) for n in (B, N, T, S)), indexing="ij")
    keep = np.asarray(keep_pairs(seed, RATE, *index))
    for implementation in IMPLEMENTATIONS:
        np.testing.assert_allclose(dropped(implementation), keep / S / (1 - RATE), rtol=1e-5)


def test_neither_tiles_nor_positions_nor_other_rows_matter():
    expected = kept("reference")
    for options in (
        {"blocks": (3, 13)},
        {"blocks": (11, 5)},
        {"query_positions": np.arange(T)[None] * 7 + 3, "key_positions": np.zeros((B, S), int)},
        {"batch": B + 1},
        {"length": T - 4},
    ):
        found = kept("blockwise", **options)
        rows = min(T, found.shape[2])
        np.testing.assert_array_equal(found[:B, :, :rows], expected[:, :, :rows])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_permuted_layout_drops_the_same_pairs(implementation):
    rng = np.random.default_rng(1)
    perms = [rng.permutation(n).astype(np.int32)[None, None] for n in (T, S)]
    layout = jattn.layouts.from_block_mask(
        np.ones((3, 4), bool),
        query_slots=T,
        key_slots=S,
        query_block=4,
        key_block=4,
        query_perm=perms[0],
        key_perm=perms[1],
    )
    np.testing.assert_array_equal(kept(implementation, blocks=None, layout=layout), kept("reference"))


def test_rows_heads_and_seeds_drop_differently():
    keep = kept("reference")
    flat = keep.reshape(B * N, -1)
    assert len({row.tobytes() for row in flat}) == B * N
    # Pairs of heads agree as often as chance has it.
    agree = (flat[:, None] == flat[None])[~np.eye(B * N, dtype=bool)].mean()
    assert abs(agree - (RATE**2 + (1 - RATE) ** 2)) < 0.05
    assert (kept("reference", key=jax.random.key(8)) != keep).mean() > 0.3
    np.testing.assert_array_equal(kept("reference", key=jax.random.PRNGKey(7)), keep)


@pytest.mark.parametrize("rate", [0.01, 0.5, 0.9])
def test_the_rate(rate):
    seed = jnp.array([1, 2], jnp.uint32)
    keep = keep_pairs(seed, rate, 0, 0, np.arange(400)[:, None], np.arange(400))
    spread = (rate * (1 - rate) / keep.size) ** 0.5
    assert abs(float(keep.mean()) - (1 - rate)) < 5 * spread
    assert abs(keep.mean(0) - (1 - rate)).max() < 6 * spread * 20
    assert abs(keep.mean(1) - (1 - rate)).max() < 6 * spread * 20


def test_no_rate_is_no_dropout():
    query = np.random.default_rng(2).normal(size=(1, 4, 2, 3)).astype(np.float32)
    plain = jattn.dot_product_attention(query, query, query)
    for options in ({"dropout_rate": 0.0}, {"dropout_rate": 0, "dropout_key": KEY}):
        np.testing.assert_array_equal(jattn.dot_product_attention(query, query, query, **options), plain)


def test_gradients_are_those_of_the_kept_weights_and_lse_knows_nothing(x64):
    rng = np.random.default_rng(3)
    query, key, value = (rng.normal(size=s) for s in ((B, T, N, 3), (B, S, K, 3), (B, S, K, 2)))
    index = np.meshgrid(*(np.arange(n) for n in (B, N, T, S)), indexing="ij")
    keep = keep_pairs(jax.random.bits(KEY, (2,), jnp.uint32), RATE, *index)

    def plain(query, key, value):
        key, value = (jnp.repeat(x, N // K, axis=2) for x in (key, value))
        logits = jnp.einsum("btnd,bsnd->bnts", query, key) * 3**-0.5
        weights = jnp.where(keep, jax.nn.softmax(logits) / (1 - RATE), 0)
        return jnp.einsum("bnts,bsnd->btnd", weights, value), jnp.swapaxes(jax.nn.logsumexp(logits, -1), 1, 2)

    def engine(implementation):
        return lambda *x: jattn.dot_product_attention(
            *x,
            implementation=implementation,
            block_sizes=(4, 4),
            dropout_rate=RATE,
            dropout_key=KEY,
            return_residual=True,
        )

    def results(call):
        def loss(*x):
            out, lse = call(*x)
            return jnp.sin(out).sum() + jnp.cos(lse).sum(), (out, lse)

        return jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(query, key, value))

    expected = results(plain)
    for implementation in IMPLEMENTATIONS:
        for x, y in zip(results(engine(implementation)), expected, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-12)
