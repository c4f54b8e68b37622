import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jattn
from jattn.cache import FullCache, WindowCache
from jattn.layers.attention import MultiHeadAttention
from jattn.mechanisms.sparse.gna_attention import gna_attention
from jattn.mechanisms.sparse.gna_mask import gna_mask
from jattn.testing.compiling import usual_options

N, K, D, V = 4, 2, 3, 5


def arrays(*grid, seed=0, dtype=np.float64):
    random = np.random.default_rng(seed)
    shapes = ((2, *grid, N, D), (2, *grid, K, D), (2, *grid, K, V))
    return tuple(random.normal(size=shape).astype(dtype) for shape in shapes)


def dense(visible, query, key, value, extra=(), bias=0.0):
    """Softmax over the visible keys and the extra ones."""
    shape = query.shape[:-1]
    query, key, value = (jnp.asarray(x).reshape(x.shape[0], -1, *x.shape[-2:]) for x in (query, key, value))
    logits = jnp.einsum("btnd,bsnd->bnts", query, key.repeat(N // K, 2)) * D**-0.5 + bias
    logits = jnp.where(visible, logits, -jnp.inf)
    if len(extra):
        key, value = (jnp.concatenate([x, y], 1) for x, y in zip((key, value), extra, strict=True))
        more = jnp.einsum("btnd,bsnd->bnts", query, jnp.asarray(extra[0]).repeat(N // K, 2)) * D**-0.5
        logits = jnp.concatenate([logits, more], -1)
    out = jnp.einsum("bnts,bsnd->btnd", jax.nn.softmax(logits, -1), value.repeat(N // K, 2))
    return out.reshape(*shape, V)


def visible(grid, window, **options):
    size = int(np.prod(grid))
    return gna_mask(grid, window, **options).to_dense(1, 1, size, size)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


CASES = [
    ((13,), {"window": 5, "stride": 2}),
    ((13,), {"window": 3, "stride": 2, "dilation": 4, "is_causal": True}),
    ((5, 6), {"window": (3, 4), "stride": (1, 2), "dilation": (1, 1), "is_causal": (True, False)}),
    ((3, 4, 4), {"window": (2, 3, 2), "dilation": (1, 1, 2)}),
]


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize(("grid", "options"), CASES)
def test_it_is_softmax_in_the_neighborhood_with_all_gradients(grid, options, implementation):
    tile = None if implementation == "reference" else tuple(min(x, 3) for x in grid)
    with jax.enable_x64(True):
        given = tuple(map(jnp.asarray, arrays(*grid)))
        shown = visible(grid, **options)

        def total(function, *given):
            return jnp.sum(jnp.sin(function(*given)))

        fast = functools.partial(gna_attention, **options, implementation=implementation, tile=tile)
        slow = functools.partial(dense, shown)
        got, expected = (
            jax.jit(jax.value_and_grad(functools.partial(total, f), (0, 1, 2)))(*given) for f in (fast, slow)
        )
        jax.tree.map(close, got, expected)


def test_flat_tokens_with_a_grid_are_the_image():
    with jax.enable_x64(True):
        given = arrays(4, 6)
        image = gna_attention(*given, window=(3, 5))
        flat = [x.reshape(2, 24, *x.shape[-2:]) for x in given]
        close(gna_attention(*flat, window=(3, 5), grid=(4, 6)), image.reshape(2, 24, N, V))


def test_limits_are_dense_causal_blocked_and_sliding_attention():
    with jax.enable_x64(True):
        given = arrays(12)
        close(gna_attention(*given, window=12), jattn.dot_product_attention(*given))
        close(gna_attention(*given, window=12, is_causal=True), jattn.dot_product_attention(*given, is_causal=True))
        blocked = [x.reshape(6, 4, *x.shape[-2:]) for x in given]
        close(gna_attention(*given, window=4, stride=4), jattn.dot_product_attention(*blocked).reshape(2, 12, N, V))
        sliding = jattn.dot_product_attention(*given, mask=jattn.masks.sliding_window(3))
        close(gna_attention(*given, window=3, is_causal=True), sliding)


def test_dilation_is_attention_on_each_residue():
    with jax.enable_x64(True):
        given = arrays(13)
        out = gna_attention(*given, window=3, stride=2, dilation=3)
        for g in range(3):
            close(out[:, g::3], gna_attention(*(x[:, g::3] for x in given), window=3, stride=2))


@pytest.mark.slow
@pytest.mark.parametrize("sinks", [None, np.array([0.5, -1.0, 0.0, 2.0])])
def test_extra_tokens_join_one_softmax_with_all_gradients(sinks):
    with jax.enable_x64(True):
        given = tuple(map(jnp.asarray, arrays(3, 4)))
        extra = tuple(map(jnp.asarray, arrays(2, seed=1)[1:]))
        shown = visible((3, 4), (2, 3))

        def fast(*x):
            return gna_attention(*x[:3], window=(2, 3), extra_key=x[3], extra_value=x[4], sinks=sinks)

        def slow(*x):
            if sinks is None:
                return dense(shown, *x[:3], extra=x[3:])
            keys = [
                jnp.concatenate([a.reshape(2, 12, *a.shape[-2:]), b], 1) for a, b in zip(x[1:3], x[3:], strict=True)
            ]
            every = np.concatenate([shown, np.ones((1, 1, 12, 2), bool)], -1)
            return jattn.dot_product_attention(x[0].reshape(2, 12, N, D), *keys, mask=every, sinks=sinks).reshape(
                2, 3, 4, N, V
            )

        for function in (fast, slow):
            assert function(*given, *extra).shape == (2, 3, 4, N, V)
        gradients = (
            jax.grad(lambda *x, f=f: jnp.sum(jnp.sin(f(*x))), tuple(range(5)))(*given, *extra) for f in (fast, slow)
        )
        close(fast(*given, *extra), slow(*given, *extra))
        jax.tree.map(close, *gradients)


def test_bias_masks_and_segments_hide_within_the_neighborhood():
    with jax.enable_x64(True):
        given = arrays(11)
        random = np.random.default_rng(3)
        shown = visible((11,), 5)
        bias = random.normal(size=(2, 1, 11, 11))
        hide = random.random((2, N, 11, 11)) < 0.7
        hide |= np.eye(11, dtype=bool)
        close(gna_attention(*given, window=5, bias=bias, mask=hide), dense(shown & hide, *given, bias=bias))
        causal = gna_attention(*given, window=5, mask=jattn.masks.causal())
        close(causal, dense(shown & np.tri(11, dtype=bool), *given))
        ids = np.array([[0] * 4 + [1] * 7, [2] * 10 + [-1]])
        same = (ids[:, :, None] == ids[:, None])[:, None] & (ids >= 0)[:, None, None]
        out = gna_attention(*given, window=5, segment_ids=ids)
        close(out[:, :10], dense(shown & same, *given)[:, :10])
        assert not out[1, 10].any()


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_key_masks_hide_padding_and_what_stands_in_it(implementation):
    query, key, value = arrays(11, dtype=np.float32)
    ok = np.ones((2, 1, 1, 11), bool)
    ok[0, ..., 8:] = False
    ok[1] = False
    options = {"window": 3, "mask": ok, "segment_ids": np.zeros((2, 11), int), "implementation": implementation}
    run = jax.jit(functools.partial(gna_attention, **options))
    clean = run(query, key, value)
    key[0, 8:], value[0, 8:], key[1], value[1] = np.nan, np.inf, np.nan, np.nan
    np.testing.assert_array_equal(run(query, key, value), clean)
    assert not clean[1].any()
    assert not clean[0, 10].any()
    extra = np.ones((2, 1, K, V), np.float32)
    with_extra = run(query, key, value, extra_key=extra[..., :D], extra_value=extra)
    np.testing.assert_allclose(with_extra[1], 1, rtol=1e-6)


@pytest.mark.parametrize("policy", [FullCache(12), WindowCache(6)])
def test_decoding_gives_the_rows_of_the_whole(policy):
    with jax.enable_x64(True):
        function = functools.partial(gna_attention, window=3, dilation=2, is_causal=True)
        layer = MultiHeadAttention(8, 2, attention_fn=function, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        x = np.random.default_rng(0).normal(size=(2, 9, 8))
        whole = layer(x, mask=jattn.masks.causal()).output
        cache, step = layer.init_cache(policy, 2), nnx.jit(lambda layer, x, cache: layer(x, cache=(policy, cache)))
        rows = []
        for t in range(9):
            result = step(layer, x[:, t : t + 1], cache)
            cache = result.cache
            rows.append(result.output)
        close(np.concatenate(rows, 1), whole)


def test_positions_give_rows_of_a_known_grid():
    with jax.enable_x64(True):
        query, key, value = arrays(12)
        whole = gna_attention(query, key, value, window=(2, 3), grid=(3, 4))
        some = {"query_positions": np.array([[7, 2]]), "key_positions": np.arange(12)[None]}
        mask = np.ones((2, 1, 2, 12), bool)
        part = gna_attention(query[:, [7, 2]], key, value, window=(2, 3), grid=(3, 4), mask=mask, **some)
        close(part, whole[:, [7, 2]])


def test_dropout_differs_between_the_neighborhood_and_the_extra_tokens():
    x = np.ones((1, 4, 1, 2), np.float32)
    call = functools.partial(gna_attention, x, x, x, window=4, dropout_rate=0.5)
    run = functools.partial(call, dropout_key=jax.random.key(0))
    assert set(np.unique(np.round(np.asarray(run()), 4))) <= {0.0, 0.5, 1.0, 1.5, 2.0}
    both = np.asarray(run(extra_key=x, extra_value=x))
    assert not np.allclose(both, np.asarray(run()))


def test_long_images_are_read_in_boxes():
    x = jax.ShapeDtypeStruct((1, 32, 32, 1, 8), jnp.float32)

    def temporary(**options):
        run = jax.jit(functools.partial(gna_attention, window=(7, 7), **options))
        return run.lower(x, x, x).compile(usual_options()).memory_analysis().temp_size_in_bytes

    assert temporary() < temporary(implementation="reference") / 2
    small = np.random.default_rng(0).normal(size=(3, 1, 32, 32, 1, 8)).astype(np.float32)
    np.testing.assert_allclose(
        gna_attention(*small, window=(7, 7)),
        gna_attention(*small, window=(7, 7), implementation="reference"),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 12}, "at most the grid's 11"),
        ({"window": 3, "grid": (3, 4)}, "expected the grid's"),
        ({"window": 3, "query_positions": np.arange(11)}, "together"),
        ({"window": 3, "query_positions": np.arange(11), "key_positions": np.arange(11)}, "need the grid"),
        ({"window": 3, "extra_key": np.ones((2, 1, K, D))}, "together"),
        ({"window": 3, "mask": np.ones((11, 11))}, "mask must be booleans"),
        ({"window": 3, "key": np.ones((2, 10, K, D))}, "expected the grid's"),
        ({"window": 3, "key": np.ones((2, 1, 10, K, D))}, "all alike"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    query, key, value = arrays(11)
    with pytest.raises(ValueError, match=message):
        gna_attention(**{"query": query, "key": key, "value": value, **changes})
    with pytest.raises(ValueError, match="grid of the query"):
        gna_attention(*(np.ones((1, 2, n, 1, 4)) for n in (3, 4, 4)), window=2)
    with pytest.raises(ValueError, match="be that of the query"):
        gna_attention(*(np.ones((1, 2, 3, 1, 4)),) * 3, window=2, grid=(3, 2))
