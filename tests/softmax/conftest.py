"""What the engine's tests share: an independent truth in numpy and random problems."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def _attention_truth(query, key, value, *, visible=True, bias=0.0, modify=None, cap=None, sinks=None, weigh=None):
    """Attention as its definition says, in float64 numpy, one row after the other."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, length, heads, dim = query.shape
    group = heads // key.shape[2]
    shape = (batch, heads, length, key.shape[1])
    visible, bias = np.broadcast_to(np.asarray(visible), shape), np.broadcast_to(np.asarray(bias, np.float64), shape)
    out = np.zeros((batch, length, heads, value.shape[3]))
    lse = np.full((batch, length, heads), -np.inf)
    for b, h, t in np.ndindex(batch, heads, length):
        seen = np.flatnonzero(visible[b, h, t])
        if not seen.size:
            continue
        logits = key[b, seen, h // group] @ query[b, t, h] * dim**-0.5
        logits = logits if cap is None else cap * np.tanh(logits / cap)
        logits = logits if modify is None else modify(logits, b, h, t, seen)
        logits = logits + bias[b, h, t, seen]
        with np.errstate(divide="ignore"):
            lse[b, t, h] = np.log(np.exp(logits).sum())
        if lse[b, t, h] == -np.inf:
            continue
        extra = 0.0 if sinks is None else np.exp(sinks[h])
        weights = np.exp(logits) / (np.exp(logits).sum() + extra) if weigh is None else weigh(logits)
        out[b, t, h] = weights @ value[b, seen, h // group]
    return out, lse


@pytest.fixture(scope="session")
def attention_truth():
    """The numpy truth: (query, key, value, **) -> (out, lse)."""
    return _attention_truth


@pytest.fixture(scope="session")
def draw():
    """`draw(T, S, N, K, D, Dv, dtype=...) -> query, key, value` with two batch rows."""

    def random(length, source, heads, kv_heads, dim, value_dim, dtype=jnp.float32, seed=0):
        rng = np.random.default_rng(seed)
        shapes = ((2, length, heads, dim), (2, source, kv_heads, dim), (2, source, kv_heads, value_dim))
        return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)

    return random


@pytest.fixture
def x64():
    """Run the test with 64-bit types."""
    with jax.enable_x64(True):
        yield
