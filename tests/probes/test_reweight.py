"""Reweighting: a bias, widened values and materialized weights are one thing, in values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.probes import AttnHook, Reweight, attention, redistribute, renormalize

GROUPS = np.array([0, 2, 0, 1, 2, 2, 0])


def one(mass, scaled, params):
    return jnp.ones_like(mass)


def learned(mass, scaled, params):
    """It looks at both masses and at the params."""
    return params * (1 + mass) / (0.5 + scaled)


def times(weights, params):
    return weights * params


def times_and_divide(weights, params):
    scaled = weights * params
    total = scaled.sum(-1, keepdims=True)
    return scaled / jnp.where(total == 0, 1, total)


def halve(weights, params):
    return weights / 2


def hooked(a, mask=None, reweight=None, bias=None, call=None, **fields):
    fields = {**fields, **({} if reweight is None else {"reweight": reweight})}
    hook = AttnHook(**fields) if fields else None
    return attention(a["query"], a["key"], a["value"], bias, mask, hook=hook, **(call or {}))[0]


@pytest.fixture
def ratio():
    """Factors of every pair, per key alone where an axis is 1."""
    return np.exp(np.random.default_rng(7).normal(size=(2, 4, 5, 7)))


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("axes", [(2, 4, 5, 7), (1, 1, 7)])
def test_a_factor_that_is_renormalized_is_a_bias(arrays, mask, ratio, equal, cap, axes):
    """log_factor = log r with renormalize == weights w r / sum(w r) == bias log r, after the soft cap."""
    arrays = {**arrays, "ratio": ratio if len(axes) == 4 else ratio[0, :1, :1]}
    call = {"logit_soft_cap": cap}

    def by_reweight(a):
        return hooked(a, mask, Reweight(log_factor=jnp.log(a["ratio"]), coef=renormalize), call=call)

    def by_weights(a):
        return hooked(a, mask, weights=times_and_divide, params=a["ratio"], call=call)

    def by_bias(a):
        return hooked(a, mask, bias=jnp.log(a["ratio"]), call=call)

    equal(by_reweight, by_weights, arrays)
    equal(by_reweight, by_bias, arrays)


def test_a_constant_factor_that_is_renormalized_changes_nothing(arrays, mask, equal):
    """Even one whose exponential overflows."""
    reweight = Reweight(log_factor=np.float64(1000.0), coef=renormalize)
    equal(lambda a: hooked(a, mask, reweight), lambda a: hooked(a, mask), arrays)


@pytest.mark.parametrize("axes", [(2, 4, 5, 7), (2, 4, 1, 7), (2, 1, 1, 7)])
def test_a_factor_alone_scales_weights(arrays, mask, ratio, equal, axes):
    """log_factor = log r == weights w r; without a head axis == values r v; -inf erases."""
    ratio = ratio[:, : axes[1], : axes[2]].copy()
    ratio[0, ..., 1] = 0
    arrays = {**arrays, "ratio": ratio}

    def by_reweight(a):
        positive = a["ratio"] > 0
        factor = jnp.where(positive, jnp.log(jnp.where(positive, a["ratio"], 1)), -jnp.inf)
        return hooked(a, mask, Reweight(log_factor=factor))

    erased = (ratio == 0).astype(float)

    def by_weights(a):
        # The logarithm has no slope at 0.
        return hooked(a, mask, weights=times, params=a["ratio"] * (1 - erased))

    equal(by_reweight, by_weights, arrays)
    if axes[1:3] == (1, 1):
        scaled = ratio[:, 0, 0, :, None, None] * arrays["value"]
        with jax.enable_x64(True):
            expected = jattn.dot_product_attention(arrays["query"], arrays["key"], scaled, mask=mask)
            found = by_reweight(arrays)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("call", [{}, {"bias": 0.3, "logit_soft_cap": 2.0, "sinks": True}])
def test_widened_values_equal_the_dense_form(arrays, mask, ratio, dense, mixed, equal, by_head, scaled, call):
    """Groups and coefficients, with and without factors, per query head under GQA, with sinks, cap and bias."""
    groups = np.stack([GROUPS, GROUPS[::-1]])[:, None]
    groups = np.concatenate([groups, 2 - groups, groups, 0 * groups], 1) if by_head else groups
    arrays = {**arrays, "gain": np.array([0.5, 1.0, 2.0]), "ratio": ratio[:, : 4 if by_head else 1, :1]}
    sinks = np.linspace(-1, 1, 4) if call.get("sinks") else None
    options = {**call, "sinks": sinks}
    observed = "entropy" if by_head else "group_mass"

    def by_values(a):
        factor = jnp.log(a["ratio"]) if scaled else None
        reweight = Reweight(log_factor=factor, groups=groups, num_groups=4, coef=learned_of_four)
        hook = AttnHook(reweight=reweight, params=a["gain"], observe=observed)
        found, aux = attention(a["query"], a["key"], a["value"], mask=mask, hook=hook, **options)
        return found, aux.get("group_mass", 0.0) * a["gain"][0]

    def by_definition(a):
        cap, bias = options.get("logit_soft_cap"), options.get("bias", 0.0)
        weights = dense(a["query"], a["key"], mask, cap=cap, bias=bias, sinks=sinks)
        member = jnp.eye(4)[jnp.asarray(groups)]
        scaled_weights = weights * a["ratio"] if scaled else weights
        mass = (weights[..., None] * member[:, :, None]).sum(3)
        scaled_mass = (scaled_weights[..., None] * member[:, :, None]).sum(3)
        coef = learned_of_four(mass, scaled_mass, a["gain"])
        final = scaled_weights * (coef[:, :, :, None] * member[:, :, None]).sum(-1)
        return mixed(final, a["value"]), (mass if observed == "group_mass" else 0.0) * a["gain"][0]

    equal(by_values, by_definition, arrays)


def learned_of_four(mass, scaled, params):
    return learned(mass, scaled, jnp.append(params, 1.0))


def test_a_coefficient_of_one_changes_nothing(arrays, mask, equal):
    """For any partition, with an empty group."""
    reweight = Reweight(groups=2 * GROUPS[None], num_groups=6, coef=one)
    equal(lambda a: hooked(a, mask, reweight), lambda a: hooked(a, mask), arrays)


def test_redistribution_keeps_row_sums(arrays, mask, equal):
    """Sums over ones as values; keep = 1 is the identity; keep may be a parameter with a gradient."""
    arrays = {**arrays, "keep": np.float64(0.25)}
    ones = {**arrays, "value": np.ones((2, 7, 2, 1))}

    def moved(a, keep=0.25, **fields):
        coef = redistribute((0, 3), (1, 2), keep)
        return hooked(a, mask, Reweight(groups=GROUPS, num_groups=4, coef=coef), **fields)

    sums = equal(lambda a: moved(a), lambda a: moved(a, None, params={"keep": 0.25}), {**ones, "keep": 0.0})
    np.testing.assert_allclose(sums, np.swapaxes(mask.any(-1), 1, 2)[..., None], atol=1e-12)
    equal(lambda a: moved(a, 1), lambda a: hooked(a, mask), arrays)
    slope = jax.grad(lambda keep: moved(arrays, None, params={"keep": keep}).sum())(0.25)
    assert np.isfinite(slope) and slope
    assert redistribute([0], (1,), 0.5) == redistribute((0,), [1], 0.5)


def test_a_row_without_target_mass_is_left_alone(arrays, equal):
    """Only keys of the source group are visible."""
    mask = GROUPS == 0
    reweight = Reweight(groups=GROUPS, num_groups=3, coef=redistribute((0,), (1, 2), 0.5))
    equal(lambda a: hooked(a, mask, reweight), lambda a: hooked(a, mask), arrays)


def test_dead_rows_have_no_masses_and_no_output(arrays, mask):
    """Renormalized, too; the coefficient of an empty row is 0 and not 1 / 0."""
    for reweight in (
        Reweight(groups=GROUPS, num_groups=3, coef=renormalize),
        Reweight(log_factor=np.zeros(7), coef=renormalize),
        Reweight(log_factor=np.zeros((5, 7)), groups=GROUPS, num_groups=3, coef=redistribute((0,), (1,), 0.5)),
    ):
        hook = AttnHook(reweight=reweight, observe="group_mass")
        output, aux = attention(**arrays, mask=mask, hook=hook)
        assert np.isfinite(output).all() and not output[0, 2].any() and not aux["group_mass"][0, :, 2].any()


@pytest.mark.parametrize("coef", [None, learned, renormalize])
@pytest.mark.parametrize("sinks", [False, True])
def test_a_factor_of_pairs_stays_at_rows_and_heads(arrays, mask, ratio, dense, mixed, equal, coef, sinks):
    """With a query axis it applies where the hook says; coefficients see the masses of all rows."""
    rows, heads = np.array([[0, -1], [2, 3]]), (1, 3)
    sink = np.linspace(-1, 1, 4) if sinks else None
    arrays = {**arrays, "ratio": ratio, "gain": np.array([0.5, 1.0, 2.0])}
    named = np.zeros((2, 4, 5, 1), bool)
    for b in range(2):
        named[b, np.array(heads)[:, None], rows[b]] = True

    def by_hook(a):
        reweight = Reweight(log_factor=jnp.log(a["ratio"]), groups=GROUPS, num_groups=3, coef=coef)
        fields = {"rows": rows, "heads": heads, "params": a["gain"]}
        return hooked(a, mask, reweight, call={"sinks": sink}, **fields)

    def by_definition(a):
        weights = dense(a["query"], a["key"], mask, sinks=sink)
        scaled = weights * a["ratio"]
        member = jnp.eye(3)[GROUPS]
        c = jnp.ones((2, 4, 5, 3)) if coef is None else coef(weights @ member, scaled @ member, a["gain"])
        return mixed(jnp.where(named, scaled * (c * jnp.ones(3) @ member.T), weights), a["value"])

    equal(by_hook, by_definition, arrays)
    if coef is learned:
        plain = np.asarray(hooked(arrays, mask, call={"sinks": sink}))
        untouched = ~np.swapaxes(named[..., 0], 1, 2)
        assert (np.asarray(by_hook(arrays))[untouched] == plain[untouched]).all()


def test_weights_are_edited_after_the_reweighting(arrays, mask, ratio, equal):
    """Both in one hook: at the named rows w' / 2, elsewhere w'."""
    arrays = {**arrays, "gain": np.array([0.5, 1.0, 2.0])}
    rows = np.array([1, 4])
    half = np.ones((5, 1, 1))
    half[rows] = 0.5

    for coef, num_groups, groups in ((learned, 3, GROUPS), (renormalize, 1, None), (None, 1, None)):
        reweight = Reweight(log_factor=np.log(ratio[0, 0, 0]), groups=groups, num_groups=num_groups, coef=coef)
        both = functools.partial(hooked, mask=mask, reweight=reweight, weights=halve, rows=rows)
        equal(
            lambda a, both=both: both(a, params=a["gain"]),
            lambda a, reweight=reweight: half * hooked(a, mask, reweight, params=a["gain"]),
            arrays,
        )


def test_dropout_follows_the_reweighting(arrays, ratio):
    """Masses are those of all weights: with c known, dropping after it equals scaling what the engine drops."""
    drop = {"dropout_rate": 0.5, "dropout_key": jax.random.key(3)}
    reweight = Reweight(log_factor=np.log(ratio[0, 0, 0]), groups=GROUPS, num_groups=3, coef=learned)
    gain = np.array([0.5, 1.0, 2.0])
    one_hot = np.broadcast_to(np.eye(7)[:, None], (2, 7, 2, 7))
    eye = {**arrays, "value": one_hot}
    wet, dry = (hooked(eye, reweight=reweight, params=gain, call=call) for call in (drop, {}))
    kept = np.asarray(jattn.dot_product_attention(eye["query"], eye["key"], one_hot, **drop)) > 0
    assert 0.2 < kept.mean() < 0.8
    np.testing.assert_allclose(wet, np.where(kept, 2 * np.asarray(dry), 0), rtol=1e-5, atol=1e-6)
    pairs = Reweight(log_factor=np.log(ratio), coef=renormalize)
    wet, dry = (hooked(eye, reweight=pairs, call=call) for call in (drop, {}))
    np.testing.assert_allclose(wet, np.where(kept, 2 * np.asarray(dry), 0), rtol=1e-5, atol=1e-6)


def test_other_functions_are_reweighted(arrays, mask, ratio):
    """Any function that is linear in its values: widened ones, and materialized weights."""

    def plain(query, key, value, *, mask=None):
        return jattn.dot_product_attention(query, key, value, mask=mask)

    for reweight in (
        Reweight(log_factor=np.log(ratio[:, :, :1]), groups=GROUPS, num_groups=3, coef=renormalize),
        Reweight(log_factor=np.log(ratio), coef=renormalize),
    ):
        found = hooked(arrays, mask, reweight, call={"attention_fn": plain})
        np.testing.assert_allclose(found, hooked(arrays, mask, reweight), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_every_implementation_widens(arrays, mask, ratio, implementation):
    arrays = {name: np.asarray(x, np.float32) for name, x in arrays.items()}
    call = {"implementation": implementation, "block_sizes": (4, 4)}
    reweight = Reweight(log_factor=np.log(ratio[:, :, :1]), groups=GROUPS, num_groups=3, coef=one)
    found = jax.jit(lambda a: hooked(a, mask, reweight, call=call))(arrays)
    expected = hooked(arrays, mask, weights=times, params=ratio[:, :, :1])
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Reweight(num_groups=0), "num_groups"),
        (lambda: Reweight(coef=3), "coef"),
        (lambda: redistribute((), (1,)), "source"),
        (lambda: redistribute((0,), (0, 1)), "share a group"),
        (lambda: redistribute((0,), (-1,)), "target"),
        (lambda: redistribute((0,), (1,), np.ones(2)), "keep"),
    ],
)
def test_errors_when_made(make, named):
    with pytest.raises(ValueError, match=named):
        make()


@pytest.mark.parametrize(
    ("reweight", "named"),
    [
        (Reweight(num_groups=2, coef=one), "num_groups is 2"),
        (Reweight(groups=GROUPS, num_groups=2, coef=one), "groups holds ids 0 to 2"),
        (Reweight(groups=np.zeros(6, int), coef=one), "groups"),
        (Reweight(groups=np.zeros(7), coef=one), "groups"),
        (Reweight(log_factor=np.zeros((3, 7))), "log_factor"),
        (Reweight(log_factor=np.zeros(7, int)), "log_factor"),
        (Reweight(coef=lambda mass, scaled, params: jnp.ones(3)), "coef returned"),
        (Reweight(groups=GROUPS, num_groups=3, coef=redistribute((0,), (3,), 0.5)), "more than 3 groups"),
    ],
)
def test_errors_when_used(arrays, reweight, named):
    with pytest.raises(ValueError, match=named):
        hooked(arrays, reweight=reweight)
