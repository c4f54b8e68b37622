"""The probe of a model: what it writes for tiny random ones, what it refuses, and what it says of missing weights."""

import dataclasses
import json
import re
import types

import numpy as np
import pytest
from absl import app, flags
from flax import nnx
from scipy.io import wavfile

from experiments import probe, probe_models, probe_page
from experiments.probe_models import View
from jattn.models import DecoderLM, TransformerConfig, pretrained
from jattn.models.encoder_decoder import EncoderDecoder
from jattn.models.pretrained import smollm2, whisper

TEXT = "A ton\nof $<b>"
LAYERS, HEADS = 2, 2


class Letters:
    """A tokenizer of single letters; marks come after them."""

    marks = ("startoftranscript", "notimestamps", "endoftext")

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return types.SimpleNamespace(ids=[ord(letter) for letter in text])

    def decode(self, tokens, skip_special_tokens=True):
        return "".join(chr(token) for token in tokens if token < 128)

    def token_to_id(self, name):
        return 128 + self.marks.index(name[2:-2])


def config(**options):
    return TransformerConfig(vocab_size=131, features=12, num_layers=LAYERS, num_heads=HEADS, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("probe"), []
    with pytest.MonkeyPatch.context() as patch:
        loaded = smollm2.SmolLM2(DecoderLM(config(), rngs=nnx.Rngs(0)), Letters(), 130)
        patch.setattr(smollm2, "load", lambda: loaded)
        results = probe.run("smollm2", TEXT, folder, "the <command>", said.append)
    return folder, results, said


@pytest.mark.slow
def test_numbers_of_every_head(finished):
    folder, results, _ = finished
    assert json.loads((folder / "smollm2.json").read_text()) == json.loads(json.dumps(results))
    assert results["schema"] == probe.SCHEMA
    assert results["facts"]["text"] == TEXT
    (view,) = results["views"]
    for name in ("sink_mass", "entropy", "induction"):
        assert np.shape(view[name]) == (LAYERS, HEADS)
        assert np.min(view[name]) >= 0
    assert (view["column"], view["column_label"], view["from_row"], view["period"]) == (0, "A", 8, 25)
    np.testing.assert_allclose(view["sink_per_layer"], np.mean(view["sink_mass"], 1), atol=1e-5)
    np.testing.assert_allclose(sum(view["drawn"]), 1, atol=1e-3)
    assert {name: len(norms) for name, norms in view["resid_norms"].items()} == {
        "first": LAYERS,
        "median": LAYERS,
        "largest": LAYERS,
    }
    assert view["queries"][1:6] == ["·", "t", "o", "n", "\\n"]
    assert [len(head) for head in view["top_induction"]] == [3] * 4


@pytest.mark.slow
def test_the_likelihood_is_that_of_the_model(finished):
    model = DecoderLM(config(), rngs=nnx.Rngs(0))
    tokens = np.array([[ord(letter) for letter in TEXT]])
    logits = np.asarray(model(tokens).logits, np.float64)[0, :-1]
    nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(TEXT) - 1), tokens[0, 1:]]
    assert finished[1]["facts"]["negative log-likelihood"] == f"{nll.mean():.3f} nats a token"


@pytest.mark.slow
def test_the_page_stands_alone(finished):
    folder, results, _ = finished
    page = (folder / "smollm2.html").read_text()
    pictures = sorted(file.name for file in (folder / "smollm2").iterdir())
    assert page.count("data:image/png;base64,") == len(pictures)
    assert {"decoder_induction.png", "decoder_layer_0.png", "decoder_repeated.png", "decoder_norms.png"} <= {*pictures}
    assert all((folder / "smollm2" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert "the &lt;command&gt;" in page
    assert ">&lt;</span>" in page
    assert "<b>" not in page
    assert not re.search(r"(src|href)=.?(http|/|\w+\.png)", page)


@pytest.mark.slow
def test_links_lead_somewhere(finished):
    page = (finished[0] / "smollm2.html").read_text()
    links, anchors = set(re.findall(r'href="#([^"]+)"', page)), re.findall(r'id="([^"]+)"', page)
    assert links <= set(anchors)
    assert {f"decoder-layer-{layer}" for layer in range(LAYERS)} <= links
    assert len(anchors) == len(set(anchors))


@pytest.mark.slow
def test_the_table_holds_all_heads_the_strongest_first(finished):
    folder, results, _ = finished
    body = (folder / "smollm2.html").read_text().split("<tbody>")[1].split("</tbody>")[0]
    rows = [re.findall(r'data-value="([^"]+)"', row) for row in body.strip().splitlines()]
    assert {(int(row[0]), int(row[1])) for row in rows} == {(i, j) for i in range(LAYERS) for j in range(HEADS)}
    scores = [float(row[2]) for row in rows]
    assert scores == sorted(np.ravel(results["views"][0]["induction"]).tolist(), reverse=True)


@pytest.mark.slow
def test_progress_and_the_last_word(finished):
    _, results, said = finished
    assert said[0] == "loading smollm2"
    assert said[-1] == f"decoder: layer {LAYERS - 1}"
    told = probe.told(results)
    assert "Decoder, self attention, 2 layers of 2 heads" in told
    assert "mass on key 0 (A) by layer: " in told


def test_a_short_text_is_refused():
    loaded = smollm2.SmolLM2(DecoderLM(config(), rngs=nnx.Rngs(0)), Letters(), 130)
    with pytest.raises(ValueError, match="at least 10 tokens are needed, got 2"):
        probe_models.probe_smollm2(loaded, "ab")


@pytest.mark.slow
def test_whisper_has_three_views(tmp_path):
    made = config(position="learned", norm="layernorm", max_length=8)
    rngs = nnx.Rngs(0)
    model = EncoderDecoder(
        made,
        dataclasses.replace(made, max_length=1500),
        front=whisper.SoundFront(made.features, whisper.MELS, rngs=rngs),
        rngs=rngs,
    )
    marks = tuple(range(128, 131))
    loaded = whisper.Whisper(model, Letters(), ((1, 0), (1, 1)), marks, marks)
    random = np.random.default_rng(0)
    wavfile.write(tmp_path / "sound.wav", 16000, random.uniform(-1, 1, 8000).astype(np.float32))
    probed = probe_models.probe_whisper_tiny_en(loaded, str(tmp_path / "sound.wav"))
    cross, decoder, encoder = probed.views
    assert probed.facts["sound"] == "sound.wav, 0.50 s"
    assert cross.weights.shape == (LAYERS, 1, HEADS, 6, 1500)
    assert decoder.weights.shape == (LAYERS, 1, HEADS, 8, 8)
    assert encoder.weights.shape == (LAYERS, 1, HEADS, 25, 1500)
    for view in probed.views:
        np.testing.assert_allclose(view.weights.sum(-1), 1, rtol=1e-5)
        assert (len(view.queries), len(view.keys)) == view.weights.shape[-2:]
        assert "induction" not in probe.numbers_of(view)
    # The rows of the cross attention are those that predict the tokens, as in the model's own alignment.
    tokens = loaded.tokens(wavfile.read(tmp_path / "sound.wav")[1])
    mean = np.mean([cross.weights[layer, 0, head] for layer, head in loaded.alignment_heads], axis=0)
    sound = wavfile.read(tmp_path / "sound.wav")[1]
    np.testing.assert_allclose(mean, loaded.alignment(sound, tokens), rtol=1e-5, atol=1e-8)
    assert list(cross.places) == mean[:, :25].argmax(1).tolist()
    numbers = probe.numbers_of(cross)
    assert numbers["named"] == {"alignment": [[1, 0], [1, 1]]}
    assert probe_page.interesting(cross, numbers)["alignment"] == [(1, 0), (1, 1)]


def test_pictures_of_images_and_of_sinks_that_are_looked_for(tmp_path):
    weights = np.full((1, 1, 2, 5, 5), 0.1, np.float32)
    weights[..., 3] = 0.6
    view = View("encoder", "a title", weights, list("cabde"), list("cabde"), column=None, grid=(2, 2), listed=False)
    numbers = probe.numbers_of(view)
    assert (numbers["column"], numbers["column_label"]) == (3, "d")
    np.testing.assert_allclose(numbers["sink_mass"], 0.6)
    files = probe_page.draw(view, numbers, tmp_path, lambda text: None)
    assert {"sink_mass", "entropy", "sinks", "layer_0"} <= set(files)
    assert not {"norms", "induction", "repeated"} & set(files)


@pytest.fixture
def values():
    found = flags.FlagValues()
    probe.define_flags(found)
    return found


def test_missing_weights_are_an_error_that_says_what_to_do(values, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JATTN_DATA", str(tmp_path))
    values(["probe", f"--output={tmp_path / 'out'}"])
    with pytest.raises(SystemExit) as stopped:
        probe.main(["probe"], values)
    assert stopped.value.code == 2
    assert "error: smollm2 is not fetched; run: jattn fetch smollm2 (93 MB" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_does_not_belong_to_the_model_is_refused(values):
    values(["probe", "--file=sound.wav"])
    with pytest.raises(app.UsageError, match="smollm2 takes --text, not --file"):
        probe.main(["probe"], values)
    with pytest.raises(app.UsageError, match="unknown arguments: smollm2"):
        probe.main(["probe", "smollm2"], values)


def test_every_model_has_an_adapter():
    assert sorted(probe_models.ADAPTERS) == pretrained.names()


def test_unknown_models_are_refused(values):
    with pytest.raises(flags.IllegalFlagValueError, match="smollm2"):
        values(["probe", "--model=gpt"])
