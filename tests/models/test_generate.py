import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.cache import FullCache, SinkWindowCache, WindowCache
from jattn.models import DecoderLM, TransformerConfig, filter_logits, generate, sample

CONFIG = TransformerConfig(vocab_size=13, features=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_ratio=2.0)


def make(**changes):
    model = DecoderLM(dataclasses.replace(CONFIG, tie_embeddings=False, **changes), rngs=nnx.Rngs(0))
    # An embedding of unit size and an untied head: continuations depend on the context and do not repeat one token.
    model.embed.embedding.set_value(model.embed.embedding.get_value() * 50.0)
    return model


MODEL = make()
PROMPT = jax.random.randint(jax.random.key(1), (3, 5), 1, 13)


logits_of = nnx.jit(lambda model, tokens: model(tokens).logits)


def greedy_by_hand(model, row, count):
    row = list(np.asarray(row))
    new = []
    for _ in range(count):
        new.append(int(jnp.argmax(logits_of(model, jnp.array([row + new]))[0, -1])))
    return new


def test_greedy_equals_the_parallel_model():
    got = generate(MODEL, PROMPT, max_new_tokens=4, temperature=0)
    expected = [greedy_by_hand(MODEL, row, 4) for row in PROMPT]
    np.testing.assert_array_equal(got.tokens, expected)
    np.testing.assert_array_equal(got.lengths, [4, 4, 4])
    assert all(len(set(row)) > 1 for row in expected)


@pytest.mark.parametrize(
    "policy", [None, FullCache(20), WindowCache(9, chunk=2), SinkWindowCache(7, num_sinks=2, chunk=3)]
)
def test_policies_that_hold_everything_agree(policy):
    got = generate(MODEL, PROMPT, max_new_tokens=4, temperature=0, policy=policy)
    np.testing.assert_array_equal(got.tokens, generate(MODEL, PROMPT, max_new_tokens=4, temperature=0).tokens)


@pytest.mark.parametrize("policy", ["full", None, WindowCache(9, chunk=2)])
def test_ragged_prompts_padded_on_either_side(policy):
    valid = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    got = generate(MODEL, PROMPT, valid=valid, max_new_tokens=4, temperature=0, policy=policy)
    expected = [greedy_by_hand(MODEL, row[keep], 4) for row, keep in zip(np.asarray(PROMPT), valid, strict=True)]
    np.testing.assert_array_equal(got.tokens, expected)


def test_stop_token_ends_a_row():
    free = np.asarray(generate(MODEL, PROMPT, max_new_tokens=6, temperature=0).tokens)
    stop = int(free[0, 2])
    got = generate(MODEL, PROMPT, max_new_tokens=6, temperature=0, stop_token=stop, pad_token=-7)
    for row, (tokens, length) in enumerate(zip(np.asarray(got.tokens), np.asarray(got.lengths), strict=True)):
        hits = np.flatnonzero(free[row] == stop)
        end = hits[0] + 1 if len(hits) else 6
        assert length == end
        np.testing.assert_array_equal(tokens[:end], free[row, :end])
        assert (tokens[end:] == -7).all()


def test_sampling_is_a_function_of_the_key():
    call = {"max_new_tokens": 8, "temperature": 2.0, "top_k": 10, "top_p": 0.95}
    one, same, other = (generate(MODEL, PROMPT, rng=jax.random.key(s), **call).tokens for s in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    recomputed = generate(MODEL, PROMPT, rng=jax.random.key(0), policy=None, **call).tokens
    np.testing.assert_array_equal(one, recomputed)


def test_top_k_one_is_greedy():
    got = generate(MODEL, PROMPT, max_new_tokens=4, rng=jax.random.key(0), top_k=1)
    np.testing.assert_array_equal(got.tokens, generate(MODEL, PROMPT, max_new_tokens=4, temperature=0).tokens)


def filter_by_hand(logits, top_k, top_p):
    order = sorted(range(len(logits)), key=lambda n: (-logits[n], n))
    kept = order[: top_k or len(logits)]
    if top_p is not None:
        shares = np.exp(logits[kept] - logits[kept].max())
        shares /= shares.sum()
        reached, number = 0.0, 0
        while number < len(kept) and (number == 0 or reached < top_p):
            reached += shares[number]
            number += 1
        kept = kept[:number]
    out = np.full(len(logits), -np.inf)
    out[kept] = logits[kept]
    return out


@pytest.mark.parametrize("top_k", [None, 1, 3, 50])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.5, 0.9, 1.0])
def test_filters_against_plain_numpy(top_k, top_p):
    rng = np.random.default_rng(0)
    logits = np.round(rng.normal(size=(6, 11)) * 2, 1).astype(np.float32)  # Rounded: there are ties.
    logits[0] = 0.0
    got = np.asarray(filter_logits(logits, top_k=top_k, top_p=top_p))
    for row in range(6):
        np.testing.assert_array_equal(got[row], filter_by_hand(logits[row], top_k, top_p).astype(np.float32))


def test_sampled_frequencies():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    draws = sample(jax.random.key(0), jnp.broadcast_to(logits, (20000, 4)), temperature=1.0, top_p=0.9)
    shares = np.bincount(np.asarray(draws), minlength=4) / 20000
    np.testing.assert_allclose(shares, np.array([0.5, 0.3, 0.15, 0.0]) / 0.95, atol=0.015)
    hot = sample(jax.random.key(0), jnp.broadcast_to(logits, (20000, 4)), temperature=0.5)
    squares = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(np.bincount(np.asarray(hot), minlength=4) / 20000, squares / squares.sum(), atol=0.015)


def test_generate_under_an_outer_jit():
    graphdef, state = nnx.split(MODEL)

    @jax.jit
    def run(state, prompt):
        return generate(nnx.merge(graphdef, state), prompt, max_new_tokens=3, temperature=0).tokens

    np.testing.assert_array_equal(run(state, PROMPT), generate(MODEL, PROMPT, max_new_tokens=3, temperature=0).tokens)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"prompt": np.zeros((2, 3))}, "prompt"),
        ({"prompt": np.zeros(3, np.int32)}, "prompt"),
        ({"valid": np.ones((3, 4), bool)}, "valid"),
        ({"valid": np.zeros((3, 5), bool)}, "valid"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 1.0}, "rng"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"policy": "window"}, "policy"),
    ],
)
def test_bad_arguments_are_named(change, name):
    with pytest.raises(ValueError, match=name):
        generate(MODEL, **{"prompt": PROMPT, "max_new_tokens": 2, "temperature": 0, **change})
