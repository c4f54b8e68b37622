import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn import catalog
from jattn.cache import FullCache, SinkWindowCache, WindowCache, reorder
from jattn.layers import named_shardings
from jattn.mechanisms.entry import Entry
from jattn.models import DecoderLM, Encoder, TransformerConfig, ViT, resolve
from jattn.models.sites import SITES
from jattn.models.vit import patchify

CONFIG = TransformerConfig(
    vocab_size=13, features=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_ratio=2.0, max_length=16
)
TOKENS = jax.random.randint(jax.random.key(0), (2, 9), 0, 13)


def decoder(seed=0, attention="softmax_attention", options=None, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return DecoderLM(config, attention=attention, attention_options=options or {}, rngs=nnx.Rngs(seed))


def stepwise(model, tokens, policy, chunks):
    @jax.jit
    def step(cache, part):
        out = model(part, cache=cache)
        return out.cache, out.logits

    cache, rows, start = model.init_cache(policy, tokens.shape[0]), [], 0
    for size in chunks:
        cache, logits = step(cache, tokens[:, start : start + size])
        rows.append(logits)
        start += size
    return jnp.concatenate(rows, 1)


@pytest.mark.parametrize("position", ["rope", "alibi", "t5", "learned", "sinusoidal", "none"])
def test_parallel_equals_token_by_token(position):
    model = decoder(position=position)
    parallel = jax.jit(lambda t: model(t).logits)(TOKENS)
    assert parallel.shape == (2, 9, 13)
    np.testing.assert_allclose(stepwise(model, TOKENS, FullCache(9), (1,) * 9), parallel, atol=2e-5)
    np.testing.assert_allclose(stepwise(model, TOKENS, FullCache(9), (4, 5)), parallel, atol=2e-5)


def test_windows_that_hold_everything_change_nothing():
    model = decoder()
    parallel = model(TOKENS).logits
    for policy in (WindowCache(9), SinkWindowCache(7, num_sinks=2), (WindowCache(9), FullCache(9))):
        np.testing.assert_allclose(stepwise(model, TOKENS, policy, (1,) * 9), parallel, atol=2e-5)
    with pytest.raises(ValueError, match="policy"):
        model.init_cache((FullCache(9),), 2)


def test_decoding_rows_can_be_reordered():
    model = decoder()

    @jax.jit
    def swapped(tokens):
        out = model(tokens[:, :5], cache=model.init_cache(FullCache(9), 2))
        return model(tokens[::-1, 5:], cache=reorder(out.cache, np.array([1, 0]))).logits

    parallel = jax.jit(lambda tokens: model(tokens).logits)(TOKENS)
    np.testing.assert_allclose(swapped(TOKENS)[::-1], parallel[:, 5:], atol=2e-5)


def test_no_token_sees_the_future():
    model = decoder()
    other = TOKENS.at[:, 6:].set((TOKENS[:, 6:] + 1) % 13)
    run = jax.jit(lambda tokens: model(tokens).logits)
    np.testing.assert_array_equal(run(TOKENS)[:, :6], run(other)[:, :6])


def test_packed_documents_equal_separate_ones():
    model = decoder()
    ids = jnp.array([[0] * 4 + [1] * 5] * 2)
    positions = jnp.array([[*range(4), *range(5)]] * 2)
    run = jax.jit(lambda tokens, **given: model(tokens, **given).logits)
    packed = run(TOKENS, segment_ids=ids, positions=positions)
    np.testing.assert_allclose(packed[:, :4], run(TOKENS[:, :4]), atol=2e-5)
    np.testing.assert_allclose(packed[:, 4:], run(TOKENS[:, 4:]), atol=2e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"mlp": "swiglu", "norm": "layernorm", "use_bias": True},
        {"mlp": "none", "tie_embeddings": False},
        {"mlp": "relu", "head_dim": 6, "num_kv_heads": None},
        {"mlp_ratio": 0},
    ],
)
def test_options(changes):
    model = decoder(**changes)
    logits, gradient = nnx.jit(nnx.value_and_grad(lambda m: jnp.mean(m(TOKENS).logits ** 2)))(model)
    assert np.isfinite(logits)
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_dtype():
    logits = decoder(dtype=jnp.bfloat16)(TOKENS).logits
    assert logits.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(logits, np.float32), decoder()(TOKENS).logits, atol=0.05)


def test_dropout_needs_a_key_and_repeats_with_it():
    model = decoder(dropout=0.5, options={"dropout_rate": 0.2})
    one, same, other = (
        model(TOKENS, deterministic=False, rngs=rngs).logits
        for rngs in (jax.random.key(1), jax.random.key(1), nnx.Rngs(2))
    )
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other)
    np.testing.assert_array_equal(model(TOKENS).logits, decoder()(TOKENS).logits)


def test_seeds_under_vmap():
    def make(seed):
        return DecoderLM(CONFIG, rngs=nnx.Rngs(jax.random.key(seed)))

    graphdef, _ = nnx.split(make(0))
    states = jax.vmap(lambda seed: nnx.split(make(seed))[1])(jnp.arange(2))
    logits = jax.jit(jax.vmap(lambda state: nnx.merge(graphdef, state)(TOKENS).logits))(states)
    np.testing.assert_allclose(logits[1], make(1)(TOKENS).logits, atol=2e-5)


def test_logical_axes_cover_every_parameter():
    mesh = jax.make_mesh((1,), ("model",))
    for model in (decoder(position="t5", tie_embeddings=False), decoder(position="learned")):
        state = nnx.state(model, nnx.Param)
        for path, variable in nnx.to_flat_state(state):
            assert variable.get_metadata().get("out_sharding") is not None, path
        placed = jax.device_put(state, named_shardings(state, mesh))
        assert jax.tree.structure(placed) == jax.tree.structure(state)


# Sites


def test_recorded_sites_have_the_stacked_shapes_and_add_up():
    model = decoder()
    out = model(TOKENS, record=SITES)
    sites = out.aux["sites"]
    shapes = {site: value.shape for site, value in sites.items()}
    stream = (2, 2, 9, 16)
    assert shapes == {
        "embed": (2, 9, 16),
        "head_out": (2, 2, 9, 4, 4),
        "attn_out": stream,
        "mlp_out": stream,
        "resid": stream,
    }
    np.testing.assert_array_equal(out.logits, model(TOKENS).logits)
    first = sites["embed"] + sites["attn_out"][0] + sites["mlp_out"][0]
    np.testing.assert_allclose(first, sites["resid"][0], atol=1e-6)
    mixed = model.stack.blocks[1].attention.output(sites["head_out"][1])
    np.testing.assert_allclose(mixed, sites["attn_out"][1], atol=1e-6)


@pytest.mark.parametrize("site", SITES)
def test_replacing_a_site(site):
    model = decoder()
    other = jnp.roll(TOKENS, 1, axis=1)
    values = {name: model(tokens, record=(site,)).aux["sites"][site] for name, tokens in (("a", TOKENS), ("b", other))}
    plain = model(TOKENS).logits
    # Nothing replaced, or replaced by itself, is the identity.
    np.testing.assert_array_equal(model(TOKENS, replace={site: (False, 0.0)}).logits, plain)
    np.testing.assert_allclose(model(TOKENS, replace={site: (True, values["a"])}).logits, plain, atol=1e-6)
    # What stands at the site afterwards is what was put there.
    out = model(TOKENS, replace={site: (True, values["b"])}, record=(site,))
    np.testing.assert_allclose(out.aux["sites"][site], values["b"], atol=1e-6)


def test_replacing_the_last_residual_gives_the_other_run():
    model = decoder()
    other = model(jnp.roll(TOKENS, 1, axis=1), record=("resid",))
    mask = jnp.array([False, True])[:, None, None, None]
    logits = model(TOKENS, replace={"resid": (mask, other.aux["sites"]["resid"])}).logits
    np.testing.assert_allclose(logits, other.logits, atol=1e-6)


def test_a_scan_over_heads_is_one_vmap_over_masks():
    model = decoder()
    heads = jnp.eye(4, dtype=bool)[:, None, None, None, :, None]  # [4, L=1, B=1, T=1, N, 1]
    logits = jax.jit(jax.vmap(lambda mask: model(TOKENS, replace={"head_out": (mask, 0.0)}).logits))(heads)
    for head in range(4):
        kernel = model.stack.blocks
        saved = [block.attention.out.kernel.get_value() for block in kernel]
        for block, weight in zip(kernel, saved, strict=True):
            block.attention.out.kernel.set_value(weight.at[head].set(0))
        np.testing.assert_allclose(logits[head], model(TOKENS).logits, atol=1e-5)
        for block, weight in zip(kernel, saved, strict=True):
            block.attention.out.kernel.set_value(weight)


def test_bad_sites_and_hooks():
    model = decoder()
    with pytest.raises(ValueError, match="sites are"):
        model(TOKENS, record=("weights",))
    with pytest.raises(ValueError, match="layers"):
        model(TOKENS, replace={"resid": (jnp.ones((3, 1, 1, 1), bool), 0.0)})
    with pytest.raises(ValueError, match=r"\(mask, value\)"):
        model(TOKENS, replace={"resid": 0.0})
    with pytest.raises(ValueError, match="AttnHook"):
        model(TOKENS, hook=object())
    with pytest.raises(ValueError, match="tokens"):
        model(jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="positions"):
        model(TOKENS, positions=jnp.arange(9), cache=model.init_cache(FullCache(9), 2))


# Other mechanisms and names


def test_losses_of_layers_are_returned():
    model = decoder(attention="moh_attention", options={"num_shared": 2, "num_active": 1})
    aux = model(TOKENS).aux
    assert aux["losses"]
    assert all(loss.shape == () for loss in aux["losses"].values())


def test_resolve_refuses_by_name():
    with pytest.raises(ValueError, match="softmax_attention"):
        resolve("softmx_attention")
    with pytest.raises(ValueError, match=r"Did you mean qk_norm\?"):
        resolve("softmax_attention", qk_nrm="l2")
    with pytest.raises(ValueError, match="Valid options: .*qk_norm"):
        resolve("softmax_attention", banana=1)
    with pytest.raises(ValueError, match="is a score_mod"):
        resolve("alibi")
    with pytest.raises(ValueError, match="pattern"):
        resolve("softmax_attention", "sideways")


def test_models_need_their_pattern(monkeypatch):
    def sideways(query, key, value, *, window=1):
        return value

    entry = Entry("sideways", "primitive", "softmax", function=sideways, patterns=("noncausal self",))
    monkeypatch.setattr(catalog, "find", lambda name: entry)
    with pytest.raises(ValueError, match="does not support 'causal self'; it supports: noncausal self"):
        DecoderLM(CONFIG, attention="sideways", rngs=nnx.Rngs(0))
    model = Encoder(CONFIG, attention="sideways", attention_options={"window": 2}, rngs=nnx.Rngs(0))
    assert model.stack.blocks[0].attention.attention_fn.keywords == {"window": 2}


def test_config_refuses_by_name():
    bad = ({"position": "x"}, {"mlp": "x"}, {"norm": "x"}, {"num_kv_heads": 3}, {"features": 18}, {"dropout": 1.0})
    for change in (*bad, {"num_layers": 0}, {"mlp_ratio": -1.0}):
        with pytest.raises(ValueError, match=r"position|mlp|norm|heads|features|dropout|num_layers"):
            dataclasses.replace(CONFIG, **change)


# Encoder


def test_encoder_sees_both_sides_and_ignores_padding():
    model = Encoder(CONFIG, num_classes=3, rngs=nnx.Rngs(0))
    assert model(TOKENS).logits.shape == (2, 3)
    ids = jnp.array([[0] * 6 + [-1] * 3] * 2)
    np.testing.assert_allclose(model(TOKENS, segment_ids=ids).logits, model(TOKENS[:, :6]).logits, atol=2e-5)
    tokenwise = Encoder(CONFIG, rngs=nnx.Rngs(0))
    changed = TOKENS.at[:, 8].set((TOKENS[:, 8] + 1) % 13)
    assert tokenwise(TOKENS).logits.shape == (2, 9, 13)
    assert not np.allclose(tokenwise(TOKENS).logits[:, 0], tokenwise(changed).logits[:, 0])


def test_encoder_without_positions_is_equivariant():
    model = Encoder(dataclasses.replace(CONFIG, position="none"), rngs=nnx.Rngs(0))
    order = np.random.default_rng(0).permutation(9)
    np.testing.assert_allclose(model(TOKENS[:, order]).logits, model(TOKENS).logits[:, order], atol=2e-5)


# ViT


def vit(position="learned", **options):
    config = dataclasses.replace(CONFIG, position=position)
    sizes = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_classes": 5}
    return ViT(config, **sizes, **options, rngs=nnx.Rngs(0))


IMAGES = jax.random.normal(jax.random.key(2), (3, 8, 8, 1))


@pytest.mark.parametrize(
    "options",
    [{}, {"pooling": "class"}, {"pooling": "efficient_probing", "pooling_options": {"num_queries": 4}}],
)
def test_vit(options):
    model = vit(**options)
    out = model(IMAGES, record=("resid",))
    assert out.logits.shape == (3, 5)
    assert out.aux["sites"]["resid"].shape == (2, 3, 4 + (options.get("pooling") == "class"), 16)
    gradient = nnx.jit(nnx.grad(lambda m: jnp.mean(m(IMAGES).logits ** 2)))(model)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_vit_without_positions_is_invariant_to_the_order_of_patches():
    rows = IMAGES.reshape(3, 2, 4, 8, 1)[:, ::-1].reshape(3, 8, 8, 1)
    model = vit(position="none")
    np.testing.assert_allclose(model(rows).logits, model(IMAGES).logits, atol=2e-5)
    assert not np.allclose(vit()(rows).logits, vit()(IMAGES).logits, atol=1e-4)


def test_patches_are_rows_of_the_image():
    patches = np.asarray(patchify(IMAGES, (4, 2)))
    assert patches.shape == (3, 8, 8)
    np.testing.assert_array_equal(patches[0, 5], IMAGES[0, 4:, 2:4, 0].ravel())


def test_bad_vit():
    with pytest.raises(ValueError, match="images"):
        vit()(IMAGES[:, :4])
    with pytest.raises(ValueError, match="patch_size"):
        ViT(CONFIG, image_size=8, patch_size=3, num_classes=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="pooling"):
        vit(pooling="alibi")
    with pytest.raises(ValueError, match="num_queries"):
        vit(pooling="efficient_probing", pooling_options={"num_query": 4})
    with pytest.raises(ValueError, match="pooling_options"):
        vit(pooling_options={"num_queries": 4})
