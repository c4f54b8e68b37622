import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn import masks
from jattn.cache import FullCache
from jattn.layers.attention import MultiHeadAttention
from jattn.layers.rope import Rope
from jattn.mechanisms.linear.selective_lookup import SELECTORS, SelectiveLookup, seen_before

B, T, M, N = 2, 10, 8, 2


def tokens(seed=0, length=T):
    return np.random.default_rng(seed).normal(size=(B, length, M))


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


def made(**options):
    layer = SelectiveLookup(M, N, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)
    if layer.select.bias is not None:
        layer.select.bias[...] = np.linspace(-0.3, 0.4, layer.select.bias.shape[0])
    return layer


def attention(layer, x, **call):
    """The same weights as plain attention."""
    plain = MultiHeadAttention(M, N, param_dtype=jnp.float64, use_bias=True, position=layer.position, rngs=nnx.Rngs(0))
    for name in ("query", "key", "value", "out"):
        getattr(plain, name).kernel[...] = getattr(layer, name).kernel[...]
    return np.asarray(plain(x, mask=masks.causal(), **call).output)


def scores(layer, x):
    """s by its definition."""
    logits = x @ np.asarray(layer.select.kernel[...])
    if layer.selector == "sigmoid":
        return 1 / (1 + np.exp(-logits[..., 0]))
    logits = logits + np.asarray(layer.select.bias[...])
    if layer.selector == "softmax":
        weights = np.exp(logits[..., 0])
        return weights / weights.sum(1, keepdims=True)
    weights = np.exp(logits / (0.3 * math.sqrt(M)))
    return weights[..., 1] / weights.sum(-1)


@pytest.mark.parametrize("selector", SELECTORS)
def test_training_and_evaluation_are_their_definitions(selector):
    with jax.enable_x64(True):
        layer, x = made(selector=selector), tokens()
        s, o = scores(layer, x), attention(layer, x)
        found = layer(x, deterministic=False)
        close(found.output, x + s[..., None] * o)
        close(found.aux["selection"], s.mean())
        assert ("lookup_loss" in found.aux) == (selector == "sigmoid")
        chosen = np.zeros((B, T), bool)
        np.put_along_axis(chosen, np.argsort(-s, axis=1, kind="stable")[:, :4], True, axis=1)
        found = layer(x)
        close(found.output, np.where(chosen[..., None], x + s[..., None] * o, x))
        assert (np.abs(found.output - x).max(-1) > 0).sum(1).tolist() == [4, 4]  # ceil(sqrt(10))
        assert "lookup_loss" not in found.aux


def test_with_all_tokens_looked_up_evaluation_is_training():
    with jax.enable_x64(True):
        for lookups in (T, 3 * T):
            layer = made(num_lookups=lookups, position=Rope())
            close(layer(tokens()).output, layer(tokens(), deterministic=False).output)


def test_equal_scores_go_to_the_earlier_token():
    with jax.enable_x64(True):
        layer, x = made(num_lookups=3), tokens()
        layer.select.kernel[...] = np.zeros((M, 1))
        changed = np.abs(layer(x).output - x).max(-1) > 0
        assert changed.astype(int).tolist() == [[1, 1, 1] + [0] * 7] * B


@pytest.mark.parametrize("lookups", [None, 2])
def test_the_loss_is_that_of_too_many_lookups(lookups):
    with jax.enable_x64(True):
        layer, x = made(num_lookups=lookups), tokens()
        share = (math.sqrt(T) if lookups is None else lookups) / T

        def loss(kernel):
            layer.select.kernel[...] = kernel
            return layer(x, deterministic=False).aux["lookup_loss"]

        close(loss(np.zeros((M, 1))), 0.001 * (0.5 - share))
        x = np.abs(x)
        assert loss(np.full((M, 1), -1.0)) == 0.0


def test_training_is_causal_and_evaluation_is_not():
    with jax.enable_x64(True):
        layer, x = made(), tokens()
        changed = x.copy()
        changed[:, 7:] += 5
        before, after = (layer(a, deterministic=False).output[:, :7] for a in (x, changed))
        np.testing.assert_array_equal(before, after)
        # The later tokens now have the highest scores, so that earlier ones are no longer looked up.
        layer.select.kernel[...] = np.ones((M, 1))
        assert not np.allclose(layer(x).output[:, :7], layer(changed).output[:, :7])


def test_positions_and_documents_are_seen_at_evaluation_as_in_training():
    with jax.enable_x64(True):
        layer, x = made(num_lookups=4, position=Rope()), tokens()
        ids = np.array([[0, 0, 0, 1, 1, 1, -1, -1, 2, 2], [5, -1, 5, 5, 5, 5, 5, 5, 5, 5]])
        positions = np.arange(T)[None] + np.array([[3], [11]])
        call = {"segment_ids": ids, "positions": positions}
        dirty = np.where(ids[..., None] >= 0, x, np.nan)
        trained, found = layer(dirty, deterministic=False, **call), layer(dirty, **call)
        real = ids >= 0
        s = np.where(real, scores(layer, x), 0)
        close(trained.output, np.where(real[..., None], x + s[..., None] * attention(layer, x, **call), 0))
        close(trained.aux["selection"], s.sum() / real.sum())
        changed = np.abs(np.asarray(found.output) - np.where(real[..., None], x, 0)).max(-1) > 0
        best = np.argsort(-np.where(real, s, -1), axis=1, kind="stable")[:, :4]
        assert (np.flatnonzero(changed[0]) == np.sort(best[0])).all()
        close(np.where(changed[..., None], trained.output, 0), np.where(changed[..., None], found.output, 0))
        gradient = jax.grad(lambda w: jnp.sum(layer(dirty, **call).output * w))(np.ones((B, T, M)))
        assert np.isfinite(gradient).all()


def test_a_row_of_padding_is_harmless():
    for selector in SELECTORS:
        graph, state = nnx.split(SelectiveLookup(M, N, selector=selector, rngs=nnx.Rngs(0)))
        ids = np.where(np.arange(B)[:, None] == 1, -1, np.zeros((B, T), int))

        @jax.jit
        def total(state, graph=graph, ids=ids):
            layer, outputs, sums = nnx.merge(graph, state), [], 0
            for deterministic in (False, True):
                found = layer(tokens(), segment_ids=ids, deterministic=deterministic)
                outputs.append(found.output)
                sums += jnp.sum(found.output**2) + found.aux["selection"]
            return sums, outputs

        gradients, outputs = jax.jit(jax.grad(total, has_aux=True))(state)
        assert not np.asarray(outputs)[:, 1].any()
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_tokens_may_be_selected_by_a_program():
    with jax.enable_x64(True):
        layer, x = made(), tokens()
        words = np.array([[3, 5, 3, 3, 7, 5, 1, 1, 0, 9]] * B)
        ids = np.array([[0, 0, 0, 1, 1, 1, 1, 1, -1, 1]] * B)
        seen = seen_before(words, segment_ids=ids)
        assert seen[0].astype(int).tolist() == [0, 0, 1, 0, 0, 0, 0, 1, 0, 0]
        assert seen_before(words)[0].astype(int).tolist() == [0, 0, 1, 1, 0, 1, 0, 1, 0, 0]
        expected = np.where(np.asarray(seen_before(words))[..., None], x + attention(layer, x), x)
        for deterministic in (False, True):
            close(layer(x, selected=seen_before(words), deterministic=deterministic).output, expected)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda layer, x: layer(x, x), "no context"),
        (lambda layer, x: layer(x, cache=(None, None)), "no cache"),
        (lambda layer, x: layer(x, mask=masks.full()), "no mask but causal"),
        (lambda layer, x: layer(x[0]), "x must be"),
        (lambda layer, x: layer(x, segment_ids=np.zeros((3, T), int)), "segment_ids must be"),
        (lambda layer, x: layer(x, selected=np.zeros((B, 3), bool)), "selected must be"),
        (lambda layer, x: layer.init_cache(FullCache(4), 1), "cannot decode"),
        (lambda layer, x: SelectiveLookup(M, N, selector="all", rngs=nnx.Rngs(0)), "selector must be"),
        (lambda layer, x: SelectiveLookup(M, N, num_lookups=0, rngs=nnx.Rngs(0)), "num_lookups must be"),
        (lambda layer, x: seen_before(x), "tokens must be"),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call(SelectiveLookup(M, N, rngs=nnx.Rngs(0)), tokens())
