"""Mechanisms for some layers and heads of a model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jattn
from jattn import probes
from jattn.models import DecoderLM, Swap, TransformerConfig, generate, resolve
from jattn.models.resolve import resolve_function
from jattn.models.swap import HeadMix

CONFIG = TransformerConfig(vocab_size=13, features=16, num_layers=3, num_heads=4, num_kv_heads=2, mlp_ratio=1.0)
TOKENS = jax.random.randint(jax.random.key(0), (2, 9), 0, 13)


def decoder(attention="softmax_attention"):
    return DecoderLM(CONFIG, attention=attention, rngs=nnx.Rngs(0))


def logits(attention):
    return decoder(attention)(TOKENS).logits


def test_a_swap_of_all_layers_is_the_mechanism_by_name():
    by_name = DecoderLM(CONFIG, attention="linear_attention", rngs=nnx.Rngs(0))(TOKENS).logits
    np.testing.assert_array_equal(logits(Swap("linear_attention")), by_name)
    np.testing.assert_array_equal(logits(Swap("softmax_attention", layers=[])), logits("softmax_attention"))


def test_only_the_layers_that_are_named_change():
    model, plain = decoder(Swap("linear_attention", layers=[1])), decoder()
    changed, was = (m(TOKENS, record=("resid",)).aux["sites"]["resid"] for m in (model, plain))
    np.testing.assert_array_equal(changed[0], was[0])
    assert not np.allclose(changed[1], was[1])
    np.testing.assert_array_equal(logits(Swap("linear_attention", layers=[-2])), model(TOKENS).logits)


def test_only_the_heads_that_are_named_change():
    model, plain = decoder(Swap("linear_attention", layers=[0], heads=[1, 2])), decoder()
    whole = decoder(Swap("linear_attention", layers=[0]))
    found, was, other = (m(TOKENS, record=("head_out",)).aux["sites"]["head_out"][0] for m in (model, plain, whole))
    np.testing.assert_allclose(found[:, :, [0, 3]], was[:, :, [0, 3]], atol=1e-6)
    np.testing.assert_allclose(found[:, :, [1, 2]], other[:, :, [1, 2]], atol=1e-6)
    everywhere = Swap("linear_attention", heads=range(4))
    np.testing.assert_allclose(logits(everywhere), logits("linear_attention"), atol=1e-5)


def test_models_with_swaps_are_compiled_as_others_are():
    swaps = [Swap("window_cache", {"window": 3}, layers=[0]), Swap("pointwise_attention", heads=[1], layers=[1])]
    model = decoder(swaps)
    np.testing.assert_allclose(nnx.jit(lambda m: m(TOKENS).logits)(model), model(TOKENS).logits, atol=2e-5)
    found = generate(model, TOKENS[:, :4], max_new_tokens=3, temperature=0)
    assert found.tokens.shape == (2, 3)
    assert hash(Swap("a", {"b": [1]}, layers=[1])) == hash(Swap("a", {"b": [1]}, layers=(1,)))


def test_later_swaps_win():
    both = [
        Swap("linear_attention"),
        Swap("window_cache", {"window": 3}, layers=[2]),
        Swap("softmax_attention", layers=[0]),
    ]
    apart = [Swap("linear_attention", layers=[1]), Swap("window_cache", {"window": 3}, layers=[2])]
    np.testing.assert_array_equal(logits(both), logits(apart))


@pytest.mark.parametrize(
    ("name", "options", "mask"),
    [
        ("window_cache", {"window": 3}, jattn.masks.sliding_window(3)),
        (
            "sink_window_cache",
            {"window": 3, "num_sinks": 2, "positions": "original"},
            jattn.masks.sliding_window(3, num_sinks=2),
        ),
        ("full_cache", {"max_tokens": 9}, jattn.masks.causal()),
        ("gna_mask", {"grid": None, "window": 3, "is_causal": True}, jattn.masks.sliding_window(3)),
    ],
)
def test_masks_and_policies_stand_for_masked_softmax(name, options, mask):
    model = decoder()
    hook = probes.for_layers(probes.AttnHook(mask=mask), CONFIG.num_layers)
    np.testing.assert_allclose(logits(Swap(name, options)), model(TOKENS, hook=hook).logits, atol=1e-5)


def test_a_policy_swapped_in_is_what_decoding_with_it_sees():
    policy = jattn.get("window_cache")(window=3)
    model = decoder()
    cache, rows = model.init_cache(policy, 2), []
    for place in range(9):
        out = model(TOKENS[:, place : place + 1], cache=cache)
        cache = out.cache
        rows.append(out.logits)
    np.testing.assert_allclose(jnp.concatenate(rows, 1), logits(Swap("window_cache", {"window": 3})), atol=2e-5)


def test_masked_attention_joins_the_mask_of_a_call():
    function = resolve_function("window_cache", "causal self", window=3)
    x = jax.random.normal(jax.random.key(1), (1, 6, 2, 4))
    hidden = np.ones((6, 6), bool)
    hidden[:, 4] = False
    both = jattn.masks.sliding_window(3).to_dense(1, 1, 6, 6) & hidden
    want = jattn.dot_product_attention(x, x, x, mask=both)
    np.testing.assert_allclose(function(x, x, x, mask=hidden), want, atol=1e-6)
    np.testing.assert_allclose(function(x, x, x, mask=jattn.masks.dense(hidden[None, None])), want, atol=1e-6)


def test_mixed_heads_split_what_belongs_to_heads():
    functions = (jattn.dot_product_attention, jattn.get("linear_attention"))
    mix = HeadMix((functions[0], functions[1], functions[0], functions[0]))
    query = jax.random.normal(jax.random.key(1), (1, 6, 4, 8))
    key, value = jax.random.normal(jax.random.key(2), (2, 1, 6, 2, 8))
    out = mix(query, key, value, is_causal=True)
    plain = jattn.dot_product_attention(query, key, value, is_causal=True)
    np.testing.assert_allclose(out[:, :, [0, 2, 3]], plain[:, :, [0, 2, 3]], atol=1e-6)
    apart = functools.partial(jattn.dot_product_attention, scale=8**-0.5)
    softmax_only = HeadMix((functions[0], apart, functions[0], apart))
    mask = jax.random.bernoulli(jax.random.key(3), 0.7, (1, 4, 6, 6))
    want = jattn.dot_product_attention(query, key, value, mask=mask)
    np.testing.assert_allclose(softmax_only(query, key, value, mask=mask), want, atol=1e-6)


def test_errors_of_swaps():
    for swap, message in (
        (Swap("linear_attention", layers=[3]), "layer 3; the model has 3 layers"),
        (Swap("linear_attention", heads=[4]), "head 4; the model has 4 heads"),
        (Swap("moh_attention", heads=[0]), "is a layer"),
        ([Swap("moh_attention"), Swap("linear_attention", heads=[0])], "parameters of its own"),
        (Swap("window_cache", {"windoww": 3}), "Did you mean window"),
        (Swap("sink_window_cache", {"window": 3, "num_sinks": 2, "positions": "cache"}), "no mask can say"),
        (Swap("rope"), "cannot stand as the attention"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder(swap)
    with pytest.raises(ValueError, match="carries its own options"):
        DecoderLM(CONFIG, attention=Swap("linear_attention"), attention_options={"a": 1}, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="is a layer"):
        resolve_function("moh_attention")
    assert callable(resolve("window_cache", "causal self", window=2, qk_norm="rmsnorm"))
