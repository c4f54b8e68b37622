"""`experiments.speed` measures what it says; small models stand in."""

import numpy as np
import pytest
from flax import nnx
from scipy.io import wavfile

from experiments import speed
from jattn.models import DecoderLM, TransformerConfig
from jattn.models.pretrained.whisper import Transcript


def test_reading_and_generating(monkeypatch):
    class Language:
        config = TransformerConfig(vocab_size=40_000, features=8, num_layers=1, num_heads=2, mlp_ratio=1.0)
        model = DecoderLM(config, rngs=nnx.Rngs(0))

    monkeypatch.setattr(speed.pretrained, "load", lambda name: Language())
    found = speed.smollm2(length=8, steps=3, repeats=2)
    assert found["prefill_tokens"] == 8
    for name in ("load_s", "prefill_s", "decode_tokens_per_s"):
        assert found[name] > 0
    assert found["prefill_temp_bytes"] >= 0


def test_transcribing(monkeypatch, tmp_path):
    class Speech:
        def transcribe(self, sound):
            return Transcript(f"{len(sound)} samples", [])

    wavfile.write(tmp_path / "a.wav", 16_000, np.zeros(8000, np.int16))
    monkeypatch.setattr(speed.pretrained, "load", lambda name: Speech())
    found = speed.whisper(str(tmp_path / "a.wav"), repeats=1)
    assert found["text"] == "8000 samples" and found["sound_s"] == 0.5


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("JATTN_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="run: jattn fetch smollm2"):
        speed.smollm2(length=8, steps=1, repeats=1)
