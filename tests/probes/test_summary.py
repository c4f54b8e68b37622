"""Numbers a head, on weights whose numbers are known without computing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.models import DecoderLM, TransformerConfig
from jattn.probes import capture, induction_rows
from jattn.probes.summary import heads_summary, mean_entropy, residual_norms, sink_mass, top_heads, weights_by_rows

LENGTH = 12


def heads(*maps):
    """[L = 1, B = 1, N, T, S] of some maps."""
    return np.stack(maps)[None, None].astype(np.float32)


def uniform():
    return np.tril(np.ones((LENGTH, LENGTH))) / np.arange(1, LENGTH + 1)[:, None]


def first_key():
    weights = np.zeros((LENGTH, LENGTH))
    weights[:, 0] = 1
    return weights


def induction(period):
    """A head that does what induction heads do, and looks at the first key where it cannot."""
    weights = first_key()
    for i in range(period + 1, LENGTH):
        weights[i] = np.eye(LENGTH)[i - period + 1]
    return weights


def test_sink_mass_of_known_heads():
    found = sink_mass(heads(uniform(), np.eye(LENGTH), first_key()))
    expected = [[np.mean([1 / (i + 1) for i in range(8, LENGTH)]), 0, 1]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_sink_mass_takes_the_column_and_the_rows_that_it_is_told():
    weights = heads(np.eye(LENGTH))
    assert sink_mass(weights, column=-1, from_row=0).tolist() == [[pytest.approx(1 / LENGTH)]]
    assert sink_mass(weights, column=LENGTH - 1, from_row=LENGTH - 1).tolist() == [[1.0]]


def test_sink_mass_is_a_mean_over_samples_for_every_layer():
    weights = np.random.default_rng(0).random((3, 2, 4, LENGTH, LENGTH))
    found = sink_mass(weights, 1, 5)
    assert found.shape == (3, 4)
    np.testing.assert_allclose(found, weights[:, :, :, 5:, 1].mean((1, 3)), rtol=1e-6)


def test_entropy_of_known_heads():
    found = mean_entropy(heads(uniform(), np.eye(LENGTH), first_key()))
    np.testing.assert_allclose(found, [[np.mean(np.log(np.arange(9, LENGTH + 1))), 0, 0]], rtol=1e-6)


def test_entropy_is_a_mean_over_samples_for_every_layer():
    weights = np.random.default_rng(0).random((3, 2, 4, LENGTH, LENGTH))
    expected = -(weights * np.log(weights)).sum(-1)[..., 2:].mean((1, 3))
    np.testing.assert_allclose(mean_entropy(weights, 2), expected, rtol=1e-5)


def test_residual_norms():
    resid = np.random.default_rng(0).standard_normal((3, 2, 5, 4))
    norms = np.sqrt((resid**2).sum(-1))
    found = residual_norms(resid)
    np.testing.assert_allclose(found["first"], norms[:, :, 0].mean(1), rtol=1e-5)
    np.testing.assert_allclose(found["median"], np.median(norms.reshape(3, -1), 1), rtol=1e-5)
    np.testing.assert_allclose(found["largest"], norms.reshape(3, -1).max(1), rtol=1e-5)


def test_summary_tells_a_perfect_induction_head_from_others():
    period = 6
    weights = heads(induction(period), uniform(), first_key())
    found = heads_summary({"weights": weights}, repeated={"weights": weights}, period=period)
    assert set(found) == {"sink_mass", "entropy", "induction"}
    np.testing.assert_allclose(found["induction"][0, [0, 2]], [1, 0])
    assert 0 < found["induction"][0, 1] < 0.2
    assert top_heads(found["induction"], 1) == [(0, 0, 1.0)]


def test_the_rows_of_the_second_half_are_enough_for_induction():
    period, rows = 6, induction_rows(6)
    weights = np.random.default_rng(0).random((2, 1, 3, LENGTH, LENGTH))
    some = {"weights": weights[:, :, :, rows]}
    all_rows = heads_summary({"weights": weights}, repeated={"weights": weights}, period=period)
    found = heads_summary({"weights": weights}, repeated=some, period=period, rows=rows)
    np.testing.assert_array_equal(found["induction"], all_rows["induction"])


@pytest.fixture(scope="module")
def decoder():
    return DecoderLM(TransformerConfig(vocab_size=11, features=8, num_layers=2, num_heads=2), rngs=nnx.Rngs(0))


def test_weights_by_rows_are_the_weights(decoder):
    tokens = np.random.default_rng(0).integers(0, 11, (2, 4))
    whole = capture(decoder, tokens, sites=())["weights"]
    row = whole.nbytes // 4
    for max_bytes in (1, 3 * row, 100 * row):
        found = weights_by_rows(decoder, tokens, 4, max_bytes=max_bytes)
        np.testing.assert_allclose(found, whole, rtol=1e-6, atol=1e-7)
    half = weights_by_rows(decoder, tokens, 4, dtype=np.float16)
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, whole, rtol=1e-3)
    with pytest.raises(ValueError, match="length is 3, the model's attention sees 4 tokens"):
        weights_by_rows(decoder, tokens, 3)


def test_summary_of_what_a_model_shows_under_jit(decoder):
    seen = capture(decoder, jnp.zeros((1, LENGTH), jnp.int32), sites=("resid",))
    found = jax.jit(heads_summary)(seen)
    assert found["sink_mass"].shape == found["entropy"].shape == (2, 2)
    assert {name: value.shape for name, value in found["resid_norms"].items()} == {
        "first": (2,),
        "median": (2,),
        "largest": (2,),
    }
    # The same token everywhere: all logits of a row are equal but for rotary positions, so no head is sharp.
    assert float(found["entropy"].min()) > 0


def test_top_heads_in_order():
    values = np.array([[0.1, 0.9], [0.9, 0.2]])
    assert top_heads(values, 3) == [(0, 1, 0.9), (1, 0, 0.9), (1, 1, 0.2)]
    assert top_heads(values, 1, smallest=True) == [(0, 0, 0.1)]
    assert len(top_heads(values, 9)) == 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: sink_mass(w[0, 0]), r"must be \[\.\.\., B, N, T, S\], got \[1, 12, 12\]"),
        (lambda w: sink_mass(w, column=12), "column is 12, the weights have 12 keys"),
        (lambda w: sink_mass(w, from_row=12), "from_row is 12, the weights have 12 queries"),
        (lambda w: mean_entropy(w[0]), r"must be \[L, B, N, T, S\], got \[1, 1, 12, 12\]"),
        (lambda w: residual_norms(w), "must be"),
        (lambda w: heads_summary({"weights": w}, period=6), "belong together"),
        (lambda w: heads_summary({"weights": w}, repeated={"weights": w}), "belong together"),
        (lambda w: top_heads(w), r"values must be \[L, N\]"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(heads(np.eye(LENGTH)))
