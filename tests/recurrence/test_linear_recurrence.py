"""The recurrence engine against loops in float64 numpy, against itself in all modes, and against its identities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.recurrence.api import linear_recurrence, linear_recurrence_step
from jattn.testing.tolerance import assert_within_policy
from tests.recurrence.truth import KINDS, inputs, rng, truth

STATIC = ("mode", "chunk_size", "reverse", "read", "return_final_state", "scale")


@functools.partial(jax.jit, static_argnames=STATIC)
def recur(arrays, **options):
    return linear_recurrence(**arrays, return_final_state=True, **options)


@functools.partial(jax.jit, static_argnames=STATIC)
def gradients(arrays, weights, ids=None, **options):
    def loss(arrays):
        out, state = linear_recurrence(**arrays, segment_ids=ids, return_final_state=True, **options)
        return jnp.sum(out * weights[0]) + jnp.sum(state * weights[1])

    return jax.grad(loss)(arrays)


def in64(function, *args, **options):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, function(*jax.tree.map(jnp.asarray, args), **options))


def close(found, expected, tolerance=1e-11):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * max(1.0, np.abs(y).max()))


def ids(length=23):
    row = np.zeros((2, length), int)
    row[0, 5:], row[0, 12:], row[0, 13:20] = 4, 2, -1
    row[1, :2], row[1, 9:], row[1, 21:] = -3, 0, 7
    row[1, 6:9] = 1
    return row


@pytest.mark.parametrize("rank1", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_modes_are_the_token_loop(kind, rank1):
    given = inputs(kind, rank1=rank1, strong=True)
    given["initial_state"] = rng(3).normal(size=(2, 2, 5, 4))
    expected = truth(**given)
    for mode in ("recurrent", "parallel", *(() if rank1 else ("associative",))):
        close(in64(recur, given, mode=mode), expected)
    for chunk_size in (3, 16, 8, 1):
        close(in64(recur, given, chunk_size=chunk_size), expected)


@pytest.mark.parametrize("options", [{"read": "pre"}, {"reverse": True}, {"read": "pre", "reverse": True}], ids=str)
@pytest.mark.parametrize("kind", ["head", "channel"])
def test_readings_and_directions(kind, options):
    given = inputs(kind, rank1=True, seed=1)
    given["initial_state"] = rng(4).normal(size=(2, 2, 5, 4))
    if "read" in options:
        given["bonus"] = rng(5).normal(size=(2, 5))
    expected = truth(**given, **options)
    for mode in ("recurrent", "chunk"):
        close(in64(recur, given, mode=mode, chunk_size=4, **options), expected)
    plain = {name: x for name, x in given.items() if name not in "ab"}
    close(in64(recur, plain, mode="associative", **options), truth(**plain, **options))


@pytest.mark.parametrize("rank1", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_segments_are_separate_calls_and_padding_is_not_read(kind, rank1):
    given = inputs(kind, rank1=rank1, seed=2)
    given["initial_state"] = rng(5).normal(size=(2, 2, 5, 4))
    row = ids()
    expected = truth(**given, segment_ids=row)
    assert np.all(expected[0][row < 0] == 0)
    poisoned = {
        name: x
        if x.ndim < 3 or x.shape[1] != 23
        else np.where((row < 0).reshape(2, 23, *(1,) * (x.ndim - 2)), np.nan, x)
        for name, x in given.items()
    }
    poisoned["segment_ids"] = row
    for mode in ("recurrent", "parallel", "chunk", *(() if rank1 else ("associative",))):
        close(in64(recur, poisoned, mode=mode, chunk_size=4), expected)


def test_an_id_that_returns_is_a_new_segment():
    given = inputs("none", batch=1, length=4)
    given["segment_ids"] = np.array([[0, 0, 3, 0]])
    out, state = in64(recur, given, chunk_size=4)
    alone = {name: x[:, 3:] for name, x in given.items() if name != "segment_ids"}
    close((out[:, 3:], state), truth(**alone))


def test_a_row_of_padding_returns_the_initial_state():
    given = inputs("token")
    given["initial_state"] = rng(1).normal(size=(2, 2, 5, 4))
    given["segment_ids"] = np.full((2, 23), -1)
    out, state = in64(recur, given, chunk_size=4)
    assert not out.any()
    close(state, given["initial_state"])


@pytest.mark.parametrize("heads", [(4, 2, 2, 2), (4, 1, 2, 4), (2, 2, 4, 4), (2, 1, 6, 3), (3, 3, 1, 1)], ids=str)
def test_heads_are_repeated_not_tiled(heads):
    queries, keys, values, gates = heads
    r = rng(7)
    given = {
        "query": r.normal(size=(2, 9, queries, 3)),
        "key": r.normal(size=(2, 9, keys, 3)),
        "value": r.normal(size=(2, 9, values, 2)),
    }
    most = max(queries, values)
    decays = -np.abs(r.normal(size=(2, 9, gates, 3)))
    expected = truth(**given, log_decay=np.repeat(decays, most // gates, axis=2))
    given["log_decay"] = decays
    found = in64(recur, given, chunk_size=4)
    assert found[1].shape == (2, most, 3, 2)
    close(found, expected)
    given["initial_state"] = r.normal(size=(2, most, 3, 2))
    expected = truth(**{**given, "log_decay": np.repeat(decays, most // gates, axis=2)})
    close(in64(recur, given, chunk_size=4), expected)


@pytest.mark.parametrize("rank1", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_chunks_are_those_of_the_token_loop(kind, rank1):
    given = inputs(kind, rank1=rank1, seed=3, strong=True)
    given["initial_state"] = rng(6).normal(size=(2, 2, 5, 4))
    weights = rng(8).normal(size=(2, 23, 2, 4)), rng(9).normal(size=(2, 2, 5, 4))
    expected = in64(gradients, given, weights, mode="recurrent")
    assert all(np.abs(x).max() > 0 for x in expected.values())
    close(in64(gradients, given, weights, chunk_size=8), expected, 1e-10)
    row = ids()
    packed = in64(gradients, given, weights, row, mode="recurrent")
    found = in64(gradients, given, weights, row, chunk_size=8)
    close(found, packed, 1e-10)
    assert not found["key"][row < 0].any()


def test_gradients_are_those_of_finite_differences():
    given = inputs("channel", rank1=True, length=5, batch=1, heads=1, width=3, v_dim=2)
    given["initial_state"] = rng(1).normal(size=(1, 1, 3, 2))
    weights = rng(8).normal(size=(1, 5, 1, 2)), rng(9).normal(size=(1, 1, 3, 2))
    found = in64(gradients, given, weights, chunk_size=2)

    def loss(arrays):
        out, state = truth(**arrays)
        return np.sum(out * weights[0]) + np.sum(state * weights[1])

    for name, x in given.items():
        for place in list(np.ndindex(x.shape))[::3]:
            step = np.zeros_like(x)
            step[place] = 1e-6
            slope = (loss({**given, name: x + step}) - loss({**given, name: x - step})) / 2e-6
            assert abs(slope - found[name][place]) < 1e-6


@pytest.mark.parametrize("kind", ["token", "channel"])
@pytest.mark.parametrize("rank1", [False, True])
def test_mixed_gates_keep_float32_accuracy(kind, rank1):
    given = inputs(kind, rank1=rank1, seed=5, length=70, width=8, strong=True)
    weights = rng(8).normal(size=(2, 70, 2, 4)), rng(9).normal(size=(2, 2, 8, 4))
    exact = truth(**given), in64(gradients, given, weights, mode="recurrent")
    single = jax.tree.map(lambda x: x.astype(np.float32), (given, weights))
    found = recur(single[0]), gradients(*single)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        error = np.sqrt(np.mean((np.asarray(x, np.float64) - y) ** 2)) / np.sqrt(np.mean(y**2))
        assert error < 2e-6


def test_extreme_decay_leaves_a_token_alone_with_itself():
    for kind in KINDS[1:]:
        given = inputs(kind)
        given["log_decay"] = np.full_like(given["log_decay"], -1e4)
        single = {name: x.astype(np.float32) for name, x in given.items()}
        out, _ = recur(single, chunk_size=8)
        alone = np.einsum("btnd,btnd->btn", given["query"], given["key"])[..., None] * given["value"] / 5**0.5
        np.testing.assert_allclose(out, alone, rtol=1e-4, atol=1e-5)
        found = gradients(single, (np.ones((2, 23, 2, 4), np.float32), np.ones((2, 2, 5, 4), np.float32)), chunk_size=8)
        assert all(np.isfinite(x).all() for x in found.values())


@pytest.mark.parametrize("mode", ["recurrent", "chunk", "associative"])
def test_minus_infinity_forgets_everything(mode):
    given = inputs("token")
    given["log_decay"][:, 7] = -np.inf
    expected = truth(**{name: x[:, 7:] for name, x in given.items()})
    found = in64(recur, given, mode=mode, chunk_size=4)
    close((found[0][:, 7:], found[1]), expected)


def test_forms_of_one_decay_agree():
    given = inputs("head")
    expected = in64(recur, given, chunk_size=4)
    for shape in ((2, 23, 2), (2, 23, 2, 5)):
        wide = np.broadcast_to(given["log_decay"].reshape(2, *(1,) * (len(shape) - 3)), shape)
        close(in64(recur, {**given, "log_decay": wide}, chunk_size=4), expected)


def test_without_decay_it_is_masked_products():
    given = inputs("none")
    scores = np.einsum("btnd,bsnd->bnts", given["query"], given["key"]) * np.tri(23)
    expected = np.einsum("bnts,bsnv->btnv", scores, given["value"])
    close(in64(recur, given, scale=1.0, chunk_size=4)[0], expected)


@pytest.mark.parametrize("cut", [1, 7, 22])
def test_a_state_carries_everything_over(cut):
    given = inputs("channel", rank1=True)
    out, state = in64(recur, given, chunk_size=4)
    first = in64(recur, {name: x[:, :cut] for name, x in given.items()}, chunk_size=4)
    rest = {name: x[:, cut:] for name, x in given.items()} | {"initial_state": first[1]}
    second = in64(recur, rest, chunk_size=4)
    close((np.concatenate([first[0], second[0]], 1), second[1]), (out, state))


def test_steps_are_the_recurrence():
    given = inputs("channel", rank1=True, length=4)
    expected = truth(**given)
    with jax.enable_x64(True):
        state, outs = jnp.zeros((2, 2, 5, 4)), []
        for t in range(4):
            token = {name: jnp.asarray(x[:, t]) for name, x in given.items()}
            out, state = linear_recurrence_step(**token, state=state)
            outs.append(out)
        close((np.stack(outs, 1), state), expected)
        several = {name: jnp.asarray(x) for name, x in given.items()}
        close(linear_recurrence_step(**several, state=jnp.zeros((2, 2, 5, 4))), expected)


def test_padding_in_width_changes_nothing():
    given = inputs("channel", rank1=True)
    wide = {name: np.pad(x, [(0, 0)] * 3 + [(0, 3)]) for name, x in given.items()}
    out, state = in64(recur, wide, scale=1.0, chunk_size=4)
    expected = in64(recur, given, scale=1.0, chunk_size=4)
    close((out[..., :4], state[:, :, :5, :4]), expected)
    assert not out[..., 4:].any()


def test_delta_rule_recalls_and_overwrites():
    keys = np.linalg.qr(rng().normal(size=(5, 5)))[0][None, :, None]
    values = rng(1).normal(size=(1, 5, 1, 3))
    given = {"query": keys, "key": keys, "value": values, "a": -keys, "b": keys}
    _, state = in64(recur, given, chunk_size=2)
    close(np.einsum("btnd,bndv->btnv", keys, state), values)
    twice = {**given, **{name: np.repeat(x[:, :1], 5, 1) for name, x in given.items() if name != "value"}}
    _, state = in64(recur, twice, chunk_size=2)
    close(np.einsum("btnd,bndv->btnv", keys[:, :1], state), values[:, -1:])


@pytest.mark.parametrize(("beta", "grows"), [(0.0, "same"), (1.0, "shrinks"), (2.0, "same")])
def test_delta_steps_without_values_are_projections_and_reflections(beta, grows):
    given = inputs("none", rank1=True)
    given["b"], given["value"] = -beta * given["a"], 0 * given["value"]
    given["initial_state"] = rng(2).normal(size=(2, 2, 5, 4))
    _, state = in64(recur, given, chunk_size=4)
    before, after = (np.linalg.norm(x, axis=(-2, -1)) for x in (given["initial_state"], state))
    if grows == "shrinks":
        assert np.all(after < before)
    else:
        close(after, before)


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_keys_that_resemble_each_other_stay_accurate(beta):
    common, r = rng().normal(size=(1, 1, 1, 8)), rng(1)
    keys = common + 0.01 * r.normal(size=(1, 16, 1, 8))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    given = {"query": keys, "key": beta * keys, "value": r.normal(size=(1, 16, 1, 4)), "a": -keys, "b": beta * keys}
    expected = truth(**given)[0]
    single = {name: x.astype(np.float32) for name, x in given.items()}
    error = np.asarray(recur(single)[0], np.float64) - expected
    assert np.sqrt(np.mean(error**2)) < 1e-6 * np.sqrt(np.mean(expected**2))


def test_reading_before_writing_with_a_bonus_of_one_is_reading_after():
    given = inputs("none")
    close(in64(recur, {**given, "bonus": np.ones((2, 5))}, read="pre", chunk_size=4), in64(recur, given, chunk_size=4))
    assert not in64(recur, given, read="pre", chunk_size=4)[0][:, 0].any()


def test_linear_in_values_and_state_together():
    one, two = inputs("channel", rank1=True), inputs("channel", rank1=True, seed=9)
    states = rng(1).normal(size=(2, 2, 2, 5, 4))
    both = {**one, "value": one["value"] + 2 * two["value"], "initial_state": states[0] + 2 * states[1]}
    first = in64(recur, {**one, "initial_state": states[0]}, chunk_size=4)
    second = in64(recur, {**one, "value": two["value"], "initial_state": states[1]}, chunk_size=4)
    close(in64(recur, both, chunk_size=4), jax.tree.map(lambda x, y: x + 2 * y, first, second))


def test_both_directions_see_everything():
    given = inputs("token")
    both = in64(recur, given, chunk_size=4)[0] + in64(recur, given, reverse=True, chunk_size=4)[0]
    sums = np.cumsum(given["log_decay"], 1).transpose(0, 2, 1)
    forward = sums[..., :, None] - sums[..., None, :]
    i, j = np.arange(23)[:, None], np.arange(23)
    before = np.pad(sums, [(0, 0), (0, 0), (1, 0)])[..., :-1]
    backward = before[..., None, :] - before[..., :, None]
    weights = np.where(j < i, np.exp(np.minimum(forward, 0)), np.where(j > i, np.exp(np.minimum(backward, 0)), 2.0))
    scores = np.einsum("btnd,bsnd->bnts", given["query"], given["key"]) * weights / 5**0.5
    close(both, np.einsum("bnts,bsnv->btnv", scores, given["value"]), 1e-9)


def test_half_precision_keeps_its_states_in_float32():
    given = inputs("channel", rank1=True)
    half = {name: jnp.asarray(x, jnp.bfloat16) for name, x in given.items()}
    out, state = recur(half, chunk_size=8)
    assert (out.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    expected = truth(**{name: np.asarray(x, np.float64) for name, x in half.items()})
    plain = recur(half, mode="recurrent")
    for found, ordinary, exact in zip((out, state), plain, expected, strict=True):
        assert_within_policy(found, exact, ordinary)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"key": np.zeros((2, 23, 2, 4))}, "key must be"),
        ({"value": np.zeros((2, 22, 2, 4))}, "value must be"),
        ({"key": np.zeros((2, 23, 3, 5))}, "heads of key must divide"),
        ({"a": np.zeros((2, 23, 2, 5))}, "both or not at all"),
        ({"log_decay": np.zeros((2, 23))}, "log_decay must be floats"),
        ({"log_decay": np.zeros((3,))}, "log_decay must be floats"),
        ({"initial_state": np.zeros((2, 2, 4, 5))}, "initial_state must be"),
        ({"segment_ids": np.zeros((2, 22), int)}, "segment_ids must be"),
        ({"mode": "chunks"}, "mode must be"),
        ({"read": "both"}, "read must be"),
        ({"bonus": np.zeros((2, 5))}, "bonus belongs"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"implementation": "cuda"}, "implementation must be"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change, match):
    with pytest.raises(ValueError, match=match):
        linear_recurrence(**{**inputs("none"), **change})


def test_a_scan_of_states_refuses_corrections():
    with pytest.raises(ValueError, match="associative"):
        linear_recurrence(**inputs("none", rank1=True), mode="associative")
