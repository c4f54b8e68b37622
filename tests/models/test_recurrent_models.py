"""Models whose attention is a recurrence: what is kept while decoding does not grow, and changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.cache import FullCache, RecurrentState, WindowCache, nbytes
from jattn.models import DecoderLM, Encoder, Swap, TransformerConfig, generate
from jattn.probes import AttnHook

CONFIG = TransformerConfig(vocab_size=17, features=16, num_layers=2, num_heads=4, num_kv_heads=2)


def model_of(attention, config=CONFIG, **options):
    return DecoderLM(config, attention=attention, attention_options=options, rngs=nnx.Rngs(0))


def stepwise(model, tokens, cache):
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state, tokens, cache):
        def step(cache, token):
            out = nnx.merge(graphdef, state)(token[:, None], cache=cache)
            return out.cache, out.logits[:, 0]

        return jax.lax.scan(step, cache, tokens.T)

    cache, logits = run(state, tokens, cache)
    return cache, logits.swapaxes(0, 1)


@pytest.mark.parametrize("attention", ["linear_attention", "GatedLinearAttention"])
def test_token_by_token_is_the_parallel_pass(attention):
    model, tokens = model_of(attention), jnp.asarray(np.random.default_rng(0).integers(0, 17, (2, 9)))
    cache = model.init_cache(FullCache(9), 2)
    assert all(isinstance(layer, RecurrentState) for layer in cache.layers)
    after, logits = stepwise(model, tokens, cache)
    np.testing.assert_allclose(logits, jax.jit(lambda t: model(t).logits)(tokens), rtol=2e-4, atol=2e-5)
    assert after.layers[1].next.tolist() == [9, 9]
    assert nbytes(after) == nbytes(model.init_cache(FullCache(900), 2))


def test_padding_in_a_prompt_is_not_read():
    model = model_of("GatedLinearAttention")
    tokens = jnp.asarray([[3, 5, 7, 1]])
    padded = jnp.asarray([[3, 0, 5, 7, 0, 1]])

    @jax.jit
    def run(tokens, ids=None):
        out = model(tokens, cache=model.init_cache(FullCache(9), 1), segment_ids=ids)
        return out.logits, out.cache

    whole, cache = run(tokens)
    found, padded_cache = run(padded, jnp.asarray([[0, -1, 0, 0, -1, 0]]))
    np.testing.assert_allclose(found[:, [0, 2, 3, 5]], whole, rtol=2e-4, atol=2e-5)
    for x, y in zip(jax.tree.leaves(padded_cache), jax.tree.leaves(cache), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5)


def test_recurrences_and_attention_in_one_model_generate():
    model = model_of([Swap("GatedLinearAttention", layers=[0])])
    cache = model.init_cache(FullCache(16), 1)
    assert isinstance(cache.layers[0], RecurrentState)
    assert not isinstance(cache.layers[1], RecurrentState)
    prompt = jnp.asarray([[1, 2, 3]])
    found = generate(model, prompt, max_new_tokens=4, temperature=0.0)
    expected = prompt
    following = jax.jit(lambda tokens: model(tokens).logits[:, -1:].argmax(-1))
    for _ in range(4):
        expected = jnp.concatenate([expected, following(expected)], 1)
    assert found.tokens.tolist() == expected[:, 3:].tolist()


def test_a_policy_that_forgets_keeps_keys():
    model = model_of("linear_attention")
    assert not isinstance(model.init_cache(WindowCache(4), 1).layers[0], RecurrentState)


def test_what_a_recurrence_cannot_do_is_refused():
    model = model_of("GatedLinearAttention")
    with pytest.raises(ValueError, match="no attention weights"):
        model(jnp.zeros((1, 3), int), hook=AttnHook(observe={"entropy"}))
    with pytest.raises(ValueError, match="no logits"):
        model_of("GatedLinearAttention", TransformerConfig(vocab_size=5, features=8, num_heads=2, position="alibi"))
    with pytest.raises(ValueError, match="does not support 'noncausal self'"):
        Encoder(CONFIG, attention="GatedLinearAttention", rngs=nnx.Rngs(0))


RWKV = TransformerConfig(vocab_size=17, features=8, num_layers=3, num_heads=2, position="none", mlp_ratio=2.0)
RANKS = {f"{name}_rank": 2 for name in ("decay", "rate", "gate", "value")} | {"chunk_size": 4}


def rwkv(attention="Rwkv7", config=RWKV, **options):
    """A model whose parameters are all random: half of those of RWKV-7 start at 0 or at a constant."""
    graph, state = nnx.split(model_of(attention, config, **options))
    r = np.random.default_rng(3)
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(0.5 * r.normal(size=x.shape), x.dtype), state))


def by_hand(model, tokens, values=None, **call):
    """The model layer by layer; `values` stands for those of the first layer."""
    x = model.embed(tokens)
    for number, block in enumerate(model.stack.blocks):
        done = block.attention(block.attention_norm(x), **({"v_first": values} if number else {}), **call)
        values = done.aux["v_first"] if number == 0 and values is None else values
        x = x + done.output
        x = x + block.mlp(block.mlp_norm(x))
    return model.embed.attend(model.stack.norm(x))


@pytest.mark.slow
def test_later_layers_are_handed_the_values_of_the_first():
    model, tokens = rwkv(**RANKS), jnp.asarray(np.random.default_rng(1).integers(0, 17, (2, 9)))
    layers = [block.attention for block in model.stack.blocks]
    assert [layer.residual is None for layer in layers] == [True, False, False]
    ids = jnp.asarray([[0, 0, 0, -1, 1, 1, 1, 1, -1], [2] * 9])
    for call in ({}, {"segment_ids": ids}):
        found = nnx.jit(lambda model, call: model(tokens, **call))(model, call)
        expected = nnx.jit(lambda model, call: by_hand(model, tokens, **call))(model, call)
        np.testing.assert_allclose(found.logits, expected, rtol=1e-4, atol=1e-5)
        assert found.aux == {}
    _, logits = stepwise(model, tokens, model.init_cache(FullCache(9), 2))
    whole = nnx.jit(lambda model: by_hand(model, tokens))(model)
    np.testing.assert_allclose(logits, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_gradients_reach_the_first_layer_through_the_values_handed_on():
    model, tokens = rwkv(**RANKS), jnp.asarray(np.random.default_rng(1).integers(0, 17, (2, 5)))

    def slopes(model, function):
        return nnx.grad(lambda model: jnp.sum(jnp.sin(function(model))))(model)

    def cut_off(model):
        first = model.stack.blocks[0].attention(model.stack.blocks[0].attention_norm(model.embed(tokens)))
        return by_hand(model, tokens, jax.lax.stop_gradient(first.aux["v_first"]))

    jitted = nnx.jit(slopes, static_argnums=1)
    functions = (lambda model: model(tokens).logits, lambda model: by_hand(model, tokens), cut_off)
    found, expected, without = (
        jitted(model, function)["stack"]["blocks"][0]["attention"]["value"]["kernel"].get_value()
        for function in functions
    )
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert np.abs(found - without).max() > 1e-2 * np.abs(expected).max()


def test_layers_are_numbered_among_those_of_their_kind():
    mixed = rwkv([Swap("Rwkv7", RANKS, layers=[1]), Swap("Rwkv7", {**RANKS, "gate_rank": 3}, layers=[2])])
    first, second = (mixed.stack.blocks[layer].attention for layer in (1, 2))
    assert (first.residual, first.hands_on, second.beside) == (None, ("v_first",), ("v_first",))
    tokens = jnp.asarray([[1, 2, 3]])
    assert np.isfinite(nnx.jit(lambda model: model(tokens).logits)(mixed)).all()
    alone = rwkv(Swap("Rwkv7", RANKS, layers=[1]))
    assert alone.stack.blocks[1].attention.hands_on == ()
    shared = model_of("Rwkv7", dataclasses.replace(RWKV, share_layers=True), **RANKS)
    assert [block.attention.residual for block in shared.stack.blocks] == [None] * 3
    assert shared(tokens).logits.shape == (1, 3, 17)
    with pytest.raises(ValueError, match="no option 'num_layers'"):
        model_of("Rwkv7", RWKV, num_layers=2)
