"""The encoder-decoder: against its parts, through caches, and what hooks see of its cross attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn import probes
from jattn.cache import FullCache
from jattn.models import EncoderDecoder, TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=13, features=16, num_layers=2, num_heads=4, mlp_ratio=1.0, position="sinusoidal", use_bias=True
)
TOKENS = jax.random.randint(jax.random.key(0), (2, 6), 0, 13)
SOURCE = jax.random.randint(jax.random.key(1), (2, 9), 0, 13)


@pytest.fixture(scope="module")
def model():
    return EncoderDecoder(CONFIG, dataclasses.replace(CONFIG, num_layers=1), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def memory(model):
    return model.encode(SOURCE)[0]


def test_what_is_added_sums_up(model, memory):
    sites = model(TOKENS, memory, record=("embed", "attn_out", "cross_out", "mlp_out", "resid")).aux["sites"]
    assert sites["cross_out"].shape == (2, 2, 6, 16)
    first = sites["embed"] + sites["attn_out"][0] + sites["cross_out"][0] + sites["mlp_out"][0]
    np.testing.assert_allclose(first, sites["resid"][0], atol=1e-5)
    with pytest.raises(ValueError, match="unknown sites cross_out"):
        model.encode(SOURCE, record=("cross_out",))


def test_token_by_token_through_caches_equals_the_parallel_pass(model, memory):
    want = model(TOKENS, memory).logits
    cache, rows = model.init_cache(FullCache(8), memory), []
    for place in range(6):
        out = model(TOKENS[:, place : place + 1], cache=cache)
        cache = out.cache
        rows.append(out.logits)
    np.testing.assert_allclose(jnp.concatenate(rows, 1), want, atol=2e-5)


def test_padding_of_the_source_changes_nothing(model):
    ids = jnp.array([[0] * 7 + [-1] * 2] * 2)
    memory = model.encode(SOURCE, segment_ids=ids)[0]
    poisoned = memory.at[:, 7:].set(1e3)
    short = model(TOKENS, model.encode(SOURCE[:, :7])[0]).logits
    np.testing.assert_allclose(model(TOKENS, poisoned, memory_ids=ids).logits, short, atol=2e-5)
    cache = model.init_cache(FullCache(8), poisoned, memory_ids=ids)
    np.testing.assert_allclose(model(TOKENS, cache=cache).logits, short, atol=2e-5)


def test_no_token_sees_the_future_and_every_token_sees_the_source(model, memory):
    other = TOKENS.at[:, 4:].set((TOKENS[:, 4:] + 1) % 13)
    np.testing.assert_array_equal(model(TOKENS, memory).logits[:, :4], model(other, memory).logits[:, :4])
    moved = model(TOKENS, memory.at[:, -1].add(1.0)).logits
    assert (np.abs(moved - model(TOKENS, memory).logits).max(axis=(0, 2)) > 1e-4).all()


def test_hooks_see_both_attentions(model, memory):
    hook = probes.for_layers(probes.AttnHook(observe={"row_weights"}), 2)
    aux = model(TOKENS, memory, hook=hook, cross_hook=hook).aux
    assert aux["hook"]["row_weights"].shape == (2, 2, 4, 6, 6)
    assert aux["cross_hook"]["row_weights"].shape == (2, 2, 4, 6, 9)
    np.testing.assert_allclose(aux["cross_hook"]["row_weights"].sum(-1), 1, atol=1e-5)
    cached = model(TOKENS, cache=model.init_cache(FullCache(6), memory), cross_hook=hook).aux["cross_hook"]
    np.testing.assert_allclose(cached["row_weights"], aux["cross_hook"]["row_weights"], atol=1e-5)


def test_other_mechanisms_in_each_place():
    def build(**attention):
        return EncoderDecoder(dataclasses.replace(CONFIG, use_bias=False), **attention, rngs=nnx.Rngs(0))

    plain = build()
    want = plain(TOKENS, plain.encode(SOURCE)[0]).logits
    for place in ("attention", "encoder_attention", "cross_attention"):
        model = build(**{place: "linear_attention"})
        assert not np.allclose(model(TOKENS, model.encode(SOURCE)[0]).logits, want)
    with pytest.raises(ValueError, match="noncausal cross"):
        build(cross_attention="moba_attention")


def test_errors(model, memory):
    cache = model.init_cache(FullCache(6), memory)
    for arguments in ({}, {"memory": memory, "cache": cache}):
        with pytest.raises(ValueError, match="either memory"):
            model(TOKENS, **arguments)
    with pytest.raises(ValueError, match="positions"):
        model(TOKENS, cache=cache, positions=jnp.arange(6))
    with pytest.raises(ValueError, match="same width"):
        EncoderDecoder(CONFIG, dataclasses.replace(CONFIG, features=8), rngs=nnx.Rngs(0))
