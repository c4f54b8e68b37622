"""Every weight finds its place, and none is missing, left over or of another shape."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.models import DecoderLM, Swap, TransformerConfig
from jattn.models.pretrained import load
from jattn.models.pretrained.filling import fill, new_in_attention

CONFIG = TransformerConfig(vocab_size=7, features=8, num_layers=2, num_heads=2, mlp_ratio=1.0)


def build(rngs, **options):
    return DecoderLM(CONFIG, **options, rngs=rngs)


def weights_of(model):
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): np.asarray(variable.get_value()) for path, variable in flat}


def test_a_filled_model_is_the_model_its_weights_come_from():
    model = build(nnx.Rngs(3))
    weights = weights_of(model)
    filled = fill(build, weights)
    tokens = jnp.array([[1, 2, 3]])
    np.testing.assert_array_equal(filled(tokens).logits, model(tokens).logits)
    assert not weights


def test_what_a_swapped_mechanism_brings_along_is_new():
    weights = weights_of(build(nnx.Rngs(3)))

    def swapped(rngs):
        return build(rngs, attention=Swap("kv_bias", layers=[1]))

    with pytest.raises(ValueError, match=r"the weights lack stack\.blocks\.1\.attention"):
        fill(swapped, dict(weights))
    model = fill(swapped, weights, new=new_in_attention)
    assert model(jnp.array([[1, 2, 3]])).logits.shape == (1, 3, 7)


def test_weights_that_do_not_fit():
    for change, message in (
        (lambda w: w.pop("embed.embedding"), "lack embed.embedding"),
        (lambda w: w.update(extra=np.zeros(1)), "hold extra, which the model does not have"),
        (lambda w: w.update({"embed.embedding": np.zeros((7, 4))}), r"of shape \[7, 4\]; the model has \[7, 8\]"),
    ):
        weights = weights_of(build(nnx.Rngs(3)))
        change(weights)
        with pytest.raises(ValueError, match=message):
            fill(build, weights, new=new_in_attention)


def test_a_model_that_was_not_fetched_says_which_command_to_run(tmp_path, monkeypatch):
    monkeypatch.setenv("JATTN_DATA", str(tmp_path))
    for name in ("smollm2", "whisper_tiny_en", "minilm", "vit_s14", "rxnmapper"):
        with pytest.raises(FileNotFoundError, match=f"run: jattn fetch {name}"):
            load(name)
