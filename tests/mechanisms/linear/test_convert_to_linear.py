"""Models with softmax attention made linear: what stays, what learns, and from what."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jattn
from jattn import probes
from jattn.layers import MultiHeadAttention
from jattn.mechanisms.linear.attention_distill_loss import attention_distill_loss
from jattn.mechanisms.linear.convert_to_linear import attention_layers, convert_to_linear, distill_feature_maps
from jattn.mechanisms.linear.hedgehog_attention import HedgehogAttention
from jattn.models import DecoderLM, Encoder, EncoderDecoder, Swap, TransformerConfig, generate

CONFIG = TransformerConfig(vocab_size=13, features=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_ratio=1.0)
TOKENS = np.random.default_rng(0).integers(0, 13, (2, 9))


def decoder(config=CONFIG, **options):
    """A model whose attention is spiky, as that of trained ones is."""
    model = DecoderLM(config, rngs=nnx.Rngs(0), **options)
    for _, layer in attention_layers(model):
        layer.query.kernel[...] = 6 * layer.query.kernel[...]
    return model


@nnx.jit
def run(model, tokens):
    return model(tokens)


def flat(model):
    return {path: leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model))}


def test_weights_stay_and_the_given_model_too():
    model = decoder()
    before, student = flat(model), convert_to_linear(model)
    after = flat(student)
    assert all(type(layer) is MultiHeadAttention for _, layer in attention_layers(model))
    for path, array in before.items():
        np.testing.assert_array_equal(after[path], array)
    maps = {path for path in after if path not in before}
    assert {path[-2] for path in maps} == {"query_map", "key_map"}
    assert len(maps) == 4
    assert student.attention == "HedgehogAttention"


def test_it_is_the_model_of_that_name():
    student = convert_to_linear(decoder(), variant="exp", chunk_size=4)
    by_name = DecoderLM(
        CONFIG,
        attention="HedgehogAttention",
        attention_options={"variant": "exp", "chunk_size": 4},
        rngs=nnx.Rngs(1),
    )
    nnx.update(by_name, nnx.state(student))
    np.testing.assert_array_equal(run(by_name, TOKENS).logits, run(student, TOKENS).logits)


def test_distillation_learns_the_weights_of_the_given_model():
    model = decoder()
    seen = []
    batches = [TOKENS] * 30
    student = convert_to_linear(model)
    trained, losses = distill_feature_maps(
        student, batches, optax.adam(3e-2), report=lambda number, loss: seen.append((number, loss))
    )
    # The first loss, from what the given model computes, layer by layer.
    hook = probes.for_layers(probes.AttnHook(observe={"query", "key"}), CONFIG.num_layers)
    observed = model(TOKENS, hook=hook).aux["hook"]
    by_layer = [
        attention_distill_loss(query, key, layer.query_map(query), layer.key_map(key), is_causal=True)
        for query, key, (_, layer) in zip(observed["query"], observed["key"], attention_layers(student), strict=True)
    ]
    np.testing.assert_allclose(losses[0], np.mean(by_layer), rtol=1e-5)
    assert [number for number, _ in seen] == list(range(30))
    assert losses[-1] < losses[0] - 0.05
    # Nothing but the maps has changed, and the output has come nearer to that of the given model.
    old, new = flat(student), flat(trained)
    changed = {path for path in new if not np.array_equal(old[path], new[path])}
    assert changed == {path for path in new if "query_map" in path or "key_map" in path}
    wanted = run(model, TOKENS).logits
    distances = [float(jnp.abs(run(m, TOKENS).logits - wanted).mean()) for m in (student, trained)]
    assert distances[1] < distances[0]
    assert "losses" not in run(trained, TOKENS).aux


def test_while_learning_layers_give_out_what_softmax_gives():
    model = decoder()
    student = convert_to_linear(model)
    for _, layer in attention_layers(student):
        layer.is_distilling = True
    found, wanted = (run(m, TOKENS) for m in (student, model))
    np.testing.assert_array_equal(found.logits, wanted.logits)
    assert set(found.aux["losses"]) == {"distill_loss"}


def test_a_converted_model_decodes_on_its_state():
    student = convert_to_linear(decoder())
    made = generate(student, TOKENS[:, :4], max_new_tokens=3, temperature=0).tokens
    rows = TOKENS[:, :4]
    for _ in range(3):
        best = run(student, rows).logits[:, -1].argmax(-1)
        rows = np.concatenate([rows, best[:, None]], 1)
    np.testing.assert_array_equal(made, rows[:, 4:])


def test_encoders_and_encoder_decoders_learn():
    ids = np.array([[0] * 9, [0] * 6 + [-1] * 3])
    encoder = convert_to_linear(Encoder(CONFIG, num_classes=3, rngs=nnx.Rngs(0)))
    batch = {"tokens": TOKENS, "segment_ids": ids}
    _, losses = distill_feature_maps(encoder, [batch] * 3, optax.adam(1e-2))
    assert losses[2] < losses[0]
    both = EncoderDecoder(CONFIG, rngs=nnx.Rngs(0))
    student = convert_to_linear(both)
    assert [type(layer) for _, layer in attention_layers(student)] == [HedgehogAttention] * 6


def test_layers_that_share_weights_have_maps_of_their_own():
    student = convert_to_linear(decoder(dataclasses.replace(CONFIG, share_layers=True)))
    first, second = (layer for _, layer in attention_layers(student))
    assert first.query is second.query
    assert first.query_map is not second.query_map
    trained, _ = distill_feature_maps(student, [TOKENS] * 2, optax.adam(1e-2))
    first, second = (layer for _, layer in attention_layers(trained))
    assert first.query is second.query
    assert not np.allclose(first.query_map.weight[...], second.query_map.weight[...])


def test_some_layers_and_models_with_other_mechanisms():
    model = decoder(attention=Swap("linear_attention", layers=[1]))
    types = [type(layer) for _, layer in attention_layers(convert_to_linear(model))]
    assert types == [HedgehogAttention, MultiHeadAttention]
    last = convert_to_linear(decoder(), layers=[-1])
    assert [type(layer) for _, layer in attention_layers(last)] == [MultiHeadAttention, HedgehogAttention]
    single = MultiHeadAttention(8, 2, qk_norm="l2", use_bias=True, rngs=nnx.Rngs(0))
    single.qk_norm.gain[...] = 2.5
    alone = convert_to_linear(single)
    assert isinstance(alone, HedgehogAttention)
    assert (float(alone.qk_norm.gain[...]), alone.scale) == (2.5, 1.0)


def test_errors():
    rngs = nnx.Rngs(0)
    bound = functools.partial(jattn.get("softmax_attention"), logit_soft_cap=3.0)
    for model, message in (
        (MultiHeadAttention(8, 2, attention_fn=jattn.get("linear_attention"), rngs=rngs), "has no MultiHeadAttention"),
        (MultiHeadAttention(8, 2, attention_fn=bound, rngs=rngs), "logit_soft_cap"),
        (MultiHeadAttention(8, 2, use_sinks=True, rngs=rngs), "use_sinks"),
        (DecoderLM(TransformerConfig(position="alibi", features=8), rngs=rngs), r"stack.blocks.0.attention .*Alibi"),
        (DecoderLM(CONFIG, attention_options={"dropout_rate": 0.1}, rngs=rngs), "dropout_rate"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_to_linear(model)
    with pytest.raises(ValueError, match="layers names 2"):
        convert_to_linear(decoder(), layers=[2])
    with pytest.raises(ValueError, match="convert_to_linear makes them"):
        distill_feature_maps(decoder(), [TOKENS], optax.sgd(0.1))
    bare = convert_to_linear(nnx.Sequential(nnx.Linear(3, 8, rngs=rngs), MultiHeadAttention(8, 2, rngs=rngs)))
    with pytest.raises(ValueError, match="aux"):
        distill_feature_maps(bare, [np.zeros((1, 3, 3), np.float32)], optax.sgd(0.1))
