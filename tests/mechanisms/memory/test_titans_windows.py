"""Titans MAG and MAL: the tokens [P ; x] as one plain sequence, documents in a row, decoding in parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.cache import FullCache, nbytes
from jattn.layers.positions import LearnedAbs
from jattn.layers.rope import Rope
from jattn.mechanisms.memory.titans_mag import TitansMAG
from jattn.mechanisms.memory.titans_mal import TitansMAL
from tests.mechanisms.memory.titans_truth import attention, gate, mixed, perturb

T, WINDOW = 11, 3
IDS = np.array([[0, 0, 0, 1, 1, -1, 1, 1, 1, 1, 0], [-1, 3, -1, -1, 3, 3, 3, 3, 3, 7, 7]])


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-8, atol=1e-10)


def make(kind, **options):
    given = {"num_kv_heads": 1, "window": WINDOW, "num_persistent": 4, "chunk_size": 2, **options}
    return perturb(kind(8, 2, **given, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))


def tokens(seed=0):
    return np.random.default_rng(seed).normal(size=(2, T, 8))


run = nnx.jit(lambda layer, x, ids=None: layer(x, segment_ids=ids).output)
heads = nnx.jit(lambda layer, x: layer.mix(x, segment_ids=None, positions=jnp.arange(T)[None], state=None)[0])


def plain(layer, x):
    """The definition on [P ; x], whose first rows are dropped at the end."""
    prefix = np.broadcast_to(layer.persistent[...], (len(x), *layer.persistent[...].shape))
    whole, count = np.concatenate([prefix, x], 1), prefix.shape[1]
    i, j = np.arange(whole.shape[1])[:, None], np.arange(whole.shape[1])
    remembered = layer.memory(whole).output
    window = (j <= i) & (j > i - WINDOW)
    if isinstance(layer, TitansMAG):
        y = mixed(layer, attention(layer, whole, whole, window | ((j < count) & (j <= i)), j, j))
        return gate(layer, y, remembered)[:, count:]
    return mixed(layer, attention(layer, remembered, remembered, window, j, j))[:, count:]


@pytest.mark.parametrize("kind", [TitansMAG, TitansMAL])
@pytest.mark.parametrize(
    "options",
    [{}, {"position": Rope(), "memory_options": {"linear": True}}, {"memory_options": {"update": "chunk"}}],
    ids=["deep", "linear and rotary", "chunk"],
)
def test_it_is_its_definition(kind, options):
    layer = make(kind, **options)
    x = tokens()
    close(run(layer, x), plain(layer, x))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [TitansMAG, TitansMAL])
def test_documents_are_alone_and_parts_are_the_whole(kind):
    layer, x = make(kind, position=Rope()), tokens(1)
    out = run(layer, x, IDS)
    assert not out[IDS < 0].any()
    for one in (IDS == 1, IDS == 3, (IDS == 0) & (np.arange(T) < 5), IDS == 7):
        close(out[one], run(layer, np.where(one[..., None], x, np.nan), np.where(one, 0, -1))[one])
    whole, policy = run(layer, x), FullCache(T)
    cache = first = layer.init_cache(policy, 2, jnp.float64)
    step = nnx.jit(lambda layer, x, cache, ids=None: layer(x, cache=(policy, cache), segment_ids=ids)[:2])
    close(step(layer, x, cache)[0], whole)
    # Padding between the parts is skipped.
    spread = np.full((2, 5), -1)
    spread[:, 1:4] = 0
    padded = np.full((2, 5, 8), np.nan)
    for start in range(0, 9, 3):
        padded[:, 1:4] = x[:, start : start + 3]
        found, cache = step(layer, padded, cache, spread)
        close(found[:, 1:4], whole[:, start : start + 3])
        assert not found[:, [0, 4]].any()
    assert nbytes(cache) == nbytes(first)
    assert cache.next.tolist() == [9, 9]


@pytest.mark.parametrize("kind", [TitansMAG, TitansMAL])
def test_without_persistent_tokens(kind):
    layer, x = make(kind, num_persistent=0), tokens(2)
    out = run(layer, x)
    close(out, plain(layer, x))
    policy = FullCache(T)
    found = nnx.jit(lambda layer, x: layer(x, cache=(policy, layer.init_cache(policy, 2, x.dtype))).output)(layer, x)
    close(found, out)


def test_the_memory_reaches_beyond_the_window_and_attention_does_not():
    layer, x = make(TitansMAG), tokens(3)
    changed = x.copy()
    changed[:, 0] += 1
    before, after = (heads(layer, y) for y in (x, changed))
    np.testing.assert_array_equal(before[:, WINDOW:, :2], after[:, WINDOW:, :2])
    assert (np.abs(before - after)[:, WINDOW:, 2:].max((0, 2, 3)) > 1e-9).all()
    assert (np.abs(run(layer, x) - run(layer, changed))[:, WINDOW:].max((0, 2)) > 1e-9).all()


@pytest.mark.parametrize("kind", [TitansMAG, TitansMAL])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"num_persistent": 3}, "num_persistent must be a multiple of chunk_size = 2"),
        ({"num_persistent": -2}, "num_persistent must be at least 0"),
        ({"position": LearnedAbs(4, 8, rngs=nnx.Rngs(0))}, "has no logits"),
    ],
)
def test_what_does_not_fit_is_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        make(kind, **options)


def test_positions_and_other_caches_are_refused():
    layer = make(TitansMAG)
    with pytest.raises(ValueError, match="takes no positions"):
        layer(tokens(), positions=np.arange(T))
    with pytest.raises(ValueError, match="TitansMAG is causal"):
        layer.init_cache(FullCache(T, causal=False), 2)
