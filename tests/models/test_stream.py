"""Streams of tokens give what `generate` gives, whatever the pieces."""

import jax
import numpy as np
import pytest
from flax import nnx

from jattn.cache import SinkWindowCache, WindowCache
from jattn.models import DecoderLM, Stream, TransformerConfig, generate

CONFIG = TransformerConfig(vocab_size=13, features=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_ratio=1.0)
PROMPT = np.array([3, 1, 4, 1, 5, 9, 2])


@pytest.fixture(scope="module")
def model():
    return DecoderLM(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def greedy(model):
    return np.asarray(generate(model, PROMPT[None], max_new_tokens=6, temperature=0).tokens)[0].tolist()


@pytest.mark.parametrize("chunk", [3, 7, 16])
def test_greedy_tokens_are_those_of_generate(model, greedy, chunk):
    stream = Stream(model, 32, temperature=0, chunk=chunk)
    stream.read(PROMPT)
    assert list(stream.tokens(6)) == greedy
    assert stream.position == len(PROMPT) + 6


def test_a_conversation_goes_on_where_it_stopped(model, greedy):
    stream = Stream(model, 32, temperature=0, chunk=4)
    stream.read(PROMPT)
    assert list(stream.tokens(2)) == greedy[:2]
    stream.read([7, 8])
    row = [*PROMPT, *greedy[:2], 7, 8]
    want = np.asarray(generate(model, np.array([row]), max_new_tokens=3, temperature=0).tokens)[0].tolist()
    assert list(stream.tokens(3)) == want


def test_a_stop_token_is_read_and_not_given(model, greedy):
    stream = Stream(model, 32, temperature=0)
    stream.read(PROMPT)
    stop = greedy[3]
    place = greedy.index(stop)
    assert list(stream.tokens(6, stop_token=stop)) == greedy[:place]
    assert stream.position == len(PROMPT) + place + 1


@pytest.mark.parametrize("policy", [WindowCache(5, chunk=2), SinkWindowCache(3, num_sinks=2, chunk=2)])
def test_policies_that_forget_have_room_for_ever(model, policy):
    stream = Stream(model, policy, temperature=0, chunk=4)
    stream.read(PROMPT)
    found = generate(model, PROMPT[None], max_new_tokens=6, temperature=0, policy=policy).tokens
    assert list(stream.tokens(6)) == np.asarray(found)[0].tolist()
    assert stream.room is None


def test_sampling_depends_on_the_key_alone(model):
    def draw(seed):
        stream = Stream(model, 32, rng=jax.random.key(seed), top_k=5)
        stream.read(PROMPT)
        return list(stream.tokens(8))

    assert draw(0) == draw(0) != draw(1)


def test_errors(model):
    stream = Stream(model, 8, temperature=0)
    with pytest.raises(ValueError, match="read a prompt first"):
        next(stream.tokens(1))
    with pytest.raises(ValueError, match="do not fit into the cache of 8"):
        stream.read(np.arange(9))
    stream.read(PROMPT)
    with pytest.raises(ValueError, match="do not fit"):
        list(stream.tokens(3))
    for arguments, message in (
        ({"temperature": -1}, "temperature"),
        ({}, "rng"),
        ({"chunk": 0, "temperature": 0}, "chunk"),
    ):
        with pytest.raises(ValueError, match=message):
            Stream(model, 8, **arguments)
