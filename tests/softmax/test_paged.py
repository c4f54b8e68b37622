"""Attention over pages: put together against plain loops, and by the kernels, in the interpreter, against that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.testing.compiling import quick_jit
from jattn.testing.tolerance import assert_within_policy

B, N, K, D, DV = 3, 6, 2, 24, 20
PAGE, PAGES, COUNT = 32, 3, 11
S = PAGE * PAGES
KERNELS = ("triton", "tpu")
LENGTHS = np.array([1, 71, 96])


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def inputs(lengths=LENGTHS, seed=10, heads=(N, K)):
    """Queries, pools, a table of distinct pages, and lengths."""
    table = np.random.default_rng(seed).permutation(COUNT)[: B * PAGES].reshape(B, PAGES)
    pools = [draw(COUNT, PAGE, heads[1], width, seed=seed + n) for n, width in enumerate((D, DV))]
    return [draw(B, 1, heads[0], D, seed=seed + 2), *pools, table.astype(np.int32), np.asarray(lengths)]


def dense(pool, table):
    return pool[table].reshape(len(table), -1, *pool.shape[2:])


def add_all(logit, b, h, i, j, slope, at_key, pair, table):
    return logit + slope * (j - i) + at_key * pair + table


def mod():
    operands = {"slope": (draw(N, seed=1), "head"), "at_key": (draw(B, 1, S, seed=2), "key")}
    operands |= {"pair": (draw(N, 1, S, seed=3), "pair"), "table": (draw(N, 9, seed=4), "offset")}
    return jattn.ScoreMod(add_all, {n: jattn.Operand(*given) for n, given in operands.items()})


CASES = {
    "ragged": {},
    "nothing to see": {"lengths": [0, 0, 40]},
    "causal": {"mask": jattn.masks.causal(), "query_positions": np.array([[0], [70], [50]])},
    "window": {"mask": jattn.masks.sliding_window(20, num_sinks=3)},
    "mask that holds arrays": {"mask": jattn.masks.prefix(np.array([3, 40, 90]))},
    "mask by head": {"mask": np.random.default_rng(5).random((B, N, 1, S)) < 0.3},
    "keys have positions": {
        "mask": jattn.masks.sliding_window(30),
        "key_positions": np.random.default_rng(6).permutation(S)[None],
    },
    "bias, cap and sinks": {"bias": draw(B, N, 1, S, seed=6), "logit_soft_cap": 2.0, "sinks": draw(N, seed=7)},
    "bias by key": {"bias": draw(1, 1, 1, S, seed=6), "scale": 0.3},
    "score mod": {"score_mod": mod()},
    "one head a key head": {"heads": (3, 3)},
    "sigmoid": {"normalizer": jattn.normalizers.sigmoid()},
    "relu over the number of keys": {"normalizer": jattn.normalizers.relu_over_n(), "mask": jattn.masks.causal()},
}


def split(case):
    case = dict(case)
    arguments = {name: case.pop(name) for name in ("lengths", "heads") if name in case}
    return inputs(**arguments), case


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", CASES)
def test_kernels_are_attention_over_the_pages_put_together(name, kernel):
    with jax.enable_x64(True):
        arrays, options = split(CASES[name])

        @quick_jit
        def both(arrays):
            return [
                jattn.paged_attention(*arrays, **options, implementation=which, return_residual=True)
                for which in (kernel, "reference")
            ]

        found, expected = jax.tree.map(np.asarray, both(arrays))
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-10)
    if name == "nothing to see":
        assert (found[0][:2] == 0).all()
        assert (found[1][:2] == -np.inf).all()


def test_pages_put_together_against_a_loop_over_tokens():
    query, key, value, table, lengths = inputs()
    with jax.enable_x64(True):
        out, lse = jattn.paged_attention(query, key, value, table, lengths, return_residual=True)
    for b, h in np.ndindex(B, N):
        tokens = [(table[b, t // PAGE], t % PAGE, h // (N // K)) for t in range(lengths[b])]
        logits = np.array([key[at] @ query[b, 0, h] for at in tokens]) / np.sqrt(D)
        weights = np.exp(logits - logits.max())
        wanted = weights @ np.array([value[at] for at in tokens]) / weights.sum()
        np.testing.assert_allclose(out[b, 0, h], wanted, rtol=1e-12)
        np.testing.assert_allclose(lse[b, 0, h], np.log(np.exp(logits).sum()), rtol=1e-12)


@pytest.mark.parametrize("implementation", [None, "blockwise"])
def test_several_queries_see_as_the_last_tokens(implementation):
    _, key, value, table, lengths = inputs([20, 71, 96])
    query = draw(B, 5, N, D, seed=1)
    with jax.enable_x64(True):
        found = jattn.paged_attention(
            query, key, value, table, lengths, mask=jattn.masks.causal(), implementation=implementation
        )
        for b, n in enumerate(lengths):
            tokens = [dense(x, table)[b : b + 1, :n] for x in (key, value)]
            whole = jattn.dot_product_attention(
                np.concatenate([np.zeros((1, n - 5, N, D)), query[b : b + 1]], 1), *tokens, is_causal=True
            )
            np.testing.assert_allclose(found[b], whole[0, -5:], rtol=1e-10, atol=1e-12)


def as_float32(arrays):
    return [x.astype(np.float32) if x.dtype == np.float64 else x for x in arrays]


@pytest.mark.parametrize("implementation", [None, *KERNELS])
def test_where_pages_lie_changes_no_bit(implementation):
    query, key, value, table, lengths = as_float32(inputs())
    order = np.random.default_rng(3).permutation(COUNT)
    moved = [np.empty_like(x) for x in (key, value)]
    for new, old in zip(moved, (key, value), strict=True):
        new[order] = old
    run = quick_jit(lambda *arrays: jattn.paged_attention(*arrays, implementation=implementation))
    found, expected = run(query, *moved, order[table].astype(np.int32), lengths), run(query, key, value, table, lengths)
    np.testing.assert_array_equal(found, expected)
    # A shared prefix: two rows name the same pages.
    table[1, :2] = table[2, :2]
    apart = [np.concatenate([x, x[table[2, :2]]]) for x in (key, value)]
    other = table.copy()
    other[1, :2] = COUNT, COUNT + 1
    np.testing.assert_array_equal(run(query, key, value, table, lengths), run(query, *apart, other, lengths))


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_page_a_row_is_a_contiguous_cache(kernel):
    query, key, value, table, lengths = as_float32(inputs())
    key, value = dense(key, table), dense(value, table)
    out = jattn.paged_attention(query, key, value, np.arange(B)[:, None], lengths, implementation=kernel)
    wanted = jattn.dot_product_attention(query, key, value, key_value_seq_lengths=lengths)
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", [None, *KERNELS])
def test_nothing_beyond_the_lengths_is_seen(implementation):
    query, key, value, table, lengths = as_float32(inputs([0, 40, 96]))
    run = quick_jit(lambda *arrays: jattn.paged_attention(*arrays, implementation=implementation))
    expected = run(query, key, value, table, lengths)
    held = {page for b in range(B) for page in table[b, : -(-lengths[b] // PAGE)]}
    for n, x in enumerate((key, value)):
        x[[page for page in range(COUNT) if page not in held]] = (np.nan, np.inf)[n]
        x[table[1, 1], 40 - PAGE :] = np.nan
    table[0] = (-1, COUNT, 2**31 - 1)
    table[1, 2] = -(2**31)
    np.testing.assert_array_equal(run(query, key, value, table, lengths), expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_are_those_of_the_pages_put_together(kernel):
    arrays, given = inputs(), {"bias": draw(1, N, 1, S, seed=1), "sinks": draw(N, seed=2)}
    with jax.enable_x64(True):

        def gradients(implementation):
            def loss(query, key, value, given, scale):
                out, lse = jattn.paged_attention(
                    query, key, value, *arrays[3:], **given, scale=scale, implementation=implementation,
                    return_residual=True,
                )  # fmt: skip
                return jnp.sin(out).sum() + (lse**2).sum()

            return quick_jit(jax.grad(loss, (0, 1, 2, 3, 4)))(*arrays[:3], given, jnp.asarray(0.3))

        found, expected = gradients(kernel), gradients("reference")
    for got, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_is_within_the_policy(kernel):
    arrays = inputs()
    low = [jnp.asarray(x, jnp.bfloat16) for x in arrays[:3]]
    out, plain = (jattn.paged_attention(*low, *arrays[3:], implementation=which) for which in (kernel, "reference"))
    assert out.dtype == jnp.bfloat16
    with jax.enable_x64(True):
        truth = jattn.paged_attention(*(np.asarray(x, np.float64) for x in low), *arrays[3:])
    assert_within_policy(out, plain, np.asarray(truth))


@pytest.mark.parametrize("kernel", KERNELS)
def test_vmap_over_layers(kernel):
    query, key, value, table, lengths = as_float32(inputs())
    layers = [np.stack([x, x[::-1]]) for x in (query, key, value)]
    run = lambda *arrays: jattn.paged_attention(*arrays, table, lengths, implementation=kernel)  # noqa: E731
    found = quick_jit(jax.vmap(run))(*layers)
    for n in range(2):
        np.testing.assert_allclose(found[n], run(*(x[n] for x in layers)), rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused():
    query, key, value, table, lengths = as_float32(inputs())
    for wrong, message in (
        ((query[0], key, value, table, lengths), "query has shape"),
        ((query, key[0], value, table, lengths), "key_pool has shape"),
        ((query, key, value[:, :5], table, lengths), "value_pool has shape"),
        ((query, key, value, table[:2], lengths), "block_table has shape"),
        ((query, key, value, table * 1.0, lengths), "block_table has dtype"),
        ((query, key, value, table, lengths[:2]), "lengths has shape"),
        ((query[:, :, :5], key, value, table, lengths), "paged_attention: key has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            jattn.paged_attention(*wrong)
    with pytest.raises(ValueError, match="unknown implementation 'flash'.* triton, tpu"):
        jattn.paged_attention(query, key, value, table, lengths, implementation="flash")
    with pytest.raises(TypeError, match="must be known while tracing"):
        jattn.paged_attention(query, key, value, table, lengths, logit_soft_cap=jnp.ones(()))
    with pytest.raises(NotImplementedError, match="2 queries a row.*'blockwise' does"):
        jattn.paged_attention(np.repeat(query, 2, 1), key, value, table, lengths, implementation="triton")
    normalizer = jattn.normalizers.reweighted(jattn.normalizers.softmax())
    with pytest.raises(NotImplementedError, match="two passes.*'blockwise' does"):
        jattn.paged_attention(query, key, value, table, lengths, implementation="tpu", normalizer=normalizer)
    with pytest.raises(ValueError, match="pages of 9 tokens.*multiples of 16 can"):
        jattn.paged_attention(query, key[:, :9], value[:, :9], table, lengths % 27, implementation="triton")
