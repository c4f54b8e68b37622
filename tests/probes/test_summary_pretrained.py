"""What the heads of SmolLM2 do: numbers that were found by an implementation of its own, on numpy alone."""

import numpy as np
import pytest

from jattn.models.pretrained import packages, smollm2
from jattn.probes import capture, induction_rows
from jattn.probes.summary import heads_summary, top_heads

pytestmark = pytest.mark.pretrained

TEXT = (
    "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. It is named after the "
    "engineer Gustave Eiffel, whose company designed and built the tower from 1887 to 1889."
)
PERIOD = 25
# Mean mass of the first token over heads and queries from the eighth on, by layer.
SINKS = (
    ".04 .04 .21 .33 .29 .33 .34 .34 .34 .29 .09 .01 .43 .49 .68 .58 .33 .68 .71 .53 .83 .52 .57 .74 .86 .72 .79 .63 "
    ".71 .57"
)
INDUCTION = {(18, 6): 0.90, (17, 4): 0.79, (17, 3): 0.78, (17, 5): 0.75, (18, 7): 0.57}


@pytest.fixture(scope="module")
def summary():
    try:
        loaded = smollm2.load()
    except packages.NotFetched as missing:
        pytest.skip(str(missing))
    random, first = np.random.default_rng(0).integers(1000, 40000, PERIOD), np.zeros((1, 1), np.int32)
    twice = np.concatenate([random, random])[None].astype(np.int32)
    rows = induction_rows(PERIOD)
    seen = capture(loaded.model, loaded.encode(TEXT)[None], sites=("resid",), logits_at=first)
    repeated = capture(loaded.model, twice, rows=rows, sites=(), logits_at=first)
    return heads_summary(seen, repeated=repeated, period=PERIOD, rows=rows)


def test_every_layer_has_the_known_sink(summary):
    found = np.asarray(summary["sink_mass"]).mean(1)
    np.testing.assert_allclose(found, [float(mass) for mass in SINKS.split()], atol=0.01)


def test_the_known_induction_heads_are_the_strongest(summary):
    found = {(layer, head): score for layer, head, score in top_heads(summary["induction"], len(INDUCTION))}
    assert list(found) == list(INDUCTION)
    np.testing.assert_allclose(list(found.values()), list(INDUCTION.values()), atol=0.01)


def test_the_sink_begins_where_the_first_vector_grows(summary):
    """Layers 11 to 27 hold a first vector a hundred times as long as the others, and attention to it follows."""
    norms = summary["resid_norms"]
    ratio = np.asarray(norms["first"] / norms["median"])
    assert (ratio[11:22] > 50).all()
    assert ratio[10] < 2
    np.testing.assert_array_equal(norms["first"][11:], norms["largest"][11:])
    mass = np.asarray(summary["sink_mass"]).mean(1)
    assert mass[11] < 0.05
    assert mass[12:].min() > 0.3
