import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn import Operand, ScoreMod, dot_product_attention
from jattn.softmax import gather
from jattn.softmax.gather import gather_attention
from jattn.testing.compiling import quick_jit, usual_options
from jattn.testing.tolerance import assert_within_policy

B, T, S, N, K, D, DV, CHOSEN = 2, 13, 17, 6, 2, 8, 5, 4


def modified(logit, b, h, i, j, slope, table, pair, key_shift):
    return logit * slope + table + jnp.tanh(pair) + key_shift * jnp.sin(1.0 * i)


def inputs(heads=N, query_block=1, rows=B, seed=0):
    rng = np.random.default_rng(seed)
    arrays = {
        "query": rng.normal(size=(B, T, N, D)),
        "key": rng.normal(size=(B, S, K, D)),
        "value": rng.normal(size=(B, S, K, DV)),
    }
    groups = -(-T // query_block)
    index = rng.permuted(np.broadcast_to(np.arange(S), (rows, heads, groups, S)), axis=-1)[..., :CHOSEN]
    valid = rng.random(index.shape) < 0.7
    valid[:, :, 1] = False
    return {k: v.astype(np.float32) for k, v in arrays.items()}, index, valid


def dense_mask(index, valid, query_block):
    mask = np.zeros((*index.shape[:3], S), bool)
    np.put_along_axis(mask, index, valid, -1)
    for where in np.argwhere(valid):
        mask[tuple(where[:3])][index[tuple(where)]] = True
    mask = np.repeat(mask, query_block, 2)[:, :, :T]
    return np.repeat(mask, N // mask.shape[1], 1)


def extras(rng):
    return {
        "bias": rng.normal(size=(1, N, T, S)).astype(np.float32),
        "weight": rng.normal(size=(B, K, S)).astype(np.float32),
        "slope": rng.normal(size=N).astype(np.float32),
        "table": rng.normal(size=(N, 9)).astype(np.float32),
        "pair": rng.normal(size=(B, 1, T, S)).astype(np.float32),
        "key_shift": rng.normal(size=S).astype(np.float32),
    }


def score_mod(extra):
    kinds = {"slope": "head", "table": "offset", "pair": "pair", "key_shift": "key"}
    return ScoreMod(modified, {name: Operand(extra[name], kind) for name, kind in kinds.items()})


def weighted(out, lse):
    """A loss that takes part of both results, leaving out what is -inf."""
    return (out * jnp.sin(jnp.arange(out.size).reshape(out.shape))).sum() + jnp.where(lse > -jnp.inf, lse, 0).sum()


def plain_loss(arrays, extra, mask, options):
    bias = extra["bias"] + jnp.repeat(extra["weight"], N // K, 1)[:, :, None]
    out, lse = dot_product_attention(
        **arrays,
        mask=mask,
        bias=bias,
        score_mod=score_mod(extra),
        implementation="reference",
        return_residual=True,
        **options,
    )
    return weighted(out, lse), (out, lse)


def our_loss(arrays, extra, index, valid, query_block, options):
    out, lse = gather_attention(
        **arrays,
        index=index,
        valid=valid,
        query_block=query_block,
        bias=extra["bias"],
        key_log_weight=extra["weight"],
        score_mod=score_mod(extra),
        return_residual=True,
        **options,
    )
    return weighted(out, lse), (out, lse)


@pytest.mark.parametrize(
    ("heads", "query_block", "rows", "chunked"), [(N, 1, B, False), (K, 4, B, True), (1, 1, 1, True)]
)
def test_equals_the_masked_reference_with_every_gradient(heads, query_block, rows, chunked, monkeypatch):
    if chunked:
        monkeypatch.setattr(gather, "LEAST_BUDGET", 1)
    arrays, index, valid = inputs(heads, query_block, rows)
    extra = extras(np.random.default_rng(1))
    positions = np.arange(3, T + 3, dtype=np.int32)[None]
    options = {"logit_soft_cap": 2.0, "scale": 0.5, "query_positions": positions}
    mask = dense_mask(index, valid, query_block)
    plain = quick_jit(jax.value_and_grad(lambda a, e: plain_loss(a, e, mask, options), (0, 1), has_aux=True))
    ours = quick_jit(
        jax.value_and_grad(lambda a, e: our_loss(a, e, index, valid, query_block, options), (0, 1), has_aux=True)
    )
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(np.float64), (arrays, extra))
        truth = plain(*wide)
    rough, found = plain(arrays, extra), ours(arrays, extra)
    empty = np.broadcast_to(~mask.any(-1).swapaxes(1, 2), (B, T, N))
    np.testing.assert_array_equal(np.asarray(found[0][1][0])[empty], 0)
    np.testing.assert_array_equal(np.asarray(found[0][1][1])[empty], -np.inf)
    # Leaf 0 is the loss: of one number there is no RMS to judge.
    leaves = zip(jax.tree.leaves_with_path(truth), jax.tree.leaves(rough), jax.tree.leaves(found), strict=True)
    for (path, exact), near, got in list(leaves)[1:]:
        shown = np.isfinite(exact)
        assert_within_policy(
            np.asarray(got)[shown], np.asarray(exact)[shown], np.asarray(near)[shown], what=jax.tree_util.keystr(path)
        )


def test_what_is_not_selected_may_be_nan():
    arrays, index, valid = inputs(1, 1, 1)
    index = np.where(index == 5, 6, index)
    valid = valid & (np.cumsum(index == 6, -1) * (index == 6) <= 1) & (index != 0)
    bias = np.zeros((1, 1, T, S), np.float32)

    def run(arrays, bias):
        return gather_attention(**arrays, index=index, valid=valid, bias=bias, return_residual=True)

    def loss(arrays, bias):
        return weighted(*run(arrays, bias))

    calm = jax.jit(jax.value_and_grad(loss, (0, 1)))
    expected = calm(arrays, bias)
    poisoned = {k: v.copy() for k, v in arrays.items()}
    for name in ("key", "value"):
        poisoned[name][:, [0, 5]] = np.nan
    poisoned["query"][:, 1] = np.nan
    bias = np.where(dense_mask(index, valid, 1)[:1, :1], bias, np.nan)
    jax.tree.map(np.testing.assert_array_equal, calm(poisoned, bias), expected)


def test_weights_of_minus_infinity_hide_and_logarithms_of_counts_repeat():
    arrays, _, _ = inputs()
    counts = np.random.default_rng(2).integers(0, 4, S)
    with np.errstate(divide="ignore"):
        weight = np.log(counts).astype(np.float32)[None, None]
    index = np.broadcast_to(np.arange(S), (1, 1, T, S))
    arrays["value"][:, counts == 0] = np.nan
    every = np.ones(index.shape, bool)
    ours = jax.jit(lambda a: gather_attention(**a, index=index, valid=every, key_log_weight=weight))(arrays)
    repeated = {n: x if n == "query" else np.repeat(x, counts, 1) for n, x in arrays.items()}
    np.testing.assert_allclose(ours, dot_product_attention(**repeated, implementation="reference"), atol=2e-6)


def test_batching_and_forward_mode_agree_with_the_plain_call():
    arrays, index, valid = inputs(1, 4, 1)

    @jax.jit
    def run(arrays):
        return gather_attention(**arrays, index=index, valid=valid, query_block=4, return_residual=True)

    expected = run(arrays)
    pairs = jax.tree.map(lambda x: np.stack([x, x[::-1]]), arrays)
    mapped = jax.jit(jax.vmap(run))(pairs)
    for got, want in zip(mapped, expected, strict=True):
        np.testing.assert_allclose(got[0], want, rtol=1e-5, atol=1e-6)
    tangents = jax.tree.map(np.cos, arrays)

    def loss(arrays):
        return weighted(*run(arrays))

    @jax.jit
    def derivatives(arrays, tangents):
        _, forward = jax.jvp(loss, (arrays,), (tangents,))
        return forward, *jax.jvp(jax.grad(loss), (arrays,), (tangents,))

    forward, gradient, second = derivatives(arrays, tangents)
    backward = jax.tree.map(np.vdot, gradient, tangents)
    np.testing.assert_allclose(forward, sum(backward.values()), rtol=1e-4)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(second))


def test_memory_grows_linearly():
    def temporary(length):
        shape = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.float32)
        index = jax.ShapeDtypeStruct((1, 1, length, 64), jnp.int32)
        valid = jax.ShapeDtypeStruct(index.shape, jnp.bool_)

        def loss(q, k, v, index, valid):
            return gather_attention(q, k, v, index, valid).sum()

        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape, index, valid)
        return lowered.compile(usual_options()).memory_analysis().temp_size_in_bytes

    # Gathering all rows at once would take 2 * 64 * 64 * 4 bytes a query, 268 MB at the larger length.
    assert temporary(8192) < min(2 * temporary(4096) + 2**22, 64 * 2**20)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"index": np.zeros((B, 4, T, 2), int)}, "index"),
        ({"index": np.zeros((B, N, T, 2))}, "index"),
        ({"index": np.full((B, N, T, CHOSEN), S)}, "range"),
        ({"index": np.zeros((B, N, T, CHOSEN), int)}, "twice"),
        ({"valid": np.zeros((B, N, T, 1), bool)}, "valid"),
        ({"query_block": 2}, "index"),
        ({"query_block": 0}, "query_block"),
        ({"key_log_weight": np.zeros((B, 4, S))}, "key_log_weight"),
        ({"bias": np.zeros((3, 1, 1, 1))}, "gather_attention: bias"),
        ({"query": np.zeros((T, N, D), np.float32)}, "query|key"),
    ],
)
def test_bad_arguments_are_named(change, named):
    arrays, index, valid = inputs()
    valid[:] = True
    with pytest.raises(ValueError, match=named):
        gather_attention(**(arrays | {"index": index, "valid": valid} | change))
