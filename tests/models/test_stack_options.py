"""Norms after blocks, shared layers, LayerScale, tables of another width, and hooks in models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn import probes
from jattn.models import DecoderLM, Encoder, Swap, TransformerConfig, ViT

CONFIG = TransformerConfig(
    vocab_size=13, features=16, num_layers=2, num_heads=4, mlp_ratio=2.0, norm="layernorm", position="learned"
)
TOKENS = jax.random.randint(jax.random.key(0), (2, 7), 0, 13)


def encoder(attention="softmax_attention", **changes):
    return Encoder(dataclasses.replace(CONFIG, **changes), attention=attention, rngs=nnx.Rngs(0))


def test_norms_after_blocks():
    model = encoder(norm_placement="post", embedding_norm=True)
    out, aux = model.states(TOKENS, record=("embed", "attn_out", "mlp_out", "resid"))
    sites = aux["sites"]
    block = model.stack.blocks[0]
    middle = block.attention_norm(sites["embed"] + sites["attn_out"][0])
    np.testing.assert_allclose(block.mlp_norm(middle + sites["mlp_out"][0]), sites["resid"][0], atol=1e-5)
    np.testing.assert_allclose(sites["embed"].mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(sites["embed"].std(-1), 1, atol=1e-2)
    np.testing.assert_array_equal(out, sites["resid"][-1])
    assert model.stack.norm is None


def test_shared_layers_are_one_layer_applied_twice():
    shared = encoder(share_layers=True)
    count = sum(x.size for x in jax.tree.leaves(nnx.state(shared, nnx.Param)))
    assert count < sum(x.size for x in jax.tree.leaves(nnx.state(encoder(), nnx.Param)))
    apart = encoder()
    for part in ("attention_norm", "attention", "mlp_norm", "mlp"):
        for block in apart.stack.blocks:
            nnx.update(getattr(block, part), nnx.state(getattr(shared.stack.blocks[0], part)))
    nnx.update(apart.embed, nnx.state(shared.embed))
    nnx.update(apart.stack.learned, nnx.state(shared.stack.learned))
    np.testing.assert_array_equal(shared(TOKENS).logits, apart(TOKENS).logits)

    @nnx.jit
    def gradients(model):
        return nnx.grad(lambda m: m(TOKENS).logits.sum())(model)

    once, twice = gradients(shared), gradients(apart)
    mine = once["stack"]["blocks"][0]["mlp"]["up"]["kernel"].get_value()
    both = [twice["stack"]["blocks"][i]["mlp"]["up"]["kernel"].get_value() for i in range(2)]
    np.testing.assert_allclose(mine, both[0] + both[1], rtol=2e-4, atol=2e-5)


def test_shared_layers_keep_their_own_attention_function():
    swapped = encoder(Swap("linear_attention", layers=[1]), share_layers=True)
    plain = encoder(share_layers=True)
    found, was = (m(TOKENS, record=("resid",)).aux["sites"]["resid"] for m in (swapped, plain))
    np.testing.assert_array_equal(found[0], was[0])
    assert not np.allclose(found[1], was[1])
    with pytest.raises(ValueError, match="must have the same ones"):
        encoder(Swap("moh_attention", {"num_shared": 1, "num_active": 1}, layers=[1]), share_layers=True)


def test_layer_scale_multiplies_what_is_added():
    nothing = encoder(layer_scale=0.0)
    out, aux = nothing.states(TOKENS, record=("embed", "resid"))
    np.testing.assert_array_equal(aux["sites"]["resid"][-1], aux["sites"]["embed"])
    np.testing.assert_array_equal(encoder(layer_scale=1.0)(TOKENS).logits, encoder()(TOKENS).logits)


def test_tables_of_another_width_are_projected():
    model = encoder(embedding_features=6)
    assert model.embed.embedding.shape == (13, 6)
    assert model.states(TOKENS)[0].shape == (2, 7, 16)
    with pytest.raises(ValueError, match="embedding_features"):
        encoder(embedding_features=0)


def test_biases_and_exact_gelu():
    model = encoder(use_bias=True, mlp="gelu_erf")
    assert model.stack.blocks[0].attention.query.bias is not None
    mlp = model.stack.blocks[0].mlp
    x = jax.random.normal(jax.random.key(1), (1, 3, 16))
    hidden = np.asarray(mlp.up(x), np.float64)
    erf = np.vectorize(__import__("math").erf)
    want = mlp.down(jnp.asarray(0.5 * hidden * (1 + erf(hidden / np.sqrt(2))), jnp.float32))
    np.testing.assert_allclose(mlp(x), want, atol=1e-6)


@pytest.mark.parametrize(
    ("attention", "named"),
    [
        ("DeltaRule", "no biases in DeltaRule"),
        ([Swap("Rwkv7", layers=[1]), Swap("Ssd", layers=[0])], "no biases in Rwkv7, Ssd"),
    ],
    ids=["all layers", "swaps"],
)
def test_biases_of_layers_without_any_are_refused_before_anything_is_built(attention, named):
    config = TransformerConfig(vocab_size=13, features=16, num_layers=2, num_heads=4, use_bias=True)
    with pytest.raises(ValueError, match=named):
        DecoderLM(config, attention=attention, rngs=None)
    # A swap that later ones replace everywhere is not built.
    others = [Swap("DeltaRule"), Swap("linear_attention")]
    model = DecoderLM(config, attention=others, rngs=nnx.Rngs(0))
    assert model.stack.blocks[1].attention.query.bias is not None


def test_a_vision_transformer_without_a_head_gives_features():
    config = dataclasses.replace(CONFIG, vocab_size=1)
    sizes = {"image_size": 8, "patch_size": 4, "num_channels": 1}
    model = ViT(config, **sizes, num_classes=None, pooling="class", rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    states, _ = model.states(images)
    assert states.shape == (2, 5, 16)
    np.testing.assert_array_equal(model(images).logits, states[:, 0])


# Hooks


def test_hooks_see_every_layer():
    model = DecoderLM(dataclasses.replace(CONFIG, num_kv_heads=2), rngs=nnx.Rngs(0))
    seen = probes.capture(model, TOKENS, observe=("row_weights", "lse", "entropy", "col_mass"))
    assert {name: value.shape for name, value in seen.items()} == {
        "weights": (2, 2, 4, 7, 7),
        "lse": (2, 2, 7, 4),
        "entropy": (2, 2, 7, 4),
        "col_mass": (2, 2, 7, 2),
        "head_out": (2, 2, 7, 4, 4),
        "resid": (2, 2, 7, 16),
        "output": (2, 7, 13),
    }
    np.testing.assert_allclose(seen["weights"].sum(-1), 1, atol=1e-5)
    np.testing.assert_array_equal(np.triu(seen["weights"][0, 0, 0], 1), 0)
    np.testing.assert_array_equal(seen["output"], model(TOKENS).logits)
    last = probes.capture(model, TOKENS, rows=[-1], heads=(1,), sites=())["weights"]
    np.testing.assert_allclose(last[:, :, 0, 0], seen["weights"][:, :, 1, -1], atol=1e-6)
    with pytest.raises(ValueError, match="group_mass"):
        probes.capture(model, TOKENS, observe=("group_mass",))


def test_a_hook_of_nothing_traces_to_the_program_without_it():
    model = DecoderLM(CONFIG, rngs=nnx.Rngs(0))
    empty = probes.for_layers(probes.AttnHook(), 2)
    plain, hooked = (str(jax.make_jaxpr(lambda t, h=h: model(t, hook=h).logits)(TOKENS)) for h in (None, empty))
    assert plain == hooked


def test_a_hook_may_differ_by_layer():
    model = DecoderLM(CONFIG, rngs=nnx.Rngs(0))
    bias = jnp.zeros((2, 1, 1, 7, 7)).at[1, ..., 0].set(3.0)
    hook = probes.AttnHook(bias=bias)
    found, was = (model(TOKENS, record=("resid",), hook=h).aux["sites"]["resid"] for h in (hook, None))
    np.testing.assert_allclose(found[0], was[0], atol=1e-6)
    assert not np.allclose(found[1], was[1])
    with pytest.raises(ValueError, match="leading axis of 2 layers"):
        model(TOKENS, hook=probes.AttnHook(bias=bias[0]))


def test_decoding_shows_the_same_weights():
    model = DecoderLM(CONFIG, rngs=nnx.Rngs(0))
    whole = probes.capture(model, TOKENS, rows=[-1], sites=())["weights"]
    from jattn.cache import FullCache

    cache = model(TOKENS[:, :6], cache=model.init_cache(FullCache(9), 2)).cache
    step = probes.capture(model, TOKENS[:, 6:], rows=[-1], sites=(), cache=cache)["weights"]
    np.testing.assert_allclose(step[..., :7], whole, atol=1e-5)
    np.testing.assert_array_equal(step[..., 7:], 0)


def test_layers_that_cannot_run_hooks_say_so():
    config = dataclasses.replace(CONFIG, position="none")
    options = {"grid": (2, 2), "num_agents": 4}
    model = Encoder(config, attention="AgentAttention", attention_options=options, rngs=nnx.Rngs(0))
    with pytest.raises((ValueError, TypeError), match="hook"):
        model(TOKENS[:, :4], hook=probes.for_layers(probes.AttnHook(observe={"lse"}), 2))
