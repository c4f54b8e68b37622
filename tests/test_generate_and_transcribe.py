"""`jattn generate` streams what a model says, `jattn transcribe` prints what it hears; small models stand in."""

import json

import numpy as np
import pytest
from flax import nnx
from scipy.io import wavfile

from jattn.__main__ import main
from jattn.models import DecoderLM, TransformerConfig, pretrained
from jattn.models.pretrained.whisper import Transcript
from jattn.pretrained_commands import named

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Letters:
    """A decoder of letters with the surface of `SmolLM2`."""

    stop_token = 25

    def __init__(self, attention):
        config = TransformerConfig(vocab_size=26, features=16, num_layers=2, num_heads=2, mlp_ratio=1.0)
        self.model = DecoderLM(config, attention=attention, rngs=nnx.Rngs(0))
        self.asked = []

    def encode(self, text):
        self.asked.append(text)
        return np.array([LETTERS.index(letter) for letter in text if letter in LETTERS])

    def decode(self, tokens):
        return "".join(LETTERS[token] for token in tokens)

    def chat(self, messages):
        return self.encode("s" + "".join(text for _, text in messages))

    def chat_turn(self, messages):
        return self.encode("t" + "".join(text for _, text in messages))


class Ears:
    def transcribe(self, sound):
        return Transcript(f"{len(sound)} samples", [(" some", 0.0), ("thing", 0.5), (" said", 1.25)])


@pytest.fixture
def loaded(monkeypatch):
    made = []

    def load(name, **options):
        made.append({"smollm2": Letters, "whisper_tiny_en": Ears}[name](**options))
        return made[-1]

    monkeypatch.setattr(pretrained, "load", load)
    return made


def run(capsys, *arguments):
    status = main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_one_answer(loaded, capsys):
    arguments = ("generate", "--temperature", "0", "--tokens", "5", "hello")
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert loaded[0].asked == ["shello"]
    assert len(out.strip()) <= 5
    assert run(capsys, *arguments)[1] == out


def test_raw_text_goes_on(loaded, capsys):
    status, out, _ = run(capsys, "generate", "--raw", "--tokens", "4", "--seed", "3", "hello")
    assert status == 0 and out.startswith("hello")
    assert loaded[0].asked == ["hello"]
    status, _, error = run(capsys, "generate", "--raw")
    assert status == 2 and "give one" in error


def test_a_conversation_ends_with_an_empty_line(loaded, capsys, monkeypatch):
    lines = iter(["one", "two", "", "three"])
    monkeypatch.setattr("builtins.input", lambda sign: next(lines))
    status, out, _ = run(capsys, "generate", "--temperature", "0", "--tokens", "3")
    assert status == 0
    assert loaded[0].asked == ["sone", "ttwo"]
    assert len(out.splitlines()) == 2


def test_other_attention_and_policy(loaded, capsys):
    options = ("--attention", "window_cache:window=4", "--policy", "sink_window_cache:window=3,num_sinks=1")
    status, out, error = run(capsys, "generate", "--temperature", "0", "--tokens", "9", *options, "abcdef")
    assert status == 0, error
    assert loaded[0].model.attention.name == "window_cache"
    status, _, error = run(capsys, "generate", "--attention", "window_cash:window=4", "a")
    assert status == 2 and "nearest: window_cache" in error
    status, _, error = run(capsys, "generate", "--policy", "window_cache:window", "a")
    assert status == 2 and "OPTION=VALUE" in error


def test_options_are_read_as_python_writes_them():
    assert named("a") == ("a", {})
    assert named("a:b=1,c=x,d=2.5,e=None") == ("a", {"b": 1, "c": "x", "d": 2.5, "e": None})


def test_transcribe(loaded, capsys, tmp_path):
    files = [str(tmp_path / name) for name in ("a.wav", "b.wav")]
    for number, path in enumerate(files):
        wavfile.write(path, 16_000, np.zeros(100 + number, np.int16))
    assert run(capsys, "transcribe", files[0])[1] == "100 samples\n"
    assert run(capsys, "transcribe", *files)[1] == f"{files[0]}: 100 samples\n{files[1]}: 101 samples\n"
    times = run(capsys, "transcribe", "--times", files[0])[1].splitlines()
    assert [line.split() for line in times[1:]] == [["0.00", "something"], ["1.25", "said"]]
    row = json.loads(run(capsys, "transcribe", "--json", files[0])[1])
    assert row == {"file": files[0], "text": "100 samples", "times": [[" some", 0.0], ["thing", 0.5], [" said", 1.25]]}


def test_what_is_missing_is_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("JATTN_DATA", str(tmp_path))
    status, out, error = run(capsys, "generate", "hello")
    assert (status, out) == (2, "")
    assert error == "jattn: smollm2 is not fetched; run: jattn fetch smollm2 (93 MB, Apache-2.0)\n"
    (tmp_path / "a.wav").write_bytes(b"no sound")
    status, _, error = run(capsys, "transcribe", str(tmp_path / "a.wav"))
    assert status == 2 and "cannot be read as a WAV file" in error
    assert run(capsys, "transcribe", str(tmp_path / "none.wav"))[0] == 2
