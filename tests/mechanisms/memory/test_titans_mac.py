"""Titans MAC: a plain loop over segments, both readings, documents in a row, decoding in parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.cache import FullCache, nbytes
from jattn.layers.rope import Rope
from jattn.mechanisms.memory.titans_mac import TitansMAC
from tests.grids import mostly_slow
from tests.mechanisms.memory.titans_truth import attention, gate, mixed, perturb

T, C, P = 11, 4, 3
IDS = np.array([[0, 0, 0, 1, 1, -1, 1, 1, 1, 1, 0], [-1, 3, -1, -1, 3, 3, 3, 3, 3, 7, 7]])


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-8, atol=1e-10)


def make(**options):
    given = {"num_kv_heads": 1, "segment": C, "num_persistent": P, "chunk_size": 2, **options}
    return perturb(TitansMAC(8, 2, **given, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))


def tokens(seed=0, length=T):
    return np.random.default_rng(seed).normal(size=(2, length, 8))


run = nnx.jit(lambda layer, x, ids=None: layer(x, segment_ids=ids).output)


def after(memory, y):
    """W after y has been written."""
    if not y.shape[1]:
        return memory.start(len(y), y.dtype)[0].weights
    return memory.mix(jnp.asarray(y), segment_ids=None, positions=jnp.arange(y.shape[1])[None], state=None)[1].state


def plain(layer, x, zeroed=False):
    """Segment by segment; the memory is run from the start of the row for each."""
    size, memory, y = layer.segment, layer.memory, np.zeros((len(x), 0, 8))
    asked, _ = memory.queries(jnp.asarray(x))
    lead = np.broadcast_to(layer.persistent[...], (len(x), P, 8))
    for start in range(0, x.shape[1], size):
        s = x[:, start : start + size]
        length = s.shape[1]
        h = memory.output(memory.read(asked[:, start : start + size], after(memory, y)), jnp.asarray(s))
        triangle = np.tri(length, dtype=bool)
        of_answers = triangle if layer.causal else np.ones_like(triangle)
        visible = np.concatenate([np.ones((length, P), bool), of_answers, triangle], 1)
        places = np.concatenate([np.arange(P), P + np.arange(length), P + size + np.arange(length)])
        z = np.concatenate([lead, 0 * h if zeroed else h, s], 1)
        y = np.concatenate([y, mixed(layer, attention(layer, s, z, visible, places[-length:], places))], 1)
    if layer.causal:
        m = memory(y).output
    else:
        asked, _ = memory.queries(jnp.asarray(y))
        ends = np.minimum(np.arange(0, x.shape[1], size) + size, x.shape[1])
        read = [memory.read(asked[:, max(0, n - 1) // size * size : n], after(memory, y[:, :n])) for n in ends]
        m = memory.output(jnp.concatenate(read, 1), jnp.asarray(y))
    return gate(layer, y, 0 * m if zeroed else m)


OPTIONS = {
    "deep": {},
    "linear and rotary": {"position": Rope(), "memory_options": {"linear": True}},
    "chunk": {"memory_options": {"update": "chunk"}},
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", mostly_slow(OPTIONS, ["linear and rotary"]))
def test_it_is_the_loop_over_segments(causal, name):
    layer, x = make(causal=causal, **OPTIONS[name]), tokens()
    close(run(layer, x), plain(layer, x))


def test_a_row_shorter_than_a_segment():
    layer, x = make(position=Rope()), tokens(length=3)
    close(run(layer, x), plain(layer, x))


def test_segments_of_one_token_make_both_readings_one():
    options = {"segment": 1, "chunk_size": 1}
    x = tokens()
    close(run(make(causal=False, **options), x), run(make(**options), x))


def test_what_a_token_changes():
    x = tokens(1)
    changed = x.copy()
    changed[:, 5] += 1
    for causal in (True, False):
        layer = make(causal=causal)
        difference = np.abs(run(layer, x) - run(layer, changed)).max((0, 2))
        unchanged = 5 if causal else 4
        assert not difference[:unchanged].any()
        assert (difference[unchanged:] > 1e-9).all()


def test_without_the_memory_it_is_attention_in_segments_with_a_prefix():
    layer, x = make(), tokens(2)
    layer.memory.out.kernel[...] = 0 * layer.memory.out.kernel[...]
    out = run(layer, x)
    close(out, plain(layer, x, zeroed=True))
    changed = x.copy()
    changed[:, 0] += 1
    np.testing.assert_array_equal(run(layer, changed)[:, C:], out[:, C:])


@pytest.mark.slow
@pytest.mark.parametrize("update", ["token", "chunk"])
def test_documents_are_alone_and_parts_are_the_whole(update):
    layer, x = make(position=Rope(), memory_options={"update": update}), tokens(3)
    out = run(layer, x, IDS)
    assert not out[IDS < 0].any()
    for one in (IDS == 1, IDS == 3, (IDS == 0) & (np.arange(T) < 5), IDS == 7):
        close(out[one], run(layer, np.where(one[..., None], x, np.nan), np.where(one, 0, -1))[one])
    whole, policy = run(layer, x), FullCache(T)
    close(run(layer, x, np.zeros((2, T), int)), whole)
    cache = first = layer.init_cache(policy, 2, jnp.float64)
    step = nnx.jit(lambda layer, x, cache, ids=None: layer(x, cache=(policy, cache), segment_ids=ids)[:2])
    close(step(layer, x, cache)[0], whole)
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


def test_the_literal_reading_cannot_be_packed_or_decoded():
    layer = make(causal=False)
    with pytest.raises(ValueError, match="takes neither segment_ids nor a cache"):
        layer(tokens(), segment_ids=IDS)
    with pytest.raises(ValueError, match="takes neither segment_ids nor a cache"):
        layer.init_cache(FullCache(T), 2)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="segment must be a positive multiple of chunk_size = 2"):
        make(segment=5)
