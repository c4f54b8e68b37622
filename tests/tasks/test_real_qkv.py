"""Real queries, keys and values: they are what attention sees, kept on disk, and computed again where damaged."""

import importlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn import masks, tasks
from jattn.models import DecoderLM, TransformerConfig
from jattn.models.pretrained import packages

module = importlib.import_module("jattn.tasks.real_qkv")

CONFIG = TransformerConfig(
    vocab_size=40, features=16, num_layers=3, num_heads=4, num_kv_heads=2, mlp="swiglu", position="rope"
)


def encode(text):
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32) % CONFIG.vocab_size


@pytest.fixture
def tiny(monkeypatch):
    """A random model in the place of the trained one; counts how often it is loaded."""
    model = DecoderLM(CONFIG, rngs=nnx.Rngs(0))
    loads = []

    def load():
        loads.append(1)
        return types.SimpleNamespace(model=model, encode=encode)

    monkeypatch.setattr(module, "_load", load)
    monkeypatch.setattr(module, "_fingerprint", lambda: "tiny")
    return types.SimpleNamespace(model=model, loads=loads)


TEXT = "real text, long enough for nine tokens"


def projected(model, tokens):
    """What attention is given, step by step: the stream, its norm, the projections, the rotation."""
    stream = model.embed(jnp.asarray(tokens)[None])
    places = jnp.arange(len(tokens))[None]
    for block in model.stack.blocks:
        layer, x = block.attention, block.attention_norm(stream)
        query, key, value = jnp.einsum("btm,mnd->btnd", x, layer.query.kernel[...]), layer.key(x), layer.value(x)
        yield *layer.position.rotate(query, key, places, places), value
        stream = stream + layer(x, mask=masks.causal()).output
        stream = stream + block.mlp(block.mlp_norm(stream))


def test_they_are_what_attention_sees(tiny, tmp_path):
    found = tasks.real_qkv([0, -1], length=9, text=TEXT, folder=tmp_path)
    assert found.queries.shape == (2, 9, 4, 4)
    assert found.keys.shape == found.values.shape == (2, 9, 2, 4)
    np.testing.assert_array_equal(found.tokens, encode(TEXT)[:9])
    expected = list(projected(tiny.model, found.tokens))
    for place, layer in enumerate((0, -1)):
        for mine, theirs in zip(found[:3], expected[layer], strict=True):
            np.testing.assert_allclose(mine[place], theirs[0], atol=1e-5)


def test_attention_on_them_gives_the_heads_of_the_model(tiny, tmp_path):
    import jattn

    found = tasks.real_qkv(length=9, text=TEXT, folder=tmp_path)
    heads = tiny.model(found.tokens[None], record=["head_out"]).aux["sites"]["head_out"][:, 0]
    mine = jax.vmap(lambda q, k, v: jattn.dot_product_attention(q, k, v, is_causal=True))(
        *(jnp.asarray(x)[:, None] for x in found[:3])
    )
    np.testing.assert_allclose(mine[:, 0], heads, atol=1e-5)


def test_they_are_kept(tiny, tmp_path):
    first = tasks.real_qkv([1], length=9, text=TEXT, folder=tmp_path)
    again = tasks.real_qkv([1], length=9, text=TEXT, folder=tmp_path)
    assert len(tiny.loads) == 1
    assert [path.suffix for path in tmp_path.iterdir()] == [".npz"]
    for mine, theirs in zip(first, again, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("change", [{"length": 8}, {"text": TEXT + "!"}, {"dtype": np.float16}, {"layers": [2]}])
def test_another_question_is_another_file(tiny, tmp_path, change):
    tasks.real_qkv([1], length=9, text=TEXT, folder=tmp_path)
    asked = {"layers": [1], "length": 9, "text": TEXT, **change}
    found = tasks.real_qkv(asked.pop("layers"), **asked, folder=tmp_path)
    assert len(tiny.loads) == 2
    assert found.keys.dtype == found.queries.dtype == asked.get("dtype", np.float32)
    assert len(list(tmp_path.iterdir())) == 2


def _flip(content):
    middle = content.index(b"queries") + 400
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda c: b"", lambda c: b"no zip", lambda c: c[: len(c) // 2], lambda c: c[:-1], _flip],
    ids=["empty", "other", "half", "short", "bit"],
)
def test_a_damaged_file_is_computed_again(tiny, tmp_path, damage):
    whole = tasks.real_qkv([0], length=9, text=TEXT, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(damage(content))
    again = tasks.real_qkv([0], length=9, text=TEXT, folder=tmp_path)
    assert len(tiny.loads) == 2
    for mine, theirs in zip(whole, again, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    tasks.real_qkv([0], length=9, text=TEXT, folder=tmp_path)
    assert len(tiny.loads) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [3]}, r"layers must lie in \[-3, 3\)"),
        ({"layers": []}, "at least one"),
        ({"length": 99}, "the text has 38 tokens"),
        ({"length": 0}, "positive"),
        ({"dtype": "int8"}, "float32 or float16"),
    ],
)
def test_what_cannot_be_had_is_refused(tiny, tmp_path, change, message):
    asked = {"layers": [0], "length": 9, "text": TEXT, **change}
    with pytest.raises(ValueError, match=message):
        tasks.real_qkv(asked.pop("layers"), **asked, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_that_was_not_fetched_says_how(monkeypatch, tmp_path):
    monkeypatch.setenv("JATTN_DATA", str(tmp_path))
    with pytest.raises(packages.NotFetched, match="jattn fetch smollm2"):
        tasks.real_qkv([0])


def test_importing_tasks_imports_no_model():
    code = "import sys, jattn.tasks; print([m for m in sys.modules if m.startswith(('jattn.models', 'jattn.catalog'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.pretrained
def test_of_the_trained_model(tmp_path):
    try:
        packages.path("smollm2", "weights")
    except packages.NotFetched as missing:
        pytest.skip(str(missing))
    found = tasks.real_qkv([18], length=64, dtype=np.float16, folder=tmp_path)
    assert found.queries.shape == (1, 64, 9, 64)
    assert found.keys.shape == found.values.shape == (1, 64, 3, 64)
    # The sink of a trained model: most of the attention of this layer stands on the first token.
    logits = np.einsum("tnd,snd->nts", found.queries[0].astype(float), np.repeat(found.keys[0], 3, 1).astype(float)) / 8
    logits = np.where(np.tril(np.ones((64, 64), bool)), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    assert weights[:, 8:, 0].mean() > 0.5
