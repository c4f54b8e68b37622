"""The distillation loss against loops in float64 numpy, and the bound that it cannot pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.mechanisms.linear.attention_distill_loss import attention_distill_loss
from jattn.softmax import masks

T, N, K, D, F = 7, 4, 2, 3, 5
RANDOM = np.random.default_rng(0)
QUERY, KEY = RANDOM.normal(size=(2, T, N, D)), RANDOM.normal(size=(2, T, K, D))
ROWS, COLUMNS = np.exp(RANDOM.normal(size=(2, T, N, F))), np.exp(RANDOM.normal(size=(2, T, K, F)))
IDS = np.array([[0, 0, 1, 1, -1, 1, 1], [-1, -1, 0, 0, 0, 0, 0]])
run = jax.jit(attention_distill_loss, static_argnames=("is_causal", "scale"))


def loop(visible, scale=D**-0.5, query=QUERY, key=KEY, rows=ROWS, columns=COLUMNS):
    """Row by row; visible [B, T, S]. Also the entropy of the teacher."""
    losses, entropies = [], []
    for b, n, i in np.ndindex(2, N, T):
        seen = np.flatnonzero(visible[b, i])
        if not len(seen):
            continue
        logits = scale * key[b, seen, n // 2] @ query[b, i, n]
        a = np.exp(logits) / np.exp(logits).sum()
        p = columns[b, seen, n // 2] @ rows[b, i, n]
        losses.append(-a @ np.log(np.maximum(p / p.sum(), 1e-12)))
        entropies.append(-a @ np.log(a))
    return np.mean(losses), np.mean(entropies)


def in64(*arrays, **options):
    with jax.enable_x64(True):
        return np.asarray(run(*arrays, **options))


CAUSAL = np.broadcast_to(np.tri(T, dtype=bool), (2, T, T))
SAME = (IDS[:, :, None] == IDS[:, None]) & (IDS[:, None] >= 0)


@pytest.mark.parametrize(
    ("options", "visible"),
    [
        ({}, np.ones((2, T, T), bool)),
        ({"is_causal": True}, CAUSAL),
        ({"mask": masks.sliding_window(3)}, CAUSAL & ~np.tri(T, k=-3, dtype=bool)),
        ({"segment_ids": IDS, "is_causal": True}, CAUSAL & SAME),
        ({"mask": (IDS >= 0)[:, None, None], "scale": 2.0}, np.broadcast_to((IDS >= 0)[:, None], (2, T, T))),
    ],
    ids=["all", "causal", "window", "packed", "masked"],
)
def test_it_is_the_mean_of_its_rows(options, visible):
    loss, entropy = loop(visible, options.get("scale", D**-0.5))
    np.testing.assert_allclose(in64(QUERY, KEY, ROWS, COLUMNS, **options), loss, rtol=1e-10)
    assert loss > entropy


def test_it_is_least_where_the_weights_agree():
    logits = D**-0.5 * np.einsum("btnd,bsnd->btns", QUERY, KEY.repeat(2, 2))
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    # Rows of the teacher as features of queries, and of keys the unit vectors.
    columns = np.broadcast_to(np.eye(T)[None, :, None], (2, T, K, T))
    _, entropy = loop(np.ones((2, T, T), bool))
    np.testing.assert_allclose(in64(QUERY, KEY, weights, columns), entropy, rtol=1e-10)
    # A factor of a query's features changes nothing.
    np.testing.assert_allclose(in64(QUERY, KEY, 3 * weights, columns), entropy, rtol=1e-10)
    assert in64(QUERY, KEY, weights, columns + 0.1) > entropy


def test_gradients_reach_the_features_alone():
    with jax.enable_x64(True):
        given = tuple(map(jnp.asarray, (QUERY, KEY, ROWS, COLUMNS)))
        gradients = jax.jit(jax.grad(lambda *x: attention_distill_loss(*x, is_causal=True), (0, 1, 2, 3)))(*given)
        assert not np.any(gradients[0])
        assert not np.any(gradients[1])
        step, way = 1e-6, [RANDOM.normal(size=x.shape) for x in given[2:]]
        moved = [
            run(*given[:2], *(x + s * y for x, y in zip(given[2:], way, strict=True)), is_causal=True)
            for s in (step, -step)
        ]
        slope = sum(np.sum(x * y) for x, y in zip(gradients[2:], way, strict=True))
        np.testing.assert_allclose((moved[0] - moved[1]) / (2 * step), slope, rtol=1e-6)


def test_what_nobody_sees_may_be_anything():
    hidden = (IDS < 0)[..., None, None]
    poisoned = [np.where(hidden, np.nan, x) for x in (QUERY, KEY, ROWS, COLUMNS)]
    clean = in64(QUERY, KEY, ROWS, COLUMNS, segment_ids=IDS)
    np.testing.assert_array_equal(in64(*poisoned, segment_ids=IDS), clean)
    with jax.enable_x64(True):
        gradients = jax.grad(lambda *x: run(*poisoned[:2], *x, segment_ids=IDS), (0, 1))(
            *map(jnp.asarray, poisoned[2:])
        )
        assert all(np.isfinite(x).all() for x in gradients)
        assert run(*poisoned, segment_ids=np.full_like(IDS, -1)) == 0


def test_errors():
    for arrays, message in (
        ((QUERY, KEY, ROWS[:, :3], COLUMNS), "query_features must be"),
        ((QUERY, KEY, ROWS, COLUMNS[..., :2]), "key_features must be"),
        ((QUERY, KEY, ROWS, COLUMNS[:, :, :1]), "key_features must be"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_distill_loss(*arrays)
