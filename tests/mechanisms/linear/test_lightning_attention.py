import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.mechanisms.linear.lightning_attention import lightning_attention
from jattn.models import DecoderLM, TransformerConfig
from jattn.recurrence.api import MODES
from jattn.recurrence.decay_schedules import tnl_decay_slopes

T, N, K, D, V = 11, 4, 2, 6, 5
SLOPES = tnl_decay_slopes(N, 0, 3)


def arrays(seed=0, heads=K, length=T):
    random = np.random.default_rng(seed)
    return tuple(random.normal(size=(2, length, *shape)) for shape in ((N, D), (heads, D), (heads, V)))


def dense(query, key, value, slopes=SLOPES):
    """(Q K^T * decay) V with all pairs."""
    key, value = (x.repeat(N // x.shape[2], 2) for x in (key, value))
    distance = np.subtract.outer(*[np.arange(query.shape[1])] * 2)
    decay = np.where(distance >= 0, np.exp(-slopes[:, None, None] * np.maximum(distance, 0)), 0)
    return np.einsum("bnts,bsnv->btnv", np.einsum("btnd,bsnd->bnts", query, key) * decay, value)


def kernel(query, key, value, slopes, block):
    """The published kernel: rows of a block count from 0, and its KV has decayed one step too far.

    Returns outputs, and KV after each block.
    """
    key, value = (x.repeat(N // x.shape[2], 2) for x in (key, value))
    kv, outs, kvs = np.zeros((2, N, D, V)), [], []
    for start in range(0, query.shape[1], block):
        q, k, v = (x[:, start : start + block] for x in (query, key, value))
        rows, size = np.arange(q.shape[1]), q.shape[1]
        distance = rows[:, None] - rows
        inside = np.where(distance >= 0, np.exp(-slopes[:, None, None] * np.maximum(distance, 0)), 0)
        intra = np.einsum("bnts,bsnv->btnv", np.einsum("btnd,bsnd->bnts", q, k) * inside, v)
        decay = np.exp(-slopes * rows[:, None])
        outs.append(intra + np.einsum("btnd,bndv->btnv", q * decay[None, :, :, None], kv))
        # Of a last short block the state decays by its own length, and keys by the last entries of the usual vector.
        left = np.exp(-slopes * (block - np.arange(block))[-size:, None])
        kv = np.exp(-slopes * size)[:, None, None] * kv + np.einsum("btnd,btnv->bndv", k * left[None, :, :, None], v)
        kvs.append(kv)
    return np.concatenate(outs, 1), kvs


def close(actual, expected, rtol=1e-9, atol=1e-10):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("mode", MODES)
def test_the_recurrence_is_the_masked_form(mode):
    with jax.enable_x64(True):
        given = arrays()
        close(lightning_attention(*given, log_decay=-SLOPES, mode=mode, chunk_size=4), dense(*given))


@pytest.mark.parametrize("chunk_size", [1, 3, 256])
def test_any_block_size_gives_the_same_and_padding_is_not_there(chunk_size):
    with jax.enable_x64(True):
        given = arrays()
        close(lightning_attention(*given, log_decay=-SLOPES, chunk_size=chunk_size), dense(*given))
        ids = np.array([[0] * 4 + [-1] + [0] * 3 + [1] * 2 + [-1]] * 2)
        dirty = tuple(np.where((ids >= 0)[..., None, None], x, np.nan) for x in given)
        out = lightning_attention(*dirty, log_decay=-SLOPES, segment_ids=ids, chunk_size=chunk_size)
        for places in ([0, 1, 2, 3, 5, 6, 7], [8, 9]):
            close(out[:, np.array(places)], dense(*(x[:, places] for x in given)))
        assert not out[:, [4, 10]].any()


@pytest.mark.parametrize("block", [4, 5])
def test_the_published_kernel_keeps_a_state_that_has_decayed_once_more(block):
    with jax.enable_x64(True):
        given = arrays()
        out, kvs = kernel(*given, SLOPES, block)
        found = lightning_attention(*given, log_decay=-SLOPES)
        close(found, out)
        for count, kv in enumerate(kvs, 1):
            part = (x[:, : count * block] for x in given)
            _, state = lightning_attention(*part, log_decay=-SLOPES, return_final_state=True)
            close(kv, np.exp(-SLOPES)[:, None, None] * state)


def test_without_decay_and_with_nothing_but_decay():
    with jax.enable_x64(True):
        query, key, value = arrays(heads=N)
        plain = lightning_attention(query, key, value)
        close(plain, dense(query, key, value, np.zeros(N)))
        close(lightning_attention(query, key, value, log_decay=np.zeros(N)), plain)
        own = (query * key).sum(-1, keepdims=True) * value
        close(lightning_attention(query, key, value, log_decay=np.full(N, -1e4)), own)


def test_halves_of_the_channels_add_up():
    with jax.enable_x64(True):
        query, key, value = arrays()
        halves = [
            lightning_attention(query[..., part], key[..., part], value, log_decay=-SLOPES)
            for part in (slice(0, 2), slice(2, None))
        ]
        close(sum(halves), lightning_attention(query, key, value, log_decay=-SLOPES))


def test_the_naive_derivation_overflows_and_this_one_does_not():
    query, key, value = (jnp.asarray(x, jnp.float32) for x in arrays(heads=N, length=120))
    slopes = jnp.ones(N)
    steps = jnp.arange(1.0, 121)[:, None, None]
    states = jnp.cumsum(jnp.einsum("btnd,btnv->btndv", key * jnp.exp(slopes[:, None] * steps), value), 1)
    naive = jnp.einsum("btnd,btndv->btnv", query * jnp.exp(-slopes[:, None] * steps), states)
    assert not np.isfinite(naive[:, 88:]).all()
    found = lightning_attention(query, key, value, log_decay=-slopes)
    expected = dense(*(np.asarray(x, np.float64) for x in (query, key, value)), np.ones(N))
    close(found, expected, 1e-4, 1e-4)


def test_states_of_narrow_inputs_are_wide():
    given = (jnp.asarray(x, jnp.bfloat16) for x in arrays())
    out, state = lightning_attention(*given, log_decay=-SLOPES, return_final_state=True)
    assert (out.dtype, state.dtype, state.shape) == (jnp.bfloat16, jnp.float32, (2, N, D, V))


def test_what_does_not_fit_is_refused():
    query, key, value = (x.astype(np.float32) for x in arrays())
    with pytest.raises(ValueError, match="is_causal"):
        lightning_attention(query, key, value, is_causal=False)
    with pytest.raises(ValueError, match=r"log_decay must be \[N\]"):
        lightning_attention(query, key, value, log_decay=np.zeros((2, T, N)))
    with pytest.raises(ValueError, match="query must be"):
        lightning_attention(query[0], key, value)


def test_it_stands_in_models():
    config = TransformerConfig(vocab_size=7, features=8, num_layers=1, num_heads=2)
    options = {"log_decay": -tnl_decay_slopes(2, 0, 2).astype(np.float32)}
    model = DecoderLM(config, attention="lightning_attention", attention_options=options, rngs=nnx.Rngs(0))
    assert model(jnp.asarray([[3, 1, 4]])).logits.shape == (1, 3, 7)
