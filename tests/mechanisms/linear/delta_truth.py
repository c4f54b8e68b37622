"""The delta family as loops over tokens, in numpy or under jax, and what the tests of its members share."""

import jax
import jax.numpy as jnp
import numpy as np


def rng(seed=0):
    return np.random.default_rng(seed)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def inputs(decay=None, *, seed=0, batch=2, length=9, heads=(2, 2, 2, 2, 2), width=5, v_dim=3):
    """Query, key of length 1, value, beta and, if wanted, log decays ("token" or "channel"); heads of each in turn."""
    r = rng(seed)
    made = {
        "query": r.normal(size=(batch, length, heads[0], width)),
        "key": unit(r.normal(size=(batch, length, heads[1], width))),
        "value": r.normal(size=(batch, length, heads[2], v_dim)),
        "beta": r.uniform(0.1, 1.9, size=(batch, length, heads[3])),
    }
    if decay is not None:
        shape = (batch, length, heads[4]) + ((width,) if decay == "channel" else ())
        made["log_decay"] = -np.abs(r.normal(size=shape)) * 0.5
    return made


def delta_loop(query, key, value, beta, log_decay=None, *, scale=None, initial_state=None, xp=np):
    """Output and final state, as the papers write it: decay, predict, correct."""
    heads = max(query.shape[2], value.shape[2])
    query, key, value, beta = (xp.repeat(x, heads // x.shape[2], axis=2) for x in (query, key, value, beta))
    if log_decay is not None:
        log_decay = xp.repeat(log_decay, heads // log_decay.shape[2], axis=2)
    batch, length, _, width = query.shape
    scale = width**-0.5 if scale is None else scale
    state = xp.zeros((batch, heads, width, value.shape[-1])) if initial_state is None else initial_state
    out = []
    for t in range(length):
        if log_decay is not None:
            kept = xp.exp(log_decay[:, t])
            state = (kept[..., None] if kept.ndim == 3 else kept[..., None, None]) * state
        error = value[:, t] - xp.einsum("bhd,bhdv->bhv", key[:, t], state)
        state = state + xp.einsum("bh,bhd,bhv->bhdv", beta[:, t], key[:, t], error)
        out.append(scale * xp.einsum("bhd,bhdv->bhv", query[:, t], state))
    return xp.stack(out, 1), state


def in64(function, *args, **options):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, function(*jax.tree.map(jnp.asarray, args), **options))


def close(found, expected, tolerance=1e-11):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * max(1.0, np.abs(y).max()))


def runner(function, **options):
    """`f(arrays, **static)`: output and final state, compiled once for each set of options."""

    def run(arrays, **more):
        return function(**arrays, return_final_state=True, **options, **more)

    return jax.jit(run, static_argnames=("mode", "chunk_size", "scale"))


def both(function):
    """`f(arrays, weights)`: output, state and the gradients of their weighted sum, compiled once."""

    def run(arrays, weights):
        def loss(arrays):
            out, state = function(**arrays)
            return jnp.sum(out * weights[0]) + jnp.sum(state * weights[1]), (out, state)

        gradients, done = jax.grad(loss, has_aux=True)(arrays)
        return done, gradients

    return jax.jit(run)


def cotangents(out, state, seed=9):
    r = rng(seed)
    return r.normal(size=out.shape), r.normal(size=state.shape)


def poisoned_like_clean(function, arrays, plain=("initial_state",)):
    """Whether NaN and inf at padding, in every argument, change output, state or any gradient bit by bit."""
    batch, length = arrays["query"].shape[:2]
    ids = np.zeros((batch, length), int)
    ids[0, 2:4], ids[-1, -3:], ids[-1, 5:] = -1, -1, np.where(ids[-1, 5:] < 0, -1, 4)
    where = ids < 0
    run = both(lambda **given: function(**given, segment_ids=ids, chunk_size=4, return_final_state=True))
    dirty = {
        name: x
        if name in plain
        else np.where(where.reshape(*ids.shape, *(1,) * (x.ndim - 2)), np.inf if place % 2 else np.nan, x)
        for place, (name, x) in enumerate(arrays.items())
    }
    single = jax.tree.map(lambda x: x.astype(np.float32), (arrays, dirty))
    out = jax.eval_shape(lambda given: function(**given, return_final_state=True), single[0])
    weights = jax.tree.map(lambda x: x.astype(np.float32), cotangents(*out))
    clean, found = (jax.tree.map(np.asarray, run(given, weights)) for given in single)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(x, y)
    assert not found[0][0][where].any()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


def silu(x):
    return x * sigmoid(x)


def convolved(heads, x):
    """What `ConvolvedHeads` does before its activation, in numpy float64."""
    projected = np.einsum("btm,mhd->bthd", x, np.asarray(heads.kernel.get_value(), np.float64))
    kernel = np.asarray(heads.conv.kernel.get_value(), np.float64).reshape(-1, *projected.shape[2:])
    width, out = len(kernel), np.zeros_like(projected)
    for t in range(x.shape[1]):
        for w in range(width):
            if t - (width - 1) + w >= 0:
                out[:, t] += kernel[w] * projected[:, t - (width - 1) + w]
    return out


def rms_norm(x, layer):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(layer.scale.get_value(), np.float64)


def l2_norm(x):
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def softplus(x):
    return np.log1p(np.exp(x))


def ratio(found, expected):
    """RMS of the difference over RMS of what is expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    error, size = np.sqrt(np.mean((found - expected) ** 2)), np.sqrt(np.mean(expected**2))
    return error / size if size else error
