"""The hook inside one call: what it changes, what it observes, and that a hook of nothing is not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.probes import OBSERVABLE, AttnHook, Reweight, attention, per_query_head, renormalize
from jattn.probes.call import make_call
from jattn.testing.compiling import quick_jit


def plain(query, key, value, *, mask=None, is_causal=False):
    """A function of (query, key, value) form that is not the engine, and linear in its values."""
    return jattn.dot_product_attention(query, key, value, mask=mask, is_causal=is_causal)


def scale_query(query, key, value, params):
    return query * params, key, value


def halve(weights, params):
    return weights / 2


def double(weights, params, factor):
    return weights * factor


def add(logit, b, h, i, j, slope):
    return logit + slope * (j - i)


def toward_value(output, value, params):
    return (1 - params) * output + params * value, {"norm": jnp.sqrt((output**2).sum(-1))}


def toward_identity(weights, params):
    return (1 - params) * weights + params * jnp.eye(weights.shape[-1])


def overwrite(weights, params):
    return params


def entropy_of(weights):
    positive = weights > 0
    return -jnp.where(positive, weights * jnp.log(jnp.where(positive, weights, 1)), 0).sum(-1).swapaxes(1, 2)


@pytest.mark.parametrize("function", [jattn.dot_product_attention, plain])
def test_a_hook_of_nothing_traces_to_the_plain_call(arrays, function):
    def traced(**more):
        return str(jax.make_jaxpr(lambda a: attention(**a, is_causal=True, attention_fn=function, **more)[0])(arrays))

    expected = str(jax.make_jaxpr(lambda a: function(**a, is_causal=True))(arrays))
    nothing = AttnHook(reweight=Reweight(groups=np.zeros(7, int)), rows=np.array([0]), heads=(1,), params=1.0)
    assert traced() == traced(hook=AttnHook()) == traced(hook=nothing) == expected
    assert attention(**arrays, hook=AttnHook())[1] == {}


def test_hooks_that_differ_in_arrays_share_a_program(arrays):
    def hook(seed):
        random = np.random.default_rng(seed)
        return AttnHook(
            bias=random.normal(size=7),
            reweight=Reweight(log_factor=random.normal(size=7), coef=renormalize),
            weights=functools.partial(double, factor=2.0),
            rows=np.array([seed]),
            heads=[1, 2],
            params=random.normal(),
            observe=["entropy"],
        )

    traces = []

    @jax.jit
    def run(hook):
        traces.append(hook)
        return attention(**arrays, hook=hook)

    first, second = run(hook(0))[0], run(hook(1))[0]
    assert len(traces) == 1
    assert str(jax.make_jaxpr(run)(hook(0))) == str(jax.make_jaxpr(run)(hook(1)))
    assert not np.allclose(first, second)


def test_what_joins_before_the_normalizer(arrays, mask, dense, mixed, equal):
    """Those of the hook join those of the call; NaN where nobody looks stays there."""
    slope = np.array([0.1, 0.2, 0.3, 0.4])
    arrays = {**arrays, "first": np.ones((4, 1, 7)), "second": np.linspace(0, 1, 7), "slope": slope, "gain": 1.5}
    own, other = mask | (np.arange(7) == 5), mask | (np.arange(7) == 6)
    assert ((own & other) == mask).all()

    def hooked(a):
        mod = jattn.ScoreMod(add, {"slope": jattn.Operand(a["slope"], "head")})
        hook = AttnHook(
            qkv=scale_query, params=a["gain"], bias=a["second"], mask=other, score_mod=mod, observe={"row_weights"}
        )
        poison = np.where(np.arange(7) == 3, np.nan, 0)[:, None, None]
        key, value = a["key"] + poison, a["value"] + poison
        return attention(a["query"], key, value, a["first"], own, score_mod=mod, hook=hook, logit_soft_cap=2.0)

    def truth(a):
        distance = np.arange(7) - np.arange(5)[:, None]
        bias = a["first"] + a["second"] + 2 * a["slope"][:, None, None] * distance
        weights = dense(a["gain"] * a["query"], a["key"], mask, bias=bias, cap=2.0)
        return mixed(weights, a["value"]), {"row_weights": weights}

    equal(hooked, truth, arrays)


@pytest.mark.parametrize("function", [jattn.dot_product_attention, plain])
@pytest.mark.parametrize("placed", [False, True])
def test_masks_of_both_kinds_intersect(arrays, mask, function, placed):
    """A Mask looks at positions, an array at indices; either may be the hook's."""
    given = {}
    if placed and function is not plain:
        given = {"query_positions": np.arange(2, 7)[None], "key_positions": np.arange(7)[None] + 1}
    causal = jattn.masks.causal()
    seen = causal.to_dense(2, 4, 5, 7, **given)
    run = functools.partial(attention, **arrays, attention_fn=function, **given)
    expected = run(mask=mask & seen)[0]
    for own, other in ((mask, causal), (causal, mask), (mask, np.asarray(seen)), (causal, jattn.masks.dense(mask))):
        if placed and isinstance(other, jattn.Mask) and other is not causal:
            continue
        np.testing.assert_allclose(run(mask=own, hook=AttnHook(mask=other))[0], expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(run(hook=AttnHook(mask=(causal, mask)))[0], expected, rtol=1e-6, atol=1e-7)


def test_observations_are_those_of_the_dense_weights(arrays, mask, dense, mixed, equal):
    """GQA, T != S, a dead row; entropy in both of its forms; column masses by key head and by query head."""
    groups = np.array([0, 0, 1, 3, 1, 3, 3])
    arrays = {**arrays, "row_weight": np.linspace(0.5, 1.5, 5), "zero": np.zeros(7)}

    def hooked(a):
        hook = AttnHook(
            observe=OBSERVABLE,
            reweight=Reweight(groups=groups, num_groups=4),
            row_weight=a["row_weight"],
            rows=np.array([[0, -1], [3, 1]]),
            heads=(3, 0),
        )
        qkv = (a["query"], a["key"], a["value"])
        dense_form = attention(*qkv, a["zero"], mask, hook=AttnHook(observe="entropy"))[1]
        each = attention(*qkv, mask=mask, hook=AttnHook(qkv=per_query_head, observe="col_mass"))[1]
        return attention(*qkv, mask=mask, hook=hook), dense_form, each

    def truth(a):
        weights = dense(a["query"], a["key"], mask)
        columns = jnp.einsum("t,bnts->bsn", a["row_weight"], weights)
        logits = jnp.einsum("btngd,bsnd->bngts", a["query"].reshape(2, 5, 2, 2, 4), a["key"]).reshape(2, 4, 5, 7) / 2
        total = jnp.where(mask, jnp.exp(logits), 0).sum(-1)
        alive = mask.any(-1)
        entropy = {"entropy": entropy_of(dense(a["query"], a["key"], mask, bias=a["zero"]))}
        rows = jnp.array([[0, 4], [3, 1]])
        aux = {
            "entropy": entropy_of(weights),
            "lse": jnp.where(alive, jnp.log(jnp.where(alive, total, 1)), -jnp.inf).swapaxes(1, 2),
            "group_mass": jnp.einsum("bnts,sg->bntg", weights, np.eye(4)[groups]),
            "col_mass": columns.reshape(2, 7, 2, 2).sum(-1),
            "row_weights": jnp.take_along_axis(weights[:, [3, 0]], rows[:, None, :, None], axis=2),
        }
        each = {"col_mass": weights.sum(2).swapaxes(1, 2)}
        out = mixed(weights, a["value"])
        return (out, aux), entropy, each

    (_, aux), entropy, _ = equal(hooked, truth, arrays)
    assert np.isneginf(aux["lse"][0, 2]).all()
    assert not aux["entropy"][0, 2].any() and not entropy["entropy"][0, 2].any()
    assert not aux["group_mass"][0, :, 2].any() and not aux["group_mass"][..., 2].any()
    assert not aux["col_mass"][:, 3].any()


def test_other_functions_are_observed_through_one_hot_values(arrays, mask):
    hook = AttnHook(observe={"entropy", "col_mass", "row_weights"}, rows=np.array([1, 4]), heads=(2,))
    expected = quick_jit(lambda a: attention(**a, mask=mask, hook=hook)[1])(arrays)
    found = quick_jit(lambda a: attention(**a, mask=mask, hook=hook, attention_fn=plain)[1])(arrays)
    assert sorted(found) == sorted(hook.observe)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, expected)


def test_a_mechanism_that_prepares_an_engine_call_is_the_engine(square):
    """softmax_attention with ALiBi, also bound in a partial: its entropy needs no one-hot values, its lse is there."""
    function = functools.partial(jattn.get("softmax_attention"), position="alibi")
    hook = AttnHook(bias=np.linspace(0, 1, 5), observe={"entropy", "lse", "row_weights"}, rows=np.array([-1]))
    found, aux = quick_jit(lambda a: attention(**a, is_causal=True, attention_fn=function, hook=hook))(square)
    np.testing.assert_allclose(found, function(**square, bias=hook.bias, is_causal=True), rtol=1e-6)
    np.testing.assert_allclose(aux["row_weights"].sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(entropy_of(aux["row_weights"])[:, 0], aux["entropy"][:, -1], rtol=1e-5)
    assert make_call(function, *square.values(), {"is_causal": True}).is_engine
    with pytest.raises(ValueError, match="normalizer"):
        attention(**square, attention_fn=function, hook=hook, normalizer=jattn.normalizers.sigmoid())


@pytest.mark.parametrize("function", [jattn.dot_product_attention, plain])
def test_weights_of_some_rows_and_heads_alone(arrays, mask, dense, mixed, equal, function):
    """`weights` at rows [[0, 4], [2, 3]] of heads 1 and 2: the others keep their bits, those are edited."""
    rows = np.array([[0, 4], [2, 3]])
    hook = AttnHook(weights=halve, rows=rows, heads=(1, 2))
    named = np.zeros((2, 5, 4, 1))
    for b in range(2):
        named[b, rows[b], 1:3] = 1

    def hooked(a):
        return attention(**a, mask=mask, hook=hook, attention_fn=function)[0]

    output = equal(hooked, lambda a: mixed(dense(a["query"], a["key"], mask), a["value"]) * (1 - named / 2), arrays)
    with jax.enable_x64(True):
        untouched = np.asarray(jax.jit(functools.partial(function, mask=mask))(**jax.tree.map(jnp.asarray, arrays)))
        edited = np.asarray(jax.jit(hooked)(jax.tree.map(jnp.asarray, arrays)))
    assert (edited[named[..., 0] == 0] == untouched[named[..., 0] == 0]).all()
    assert output.shape == untouched.shape


def test_weights_may_be_put_where_the_mask_hides(arrays, mask):
    """Overwritten weights reach the values of hidden keys, and NaN there only if they look at it."""
    value = np.where(np.arange(7)[:, None, None] == 3, np.nan, arrays["value"])
    pattern = jnp.broadcast_to(jnp.eye(7)[3], (2, 4, 5, 7))
    hook = AttnHook(weights=overwrite, params=pattern)
    found = attention(**arrays, mask=mask, hook=hook)[0]
    expected = np.repeat(arrays["value"][:, 3], 2, axis=1)[:, None]
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=1e-6)
    poisoned = attention(arrays["query"], arrays["key"], value, mask=mask, hook=AttnHook(weights=halve))[0]
    assert np.isfinite(poisoned).all()


def test_out_mixes_as_weights_do(square, equal):
    """(1 - u) o + u v == weights (1 - u) w + u I, and the extra arrives."""
    arrays = {**square, "u": np.linspace(0, 1, 4)[:, None]}

    def by_out(a):
        hook = AttnHook(out=toward_value, params=a["u"])
        output, aux = attention(a["query"], a["key"], a["value"], is_causal=True, hook=hook)
        assert sorted(aux) == ["out"] and aux["out"]["norm"].shape == (2, 5, 4)
        return output

    def by_weights(a):
        hook = AttnHook(weights=toward_identity, params=a["u"][:, :, None])
        return attention(a["query"], a["key"], a["value"], is_causal=True, hook=hook)[0]

    equal(by_out, by_weights, arrays)


def test_the_last_row_is_the_query_at_decode(square):
    """One hook with rows = -1, on a prefill and on its last query alone."""
    log_factor = np.linspace(-1, 0, 5)
    hook = AttnHook(
        weights=halve,
        reweight=Reweight(log_factor=log_factor),
        rows=np.array([-1]),
        heads=(0, 2),
        observe=frozenset(OBSERVABLE) - {"col_mass"},
    )
    prefill, seen = quick_jit(lambda a: attention(**a, is_causal=True, hook=hook))(square)
    places = {"query_positions": np.array([[4]]), "key_positions": np.arange(5)[None]}
    last = {**square, "query": square["query"][:, -1:]}
    step, here = quick_jit(lambda a: attention(**a, **places, is_causal=True, hook=hook))(last)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    close(prefill[:, -1:], step)
    for name, axis in (("lse", 1), ("entropy", 1), ("group_mass", 2)):
        close(jnp.take(seen[name], jnp.array([4]), axis), here[name])
    close(seen["row_weights"], here["row_weights"])


@pytest.mark.parametrize("normalizer", [None, "sigmoid", "reweighted"])
def test_rows_of_everything_the_engine_takes(square, normalizer):
    """Segments, positions, tables, sinks, layouts, normalizers: materialized rows are the engine's weights."""
    table = jattn.Operand(np.random.default_rng(3).normal(size=(4, 5)), "offset")
    pair = jattn.Operand(np.random.default_rng(4).normal(size=(4, 5, 5)), "pair")

    arguments = {
        "mask": jattn.masks.sliding_window(3),
        "segment_ids": np.array([[0, 0, 0, 0, -1], [0, 0, 1, 1, 1]]),
        "query_positions": np.array([[0, 2, 3, 5, 6], [0, 1, 2, 3, 4]]),
        "key_positions": np.array([[0, 2, 3, 5, 6]]),
        "score_mod": jattn.ScoreMod(_add_bias, {"table": table}) >> jattn.ScoreMod(_add_bias, {"table": pair}),
        "logit_soft_cap": 3.0,
        "bias": np.random.default_rng(5).normal(size=(2, 4, 5, 5)),
        "sinks": np.linspace(-1, 1, 4) if normalizer is None else None,
        "normalizer": {
            None: None,
            "sigmoid": jattn.normalizers.sigmoid(),
            "reweighted": jattn.normalizers.reweighted(jattn.normalizers.softplus_l1(), 2.0),
        }[normalizer],
        "layout": jattn.layouts.from_mask_mod(jattn.masks.causal(), 1, 1, 5, 5, 2, 2, num_heads=4),
        "key_value_seq_lengths": np.array([4, 5]),
    }
    one_hot = np.broadcast_to(np.eye(5)[:, None], (2, 5, 4, 5))
    with jax.enable_x64(True):
        weights = quick_jit(lambda a: jattn.dot_product_attention(**a, **arguments))({**square, "value": one_hot})
        weights = np.swapaxes(weights, 1, 2)
        expected = entropy_of(weights)
        hook = AttnHook(observe={"row_weights", "entropy"}, rows=np.array([[4, 1], [0, 3]]), heads=(2, 3))
        _, aux = quick_jit(lambda a: attention(**a, **arguments, hook=hook))(square)
    for b, rows in enumerate(([4, 1], [0, 3])):
        np.testing.assert_allclose(aux["row_weights"][b], weights[b, 2:][:, rows], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(aux["entropy"], expected, rtol=1e-9, atol=1e-12)


def _add_bias(logit, b, h, i, j, table):
    return logit + table


def test_dropout_comes_after_the_edit_and_not_into_statistics(arrays):
    """Edited weights lose the pairs that the engine drops; what is observed loses none."""
    drop = {"dropout_rate": 0.5, "dropout_key": jax.random.key(1)}
    edit = AttnHook(weights=halve, rows=np.array([0, 3]))
    expected = jax.jit(lambda a: jattn.dot_product_attention(**a, **drop))(arrays)
    halved = jax.jit(lambda a: attention(**a, **drop, hook=edit)[0])(arrays)
    np.testing.assert_allclose(halved[:, [0, 3]], expected[:, [0, 3]] / 2, rtol=1e-5, atol=1e-6)
    assert (halved[:, 1] == expected[:, 1]).all()
    hook = AttnHook(observe={"row_weights", "col_mass", "entropy", "lse"})
    dry, wet = (quick_jit(lambda a, more=more: attention(**a, **more, hook=hook)[1])(arrays) for more in ({}, drop))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), dry, wet)


def test_query_key_and_value_are_those_of_the_call(arrays):
    arrays = {name: jnp.asarray(x, jnp.bfloat16) for name, x in arrays.items()}
    output, aux = attention(**arrays, hook=AttnHook(qkv=per_query_head, observe={"query", "key", "value"}))
    for name, repeats in (("query", 1), ("key", 2), ("value", 2)):
        assert aux[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(aux[name], jnp.repeat(arrays[name], repeats, axis=2))
    assert aux.keys() == {"query", "key", "value"}
    assert output.dtype == jnp.bfloat16


def test_statistics_are_float32_and_outputs_keep_their_dtype(arrays):
    """In bfloat16 the column sums of long rows would be off by percents."""
    narrow = {name: jnp.asarray(x, jnp.bfloat16) for name, x in arrays.items()}
    hook = AttnHook(observe=OBSERVABLE, reweight=Reweight(log_factor=np.zeros(7)), weights=halve, rows=np.array([0]))
    output, aux = quick_jit(lambda a: attention(**a, hook=hook))(narrow)
    assert output.dtype == jnp.bfloat16
    assert {x.dtype for x in aux.values()} == {jnp.dtype("float32")}
    np.testing.assert_allclose(aux["col_mass"].sum((1, 2)), 5 * 4, rtol=1e-6)


def test_vmap_over_hooks(arrays):
    """A batch of hooks is a vmap over their arrays; grad of it sees each of them."""
    bias = np.random.default_rng(6).normal(size=(3, 7)).astype(np.float32)
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}

    def run(bias):
        hook = AttnHook(bias=bias, weights=halve, rows=np.array([1]), observe={"entropy", "col_mass"})
        return attention(**arrays, hook=hook)

    batched = jax.jit(jax.vmap(run))(bias)
    alone = quick_jit(run)
    single = [alone(one) for one in bias]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *single)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), batched, stacked)
    slope = quick_jit(jax.vmap(jax.grad(lambda bias: run(bias)[1]["entropy"].sum())))(bias)
    assert slope.shape == bias.shape and np.isfinite(slope).all() and slope.any()


def test_an_argument_of_zero_is_asked_for(square):
    """A scale or a window of 0 is not the default."""
    hook = AttnHook(observe={"row_weights"})
    for hooked in ({}, {"hook": hook}):
        np.testing.assert_allclose(
            attention(**square, scale=0, **hooked)[0],
            np.broadcast_to(square["value"].mean(1, keepdims=True), square["value"].shape),
            rtol=1e-5,
            atol=1e-6,
        )
        found = attention(**square, local_window_size=0, **hooked)[0]
        np.testing.assert_allclose(found, square["value"], rtol=1e-6)


def test_observations_of_tiles_have_gradients(arrays, mask, dense, equal):
    """The blockwise path: column masses are a gradient of it, and have gradients themselves."""
    call = {"implementation": "blockwise", "block_sizes": (4, 4)}

    def hooked(a):
        hook = AttnHook(observe={"entropy", "col_mass", "lse"})
        output, aux = attention(a["query"], a["key"], a["value"], mask=mask, hook=hook, **call)
        return {name: aux[name] for name in ("entropy", "col_mass")}

    def truth(a):
        weights = dense(a["query"], a["key"], mask)
        return {"entropy": entropy_of(weights), "col_mass": weights.sum(2).swapaxes(1, 2).reshape(2, 7, 2, 2).sum(-1)}

    equal(hooked, truth, arrays)
