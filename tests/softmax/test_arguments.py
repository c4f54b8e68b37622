"""Every argument of the entry point: refused by name when bad (contract 9), with jax.nn's meaning where it has one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn

B, T, S, N, K, D, DV = 2, 6, 5, 4, 2, 3, 7
IMPLEMENTATIONS = ("reference", "blockwise")


def arrays(source=S, width=DV, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"query": (B, T, N, D), "key": (B, source, K, D), "value": (B, source, K, width)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def attend(**arguments):
    return jattn.dot_product_attention(**{**arrays(), **arguments})


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


LAYOUT = jattn.layouts.from_block_mask(
    np.ones((2, 2), bool), query_slots=T + 1, key_slots=S, query_block=4, key_block=4
)

BAD_VALUES = {
    # argument: (value, what the message holds)
    "query, rank 2": ({"query": zeros(T, N)}, "query has shape (6, 4); expected rank 4"),
    "query, rank 3 alone": (
        {"query": zeros(T, N, D)},
        "key has shape (2, 5, 2, 3); expected rank 4 (B, T, N, D) or rank 3",
    ),
    "query, empty": ({"query": zeros(B, 0, N, D)}, "query has shape (2, 0, 4, 3); expected at least one position"),
    "query, integers": (
        {"query": zeros(B, T, N, D, dtype=np.int16)},
        "query has dtype int16 (shape (2, 6, 4, 3)); expected floats",
    ),
    "key, batch": (
        {"key": zeros(3, S, K, D)},
        "key has shape (3, 5, 2, 3); expected (2, S, K, 3) with K a divisor of 4",
    ),
    "key, heads": (
        {"key": zeros(B, S, 3, D)},
        "key has shape (2, 5, 3, 3); expected (2, S, K, 3) with K a divisor of 4",
    ),
    "key, width": ({"key": zeros(B, S, K, 4)}, "key has shape (2, 5, 2, 4)"),
    "key, dtype": (
        {"key": zeros(B, S, K, D, dtype=np.float16)},
        "key has dtype float16; expected the dtype of query, float32",
    ),
    "value, length": ({"value": zeros(B, 4, K, DV)}, "value has shape (2, 4, 2, 7); expected (2, 5, 2, Dv)"),
    "value, heads": ({"value": zeros(B, S, N, DV)}, "value has shape (2, 5, 4, 7); expected (2, 5, 2, Dv)"),
    "bias, shape": (
        {"bias": zeros(N, T, T)},
        "bias has shape (4, 6, 6); expected something that broadcasts to (B, N, T, S)",
    ),
    "bias, rank": ({"bias": zeros(1, 1, 1, 1, 1)}, "bias has shape (1, 1, 1, 1, 1)"),
    "bias, booleans": (
        {"bias": zeros(T, S, dtype=bool)},
        "bias has dtype bool (shape (6, 5)); expected floats (booleans go to mask)",
    ),
    "mask, floats": ({"mask": zeros(T, S)}, "mask has dtype float32 (shape (6, 5)); expected booleans"),
    "mask, shape": (
        {"mask": zeros(S, dtype=bool).repeat(2)},
        "mask has shape (10,); expected something that broadcasts",
    ),
    "mask, its arrays": ({"mask": jattn.masks.prefix(np.array([1, 2, 3]))}, "mask: prefix length has shape (3,)"),
    "scale, shape": ({"scale": zeros(T)}, "scale has shape (6,); expected a scalar"),
    "query lengths, shape": (
        {"query_seq_lengths": zeros(3, dtype=int)},
        "query_seq_lengths has shape (3,); expected integers of shape (2,)",
    ),
    "key lengths, dtype": (
        {"key_value_seq_lengths": zeros(2)},
        "key_value_seq_lengths has dtype float32 (shape (2,)); expected integers",
    ),
    "window, negative": ({"local_window_size": -1}, "local_window_size has value -1; expected an int >= 0 or a pair"),
    "window, three": ({"local_window_size": (1, 2, 3)}, "local_window_size has value (1, 2, 3)"),
    "window, float": ({"local_window_size": 1.5}, "local_window_size has value 1.5"),
    "implementation": (
        {"implementation": "flash"},
        "unknown implementation 'flash'; this version has reference, blockwise",
    ),
    "segments, one array": ({"segment_ids": zeros(B, T, dtype=int)}, "segment_ids has one array; expected a pair"),
    "segments, three": ({"segment_ids": (0, 0, 0)}, "segment_ids has 3 entries; expected an array [B, T] or a pair"),
    "segments, keys": (
        {"segment_ids": (zeros(B, T, dtype=int),) * 2},
        "segment_ids (of keys) has shape (2, 6); expected (2 or 1, 5)",
    ),
    "segments, floats": ({"segment_ids": (zeros(B, T), zeros(B, S))}, "segment_ids (of queries) has dtype float32"),
    "positions, shape": (
        {"query_positions": zeros(B, S, dtype=int)},
        "query_positions has shape (2, 5); expected (2 or 1, 6)",
    ),
    "positions, floats": (
        {"key_positions": zeros(B, S)},
        "key_positions has dtype float32 (shape (2, 5)); expected integers",
    ),
    "layout, size": ({"layout": LAYOUT}, "layout.query_slots is 7, but there are 6 query tokens"),
    "cap, zero": ({"logit_soft_cap": 0.0}, "logit_soft_cap has value 0.0; expected a positive number"),
    "cap, infinite": ({"logit_soft_cap": np.inf}, "logit_soft_cap has value inf; expected a positive number"),
    "sinks, shape": ({"sinks": zeros(K)}, "sinks has shape (2,); expected floats of shape (4,)"),
    "sinks, dtype": (
        {"sinks": zeros(N, dtype=int)},
        "sinks has dtype int64 (shape (4,)); expected floats of shape (4,)",
    ),
    "sinks, normalizer": (
        {"sinks": zeros(N), "normalizer": jattn.normalizers.sigmoid()},
        "sinks join a softmax; Pointwise",
    ),
    "rate, one": ({"dropout_rate": 1.0}, "dropout_rate has value 1.0; expected a probability in [0, 1)"),
    "rate, nan": ({"dropout_rate": np.nan}, "dropout_rate has value nan"),
    "rate, no key": ({"dropout_rate": 0.1}, "dropout_rate > 0 needs dropout_key, a key of jax.random"),
    "precision": ({"precision": "lots"}, "precision has value 'lots'; expected what jax.lax.dot_general takes"),
    "blocks, one": ({"block_sizes": 128}, "block_sizes has value 128; expected a pair of positive ints"),
    "blocks, zero": ({"block_sizes": (0, 8)}, "block_sizes has value (0, 8)"),
    "blocks, floats": ({"block_sizes": (8.0, 8)}, "block_sizes has value (8.0, 8)"),
}

BAD_TYPES = {
    "query": ({"query": "abc"}, "query is str; expected floats"),
    "bias": ({"bias": object()}, "bias is object; expected floats"),
    "mask": ({"mask": jattn.masks.causal}, "mask is function; expected booleans that broadcast to (B, N, T, S)"),
    "scale": ({"scale": "big"}, "scale is str; expected a number"),
    "is_causal": ({"is_causal": "yes"}, "is_causal is str; expected True or False"),
    "score_mod": ({"score_mod": max}, "score_mod is builtin_function_or_method; expected a ScoreMod"),
    "layout": ({"layout": zeros(2, 2)}, "layout is ndarray; expected a BlockLayout"),
    "cap": ({"logit_soft_cap": "soft"}, "logit_soft_cap is str; expected a positive number"),
    "normalizer": ({"normalizer": "softmax"}, "normalizer is str; expected a Normalizer"),
    "rate": ({"dropout_rate": None}, "dropout_rate is NoneType; expected a probability"),
    "dropout key": (
        {"dropout_rate": 0.1, "dropout_key": zeros(3)},
        "dropout_key is ndarray; expected one key of jax.random",
    ),
}


def refuses(error, arguments, message):
    """Before tracing, both when called and when asked to explain."""
    for call in (jattn.dot_product_attention, jattn.explain):
        with pytest.raises(error) as caught:
            call(**{**arrays(), **arguments})
        assert message in str(caught.value)
        assert "dot_product_attention: " in str(caught.value) or message.startswith(("layout.", "mask: "))


@pytest.mark.parametrize("case", list(BAD_VALUES))
def test_bad_values(case):
    refuses(ValueError, *BAD_VALUES[case])


@pytest.mark.parametrize("case", list(BAD_TYPES))
def test_bad_types(case):
    refuses(TypeError, *BAD_TYPES[case])


@pytest.mark.parametrize("name", ["logit_soft_cap", "dropout_rate"])
def test_what_must_be_known_while_tracing(name):
    with pytest.raises(TypeError, match=f"{name} is .*; expected .* known while tracing"):
        jax.jit(lambda x: attend(**{name: x}))(0.5)


def peer_cases():
    rng = np.random.default_rng(1)
    mask = rng.random((B, N, T, T)) < 0.6
    mask |= np.eye(T, dtype=bool)
    bias = rng.normal(size=(B, N, T, T)).astype(np.float32)
    lengths = np.array([4, 6], np.int32)
    return {
        "plain": {},
        "bias": {"bias": bias},
        "bias of one head": {"bias": bias[:1, :1]},
        "mask": {"mask": mask},
        "mask of rank 3": {"mask": mask[0]},
        "scale": {"scale": 0.7},
        "causal": {"is_causal": True},
        "query lengths": {"query_seq_lengths": lengths},
        "key lengths": {"key_value_seq_lengths": lengths},
        "both lengths, causal": {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths, "is_causal": True},
        "window": {"local_window_size": 2},
        "window of two sides": {"local_window_size": (3, 1)},
        "window, causal": {"local_window_size": (2, 2), "is_causal": True},
        "bias, mask, causal, window, scale": {
            "bias": bias,
            "mask": mask,
            "is_causal": True,
            "local_window_size": (4, 4),
            "scale": 0.5,
        },
    }


PEER_CASES = peer_cases()


def same_as_jax(ours, arguments):
    inputs = arrays(T, D)
    out, lse = jax.jit(functools.partial(jax.nn.dot_product_attention, return_residual=True, **arguments))(**inputs)
    for implementation in IMPLEMENTATIONS:
        call = functools.partial(ours, return_residual=True, implementation=implementation, **arguments)
        found = jax.jit(call)(**inputs)
        # Rows past the query length: jax.nn lets their residual stand.
        alive = np.isfinite(found[1])
        assert alive.any(-1).all() or "query_seq_lengths" in arguments
        np.testing.assert_allclose(found[0], out, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(np.asarray(found[1])[alive], np.asarray(lse)[alive], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("case", list(PEER_CASES))
def test_every_argument_means_what_it_means_in_jax_nn(case):
    same_as_jax(jattn.dot_product_attention, PEER_CASES[case])


def test_the_signature_begins_with_that_of_jax_nn():
    import inspect

    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    ours = inspect.signature(jattn.dot_product_attention).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert (ours[name].default, ours[name].kind) == (parameter.default, parameter.kind)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inputs_without_batch(implementation):
    inputs = {name: x[0] for name, x in arrays(T, D).items()}
    arguments = {"bias": PEER_CASES["bias"]["bias"][0], "mask": PEER_CASES["mask"]["mask"][0], "is_causal": True}
    expected = jax.nn.dot_product_attention(**inputs, **arguments, return_residual=True)
    found = jattn.dot_product_attention(**inputs, **arguments, return_residual=True, implementation=implementation)
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6)
    assert jattn.dot_product_attention(**inputs).shape == (T, N, D)
    ids = np.array([0, 0, 0, 1, 1, -1])
    assert not np.asarray(jattn.dot_product_attention(**inputs, segment_ids=ids, implementation=implementation))[
        5
    ].any()


def test_the_four_places_where_jattn_differs():
    """Empty rows, the residual's gradient and dtype, the width of values, hidden NaN."""
    inputs = arrays(T, D)
    nobody = np.zeros((1, 1, T, 1), bool)
    assert not np.asarray(attend(**inputs, mask=nobody)).any()
    assert np.asarray(jax.nn.dot_product_attention(**inputs, mask=nobody)).any()
    slope = jax.grad(lambda q: jattn.dot_product_attention(**{**inputs, "query": q}, return_residual=True)[1].sum())
    assert np.abs(slope(inputs["query"])).max() > 0.1
    half = {name: jnp.asarray(x, jnp.bfloat16) for name, x in inputs.items()}
    out, lse = jattn.dot_product_attention(**half, return_residual=True)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    assert attend().shape == (B, T, N, DV)
    spoiled = {**inputs, "value": np.where(np.arange(T)[:, None, None] == 4, np.nan, inputs["value"])}
    assert np.isfinite(jattn.dot_product_attention(**spoiled, key_value_seq_lengths=np.array([4, 4]))).all()


def test_array_likes():
    inputs = arrays()
    lists = {name: x.tolist() for name, x in inputs.items()}
    ids = ([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 2, 2]], [[0, 0, 1, 1, 1], [0, 0, 0, 2, 2]])
    listed = {"mask": np.ones((T, S), bool).tolist(), "bias": np.ones((T, S)).tolist(), "sinks": [0.0] * N}
    positions = {"query_positions": [[5, 4, 3, 2, 1, 0]], "key_positions": list(range(S)), "segment_ids": ids}
    found = jattn.dot_product_attention(**lists, **listed, **positions)
    arrayed = {name: np.asarray(x) for name, x in {**listed, **positions}.items() if name != "segment_ids"}
    expected = attend(**arrayed, segment_ids=tuple(np.asarray(x) for x in ids))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_list_of_two_rows_is_no_pair():
    """[[...], [...]] are the ids of a batch of two."""
    inputs, rows = arrays(T, D), [[0, 0, 0, 1, 1, 1], [0, 1, 2, 3, 4, 5]]
    found = jattn.dot_product_attention(**inputs, segment_ids=rows)
    np.testing.assert_array_equal(found, jattn.dot_product_attention(**inputs, segment_ids=np.array(rows)))


def test_unsigned_and_narrow_positions_do_not_wrap_around():
    inputs = arrays(T, D)
    window = {"local_window_size": (2, 200)}
    expected = jattn.dot_product_attention(**inputs, **window)
    for dtype in (np.uint32, np.int8, np.uint8):
        positions = {name: np.arange(T, dtype=dtype)[None] for name in ("query_positions", "key_positions")}
        np.testing.assert_array_equal(jattn.dot_product_attention(**inputs, **window, **positions), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_traced_scale_has_a_gradient(implementation, x64):
    inputs = {name: x.astype(np.float64) for name, x in arrays().items()}

    def loss(scale, fold):
        query = inputs["query"] * scale if fold else inputs["query"]
        options = {"scale": 1.0 if fold else scale, "implementation": implementation}
        return jnp.sin(jattn.dot_product_attention(**{**inputs, "query": query}, **options)).sum()

    found, expected = (jax.jit(jax.grad(loss), static_argnums=1)(0.7, fold) for fold in (False, True))
    assert abs(expected) > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_visible_nan_is_not_hidden():
    inputs = arrays()
    inputs["query"][0, 1, 2] = np.nan
    for implementation in IMPLEMENTATIONS:
        for bias in (None, np.zeros((1, 1, T, S), np.float32)):
            out, lse = attend(**inputs, bias=bias, implementation=implementation, return_residual=True)
            expected = np.zeros((B, T, N), bool)
            expected[0, 1, 2] = True
            np.testing.assert_array_equal(np.isnan(lse), expected)
            np.testing.assert_array_equal(np.isnan(out).all(-1), expected)
            assert np.isfinite(np.asarray(out)[~expected]).all()
