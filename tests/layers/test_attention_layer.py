import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jattn
from jattn import masks
from jattn.cache import FullCache, SinkWindowCache, WindowCache
from jattn.layers import MultiHeadAttention, Rope, named_shardings
from jattn.layers.attention import LayerOutput
from jattn.mechanisms.softmax.alibi import Alibi
from jattn.mechanisms.softmax.t5_bias import T5Bias


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def make(seed=0, features=16, heads=4, **options):
    return MultiHeadAttention(features, heads, rngs=nnx.Rngs(seed), **options)


def by_hand(layer, x, context=None, visible=None):
    """The definition with einsum."""
    context = x if context is None else context
    q, k, v = (
        jnp.einsum("btm,mnd->btnd", c, p.kernel.get_value())
        for c, p in ((x, layer.query), (context, layer.key), (context, layer.value))
    )
    group = layer.num_heads // layer.num_kv_heads
    k, v = jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)
    logits = jnp.einsum("btnd,bsnd->bnts", q, k) * q.shape[-1] ** -0.5
    if visible is not None:
        logits = jnp.where(visible, logits, -jnp.inf)
    o = jnp.einsum("bnts,bsnd->btnd", jax.nn.softmax(logits, -1), v)
    return jnp.einsum("btnd,ndm->btm", o, layer.out.kernel.get_value())


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_self_and_cross_attention(kv_heads):
    layer, x = make(num_kv_heads=kv_heads), normal(1, 2, 5, 16)
    np.testing.assert_allclose(layer(x).output, by_hand(layer, x), atol=1e-5)
    causal = jnp.tril(jnp.ones((5, 5), bool))
    np.testing.assert_allclose(layer(x, mask=masks.causal()).output, by_hand(layer, x, visible=causal), atol=1e-5)
    np.testing.assert_allclose(layer(x, mask=causal).output, by_hand(layer, x, visible=causal), atol=1e-5)
    wide = make(num_kv_heads=kv_heads, context_features=6)
    context = normal(2, 2, 7, 6)
    np.testing.assert_allclose(wide(x, context).output, by_hand(wide, x, context), atol=1e-5)


def test_grouped_heads_equal_repeated_projections():
    layer, full, x = make(num_kv_heads=2), make(seed=3), normal(1, 2, 5, 16)
    full.query, full.out = layer.query, layer.out
    for name in ("key", "value"):
        getattr(full, name).kernel.set_value(jnp.repeat(getattr(layer, name).kernel.get_value(), 2, axis=1))
    np.testing.assert_allclose(layer(x).output, full(x).output, atol=1e-6)


@pytest.mark.parametrize("position", [Rope(), Alibi(), "t5"])
def test_shifted_positions_change_nothing(position):
    position = T5Bias(4, rngs=nnx.Rngs(1)) if position == "t5" else position
    layer, x = make(position=position), normal(1, 2, 6, 16)
    out = layer(x, mask=masks.causal()).output
    shifted = layer(x, mask=masks.causal(), positions=jnp.arange(6) + 9).output
    np.testing.assert_allclose(out, shifted, atol=2e-5)
    assert not np.allclose(out, make()(x, mask=masks.causal()).output, atol=1e-4)


@pytest.mark.parametrize("position", [Alibi(), "t5"])
def test_relative_bias_reaches_functions_without_score_mod(position):
    position = T5Bias(4, rngs=nnx.Rngs(1)) if position == "t5" else position

    def plain(query, key, value, *, bias=None, is_causal=False, query_positions=None, key_positions=None):
        places = {"query_positions": query_positions, "key_positions": key_positions}
        return jattn.dot_product_attention(query, key, value, bias, is_causal=is_causal, **places)

    x = normal(1, 2, 6, 16)
    outs = []
    for extra in ({}, {"attention_fn": plain}):
        layer = make(position=position, **extra)
        call = functools.partial(layer, x, mask=masks.causal())
        outs.append((call().output, call(positions=jnp.arange(6) * 3).output))
    for one, other in zip(*outs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("mode", ["l2", "layernorm", "rmsnorm", "rmsnorm_full"])
def test_qk_norm_modes_run_and_forget_the_scale_of_the_input(mode):
    layer, x = make(qk_norm=mode, num_kv_heads=2), normal(1, 1, 5, 16)
    for one, other in zip(layer.project(x, x)[:2], layer.project(3.0 * x, 3.0 * x)[:2], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    assert layer.scale == (1.0 if mode == "l2" else None)
    assert np.isfinite(layer(x).output).all()


def test_packed_documents_equal_separate_ones():
    layer, x = make(position=Rope()), normal(1, 1, 7, 16)
    ids = jnp.array([[0, 0, 0, 1, 1, -1, -1]])
    positions = jnp.array([[0, 1, 2, 0, 1, 0, 0]])
    packed = layer(x, mask=masks.causal(), segment_ids=ids, positions=positions).output
    for lo, hi in ((0, 3), (3, 5)):
        np.testing.assert_allclose(packed[:, lo:hi], layer(x[:, lo:hi], mask=masks.causal()).output, atol=1e-5)
    np.testing.assert_array_equal(packed[:, 5:], 0)


def stepwise(layer, x, policy, chunks, ids=None):
    cache, outputs, start = layer.init_cache(policy, x.shape[0]), [], 0

    @jax.jit
    def step(cache, x, ids):
        return layer(x, cache=(policy, cache), segment_ids=ids)[:2]

    for size in chunks:
        part = slice(start, start + size)
        out, cache = step(cache, x[:, part], None if ids is None else ids[:, part])
        outputs.append(out)
        start += size
    return jnp.concatenate(outputs, 1), cache


POSITIONS = {"none": None, "rope": Rope(base=100.0), "alibi": Alibi(), "t5": None}


@pytest.mark.parametrize("position", list(POSITIONS))
@pytest.mark.parametrize("chunks", [(1,) * 9, (4, 4, 1)])
def test_full_cache_equals_the_parallel_result(position, chunks):
    option = T5Bias(4, rngs=nnx.Rngs(1)) if position == "t5" else POSITIONS[position]
    layer = make(position=option, num_kv_heads=2, qk_norm="rmsnorm", use_sinks=True, logit_soft_cap=5.0)
    x = normal(1, 2, 9, 16)
    expected = layer(x, mask=masks.causal()).output
    got, cache = stepwise(layer, x, FullCache(12), chunks)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    np.testing.assert_array_equal(cache.next, [9, 9])


@pytest.mark.parametrize("position", list(POSITIONS))
@pytest.mark.parametrize("chunks", [(1,) * 9, (4, 4, 1)])
def test_window_caches_equal_the_masks(position, chunks):
    option = T5Bias(4, rngs=nnx.Rngs(1)) if position == "t5" else POSITIONS[position]
    layer, x = make(position=option), normal(1, 2, 9, 16)
    got, _ = stepwise(layer, x, WindowCache(3, chunk=max(chunks)), chunks)
    np.testing.assert_allclose(got, layer(x, mask=masks.sliding_window(3)).output, atol=2e-5)
    policy = SinkWindowCache(3, num_sinks=2, chunk=max(chunks), positions="original")
    got, _ = stepwise(layer, x, policy, chunks)
    np.testing.assert_allclose(got, layer(x, mask=masks.sliding_window(3, num_sinks=2)).output, atol=2e-5)


def streaming_by_lists(layer, x, window, num_sinks):
    """StreamingLLM as published: raw keys in a list, renumbered by place in the cache at every token."""
    q, k, v = layer.project(x, x)
    outputs, kept = [], []
    for t in range(x.shape[1]):
        kept.append(t)
        kept = [j for j in kept if j < num_sinks or j > t - window]
        index, place = jnp.array(kept), jnp.arange(len(kept))
        end = jnp.array([len(kept) - 1])
        query, key = q[:, t : t + 1], k[:, index]
        score_mod = None
        if hasattr(layer.position, "rotate"):
            query, key = layer.position.rotate(query, key, end, place)
        elif layer.position is not None:
            score_mod = layer.position.score_mod(layer.num_heads)
        o = jattn.dot_product_attention(
            query, key, v[:, index], score_mod=score_mod, query_positions=end[None], key_positions=place[None]
        )
        outputs.append(layer.output(o))
    return jnp.concatenate(outputs, 1)


@pytest.mark.parametrize("position", list(POSITIONS))
@pytest.mark.parametrize("chunks", [(1,) * 9, (4, 4, 1)])
def test_sink_window_cache_renumbers_as_published(position, chunks):
    option = T5Bias(4, rngs=nnx.Rngs(1)) if position == "t5" else POSITIONS[position]
    layer, x = make(position=option, num_kv_heads=2), normal(1, 1, 9, 16)
    got, _ = stepwise(layer, x, SinkWindowCache(3, num_sinks=2, chunk=max(chunks)), chunks)
    np.testing.assert_allclose(got, streaming_by_lists(layer, x, 3, 2), atol=2e-5)


def test_padding_is_skipped_by_the_cache():
    layer, x = make(position=Rope()), normal(1, 2, 6, 16)
    ids = jnp.array([[-1, -1, 0, 0, 0, 0], [0, 0, 0, 0, 0, -1]])
    got, cache = stepwise(layer, x, FullCache(8), (4, 2), ids)
    np.testing.assert_allclose(got[0, 2:], layer(x[:1, 2:], mask=masks.causal()).output[0], atol=1e-5)
    np.testing.assert_allclose(got[1, :5], layer(x[1:, :5], mask=masks.causal()).output[0], atol=1e-5)
    np.testing.assert_array_equal(cache.next, [4, 5])


def test_cross_attention_stores_its_context_once():
    layer, x, context = make(), normal(1, 2, 4, 16), normal(2, 2, 5, 16)
    policy = FullCache(6, causal=False)
    first = layer(x[:, :1], context, cache=(policy, layer.init_cache(policy, 2)))
    rest = layer(x[:, 1:], cache=(policy, first.cache))
    got = jnp.concatenate([first.output, rest.output], 1)
    np.testing.assert_allclose(got, layer(x, context).output, atol=1e-5)
    with pytest.raises(ValueError, match="context"):
        layer(x, context, cache=(FullCache(6), layer.init_cache(FullCache(6), 2)))


def test_dropout():
    layer, x = make(dropout_rate=0.5), normal(1, 1, 5, 16)
    np.testing.assert_array_equal(layer(x).output, make()(x).output)
    once, again = (layer(x, deterministic=False, rngs=jax.random.key(7)).output for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert not np.allclose(once, layer(x).output)
    with pytest.raises(ValueError, match="rngs"):
        layer(x, deterministic=False)


def test_what_the_function_cannot_take_is_refused():
    def bare(query, key, value):
        return query

    layer, x = make(attention_fn=bare), normal(1, 1, 5, 16)
    assert layer(x).output.shape == x.shape
    for call in ({"mask": masks.causal()}, {"positions": jnp.arange(5)}, {"segment_ids": jnp.zeros((1, 5), jnp.int32)}):
        with pytest.raises(ValueError, match="bare does not take"):
            layer(x, **call)


def test_bad_arguments():
    for options in ({"num_kv_heads": 3}, {"heads": 5}, {"dropout_rate": 1.0}):
        with pytest.raises(ValueError, match=r"num_kv_heads|num_heads|dropout_rate"):
            make(**options)
    with pytest.raises(ValueError, match="x must be"):
        make()(jnp.ones((1, 5, 8)))
    layer = make()
    with pytest.raises(ValueError, match="positions"):
        layer(normal(0, 1, 2, 16), positions=jnp.arange(2), cache=(FullCache(3), layer.init_cache(FullCache(3), 1)))
    with pytest.raises(ValueError, match="mask"):
        layer(normal(0, 1, 2, 16), mask=masks.full(), cache=(FullCache(3), layer.init_cache(FullCache(3), 1)))


def test_tap_sees_and_replaces_head_outputs():
    layer, x = make(), normal(1, 1, 3, 16)
    seen = []
    out = layer(x, tap=lambda site, o: seen.append((site, o.shape)) or jnp.zeros_like(o)).output
    assert seen == [("head_out", (1, 3, 4, 4))]
    np.testing.assert_array_equal(out, 0)


class Doubled(MultiHeadAttention):
    """A mechanism as a subclass: keys scaled once in project, outputs doubled in attend, a loss reported."""

    def project(self, x, context):
        query, key, value = super().project(x, context)
        return query, key, 3.0 * value

    def attend(self, query, key, value, *, inputs, **arguments):
        o, aux = super().attend(query, key, value, inputs=inputs, **arguments)
        return 2.0 * o, {**aux, "size_loss": jnp.mean(inputs**2)}


def test_subclasses_keep_the_rest():
    layer, base, x = Doubled(16, 4, position=Rope(), rngs=nnx.Rngs(0)), make(position=Rope()), normal(1, 1, 5, 16)
    result = layer(x, mask=masks.causal())
    assert isinstance(result, LayerOutput)
    np.testing.assert_allclose(result.output, 6.0 * base(x, mask=masks.causal()).output, atol=1e-5)
    assert result.aux["size_loss"] > 0
    got, _ = stepwise(layer, x, FullCache(5), (2, 2, 1))
    np.testing.assert_allclose(got, result.output, atol=2e-5)


def test_seeds_under_vmap():
    x = normal(1, 1, 3, 16)

    def init(seed):
        return nnx.split(make_from_key(jax.random.key(seed)))[1]

    def make_from_key(key):
        return MultiHeadAttention(16, 4, qk_norm="rmsnorm", use_sinks=True, rngs=nnx.Rngs(key))

    graphdef, _ = nnx.split(make_from_key(jax.random.key(0)))
    states = jax.vmap(init)(jnp.arange(3))
    outs = jax.vmap(lambda s: nnx.merge(graphdef, s)(x).output)(states)
    for seed in range(3):
        np.testing.assert_allclose(outs[seed], make_from_key(jax.random.key(seed))(x).output, atol=1e-5)


def test_logical_axes_become_shardings():
    mesh = jax.make_mesh((1,), ("model",))
    state = nnx.state(make(use_bias=True, use_sinks=True, qk_norm="rmsnorm"))
    specs = {
        "/".join(map(str, path)): tuple(variable.get_value().spec)
        for path, variable in nnx.to_flat_state(named_shardings(state, mesh))
    }
    assert specs["query/kernel"] == (None, "model", None)
    assert specs["out/kernel"] == ("model", None, None)
    assert specs["sinks"] == ("model",)
    assert set(specs["qk_norm/query_norm/scale"]) <= {None}
    placed = jax.device_put(state, named_shardings(state, mesh))
    np.testing.assert_array_equal(placed["sinks"].get_value(), 0)
