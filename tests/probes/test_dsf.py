import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.mechanisms.linear.gated_linear_attention import gated_linear_attention
from jattn.mechanisms.linear.linear_attention import linear_attention
from jattn.mechanisms.linear.normalized_attention import normalized_attention
from jattn.mechanisms.linear.qlstm import qlstm, qlstm_log_decay
from jattn.probes import Dsf, dsf_matrix, dsf_scan, dsf_summary, taylor_features, to_dsf
from jattn.testing.compiling import quick_jit

B, T, N, D, V = 2, 9, 2, 3, 4
IDS = np.array([[-1, 4, 4, -1, 4, 2, 2, 4, -1], [1, 1, 1, 1, 1, -1, 1, 7, 7]])


def inputs(seed=0):
    r = np.random.default_rng(seed)
    return tuple(r.normal(size=(B, T, N, width)) for width in (D, D, V))


def gates(kind, seed=1):
    shape = {"head": (N,), "token": (B, T, N), "channel": (B, T, N, D)}[kind]
    g = -np.abs(np.random.default_rng(seed).normal(size=shape))
    if kind != "head":
        g[:, 3], g[:, 5] = -1e4, 0
    return g


def corrections(key):
    unit = key / np.linalg.norm(key, axis=-1, keepdims=True)
    beta = np.random.default_rng(5).uniform(0.2, 1.9, size=(B, T, N, 1))
    return {"a": -unit, "b": beta * unit}


def run(function, *arrays, **given):
    """Compiled as a whole, which is sooner done than an operation at a time."""
    arrays_given = {name: x for name, x in given.items() if isinstance(x, np.ndarray)}
    rest = {name: x for name, x in given.items() if name not in arrays_given}
    return quick_jit(lambda arrays, more: function(*arrays, **more, **rest))(arrays, arrays_given)


def close(actual, expected, **tolerance):
    np.testing.assert_allclose(actual, expected, **{"rtol": 1e-8, "atol": 1e-10, **tolerance})


def mixed(system, value):
    """Phi @ u, after checking that Phi is lower triangular and that the scan agrees."""
    matrix = np.asarray(quick_jit(dsf_matrix)(system))
    np.testing.assert_array_equal(matrix, np.tril(matrix))
    value = np.where(np.asarray(system.real)[..., None, None], value, 0)
    heads = max(matrix.shape[1], value.shape[2])
    out = np.einsum(
        "bnts,bsnv->btnv", matrix.repeat(heads // matrix.shape[1], 1), value.repeat(heads // value.shape[2], 2)
    )
    close(quick_jit(dsf_scan)(system, value), out)
    return out


def test_the_matrix_is_its_definition():
    query, key, _ = inputs()
    a, b = corrections(key).values()
    g, skip = gates("channel"), np.array([0.3, -2.0])
    expected = np.zeros((B, N, T, T))
    for row, head in np.ndindex(B, N):
        for i in range(T):
            passed = np.eye(D)
            for j in range(i, -1, -1):
                expected[row, head, i, j] = 0.7 * query[row, i, head] @ passed @ key[row, j, head]
                passed = passed @ (np.diag(np.exp(g[row, j, head])) + np.outer(b[row, j, head], a[row, j, head]))
            expected[row, head, i, i] += skip[head]
    with jax.enable_x64(True):
        system = to_dsf(query, key, log_decay=g, a=a, b=b, scale=0.7, skip=skip)
        assert not system.is_diagonal
        close(dsf_matrix(system), expected)


@pytest.mark.parametrize("kind", [None, "head", "token", "channel"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_it_is_gated_linear_attention(kind, is_packed):
    query, key, value = inputs()
    ids = IDS if is_packed else None
    g = None if kind is None else gates(kind)
    with jax.enable_x64(True):
        system = to_dsf(query, key, log_decay=g, segment_ids=ids)
        assert system.is_diagonal
        close(mixed(system, value), run(gated_linear_attention, query, key, value, g, segment_ids=ids, chunk_size=4))


@pytest.mark.parametrize("kind", [None, "token", "channel"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_it_is_the_engine_with_corrections(kind, is_packed):
    query, key, value = inputs()
    given = {"log_decay": None if kind is None else gates(kind), **corrections(key), "scale": 1.3}
    given["segment_ids"] = IDS if is_packed else None
    with jax.enable_x64(True):
        close(
            mixed(to_dsf(query, key, **given), value),
            run(jattn.linear_recurrence, query, key, value, **given, chunk_size=4),
        )


@pytest.mark.parametrize("bonus", [None, 1.0])
def test_it_is_the_engine_that_reads_before(bonus):
    query, key, value = inputs()
    given = {"log_decay": gates("channel"), "read": "pre", "segment_ids": IDS, **corrections(key)}
    given["bonus"] = None if bonus is None else np.random.default_rng(3).normal(size=(N, D))
    state = np.random.default_rng(4).normal(size=(B, N, D, V))
    with jax.enable_x64(True):
        system = to_dsf(query, key, **given)
        close(mixed(system, value), run(jattn.linear_recurrence, query, key, value, **given))
        expected = run(jattn.linear_recurrence, query, key, value, **given, initial_state=state)
        close(run(dsf_scan, system, value, initial_state=state), expected)


def test_groups_of_heads_and_an_initial_state():
    query, key, value = inputs()
    few, many = key[:, :, :1], np.concatenate([value, value + 1], 2)
    state = np.random.default_rng(4).normal(size=(B, 2 * N, D, V))
    with jax.enable_x64(True):
        given = {"log_decay": gates("head"), "scale": 1.0, "segment_ids": IDS}
        system = to_dsf(query, few, **given)
        close(mixed(system, many), run(jattn.linear_recurrence, query, few, many, **given))
        expected = run(jattn.linear_recurrence, query, few, many, **given, initial_state=state)
        close(run(dsf_scan, system, many, initial_state=state), expected)


def test_nothing_comes_out_of_padding():
    query, key, value = inputs()
    given = {"log_decay": gates("channel"), **corrections(key)}
    with jax.enable_x64(True):
        clean = run(dsf_scan, to_dsf(query, key, **given, segment_ids=IDS), value)
        dirty = [np.where((IDS >= 0)[..., None, None], x, np.nan) for x in (query, key, *given.values(), value)]
        poisoned = to_dsf(*dirty[:2], **dict(zip(given, dirty[2:5], strict=True)), segment_ids=IDS)
        np.testing.assert_array_equal(run(dsf_scan, poisoned, dirty[5]), clean)
        assert not np.asarray(clean)[IDS < 0].any()


def elu1(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


@pytest.mark.parametrize("is_packed", [False, True])
def test_it_is_normalized_linear_attention(is_packed):
    query, key, value = inputs()
    phi, psi, ids = elu1(query), elu1(key), IDS if is_packed else np.zeros((B, T), int)
    with jax.enable_x64(True):
        sums = np.asarray(run(jattn.linear_recurrence, phi, psi, np.ones((B, T, N, 1)), scale=1.0, segment_ids=ids))[
            ..., 0
        ]
        eta = np.where((ids >= 0)[..., None], sums, np.nan)
        system = to_dsf(phi, psi, scale=1.0, normalizer=eta, segment_ids=ids)
        close(mixed(system, value), run(linear_attention, query, key, value, is_causal=True, eps=0.0, segment_ids=ids))
        rows = np.asarray(run(dsf_matrix, system)).sum(-1)
        close(rows, np.broadcast_to((ids >= 0)[:, None], rows.shape))
        assert np.abs(run(dsf_summary, system).normalizer_spread).max() < 1e-9


def test_it_is_normalized_attention():
    query, key, value = inputs()
    n = np.random.default_rng(2).normal(size=(B, T, N))
    with jax.enable_x64(True):
        system = to_dsf(query, key, scale=1.0, normalizer=np.exp(n))
        close(mixed(system, value), run(normalized_attention, query, key, value, n))


def test_it_is_qlstm():
    x, f, i, o = (np.random.default_rng(s).normal(size=(B, T, 5)) for s in range(4))
    with jax.enable_x64(True):
        for alpha in (None, 1.7):
            read, write = (np.asarray(jax.nn.sigmoid(a))[..., None] for a in (o, i))
            g = np.asarray(qlstm_log_decay(f, alpha))[..., None]
            system = to_dsf(read, write, log_decay=g, scale=1.0)
            close(mixed(system, x[..., None])[..., 0], run(qlstm, x, f, i, o, alpha=alpha))


def test_ssd_is_linear_attention_with_a_normalizer():
    """h_i = exp(-Delta_i a) h_{i-1} + Delta_i B_i u_i is eta_i = exp(a s_i), psi(k_j) = Delta_j exp(a s_j) B_j."""
    query, key, value = inputs()
    delta = np.random.default_rng(2).uniform(0.05, 0.5, size=(B, T, N))
    skip = np.array([0.5, -1.0])
    with jax.enable_x64(True):
        for a in (0.0, 0.8):
            s = np.cumsum(delta, 1)
            direct = to_dsf(query, delta[..., None] * key, log_decay=-delta * a, scale=1.0)
            psi = (delta * np.exp(a * s))[..., None] * key
            other = to_dsf(query, psi, scale=1.0, normalizer=np.exp(a * s))
            close(run(dsf_matrix, other), run(dsf_matrix, direct))
        close(np.exp(0.0 * s), np.ones_like(s))
        with_skip = to_dsf(query, key, log_decay=-delta, scale=1.0, skip=skip)
        expected = run(jattn.linear_recurrence, query, key, delta[..., None] * value, log_decay=-delta, scale=1.0)
        plain = to_dsf(query, key, log_decay=-delta, scale=1.0)
        close(mixed(plain, delta[..., None] * value), expected)
        close(mixed(with_skip, value) - mixed(plain, value), skip[:, None] * value)


def test_every_front_end_is_such_a_system():
    query, key, value = inputs()
    random = np.random.default_rng(6)
    unit = key / np.linalg.norm(key, axis=-1, keepdims=True)
    beta, rate = random.uniform(0.1, 1.9, size=(B, T, N)), random.uniform(size=(B, T, N, D))
    write = beta[..., None] * unit
    step, slopes, skip = random.uniform(0.1, 1, size=(B, T, N)), np.array([-0.5, -2.0]), np.array([0.3, 2.0])
    token, channel = gates("token"), gates("channel")

    def delta(g):
        return {"a": -np.exp(0 if g is None else g if g.ndim == 4 else g[..., None]) * unit, "b": write, "log_decay": g}

    with jax.enable_x64(True):
        for name, given, arguments in (
            ("delta_rule", (query, unit, value, beta), {"key": write, **delta(None)}),
            ("gated_delta_rule", (query, unit, value, beta, token), {"key": write, **delta(token)}),
            ("kda", (query, unit, value, beta, channel), {"key": write, **delta(channel)}),
            (
                "rwkv7",
                (query, key, value, unit, rate, channel),
                {"key": key, "a": -unit, "b": unit * rate, "log_decay": channel, "scale": 1.0},
            ),
            (
                "ssd",
                (query, key, value, step, slopes, skip),
                {"key": step[..., None] * key, "log_decay": step * slopes, "scale": 1.0, "skip": skip},
            ),
        ):
            close(mixed(to_dsf(query, **arguments), value), run(jattn.get(name), *given))
        few = {"log_decay": gates("head")[:1], **{k: x[:, :, :1] for k, x in corrections(key).items()}}
        close(mixed(to_dsf(query, key, **few), value), run(jattn.linear_recurrence, query, key, value, **few))
        for place in ({"key": key[:, :, :1].repeat(3, 2)}, {"key": key}):
            wide = np.concatenate([query] * 3, 2)
            system = to_dsf(wide, **place, log_decay=gates("head"))
            close(
                mixed(system, value), run(jattn.linear_recurrence, wide, value=value, **place, log_decay=gates("head"))
            )


def test_softmax_is_the_limit_of_taylor_features():
    query, key, value = inputs()
    query, key = query / 2, key / 2
    scaled = [x / D**0.25 for x in (query, key)]
    with jax.enable_x64(True):
        expected = jattn.dot_product_attention(query, key, value, is_causal=True)
        errors = []
        for degree in (1, 3, 6):
            phi, psi = (taylor_features(x, degree) for x in scaled)
            assert phi.shape[-1] == math.comb(D + degree, degree)
            eta = np.tril(np.einsum("btnf,bsnf->bnts", phi, psi)).sum(-1).swapaxes(1, 2)
            system = to_dsf(phi, psi, scale=1.0, normalizer=eta)
            errors.append(np.abs(run(dsf_scan, system, value) - expected).max())
        assert errors[0] > 10 * errors[1] > 100 * errors[2] and errors[2] < 1e-4
        x, y = scaled[0][0, 0, 0], scaled[1][0, 0, 0]
        close(taylor_features(x, 3) @ taylor_features(y, 3), sum((x @ y) ** p / math.factorial(p) for p in range(4)))
        close(taylor_features(x, 0), [1.0])


def test_summaries():
    one = np.ones((1, 4, 1, 1))
    with jax.enable_x64(True):
        found = run(dsf_summary, to_dsf(one, one, scale=1.0))
        close([x[0, 0] for x in found], [1, 1, (0 + 0.5 + 1 + 1.5) / 4, np.log(4)])
        forgets = run(dsf_summary, to_dsf(one, one, log_decay=-1e4 * one, scale=2.0))
        close([x[0, 0] for x in forgets], [0, 0, 0, 0])
        # A reflection has eigenvalues -1 and 1; the first token meets no state.
        unit = np.zeros((1, 4, 1, 2))
        unit[..., 0] = 1
        factor = np.array([9.0, 2, 1.5, 0.5]).reshape(1, 4, 1, 1)
        delta = run(dsf_summary, to_dsf(unit, unit, a=-unit, b=factor * unit))
        close([x[0, 0] for x in delta[:2]], [0.5, 1])
        # Documents of one token carry nothing.
        alone = run(dsf_summary, to_dsf(one, one, segment_ids=np.array([[0, 1, 2, -1]])))
        assert [float(x[0, 0]) for x in alone] == [np.inf, 0, 0, 0]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda q, k, v: to_dsf(q, k[:, :4]), "query must be"),
        (lambda q, k, v: to_dsf(q, k, a=k), "both or not"),
        (lambda q, k, v: to_dsf(q, k, read="both"), "read must be"),
        (lambda q, k, v: to_dsf(q, k, bonus=q[0, 0]), "bonus belongs"),
        (lambda q, k, v: to_dsf(q, k, read="pre", normalizer=q[..., 0]), "normalizer divides"),
        (lambda q, k, v: to_dsf(q, k, log_decay=q[:, :2]), "log_decay must be"),
        (lambda q, k, v: to_dsf(q, k, segment_ids=np.zeros((B, 3), int)), "segment_ids must be"),
        (lambda q, k, v: dsf_scan(to_dsf(q, k), v[:, :3]), "value must be"),
        (lambda q, k, v: dsf_scan(to_dsf(q, k), v, initial_state=np.zeros((B, N, D, 1))), "initial_state must be"),
        (lambda q, k, v: taylor_features(q, -1), "degree must not"),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call(*inputs())


def test_a_system_is_a_pytree():
    system = to_dsf(*inputs()[:2], log_decay=gates("channel"), read="pre")
    again = jax.tree.map(jnp.asarray, system)
    assert isinstance(again, Dsf) and again.reads_before
