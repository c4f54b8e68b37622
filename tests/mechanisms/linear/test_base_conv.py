import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn import catalog
from jattn.cache import FullCache
from jattn.layers.rope import Rope
from jattn.mechanisms.entry import LayerExample
from jattn.mechanisms.examples import normal
from jattn.mechanisms.linear.base_conv import BaseConv, ImplicitLongConv
from jattn.models import DecoderLM, Swap, TransformerConfig, generate, hybrid
from jattn.testing import run_checks

B, T, M = 2, 11, 6


def tokens(seed=0, length=T):
    return np.random.default_rng(seed).normal(size=(B, length, M))


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


def out(layer, x, **call):
    graph, state = nnx.split(layer)
    return jax.jit(lambda state, x, call: nnx.merge(graph, state)(x, **call).output)(state, x, call)


def made(**options):
    return BaseConv(M, 2, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_short_is_its_definition(activation):
    with jax.enable_x64(True):
        layer, x = made(width=3, activation=activation), tokens()
        w, b = (np.asarray(p[...]) for p in (layer.projection.kernel, layer.projection.bias))
        kernel, bias = (np.asarray(p[...]) for p in (layer.conv.kernel, layer.conv.bias))
        y = np.zeros_like(x)
        for t in range(T):
            conv = bias + sum(kernel[2 - d] * x[:, t - d] for d in range(min(3, t + 1)))
            gate = x[:, t] @ w + b
            if activation:
                conv, gate = conv / (1 + np.exp(-conv)), gate / (1 + np.exp(-gate))
            y[:, t] = gate * conv + x[:, t]
        close(out(layer, x), y)


def test_long_is_its_definition():
    with jax.enable_x64(True):
        layer, x = made(width=None, max_length=7), tokens()
        w, b = (np.asarray(p[...]) for p in (layer.projection.kernel, layer.projection.bias))
        h = np.asarray(layer.conv.filter(7))
        y = np.zeros_like(x)
        for t in range(T):
            conv = x[:, t] + sum(h[d] * x[:, t - d] for d in range(min(7, t + 1)))
            y[:, t] = (x[:, t] @ w + b) * conv + x[:, t]
        close(out(layer, x), y)


@pytest.mark.parametrize("width", [3, None])
def test_without_a_gate_it_is_the_identity(width):
    with jax.enable_x64(True):
        layer, x = made(width=width), tokens()
        layer.projection.kernel[...] = np.zeros((M, M))
        layer.projection.bias[...] = np.zeros(M)
        close(out(layer, x), x)


def test_with_a_delta_kernel_it_is_a_gate():
    with jax.enable_x64(True):
        layer, x = made(width=4), tokens()
        layer.conv.kernel[...] = np.concatenate([np.zeros((3, M)), np.ones((1, M))])
        layer.conv.bias[...] = np.zeros(M)
        close(out(layer, x), np.asarray(layer.projection(x)) * x + x)


def test_the_long_form_keeps_the_contracts():
    def example(key, length):
        return LayerExample((8, 2), {"width": None, "max_length": 9}, (normal(key, 2, length, 8),), {})

    entry = dataclasses.replace(catalog.find("BaseConv"), example=example)
    # How the cost grows depends on max_length, which stays as it is here.
    names = ("shapes", "gradients", "empty_rows", "poison", "lengths", "causality", "precision", "decode", "vmap")
    found = list(run_checks(entry, only=names))
    assert [str(r) for r in found if r.status != "passed"] == []


def test_padding_and_documents_keep_apart_when_decoding():
    with jax.enable_x64(True):
        layer, x = made(width=None, max_length=9), tokens()
        run = jax.jit(lambda x, ids, cache: layer(x, segment_ids=ids, cache=(FullCache(T), cache)))
        ids = np.zeros((B, T), int)
        ids[0, 3:6] = -1
        whole = out(layer, x, segment_ids=ids)
        dirty = np.where(ids[..., None] >= 0, x, np.nan)
        cache, outputs = layer.init_cache(FullCache(T), B, jnp.float64), []
        for t in range(T):
            found = run(dirty[:, t : t + 1], ids[:, t : t + 1], cache)
            cache = found.cache
            outputs.append(found.output)
        close(np.concatenate(outputs, 1), whole)
        assert cache.next.tolist() == [T - 3, T]
        alone = out(layer, x[:1, np.flatnonzero(ids[0] >= 0)])
        close(whole[:1, ids[0] >= 0], alone)


def test_packed_documents_are_separate_ones():
    with jax.enable_x64(True):
        x = tokens()
        ids = np.array([[4, 4, 4, 4, 1, 1, 1, 1, 1, 4, 4]] * B)
        for layer in (made(width=3), made(width=None, max_length=8), ImplicitLongConv(M, rngs=nnx.Rngs(0))):
            parts = [out(layer, x[:, a:b]) for a, b in ((0, 4), (4, 9), (9, 11))]
            close(out(layer, x, segment_ids=ids), np.concatenate(parts, 1))


def test_layers_take_turns_in_a_model():
    config = TransformerConfig(vocab_size=11, features=8, num_layers=3, num_heads=2, mlp="none", position="learned")
    mixers = [Swap("BaseConv", {"width": 3}), Swap("BaseConv", {"width": None, "max_length": 16})]
    model = DecoderLM(config, attention=hybrid(mixers, 3), rngs=nnx.Rngs(0))
    kinds = [type(block.attention.conv).__name__ for block in model.stack.blocks]
    assert kinds == ["ShortConv", "ImplicitLongConv", "ShortConv"]
    prompt = np.arange(5)[None]
    found = generate(model, prompt, max_new_tokens=3, temperature=0).tokens
    text = np.concatenate([prompt, np.asarray(found)[:, -3:]], 1)
    logits = model(text).logits
    assert np.argmax(logits[:, 4:-1], -1).tolist() == text[:, 5:].tolist()
    assert [swap.layers for swap in hybrid(["BaseConv", "SelectiveLookup"], 1)] == [(0,)]
    with pytest.raises(ValueError, match="mixers must be"):
        hybrid([Swap("BaseConv", layers=[0])], 2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: BaseConv(6, 4, rngs=nnx.Rngs(0)), "num_heads must divide"),
        (lambda: BaseConv(6, 2, num_kv_heads=1, rngs=nnx.Rngs(0)), "follow"),
        (lambda: BaseConv(6, 2, activation="relu", rngs=nnx.Rngs(0)), "activation must be"),
        (lambda: BaseConv(6, 2, position=Rope(), rngs=nnx.Rngs(0)), "no position"),
        (lambda: ImplicitLongConv(6, max_length=0, rngs=nnx.Rngs(0)), "max_length must be"),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()
