"""Statistics on what hooks observe, on inputs whose answers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.probes import (
    AttnHook,
    attention,
    attention_entropy,
    column_counts,
    induction_rows,
    induction_score,
    kept_mass,
    kept_mass_of_lse,
    per_query_head,
    sink_rate,
)

HARMONIC = sum(1 / n for n in range(1, 65))


def causal_uniform(length):
    return np.tril(np.ones((length, length))) / np.arange(1, length + 1)[:, None]


def test_entropy_of_known_rows():
    rows = np.array([[0.25] * 4, [1, 0, 0, 0], [0] * 4, [0.5, 0.5, 0, 0]])
    np.testing.assert_allclose(attention_entropy(rows), [np.log(4), 0, 0, np.log(2)], rtol=1e-6)
    assert not np.signbit(attention_entropy(rows)).any()
    c = 0.3
    np.testing.assert_allclose(attention_entropy(c * rows[0]), c * np.log(4) - c * np.log(c), rtol=1e-6)
    np.testing.assert_allclose(attention_entropy(c * rows, renormalize=True), attention_entropy(rows), rtol=1e-6)
    assert attention_entropy(jnp.ones(4, jnp.bfloat16) / 4).dtype == jnp.float32
    assert np.isfinite(jax.grad(lambda w: attention_entropy(w).sum())(jnp.asarray(rows))).all()


def test_the_mean_of_heads_spreads_more_than_the_heads_do():
    heads = np.random.default_rng(0).dirichlet(np.ones(6), size=4)
    assert attention_entropy(heads.mean(0)) >= attention_entropy(heads).mean()


def test_sink_rate_of_known_attention():
    counts = np.arange(64, 0, -1)
    uniform, first, diagonal = causal_uniform(64), np.eye(1, 64).repeat(64, 0), np.eye(64)
    mass = np.stack([weights.sum(0) for weights in (uniform, first, diagonal)], -1)[None]
    alpha, rate = sink_rate(mass, counts)
    assert alpha.shape == (1, 3, 64) and rate.shape == (64,)
    np.testing.assert_allclose(alpha[0, 0, 0], HARMONIC / 64, rtol=1e-6)
    np.testing.assert_allclose(alpha[0, 1], np.eye(1, 64)[0])
    np.testing.assert_allclose(alpha[0, 2], 1 / counts, rtol=1e-6)
    np.testing.assert_allclose((counts * alpha).sum(-1), 64, rtol=1e-5)
    np.testing.assert_allclose(rate[0], 100 / 3, rtol=1e-6)
    layers = sink_rate(np.stack([mass, mass]), counts[None, None, None])
    np.testing.assert_allclose(layers[1], rate)
    assert layers[0].shape == (2, 1, 3, 64)


def test_sink_rate_of_an_attention_call(arrays):
    """Column masses from the hook, counts from the mask; a key that nobody sees has alpha 0."""
    mask = jattn.masks.causal() & ~jattn.masks.prefix(1)
    hook = AttnHook(qkv=per_query_head, observe="col_mass")
    _, aux = attention(**arrays, mask=mask, hook=hook)
    counts = column_counts(mask, 5, 7, batch=2, num_heads=4)
    alpha, rate = sink_rate(aux["col_mass"], counts)
    assert alpha.shape == (2, 4, 7)
    weights = attention(**arrays, mask=mask, hook=AttnHook(observe="row_weights"))[1]["row_weights"]
    np.testing.assert_allclose(alpha, weights.sum(2) / np.maximum(counts, 1), rtol=1e-5, atol=1e-6)
    assert not np.asarray(alpha)[..., [0, 5, 6]].any() and rate.shape == (7,)


def test_column_counts_of_masks_of_every_kind():
    random = np.random.default_rng(1).random((2, 3, 5, 7)) < 0.5
    np.testing.assert_array_equal(column_counts(random, 5, 7, batch=2, num_heads=3), random.sum(2))
    np.testing.assert_array_equal(column_counts(random[0, 0], 5, 7)[0, 0], random[0, 0].sum(0))
    np.testing.assert_array_equal(column_counts(random[:, :, :1], 5, 7, batch=2, num_heads=3), 5 * random[:, :, 0])
    assert column_counts(None, 3).tolist() == [[[3, 3, 3]]]
    places = {"query_positions": np.array([[0, 3, 9]]), "key_positions": np.array([[1, 3]])}
    found = column_counts(jattn.masks.causal(), 3, 2, batch=2, **places)
    assert found.tolist() == [[[2, 2]], [[2, 2]]]
    dense = jattn.masks.dense(random)
    np.testing.assert_array_equal(column_counts(dense, 5, 7, batch=2, num_heads=3), random.sum(2))
    with pytest.raises(ValueError):
        column_counts(dense, 6, 7, batch=2, num_heads=3)


def test_induction_score_reads_the_successor_of_the_first_occurrence():
    period = 6
    looks_back = np.eye(12, k=-(period - 1))
    assert float(induction_score(looks_back, period)) == 1
    assert float(induction_score(np.eye(12, k=-period), period)) == 0
    random = np.random.default_rng(2).dirichlet(np.ones(12), size=(3, 12))
    expected = np.mean([random[:, i, i - period + 1] for i in range(period + 1, 2 * period - 1)], axis=0)
    np.testing.assert_allclose(induction_score(random, period), expected, rtol=1e-6)
    rows = induction_rows(period)
    np.testing.assert_allclose(induction_score(random[:, rows], period, rows=rows), expected, rtol=1e-6)
    for weights, given in ((random[:, :10], None), (random, rows), (random[:, rows, :5], rows)):
        with pytest.raises(ValueError, match="do not hold"):
            induction_score(weights, period, rows=given)
    with pytest.raises(ValueError, match="period"):
        induction_rows(2)


def test_an_attention_that_looks_for_induction_is_found(square):
    """Queries that equal the keys P - 1 tokens back, in rows that the hook picks."""
    period, length = 4, 8
    codes = 20 * np.eye(length)[None, :, None]
    queries = np.roll(codes, -(period - 1), axis=-1)
    hook = AttnHook(rows=induction_rows(period), observe="row_weights")
    _, aux = attention(queries, codes, codes, is_causal=True, hook=hook)
    assert float(induction_score(aux["row_weights"], period, rows=induction_rows(period))[0, 0]) > 0.99


def test_kept_mass_by_weights_and_by_lse(square):
    full = AttnHook(observe={"row_weights", "lse"})
    _, all_pairs = attention(**square, is_causal=True, hook=full)
    window = jattn.masks.sliding_window(2)
    _, kept = attention(**square, is_causal=True, mask=window, hook=full)
    support = window.to_dense(1, 1, 5, 5)
    by_weights = kept_mass(all_pairs["row_weights"], support)
    by_row = kept_mass_of_lse(kept["lse"], all_pairs["lse"])
    np.testing.assert_allclose(by_weights, by_row.mean(1), rtol=1e-5)
    np.testing.assert_allclose(kept_mass(all_pairs["row_weights"], kept["row_weights"]), by_weights, rtol=1e-6)
    assert kept_mass(np.zeros((2, 2)), np.ones((2, 2), bool)) == 0


def test_errors_of_sink_rate():
    with pytest.raises(ValueError, match="col_mass"):
        sink_rate(np.ones((4, 2)), np.ones(4))
    with pytest.raises(ValueError, match="counts"):
        sink_rate(np.ones((1, 4, 2)), np.ones(5))
