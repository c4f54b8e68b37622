"""Windows inside the trained decoder: perplexity over three articles, against figures of another implementation."""

import numpy as np
import pytest
from flax import nnx

from experiments import swap_cells
from jattn.models import Swap, pretrained
from jattn.tasks.real_qkv import articles

pytestmark = pytest.mark.pretrained

# Of an independent implementation in float32, over the first 2,048 tokens in one pass.
FIGURES = {
    "full": (Swap("softmax_attention"), 9.209),
    "window": (Swap("window_cache", {"window": 256}), 17.377),
    "window and sinks": (Swap("sink_window_cache", {"window": 256, "num_sinks": 4, "positions": "original"}), 10.531),
}


@pytest.mark.parametrize("name", FIGURES)
def test_perplexity_under_a_window(name):
    swap, expected = FIGURES[name]
    try:
        loaded = pretrained.load("smollm2", attention=swap)
    except pretrained.NotFetched as missing:
        pytest.skip(str(missing))
    tokens = loaded.encode(articles())[None, :2048]
    logits = nnx.jit(lambda model, tokens: model(tokens).logits)(loaded.model, tokens)
    np.testing.assert_allclose(swap_cells.perplexity_of(logits, tokens), expected, rtol=0.002)
