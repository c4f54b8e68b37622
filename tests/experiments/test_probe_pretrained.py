"""Every trained model that is on this machine is probed: weights are weights, labels fit, known numbers come out."""

import numpy as np
import pytest

from experiments import probe
from experiments.probe_models import ADAPTERS
from jattn.models import pretrained

pytestmark = pytest.mark.pretrained
VIEWS = {
    "smollm2": {"decoder": (30, 9)},
    "whisper_tiny_en": {"cross": (4, 6), "decoder": (4, 6), "encoder": (4, 6)},
    "minilm": {"encoder": (6, 12)},
    "rxnmapper": {"encoder": (12, 8)},
    "vit_s14": {"encoder": (12, 6)},
}
# Mean attention to [CLS] by layer.
MINILM_SINKS = [0.27, 0.56, 0.62, 0.68, 0.69, 0.38]


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_trained_model(name):
    adapter = ADAPTERS[name]
    try:
        probed = adapter.probe(pretrained.load(name), adapter.example())
    except pretrained.NotFetched as missing:
        pytest.skip(str(missing))
    numbers = {view.name: probe.numbers_of(view) for view in probed.views}
    assert {view: (found["layers"], found["heads"]) for view, found in numbers.items()} == VIEWS[name]
    for view in probed.views:
        assert (len(view.queries), len(view.keys)) == view.weights.shape[-2:]
        # float16 keeps three digits of each of up to 1500 weights.
        np.testing.assert_allclose(view.weights.sum(-1, dtype=np.float64), 1, atol=2e-3)
    if name == "minilm":
        np.testing.assert_allclose(numbers["encoder"]["sink_per_layer"], MINILM_SINKS, atol=0.01)
        assert numbers["encoder"]["column_label"] == "[CLS]"
    if name == "rxnmapper":
        assert probed.facts["mapped by attention"].count(":") == 22
    if name == "whisper_tiny_en":
        assert sorted(probed.views[0].places) == list(probed.views[0].places)
